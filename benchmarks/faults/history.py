"""What was sent, what came back and what the environments say they did: the history of a run, and its checker.

    history = History()
    history.sent(slot, action, episode, step) ...      # the host's end, as it happens
    journal = read_journal(folder)                      # the environments' end, written by `journal.JournalEnv`
    verdict = check(history, journal, farmer.status())
    assert verdict.good, verdict

In the manner of Jepsen: a run is free to do what it likes while everything is being broken; afterwards the record of
both ends must be one that a correct system could have made. Every action is a number that is given once in a run, and
the environment observes it, so each result says which command it answers. A step is *lost* when it was sent and
neither answered nor told as lost; what is told must stand in the ledger.

Pure functions; no network, no process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simulators.faulty import MOST, tag

RESET, BEGUN, DONE = range(3)  # as in journal.py
RECORD = np.dtype([("kind", "u1"), ("who", "<u4"), ("episode", "<u4"), ("step", "<u4"), ("tag", "<u4"), ("act", "<f8")])

KINDS_OF_LOSS = ("crashed", "timed out", "invalid", "lost with its farm", "abandoned")


def action_of(number: int) -> float:
    """The action that carries a number: below 1, and exact in float32."""
    return number / MOST


def number_of(action: float) -> int:
    """The number that an action carries."""
    return round(action * MOST)


class Sent(NamedTuple):
    """A step went to a slot: `seed` is its episode's, `step` its place in it, from 1."""

    slot: int
    number: int
    seed: int
    step: int
    at: float


class First(NamedTuple):
    """An episode's first observation came."""

    slot: int
    seed: int
    who: int
    tag: int
    step: int
    at: float


class Got(NamedTuple):
    """A transition came: everything but `slot` and `at` is what the environment observes."""

    slot: int
    number: int
    who: int
    tag: int
    step: int
    reward: float
    at: float


class Lost(NamedTuple):
    """The pool said that a slot was lost; whatever was under way in it has no answer."""

    slot: int
    why: str
    at: float


Event = Sent | First | Got | Lost


class Did(NamedTuple):
    """What an environment wrote down."""

    kind: int
    who: int
    episode: int
    step: int
    tag: int
    number: int


class History:
    """The host's end of a run, in the order in which things happened there."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def sent(self, slot: int, number: int, seed: int, step: int) -> None:
        self.events.append(Sent(slot, number, seed, step, time.monotonic()))

    def first(self, slot: int, seed: int, obs: Any) -> None:
        who, _, step, mark, _ = (float(value) for value in obs)
        self.events.append(First(slot, seed, int(who), int(mark), int(step), time.monotonic()))

    def got(self, slot: int, obs: Any, reward: float) -> None:
        who, _, step, mark, action = (float(value) for value in obs)
        self.events.append(Got(slot, number_of(action), int(who), int(mark), int(step), reward, time.monotonic()))

    def lost(self, slot: int, why: str) -> None:
        self.events.append(Lost(slot, why, time.monotonic()))

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@dataclass
class Verdict:
    """How often each thing happened that must never happen; `said` has the first of each in words."""

    sent: int = 0
    delivered: int = 0
    told: int = 0  # lost, and said so
    done_and_told: int = (
        0  # of those, the environment had done: the answer was lost on its way, and it is no transition
    )
    lost: int = 0
    doubled: int = 0
    swapped: int = 0
    cross_slot: int = 0
    ledger: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    BAD = ("lost", "doubled", "swapped", "cross_slot", "ledger")

    @property
    def good(self) -> bool:
        """Whether nothing happened that must not."""
        return not any(getattr(self, name) for name in self.BAD)

    def charge(self, name: str, words: str) -> None:
        """Counts one of BAD."""
        if getattr(self, name) < 5:
            self.said.append("%s: %s" % (name, words))
        setattr(self, name, getattr(self, name) + 1)

    def __str__(self) -> str:
        figures = ", ".join("%d %s" % (getattr(self, name), name.replace("_", "-")) for name in self.BAD[:-1])
        losses = ", ".join("%d %s" % (n, name) for name, n in self.buckets.items() if n and name in KINDS_OF_LOSS)
        return "%d steps sent, %d delivered, %d told as lost (%s; %d of them done): %s; ledger %s%s" % (
            self.sent,
            self.delivered,
            self.told,
            losses or "none",
            self.done_and_told,
            figures,
            "WRONG" if self.ledger else "sums to sent",
            "".join("\n  " + words for words in self.said),
        )


def read_journal(folder: str | Path) -> list[Did]:
    """Everything that the environments of a run wrote down, each one's in its order."""
    did: list[Did] = []
    for path in sorted(Path(folder).iterdir()):
        data = path.read_bytes()
        whole = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)
        numbers = np.rint(whole["act"] * MOST).astype(int).tolist()
        columns = [whole[name].tolist() for name in ("kind", "who", "episode", "step", "tag")]
        did += [Did(*row) for row in zip(*columns, numbers, strict=True)]
    return did


