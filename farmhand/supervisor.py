"""Keeps the workers of a farm alive and carries commands and replies between them and the holders of leases.

What a command or an event means is decided in `slots`; here it is done. Pipes are read without a thread per slot: those
of free or starting slots by one loop, those of a lease by the call of its holder that waits for them, so that a reply
needs no second thread on its way out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import selectors
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farmhand.blackbox import Recorder
from farmhand.catalog import Catalog, close_names
from farmhand.process import WorkerProcess
from farmhand.slots import Reply, Slot, State
from wire import codec, protocol
from wire.errors import LeaseLost, NoFreeSlot, NoSuchEnvironment, ProtocolMismatch, StartError

LEASE_LIMIT = 8.0  #: s without a call of its holder, after which a lease is freed; hosts call every 2 s
LONGEST_WAIT = 5.0  #: s that one exchange may be asked to wait
LINGER = 0.005  #: s after the first reply that an exchange waits for the others its host wants together
BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  #: s before the next try, after so many failed constructions in a row
STOP_LIMIT = 3.0  #: s that all workers together have for closing their environments when the farm stops

log = logging.getLogger("farm")


class _Bell:
    """A pipe that wakes whoever waits in a selector."""

    def __init__(self) -> None:
        self.fd, self._in = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._in, False)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._in, b"!")

    def hush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        for fd in (self.fd, self._in):
            os.close(fd)
        self.fd = self._in = -1

    def __del__(self) -> None:
        # A lease's bell may be rung and waited for to the last: it goes with whoever had the lease in hand.
        if self.fd >= 0:
            self.close()


@dataclass
class Lease:
    """A host's right to some slots, and the replies that wait for it."""

    token: str
    env: str
    slots: list[int]
    seen: float
    expires: bool = True
    outbox: list[tuple[int, Reply]] = field(default_factory=list)
    line: int = 0  # changes when its host asks on a new connection; calls that wait on an old one get nothing more
    pipes: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    bell: _Bell = field(default_factory=lambda: _Bell())

    def __post_init__(self) -> None:
        self.pipes.register(self.bell.fd, selectors.EVENT_READ, None)


