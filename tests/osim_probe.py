"""Runs in the OpenSim Python and says what an environment does there. `test_osim.py` starts it.

    .venv-osim/bin/python tests/osim_probe.py play '{"recipe": "Arm2D", "kwargs": {}, "steps": 20}' out.npz

Each command gets its arguments as JSON and writes arrays to a file, because prints are one of the things under test.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import random
import sys

import numpy as np

RECIPES = pathlib.Path(__file__).resolve().parent.parent / "simulators" / "osim.py"


def load():
    """The recipes, by path and under a name that is not `osim`, as the worker loads them."""
    spec = importlib.util.spec_from_file_location("recipe_under_test", RECIPES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def play(recipe, kwargs, steps, seed=1, beside=False, level=None, limit=None):
    """Plays `steps` actions, with resets between episodes.

    Args:
        beside: a second environment is made and stepped with other actions in between.
        level: this excitation for every muscle; None draws them.
        limit: what osim-rl itself takes for its time limit, in place of its own number.
    """
    module = load()
    if limit is not None:
        module.L2M2019Env.set_difficulty = _limited(limit)
    env = getattr(module, recipe)(**kwargs)
    other = getattr(module, recipe)(**kwargs) if beside else None
    rows = {"obs": [], "reward": [], "terminated": [], "truncated": [], "first": []}
    dtypes = set()
    actions = _actions(env.action_space.shape[0], steps, level)
    first, info = env.reset(seed=seed)
    assert info == {}
    if other:
        other.reset()
    rows["first"].append(first)
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        if other:
            other.step(1 - action)
        assert [type(x) for x in (reward, terminated, truncated, info)] == [float, bool, bool, dict]
        dtypes |= {obs.dtype.name, first.dtype.name}
        assert env.observation_space.contains(obs), obs
        for name, value in zip(rows, (obs, reward, terminated, truncated), strict=False):
            rows[name].append(value)
        if terminated or truncated:
            first, _ = env.reset()
            rows["first"].append(first)
    env.close()
    return dict(rows, dtypes=sorted(dtypes))


def play_bare(recipe, kwargs, steps, seed=1):
    """The same with osim-rl's own class, untouched but for the call that opensim 4.6 refuses."""
    import opensim

    names = []
    add, prescribe = opensim.PrescribedController.addActuator, opensim.PrescribedController.prescribeControlForActuator

    def remember(self, actuator):
        names.append(actuator.getName())
        return add(self, actuator)

    opensim.PrescribedController.addActuator = remember
    opensim.PrescribedController.prescribeControlForActuator = lambda self, _, func: prescribe(self, names[-1], func)
    opensim.Logger.setLevelString("error")
    import osim.env

    bare = getattr(osim.env, {"L2M2019": "L2M2019Env", "Arm2D": "Arm2DVecEnv"}[recipe])
    bare.model = kwargs.pop("model", "3D")  # no argument of osim-rl's
    env = bare(visualize=False, **kwargs)
    random.seed(seed)
    np.random.seed(seed)
    rows = {"obs": [], "reward": [], "done": [], "first": []}
    rows["first"].append(env.reset(obs_as_dict=False))
    for action in _actions(env.action_space.shape[0], steps, None):
        obs, reward, done, _ = env.step(action, obs_as_dict=False)
        for name, value in zip(rows, (obs, reward, done), strict=False):
            rows[name].append(value)
        if done:
            rows["first"].append(env.reset(obs_as_dict=False))
    return rows


def spaces(recipe, kwargs):
    env = getattr(load(), recipe)(**kwargs)
    observation, action = env.observation_space, env.action_space
    return {
        "observation_shape": observation.shape,
        "action_low": action.low,
        "action_high": action.high,
        "dtypes": [observation.dtype.name, action.dtype.name],
        "names": [type(observation).__name__, type(action).__name__],
        "limit": env.max_episode_steps,
    }


def refusal(recipe, kwargs):
    try:
        getattr(load(), recipe)(**kwargs)
    except (TypeError, ValueError) as error:
        return {"text": f"{type(error).__name__}: {error}"}
    return {"text": "accepted"}


def _actions(muscles, steps, level):
    if level is not None:
        return np.full((steps, muscles), level, np.float32)
    return np.random.default_rng(7).random((steps, muscles), dtype=np.float32)


def _limited(limit):
    def set_difficulty(self, difficulty):
        self.difficulty = difficulty
        self.time_limit = self.spec.timestep_limit = limit

    return set_difficulty


if __name__ == "__main__":
    command, arguments, out = sys.argv[1:]
    np.savez(out, **globals()[command](**json.loads(arguments)))
