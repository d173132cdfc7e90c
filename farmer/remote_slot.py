"""One environment as the pool sees it: a slot of a farm, its episode, and the command under way.

Two writers, both under the pool's lock: membership says which of the farm's slots it is (`assign`), and
`farmer/commands.py` everything else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from farmer.balance import RecentMean
from farmer.ledger import BUCKETS
from wire import protocol

if TYPE_CHECKING:
    from farmer.remote_farm import RemoteFarm


@dataclass(eq=False)
class RemoteSlot:
    """A slot of the pool; it keeps its index and its ledger when its farm leaves and comes back.

    Attributes:
        index: its number in the pool.
        number: its number on the farm; other slots of the pool may have had it before.
        sent: the kind of the command under way, or None.
        sent_at: when, by time.perf_counter.
        abandoned: nobody waits for what is under way any more.
        not_before: by time.monotonic, when it may be reset again.
        failed_resets: in a row.
        steps: of the episode that runs.
        step_s, reset_s: seconds from sending to the result's arrival, lately.
    """

    index: int
    farm: RemoteFarm
    number: int = -1
    seq: int = 0
    sent: int | None = None
    sent_at: float = 0.0
    abandoned: bool = False
    episode: bool = False
    last_obs: Any = None
    not_before: float = 0.0
    failed_resets: int = 0
    steps: int = 0
    step_s: RecentMean = field(default_factory=RecentMean)
    reset_s: RecentMean = field(default_factory=RecentMean)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def attached(self) -> bool:
        """Whether its farm is there and gives it a slot."""
        return self.farm.by_number.get(self.number) is self

    @property
    def idle(self) -> bool:
        """Whether no episode runs and nothing is under way."""
        return not self.episode and self.sent is None

    def assign(self, number: int) -> None:
        """It is this slot of its farm from now on."""
        self.number, self.not_before = number, 0.0
        self.farm.by_number[number] = self

    def ledger(self) -> dict[str, int]:
        """What became of the steps that were sent here."""
        under_way = int(self.sent == protocol.STEP)
        return {"sent": self.counts["sent"], **{b: self.counts[b] for b in BUCKETS}, "under way": under_way}

    def status(self) -> dict[str, Any]:
        """As `Farmer.status` tells it."""
        return {
            "slot": self.index,
            "far": self.number if self.attached else None,
            "busy": self.sent is not None,
            "step_s": self.step_s.mean,
            "ledger": self.ledger(),
        }
