"""Real muscles for the peers of steps/osim.py: the bodies of simulators/osim.py as gymnasium environments."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

RECIPES = Path(__file__).resolve().parents[2] / "simulators" / "osim.py"
BODIES: dict[str, dict[str, Any]] = {"L2M2019": {"difficulty": 0, "model": "2D"}, "Arm2D": {}}


class Body(gymnasium.Env):
    """One of the recipes."""

    def __init__(self, name: str):
        found = importlib.util.spec_from_file_location("osim_recipes", RECIPES)
        assert found is not None
        assert found.loader is not None
        recipes = importlib.util.module_from_spec(found)
        found.loader.exec_module(recipes)
        self.body = getattr(recipes, name)(**BODIES[name])
        for space in ("observation_space", "action_space"):
            box = getattr(self.body, space)
            setattr(self, space, gymnasium.spaces.Box(box.low, box.high, dtype=np.float32))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Its own."""
        return self.body.reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Its own; the info has the seconds that it took."""
        start = time.perf_counter()
        obs, reward, terminated, truncated, _ = self.body.step(action)
        return obs, reward, terminated, truncated, {"seconds": time.perf_counter() - start}

    def close(self) -> None:
        """Its own."""
        self.body.close()


def maker(name: str) -> Callable[[], Body]:
    """What vector environments take."""
    return lambda: Body(name)
