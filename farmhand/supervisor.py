"""One farm's policy: what its slots, leases, workers and spares have to do with each other, and the thread that drives
them.

`slots` and `limits` decide and touch nothing; the parts do the work:

    supervisor.py     policy; the one thread that starts, kills and reaps workers
    leases.py         a host's right to slots: acquire, exchange, release
    assignments.py    which worker is at which slot, and who reads from it
    spares.py         workers in stock
    workers.py        processes and pipes: start, read, write, deadlines, ends
    deadlines.py      how long a command may take;  recycling.py  when a worker is replaced;  memory_cap.py
    blackbox.py       what a worker was told, for a replay

Which lock guards what on a farm:

    what                                                       guarded by
    slots, leases, assignments, spares, deadlines, recycling,  the farm's lock, `Supervisor.lock`: one for all, and
      living workers, what the recorder keeps, each lease's      re-entrant, so that the parts can call each other
      connections (`service.py`)
    starting, reaping, sweeping, weighing for --memory         no lock: the supervisor's thread alone; `stop` after it
    waiting on a selector                                      no lock; what is registered in it, and what is read when
                                                                 it is ready, has the farm's lock
    boxes that wait to be written                              a queue (`blackbox.py`)
    the holder of a slot's own object                          the object's lock, taken before the farm's (`service.py`)
    admission                                                  no lock: the server's thread alone (`admission.py`)
"""

from __future__ import annotations

import logging
import re
import selectors
import sys
import threading
import time
from pathlib import Path
from typing import Any

from farmhand.assignments import Assignments
from farmhand.blackbox import Recorder
from farmhand.catalog import Catalog
from farmhand.deadlines import Deadlines
from farmhand.leases import Leases
from farmhand.limits import Limits, back_off, in_words
from farmhand.memory_cap import MemoryCap
from farmhand.recycling import Recycling
from farmhand.slots import BUCKETS, Slot, State
from farmhand.spares import Spares
from farmhand.worker_process import FOREVER, Due, WorkerProcess
from farmhand.workers import Exit, Workers
from simulators import RECIPES
from wire import protocol
from wire.errors import NoFreeSlot, StartError
from wire.fields import seconds_of

STOP_LIMIT = 3.0  #: s that all workers together have for closing their environments when the farm stops

log = logging.getLogger("farm")


