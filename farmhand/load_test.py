"""A load test: workers that step as fast as they can, without a farm around them. `autotune` measures with it.

    with LoadTest(catalog, python, folder, limits) as test:
        test.grow(4)
        window = test.run(4, seconds=2.0, least=3, room=8 << 30, until=time.monotonic() + 20)

The workers are a farm's (`workers.py`), and step with actions drawn at random; each gets its next command as soon as it
has answered. A farm replaces a worker that ends; here that ends the measurement and is raised.
"""

from __future__ import annotations

import math
import os
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
from farmhand.worker_process import Due, WorkerProcess
from farmhand.workers import Exit, Workers, fault_words
from wire import codec, protocol
from wire.errors import StartError
from wire.fields import seconds_of

DRAWN = 256  #: actions, which are drawn and encoded once: drawing one may take longer than a step
FAULTS = 3  #: in a row, without BARREN_STEPS steps between, and the environment is not worth measuring
CLOSE_LIMIT = 2.0  #: s that all workers together have for closing their environments
WEIGH_EVERY = 0.02  #: s between two looks at the memory of the workers, for each of them


@dataclass(eq=False)
class Runner:
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


class LoadTest:
    """Workers of one environment that step as fast as they can. For one thread."""

    def __init__(self, catalog: Catalog, python: str, folder: Path, limits: Limits):
        """Starts nothing yet.

        Args:
            catalog: with one environment.
            python: the workers' interpreter.
            folder: for one log a worker; it is there.
            limits: `start`, `reset` and `step` are in force, the last two at FLOOR where they are not given.
        """
        self.runners: list[Runner] = []
        self.fault = ""  # the last one's text
        self._env = catalog.names[0]
        self._order = catalog.order(self._env)
        self._python, self._folder, self._limits = python, folder, limits
        self._workers = Workers(python, self)
        self._bodies: list[bytes] = []
        self._window = Window()
        self._draining = False
        self._next_look = 0.0
        self._given = 0

    def __enter__(self) -> LoadTest:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # Starting and ending.

    def grow(self, count: int, room: int | None = None) -> bool:
        """Starts workers until there are `count`, as many at a time as there are cores, and waits until they are ready.

        Returns:
            False when those that are ready hold more than `room` bytes; no more are started then.

        Raises:
            StartError: one cannot be built, or not in time.
        """
        while len(self.runners) < count:
            for _ in range(min(count - len(self.runners), math.ceil(tree.cores()))):
                self._start()
            while not all(runner.ready for runner in self.runners):
                self._wait(math.inf)
            if room is not None and self.memory() > room:
                return False
        return True

    def _start(self) -> None:
        number = len(self.runners)
        path = self._folder / f"worker-{number}.log"
        try:
            worker = self._workers.start(self._env, self._order, number, path, self._limits.start)
        except OSError as error:
            raise StartError(f"{self._python} does not start: {error}") from None
        self.runners.append(Runner(worker, number))

    def memory(self) -> int:
        """Bytes of all workers."""
        return sum(tree.resident(runner.worker.pid) for runner in self.runners)

    def renew(self) -> None:
        """Ends the workers that have grown to twice what they had; `grow` starts others, as a farm does."""
        old = [r for r in self.runners if r.fresh and tree.resident(r.worker.pid) > 2 * r.fresh]
        self.runners = [runner for runner in self.runners if runner not in old]
        self._workers.retire([runner.worker for runner in old], CLOSE_LIMIT)
        for number, runner in enumerate(self.runners):
            runner.number = runner.worker.slot = number

    def close(self) -> None:
        """Ends every worker and what it started: asks, then kills; within about 3 s, whatever they do."""
        self.runners = []
        self._workers.close(CLOSE_LIMIT)

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
        working = self.runners[:count]
        self._window, self._draining = Window(), False
        for runner in working:
            runner.marks = (0.0, 0.0, 0)
            self._give(runner)
        while not all(runner.marks[2] for runner in working) and time.monotonic() < until:
            self._wait(until)
        for runner in working:
            runner.fresh = runner.fresh or tree.resident(runner.worker.pid)
        if leak_room is not None:
            room = min(room, max(leak_room, 2 * sum(runner.fresh for runner in working)))
        self._measure(working, seconds, least, room, until)
        window = self._window
        self._draining = True
        while any(runner.worker.due for runner in working):
            self._wait(math.inf)
        return window

    def _measure(self, working: list[Runner], seconds: float, least: int, room: int, until: float) -> None:
        window = self._window = Window(reset_seconds=self._window.reset_seconds)
        for runner in working:
            runner.marks = (0.0, 0.0, 0)
        before, began = _Meters(working), time.monotonic()
        next_weighing = 0.0
        while not window.full:
            now = time.monotonic()
            if now >= until or (now >= began + seconds and all(r.marks[2] > least for r in working)):
                break
            if now >= next_weighing:
                next_weighing = now + WEIGH_EVERY * len(working)
                self._weigh(working, room)
            self._wait(min(until, next_weighing))
        after = _Meters(working)
        window.seconds = time.monotonic() - began
        window.computed, window.own, window.others, window.queued = after.since(before, window.seconds)
        self._weigh(working, room)
        window.least = min(runner.marks[2] - 1 for runner in working)
        # From answer to answer, so that a step that the window's ends cut in two does not count as half.
        spans = [(last - first, number - 1) for first, last, number in (runner.marks for runner in working)]
        window.rate = sum(number / span for span, number in spans if span > 0)

    def _weigh(self, working: list[Runner], room: int) -> None:
        held = [tree.resident(runner.worker.pid) for runner in working]
        window = self._window
        window.memory, window.most = sum(held), max(window.most, *held)
        window.full = window.memory > room
        window.samples.append((working[0].steps, held[0]))

    def _give(self, runner: Runner) -> None:
        """Its next command."""
        self._given += 1
        if runner.over:
            runner.over = False
            seed = runner.number if not runner.episodes else None
            seconds = (self._limits.reset or FLOOR) + (self._limits.start if runner.worker.rebuilds else 0.0)
            body, kind = codec.encode({"seed": seed, "options": None}), protocol.RESET
        else:
            body, kind, seconds = self._bodies[self._given % DRAWN], protocol.STEP, self._limits.step or FLOOR
        runner.worker.begin(kind, seconds)
        self._workers.write(runner.worker, protocol.pack(kind, self._given, body))

    def _wait(self, until: float) -> None:
        """Does what is due, and returns after the next answers, or at `until`."""
        now = time.monotonic()
        if now >= self._next_look:  # once a second is often enough for limits of many
            self._next_look = now + min(1.0, self._workers.enforce())
        if self._workers.serve(max(0.0, min(until, self._next_look) - now)):
            self._next_look = 0.0

    # What the workers tell; see `workers.Owner`.

    def _runner(self, worker: WorkerProcess) -> Runner:
        assert worker.slot is not None
        return self.runners[worker.slot]

    def on_ready(self, worker: WorkerProcess, body: bytes) -> None:
        """A worker's environment was built."""
        runner = self._runner(worker)
        runner.ready = codec.decode(body)
        self._bodies = self._bodies or _draw(runner.ready["action_space"])

    def on_reply(self, worker: WorkerProcess, due: Due, kind: int, flags: int, ticket: int, body: bytes) -> None:
        """A worker answered: counts it, and gives the next command."""
        runner = self._runner(worker)
        if kind == protocol.TRANSITION:
            self._stepped(runner, flags, body)
        elif kind == protocol.OBSERVATION:
            worker.rebuilds = False
            self._window.reset_seconds.append(seconds_of(body))
        else:
            self._failed(runner, codec.decode(body))
        if not self._draining:
            self._give(runner)

    def on_late_reply(self, worker: WorkerProcess) -> None:
        """Nobody else waits for replies."""

    def _stepped(self, runner: Runner, flags: int, body: bytes) -> None:
        now = time.monotonic()
        runner.steps += 1
        runner.since_fault += 1
        first, _, number = runner.marks
        runner.marks = (first or now, now, number + 1)
        window = self._window
        window.steps += 1
        window.step_seconds.append(seconds_of(body))
        if flags:
            runner.over = True
            runner.episodes += 1
            window.episodes += 1

    def _failed(self, runner: Runner, fault: dict[str, Any]) -> None:
        runner.faults = runner.faults + 1 if runner.since_fault < BARREN_STEPS else 1
        runner.since_fault = 0
        runner.over = runner.worker.rebuilds = True
        self._window.faults += 1
        self.fault = f"{fault['type']} in {fault['where']}: {fault['text']}"
        if runner.faults >= FAULTS:
            raise StartError(
                f"{self._env} fails with random actions, {FAULTS} times without {BARREN_STEPS} steps between; "
                f"the last time in {fault['where']}:\n  {fault_words(fault)}"
            )

    def on_exit(self, worker: WorkerProcess, end: Exit) -> None:
        """A worker has ended.

        Raises:
            StartError: in any case, as it ends the measurement.
        """
        if end.by != "itself":
            raise StartError(end.why)
        runner = self._runner(worker)
        when = f"ended after {runner.steps} steps with random actions" if runner.ready else "cannot be built"
        raise StartError(f"{self._env} {when}\n  {end.why}")

    def too_long(self, worker: WorkerProcess, state: str) -> str:
        """What a worker did not end in time."""
        kind, seconds, _ = worker.due[0]
        what, option = {
            protocol.CONSTRUCT: ("was not built", "--start-timeout"),
            protocol.RESET: ("did not end a reset", "--reset-timeout"),
        }.get(kind, ("did not end a step", "--step-timeout"))
        return f"{self._env} {what} within {seconds:g} s\n  now: give it more with {option} SECONDS\n  {worker.name()}"


class _Meters:
    """The processor time of the workers, of this process, and of the machine, at one moment."""

    def __init__(self, runners: list[Runner]):
        self.workers = sum(tree.processor_time(runner.worker.pid) for runner in runners)
        # One worker and this process work in turns, so what either of them waits for a core is lost to both.
        self.queued = tree.queued([os.getpid()]) + sum(tree.queued(tree.family(r.worker.pid)) for r in runners)
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
