"""The living worker processes of one owner: started, written to, read from, ended, reaped.

    workers = Workers(python, owner)
    worker = workers.start(env, order, slot=0, log=path, limit=120.0)     # owner.on_ready(worker, body) follows
    worker.begin(protocol.STEP, 60.0)
    workers.write(worker, frame)                                          # owner.on_reply(worker, due, ...) follows
    while ...:
        workers.serve(min(workers.enforce(), workers.reap()))             # the loop: one thread
    workers.close(3.0)

The owner decides what a reply means and what follows an end; the pipes, the deadlines and the processes are handled
here. A worker's end escalates: it is asked to end (`dismiss`), asked for a trace, killed, reaped, and what it left
behind is killed as well.

    living ---- dismiss -------------------------> leaving ---- reap ----> gone ---- sweep (what it had started)
       |                                              ^
       +------- end (killed now) ---------------------+
       +------- kill_later: pending kill ---- end ----+
"""

from __future__ import annotations

import logging
import selectors
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from farmhand import tree
from farmhand.wake_pipe import WakePipe
from farmhand.worker_process import FOREVER, Due, WorkerProcess
from wire import codec, protocol

LEAVE_LIMIT = 2.0  #: s that a dismissed worker has for closing its environment; its slot does not wait for it
TRACE_TIME = 0.05  #: s that a worker over its time has to write where it is
EXIT_TIME = 0.3  #: s between a closed pipe and the end of its process, before it is killed
REST_OF_FRAME = 1.0  #: s more for a worker whose answer is on its way at the deadline
REAP_EVERY = 0.02  #: s between two looks for the end of a killed process
SWEEP_EVERY = 1.0  #: s between two searches for what a dead worker left behind; one takes some milliseconds

REPLIES, ROOM, EXIT = "replies", "room", "exit"  #: what can be ready: its replies, its pipe for more, its end

log = logging.getLogger("farm")


@dataclass(frozen=True)
class Exit:
    """How a worker ended.

    Attributes:
        why: the reason in words.
        bucket: of the ledger, for the step that it was at.
        by: "itself", "farm" or "hand": who ended it.
    """

    why: str
    bucket: str
    by: str


class Owner(Protocol):
    """Whom the workers belong to. Every call comes with the lock held."""

    def on_ready(self, worker: WorkerProcess, body: bytes) -> None:
        """Its environment was built."""

    def on_reply(self, worker: WorkerProcess, due: Due, kind: int, flags: int, ticket: int, body: bytes) -> None:
        """It answered the command that was due."""

    def on_late_reply(self, worker: WorkerProcess) -> None:
        """After `on_reply`: the loop read this at a deadline, and another thread may wait for it."""

    def on_exit(self, worker: WorkerProcess, end: Exit) -> None:
        """It has ended."""

    def too_long(self, worker: WorkerProcess, state: str) -> str:
        """What it is at takes too long, and the system says its process is `state`. Returns that in words."""