class Supervisor:
    """All slots of one farm.

    Attributes:
        slots: their states.
        ready: the READY body of each environment that was built once.
        leases, assignments, spares, workers, recorder: the parts, see the module.
        acquire, exchange, release: what hosts call, any thread: those of `leases`.
    """

    def __init__(
        self,
        catalog: Catalog,
        slots: int,
        python: str = sys.executable,
        log_dir: str | Path = "logs",
        limits: Limits | None = None,
        black_box: str | Path | None = None,
    ):
        """Starts nothing yet.

        Args:
            catalog: what is offered.
            slots: how many environments at a time.
            python: the workers' interpreter.
            log_dir: for one log a slot.
            limits: what the farm's owner said.
            black_box: for the files of episodes that ended badly; None is a folder in `log_dir`.

        Raises:
            StartError: fewer slots than environments.
        """
        names = catalog.names
        if slots < len(names):
            raise StartError(
                f"{len(names)} environments need at least as many slots, and --slots says {slots}\n"
                f"  now: start it with --slots {len(names)}"
            )
        self.catalog, self.python, self.log_dir = catalog, python, Path(log_dir)
        self.limits = limits or Limits()
        self.slots = [Slot(number, names[number % len(names)]) for number in range(slots)]
        self.ready: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.workers = Workers(python, self, self.lock)
        self.spares = Spares(self.workers, catalog, python, self.limits, self.log_dir)
        self.assignments = Assignments(self.slots, self.workers, self.spares, catalog, self.log_dir, self)
        self.leases = Leases(self.slots, self.ready, names, self.lock, self)
        self.acquire, self.exchange, self.release = self.leases.acquire, self.leases.exchange, self.leases.release
        self.recorder = Recorder(Path(black_box or self.log_dir / "black-box"), python, self.ready)
        self.attend, self.one_due = self.workers.attend, self.assignments.one_due  # for the leases
        self._deadlines = Deadlines(self.limits, names, self.log_dir)
        self._recycling = Recycling(self.limits)
        self._memory_cap = MemoryCap(self.limits.memory, self.workers, self.lock)
        self._new_memory: dict[str, int] = {}  # bytes of the first worker of each environment when it was built
        self._changed = threading.Condition(self.lock)
        self._stopping = False
        self._loop_over, self._all_ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    # The farm's start and end.

    def start(self, limit: float | None = None) -> None:
        """Starts the workers and waits until each environment was built once, by default as long as one may take.

        Raises:
            StartError: an environment cannot be built, or not within `limit` seconds. Everything is stopped then.
        """
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(
                f"cannot make the folder for logs, {self.log_dir}: {error.strerror or error}\n"
                "  now: name another with --log-dir"
            ) from None
        self.recorder.start()
        self._thread.start()
        try:
            self._wait_for_first(self.limits.start if limit is None else limit)
            for name, memory in self._new_memory.items():
                self._memory_cap.check(name, memory)
        except BaseException:
            self.stop("start failed")
            raise
        with self.lock:
            empty = [slot for slot in self.slots if slot.state in (State.EMPTY, State.STARTING)]
            self.spares.decide(self._new_memory, sum(self._new_memory.get(slot.env, 0) for slot in empty))
        self.workers.wake()

    def _wait_for_first(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        next_log = time.monotonic() + 10.0
        with self.lock:
            for name in self.catalog.names:
                while name not in self.ready:
                    failed = [slot.trouble for slot in self.slots if slot.env == name and slot.failures]
                    if failed:
                        raise StartError(f"{name} cannot be built\n  {failed[0]}{self._advice(name, failed[0])}")
                    now = time.monotonic()
                    if now >= deadline:
                        raise StartError(f"{name} {self._deadlines.not_built(limit)}")
                    if now >= next_log:
                        log.info("waiting for %s to be built, up to %g s", name, limit)
                        next_log = now + 30.0
                    self._changed.wait(min(deadline, next_log) - now)

    def _advice(self, name: str, why: str | None) -> str:
        if re.match("(ModuleNotFound|Import)Error", why or "") is None:
            return ""
        if name in RECIPES:
            return "\n  now: it needs " + RECIPES[name]["needs"]
        return f"\n  now: install it for {self.python}, or name the simulator's Python with --python"

    def stop(self, reason: str) -> None:
        """Ends every worker: ask, then kill; within about 4 s, whatever they do."""
        with self.lock:
            if self._stopping:
                return
            self._stopping = True
            self.assignments.close()
            self.leases.end_all(reason)
        self.workers.wake()
        if self._thread.ident is not None:
            self._loop_over.wait()
        self.workers.close(STOP_LIMIT)
        self._all_ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.recorder.close()

    # What a host or the farm's owner may ask for. Any thread.

    def describe(self) -> dict[str, Any]:
        """What this farm offers, how much of it is free, and each environment's seconds a step, None where unknown."""
        with self.lock:
            free = sum(slot.is_free for slot in self.slots)
            paces = self._deadlines.typical()
            return {"slots": len(self.slots), "free": free, "envs": dict(self.ready), "paces": paces}

    def status(self) -> list[dict[str, Any]]:
        """A row for each slot: plain numbers and words."""
        with self.lock:
            return [self._row(slot) for slot in self.slots]

    def _row(self, slot: Slot) -> dict[str, Any]:
        worker = self.assignments.at(slot.number)
        next_try = self.assignments.next_try(slot)
        ledger = {bucket: slot.ledger[bucket] for bucket in ("given", *BUCKETS)}
        return {
            "slot": slot.number,
            "env": slot.env,
            "state": slot.state.value if next_try is None else "quarantined",
            "next_try_s": None if next_try is None else round(next_try, 1),
            "leased": slot.lease is not None,
            "pid": slot.pid,
            "starts": slot.starts,
            "recycled": dict(slot.recycled),
            "episodes": slot.episodes,
            "steps": slot.steps,
            "rss": worker.rss() if worker is not None else None,
            "limits": self._deadlines.row(slot.env),
            "spares": self.spares.ready(slot.env),
            "ledger": dict(ledger, **{"under way": slot.under_way}),
            "trouble": slot.trouble,
        }

    def release_by_hand(self, number: int) -> str:
        """Ends the worker of a slot now and has it replaced; one in quarantine is tried at once. Returns what was done.

        Its holder, if any, loses the step under way, and keeps the slot.

        Raises:
            NoFreeSlot: there is no such slot.
        """
        with self.lock:
            if not (isinstance(number, int) and 0 <= number < len(self.slots)):
                raise NoFreeSlot(f"this farm has no slot {number!r}; it has 0 to {len(self.slots) - 1}")
            slot = self.slots[number]
            slot.failures = slot.barren = 0
            self.assignments.pause(number, 0.0)
            worker = self.assignments.at(number)
            if worker is None:
                self.workers.wake()
                return f"slot {number} has no worker; one is tried now"
            self.workers.end(worker, f"{worker.name()} was released by hand", "crashed", by="hand")
            return f"slot {number}: the worker (pid {worker.pid}) was ended, a new one takes its place"

    # The loop: the only thread that starts and reaps workers and enforces limits.

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self.lock:
                    pause = self._tend()
                # What takes its time is done without the lock.
                self.workers.serve(min(pause, self._memory_cap.enforce(), self.workers.reap()))
        finally:
            self._loop_over.set()
            self._all_ended.wait()  # the kernel ends workers with the thread that started them (worker/__main__.py)

    def _tend(self) -> float:
        """Does whatever is due: leases, deadlines, workers to start. Returns seconds until the next.

        A command that is given meanwhile need not wake the loop: it sleeps no longer than the shortest limit there is.
        """
        now = time.monotonic()
        self.leases.expire()
        due = min(1.0, self.limits.shortest, self.workers.enforce())
        due = min(due, self.assignments.fill(self.ready, now, self.limits.start))
        if not self._stopping:
            starting = {slot.env for slot in self.slots if slot.state is State.STARTING}
            due = min(due, self.spares.fill(self.ready.keys() - starting, now))
        return due

    # For the leases; the lock is held.

    def command(self, slot: Slot, kind: int, body: bytes, frame: bytes) -> None:
        """Gives the slot's worker a frame."""
        worker = self.assignments.at(slot.number)
        assert worker is not None, "a slot gives commands only while it has a worker"
        self._deadlines.begin(worker, kind, body)
        self.recorder.command(slot.number, frame)
        self.workers.write(worker, frame)

    def held(self, slot: Slot, env: str | None, selector: selectors.BaseSelector | None) -> None:
        """The slot has another holder; see `leases.Work`."""
        if env is not None and slot.env != env:
            self.assignments.change(slot, env)
            self.workers.wake()
        self.assignments.read_by(slot, selector)

    # What happens to workers; the lock is held. By the loop, or by a call of the slot's holder.

    def assigned(self, slot: Slot, worker: WorkerProcess) -> None:
        """The slot has another worker."""
        self._recycling.started(slot.number)
        self.recorder.started(slot.number)
        if worker.ready is not None:
            self._worker_ready(slot, worker)

    def not_started(self, slot: Slot, why: str) -> None:
        """No worker could be started for the slot."""
        self._lost_worker(slot, f"{self.python} does not start: {why}")

    def on_ready(self, worker: WorkerProcess, body: bytes) -> None:
        """A worker's environment was built."""
        if worker.env not in self.ready:
            self._new_memory[worker.env] = worker.rss() or 0
            self.ready[worker.env] = body
        if worker.slot is None:
            self.spares.is_ready(worker)
        else:
            self._worker_ready(self.slots[worker.slot], worker)

    def _worker_ready(self, slot: Slot, worker: WorkerProcess) -> None:
        held = slot.held_body
        for frame in slot.constructed():
            self.command(slot, protocol.RESET, held, frame)
        self.assignments.watch(slot)
        self._changed.notify_all()
        seconds = worker.ready_at - worker.started_at
        log.info("slot %d: %s is ready (pid %d, built in %.2f s)", slot.number, slot.env, worker.pid, seconds)

    def on_reply(self, worker: WorkerProcess, due: Due, kind: int, flags: int, ticket: int, body: bytes) -> None:
        """A worker answered a command: delivers it, and learns from what it took."""
        if worker.slot is None:
            return
        slot = self.slots[worker.slot]
        self.recorder.answered[slot.number] = ticket
        if kind == protocol.FAULT:
            body = self.recorder.faulted(slot, worker, ticket, body, self.catalog.order(slot.env))
        self.leases.deliver(slot, slot.replied(kind, flags, ticket, body))
        seconds = seconds_of(body) / due[2]
        if kind == protocol.TRANSITION:
            self._deadlines.step_took(slot.env, seconds)
            self._recycling.step_took(slot.number, seconds)
        elif kind == protocol.OBSERVATION:
            worker.rebuilds = False
            self._deadlines.reset_took(slot.env, seconds)
        else:
            worker.rebuilds = True  # after a fault the next reset builds the environment anew
        if slot.state is State.IDLE:
            self._recycle(slot, worker, bool(flags))

    def on_late_reply(self, worker: WorkerProcess) -> None:
        """The loop read what a call of the slot's holder waits for."""
        if worker.slot is not None:
            self.leases.wake(self.slots[worker.slot])

    def _recycle(self, slot: Slot, worker: WorkerProcess, episode_over: bool) -> None:
        reason = self._recycling.why(slot, worker.pid, episode_over)
        if reason is None:
            return
        held = in_words(self._recycling.memory(slot.number) or worker.rss() or 0)
        made = f"{slot.episodes} episodes and {slot.steps} steps"
        log.info("%s is replaced (%s) after %s, with %s", worker.name(), reason, made, held)
        self.assignments.replace(slot, reason)

    def too_long(self, worker: WorkerProcess, state: str) -> str:
        """What a worker is at takes too long; in words."""
        steps = self.slots[worker.slot].steps if worker.slot is not None else 0
        return self._deadlines.too_long(worker, state, steps)

    def on_exit(self, worker: WorkerProcess, end: Exit) -> None:
        """A worker has ended."""
        if worker.slot is None:
            self.spares.exited(worker, end.why)
            return
        slot = self.slots[worker.slot]
        self.assignments.exited(slot.number)
        lived, box = time.monotonic() - worker.ready_at, ""
        if end.by == "hand":
            lived = FOREVER
        elif slot.env in self.ready:  # before that, the environment was never built
            order = self.catalog.order(slot.env)
            box = self.recorder.ended(slot, worker, end.why, order, end.bucket, by_farm=end.by == "farm")
        self._lost_worker(slot, end.why, end.bucket, lived, box)

    def _lost_worker(self, slot: Slot, why: str, bucket: str = "crashed", lived: float = 0.0, box: str = "") -> None:
        """The slot has no worker now: tells its holder, and gives it a spare, or a new worker after a pause."""
        steps = "" if slot.state is State.STARTING else f" (after {slot.steps} steps)"
        reply = slot.died(why + steps + box, bucket, lived=lived)
        pause = back_off(slot.failed)
        self.assignments.pause(slot.number, pause)
        self.leases.deliver(slot, reply)
        self.assignments.assign_spare(slot)
        self.leases.wake(slot)
        self.workers.wake()
        self._changed.notify_all()
        if not self._stopping and slot.env in self.ready:  # before that, `start` raises it
            first, newline, rest = why.partition("\n")
            log.warning("%s; %s%s", first, _what_next(slot, pause), newline + rest)


def _what_next(slot: Slot, pause: float) -> str:
    if pause:
        return f"slot {slot.number} is in quarantine, next try in {pause:g} s"
    return "a spare takes its place" if slot.pid is not None else "a new one is started"
