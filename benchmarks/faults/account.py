"""What became of every slot-second of a run: a farmer that keeps accounts, for `bench.py soak`.

accounts = Accounts()
with Watched(accounts, env, farms) as pool:
    accounts.begin("calm")
    ...
    accounts.begin("harm")
accounts.missing("harm", "calm")["hang"]        # slot-seconds

A slot is always at one of these, and each second of it is put down under that one:

    work       in the environment's step
    slow       of that, what a step took longer than any honest one
    way        between the host and the environment: the wire, the farm, the pipes; of steps that were answered
    stall      of that, what an answer took longer than STALL: its connection was replaced, or the machine out of breath
    reset      in the environment's reset
    start      the rest of a reset that was answered: the way, and the wait for a worker that stands
    hang       a command that was told as timed out
    crash      a command that was told as crashed
    invalid    a command that was told as invalid
    wire       a command that a broken connection swallowed
    farm       a command that was lost with its farm, and what follows until the slot is there again
    again      from word of any other loss to the reset after it
    host       in the host's hands: its result waits for the learner, and its next command has not come
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from farmer import Farmer
from farmer.courier import Courier
from wire import protocol

KINDS = ("work", "slow", "way", "stall", "reset", "start", "hang", "crash", "invalid", "wire", "farm", "again", "host")
#: What only a fault takes. The others are there without any, and grow with whatever else the machine does.
BY_FAULTS = ("slow", "reset", "start", "hang", "crash", "invalid", "wire", "farm", "again")
STALL = 0.25  #: s
_BUCKETS = {"timed out": "hang", "crashed": "crash", "invalid": "invalid", "lost with its farm": "wire"}


class Accounts:
    """Slot-seconds by kind and span; a span is a stretch of the run with a name, maybe in several pieces."""

    def __init__(self, slow: float = float("inf"), honest: float = 0.0):
        """A step that takes more than `slow` seconds is a slow one; beyond `honest` seconds its time is lost."""
        self._slow, self._honest = slow, honest
        self._lock = threading.Lock()
        self._span: str | None = None
        self._since: dict[int, tuple[str, float]] = {}  # what each slot is at, and since when
        self.seconds: dict[str, Counter[str]] = {}
        self.steps: Counter[str] = Counter()

    def begin(self, span: str | None) -> None:
        """From now on everything is put down under this span; None: under none."""
        with self._lock:
            now = time.perf_counter()
            for slot, (kind, _) in list(self._since.items()):
                self._spend(slot, kind, kind, now)
            self._span = span

    def sent(self, slots: list[int], is_step: bool) -> None:
        """A command goes to each of these."""
        with self._lock:
            now = time.perf_counter()
            for slot in slots:
                kind = self._since[slot][0] if slot in self._since else "host"
                self._spend(slot, kind, "way" if is_step else "start", now)

    def answered(self, slot: int, is_step: bool, env_s: float) -> None:
        """Its result is there."""
        with self._lock:
            now = time.perf_counter()
            kind, since = self._since.get(slot, ("host", now))
            inside = max(0.0, min(env_s, now - since))
            if is_step and inside > self._slow:
                self._put("slow", inside - self._honest)
                self._put("work", self._honest)
            else:
                self._put("work" if is_step else "reset", inside)
            stalled = max(0.0, now - since - inside - STALL) if is_step else 0.0
            self._put("stall", stalled)
            self._since[slot] = (kind, since + inside + stalled)
            self._spend(slot, kind, "host", now)
            if is_step and self._span is not None:
                self.steps[self._span] += 1

    def lost(self, slot: int, bucket: str) -> None:
        """Its command will never be answered, and it was told why."""
        with self._lock:
            self._spend(slot, _BUCKETS[bucket], "again", time.perf_counter())

    def left(self, slot: int) -> None:
        """Its farm is gone, with the command that was under way if there was one."""
        with self._lock:
            kind = self._since[slot][0] if slot in self._since else "farm"
            self._spend(slot, kind if kind == "host" else "farm", "farm", time.perf_counter())

    def _spend(self, slot: int, kind: str, then: str, now: float) -> None:
        since = self._since[slot][1] if slot in self._since else now
        self._put(kind, now - since)
        self._since[slot] = (then, now)

    def _put(self, kind: str, seconds: float) -> None:
        if self._span is not None:
            self.seconds.setdefault(self._span, Counter())[kind] += seconds

    # What it comes to.

    def missing(self, span: str, usual: str) -> dict[str, float]:
        """Slot-seconds by kind that `span` took beyond what as many steps took in the `usual` one.

        Their sum is the difference of the two rates: goodput is 1 - sum / all slot-seconds of the span.
        """
        share = self.steps[span] / max(1, self.steps[usual])
        return {kind: self.seconds[span][kind] - share * self.seconds[usual][kind] for kind in KINDS}

    def goodput(self, span: str, usual: str) -> float:
        """Steps a slot-second as a share of those in the usual span."""
        rates = [self.steps[name] / sum(self.seconds[name].values()) for name in (span, usual)]
        return rates[0] / rates[1]


class Watched(Farmer):
    """A farmer that keeps accounts."""

    def __init__(self, accounts: Accounts, *args: Any, **kwargs: Any):
        self.accounts = accounts
        super().__init__(*args, **kwargs)

    def _dispatch(self, slots: list[int], kind: int, bodies: list[bytes]) -> list[Courier]:
        self.accounts.sent(slots, kind == protocol.STEP)
        return super()._dispatch(slots, kind, bodies)

    def _finish(self, place: Any, kind: int, value: Any, why: str | None, bucket: str, trip_s: float = 0.0) -> None:
        if not place.here:
            self.accounts.left(place.slot)
        elif why is not None:
            self.accounts.lost(place.slot, bucket)
        else:
            self.accounts.answered(place.slot, place.sent == protocol.STEP, value[-1])
        super()._finish(place, kind, value, why, bucket, trip_s)

    def _on_left(self, place: Any, why: str) -> None:
        self.accounts.left(place.slot)
        super()._on_left(place, why)
