"""A slot's states, as a pure machine: no process, no pipe, no clock of its own.

A slot is a numbered place on a farm that runs one environment in one worker process. This module decides what a
command or an event means; `supervisor` does it.

    EMPTY ----> STARTING ----> IDLE ----> RESETTING ----> READY <---> STEPPING
      ^            |            ^             |             |             |
      |            |            +-- episode over, freed, fault in the env +
      +-- died ----+-- or the worker ends in any other state -------------+

A lease is kept beside the state: it says who may give commands, not what the worker is doing. Commands of hosts are
numbered by the host; a slot gives each a *ticket* of its own before it goes to the worker, so that a late reply to a
former holder's command can never be taken for an answer to the present one's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from wire import codec, protocol


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
        trouble: why the last worker ended or could not be built, in words.
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
    trouble: str | None = None
    _ticket: int = 0
    _latest: int = 0  # the highest number that the holder has used; nothing up to it is begun any more
    _asked: int | None = None  # the host's number of the command under way
    _held: tuple[int, bytes] | None = field(default=None, repr=False)  # a reset that waits for the worker
    _answer: Reply | None = field(default=None, repr=False)  # the last reply, for a host whose connection broke

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

    def died(self, why: str, wanted: bool = False) -> Reply | None:
        """The worker is gone. Returns what its holder must be told now, if a command was under way.

        Args:
            why: how it ended, in words.
            wanted: the farm ended it for a reason of its own: no failure, and a reset that waits goes on waiting.
        """
        while_starting = self.state is State.STARTING
        self.state, self.pid, self.trouble = State.EMPTY, None, None if wanted else why
        if wanted and self._held is not None:
            return None
        if while_starting and not wanted:
            self.failures += 1
        self._held = None
        return self._lose(why)

    # Events of the holder.

    def take(self, lease: str) -> None:
        """Gives the slot to a holder; what went on for a former one is nobody's any more."""
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
            # A number comes a second time when a question about it has overtaken it: it is not done after the answer.
            self._latest = max(self._latest, seq)
            return None, self._what_became_of(seq)
        self._latest = seq
        if self._asked is not None:
            return None, _lost(seq, "slot %d is busy with command %d" % (self.number, self._asked))
        if kind == protocol.RESET:
            self._asked, self._answer = seq, None
            if self.state in (State.EMPTY, State.STARTING):
                if self.failures:
                    return None, self._lose(self.trouble or "the environment cannot be built")
                self._held = (seq, body)
                return None, None
            return self._to_worker(kind, seq, body, State.RESETTING), None
        if kind == protocol.STEP:
            self._asked, self._answer = seq, None
            if self.state is not State.READY:
                why = "no episode runs in slot %d" % self.number
                return None, self._lose("%s: %s" % (why, self.trouble) if self.trouble else why)
            return self._to_worker(kind, seq, body, State.STEPPING), None
        return None, _lost(seq, "a host may send reset, step and ask, not %s" % protocol.NAMES.get(kind, kind))

    def replied(self, kind: int, flags: int, ticket: int, body: bytes) -> Reply | None:
        """The worker's reply. Returns what to give the holder; None when its asker is gone."""
        if kind == protocol.TRANSITION:
            self.steps += 1
        if ticket != self._ticket:
            return None  # a reply to a command before the present one, whose asker is gone
        over = bool(flags & (protocol.TERMINATED | protocol.TRUNCATED)) or kind == protocol.FAULT
        if over:
            self.episodes += 1
        self.state = State.IDLE if over or self._asked is None else State.READY
        if self._asked is None:
            return None
        self._answer = Reply(self._asked, kind, body, flags)
        self._asked = None
        return self._answer

    def _to_worker(self, kind: int, seq: int, body: bytes, state: State) -> bytes:
        self._ticket += 1
        self._asked, self.state = seq, state
        return protocol.pack(kind, self._ticket, body)

    def _lose(self, why: str) -> Reply | None:
        if self._asked is None:
            return None
        self._answer = _lost(self._asked, why)
        self._asked = None
        return self._answer

    def _what_became_of(self, seq: int) -> Reply | None:
        if self._asked == seq:
            return None  # under way: the answer will come
        if self._answer is not None and self._answer.seq == seq:
            return self._answer
        why = "command %d never reached slot %d" % (seq, self.number)
        return Reply(seq, protocol.LOST, codec.encode({"text": why, "bucket": "lost with its farm"}))

    def _forget(self) -> None:
        self._latest = 0
        self._asked = self._held = self._answer = None


def _lost(seq: int, why: str) -> Reply:
    return Reply(seq, protocol.LOST, codec.encode({"text": why}))
