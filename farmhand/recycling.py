"""When a worker is replaced at an episode's end: the memory, the steps and the pace of the worker in each slot.

The rules are in `limits.py`; here is what they need to know.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from farmhand import tree
from farmhand.limits import Limits, WorkerPace, why_recycle
from farmhand.slots import Slot

WEIGH_EVERY = 0.15  #: s between two looks at the memory of one worker, where only its growth counts


@dataclass
class _Wear:
    """Of one worker."""

    pace: WorkerPace = field(default_factory=WorkerPace)
    memory: int = 0  # bytes when last looked at
    memory_when_fresh: int = 0
    weigh_at: float = 0.0


class Recycling:
    """The wear of each slot's worker."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._wear: dict[int, _Wear] = {}

    def started(self, number: int) -> None:
        """The slot has another worker."""
        self._wear[number] = _Wear()

    def step_took(self, number: int, seconds: float) -> None:
        """Learns from one step."""
        self._wear[number].pace.step(seconds)

    def memory(self, number: int) -> int:
        """Bytes of the slot's worker when last looked at; 0 before."""
        return self._wear[number].memory

    def why(self, slot: Slot, pid: int, episode_over: bool) -> str | None:
        """Why its worker is to be replaced now, between two episodes; None when it goes on."""
        wear, limits = self._wear[slot.number], self._limits
        if limits.recycle_memory is not None or limits.memory_share is not None:
            now = time.monotonic()
            if limits.recycle_memory is not None or not wear.memory_when_fresh or now >= wear.weigh_at:
                wear.memory, wear.weigh_at = tree.resident(pid), now + WEIGH_EVERY
            wear.memory_when_fresh = wear.memory_when_fresh or wear.memory
        slow = episode_over and wear.pace.episode_over()
        return why_recycle(limits, slot.episodes, slot.steps, wear.memory, wear.memory_when_fresh, slow)
