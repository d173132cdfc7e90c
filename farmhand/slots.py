"""A slot's states, as a pure machine: no process, no pipe, no clock of its own.

A slot is a numbered place on a farm that runs one environment in one worker process. This module decides what a
command or an event means; `supervisor`, `assignments` and `leases` act on it.

    EMPTY ----> STARTING ----> IDLE ----> RESETTING ----> READY <---> STEPPING
      ^            |           |  ^           |             |             |
      |            |           |  +-- episode over, freed, fault in the env
      |            |  recycled |              |             |             |
      +-- died ----+-----------+-- or the worker ends in any other state -+

A worker ends by itself, by a command over its time, or by memory over its cap; it is *recycled* between two episodes.
EMPTY waits for the next worker: not at all at first, longer after each failure in a row (`failed`). While it waits it
is called *quarantined*: nobody can lease it, and its holder's reset is lost at once, with the reason.

Every step that a holder gave is counted in one bucket of the slot's ledger, or is under way.

A lease is kept beside the state: it says which host may give commands, not what the worker is doing. A host numbers
its commands; a slot gives each a *ticket* of its own before it goes to the worker, so that a late reply to a former
holder's command can never be taken for an answer to the present holder's.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

from farmhand.limits import BARREN_ENDS, BARREN_LIFE, BARREN_STEPS
from wire import codec, protocol

BUCKETS = ("done", "crashed", "timed out", "invalid", "abandoned")  #: where a step ends, as the farm sees it


class State(enum.Enum):
    """What the worker in a slot is doing."""

    EMPTY = "empty"  # no process
    STARTING = "starting"  # the process runs, its environment is being built
    IDLE = "idle"  # the environment stands, no episode runs
    RESETTING = "resetting"
    READY = "ready"  # an episode runs, the next step may come
    STEPPING = "stepping"


@dataclass
class Reply:
    """What goes back to the host for its command number `seq`."""

    seq: int
    kind: int
    body: bytes
    flags: int = 0


@dataclass
class Slot:
    """One slot: its state, its holder, and the command that is under way.

    Attributes:
        number: the place on the farm, from 0.
        env: the catalog's name of the environment that runs here.
        lease: the token of the holder, None when free.
        episodes, steps: finished and made by the present worker.
        failures: constructions that failed in a row; 0 after one that did not.
        barren: workers in a row that ended before they did anything useful, though they could be built.
        trouble: why the last worker ended or could not be built, in words.
        ledger: the steps that holders gave ("given"), and what became of them, of all workers together.
        recycled: workers that were replaced at an episode's end, by reason.
        ticket: of the last command that went to the worker.
        asked: the host's number of the command under way, None when there is none.
    """

    number: int
    env: str
    state: State = State.EMPTY
    lease: str | None = None
    pid: int | None = None
    episodes: int = 0
    steps: int = 0
    starts: int = 0
    failures: int = 0
    barren: int = 0
    trouble: str | None = None
    ledger: Counter[str] = field(default_factory=Counter)
    recycled: Counter[str] = field(default_factory=Counter)
    ticket: int = 0
    _latest: int = 0  # the highest number that the holder has used; nothing up to it is begun any more
    asked: int | None = None
    _broken: str | None = None  # why the episode that its holder believes to be running is over
    _stepping: bool = False  # that command is a step
    _held: tuple[int, bytes] | None = field(default=None, repr=False)  # a reset that waits for the worker
    _answer: Reply | None = field(default=None, repr=False)  # the last reply, for a host whose connection broke

    @property
    def failed(self) -> int:
        """Failures in a row for which the next try waits: of constructions, or of workers that did nothing else."""
        return max(self.failures, self.barren - BARREN_ENDS)

    @property
    def quarantined(self) -> bool:
        """It has no worker, and the next one has to wait."""
        return self.state is State.EMPTY and self.failed > 0

    @property
    def is_free(self) -> bool:
        """It can be leased."""
        return self.lease is None and not self.failures and not self.quarantined

    @property
    def under_way(self) -> int:
        """Steps that were given and are in no bucket yet: 1 or 0."""
        return int(self.asked is not None and self._stepping)

    @property
    def held_body(self) -> bytes:
        """The body of the reset that waits for the worker; empty when none does."""
        return self._held[1] if self._held is not None else b""

    # Events of the process.

    def started(self, pid: int) -> None:
        """A worker process was started here."""
        self.state, self.pid = State.STARTING, pid
        self.starts += 1
        self.episodes = self.steps = 0

    def constructed(self) -> list[bytes]:
        """The environment stands. Returns the frames to write now: a reset that came too early, or none."""
        self.state, self.failures, self.trouble = State.IDLE, 0, None
        if self._held is None:
            return []
        seq, body = self._held
        self._held = None
        return [self._to_worker(protocol.RESET, seq, body, State.RESETTING)]

    def died(self, why: str, bucket: str = "crashed", wanted: bool = False, lived: float = 0.0) -> Reply | None:
        """The worker is gone. Returns the reply to its holder, if a command was under way.

        Args:
            why: how it ended, in words.
            bucket: where the step under way is counted.
            wanted: the farm ended it for a reason of its own: no failure, and a reset that waits goes on waiting.
            lived: seconds since its environment was built.
        """
        while_starting = self.state is State.STARTING
        if self.state is State.READY:
            self._broken = why
        self.state, self.pid, self.trouble = State.EMPTY, None, None if wanted else why
        if wanted and self._held is not None:
            return None
        if while_starting and not wanted:
            self.failures += 1
        elif not wanted:
            self.barren = 0 if lived >= BARREN_LIFE else self.barren + 1  # what was useful has set it to -1
        self._held = None
        return self._lose(why, bucket)

    def recycle(self, reason: str) -> None:
        """The worker leaves between two episodes, and a new one comes."""
        self.state, self.pid = State.EMPTY, None
        self.recycled[reason] += 1

    # Events of the holder.

    def take(self, lease: str) -> None:
        """Gives the slot to a holder; what a former one began no longer counts."""
        self.lease = lease
        self._forget()

    def free(self) -> None:
        """Takes the slot from its holder, whatever it is doing."""
        self.lease = None
        self._forget()
        if self.state is State.READY:
            self.state = State.IDLE

    def command(self, kind: int, seq: int, body: bytes) -> tuple[bytes | None, Reply | None]:
        """The holder's command number `seq`.

        Returns:
            (frame to write to the worker or None, reply to give at once or None).
        """
        if kind == protocol.ASK or seq <= self._latest:
            # A number comes twice when an ASK about it has overtaken it: the command is not done after that answer.
            self._latest = max(self._latest, seq)
            return None, self._what_became_of(seq)
        self._latest = seq
        self.ledger["given"] += kind == protocol.STEP
        if self.asked is not None:
            self.ledger["crashed"] += kind == protocol.STEP
            return None, _lost(seq, f"slot {self.number} is busy with command {self.asked}")
        if kind == protocol.RESET:
            self.asked, self._stepping, self._answer, self._broken = seq, False, None, None
            if self.state in (State.EMPTY, State.STARTING):
                if self.failures or self.quarantined:
                    return None, self._lose(self.trouble or "the environment cannot be built")
                self._held = (seq, body)
                return None, None
            return self._to_worker(kind, seq, body, State.RESETTING), None
        if kind == protocol.STEP:
            self.asked, self._stepping, self._answer = seq, True, None
            if self.state is not State.READY:
                return None, self._lose(self._broken or self.trouble or f"no episode runs in slot {self.number}")
            return self._to_worker(kind, seq, body, State.STEPPING), None
        return None, _lost(seq, f"a host may send reset, step and ask, not {protocol.NAMES.get(kind, kind)}")

    def replied(self, kind: int, flags: int, ticket: int, body: bytes) -> Reply | None:
        """The worker's reply. Returns the reply to the holder; None when the host that asked is gone."""
        if kind == protocol.TRANSITION:
            self.steps += 1
            if self.steps >= BARREN_STEPS or flags:
                self.barren = -1  # it was of use, so its end is no failure to start
        if ticket != self.ticket:
            return None  # a reply to an earlier command, whose host is gone
        over = bool(flags & (protocol.TERMINATED | protocol.TRUNCATED)) or kind == protocol.FAULT
        if over:
            self.episodes += 1
        self.state = State.IDLE if over or self.asked is None else State.READY
        if self.asked is None:
            return None
        if self._stepping:
            self.ledger["invalid" if kind == protocol.FAULT else "done"] += 1
        self._answer = Reply(self.asked, kind, body, flags)
        self.asked = None
        return self._answer

    def _to_worker(self, kind: int, seq: int, body: bytes, state: State) -> bytes:
        self.ticket += 1
        self.asked, self.state = seq, state
        return protocol.HEADER.pack(kind, 0, self.ticket, len(body)) + body  # a host's body is within every limit

    def _lose(self, why: str, bucket: str = "crashed") -> Reply | None:
        if self.asked is None:
            return None
        if self._stepping:
            self.ledger[bucket] += 1
        self._answer = _lost(self.asked, why, bucket)
        self.asked = None
        return self._answer

    def _what_became_of(self, seq: int) -> Reply | None:
        if self.asked == seq:
            return None  # under way: the answer will come
        if self._answer is not None and self._answer.seq == seq:
            return self._answer
        why = f"command {seq} never reached slot {self.number}"
        return Reply(seq, protocol.LOST, codec.encode({"text": why, "bucket": "lost with its farm"}))

    def _forget(self) -> None:
        self.ledger["abandoned"] += self.under_way
        self._latest = 0
        self.asked = self._held = self._answer = self._broken = None


def _lost(seq: int, why: str, bucket: str = "crashed") -> Reply:
    return Reply(seq, protocol.LOST, codec.encode({"text": why, "bucket": bucket}))
