"""What the fault bench is made of: farms and proxies as processes, and a driver that stands where the learner does.

with Bench() as bench:
    farm = bench.farm(4, "--spares", "1", takes=0.02)
    driver = bench.drive([(farm.address, 4)])
    os.kill(driver.pid[0], signal.SIGKILL)
    verdict = bench.judge(driver)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import Pyro4

from benchmarks.faults.history import First, Got, History, Verdict, action_of, check, read_journal
from farmer import Farmer
from farmer.courier import Courier
from farmhand.catalog import Catalog
from farmhand.worker_process import WIRE, WORKER
from simulators.faulty import MOST, NUMBERS
from wire import codec, protocol
from wire.errors import FarmError, NothingSent

ROOT = Path(__file__).resolve().parents[2]
ENV = "benchmarks.faults.journal:JournalEnv"
START_LIMIT = 60.0  #: s for a farm to stand; the machine may be busy
WAIT_LIMIT = 60.0  #: s for whatever must happen after a fault
OTHERS = MOST // 2  #: the first number of a step of another host than the one whose history is checked


def first_line(process: subprocess.Popen[str]) -> str:
    """What a program says when it stands; nothing when it ended, or when it took longer than START_LIMIT."""
    assert process.stdout is not None
    killer = threading.Timer(START_LIMIT, process.kill)
    killer.start()
    try:
        return process.stdout.readline()
    finally:
        killer.cancel()


class Farm:
    """A farm.py beside this process, which ends with it; it can be killed, stopped, and started on the same port."""

    def __init__(
        self,
        folder: Path,
        slots: int,
        options: Sequence[str] = (),
        env: str = ENV,
        kwargs: Any = None,
        host: str = "127.0.0.1",
        before: Sequence[str] = (),
    ):
        """Starts it; `before` are words before its command, as of `ip netns exec`."""
        self.slots, self.port = slots, 0
        self._folder, self._options, self._env, self._kwargs = folder, list(options), env, kwargs or {}
        self._host, self._before = host, list(before)
        self._starts = itertools.count()
        self.process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def address(self) -> str:
        return "%s:%d" % (self._host, self.port)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Until it says what it offers."""
        command = [*self._before, sys.executable, str(ROOT / "farm.py"), self._env, "--until-eof"]
        command += ["--slots", str(self.slots), "--host", self._host, "--port", str(self.port)]
        command += ["--env-kwargs", json.dumps(self._kwargs), *self._options]
        command += ["--log-dir", str(self._folder / ("logs-%d" % id(self)))]
        path = self._folder / ("farm-%d-%d.txt" % (id(self), next(self._starts)))
        with open(path, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        match = re.match(r"farm at (\S+):(\d+),", first_line(self.process))
        if match is None:
            raise RuntimeError("the farm did not start: %s" % path.read_text())
        self.port = int(match[2])

    def workers(self) -> list[int]:
        """What runs under it, as the system sees it."""
        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]

    def children(self) -> list[int]:
        """Its workers alone, without what they started."""
        with contextlib.suppress(psutil.Error):
            return [child.pid for child in psutil.Process(self.pid).children()]
        return []

    def ask(self, verb: str) -> Any:
        """One call, with Pyro4 alone."""
        Pyro4.config.SERIALIZER = "msgpack"
        with Pyro4.Proxy("PYRO:farm@" + self.address) as proxy:
            proxy._pyroTimeout = 10.0
            return proxy._pyroInvoke(verb, (), {})

    def kill(self) -> None:
        """As a power cut."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self._close()

    def stop(self) -> None:
        """As its user ends it; killed when that does not do."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self._close()

    def _close(self) -> None:
        assert self.process is not None
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Proxy:
    """`proxy.py` beside this process."""

    def __init__(self, farm: Farm, ports: int = 1, every: int = 30, seed: int = 0, most: int = sys.maxsize):
        command = [sys.executable, "-m", "benchmarks.faults.proxy", "--to", farm.address, "--ports", str(ports)]
        command += ["--every", str(every), "--seed", str(seed), "--most", str(most)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addresses: list[str] = json.loads(first_line(self._process))

    def say(self, word: str) -> None:
        """One of its words."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def counts(self) -> dict[str, int]:
        """Faults so far, by kind."""
        self.say("counts")
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)
        self._process.stdout.close()


class Pool(Farmer):
    """A farmer that tells which steps really went: a slot that was lost just before gets none."""

    went: tuple[int, ...] = ()

    def _dispatch(self, slots: list[int], kind: int, bodies: list[bytes]) -> list[Courier]:
        self.went = tuple(slots)
        return super()._dispatch(slots, kind, bodies)


class Driver(threading.Thread):
    """Stands where the learner does: keeps every slot busy with numbered actions, and writes the history down."""

    def __init__(self, pool: Pool, first: int = 1):
        """Seeds and numbers of steps begin at `first`."""
        super().__init__(name="driver", daemon=True)
        self.pool, self.history = pool, History()
        self.pid: dict[int, int] = {}  # of each slot's worker
        self.first_at: dict[int, float] = {}  # when its latest episode began
        self.lost_at: dict[int, float] = {}
        self.sent_at: dict[int, float] = {}
        self.orders: dict[int, str] = {}  # slot: the fault that its next action commands
        self.longest = 0.0  # s that one collect took
        self.trouble: BaseException | None = None
        self._seeds, self._numbers = itertools.count(first), itertools.count(first)
        self._seed: dict[int, int] = {}
        self._step: dict[int, int] = {}
        self._ready: set[int] = set()
        self._over = threading.Event()
        self._changed = threading.Condition()

    def __enter__(self) -> Driver:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self.join(WAIT_LIMIT)

    def run(self) -> None:
        try:
            while not self._over.is_set():
                self._turn()
            self._drain()
        except BaseException as error:
            self.trouble = error
        with self._changed:
            self._changed.notify_all()

    def until(self, condition: Callable[[], Any], what: str, limit: float = WAIT_LIMIT) -> Any:
        """Waits until a condition on what came holds; asked after each batch."""
        with self._changed:
            found = self._changed.wait_for(lambda: self.trouble or condition(), limit)
        if self.trouble is not None:
            raise self.trouble
        if not found:
            raise TimeoutError("waited %g s for %s" % (limit, what))
        return found

    def finish(self) -> None:
        """Lets everything come home; raises what went wrong in the thread."""
        self._over.set()
        self.join(WAIT_LIMIT)
        if self.trouble is not None:
            raise self.trouble
        if self.is_alive():
            raise TimeoutError("the pool did not come to rest: %s" % self.pool.status())

    def _turn(self) -> None:
        vacant = self.pool.vacant()
        if vacant:
            seeds = [next(self._seeds) for _ in vacant]
            self._seed.update(zip(vacant, seeds, strict=True))
            self.pool.reset(vacant, seeds)
        self._collect()
        with self._changed:
            self._send()
            self._changed.notify_all()

    def _collect(self) -> None:
        began = time.monotonic()
        rows = self.pool.collect(1, WAIT_LIMIT)
        self.longest = max(self.longest, time.monotonic() - began)
        for row in rows:
            self._ready.discard(row.slot)
            if row.lost:
                self.history.lost(row.slot, row.info["lost"])
                self.lost_at[row.slot] = self.history.events[-1].at
            elif row.first:
                self.history.first(row.slot, self._seed[row.slot], row.obs)
                self.pid[row.slot], self._step[row.slot] = row.info["pid"], 0
                self.first_at[row.slot] = self.history.events[-1].at
                self._ready.add(row.slot)
            else:
                self.history.got(row.slot, row.obs, row.reward)
                if not (row.terminated or row.truncated):
                    self._ready.add(row.slot)

    def _send(self) -> None:
        slots = sorted(self._ready)
        self._ready.clear()
        if not slots:
            return
        numbers = [next(self._numbers) for _ in slots]
        orders = {slot: self.orders.pop(slot) for slot in slots if slot in self.orders}  # another thread may give more
        faults = [NUMBERS[orders[slot]] if slot in orders else 0 for slot in slots]
        actions = [[action_of(number), fault] for number, fault in zip(numbers, faults, strict=True)]
        self.pool.went = ()
        now = time.monotonic()
        self.pool.send(np.array(actions, "float32"), slots)
        for slot, number in zip(slots, numbers, strict=True):
            if slot not in self.pool.went:
                if slot in orders:
                    self.orders[slot] = orders[slot]
                continue
            self._step[slot] += 1
            self.sent_at[slot] = now
            self.history.sent(slot, number, self._seed[slot], self._step[slot])

    def _drain(self) -> None:
        end = time.monotonic() + WAIT_LIMIT / 2
        while self.pool.busy and time.monotonic() < end:
            with contextlib.suppress(NothingSent):
                self._collect()
        with contextlib.suppress(NothingSent, FarmError):  # rows that came between
            self._collect()
        if self.pool.busy:
            raise TimeoutError("commands that nobody answers: %s" % self.pool.status())

    # What the history says about speed.

    def rate(self, spans: Sequence[tuple[float, float, int | None]]) -> float:
        """Steps per second and slot within spans of (begin, end, the slot that does not count)."""
        steps, seconds = 0, 0.0
        slots = max(1, len(self.pid))
        times = [(event.at, event.slot) for event in self.history.events if isinstance(event, Got)]
        at = np.array([time for time, _ in times])
        slot_of = np.array([slot for _, slot in times])
        for begin, end, without in spans:
            low, high = np.searchsorted(at, [begin, end])
            steps += int(high - low)
            if without is not None:
                steps -= int((slot_of[low:high] == without).sum())
            seconds += (end - begin) * (slots - (without is not None))
        return steps / seconds if seconds else float("nan")


class Bench:
    """What every command needs: folders, farms, proxies and a pool, and all of it gone afterwards."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="faults"))
        self._stack.callback(shutil.rmtree, self.folder, True)
        self.journal = self.folder / "journal"
        self.journal.mkdir()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """Arguments of a JournalEnv."""
        return dict({"journal": str(self.journal), "commands": True, "length": 100}, **kwargs)

    def farm(self, slots: int, *options: str, **kwargs: Any) -> Farm:
        """A running farm of JournalEnvs."""
        farm = Farm(self.folder, slots, options, kwargs=self.kwargs(**kwargs))
        self._stack.callback(farm.stop)
        return farm

    def proxy(self, farm: Farm, **options: Any) -> Proxy:
        """A proxy before a farm."""
        proxy = Proxy(farm, **options)
        self._stack.callback(proxy.stop)
        return proxy

    def drive(self, farms: Sequence[tuple[str, int]], **options: Any) -> Driver:
        """A driver with a pool, at work on all slots."""
        pool = self._stack.enter_context(Pool(ENV, farms, **options))
        driver = self._stack.enter_context(Driver(pool))
        slots = sum(count for _, count in farms)
        driver.until(lambda: len(driver.pid) == slots, "the first observations")
        return driver

    def judge(self, driver: Driver) -> Verdict:
        """Ends the run and checks its history."""
        driver.finish()
        mine = {event.who for event in driver.history.events if isinstance(event, First)}
        journal = [did for did in read_journal(self.journal) if did.number < OTHERS or did.who in mine]
        verdict = check(driver.history, journal, driver.pool.status())
        print(verdict)
        return verdict


def p(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def times(values: Sequence[float]) -> str:
    """Median, p99 and the longest, in milliseconds."""
    return "p50 %.0f ms, p99 %.0f ms, longest %.0f ms" % (
        1e3 * p(values, 50),
        1e3 * p(values, 99),
        1e3 * max(values, default=0),
    )


def row(what: str, wanted: str, measured: str, verdict: Verdict | None) -> int:
    """Prints the table's row; returns the exit code."""
    command = "python -m benchmarks.faults.bench " + shlex.join(sys.argv[1:])
    if verdict is not None:
        measured += "; %d lost, %d doubled, %d swapped, %d cross-slot of %d steps, ledger %s" % (
            verdict.lost,
            verdict.doubled,
            verdict.swapped,
            verdict.cross_slot,
            verdict.sent,
            "**wrong**" if verdict.ledger else "sums",
        )
    print("| %s | %s | %s | `%s` |" % (what, wanted, measured, command), flush=True)
    return 0 if verdict is None or verdict.good else 1


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def start_up(bench: Bench) -> float:
    """Seconds from the start of one more worker to its environment's standing, at the load of this moment."""
    order = Catalog([ENV], bench.kwargs(), str(ROOT)).order(ENV)
    began = time.monotonic()
    worker = subprocess.Popen(
        [sys.executable, str(WORKER), "--wire", str(WIRE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(protocol.pack(protocol.CONSTRUCT, 0, codec.encode(order)))
    worker.stdin.flush()
    reader, frames = protocol.FrameReader(), []
    while not frames:
        data = os.read(worker.stdout.fileno(), 1 << 16)
        if not data:
            raise RuntimeError("the worker ended while it started")
        frames = reader.feed(data)
    took = time.monotonic() - began
    worker.stdin.close()
    worker.stdout.close()
    worker.wait(10)
    return took


class Highest(threading.Thread):
    """The highest resident memory of any worker of a farm, looked at every 5 ms."""

    def __init__(self, farm: Farm):
        super().__init__(daemon=True)
        self.highest = 0
        self._farm, self._over = farm, threading.Event()

    def run(self) -> None:
        looked, workers = 0.0, []
        while not self._over.wait(0.005):
            if time.monotonic() - looked > 0.2:
                looked = time.monotonic()
                workers = psutil.Process(self._farm.pid).children()
            for worker in workers:
                with contextlib.suppress(psutil.Error):
                    self.highest = max(self.highest, worker.memory_info().rss)

    def stop(self) -> None:
        self._over.set()
        self.join(5)


class Wire:
    """A network namespace, and a virtual wire to it that can be pulled out at either end."""

    NEAR, FAR = "198.18.232.1", "198.18.232.2"  # a range that is set apart for tests of networks (RFC 2544)

    def __init__(self) -> None:
        self.space, self._near, self._far = ("bench%s%d" % (part, os.getpid() % 100_000) for part in "snf")
        self._ip("netns", "add", self.space)
        try:
            self._ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.space)
            self._ip("addr", "add", self.NEAR + "/30", "dev", self._near)
            self._ip("-n", self.space, "addr", "add", self.FAR + "/30", "dev", self._far)
            self._ip("-n", self.space, "link", "set", "lo", "up")
            for end in ("near", "far"):
                self.turn(end, "up")
        except BaseException:
            self.close()
            raise

    def turn(self, end: str, how: str) -> None:
        """near: this machine sees that its network is gone; far: what it sends is swallowed in silence."""
        where = ["link", "set", self._near] if end == "near" else ["-n", self.space, "link", "set", self._far]
        self._ip(*where, how)

    def close(self) -> None:
        self._ip("netns", "del", self.space)  # the wire goes with it

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)
