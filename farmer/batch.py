"""Results as a pool gives them: rows as they came, and a batch of them as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from farmer.values import Values


@dataclass
class Batch:
    """Results of the slots that were ready; every array has them as first axis, n.

    Attributes:
        slot: int32 (n,).
        obs: (n, *obs_shape) in the environment's dtype, or a list where observations are no arrays of one shape.
        reward: float32 (n,).
        terminated: bool (n,), the task ended: do not bootstrap.
        truncated: bool (n,), cut off (time limit, lost slot): bootstrap.
        lost: bool (n,), no transition happened; `obs` is the last good one (zeros when there was none).
        first: bool (n,), the first observation of an episode, no transition.
        info: n dicts; of a lost row {"lost": why}.
        env_s: float32 (n,), seconds inside the environment (all repeats; of a first row its reset), as its worker
            measured them; 0 of a lost row.
        trip_s: float32 (n,), seconds from the sending of the command to the arrival of its reply, on this machine's
            clock; what is over `env_s` was spent on the way; 0 of a lost row.
    """

    slot: np.ndarray
    obs: Any
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    lost: np.ndarray
    first: np.ndarray
    info: list[dict[str, Any]]
    env_s: np.ndarray
    trip_s: np.ndarray

    def __len__(self) -> int:
        return len(self.slot)


@dataclass(slots=True)
class Row:
    """One result, just as it came."""

    slot: int
    obs: Any
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    lost: bool = False
    first: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    env_s: float = 0.0
    trip_s: float = 0.0
    followed: bool = False  # the reset of the slot's next episode is on its way already


def batch_of(rows: list[Row], values: Values) -> Batch:
    """The rows as arrays, in their order."""
    return Batch(
        slot=np.array([row.slot for row in rows], np.int32),
        obs=values.stacked([row.obs for row in rows]),
        reward=np.array([row.reward for row in rows], np.float32),
        terminated=np.array([row.terminated for row in rows], bool),
        truncated=np.array([row.truncated for row in rows], bool),
        lost=np.array([row.lost for row in rows], bool),
        first=np.array([row.first for row in rows], bool),
        info=[row.info for row in rows],
        env_s=np.array([row.env_s for row in rows], np.float32),
        trip_s=np.array([row.trip_s for row in rows], np.float32),
    )
