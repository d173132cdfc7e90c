"""One environment and one farm as the host sees them, with the ledger of their steps.

Every step that was sent is in exactly one bucket, or under way: at any instant, of any slot and any farm,
sent == sum of all buckets + under way.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from farmer.balance import Pace
from farmer.courier import Courier
from farmer.farmlist import FarmAddress
from farmer.tunnel import Tunnel
from wire import protocol

#: What a farm may say of a step that has no result. The last is also the host's own word, when the farm is gone.
LOST_BUCKETS = ("crashed", "timed out", "invalid", "lost with its farm")
#: What becomes of a step.
BUCKETS = ("done", *LOST_BUCKETS, "abandoned")


@dataclass(eq=False)
class Place:
    """One environment."""

    slot: int  # its number in the pool
    farm: Farm
    far: int = -1  # its number on the farm
    seq: int = 0
    sent: int | None = None  # the kind of the command under way
    sent_at: float = 0.0  # by time.perf_counter
    abandoned: bool = False  # what is under way interests nobody any more
    episode: bool = False
    last_obs: Any = None
    not_before: float = 0.0  # by time.monotonic: when it may be reset again
    failed_resets: int = 0  # in a row
    steps: int = 0  # of the episode that runs
    step_s: Pace = field(default_factory=Pace)  # s from a step's sending to its result's arrival
    reset_s: Pace = field(default_factory=Pace)  # the same of a reset
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def here(self) -> bool:
        """Whether its farm is there and gives it a slot."""
        return self.farm.by_far.get(self.far) is self

    @property
    def idle(self) -> bool:
        """Whether no episode runs and nothing is under way."""
        return not self.episode and self.sent is None

    def ledger(self) -> dict[str, int]:
        """What became of the steps that were sent here."""
        under_way = int(self.sent == protocol.STEP)
        return {"sent": self.counts["sent"], **{b: self.counts[b] for b in BUCKETS}, "under way": under_way}


@dataclass(eq=False)
class Farm:
    """One farm of the list, there or not."""

    address: FarmAddress
    wanted: int = 0  # slots; those over it leave when their episode is over
    courier: Courier | None = None
    sent: int = 0  # of its places, those with a command under way
    trouble: str | None = None
    next_try: float = 0.0  # by time.monotonic: for joining it, or for more of its slots
    leaving: bool = False  # it is in the list no more
    by_far: dict[int, Place] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)  # all that it ever had
    let_go: list[int] = field(default_factory=list)  # slots that the farm must be told are free
    leases: list[str] = field(default_factory=list)  # former ones, to be ended when it is there again
    dropped: int = 0  # replies that nobody asked for any more; they are no steps
    errand: Any = None  # the thread that sees to it now
    tunnel: Tunnel | None = None  # the way there, of an ssh:// address
    told_s: float | None = None  # s a step, as the farm itself has seen it with any host

    @property
    def key(self) -> FarmAddress:
        """Which farm it is, however many of its slots are wanted."""
        return key_of(self.address)

    @property
    def pace(self) -> float | None:
        """Seconds a step, from here where some were made, else as the farm told; None: nobody knows."""
        seen = [mean for place in self.places if (mean := place.step_s.mean) is not None]
        return statistics.median(seen) if seen else self.told_s

    def ledger(self) -> dict[str, int]:
        """What became of the steps that were sent to it."""
        return total(place.ledger() for place in self.places)


def key_of(address: FarmAddress) -> FarmAddress:
    """An address without the number of slots."""
    return replace(address, slots=0)


def total(ledgers: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of ledgers, bucket by bucket."""
    found = dict.fromkeys(("sent", *BUCKETS, "under way"), 0)
    for ledger in ledgers:
        for name, count in ledger.items():
            found[name] += count
    return found
