"""Keeps the workers of a farm alive and carries commands and replies between them and the holders of leases.

What a command or an event means is decided in `slots`; here it is done. Pipes are read without a thread per slot: those
of free or starting slots by one loop, those of a lease by the call of its holder that waits for them, so that a reply
needs no second thread on its way out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
import secrets
import select
import selectors
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from farmhand import limits as rules
from farmhand import tree
from farmhand.blackbox import Recorder
from farmhand.catalog import Catalog, close_names
from farmhand.limits import Limits, Pace, TimeLimit, in_words
from farmhand.peek import repeat_of, seconds_of
from farmhand.process import FOREVER, WorkerProcess
from farmhand.slots import BUCKETS, Reply, Slot, State
from simulators import RECIPES
from wire import codec, protocol
from wire.errors import LeaseLost, NoFreeSlot, NoSuchEnvironment, ProtocolMismatch, StartError

LEASE_LIMIT = 8.0  #: s without a call of its holder, after which a lease is freed; hosts call every 2 s
LONGEST_WAIT = 5.0  #: s that one exchange may be asked to wait
LOOK_UP = 0.25  #: s after which a waiting exchange looks whether another one has taken the bell that rang for it
LINGER = 0.005  #: s after the first reply that an exchange waits for the others its host wants together
MOST_BYTES = 64 << 20  #: of replies that one exchange gives; a message has a limit, and both ends hold it in memory
STOP_LIMIT = 3.0  #: s that all workers together have for closing their environments when the farm stops
LEAVE_LIMIT = 2.0  #: s that a worker has for it when it is replaced; its slot does not wait for it
TRACE_TIME = 0.05  #: s that a worker over its time has to write where it is
LAST_WORDS = 0.3  #: s between a closed pipe and the end of its process, before it is killed
REST_OF_FRAME = 1.0  #: s more for a worker whose answer is on its way at the deadline
WEIGH_EVERY = 0.15  #: s between two looks at the memory of all workers, where a cap is given
REAP_EVERY = 0.02  #: s between two looks for the end of a killed process
SWEEP_EVERY = 1.0  #: s between two searches for what a dead worker left behind; one takes some milliseconds

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


class Caller(Protocol):
    """A connection, as far as a lease has to do with it."""

    def hang_up(self) -> None:
        """Ends it."""


@dataclass
class Lease:
    """A host's right to some slots, and the replies that wait for it."""

    token: str
    env: str
    slots: list[int]
    seen: float
    expires: bool = True
    outbox: list[tuple[int, Reply]] = field(default_factory=list)
    line: int = 0  # grows when its host comes by a new connection; calls on an older one get nothing more
    #: The connections that its host calls by: the one that waits here for replies, and the one that only brings
    #: commands. A third one replaces one of them.
    callers: dict[str, Caller] = field(default_factory=dict)
    waiting: int = 0  # calls that are in `exchange` now
    over: bool = False
    pipes: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    bell: _Bell = field(default_factory=lambda: _Bell())

    def __post_init__(self) -> None:
        self.pipes.register(self.bell.fd, selectors.EVENT_READ, None)

    def called(self, caller: Caller, waits: bool) -> None:
        """Notes by which connection a call came, and hangs up the one that it replaces.

        Its host has given that up. A network that lost its end without a word would hold ours open for ever, and with
        it a thread and a descriptor.
        """
        if not waits and self.callers.get("waits") is caller:
            return  # it has nothing to wait for just now
        if waits and self.callers.get("brings") is caller:
            del self.callers["brings"]
        role = "waits" if waits else "brings"
        before = self.callers.get(role)
        self.callers[role] = caller
        if before is not None and before is not caller:
            before.hang_up()

    def taken(self) -> list[tuple[int, Reply]]:
        """The replies that wait for it, and if they are too large for one message the first of them."""
        found, size = self.outbox, 0
        for count, (_, reply) in enumerate(found):
            size += len(reply.body)
            if size > MOST_BYTES and count:
                self.outbox = found[count:]
                return found[:count]
        self.outbox = []
        return found

    def close(self) -> None:
        """Gives its descriptors back, once it is over and no call waits by them: not when the collector comes by."""
        if self.over and not self.waiting:
            self.pipes.close()
            self.bell.close()

    def hang_up(self) -> None:
        """Ends its host's connections."""
        for caller in self.callers.values():
            caller.hang_up()


