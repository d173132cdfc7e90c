"""One farm of the farmlist as the pool sees it, connected or not. Written by membership, under the pool's lock."""

from __future__ import annotations

import logging
import statistics
import threading
from dataclasses import dataclass, field, replace
from typing import Any

from farmer.farmlist import FarmAddress
from farmer.ledger import total
from farmer.link import Link, Route
from farmer.remote_slot import RemoteSlot

log = logging.getLogger("farmer")


@dataclass(eq=False)
class RemoteFarm:
    """A farm, and all slots that the pool ever had there.

    Attributes:
        route: the way there, made at the first try.
        link: while the farm is joined.
        wanted: slots; those over it leave when their episode is over.
        under_way: of its slots, those with a command under way.
        next_try: by time.monotonic, for joining it, or for more of its slots.
        leaving: it is in the farmlist no more.
        by_number: the attached slots, by their number on the farm.
        slots: all that it ever had.
        let_go: numbers of slots that the farm must be told are free.
        leases: former ones, to be ended when it is there again.
        dropped: replies that nobody asked for any more; they are no steps.
        task: the thread that does something about it now.
        reported_step_s: seconds a step, as the farm itself has seen it with any host.
    """

    address: FarmAddress
    route: Route | None = None
    link: Link | None = None
    wanted: int = 0
    under_way: int = 0
    trouble: str | None = None
    next_try: float = 0.0
    leaving: bool = False
    by_number: dict[int, RemoteSlot] = field(default_factory=dict)
    slots: list[RemoteSlot] = field(default_factory=list)
    let_go: list[int] = field(default_factory=list)
    leases: list[str] = field(default_factory=list)
    dropped: int = 0
    task: threading.Thread | None = None
    reported_step_s: float | None = None

    @property
    def key(self) -> FarmAddress:
        """Which farm it is, however many of its slots are wanted."""
        return key_of(self.address)

    @property
    def step_s(self) -> float | None:
        """Seconds a step, from here where some were made, else as the farm reported; None: nobody knows."""
        seen = [mean for slot in self.slots if (mean := slot.step_s.mean) is not None]
        return statistics.median(seen) if seen else self.reported_step_s

    def set_trouble(self, trouble: str | None) -> None:
        """Notes what is wrong with the farm, and logs it when it is new."""
        if trouble is not None and trouble != self.trouble:
            log.warning("%s", trouble)
        self.trouble = trouble

    def clear_trouble(self) -> None:
        """A farm that is there with all that is wanted of it has no trouble any more."""
        if self.link is not None and len(self.by_number) >= self.wanted and not self.let_go:
            self.trouble = None

    def close_route(self) -> None:
        """Ends what its way holds; a later try makes another."""
        route, self.route = self.route, None
        if route is not None:
            route.close()

    def ledger(self) -> dict[str, int]:
        """What became of the steps that were sent to it."""
        return total(slot.ledger() for slot in self.slots)

    def status(self) -> dict[str, Any]:
        """As `Farmer.status` tells it."""
        return {
            "farm": str(self.address),
            "connected": self.link is not None,
            "leaving": self.leaving,
            "slots": len(self.by_number),
            "wanted": self.wanted,
            "busy": sum(slot.sent is not None for slot in self.by_number.values()),
            "trouble": self.trouble,
            "step_s": self.step_s,
            "ledger": self.ledger(),
            "dropped": self.dropped,
            "places": [slot.status() for slot in self.slots],
        }


def key_of(address: FarmAddress) -> FarmAddress:
    """An address without the number of slots."""
    return replace(address, slots=0)
