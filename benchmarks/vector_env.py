"""The environment of throughput.py and memory.py: sleeps as long as its action says, 339 floats out, 22 in.

Sizes are those of OpenSim's L2M2019. The first number of an action is the sleep in seconds, 0 for none. Every number of
the observation repeats the action's second one, so who gets another step's answer sees it. A farm's worker needs numpy
alone for it; `gym_steps` is the same for those that want a gymnasium.Env.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

OBS, ACTIONS, LONGEST = 339, 22, 1000.0


class Box:
    """What a farm wants to know of a gymnasium.spaces.Box."""

    def __init__(self, low: float, high: float, size: int):
        self.shape, self.dtype = (size,), np.dtype(np.float32)
        self.low, self.high = np.full(size, low, np.float32), np.full(size, high, np.float32)


class Steps:
    """An environment without gymnasium, with the same two calls."""

    observation_space: Any = Box(-np.inf, np.inf, OBS)
    action_space: Any = Box(0.0, LONGEST, ACTIONS)
    reward_range = (np.float32(-1.0), np.float32(1.0))  # remote-gym wants it, and float32
    render_mode = None

    def __init__(self, factor: float = 1.0):
        """Args: factor: how often longer than asked it sleeps."""
        self.factor = factor

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Zeros; nothing here is random."""
        return np.zeros(OBS, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Sleeps, and never ends."""
        if action[0] > 0:
            time.sleep(float(action[0]) * self.factor)
        return np.full(OBS, action[1], np.float32), 0.0, False, False, {}


def gym_steps() -> Any:
    """`Steps` as a gymnasium.Env."""
    import gymnasium

    class GymSteps(Steps, gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
        action_space = gymnasium.spaces.Box(0.0, LONGEST, (ACTIONS,), np.float32)

    return GymSteps()


def create_environment(**ignored: Any) -> Any:
    """The name that remote-gym looks for in this file."""
    return gym_steps()