class Supervisor:
    """All slots of one farm."""

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
            log_dir: for a log a slot.
            black_box: for the files of episodes that ended badly; None is a folder in `log_dir`.

        Raises:
            StartError: fewer slots than environments.
        """
        if slots < len(catalog.names):
            raise StartError(
                "%d environments need at least as many slots, and --slots says %d\n  now: start it with --slots %d"
                % (len(catalog.names), slots, len(catalog.names))
            )
        self.catalog = catalog
        self.python = python
        self.log_dir = Path(log_dir)
        names = catalog.names
        self.slots = [Slot(number, names[number % len(names)]) for number in range(slots)]
        self.ready: dict[str, bytes] = {}  # the READY body of each environment that has been built once
        self._recorder = Recorder(Path(black_box or self.log_dir / "black-box"), python, self.ready)
        self.limits = limits or Limits()
        self.spares = self.limits.spares or 0  # workers in stock for each environment
        self.about_spares = ""  # why so many, in words
        self._step_limit = {name: TimeLimit(self.limits.step, rules.ENOUGH_STEPS) for name in names}
        self._reset_limit = {name: TimeLimit(self.limits.reset, rules.ENOUGH_RESETS) for name in names}
        self._fresh_memory: dict[str, int] = {}  # of the first worker of each environment when it stood
        self._workers: dict[int, WorkerProcess] = {}
        self._pace: dict[int, Pace] = {}
        self._stock: dict[str, list[WorkerProcess]] = {name: [] for name in names}
        self._spare_failures = dict.fromkeys(names, 0)
        self._spare_not_before = dict.fromkeys(names, 0.0)
        self._leaving: list[WorkerProcess] = []  # killed, or closing by themselves until `leave_by`
        self._to_sweep: set[str] = set()
        self._next_sweep = self._next_weighing = 0.0
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

    def start(self, limit: float | None = None) -> None:
        """Starts the workers and waits until each environment has been built once, by default as long as one may take.

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
        self._recorder.start()
        self._thread.start()
        try:
            self._wait_for_first(self.limits.start if limit is None else limit)
            self._check_cap()
        except BaseException:
            self.stop("start failed")
            raise
        self._decide_spares()

    def _wait_for_first(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        said = time.monotonic() + 10.0
        with self._lock:
            for name in self.catalog.names:
                while name not in self.ready:
                    failed = [s.trouble for s in self.slots if s.env == name and s.failures]
                    if failed:
                        raise StartError(
                            "%s cannot be built\n  %s%s" % (name, failed[0], self._advice(name, failed[0]))
                        )
                    now = time.monotonic()
                    if now >= deadline:
                        raise StartError("%s %s" % (name, self._not_built(limit)))
                    if now >= said:
                        log.info("waiting for %s to be built, up to %g s", name, limit)
                        said = now + 30.0
                    self._changed.wait(min(deadline, said) - now)

    def _advice(self, name: str, why: str | None) -> str:
        if re.match("(ModuleNotFound|Import)Error", why or "") is None:
            return ""
        if name in RECIPES:
            return "\n  now: it needs " + RECIPES[name]["needs"]
        return "\n  now: install it for %s, or name the simulator's Python with --python" % self.python

    def _check_cap(self) -> None:
        for name, memory in self._fresh_memory.items():
            if self.limits.memory is not None and memory > self.limits.memory:
                raise StartError(
                    "%s takes %s as soon as it is built, and --memory allows %s\n  now: give it more with --memory SIZE"
                    % (name, in_words(memory), in_words(self.limits.memory))
                )

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
            workers = self._everyone()
            self._workers.clear()
            self._stock = {}
        deadline = time.monotonic() + STOP_LIMIT
        for worker in workers:
            worker.ask_to_end()
        for worker in workers + self._leaving:
            worker.end(max(0.0, deadline - time.monotonic()))
        self._all_ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        tree.sweep({worker.mark for worker in workers + self._leaving} | self._to_sweep)
        self._selector.close()
        self._bell.close()
        self._recorder.close()

    # What a host may ask for. Any thread.

    def describe(self) -> dict[str, Any]:
        """What this farm offers, how much of it is free, and each environment's seconds a step, None where unknown."""
        with self._lock:
            free = sum(self._is_free(slot) for slot in self.slots)
            paces = {name: limit.typical() for name, limit in self._step_limit.items()}
            return {"slots": len(self.slots), "free": free, "envs": dict(self.ready), "paces": paces}

    def acquire(
        self,
        env: str,
        count: int,
        version: int,
        expires: bool = True,
        numbers: list[int] | None = None,
        token: str | None = None,
    ) -> Lease:
        """Leases `count` slots that run `env`, or exactly the slots in `numbers`.

        With the `token` of a lease it adds to that one until it has `count`; asking twice adds once.

        Returns:
            The lease; it ends by `release`, or after LEASE_LIMIT without a call when it `expires`.

        Raises:
            ProtocolMismatch, NoSuchEnvironment, NoFreeSlot, LeaseLost: nothing was leased.
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
            known = None if token is None else self._lease(token)
            if known is not None:
                count = max(0, count - len(known.slots))
            if count > len(free) or count < (token is None):
                raise NoFreeSlot(
                    "%d slots were asked for; this farm has %d and %d are free" % (count, len(self.slots), len(free))
                )
            lease = known or Lease(secrets.token_hex(16), env, [], time.monotonic(), expires)
            lease.slots += [slot.number for slot in free[:count]]
            self._leases[lease.token] = lease
            for slot in free[:count]:
                slot.take(lease.token)
                if slot.env != env:
                    slot.env = env
                    self._change(slot)
                self._watch(slot)
        self._bell.ring()
        return lease

    def exchange(
        self,
        token: str,
        commands: list[Any],
        wait: float,
        together: int = 1,
        line: int | None = None,
        caller: Caller | None = None,
    ) -> list[list[Any]]:
        """Hands over commands and returns every reply that is in, at the latest after `wait` seconds.

        Args:
            token: the lease.
            commands: [slot, seq, kind, body] each.
            wait: seconds to wait for a first reply; 0 takes what is there.
            together: replies that the host wants in one go; the first one waits for them, but only for LINGER.
            line: which of its connections, one after the other, the host calls by; None: it has but one.
            caller: the connection itself, to be ended when the host has another in its place.

        Returns:
            [slot, seq, kind, flags, body] each, maybe none; none and nothing done for a call on an older line.

        Raises:
            LeaseLost: the lease is not known (any more).
        """
        with self._lock:
            lease = self._lease(token)
            if line is None:
                line = lease.line
            if line < lease.line:
                return []  # it was delayed on a connection that its host has given up: an answer would go nowhere
            if caller is not None:
                lease.called(caller, wait > 0 or line > lease.line)
            if line > lease.line:
                lease.line = line
                lease.bell.ring()  # a call that waits on the old line ends now and takes nothing with it
            for number, seq, kind, body in commands:
                slot = self.slots[number] if 0 <= number < len(self.slots) else None
                if slot is None or slot.lease != token:
                    raise LeaseLost("slot %r is not in this lease" % (number,))
                self._command(lease, slot, kind, seq, body)
            lease.waiting += 1
        try:
            return self._replies(lease, wait, together, line)
        finally:
            with self._lock:
                lease.waiting -= 1
                lease.close()

    def _replies(self, lease: Lease, wait: float, together: int, line: int) -> list[list[Any]]:
        """What is in for a lease, as `exchange` says; without the lock."""
        deadline = time.monotonic() + min(wait, LONGEST_WAIT)
        lingering, last = False, None
        pause = 0.0 if lease.outbox else max(0.0, deadline - time.monotonic())
        while True:
            if last is not None:  # nobody is asked after until this one, too, has answered, or the time is over
                _wait_for((last, lease.bell.fd), pause)
                pause = 0.0
            events = lease.pipes.select(min(pause, LOOK_UP))
            with self._lock:
                for key, _ in events:
                    if key.data is None:
                        lease.bell.hush()
                    else:
                        self._attend(*key.data)
                self._lease(lease.token, is_call=False)
                if lease.line != line:
                    lease.bell.ring()  # this call may have read what the one on the new connection waits for
                    return []
                if lease.outbox and not lingering:
                    lingering, deadline = True, min(deadline, time.monotonic() + LINGER)
                pause = deadline - time.monotonic()
                if len(lease.outbox) >= together or pause <= 0:
                    return [[number, r.seq, r.kind, r.flags, r.body] for number, r in lease.taken()]
                last = self._one_due(lease) if lingering else None

    def release(self, token: str, numbers: list[int] | None = None) -> None:
        """Ends a lease, or takes some slots out of it; what is unknown has ended already."""
        with self._lock:
            lease = self._leases.get(token)
            if lease is not None and numbers is None:
                self._free(lease, "released")
            elif lease is not None:
                gone = [number for number in lease.slots if number in (numbers or ())]
                lease.slots = [number for number in lease.slots if number not in gone]
                lease.outbox = [(number, reply) for number, reply in lease.outbox if number not in gone]
                self._free_slots(gone, "released")

    def release_by_hand(self, number: int) -> str:
        """Ends the worker of a slot now and has it replaced; one in quarantine is tried at once. Says what was done.

        Its holder, if any, loses the step under way, and keeps the slot.

        Raises:
            NoFreeSlot: there is no such slot.
        """
        with self._lock:
            if not (isinstance(number, int) and 0 <= number < len(self.slots)):
                raise NoFreeSlot("this farm has no slot %r; it has 0 to %d" % (number, len(self.slots) - 1))
            slot = self.slots[number]
            slot.failures = slot.barren = 0
            self._not_before[number] = 0.0
            worker = self._workers.get(number)
            if worker is None:
                self._bell.ring()
                return "slot %d has no worker; one is tried now" % number
            pid = worker.pid
            self._end(worker, "%s was released by hand" % worker.name(), "crashed", by_hand=True)
            return "slot %d: the worker (pid %d) was ended, a new one takes its place" % (number, pid)

    def status(self) -> list[dict[str, Any]]:
        """A row for each slot: plain numbers and words."""
        with self._lock:
            now = time.monotonic()
            return [self._row(slot, now) for slot in self.slots]

    def _row(self, slot: Slot, now: float) -> dict[str, Any]:
        worker = self._workers.get(slot.number)
        waiting = slot.quarantined and self._not_before[slot.number] > now
        return {
            "slot": slot.number,
            "env": slot.env,
            "state": "quarantined" if waiting else slot.state.value,
            "next_try_s": round(self._not_before[slot.number] - now, 1) if waiting else None,
            "leased": slot.lease is not None,
            "pid": slot.pid,
            "starts": slot.starts,
            "recycled": dict(slot.recycled),
            "episodes": slot.episodes,
            "steps": slot.steps,
            "rss": worker.rss() if worker is not None else None,
            "limits": {
                "step": self._step_limit[slot.env].seconds,
                "reset": self._reset_limit[slot.env].seconds,
                "start": self.limits.start,
            },
            "spares": sum(spare.ready is not None for spare in self._stock.get(slot.env, ())),
            "ledger": dict(
                {bucket: slot.ledger[bucket] for bucket in ("given", *BUCKETS)}, **{"under way": slot.under_way}
            ),
            "trouble": slot.trouble,
        }

    # Inside; the lock is held.

    def _is_free(self, slot: Slot) -> bool:
        return slot.lease is None and not slot.failures and not slot.quarantined

    def _lease(self, token: str, is_call: bool = True) -> Lease:
        lease = self._leases.get(token)
        if lease is None:
            raise LeaseLost(
                "this lease is not known here: it was released, or its host did not call for %g s" % LEASE_LIMIT
            )
        if is_call:  # the end of a call's wait says nothing: its host may be dead since
            lease.seen = time.monotonic()
        return lease

    def _command(self, lease: Lease, slot: Slot, kind: int, seq: int, body: bytes) -> None:
        frame, reply = slot.command(kind, seq, body)
        if frame is not None:
            self._give(slot, kind, body, frame)
        if reply is not None:
            lease.outbox.append((slot.number, reply))

    def _give(self, slot: Slot, kind: int, body: bytes, frame: bytes) -> None:
        """A command for the worker, and until when it must be done. The loop never sleeps longer than any limit."""
        worker = self._workers[slot.number]
        if kind == protocol.STEP:
            repeat = repeat_of(body)
            worker.begin(kind, self._step_limit[slot.env].seconds * repeat, repeat)
        else:
            rebuild = self.limits.start if worker.rebuilds else 0.0
            worker.begin(kind, self._reset_limit[slot.env].seconds + rebuild)
        self._recorder.command(slot.number, frame)
        if not worker.write(frame):
            self._bell.ring()  # the loop writes the rest as the pipe drains

    def _one_due(self, lease: Lease) -> int | None:
        """The pipe of a worker whose reply is awaited; each wake-up less is a dozen microseconds for the others."""
        for number in reversed(lease.slots):
            worker = self._workers.get(number)
            if worker is not None and worker.due and worker.watched is lease.pipes:
                return worker.stdout
        return None

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

    def _change(self, slot: Slot) -> None:
        """The slot has got another environment, and now gets a worker for it."""
        worker = self._workers.get(slot.number)
        if worker is not None:
            self._dismiss(worker)
            slot.died("slot %d changes to %s" % (slot.number, slot.env), wanted=True)
            self._adopt(slot)

    def _free(self, lease: Lease, reason: str) -> None:
        del self._leases[lease.token]
        self._free_slots(lease.slots, reason)
        lease.bell.ring()
        lease.over = True
        lease.close()

    def _free_slots(self, numbers: list[int], reason: str) -> None:
        for number in numbers:
            self.slots[number].free()
            self._watch(self.slots[number])
        log.info("slots %s are free: %s", numbers, reason)

    # The loop: the only thread that starts and buries workers and enforces limits (but for `stop`, after the loop).

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
            # What takes its time is done without the lock.
            pause = min(pause, self._weigh(), self._bury())
            for key, _ in self._selector.select(pause):
                if key.data is None:
                    self._bell.hush()
                    continue
                with self._lock:
                    self._attend(*key.data)

    def _tend(self) -> float:
        """Whatever is due: leases, limits, workers to start, full pipes. Returns seconds until the next.

        A command that is given meanwhile need not wake the loop: it sleeps no longer than the shortest limit there is.
        """
        now = time.monotonic()
        for lease in list(self._leases.values()):
            if lease.expires and now - lease.seen > LEASE_LIMIT:
                self._free(lease, "their host did not call for %g s" % LEASE_LIMIT)
                lease.hang_up()
        due = [1.0, self.limits.shortest]
        for worker in self._everyone():
            if worker.deadline <= now:
                self._overdue(worker, now)
            if worker.doom is not None and worker.pidfd is None:
                self._attend(worker, "exit")  # nothing else tells it here
                due.append(REAP_EVERY)
            due.append(worker.deadline - now)
        due += [self._fill_slots(now), self._fill_stock(now)]
        for worker in self._workers.values():
            self._watch_writing(worker)
        return max(0.0, min(due))

    def _overdue(self, worker: WorkerProcess, now: float) -> None:
        """A worker's time is up: asks it where it is, and ends it at the second call."""
        if worker.doom is not None:
            self._end(worker, *worker.doom)
            return
        received = -1
        while worker.received > received and self._is_here(worker) and worker.doom is None:
            received = worker.received  # its answer may be in the pipe, and its holder slow to take it
            self._attend(worker, "replies")
            if worker.deadline > now:
                self._ring(worker)
                return
        if worker.doom is not None or not self._is_here(worker):
            return
        kind, seconds, repeat = worker.at
        if worker.in_the_middle and not worker.extended:
            worker.extended, worker.deadline = True, now + REST_OF_FRAME
            return
        state = tree.state(worker.pid)
        why = self._too_long(worker, kind, seconds, repeat, state)
        if state == psutil.STATUS_STOPPED:
            self._end(worker, why + worker.evidence(), "timed out")
            return
        self._doom(worker, why, "timed out", TRACE_TIME)
        worker.ask_for_trace()

    def _doom(self, worker: WorkerProcess, why: str | None, bucket: str, seconds: float) -> None:
        """It ends at once or is killed after so many seconds; nothing that it says counts any more."""
        self._unwatch(worker)
        worker.doom, worker.deadline = (why, bucket), time.monotonic() + seconds
        self._bell.ring()

    def _too_long(self, worker: WorkerProcess, kind: int, seconds: float, repeat: int, state: str) -> str:
        if kind == protocol.CONSTRUCT:
            return "%s %s" % (worker.env, self._not_built(seconds))
        assert worker.slot is not None
        step = kind == protocol.STEP
        limit = (self._step_limit if step else self._reset_limit)[worker.env]
        limit.saw(seconds / repeat)
        command = "step %d" % (self.slots[worker.slot].steps + 1) if step else "a reset"
        if repeat > 1:
            command += ", %d times the same action," % repeat
        return "%s: %s did not end within %g s (%s; %s gives another limit); the process was %s" % (
            worker.name(),
            command,
            seconds,
            limit.origin(),
            "--step-timeout" if step else "--reset-timeout",
            state,
        )

    def _not_built(self, limit: float) -> str:
        return (
            "was not built within %g s: its constructor hangs, or needs more time\n"
            "  now: give it more with --start-timeout SECONDS, or see %s" % (limit, self.log_dir)
        )

    def _weigh(self) -> float:
        """Ends workers over the cap on memory. Returns seconds until it is to be looked at again."""
        now = time.monotonic()
        if self.limits.memory is None:
            return FOREVER
        if now >= self._next_weighing:
            self._next_weighing = now + WEIGH_EVERY
            with self._lock:
                workers = self._everyone()
            for worker in workers:
                worker.memory = tree.resident(worker.pid)
                if worker.memory > self.limits.memory:
                    with self._lock:
                        self._over_cap(worker)
        return self._next_weighing - now

    def _over_cap(self, worker: WorkerProcess) -> None:
        assert self.limits.memory is not None
        if self._is_here(worker) and worker.doom is None:
            said = (in_words(worker.memory), in_words(self.limits.memory))
            why = "%s held %s of memory, more than --memory %s" % (worker.name(), *said)
            self._end(worker, why + worker.evidence(), "crashed")

    def _bury(self) -> float:
        """Collects ended processes, and what they left behind. Returns seconds until it is to be looked at again."""
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
            marks, self._to_sweep, self._next_sweep = self._to_sweep, set(), now + SWEEP_EVERY
            left = tree.sweep(marks)
            if left:
                log.info("ended what a worker had left behind: %s", ", ".join("pid %d" % pid for pid in left))
        if self._leaving:
            return REAP_EVERY
        return self._next_sweep - now if self._to_sweep else FOREVER

    # Workers for slots, and in stock.

    def _fill_slots(self, now: float) -> float:
        """Gives each empty slot a worker whose time has come; returns seconds until the next."""
        wait = FOREVER
        first = {env: min(s.number for s in self.slots if s.env == env) for env in {s.env for s in self.slots}}
        for slot in self.slots:
            if slot.number in self._workers or self._stopping:
                continue
            if slot.env not in self.ready and slot.number != first[slot.env]:
                continue  # one worker tries first: a wrong name then fails once, not once a slot
            if now < self._not_before[slot.number]:
                wait = min(wait, self._not_before[slot.number] - now)
            elif not self._adopt(slot):
                self._start_worker(slot)
        return wait

    def _start_worker(self, slot: Slot) -> None:
        try:
            worker = self._new_worker(slot.env, slot.number, self.log_dir / ("slot-%d.log" % slot.number))
        except OSError as error:
            slot.state = State.STARTING
            self._buried(slot, "%s does not start: %s" % (self.python, error))
            return
        self._install(slot, worker)

    def _new_worker(self, env: str, slot: int | None, path: Path) -> WorkerProcess:
        worker = WorkerProcess(self.python, env, self.catalog.order(env), slot, path)
        worker.begin(protocol.CONSTRUCT, self.limits.start)
        if worker.pidfd is not None:
            self._selector.register(worker.pidfd, selectors.EVENT_READ, (worker, "exit"))
        return worker

    def _install(self, slot: Slot, worker: WorkerProcess) -> None:
        worker.slot = slot.number
        self._workers[slot.number] = worker
        self._pace[slot.number] = Pace()
        self._recorder.started(slot.number)
        slot.started(worker.pid)
        if worker.ready is not None:
            self._stands(slot, worker)
        else:
            self._watch(slot)

    def _adopt(self, slot: Slot) -> bool:
        """Gives an empty slot a worker from stock, if there is one; it may be still at its construction."""
        if self._stopping or time.monotonic() < self._not_before[slot.number]:
            return False
        self._drop_stopped(slot.env)
        stock = self._stock.get(slot.env)
        if not stock:
            return False
        worker = stock.pop(0)
        log.info("slot %d takes over %s, whose log is %s", slot.number, worker.name(), worker.log)
        self._install(slot, worker)
        self._bell.ring()  # for a new one in stock
        return True

    def _drop_stopped(self, env: str) -> None:
        """Ends spares that somebody has stopped: in a slot each would cost the whole time limit of a reset.

        A spare has no other way to hang unseen: until a slot takes it, it waits for a command, or is being built.
        """
        for worker in list(self._stock.get(env, ())):
            if tree.state(worker.pid) == psutil.STATUS_STOPPED:
                self._end(worker, "%s was stopped (SIGSTOP) while it stood by" % worker.name(), "crashed")

    def _fill_stock(self, now: float) -> float:
        """Starts a spare where one is missing and no slot waits for a worker; returns seconds until the next."""
        wait = FOREVER
        busy = {slot.env for slot in self.slots if slot.state is State.STARTING}
        for env, stock in self._stock.items():
            if self._stopping or len(stock) >= self.spares or env not in self.ready or env in busy:
                continue
            if now < self._spare_not_before[env]:
                wait = min(wait, self._spare_not_before[env] - now)
                continue
            try:
                worker = self._new_worker(env, None, self._spare_log())
            except OSError as error:
                self._spare_failed(env, "%s does not start: %s" % (self.python, error))
                continue
            stock.append(worker)
            self._selector.register(worker.stdout, selectors.EVENT_READ, (worker, "replies"))
            worker.watched = self._selector
        return wait

    def _spare_log(self) -> Path:
        """A log that no living worker writes to; a spare keeps it when a slot takes it over."""
        used = {worker.log for worker in [*self._everyone(), *self._leaving]}
        names = (self.log_dir / ("spare-%d.log" % number) for number in itertools.count())
        return next(name for name in names if name not in used)

    def _spare_failed(self, env: str, why: str) -> None:
        self._spare_failures[env] += 1
        pause = rules.back_off(self._spare_failures[env])
        self._spare_not_before[env] = time.monotonic() + pause
        log.warning("%s; next try for a spare in %g s", why, pause)
        self._bell.ring()

    def _decide_spares(self) -> None:
        """How many spares there are to be, once a worker of each environment stands and can be measured."""
        with self._lock:
            needs = self._fresh_memory
            missing = sum(needs.get(s.env, 0) for s in self.slots if s.state in (State.EMPTY, State.STARTING))
            available = tree.free_memory()[1]
            if self.limits.spares is None:
                self.spares = rules.spares_that_fit(needs, missing, available)
            taken = "%s a worker, %s free" % (
                ", ".join("%s takes %s" % (env, in_words(size)) for env, size in needs.items()),
                in_words(available),
            )
            why = "as --spares says" if self.limits.spares is not None else taken
            self.about_spares = "%d spare worker%s for each environment (%s)" % (
                self.spares,
                "" if self.spares == 1 else "s",
                why,
            )
        self._bell.ring()

    def _watch_writing(self, worker: WorkerProcess) -> None:
        waiting = not worker.flush()
        watched = worker.stdin in self._selector.get_map()
        if waiting and not watched:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, (worker, "room"))
        elif watched and not waiting:
            self._selector.unregister(worker.stdin)

    # What a worker says, and its end. By the loop, or by a call of the slot's holder.

    def _everyone(self) -> list[WorkerProcess]:
        """The workers in slots and in stock."""
        return [*self._workers.values(), *itertools.chain.from_iterable(self._stock.values())]

    def _is_here(self, worker: WorkerProcess) -> bool:
        if worker.slot is None:
            return worker in self._stock.get(worker.env, ())
        return self._workers.get(worker.slot) is worker

    def _attend(self, worker: WorkerProcess, what: str) -> None:
        if not self._is_here(worker):
            return  # it was ended while this event waited
        if what == "room":
            self._watch_writing(worker)
            return
        if worker.doom is not None:
            if worker.has_ended():
                self._end(worker, *worker.doom)
            return
        received = worker.received
        try:
            frames = worker.read()
        except protocol.FrameError as error:
            self._end(worker, "%s wrote something else into its pipe: %s" % (worker.name(), error), "crashed")
            return
        for kind, flags, ticket, body in frames or []:
            if self._is_here(worker):  # one that was recycled at its episode's end has nothing more to say
                self._said(worker, kind, flags, ticket, body)
        if frames is None or (what == "exit" and worker.received == received):
            if worker.has_ended():
                self._end(worker, None, "crashed")
            else:
                self._doom(worker, None, "crashed", LAST_WORDS)  # its pipe is closed, it is about to end

    def _said(self, worker: WorkerProcess, kind: int, flags: int, ticket: int, body: bytes) -> None:
        if not worker.due:
            self._end(worker, "%s answered what nobody had asked" % worker.name() + worker.evidence(), "crashed")
            return
        due, _, repeat = worker.done()
        if due == protocol.CONSTRUCT:
            self._built(worker, kind, body)
        elif worker.slot is not None:
            slot = self.slots[worker.slot]
            self._recorder.answered[slot.number] = ticket
            if kind == protocol.FAULT:
                body = self._recorder.faulted(slot, worker, ticket, body, self.catalog.order(slot.env))
            self._deliver(slot, slot.replied(kind, flags, ticket, body))
            self._measure(slot, worker, kind, flags, seconds_of(body) / repeat)

    def _built(self, worker: WorkerProcess, kind: int, body: bytes) -> None:
        if kind == protocol.READY:
            worker.ready, worker.stood = body, time.monotonic()
            if worker.env not in self.ready:
                self._fresh_memory[worker.env] = worker.rss() or 0
                self.ready[worker.env] = body
            if worker.slot is not None:
                self._stands(self.slots[worker.slot], worker)
            else:
                self._spare_failures[worker.env] = 0
                log.info("%s stands by", worker.name())
        elif kind == protocol.FAULT:
            worker.fault = fault_words(codec.decode(body))

    def _stands(self, slot: Slot, worker: WorkerProcess) -> None:
        held = slot.held_body
        for frame in slot.constructed():
            self._give(slot, protocol.RESET, held, frame)
        self._watch(slot)
        self._changed.notify_all()
        log.info(
            "slot %d: %s is ready (pid %d, built in %.2f s)",
            slot.number,
            slot.env,
            worker.pid,
            worker.stood - worker.began,
        )

    def _measure(self, slot: Slot, worker: WorkerProcess, kind: int, flags: int, seconds: float) -> None:
        """Learns from what a command took, and replaces the worker if it has served its time."""
        if kind == protocol.TRANSITION:
            self._step_limit[slot.env].saw(seconds)
            self._pace[slot.number].step(seconds)
        elif kind == protocol.OBSERVATION:
            worker.rebuilds = False
            self._reset_limit[slot.env].saw(seconds)
        else:
            worker.rebuilds = True  # after a fault the next reset builds the environment anew
        if slot.state is State.IDLE:
            reason = self._why_recycle(slot, worker, bool(flags))
            if reason is not None:
                self._recycle(slot, reason)

    def _why_recycle(self, slot: Slot, worker: WorkerProcess, over: bool) -> str | None:
        limits = self.limits
        if limits.recycle_memory is not None or limits.memory_share is not None:
            now = time.monotonic()
            if limits.recycle_memory is not None or not worker.memory_when_fresh or now >= worker.weigh_at:
                worker.memory, worker.weigh_at = tree.resident(worker.pid), now + WEIGH_EVERY
            worker.memory_when_fresh = worker.memory_when_fresh or worker.memory
        slow = over and self._pace[slot.number].episode_over()
        return rules.why_recycle(limits, slot.episodes, slot.steps, worker.memory, worker.memory_when_fresh, slow)

    def _recycle(self, slot: Slot, reason: str) -> None:
        worker = self._workers[slot.number]
        log.info(
            "%s is replaced (%s) after %d episodes and %d steps, with %s",
            worker.name(),
            reason,
            slot.episodes,
            slot.steps,
            in_words(worker.memory or worker.rss() or 0),
        )
        self._dismiss(worker)
        slot.recycle(reason)
        if not self._adopt(slot):
            self._bell.ring()

    def _dismiss(self, worker: WorkerProcess) -> None:
        """Lets a worker that is wanted no more close by itself; its slot does not wait for it."""
        self._forget(worker)
        worker.ask_to_end()
        worker.leave_by = time.monotonic() + LEAVE_LIMIT
        self._leaving.append(worker)

    def _forget(self, worker: WorkerProcess) -> None:
        if worker.slot is None:
            self._stock[worker.env].remove(worker)
        else:
            del self._workers[worker.slot]
        self._unwatch(worker)
        for watched in (worker.stdin, worker.pidfd):
            if watched is not None and watched in self._selector.get_map():
                self._selector.unregister(watched)

    def _end(self, worker: WorkerProcess, why: str | None, bucket: str, by_hand: bool = False) -> None:
        """Ends what is left of a worker, and tells its slot; `why` is None when it ended by itself."""
        if not self._is_here(worker):
            return
        self._forget(worker)
        if worker.doom is not None and why is not None:
            why += worker.evidence(lines=16)  # the trace it was asked for
        obituary = worker.kill()
        self._leaving.append(worker)
        if worker.slot is not None:
            slot = self.slots[worker.slot]
            lived = FOREVER if by_hand else time.monotonic() - worker.stood
            box = ""
            if slot.env in self.ready and not by_hand:  # before that, the environment never stood
                order = self.catalog.order(slot.env)
                box = self._recorder.ended(slot, worker, why or obituary, order, bucket, by_farm=why is not None)
            self._buried(slot, why or obituary, bucket, lived, box)
        elif worker.ready is None:
            self._spare_failed(worker.env, why or obituary)
        else:
            log.warning("%s; a new one is started", why or obituary)
            self._bell.ring()

    def _buried(self, slot: Slot, why: str, bucket: str = "crashed", lived: float = 0.0, box: str = "") -> None:
        made = slot.steps
        starting = slot.state is State.STARTING
        reply = slot.died((why if starting else "%s (after %d steps)" % (why, made)) + box, bucket, lived=lived)
        pause = rules.back_off(slot.failed)
        self._not_before[slot.number] = time.monotonic() + pause
        self._deliver(slot, reply)
        self._adopt(slot)
        if slot.lease in self._leases:
            self._leases[slot.lease].bell.ring()
        self._bell.ring()
        self._changed.notify_all()
        if not self._stopping and slot.env in self.ready:  # before that, `start` raises it
            first, newline, rest = why.partition("\n")
            log.warning("%s; %s%s", first, _what_next(slot, pause), newline + rest)

    def _ring(self, worker: WorkerProcess) -> None:
        if worker.slot is not None:
            lease = self._leases.get(self.slots[worker.slot].lease or "")
            if lease is not None:
                lease.bell.ring()


