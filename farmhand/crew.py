"""Workers that step as fast as they can, without a farm around them: what `autotune` measures with.

    with Crew(catalog, python, folder, limits) as crew:
        crew.grow(4)
        window = crew.run(4, seconds=2.0, least=3, room=8 << 30, until=time.monotonic() + 20)

The same processes, pipes and commands as a farm's, with actions drawn at random; each gets its next command as soon as
it has answered. What a farm outlives, the end of a worker, ends the measurement and is raised.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from farmhand import tree
from farmhand.actions import sampler
from farmhand.catalog import Catalog
from farmhand.limits import BARREN_STEPS, FLOOR, Limits
from farmhand.peek import seconds_of
from farmhand.process import WorkerProcess
from farmhand.supervisor import fault_words
from wire import codec, protocol
from wire.errors import StartError

DRAWN = 256  #: actions, which are drawn and encoded once: drawing one may take longer than a step
FAULTS = 3  #: in a row, without BARREN_STEPS steps between, and the environment is not worth measuring
CLOSE_LIMIT = 2.0  #: s that all workers together have for closing their environments
LAST_WORDS = 0.3  #: s between a closed pipe and the end of its process
WEIGH_EVERY = 0.02  #: s between two looks at the memory of the workers, for each of them

log = logging.getLogger("autotune")


@dataclass(eq=False)
class Member:
    """One worker, and what it has done."""

    worker: WorkerProcess
    number: int
    ready: dict[str, Any] = field(default_factory=dict)
    fresh: int = 0  # bytes after its first step
    over: bool = True  # its next command is a reset
    steps: int = 0
    episodes: int = 0  # that ended
    faults: int = 0
    since_fault: int = 0
    marks: tuple[float, float, int] = (0.0, 0.0, 0)  # of a window: first answer, last answer, how many


@dataclass
class Window:
    """What `run` saw.

    Attributes:
        seconds: how long it was.
        rate: environment steps a second of all together, resets included.
        steps, episodes, faults: how many, of all.
        least: steps of the one that made the fewest.
        step_seconds, reset_seconds: what the environment took for each, by the worker's clock.
        computed: cores that the workers kept busy; own: that this process did; others: that other programs did.
        queued: cores that workers and this process wanted and did not get.
        memory: bytes of all workers at the end; most: of the largest one.
        samples: (steps so far, bytes) of the first worker, while it ran.
        full: whether it ended early, for its workers held more than they may.
    """

    seconds: float = 0.0
    rate: float = 0.0
    steps: int = 0
    episodes: int = 0
    faults: int = 0
    least: int = 0
    step_seconds: list[float] = field(default_factory=list)
    reset_seconds: list[float] = field(default_factory=list)
    computed: float = 0.0
    own: float = 0.0
    others: float = 0.0
    queued: float = 0.0
    memory: int = 0
    most: int = 0
    samples: list[tuple[int, int]] = field(default_factory=list)
    full: bool = False


class Crew:
    """Workers of one environment."""

    def __init__(self, catalog: Catalog, python: str, folder: Path, limits: Limits):
        """Starts nothing yet.

        Args:
            catalog: with one environment.
            python: the workers' interpreter.
            folder: for a log each; it is there.
            limits: `start`, `reset` and `step` are in force, the last two at FLOOR where they are not given.
        """
        self.members: list[Member] = []
        self.fault = ""  # the last one's text
        self._env = catalog.names[0]
        self._order = catalog.order(self._env)
        self._python, self._folder, self._limits = python, folder, limits
        self._bodies: list[bytes] = []
        self._selector = selectors.DefaultSelector()
        self._window = Window()
        self._draining = False
        self._marks: set[str] = set()
        self._next_look = 0.0
        self._given = 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # Starting and ending.

    def grow(self, count: int, room: int | None = None) -> bool:
        """Starts workers until there are `count`, as many at a time as there are cores, and waits until they stand.

        Returns:
            False when those that stand hold more than `room` bytes; no more are started then.

        Raises:
            StartError: one cannot be built, or not in time.
        """
        while len(self.members) < count:
            for _ in range(min(count - len(self.members), math.ceil(tree.cores()))):
                self._start()
            while not all(member.ready for member in self.members):
                self._wait(math.inf)
            if room is not None and sum(tree.resident(m.worker.pid) for m in self.members) > room:
                return False
        return True

    def renew(self) -> None:
        """Ends the workers that have grown to twice what they had; `grow` starts others, as a farm does."""
        for member in list(self.members):
            if member.fresh and tree.resident(member.worker.pid) > 2 * member.fresh:
                self._forget(member)
                member.worker.ask_to_end()
                member.worker.end(grace=CLOSE_LIMIT)
        for number, member in enumerate(self.members):
            member.number = number

    def close(self) -> None:
        """Ends every worker and what it started: asks, then kills; within about 3 s, whatever they do."""
        deadline = time.monotonic() + CLOSE_LIMIT
        members, self.members = self.members, []
        for member in members:
            member.worker.ask_to_end()
        for member in members:
            member.worker.end(max(0.0, deadline - time.monotonic()))
        self._selector.close()
        tree.sweep(self._marks)

    def _start(self) -> None:
        number = len(self.members)
        path = self._folder / ("worker-%d.log" % number)
        try:
            worker = WorkerProcess(self._python, self._env, self._order, number, path)
        except OSError as error:
            raise StartError("%s does not start: %s" % (self._python, error)) from None
        member = Member(worker, number)
        self.members.append(member)
        self._marks.add(worker.mark)
        worker.begin(protocol.CONSTRUCT, self._limits.start)
        self._selector.register(worker.stdout, selectors.EVENT_READ, member)
        if worker.pidfd is not None:
            self._selector.register(worker.pidfd, selectors.EVENT_READ, member)

    def _forget(self, member: Member) -> None:
        self.members.remove(member)
        for fd in (member.worker.stdin, member.worker.stdout, member.worker.pidfd):
            if fd is not None and fd in self._selector.get_map():
                self._selector.unregister(fd)

    # Stepping.

    def run(
        self, count: int, seconds: float, least: int, room: int, until: float, leak_room: int | None = None
    ) -> Window:
        """Has the first `count` workers step for so long, and until each has made `least` steps.

        It counts from when each of them has made one step, so that first resets and caches are not in it. An episode
        that ends is followed by the next.

        Args:
            count: workers that step; the others wait.
            seconds: of the window.
            least: steps of each.
            room: bytes; it ends early when the workers hold more.
            until: time.monotonic() at which it ends with what there is.
            leak_room: bytes; it ends early as well when the workers hold more than this, and twice what they held
                after their first step. None: they may.

        Raises:
            StartError: a worker ended, did not answer in time, or failed FAULTS times in a row.
        """
        working = self.members[:count]
        self._window, self._draining = Window(), False
        for member in working:
            member.marks = (0.0, 0.0, 0)
            self._give(member)
        while not all(member.marks[2] for member in working) and time.monotonic() < until:
            self._wait(until)
        for member in working:
            member.fresh = member.fresh or tree.resident(member.worker.pid)
        if leak_room is not None:
            room = min(room, max(leak_room, 2 * sum(member.fresh for member in working)))
        self._measure(working, seconds, least, room, until)
        window = self._window
        self._draining = True
        while any(member.worker.is_asked for member in working):
            self._wait(math.inf)
        return window

    def _measure(self, working: list[Member], seconds: float, least: int, room: int, until: float) -> None:
        window = self._window = Window(reset_seconds=self._window.reset_seconds)
        for member in working:
            member.marks = (0.0, 0.0, 0)
        before, began = _Meters(working), time.monotonic()
        next_weighing = 0.0
        while not window.full:
            now = time.monotonic()
            if now >= until or (now >= began + seconds and all(m.marks[2] > least for m in working)):
                break
            if now >= next_weighing:
                next_weighing = now + WEIGH_EVERY * len(working)
                self._weigh(working, room)
            self._wait(min(until, next_weighing))
        after = _Meters(working)
        window.seconds = time.monotonic() - began
        window.computed, window.own, window.others, window.queued = after.since(before, window.seconds)
        self._weigh(working, room)
        window.least = min(member.marks[2] - 1 for member in working)
        # From answer to answer, so that a step that the window's ends cut in two does not count as half.
        spans = [(last - first, number - 1) for first, last, number in (member.marks for member in working)]
        window.rate = sum(number / span for span, number in spans if span > 0)

    def _weigh(self, working: list[Member], room: int) -> None:
        held = [tree.resident(member.worker.pid) for member in working]
        window = self._window
        window.memory, window.most = sum(held), max(window.most, *held)
        window.full = window.memory > room
        window.samples.append((working[0].steps, held[0]))

    def _give(self, member: Member) -> None:
        """Its next command."""
        self._given += 1
        if member.over:
            member.over = False
            seed = member.number if not member.episodes else None
            seconds = (self._limits.reset or FLOOR) + (self._limits.start if member.worker.rebuilds else 0.0)
            body, kind = codec.encode({"seed": seed, "options": None}), protocol.RESET
        else:
            body, kind, seconds = self._bodies[self._given % DRAWN], protocol.STEP, self._limits.step or FLOOR
        member.worker.begin(kind, seconds)
        if not member.worker.write(protocol.pack(kind, self._given, body)):
            self._selector.register(member.worker.stdin, selectors.EVENT_WRITE, member)

    def _wait(self, until: float) -> None:
        """Does what is due, and returns after the next answers, or at `until`."""
        now = time.monotonic()
        if now >= self._next_look:  # once a second is often enough for limits of many
            self._next_look = now + 1.0
            for member in self.members:
                if member.worker.deadline <= now:
                    raise self._overdue(member)
        for key, _ in self._selector.select(max(0.0, min(until, self._next_look) - now)):
            member = key.data
            if key.fd == member.worker.stdin:
                if member.worker.flush():
                    self._selector.unregister(key.fd)
                continue
            self._read(member, key.fd == member.worker.pidfd)

    def _read(self, member: Member, ended: bool) -> None:
        try:
            frames = member.worker.read()
        except protocol.FrameError as error:
            raise StartError(
                "%s wrote something else into its pipe: %s%s" % (member.worker.name(), error, member.worker.evidence())
            ) from None
        for kind, flags, _, body in frames or []:
            if not member.worker.is_asked:
                raise StartError(
                    "%s answered what nobody had asked%s" % (member.worker.name(), member.worker.evidence())
                )
            self._said(member, member.worker.done()[0], kind, flags, body)
        if frames is None or (ended and not frames):
            raise self._dead(member)

    def _said(self, member: Member, due: int, kind: int, flags: int, body: bytes) -> None:
        if due == protocol.CONSTRUCT:
            if kind == protocol.READY:
                member.ready = codec.decode(body)
                member.worker.stood = time.monotonic()
                self._bodies = self._bodies or _draw(member.ready["action_space"])
            else:
                member.worker.fault = fault_words(codec.decode(body))
            return
        if kind == protocol.TRANSITION:
            self._stepped(member, flags, body)
        elif kind == protocol.OBSERVATION:
            member.worker.rebuilds = False
            self._window.reset_seconds.append(seconds_of(body))
        else:
            self._failed(member, codec.decode(body))
        if not self._draining:
            self._give(member)

    def _stepped(self, member: Member, flags: int, body: bytes) -> None:
        now = time.monotonic()
        member.steps += 1
        member.since_fault += 1
        first, _, number = member.marks
        member.marks = (first or now, now, number + 1)
        window = self._window
        window.steps += 1
        window.step_seconds.append(seconds_of(body))
        if flags:
            member.over = True
            member.episodes += 1
            window.episodes += 1

    def _failed(self, member: Member, fault: dict[str, Any]) -> None:
        member.faults = member.faults + 1 if member.since_fault < BARREN_STEPS else 1
        member.since_fault = 0
        member.over = member.worker.rebuilds = True
        self._window.faults += 1
        self.fault = "%s in %s: %s" % (fault["type"], fault["where"], fault["text"])
        if member.faults >= FAULTS:
            raise StartError(
                "%s fails with random actions, %d times without %d steps between; the last time in %s:\n  %s"
                % (self._env, FAULTS, BARREN_STEPS, fault["where"], fault_words(fault))
            )

    # Ends.

    def _dead(self, member: Member) -> StartError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.worker.popen.wait(LAST_WORDS)
        when = "ended after %d steps with random actions" % member.steps if member.ready else "cannot be built"
        return StartError("%s %s\n  %s" % (self._env, when, member.worker.kill()))

    def _overdue(self, member: Member) -> StartError:
        kind, seconds, _ = member.worker.at
        member.worker.ask_for_trace()
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.worker.popen.wait(LAST_WORDS)
        what, option = {
            protocol.CONSTRUCT: ("was not built", "--start-timeout"),
            protocol.RESET: ("did not end a reset", "--reset-timeout"),
        }.get(kind, ("did not end a step", "--step-timeout"))
        return StartError(
            "%s %s within %g s\n  now: give it more with %s SECONDS\n  %s%s"
            % (self._env, what, seconds, option, member.worker.name(), member.worker.evidence(lines=16))
        )


class _Meters:
    """The processor time of the workers, of this process, and of the machine, at one moment."""

    def __init__(self, members: list[Member]):
        self.workers = sum(tree.processor_time(member.worker.pid) for member in members)
        # One worker and this process work in turns, so what either of them waits for a core is lost to both.
        self.queued = tree.queued([os.getpid()]) + sum(tree.queued(tree.family(m.worker.pid)) for m in members)
        self.own = time.process_time()
        times = psutil.cpu_times()
        self.machine = times.user + times.nice + times.system + getattr(times, "irq", 0) + getattr(times, "softirq", 0)

    def since(self, before: _Meters, seconds: float) -> tuple[float, float, float, float]:
        """Cores that were busy since then: (with workers, with this process, with others), and that workers lacked."""
        workers, own = self.workers - before.workers, self.own - before.own
        others = max(0.0, self.machine - before.machine - workers - own)
        return workers / seconds, own / seconds, others / seconds, (self.queued - before.queued) / seconds


def _draw(space: dict[str, Any] | None) -> list[bytes]:
    draw = sampler(space, np.random.default_rng(os.getpid()))
    return [codec.encode({"action": draw(), "repeat": 1}) for _ in range(DRAWN)]