class Supervisor:
    """All slots of one farm."""

    def __init__(
        self,
        catalog: Catalog,
        slots: int,
        python: str = sys.executable,
        log_dir: str | Path = "logs",
        black_box: str | Path | None = None,
    ):
        """Starts nothing yet.

        Args:
            catalog: what is offered.
            slots: how many environments at a time.
            python: the workers' interpreter.
            log_dir: for a log a slot.
            black_box: for the files of episodes that ended badly; None is a folder in `log_dir`.

        Raises:
            StartError: fewer slots than environments.
        """
        if slots < len(catalog.names):
            raise StartError(
                "%d environments need at least as many slots, and --slots says %d" % (len(catalog.names), slots)
            )
        self.catalog = catalog
        self.python = python
        self.log_dir = Path(log_dir)
        self._recorder = Recorder(Path(black_box or self.log_dir / "black-box"), python)
        names = catalog.names
        self.slots = [Slot(number, names[number % len(names)]) for number in range(slots)]
        self.ready: dict[str, bytes] = {}  # the READY body of each environment that has been built once
        self._workers: dict[int, WorkerProcess] = {}
        self._not_before = [0.0] * slots
        self._leases: dict[str, Lease] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._selector = selectors.DefaultSelector()
        self._bell = _Bell()
        self._stopping = False
        self._loop_over, self._all_ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    # The farm's own life.

    def start(self, limit: float = 120.0) -> None:
        """Starts the workers and waits until each environment has been built once.

        Raises:
            StartError: an environment cannot be built, or not within `limit` seconds. Everything is stopped then.
        """
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(
                "cannot make the folder for logs, %s: %s\n  now: name another with --log-dir"
                % (self.log_dir, error.strerror or error)
            ) from None
        self._selector.register(self._bell.fd, selectors.EVENT_READ, None)
        self._thread.start()
        try:
            self._wait_for_first(limit)
        except BaseException:
            self.stop("start failed")
            raise

    def _wait_for_first(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        said = time.monotonic() + 10.0
        with self._lock:
            for name in self.catalog.names:
                while name not in self.ready:
                    failed = [s.trouble for s in self.slots if s.env == name and s.failures]
                    if failed:
                        raise StartError("%s cannot be built\n  %s" % (name, failed[0]))
                    now = time.monotonic()
                    if now >= deadline:
                        raise StartError(
                            "%s was not built within %g s: its constructor hangs, or needs more time\n"
                            "  now: give it more with --start-timeout SECONDS, or see %s" % (name, limit, self.log_dir)
                        )
                    if now >= said:
                        log.info("waiting for %s to be built, up to %g s", name, limit)
                        said = now + 30.0
                    self._changed.wait(min(deadline, said) - now)

    def stop(self, reason: str) -> None:
        """Ends every worker: ask, then kill; within about 4 s, whatever they do."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            for lease in list(self._leases.values()):
                self._free(lease, reason)
        self._bell.ring()
        if self._thread.ident is not None:
            self._loop_over.wait()
        with self._lock:  # a call that was under way may have ended one of them, and now leaves the others alone
            workers = list(self._workers.values())
            self._workers.clear()
        deadline = time.monotonic() + STOP_LIMIT
        for worker in workers:
            worker.ask_to_end()
        for worker in workers:
            worker.end(max(0.0, deadline - time.monotonic()))
        self._all_ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._selector.close()
        self._bell.close()
        self._recorder.close()

    # What a host may ask for. Any thread.

    def describe(self) -> dict[str, Any]:
        """What this farm offers and how much of it is free."""
        with self._lock:
            free = sum(self._is_free(slot) for slot in self.slots)
            return {"slots": len(self.slots), "free": free, "envs": dict(self.ready)}

    def acquire(
        self, env: str, count: int, version: int, expires: bool = True, numbers: list[int] | None = None
    ) -> Lease:
        """Leases `count` slots that run `env`, or exactly the slots in `numbers`.

        Returns:
            The lease; it ends by `release`, or after LEASE_LIMIT without a call when it `expires`.

        Raises:
            ProtocolMismatch, NoSuchEnvironment, NoFreeSlot: nothing was leased.
        """
        if version != protocol.VERSION:
            raise ProtocolMismatch(
                "this farm speaks protocol %d, the host %s: bring both to the same version"
                % (protocol.VERSION, version)
            )
        if env not in self.ready:
            raise NoSuchEnvironment(
                "this farm does not offer %r, but %s%s"
                % (env, ", ".join(self.catalog.names), close_names(env, self.catalog.names))
            )
        with self._lock:
            wanted = self.slots if numbers is None else [self.slots[n] for n in numbers]
            free = sorted((s for s in wanted if self._is_free(s)), key=lambda s: (s.env != env, s.number))
            if count < 1 or count > len(free):
                raise NoFreeSlot(
                    "%d slots were asked for; this farm has %d and %d are free" % (count, len(self.slots), len(free))
                )
            lease = Lease(
                secrets.token_hex(16),
                env,
                [slot.number for slot in free[:count]],
                time.monotonic(),
                expires,
            )
            self._leases[lease.token] = lease
            for slot in free[:count]:
                slot.take(lease.token)
                if slot.env != env:
                    slot.env = env
                    self._end_worker(slot.number, "slot %d changes to %s" % (slot.number, env), wanted=True)
                self._watch(slot)
        self._bell.ring()
        return lease

    def exchange(self, token: str, commands: list[Any], wait: float, together: int = 1) -> list[list[Any]]:
        """Hands over commands and returns every reply that is in, at the latest after `wait` seconds.

        Args:
            token: the lease.
            commands: [slot, seq, kind, body] each.
            wait: seconds to wait for a first reply; 0 takes what is there.
            together: replies that the host wants in one go; the first one waits for them, but only for LINGER.

        Returns:
            [slot, seq, kind, flags, body] each, maybe none.

        Raises:
            LeaseLost: the lease is not known (any more).
        """
        with self._lock:
            lease = self._lease(token)
            if any(kind == protocol.ASK for _, _, kind, _ in commands):
                # Its connection broke. What a call that still waits on the old one took would go nowhere.
                lease.line += 1
                lease.bell.ring()
            line = lease.line
            for number, seq, kind, body in commands:
                if number not in lease.slots:
                    raise LeaseLost("slot %r is not in this lease" % (number,))
                self._command(lease, self.slots[number], kind, seq, body)
        deadline = time.monotonic() + min(wait, LONGEST_WAIT)
        lingering = False
        pause = 0.0 if lease.outbox else max(0.0, deadline - time.monotonic())
        while True:
            events = lease.pipes.select(pause)
            with self._lock:
                for key, _ in events:
                    if key.data is None:
                        lease.bell.hush()
                    else:
                        self._attend(*key.data)
                self._lease(token)
                if lease.line != line:
                    lease.bell.ring()  # this call may have read what the one on the new connection waits for
                    return []
                if lease.outbox and not lingering:
                    lingering, deadline = True, min(deadline, time.monotonic() + LINGER)
                pause = deadline - time.monotonic()
                if len(lease.outbox) >= together or pause <= 0:
                    outbox, lease.outbox = lease.outbox, []
                    return [[number, r.seq, r.kind, r.flags, r.body] for number, r in outbox]

    def release(self, token: str) -> None:
        """Ends a lease; an unknown one has ended already."""
        with self._lock:
            lease = self._leases.get(token)
            if lease is not None:
                self._free(lease, "released")

    def status(self) -> list[dict[str, Any]]:
        """A row for each slot: plain numbers and words."""
        with self._lock:
            return [
                {
                    "slot": slot.number,
                    "env": slot.env,
                    "state": slot.state.value,
                    "leased": slot.lease is not None,
                    "pid": slot.pid,
                    "starts": slot.starts,
                    "episodes": slot.episodes,
                    "steps": slot.steps,
                    "rss": self._workers[slot.number].rss() if slot.number in self._workers else None,
                    "trouble": slot.trouble,
                }
                for slot in self.slots
            ]

    # Inside; the lock is held.

    def _is_free(self, slot: Slot) -> bool:
        return slot.lease is None and not slot.failures

    def _lease(self, token: str) -> Lease:
        lease = self._leases.get(token)
        if lease is None:
            raise LeaseLost(
                "this lease is not known here: it was released, or its host did not call for %g s" % LEASE_LIMIT
            )
        lease.seen = time.monotonic()
        return lease

    def _command(self, lease: Lease, slot: Slot, kind: int, seq: int, body: bytes) -> None:
        frame, reply = slot.command(kind, seq, body)
        if frame is not None:
            self._write(slot.number, frame)
        if reply is not None:
            lease.outbox.append((slot.number, reply))

    def _write(self, number: int, frame: bytes) -> None:
        self._recorder.command(number, frame)
        if not self._workers[number].write(frame):
            self._bell.ring()  # the loop writes the rest as the pipe drains

    def _deliver(self, slot: Slot, reply: Reply | None) -> None:
        lease = self._leases.get(slot.lease or "")
        if reply is not None and lease is not None:
            lease.outbox.append((slot.number, reply))

    def _watch(self, slot: Slot) -> None:
        """Has the worker's replies read by the loop, or by its holder's calls once there is a holder to call."""
        worker = self._workers.get(slot.number)
        if worker is None:
            return
        lease = self._leases.get(slot.lease or "")
        wanted = lease.pipes if lease is not None and slot.state is not State.STARTING else self._selector
        if worker.watched is not wanted:
            self._unwatch(worker)
            wanted.register(worker.stdout, selectors.EVENT_READ, (worker, "replies"))
            worker.watched = wanted

    def _unwatch(self, worker: WorkerProcess) -> None:
        if worker.watched is not None:
            worker.watched.unregister(worker.stdout)
            worker.watched = None

    def _free(self, lease: Lease, reason: str) -> None:
        del self._leases[lease.token]
        for number in lease.slots:
            self.slots[number].free()
            self._watch(self.slots[number])
        lease.bell.ring()
        log.info("slots %s are free: %s", lease.slots, reason)

    # The loop: the only thread that starts, reads and ends workers (but for `stop`, after the loop).

    def _run(self) -> None:
        try:
            self._loop()
        finally:
            self._loop_over.set()
            self._all_ended.wait()  # the kernel ends workers with the thread that started them (worker/__main__.py)

    def _loop(self) -> None:
        while not self._stopping:
            with self._lock:
                pause = self._tend()
            for key, _ in self._selector.select(pause):
                if key.data is None:
                    self._bell.hush()
                    continue
                with self._lock:
                    self._attend(*key.data)

    def _tend(self) -> float:
        """Starts workers, frees leases whose time has come, watches full pipes; returns seconds until the next."""
        now = time.monotonic()
        for lease in list(self._leases.values()):
            if lease.expires and now - lease.seen > LEASE_LIMIT:
                self._free(lease, "their host did not call for %g s" % LEASE_LIMIT)
        first = {env: min(s.number for s in self.slots if s.env == env) for env in {s.env for s in self.slots}}
        due = [1.0]
        for slot in self.slots:
            if slot.number in self._workers or self._stopping:
                continue
            if slot.env not in self.ready and slot.number != first[slot.env]:
                continue  # one worker tries first: a wrong name then fails once, not once a slot
            if now >= self._not_before[slot.number]:
                self._start_worker(slot)
            else:
                due.append(self._not_before[slot.number] - now)
        for worker in self._workers.values():
            self._watch_writing(worker)
        return max(0.0, min(due))

    def _start_worker(self, slot: Slot) -> None:
        path = self.log_dir / ("slot-%d.log" % slot.number)
        try:
            worker = WorkerProcess(self.python, self.catalog.order(slot.env), slot.number, path)
        except OSError as error:
            slot.state = State.STARTING
            self._buried(slot, "%s does not start: %s" % (self.python, error))
            return
        self._workers[slot.number] = worker
        slot.started(worker.pid)
        self._watch(slot)
        if worker.pidfd is not None:
            self._selector.register(worker.pidfd, selectors.EVENT_READ, (worker, "exit"))

    def _watch_writing(self, worker: WorkerProcess) -> None:
        waiting = not worker.flush()
        watched = worker.stdin in self._selector.get_map()
        if waiting and not watched:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, (worker, "room"))
        elif watched and not waiting:
            self._selector.unregister(worker.stdin)

    def _attend(self, worker: WorkerProcess, what: str) -> None:
        if self._workers.get(worker.slot) is not worker:
            return  # it was ended while this event waited
        if what == "room":
            self._watch_writing(worker)
            return
        try:
            frames = worker.read()
        except protocol.FrameError as error:
            self._end_worker(worker.slot, "slot %d wrote something else into its pipe: %s" % (worker.slot, error))
            return
        for kind, flags, ticket, body in frames or []:
            self._reply(self.slots[worker.slot], worker, kind, flags, ticket, body)
        if frames is None or (what == "exit" and not frames):
            self._end_worker(worker.slot, None)

    def _reply(self, slot: Slot, worker: WorkerProcess, kind: int, flags: int, ticket: int, body: bytes) -> None:
        self._recorder.answered[slot.number] = ticket
        if kind == protocol.READY:
            self.ready.setdefault(slot.env, body)
            for frame in slot.constructed():
                self._write(slot.number, frame)
            self._watch(slot)
            self._changed.notify_all()
            log.info("slot %d: %s is ready (pid %d)", slot.number, slot.env, worker.pid)
        elif slot.state is State.STARTING:
            if kind == protocol.FAULT:
                fault = codec.decode(body)
                worker.fault = "%s: %s" % (fault["type"], fault["text"])
                if fault.get("traceback") and fault["type"] != "NoSuchEnvironment":
                    worker.fault += "\n" + fault["traceback"].rstrip()
        else:
            if kind == protocol.FAULT:
                body = self._recorder.faulted(slot, worker, ticket, body, self.catalog.order(slot.env))
            self._deliver(slot, slot.replied(kind, flags, ticket, body))

    def _end_worker(self, number: int, why: str | None, wanted: bool = False) -> None:
        """Ends what is left of a worker, and tells its slot; `why` is None when it ended by itself."""
        worker = self._workers.pop(number, None)
        if worker is None:
            return
        self._unwatch(worker)
        for watched in (worker.stdin, worker.pidfd):
            if watched is not None and watched in self._selector.get_map():
                self._selector.unregister(watched)
        slot, obituary = self.slots[number], worker.end(0.3 if why is None else 0.0)
        box = ""
        if not wanted and slot.env in self.ready:  # before that, the environment never stood
            order = self.catalog.order(slot.env)
            box = self._recorder.ended(slot, worker, why or obituary, order, by_farm=why is not None)
        self._buried(slot, why or obituary, wanted, box)

    def _buried(self, slot: Slot, why: str, wanted: bool = False, box: str = "") -> None:
        made = slot.steps
        why = (why if slot.state is State.STARTING else "%s (after %d steps)" % (why, made)) + box
        reply = slot.died(why, wanted)
        pause = BACK_OFF[min(slot.failures, len(BACK_OFF)) - 1] if slot.failures else 0.0
        self._not_before[slot.number] = time.monotonic() + pause
        self._deliver(slot, reply)
        if slot.lease in self._leases:
            self._leases[slot.lease].bell.ring()
        self._bell.ring()
        self._changed.notify_all()
        if not self._stopping and slot.env in self.ready:  # before that, `start` raises it
            log.warning("%s%s", why, "; next try in %g s" % pause if pause else "; a new one is started")


def check_python(python: str, limit: float = 30.0) -> str:
    """The simulator's interpreter, tried before anything is started.

    Returns:
        Its version and numpy's, as `3.8.18, numpy 1.24.4`.

    Raises:
        StartError: it does not start, is too old, or lacks numpy.
    """
    code = "import sys; v = sys.version_info; print('%d.%d.%d' % v[:3]); import numpy; print(numpy.__version__)"
    try:
        run = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise StartError("--python %s said nothing within %g s" % (python, limit)) from None
    except OSError as error:
        raise StartError(
            "--python %s does not start: %s\n  now: give the path of the simulator's interpreter, as `which python` "
            "prints it in its environment" % (python, error.strerror or error)
        ) from None
    said = run.stdout.split()
    if not said or not re.fullmatch(r"\d+\.\d+\.\d+", said[0]):
        words = run.stderr or run.stdout or "it printed nothing"
        raise StartError("--python %s is no Python: %s" % (python, words.strip()[-300:]))
    if run.returncode != 0 or len(said) < 2:
        raise StartError(
            "Python %s at %s has no working numpy, the one package a worker needs\n  now: %s -m pip install numpy\n  %s"
            % (said[0], python, python, run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "")
        )
    return "%s, numpy %s" % (said[0], said[1])