def _wait_for(pipes: tuple[int, ...], seconds: float) -> None:
    """Until there is something to read in one of these, or it is closed."""
    poll = select.poll()
    for pipe in pipes:
        poll.register(pipe, select.POLLIN)
    poll.poll(math.ceil(seconds * 1e3))


def fault_words(fault: dict[str, Any]) -> str:
    """The body of a FAULT as text; where the name of the environment is wrong, its traceback says nothing more."""
    words = "%s: %s" % (fault["type"], fault["text"])
    if fault.get("traceback") and fault["type"] != "NoSuchEnvironment":
        words += "\n" + fault["traceback"].rstrip()
    return words


def _what_next(slot: Slot, pause: float) -> str:
    if pause:
        return "slot %d is in quarantine, next try in %g s" % (slot.number, pause)
    return "a spare takes its place" if slot.pid is not None else "a new one is started"


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
        raise StartError(
            "--python %s said nothing within %g s\n  now: give the path of the simulator's interpreter"
            % (python, limit)
        ) from None
    except OSError as error:
        raise StartError(
            "--python %s does not start: %s\n  now: give the path of the simulator's interpreter, as `which python` "
            "prints it in its environment" % (python, error.strerror or error)
        ) from None
    said = run.stdout.split()
    if not said or not re.fullmatch(r"\d+\.\d+\.\d+", said[0]):
        words = run.stderr or run.stdout or "it printed nothing"
        raise StartError(
            "--python %s is no Python: %s\n  now: give the path of the simulator's interpreter"
            % (python, words.strip()[-300:])
        )
    if run.returncode != 0 or len(said) < 2:
        raise StartError(
            "Python %s at %s has no working numpy, the one package a worker needs\n  now: %s -m pip install numpy\n  %s"
            % (said[0], python, python, run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "")
        )
    return "%s, numpy %s" % (said[0], said[1])
