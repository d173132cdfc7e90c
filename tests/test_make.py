"""Environments of a farm by gymnasium's own `make`, `make_vec` and `spec`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from farms import farm_here
from gymnasium.envs import registration
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import farmer
from farmer import FarmVectorEnv, RemoteEnv
from wire.errors import NoSuchEnvironment

ROOT = Path(__file__).resolve().parents[1]
ID = "farm/environments.CountingEnv"


@pytest.fixture(scope="module")
def farm():
    with farm_here("CountingEnv", slots=3) as address:
        yield address


@pytest.fixture
def here(farm):
    return {"farmlist": [(farm, 3)]}


def still(envs):
    return np.zeros((envs.num_envs, 1), np.float32)


def test_make_gives_one_remote_environment_under_gymnasiums_wrappers(here):
    with gymnasium.make(ID, **here) as env:
        assert isinstance(env, gymnasium.wrappers.OrderEnforcing)
        assert isinstance(env.unwrapped, RemoteEnv)
        assert env.spec.id == ID
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(np.zeros(1, np.float32))
        _, info = env.reset(seed=6, options={"level": 2})
        assert (info["seed"], info["options"]) == (6, {"level": 2})
        observation, reward, terminated, truncated, _ = env.step(np.array([0.5], np.float32))
        assert (observation[1:].tolist(), reward, terminated, truncated) == ([1, 0.5], 1.0, False, False)


def test_a_time_limit_of_gymnasiums_applies(here):
    with gymnasium.make(ID, max_episode_steps=2, **here) as env:
        for _ in range(2):
            env.reset()
            assert [env.step(np.zeros(1, np.float32))[3] for _ in range(2)] == [False, True]


def test_an_environment_that_is_forgotten_frees_its_slot(here):
    env = gymnasium.make(ID, **here)
    env.reset()
    del env
    with farmer.make_vec("environments:CountingEnv", 3, **here) as envs:
        assert envs.num_envs == 3


def test_make_imports_the_farmer_by_itself_where_the_id_names_it(farm):
    code = (
        "import gymnasium, sys\n"
        "assert 'farmer' not in sys.modules\n"
        "env = gymnasium.make('farmer:%s', farmlist=[('%s', 1)])\n"
        "print(env.reset(seed=9)[1]['seed'])\n"
        "env.close()\n" % (ID, farm)
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("9\n", 0), done.stderr


@pytest.mark.parametrize("mode", ["SameStep", AutoresetMode.DISABLED])
def test_make_vec_gives_the_vector_environment_and_its_spec_gives_it_again(here, mode):
    envs = gymnasium.make_vec(ID, num_envs=2, autoreset_mode=mode, **here)
    with envs:
        assert isinstance(envs, FarmVectorEnv)
        assert envs.metadata["autoreset_mode"] is AutoresetMode(mode)
        assert envs.spec.id == ID
    again = gymnasium.make_vec(envs.spec)
    with again:
        assert (again.num_envs, again.metadata["autoreset_mode"]) == (2, AutoresetMode(mode))
        again.reset()
        assert again.step(still(again))[1].tolist() == [1, 1]


def test_make_vec_takes_a_time_limit(here):
    with gymnasium.make_vec(ID, num_envs=2, max_episode_steps=2, **here) as envs:
        envs.reset()
        assert [envs.step(still(envs))[3].tolist() for _ in range(2)] == [[False] * 2, [True] * 2]
        assert envs.step(still(envs))[0][:, 1].tolist() == [0, 0]


def test_the_spec_of_ours_makes_the_same_again(here):
    with farmer.make_vec("environments:CountingEnv", 2, autoreset_mode="SameStep", **here) as envs:
        spec = envs.spec
    with gymnasium.make_vec(spec) as again:
        assert (again.spec.id, again.num_envs, again.autoreset_mode) == (ID, 2, AutoresetMode.SAME_STEP)


def test_gymnasiums_own_vectorizers_take_remote_environments(farm):
    envs = gymnasium.make_vec(ID, 2, vectorization_mode="sync", farmlist=[(farm, 1)])
    assert isinstance(envs, SyncVectorEnv)
    with contextlib.closing(envs):
        envs.reset()
        assert envs.step(still(envs))[1].tolist() == [1, 1]


def test_a_name_that_is_no_id_is_given_as_env(here):
    with gymnasium.make("farm/any", env="environments:CountingEnv", **here) as env:
        assert env.reset()[0].shape == (3,)
    with gymnasium.make_vec("farm/any", num_envs=2, env="environments:CountingEnv", **here) as envs:
        assert envs.num_envs == 2


def test_what_no_farm_offers_is_said_by_the_farm(here):
    with pytest.raises(NoSuchEnvironment, match=r"Pendlum-v1(.|\n)*environments:CountingEnv"):
        gymnasium.make("farm/Pendlum-v1", **here)


def test_there_is_no_render_mode(here):
    with (
        pytest.warns(UserWarning, match="not in the possible render_modes"),
        pytest.raises(TypeError, match="a farm sends no pictures"),
    ):
        gymnasium.make(ID, render_mode="rgb_array", **here)


def test_gymnasiums_registry_is_otherwise_what_it_was():
    assert gymnasium.spec("CartPole-v1").entry_point == "gymnasium.envs.classic_control.cartpole:CartPoleEnv"
    assert "farm/NotAskedFor-v0" not in registration.registry
    spec = gymnasium.spec("farm/Asked-v3")
    assert (spec.namespace, spec.name, spec.version, spec.kwargs) == ("farm", "Asked", 3, {"env": "Asked-v3"})
    assert gymnasium.spec("farm/osim.L2M2019").kwargs == {"env": "osim:L2M2019"}
    assert gymnasium.spec("farm/pack.age.Thing-v0").kwargs == {"env": "pack.age:Thing-v0"}
    assert gymnasium.registry["farm/Asked-v3"] is spec, "who holds gymnasium's own dict sees the same entries"
    gymnasium.register("OfATest-v0", lambda: None)
    assert {"OfATest-v0", "CartPole-v1"} <= set(registration.registry) == set(gymnasium.registry)
    del registration.registry["OfATest-v0"]
    assert "OfATest-v0" not in gymnasium.registry
    with pytest.raises(gymnasium.error.NameNotFound):
        gymnasium.make("CartPoole-v1")
    with pytest.raises(gymnasium.error.NamespaceNotFound):
        gymnasium.make("farn/Pendulum-v1")
    with pytest.raises(gymnasium.error.Error, match="Malformed environment ID"):
        gymnasium.make("farm/ALE/Pong-v5")
