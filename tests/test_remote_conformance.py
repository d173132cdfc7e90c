"""The conformance suite over a farm: as a RemoteEnv, and as one slot of a pool."""

import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

if "conformance" not in sys.modules:
    pytest.register_assert_rewrite("conformance")

from conformance import Conformance
from farms import PoolFace, RemoteFace, farm_here
from test_conformance import opener

from farmer import RemoteEnv


class TestRemoteEnv(Conformance):
    @pytest.fixture
    def open_face(self):
        yield from opener(RemoteFace)


class TestPool(Conformance):
    @pytest.fixture
    def open_face(self):
        yield from opener(PoolFace)


def test_a_remote_pendulum_passes_gymnasiums_own_check():
    with farm_here("Pendulum-v1") as address:
        env = RemoteEnv("Pendulum-v1", [(address, 1)])
        try:
            with warnings.catch_warnings():
                # It asks for a spec, to build the environment a second time and to try its render modes: a farm's
                # environment is built on the farm. What it finds in Pendulum's own spaces is not ours either.
                warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")
                check_env(env, skip_render_check=True)
        finally:
            env.close()


def test_spaces_and_episodes_of_a_remote_pendulum_are_those_of_a_local_one():
    local = gymnasium.make("Pendulum-v1", disable_env_checker=True)
    with farm_here("Pendulum-v1") as address:
        env = RemoteEnv("Pendulum-v1", [(address, 1)])
        try:
            for here, there in (
                (local.observation_space, env.observation_space),
                (local.action_space, env.action_space),
            ):
                assert here == there
                assert here.dtype == there.dtype
                np.testing.assert_array_equal(here.low, there.low)
                np.testing.assert_array_equal(here.high, there.high)
            first, _ = local.reset(seed=11)
            again, _ = env.reset(seed=11)
            np.testing.assert_array_equal(first, again)
            local.action_space.seed(3)
            for _ in range(200):
                action = local.action_space.sample()
                here, there = local.step(action), env.step(action)
                np.testing.assert_array_equal(here[0], there[0])
                assert here[1:4] == there[1:4]
            assert there[3], "Pendulum is cut off after 200 steps"
        finally:
            env.close()
            local.close()
