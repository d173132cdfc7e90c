"""What Stable-Baselines3 asks of a `VecEnv`, checked in the environment that has it; tests/test_sb3.py starts this.

    .venv-sb3/bin/python tests/sb3_checks.py '{"check_name": "ADDRESS ENV", ...}'

Prints a line of JSON for each check: its name, and the traceback where it failed. The other side of most comparisons
is SB3's own DummyVecEnv of the same environments.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from typing import Any

import numpy as np
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize
from vector_parts import assert_alike, local

import farmer  # noqa: F401  (makes farm/... known to gymnasium)
from farmer.sb3 import FarmVecEnv
from wire.errors import BadAction, BadSlot, NotOfAFarm

SLOTS = 3


def opened(where: str) -> FarmVecEnv:
    address, env = where.split()
    return FarmVecEnv(env, SLOTS, [(address, SLOTS)], timeout=30.0)


def raises(error: type[BaseException], text: str, function: Any, *args: Any, **kwargs: Any) -> None:
    raised: BaseException | None = None
    try:
        function(*args, **kwargs)
    except error as one:
        raised = one
    assert raised is not None, f"no {error.__name__}"
    assert re.search(text, str(raised)), raised


def played(envs: VecEnv) -> list[Any]:
    """All that it gives in the course of a program that uses seeds, options and many ends of episodes."""
    envs.action_space.seed(4)
    assert list(envs.seed(5)) == [5, 6, 7]
    given = [envs.reset(), list(envs.reset_infos)]
    for step in range(60):
        actions = np.array([envs.action_space.sample() for _ in range(envs.num_envs)])
        given.append(envs.step(actions))
        given.append(list(envs.reset_infos))
        if step == 20:
            envs.seed(9)
            envs.set_options([{"level": 1}, {}, {"level": 3}])
            given.append((envs.reset(), list(envs.reset_infos)))
        if step == 40:
            given.append((envs.reset(), list(envs.reset_infos)))
    return given


def check_rows_are_whole_episodes_also_with_one_ahead(where: str) -> None:
    address, env = where.split()
    envs = FarmVecEnv(env, SLOTS - 1, [(address, SLOTS)], timeout=30.0, ahead=1)
    assert envs.num_envs == SLOTS - 1
    monitored = VecMonitor(envs)
    monitored.reset()
    lengths, told = np.zeros(envs.num_envs, int), 0
    for _ in range(120):
        observations, rewards, dones, infos = monitored.step(np.ones(envs.num_envs, int))
        lengths += 1
        assert (rewards == 1.0).all()
        for row in np.flatnonzero(dones):
            assert infos[row]["episode"]["l"] == lengths[row] > 1
            assert abs(infos[row]["terminal_observation"][2]) > 0.2 > abs(observations[row][2])
            lengths[row], told = 0, told + 1
    assert told > 10, told
    assert sorted(envs.farm.episodes._at) == list(range(SLOTS))
    monitored.close()


def check_every_value_is_that_of_a_dummy_vec_env(where: str) -> None:
    theirs, ours = DummyVecEnv([local(where.split()[1])] * SLOTS), opened(where)
    expected, given = played(theirs), played(ours)
    ended = sum(step[2].sum() for step in given if isinstance(step, tuple) and len(step) == 4)
    assert ended > 3, ended
    assert_alike(expected, given)
    ours.close()


def check_attributes(where: str) -> None:
    envs = opened(where)
    theirs = DummyVecEnv([local(where.split()[1])] * SLOTS)
    for name in ("num_envs", "observation_space", "action_space", "render_mode"):
        assert getattr(envs, name) == getattr(theirs, name), name
    assert envs.get_attr("action_space", [0, 2]) == [envs.action_space] * 2
    assert envs.get_attr("render_mode", 1) == [None]
    assert envs.has_attr("observation_space")
    assert not envs.has_attr("state")
    assert envs.env_is_wrapped(Monitor) == [False] * SLOTS
    assert envs.unwrapped is envs
    raises(NotOfAFarm, "'state' cannot be read", envs.get_attr, "state")
    raises(NotOfAFarm, "'state' cannot be set", envs.set_attr, "state", 3)
    raises(NotOfAFarm, "'compute_reward' cannot be called", envs.env_method, "compute_reward")
    raises(NotImplementedError, "render_mode is None", envs.get_images)
    envs.set_options([{"where": np.zeros(2)}, {"where": np.ones(2)}, {"where": np.zeros(2)}])
    assert envs.reset().shape == (SLOTS, 4)
    envs.close()


def check_wrong_actions_are_refused_and_nothing_is_sent(where: str) -> None:
    envs = opened(where)
    envs.reset()
    raises(BadAction, "2 actions for 3", envs.step, np.zeros((2, 1), np.float32))
    raises(BadAction, "not finite", envs.step, np.full((3, 1), np.nan, np.float32))
    assert envs.step(np.zeros((3, 1), np.float32))[0][:, 1].tolist() == [1, 1, 1]
    envs.step_async(np.zeros((3, 1), np.float32))
    raises(BadSlot, "under way", envs.step_async, np.zeros((3, 1), np.float32))
    assert envs.step_wait()[0][:, 1].tolist() == [2, 2, 2]
    envs.step_async(np.zeros((3, 1), np.float32))
    assert envs.reset()[:, 1].tolist() == [0, 0, 0]  # which leaves the step
    assert envs.step(np.zeros((3, 1), np.float32))[0][:, 1].tolist() == [1, 1, 1]
    envs.close()


def check_a_lost_episode_is_a_time_limit_that_says_why(where: str) -> None:
    envs = opened(where)
    envs.reset()
    envs.step(np.full((3, 1), 0.25, np.float32))
    obs, rewards, dones, infos = envs.step(np.array([[0.0], [1.0], [0.0]], np.float32))
    assert (rewards.tolist(), dones.tolist()) == ([2, 0, 2], [False, True, False])
    assert "exited with code 9" in infos[1]["lost"]
    assert infos[1]["TimeLimit.truncated"]
    assert infos[1]["terminal_observation"][1:].tolist() == [1, 0.25]
    assert obs[1].tolist() == [1, 0, 0]
    assert "lost" not in infos[0]
    envs.close()


def check_wrappers_give_what_they_give_over_a_dummy_vec_env(where: str) -> None:
    collected = []
    for envs in (DummyVecEnv([local(where.split()[1])] * SLOTS), opened(where)):
        wrapped = VecFrameStack(VecNormalize(VecMonitor(envs)), 2)
        wrapped.action_space.seed(3)
        wrapped.seed(1)
        given, episodes = [wrapped.reset()], []
        for _ in range(60):
            step = wrapped.step(np.array([wrapped.action_space.sample() for _ in range(SLOTS)]))
            given.append(step[:3])
            episodes += [(info["episode"]["r"], info["episode"]["l"]) for info in step[3] if "episode" in info]
        collected.append((given, episodes))
        wrapped.close()
    assert len(collected[0][1]) > 3
    assert_alike(*collected)


def check_sac_learns_saves_and_is_evaluated(where: str) -> None:
    envs = VecNormalize(VecMonitor(opened(where)))
    model = SAC("MlpPolicy", envs, learning_starts=60, batch_size=32, policy_kwargs={"net_arch": [16]}, seed=1)
    model.learn(120)
    assert model.num_timesteps == 120
    mean, _ = evaluate_policy(model, envs, n_eval_episodes=3, warn=False)
    assert -2000 < mean < 0
    envs.close()


def check_make_vec_env_takes_the_gymnasium_id(where: str) -> None:
    address, env = where.split()
    envs = make_vec_env("farm/" + env, n_envs=2, env_kwargs={"farmlist": [(address, 1)]}, seed=1)
    assert envs.env_is_wrapped(Monitor) == [True, True]
    envs.reset()
    envs.step(np.array([envs.action_space.sample() for _ in range(2)]))
    envs.close()


def main(wanted: dict[str, str]) -> None:
    """Runs the named checks, each at its place, "ADDRESS ENV"."""
    for name, where in wanted.items():
        error = None
        try:
            globals()[name](where)
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"check": name, "error": error}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
