"""What an agent asks of a pool of environments: the verbs of `farmer.Farmer` and of `agents.LocalPool`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np


class Batch(Protocol):
    """Results of the n slots that were ready; arrays have them as first axis."""

    slot: np.ndarray  # int32 (n,)
    obs: Any  # (n, *obs_shape), or a list of n
    reward: np.ndarray  # float32 (n,)
    terminated: np.ndarray  # bool (n,)  the task ended: do not bootstrap
    truncated: np.ndarray  # bool (n,)  cut off (time limit, lost slot): bootstrap
    lost: np.ndarray  # bool (n,)  no transition happened; obs is the last good one
    first: np.ndarray  # bool (n,)  the first observation of an episode, no transition
    info: list[dict[str, Any]]
    env_s: np.ndarray  # float32 (n,)  seconds inside the environment, all repeats (a first row: its reset); 0 if lost
    trip_s: np.ndarray  # float32 (n,)  seconds from the command's sending to its reply's arrival here; 0 if lost


@runtime_checkable
class Pool(Protocol):
    """Many environments, each in a numbered slot, none of which waits for another."""

    observation_space: Any
    action_space: Any

    @property
    def nb_slots(self) -> int:
        """Environments that are there now; slots may join and leave."""

    def name_of(self, slot: int) -> str:
        """The farm that a slot is on."""

    def vacant(self, episodes: int | None = None) -> list[int]:
        """Slots without an episode and with nothing under way.

        With `episodes`, the number that is still to be begun: those of them that should begin one now, in their order.
        """

    def reset(self, slots: Sequence[int], seeds: Sequence[int | None] | None = None) -> None:
        """Begins an episode in each; the first observation comes by `recv`."""

    def send(self, actions: Any, slots: Sequence[int], repeat: int = 1) -> None:
        """One action for each slot, applied `repeat` times."""

    def recv(self, min_ready: int = 1, timeout: float | None = 60.0) -> Batch:
        """Whoever is ready. TimeoutError when nothing came; an empty batch when only `vacant` has changed."""

    def abandon(self, slots: Sequence[int] | None = None) -> None:
        """Forgets running episodes, all or those of some slots."""

    def status(self) -> dict[str, Any]:
        """For people."""
