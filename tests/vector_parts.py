"""What the tests of the vector environments have in common: an environment that uses every kind of space and of info,
programs of verbs, and a comparison of all that two of them give.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

MODES = list(AutoresetMode)


class Everything(gymnasium.Env):
    """Episodes of random length; observations, actions and infos of many kinds, all drawn from its own generator."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 7}

    def __init__(self, most: int = 6):
        self.most = most
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (4, 3), np.uint8),
                "pair": spaces.Tuple([spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Discrete(3, start=-1)]),
                "deep": spaces.Dict({"many": spaces.MultiDiscrete([3, 4]), "bits": spaces.MultiBinary(3)}),
            }
        )
        self.action_space = spaces.Dict(
            {"force": spaces.Box(-1, 1, (2,), np.float32), "gear": spaces.Discrete(3), "keys": spaces.MultiBinary(2)}
        )
        self.steps = 0

    def _observation(self) -> dict[str, Any]:
        draw = self.np_random
        return {
            "image": draw.integers(0, 256, (4, 3)).astype(np.uint8),
            "pair": (draw.normal(size=2).astype(np.float32), np.int64(draw.integers(-1, 2))),
            "deep": {"many": draw.integers([3, 4]), "bits": draw.integers(0, 2, 3).astype(np.int8)},
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        self.length = int(self.np_random.integers(1, self.most + 1))
        return self._observation(), {"begun": True, "level": (options or {}).get("level", 0), "length": self.length}

    def step(self, action: Any) -> Any:
        self.steps += 1
        over = self.steps >= self.length
        info: dict[str, Any] = {
            "step": self.steps,
            "force": np.array(action["force"], np.float32),
            "gear": int(action["gear"]),
            "deep": {"half": self.steps / 2, "more": {"name": f"step {self.steps}"}},
            "exact": np.float32(self.steps),
        }
        if self.steps % 2:
            info["odd"] = [self.steps]
        reward = float(action["force"].sum() + action["gear"] - action["keys"].sum())
        return self._observation(), reward, over and self.length % 2 == 0, over and self.length % 2 == 1, info


def local(name: str) -> Any:
    """A function that makes the environment of that name in this process, just as a farm's worker does."""
    if name == "vector_parts:Everything":
        return Everything
    return lambda: gymnasium.make(name, disable_env_checker=True)


def assert_alike(left: Any, right: Any, where: str = "") -> None:
    """The same values of the same types, shapes and dtypes, all the way down; any dict is as good as another."""
    if isinstance(left, dict) and isinstance(right, dict):
        assert set(left) == set(right), where
        for key in left:
            assert_alike(left[key], right[key], f"{where}[{key!r}]")
        return
    assert type(left) is type(right), (where, left, right)
    if isinstance(left, (list, tuple)) or (isinstance(left, np.ndarray) and left.dtype == object):
        assert len(left) == len(right), (where, left, right)
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_alike(one, other, f"{where}[{index}]")
    elif isinstance(left, np.ndarray):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), where
        np.testing.assert_array_equal(left, right, err_msg=where)
    else:
        assert left == right, (where, left, right)


def played(envs: Any, steps: int = 120) -> list[Any]:
    """All that an environment gives in the course of a program that uses every form of reset and many steps."""
    count, mode = envs.num_envs, envs.metadata["autoreset_mode"]
    envs.action_space.seed(9)
    given = [envs.reset(seed=3)]
    for step in range(steps):
        given.append(envs.step(envs.action_space.sample()))
        over = given[-1][2] | given[-1][3]
        if mode is AutoresetMode.DISABLED and over.any():
            given.append(envs.reset(options={"reset_mask": over}))
        if step == steps // 4:
            given.append(envs.reset(seed=list(range(70, 70 + count)), options={"level": 4}))
        if step == steps // 3:
            mask = np.arange(count) == 1
            given.append(envs.reset(seed=11, options={"reset_mask": mask, "level": 5}))
        if step == steps // 2:
            given.append(envs.reset())
    return given
