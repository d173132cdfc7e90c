"""Environments of several benchmarks: 22 floats in, 339 floats out, or a large array.

`Steps` sleeps as long as its action says. Sizes are those of OpenSim's L2M2019. The first number of an action is the
sleep in seconds, 0 for none. Every number of the observation repeats the action's second one, so who gets another
step's answer sees it. `Frames` does nothing but that, at the first number and the last. A farm's worker needs numpy
alone for them; `gym_steps` and `gym_frames` are the same for those that want a gymnasium.Env.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

OBS, ACTIONS, LONGEST = 339, 22, 1000.0

#: Large observations by name: shape, dtype, lowest and highest
LARGE: dict[str, tuple[tuple[int, ...], str, float, float]] = {
    "84x84x4 uint8": ((84, 84, 4), "uint8", 0, 255),
    "1 MB float32": ((512, 512), "float32", -np.inf, np.inf),
}


class Box:
    """What a farm wants to know of a gymnasium.spaces.Box."""

    def __init__(self, low: float, high: float, shape: tuple[int, ...], dtype: str = "float32"):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.low, self.high = np.full(shape, low, dtype), np.full(shape, high, dtype)


class Steps:
    """An environment without gymnasium, with the same two calls."""

    observation_space: Any = Box(-np.inf, np.inf, (OBS,))
    action_space: Any = Box(0.0, LONGEST, (ACTIONS,))
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


class Frames:
    """Answers at once with one of LARGE, in an array that it has already: what it costs is the way."""

    action_space: Any = Box(0.0, LONGEST, (ACTIONS,))
    render_mode = None

    def __init__(self, kind: str):
        shape, dtype, low, high = LARGE[kind]
        self.observation_space: Any = Box(low, high, shape, dtype)
        self.frame = np.zeros(shape, dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Zeros; nothing here is random."""
        self.frame[:] = 0
        return self.frame, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Never ends."""
        self.frame.flat[0] = self.frame.flat[-1] = action[1]
        return self.frame, 0.0, False, False, {}


def gym_frames(kind: str) -> Any:
    """`Frames` as a gymnasium.Env."""
    import gymnasium

    class GymFrames(Frames, gymnasium.Env):
        action_space = gymnasium.spaces.Box(0.0, LONGEST, (ACTIONS,), np.float32)

    env = GymFrames(kind)
    shape, dtype, low, high = LARGE[kind]
    env.observation_space = gymnasium.spaces.Box(low, high, shape, np.dtype(dtype).type)
    return env


def create_environment(**ignored: Any) -> Any:
    """The name that remote-gym looks for in this file."""
    return gym_steps()