class Workers:
    """All workers of one owner.

    `lock` guards everything; `serve`, `reap`, `retire` and `close` are for the one thread that loops, and take it
    themselves where they need it. The kernel ends workers with the thread that started them (worker/__main__.py).
    """

    def __init__(self, python: str, owner: Owner, lock: Any = None):
        """Starts nothing yet.

        Args:
            python: the workers' interpreter.
            owner: is told what happens to them.
            lock: guards them and what the owner has; re-entrant.
        """
        self._python = python
        self._owner = owner
        self._lock = lock or threading.RLock()
        self._living: dict[WorkerProcess, None] = {}  # in the order of their starts
        self._leaving: list[WorkerProcess] = []  # killed, or closing by themselves until `leave_by`
        self._to_sweep: set[str] = set()  # marks of those that are gone
        self._next_sweep = 0.0
        self._selector = selectors.DefaultSelector()
        self._wake_pipe = WakePipe()
        self._selector.register(self._wake_pipe.fd, selectors.EVENT_READ, None)

    # Which there are.

    def living(self) -> list[WorkerProcess]:
        """Those that were not ended or dismissed."""
        return list(self._living)

    def is_living(self, worker: WorkerProcess) -> bool:
        """Whether it still works: it was not ended, dismissed, or given up to be killed soon."""
        return worker in self._living and worker.pending_kill is None

    @property
    def logs(self) -> set[Path]:
        """The logs that processes still write to."""
        return {worker.log for worker in [*self._living, *self._leaving]}

    @property
    def all_reaped(self) -> bool:
        """Whether nothing is left of the workers that ended."""
        return not self._leaving and not self._to_sweep

    # Starting, writing and reading.

    def start(self, env: str, order: dict[str, Any], slot: int | None, path: Path, limit: float) -> WorkerProcess:
        """Starts a worker and orders it to build its environment within `limit` seconds.

        Raises:
            OSError: the interpreter does not start.
        """
        worker = WorkerProcess(self._python, env, slot, path)
        self._living[worker] = None
        worker.begin(protocol.CONSTRUCT, limit)
        worker.write(protocol.pack(protocol.CONSTRUCT, 0, codec.encode(order)))
        if worker.pidfd is not None:
            self._selector.register(worker.pidfd, selectors.EVENT_READ, (worker, EXIT))
        self.watch(worker, None)
        self._watch_room(worker)
        return worker

    def write(self, worker: WorkerProcess, frame: bytes) -> None:
        """Gives it a command; where the pipe is full, the loop writes the rest."""
        if not worker.write(frame):
            self.wake()

    def watch(self, worker: WorkerProcess, selector: selectors.BaseSelector | None) -> None:
        """Has its replies read by whoever selects on `selector` and calls `attend`; None: by the loop."""
        wanted = self._selector if selector is None else selector
        if worker.watched is not wanted and worker.pending_kill is None:
            self._unwatch(worker)
            wanted.register(worker.stdout, selectors.EVENT_READ, (worker, REPLIES))
            worker.watched = wanted

    def _unwatch(self, worker: WorkerProcess) -> None:
        if worker.watched is not None:
            worker.watched.unregister(worker.stdout)
            worker.watched = None

    def _watch_room(self, worker: WorkerProcess) -> None:
        waiting = not worker.flush()
        watched = worker.stdin in self._selector.get_map()
        if waiting and not watched:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, (worker, ROOM))
        elif watched and not waiting:
            self._selector.unregister(worker.stdin)

    def wake(self) -> None:
        """Ends the wait of `serve`, from any thread."""
        self._wake_pipe.wake()

    def serve(self, seconds: float) -> bool:
        """Waits for events, at most so long, and attends to each; without the lock while it waits.

        Returns:
            Whether `wake` was called; then there is something to do for `enforce`.
        """
        woken = False
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._wake_pipe.clear()
                woken = True
                continue
            with self._lock:
                self.attend(*key.data)
        return woken

    def attend(self, worker: WorkerProcess, event: str) -> None:
        """Does what an event of a selector asks for; any thread that holds the lock."""
        if worker not in self._living:
            return  # it was ended while this event waited
        if event == ROOM:
            self._watch_room(worker)
            return
        if worker.pending_kill is not None:
            if worker.has_ended():
                self.end(worker, *worker.pending_kill)
            return
        received = worker.received
        try:
            frames = worker.read()
        except protocol.FrameError as error:
            why = f"{worker.name()} wrote something else into its pipe: {error}{worker.evidence()}"
            self.end(worker, why, "crashed")
            return
        for frame in frames or []:
            if worker in self._living:  # one that was recycled at its episode's end has nothing more to say
                self._answered(worker, *frame)
        if frames is None or (event == EXIT and worker.received == received):
            if worker.has_ended():
                self.end(worker, None, "crashed")
            else:
                self.kill_later(worker, None, "crashed", EXIT_TIME)  # its pipe is closed, it is about to end

    def _answered(self, worker: WorkerProcess, kind: int, flags: int, ticket: int, body: bytes) -> None:
        if not worker.due:
            self.end(worker, f"{worker.name()} answered what nobody had asked{worker.evidence()}", "crashed")
            return
        due = worker.done()
        if due[0] != protocol.CONSTRUCT:
            self._owner.on_reply(worker, due, kind, flags, ticket, body)
        elif kind == protocol.READY:
            worker.ready, worker.ready_at = body, time.monotonic()
            self._owner.on_ready(worker, body)
        elif kind == protocol.FAULT:
            worker.fault = fault_words(codec.decode(body))

    # Deadlines.

    def enforce(self) -> float:
        """Deals with workers whose time is up, and with full pipes. Returns seconds until the next deadline."""
        now = time.monotonic()
        due = FOREVER
        for worker in self.living():
            if worker.deadline <= now:
                self._overdue(worker, now)
            if worker.pending_kill is not None and worker.pidfd is None:
                self.attend(worker, EXIT)  # nothing else tells it here
                due = min(due, REAP_EVERY)
            due = min(due, worker.deadline - now)
        for worker in self.living():
            self._watch_room(worker)
        return max(0.0, due)

    def _overdue(self, worker: WorkerProcess, now: float) -> None:
        """Asks it where it is, and ends it at the second call."""
        if worker.pending_kill is not None:
            self.end(worker, *worker.pending_kill)
            return
        received = -1
        while worker.received > received and self.is_living(worker):
            received = worker.received  # its answer may be in the pipe, and its holder slow to take it
            self.attend(worker, REPLIES)
            if worker.deadline > now:
                self._owner.on_late_reply(worker)
                return
        if not self.is_living(worker):
            return
        if worker.in_the_middle and not worker.extended:
            worker.extended, worker.deadline = True, now + REST_OF_FRAME
            return
        state = tree.state(worker.pid)
        why = self._owner.too_long(worker, state)
        if state == psutil.STATUS_STOPPED:
            self.end(worker, why + worker.evidence(), "timed out")
            return
        self.kill_later(worker, why, "timed out", TRACE_TIME)
        worker.ask_for_trace()

    # Ends.

    def kill_later(self, worker: WorkerProcess, why: str | None, bucket: str, seconds: float) -> None:
        """It ends by itself or is killed after so many seconds; its replies no longer count."""
        self._unwatch(worker)
        worker.pending_kill, worker.deadline = (why, bucket), time.monotonic() + seconds
        self.wake()

    def end(self, worker: WorkerProcess, why: str | None, bucket: str, by: str = "farm") -> None:
        """Kills what is left of it, and tells the owner; `why` is None when it ended by itself."""
        if worker not in self._living:
            return
        self._forget(worker)
        if worker.pending_kill is not None and why is not None:
            why += worker.evidence(lines=16)  # the trace it was asked for
        exit_reason = worker.kill()
        self._leaving.append(worker)
        self._owner.on_exit(worker, Exit(why or exit_reason, bucket, "itself" if why is None else by))

    def dismiss(self, worker: WorkerProcess) -> None:
        """Lets a worker that is no longer wanted close its environment; the owner hears nothing more of it."""
        self._forget(worker)
        worker.ask_to_end()
        worker.leave_by = time.monotonic() + LEAVE_LIMIT
        self._leaving.append(worker)

    def _forget(self, worker: WorkerProcess) -> None:
        del self._living[worker]
        self._unwatch(worker)
        for watched in (worker.stdin, worker.pidfd):
            if watched is not None and watched in self._selector.get_map():
                self._selector.unregister(watched)

    def reap(self) -> float:
        """Collects processes that ended, and ends what they left behind. Returns seconds until the next look.

        By the loop, without the lock: a search through all processes of the machine takes its time.
        """
        now = time.monotonic()
        with self._lock:
            leaving, self._leaving = self._leaving, []
        for worker in leaving:
            if worker.leave_by and (now >= worker.leave_by or worker.has_ended()):
                worker.leave_by = 0.0
                worker.kill()
            if worker.is_gone():
                self._to_sweep.add(worker.mark)
            else:
                self._leaving.append(worker)
        if self._to_sweep and now >= self._next_sweep:
            self._sweep(now)
        if self._leaving:
            return REAP_EVERY
        return self._next_sweep - now if self._to_sweep else FOREVER

    def _sweep(self, now: float) -> None:
        marks, self._to_sweep, self._next_sweep = self._to_sweep, set(), now + SWEEP_EVERY
        left = tree.sweep(marks)
        if left:
            log.info("ended what a worker had left behind: %s", ", ".join(f"pid {pid}" for pid in left))

    def retire(self, workers: Iterable[WorkerProcess], limit: float) -> None:
        """Has workers close their environments, and waits for their ends; kills those that take longer than `limit` s.

        The limit is for all together; about 1 s more where one hangs in the kernel.
        """
        with self._lock:  # a call that is under way may have ended one of them, and from now on leaves the others alone
            workers = [worker for worker in workers if worker in self._living]
            for worker in workers:
                self._forget(worker)
        for worker in workers:
            worker.ask_to_end()
        deadline = time.monotonic() + limit
        for worker in workers + self._leaving:
            worker.end(max(0.0, deadline - time.monotonic()))
            self._to_sweep.add(worker.mark)
        self._leaving = []

    def close(self, limit: float) -> None:
        """Ends every worker, as `retire` does, and what they started."""
        self.retire(self.living(), limit)
        tree.sweep(self._to_sweep)
        self._to_sweep = set()
        self._selector.close()
        self._wake_pipe.close()


def fault_words(fault: dict[str, Any]) -> str:
    """The body of a FAULT as text; where the name of the environment is wrong, its traceback adds nothing."""
    words = f"{fault['type']}: {fault['text']}"
    if fault.get("traceback") and fault["type"] != "NoSuchEnvironment":
        words += "\n" + fault["traceback"].rstrip()
    return words
