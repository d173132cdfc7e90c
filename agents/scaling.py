"""Where numbers of the environment become numbers for the networks, and back: the only place that scales either.

Replay keeps observations raw, so that statistics which are better later serve old transitions as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

WIDE = 100.0  #: a bound of observations beyond which they are normalised by default, as without any bound
CLIP = 10.0  #: standard deviations to which a normalised observation is clipped
SMALLEST = 1e-8  #: variance that is added, so that a component that never changes stays 0

#: (mean, 1 / deviation) of each network input; empty where nothing is normalised.
Statistics = list[tuple[np.ndarray, np.ndarray]]


class ActionScale:
    """Network actions in [-1, 1] as actions of a Box with finite bounds."""

    def __init__(self, low: np.ndarray, high: np.ndarray):
        """Bounds of the environment's actions, any shape.

        Raises:
            ValueError: a bound is infinite.
        """
        low, high = np.ravel(low).astype(np.float64), np.ravel(high).astype(np.float64)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("actions can only be scaled to finite bounds, and these are %s to %s" % (low, high))
        self.low, self.high = low, high

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """(n, nb_actions) from [-1, 1] to the environment's bounds, float32; beyond them it is clipped."""
        share = (1.0 + np.asarray(actions, np.float64)) / 2  # exactly 0 and 1 at the bounds
        return np.clip(self.low * (1.0 - share) + self.high * share, self.low, self.high).astype(np.float32)


class RunningNorm:
    """Mean and variance of every component of the observations that all environments have shown.

    Batches are merged by the parallel form of Welford's method (Chan, Golub, LeVeque 1979), in float64.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        """Shapes of an observation's leaves, without window."""
        self.count = 0
        self.mean = [np.zeros(shape) for shape in shapes]
        self.square = [np.zeros(shape) for shape in shapes]  # sums of squared distances from the mean

    def update(self, leaves: Sequence[np.ndarray]) -> None:
        """Takes n observations in, a list of (n, *shape); such that are not finite count for nothing."""
        good = np.logical_and.reduce([np.isfinite(x.reshape(len(x), -1)).all(1) for x in leaves])
        n = int(good.sum())
        if n == 0:
            return
        total = self.count + n
        for leaf, mean, square in zip(leaves, self.mean, self.square, strict=True):
            batch = np.asarray(leaf[good], np.float64)
            apart = batch.mean(0) - mean
            square += ((batch - batch.mean(0)) ** 2).sum(0) + apart**2 * (self.count * n / total)
            mean += apart * (n / total)
        self.count = total

    def statistics(self) -> Statistics:
        """float32 (mean, 1 / deviation) of each leaf."""
        spread = [np.sqrt(square / max(self.count, 1) + SMALLEST) for square in self.square]
        return [(m.astype(np.float32), (1 / s).astype(np.float32)) for m, s in zip(self.mean, spread, strict=True)]

    def state(self) -> dict[str, np.ndarray]:
        """Everything as arrays."""
        arrays = {"count": np.array(self.count)}
        for i, (mean, square) in enumerate(zip(self.mean, self.square, strict=True)):
            arrays.update({"mean/%d" % i: mean.copy(), "square/%d" % i: square.copy()})
        return arrays

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes what `state` gave.

        Raises:
            ValueError: it is of observations of another form; nothing was changed.
        """
        mean = [arrays.get("mean/%d" % i) for i in range(len(self.mean))]
        square = [arrays.get("square/%d" % i) for i in range(len(self.mean))]
        for mine, m, s in zip(self.mean, mean, square, strict=True):
            if m is None or s is None or m.shape != mine.shape or s.shape != mine.shape:
                raise ValueError("the statistics are of other observations than these of shape %s" % (mine.shape,))
        self.count = int(arrays["count"])
        self.mean, self.square = [np.array(m) for m in mean], [np.array(s) for s in square]


def is_wide(space: Any) -> bool:
    """Whether a space of observations is normalised by default: real numbers without bounds, or with wide ones."""
    if isinstance(space, gymnasium.spaces.Dict):
        return any(is_wide(part) for part in space.spaces.values())
    if isinstance(space, gymnasium.spaces.Tuple):
        return any(is_wide(part) for part in space.spaces)
    if not isinstance(space, gymnasium.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        return False
    return bool(np.any(np.abs(space.low) > WIDE) or np.any(np.abs(space.high) > WIDE))