def check(history: History, journal: Iterable[Did] | None, status: Mapping[str, Any]) -> Verdict:
    """Whether a correct system could have made this history.

    Args:
        history: the host's end, with nothing under way any more.
        journal: the environments' end; None where there is none (then only what came back is judged).
        status: the pool's `status()`, for the ledgers.
    """
    verdict = Verdict()
    sent = {event.number: event for event in history.events if isinstance(event, Sent)}
    verdict.sent = len(sent)
    answered, told = _check_host(history.events, sent, verdict)
    verdict.delivered, verdict.told = len(answered), len(told)
    did = list(journal or ())
    done = {one.number for one in did if one.kind == DONE}
    for number in sent.keys() - answered - told:
        what = "the environment had done it" if number in done else "the environment had not done it"
        verdict.charge("lost", "never answered, and never told: %s; %s" % (sent[number], what))
    verdict.done_and_told = len(done & told)
    if journal is not None:
        for number in answered - done:
            verdict.charge("swapped", "step %d was answered, and no environment did it" % number)
        _check_journal(did, sent, verdict)
    _check_ledger(status, verdict)
    return verdict


def _check_host(events: list[Event], sent: dict[int, Sent], verdict: Verdict) -> tuple[set[int], set[int]]:
    """Goes through what the host saw; returns the numbers that were answered and those told as lost."""
    pending: dict[int, Sent] = {}
    first: dict[int, First] = {}
    answered: set[int] = set()
    told: set[int] = set()
    for event in events:
        if isinstance(event, Sent):
            pending[event.slot] = event
        elif isinstance(event, First):
            if event.tag != tag(event.seed) or event.step != 0:
                verdict.charge("cross_slot", "another episode's beginning: %s" % (event,))
            first[event.slot] = event
        elif isinstance(event, Lost):
            if event.slot in pending:
                told.add(pending.pop(event.slot).number)
        else:
            asked = pending.pop(event.slot, None)
            _check_answer(event, asked, sent, answered, first.get(event.slot), verdict)
            if asked is not None and event.number != asked.number and event.slot not in pending:
                pending[event.slot] = asked  # what was asked has had no answer yet
            answered.add(event.number)
    return answered, told


def _check_answer(
    got: Got, asked: Sent | None, sent: dict[int, Sent], answered: set[int], first: First | None, verdict: Verdict
) -> None:
    if got.number in answered:
        verdict.charge("doubled", "answered a second time: %s" % (got,))
    elif got.number not in sent:
        verdict.charge("cross_slot", "an answer to nothing that was sent: %s" % (got,))
    elif sent[got.number].slot != got.slot:
        verdict.charge("cross_slot", "%s came for %s" % (got, sent[got.number]))
    elif asked is None or asked.number != got.number:
        verdict.charge("swapped", "%s was asked, %s came" % (asked, got))
    elif first is None or got.tag != tag(asked.seed) or got.who != first.who:
        verdict.charge("cross_slot", "%s is from another episode than %s, which began with %s" % (got, asked, first))
    elif got.step > asked.step:
        verdict.charge("doubled", "the environment had more steps than were sent: %s for %s" % (got, asked))
    elif got.step < asked.step:
        verdict.charge("lost", "the environment had fewer steps than were answered: %s for %s" % (got, asked))
    elif got.reward != got.step:
        verdict.charge("swapped", "a reward of another step: %s" % (got,))


def _check_journal(journal: list[Did], sent: dict[int, Sent], verdict: Verdict) -> None:
    begun = Counter(did.number for did in journal if did.kind == BEGUN)
    for number, times in begun.items():
        if times > 1:
            verdict.charge("doubled", "step %d was begun %d times" % (number, times))
        if number not in sent:
            verdict.charge("cross_slot", "step %d was begun, and nobody sent it" % number)
    latest: dict[tuple[int, int], int] = {}
    for did in journal:
        if did.kind != BEGUN:
            continue
        episode = (did.who, did.episode)
        if did.number < latest.get(episode, -1):
            verdict.charge("swapped", "step %d was begun after %d" % (did.number, latest[episode]))
        latest[episode] = did.number
        if did.number in sent and did.tag != tag(sent[did.number].seed):
            verdict.charge("cross_slot", "%s reached %s" % (sent[did.number], did))


def _check_ledger(status: Mapping[str, Any], verdict: Verdict) -> None:
    """Every ledger adds up, and all together say what the host saw."""
    total: Counter[str] = Counter()
    for farm in status["farms"]:
        ledger = farm["ledger"]
        total.update(ledger)
        if ledger["sent"] != sum(count for name, count in ledger.items() if name != "sent"):
            verdict.charge("ledger", "that of %s does not add up: %s" % (farm["farm"], ledger))
    if "ledger" in status:  # of all farms together, with those that have left the list
        total = Counter(status["ledger"])
        if total["sent"] != sum(count for name, count in total.items() if name != "sent"):
            verdict.charge("ledger", "the whole one does not add up: %s" % dict(total))
    verdict.buckets = {name: count for name, count in total.items() if name != "sent"}
    losses = sum(total[name] for name in KINDS_OF_LOSS)
    for what, counted, seen in (
        ("sent", total["sent"], verdict.sent),
        ("done", total["done"], verdict.delivered),
        ("lost in one way or another", losses, verdict.told),
        ("under way", total["under way"], 0),
    ):
        if counted != seen:
            verdict.charge("ledger", "it says that %d steps are %s; the host saw %d" % (counted, what, seen))
