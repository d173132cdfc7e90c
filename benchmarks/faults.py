"""Breaks everything on purpose and counts what is lost: the rows of the table in docs/reliability.md.

python benchmarks/faults.py kills --count 1000             # kill -9 of random workers
python benchmarks/faults.py kills --count 300 --spares 1
python benchmarks/faults.py hangs --count 200              # SIGSTOP, endless loops, blocked in C
python benchmarks/faults.py leak --steps 10000             # 1 MB a step under a cap
python benchmarks/faults.py crashloop --seconds 60
python benchmarks/faults.py network --faults 10000 --steps 200000
python benchmarks/faults.py partitions --count 20          # real network namespaces: wants root and `ip netns`
python benchmarks/faults.py farms --count 200              # daemons killed, stopped, cut off
python benchmarks/faults.py hosts --count 50
python benchmarks/faults.py soak --minutes 60              # training under faults of all kinds

Farms and workers are real processes. Everything that was sent and came back is kept, and so is what the environments
did; `history.check` then decides whether anything was lost, doubled, swapped or mixed up, and whether the ledgers add
up. Each command prints its row of the table, and exits with code 1 when the history is not a correct one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from history import First, Got, History, Lost, Sent, Verdict, action_of, check, read_journal  # noqa: E402

from farmer import Farmer  # noqa: E402
from farmhand.catalog import Catalog  # noqa: E402
from farmhand.process import WIRE, WORKER  # noqa: E402
from simulators.faulty import MOST, NUMBERS  # noqa: E402
from wire import codec, protocol  # noqa: E402
from wire.errors import FarmError, NothingSent  # noqa: E402

ENV = "journal:JournalEnv"
START_LIMIT = 60.0  #: s for a farm to stand; the machine may be busy
WAIT_LIMIT = 60.0  #: s for whatever must happen after a fault
OTHERS = MOST // 2  #: the first number of a step of another host than the one whose history is checked


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
                command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        match = re.match(r"farm at (\S+):(\d+),", self.process.stdout.readline())
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
    """`fault_proxy.py` beside this process."""

    def __init__(self, farm: Farm, ports: int = 1, every: int = 30, seed: int = 0, most: int = sys.maxsize):
        command = [sys.executable, str(HERE / "fault_proxy.py"), "--to", farm.address, "--ports", str(ports)]
        command += ["--every", str(every), "--seed", str(seed), "--most", str(most)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.addresses: list[str] = json.loads(self._process.stdout.readline())

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

    def _dispatch(self, slots: list[int], kind: int, bodies: list[bytes], wake: bool = True) -> None:
        self.went = tuple(slots)
        super()._dispatch(slots, kind, bodies, wake)


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
        self.ordered_at: dict[int, float] = {}
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
        faults = [NUMBERS[self.orders[slot]] if slot in self.orders else 0 for slot in slots]
        actions = [[action_of(number), fault] for number, fault in zip(numbers, faults, strict=True)]
        self.pool.went = ()
        now = time.monotonic()
        self.pool.send(np.array(actions, "float32"), slots)
        for slot, number in zip(slots, numbers, strict=True):
            if slot not in self.pool.went:
                continue
            self._step[slot] += 1
            self.sent_at[slot] = now
            if self.orders.pop(slot, None):
                self.ordered_at[slot] = now
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
    command = "python benchmarks/faults.py " + shlex.join(sys.argv[1:])
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
    order = Catalog([ENV], bench.kwargs(), str(HERE)).order(ENV)
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


# The commands.


def kills(args: argparse.Namespace) -> int:
    """kill -9 of random workers, in blocks between which nothing is broken."""
    rng = random.Random(args.seed)
    with Bench() as bench:
        farm = bench.farm(args.slots, "--spares", str(args.spares), takes=args.takes)
        driver = bench.drive([(farm.address, args.slots)])
        recoveries, starts, harmed, calm = [], [], [], []
        for number in range(args.count):
            if number % args.block == 0:
                time.sleep(2.0)  # spares stand again
                starts += [start_up(bench) for _ in range(2)]
                begin = time.monotonic()
                time.sleep(args.calm)
                calm.append((begin, time.monotonic(), None))
            slot = rng.randrange(args.slots)
            pid, at = driver.pid[slot], time.monotonic()
            os.kill(pid, signal.SIGKILL)

            def is_back(slot: int = slot, pid: int = pid) -> bool:
                return driver.pid[slot] != pid

            driver.until(is_back, "the recovery of slot %d" % slot)
            recoveries.append(driver.first_at[slot] - at)
            time.sleep(args.pause * rng.uniform(0.5, 1.5))
            harmed.append((at, time.monotonic(), slot))
        verdict = bench.judge(driver)
        share = 100 * driver.rate(harmed) / driver.rate(calm)
    start = statistics.median(starts)
    limit = 150 if args.spares else 1200 * p(starts, 99) + 100
    measured = "%d recovered; %s from the kill to the next first observation (start-up p50 %.0f ms, p99 %.0f ms)" % (
        len(recoveries),
        times(recoveries),
        1e3 * start,
        1e3 * p(starts, 99),
    )
    return row(
        "%d x kill -9 of random workers, %s" % (args.count, "warm spare" if args.spares else "no spare"),
        "all recovered, p99 <= %.0f ms; others >= 98 %%" % limit,
        measured + "; other slots at %.1f %% of fault-free" % share,
        verdict,
    )


OUTSIDE = "SIGSTOP from outside"


def hangs(args: argparse.Namespace) -> int:
    """Workers that stop answering, in every way there is."""
    rng = random.Random(args.seed)
    kinds = [OUTSIDE, "stop", "spin", "hang_in_c", "hang_with_gil"]
    with Bench() as bench:
        farm = bench.farm(args.slots, "--step-timeout", str(args.deadline), "--spares", "1", takes=args.takes)
        driver = bench.drive([(farm.address, args.slots)])
        late, left = [], 0
        for number in range(args.count):
            kind, slot = kinds[number % len(kinds)], rng.randrange(args.slots)
            pid, at = driver.pid[slot], time.monotonic()
            if kind == OUTSIDE:
                os.kill(pid, signal.SIGSTOP)
            else:
                driver.orders[slot] = kind

            def is_told(slot: int = slot, at: float = at) -> bool:
                return driver.lost_at.get(slot, 0.0) > at

            driver.until(is_told, "word of the %s" % kind)
            late.append(driver.lost_at[slot] - driver.sent_at[slot] - args.deadline)
            driver.until(lambda slot=slot, pid=pid: driver.pid[slot] != pid, "the recovery")
            left += not is_gone(pid)
            time.sleep(args.pause)
        blocked = driver.longest
        verdict = bench.judge(driver)
    measured = "%d detected, %s over the deadline of %g s; %d processes left; the learner's longest wait %.0f ms" % (
        len(late),
        times(late),
        args.deadline,
        left,
        1e3 * blocked,
    )
    wanted = "detected <= deadline + 100 ms, 0 processes left, the learner never blocks"
    return row("%d hangs (%s)" % (args.count, ", ".join(kinds)), wanted, measured, verdict)


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


def leak(args: argparse.Namespace) -> int:
    """Environments that keep a megabyte more with each step."""
    with Bench() as bench:
        cap = args.cap
        soft = () if args.hard else ("--recycle-memory", "%dM" % (cap - 2 * args.length))
        farm = bench.farm(
            args.slots,
            *("--memory", "%dM" % cap, "--spares", "1", *soft),
            **{"fault": "leak", "megabytes": 1.0, "length": args.length, "takes": args.takes},
        )
        driver = bench.drive([(farm.address, args.slots)])
        highest = Highest(farm)
        highest.start()
        began = time.monotonic()
        while driver.history.count(Sent) < args.steps:
            time.sleep(0.5)
            if driver.trouble or time.monotonic() - began > args.limit:
                break
        seconds = time.monotonic() - began
        verdict = bench.judge(driver)
        workers = len({did.who for did in read_journal(bench.journal)})
        highest.stop()
    measured = "highest RSS %.0f MB under a cap of %d MB; %d workers used up in %.0f s; %d transitions lost" % (
        highest.highest / 2**20,
        cap,
        workers,
        seconds,
        verdict.told,
    )
    wanted = "never above cap + one poll" + ("" if args.hard else ", 0 transitions lost")
    how = "ended at the cap" if args.hard else "recycled between episodes"
    return row("a leak of 1 MB a step, %d steps, %s" % (verdict.sent, how), wanted, measured, verdict)


def crashloop(args: argparse.Namespace) -> int:
    """A slot whose environment cannot be built any more, beside slots that work."""
    with Bench() as bench:
        broken = bench.folder / "broken"
        farm = bench.farm(
            args.slots,
            *("--spares", "0"),
            **{"fault": "exit", "at": "construct", "only_if": str(broken), "takes": args.takes, "length": 1000},
        )
        driver = bench.drive([(farm.address, args.slots)])
        process = psutil.Process(farm.pid)

        def interval() -> tuple[float, float, float]:
            begin, used = time.monotonic(), sum(process.cpu_times()[:2])
            time.sleep(args.seconds)
            return begin, time.monotonic(), sum(process.cpu_times()[:2]) - used

        before = interval()
        broken.touch()
        os.kill(driver.pid[0], signal.SIGKILL)
        harmed = interval()
        starts = farm.ask("status")[0]["starts"]
        broken.unlink()
        pid = driver.pid[0]
        driver.until(lambda: driver.pid[0] != pid, "the slot's return once it can be built again", 120)
        back = time.monotonic() - harmed[1]
        after = interval()
        verdict = bench.judge(driver)
        calm = driver.rate([(*before[:2], 0), (*after[:2], 0)])
        share = 100 * driver.rate([(*harmed[:2], 0)]) / calm
    usual = (before[2] + after[2]) / 2
    measured = (
        "the farm's process %.2f %% CPU with the crash loop, %.2f %% without; %d starts in %.0f s; "
        "others at %.1f %% of fault-free; built again %.0f s after it could be"
    ) % (100 * harmed[2] / args.seconds, 100 * usual / args.seconds, starts, args.seconds, share, back)
    return row("a crash loop beside %d slots" % (args.slots - 1), "<= 2 % CPU more, others >= 98 %", measured, verdict)


def network(args: argparse.Namespace) -> int:
    """A host and farms with proxies between them that harm what goes through."""
    with Bench() as bench:
        farms, proxies, addresses = [], [], []
        for number in range(args.farms):
            # More slots than the host wants: those of a lease that nobody calls for any more are held a while.
            farms.append(bench.farm(3 * args.proxies * args.slots // 2, "--spares", "0"))
            seed = args.seed + number
            proxies.append(bench.proxy(farms[-1], ports=args.proxies, every=args.every, seed=seed))
            proxies[-1].say("calm")
            addresses += [(address, args.slots) for address in proxies[-1].addresses]
        driver = bench.drive(addresses)
        began = time.monotonic()
        for proxy in proxies:
            proxy.say("harm")
        said = began
        while True:
            time.sleep(0.5)
            counts = [proxy.counts() for proxy in proxies]
            faults, steps = sum(sum(count.values()) for count in counts), driver.history.count(Sent)
            now = time.monotonic()
            if driver.trouble or now - began > args.limit or (faults >= args.faults and steps >= args.steps):
                break
            if now - said > 20:
                said = now
                print("%.0f s: %d faults, %d steps" % (now - began, faults, steps), file=sys.stderr, flush=True)
            if faults >= args.faults:
                for proxy in proxies:
                    proxy.say("calm")
        seconds = time.monotonic() - began
        for proxy in proxies:
            proxy.say("calm")
        time.sleep(1.0)
        longest = driver.longest
        verdict = bench.judge(driver)
        kinds = {kind: sum(count[kind] for count in counts) for kind in counts[0]}
        alive = sum(not is_gone(farm.pid) for farm in farms)
    measured = "%d faults (%s) over %d steps in %.0f s; %d told as lost; longest wait of the learner %.1f s; %s" % (
        faults,
        ", ".join("%d %s" % (n, kind) for kind, n in kinds.items()),
        verdict.sent,
        seconds,
        verdict.told,
        longest,
        "every farm still runs" if alive == len(farms) else "**a farm died**",
    )
    wanted = "0 lost, 0 doubled, 0 swapped, 0 cross-slot; ledger sums"
    return row("network faults through %d proxies" % len(addresses), wanted, measured, verdict)


def farms(args: argparse.Namespace) -> int:
    """Daemons that are killed, stopped and cut off, several at a time, beside one that nobody touches."""
    with Bench() as bench:
        steady = bench.farm(args.slots, takes=args.takes)
        victims = [bench.farm(args.slots, takes=args.takes) for _ in range(args.at_a_time)]
        proxies = [bench.proxy(victim) for victim in victims]
        for proxy in proxies:
            proxy.say("calm")
        lists = [(steady.address, args.slots)] + [(proxy.addresses[0], args.slots) for proxy in proxies]
        driver = bench.drive(lists)
        time.sleep(3.0)  # what starts beside them has started
        calm = [_pause(args.calm)]
        by_farm = {
            name: [slot for slot in driver.pid if driver.pool.name_of(slot) == name]
            for name in (address for address, _ in lists)
        }
        tallies = [Tally(number) for number in range(args.at_a_time)]
        todo = iter(range(args.count))
        lock, over = threading.Lock(), threading.Event()

        def work(number: int) -> None:
            slots = by_farm[proxies[number].addresses[0]]
            rng = random.Random(args.seed + number)
            try:
                while not over.is_set():
                    with lock:
                        turn = next(todo, None)
                    if turn is None:
                        return
                    kind = ("killed", "stopped", "cut off")[turn % 3]
                    _vanish(kind, victims[number], proxies[number], driver, slots, tallies[number])
                    time.sleep(rng.uniform(0.2, 1.0))
            except BaseException as error:
                tallies[number].trouble = error
                over.set()

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(args.at_a_time)]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.2)
        finally:
            over.set()
        harmed = (begin, time.monotonic())
        for tally in tallies:
            if tally.trouble is not None:
                raise tally.trouble
        mine = set(by_farm[steady.address])
        time.sleep(3.0)
        calm.append(_pause(args.calm))
        got = np.array([e.at for e in driver.history.events if isinstance(e, Got) and e.slot in mine])
        rates = [
            sum(((got >= low) & (got < high)).sum() for low, high in spans) / sum(high - low for low, high in spans)
            for spans in (calm, [harmed])
        ]
        touched = sum(isinstance(e, Lost) and e.slot in mine for e in driver.history.events)
        verdict = bench.judge(driver)
    parts = []
    for kind in ("killed", "stopped", "cut off"):
        left = [x for tally in tallies for x in tally.left[kind]]
        back = [x for tally in tallies for x in tally.back[kind]]
        parts.append(
            "%d %s: left after %.1f s (longest %.1f), back %.2f s (p99 %.2f, longest %.2f) after its return"
            % (len(back), kind, p(left, 50), max(left, default=0), p(back, 50), p(back, 99), max(back, default=0))
        )
    orphans = sum(tally.orphans for tally in tallies)
    measured = "%s; %d orphans after 1 s; the untouched farm at %.1f %% of its pace, %d of its slots lost" % (
        "; ".join(parts),
        orphans,
        100 * rates[1] / rates[0],
        touched,
    )
    wanted = "0 orphans after 1 s, left within 4 s, host goes on, rejoin <= 2 s after it is back"
    return row("farm daemons killed, stopped and cut off, %d times" % args.count, wanted, measured, verdict)


def _pause(seconds: float) -> tuple[float, float]:
    begin = time.monotonic()
    time.sleep(seconds)
    return begin, time.monotonic()


class Tally:
    """What one thread of `farms` measured."""

    def __init__(self, number: int):
        self.number, self.orphans = number, 0
        self.trouble: BaseException | None = None
        self.left: dict[str, list[float]] = {"killed": [], "stopped": [], "cut off": []}
        self.back: dict[str, list[float]] = {"killed": [], "stopped": [], "cut off": []}


def _vanish(kind: str, farm: Farm, proxy: Proxy, driver: Driver, slots: list[int], tally: Tally) -> None:
    """One farm goes, is left by the host, and comes back."""
    at = time.monotonic()
    workers = farm.workers()
    if kind == "killed":
        farm.kill()
    elif kind == "stopped":
        os.kill(farm.pid, signal.SIGSTOP)
    else:
        proxy.say("hold")
    driver.until(
        lambda: any(driver.lost_at.get(slot, 0.0) > at for slot in slots), "the host to leave a %s farm" % kind
    )
    tally.left[kind].append(min(driver.lost_at[slot] for slot in slots if driver.lost_at.get(slot, 0.0) > at) - at)
    if kind == "killed":
        time.sleep(max(0.0, at + 1.0 - time.monotonic()))
        tally.orphans += sum(not is_gone(pid) for pid in workers)
        farm.start()
    else:
        driver.until(lambda: all(driver.lost_at.get(slot, 0.0) > at for slot in slots), "all its slots to be left")
        time.sleep(1.0)
        if kind == "stopped":
            os.kill(farm.pid, signal.SIGCONT)
        else:
            proxy.say("go")
    back = time.monotonic()
    driver.until(lambda: all(driver.first_at[slot] > at for slot in slots), "the return of a %s farm" % kind)
    tally.back[kind].append(max(0.0, min(driver.first_at[slot] for slot in slots) - back))


def hosts(args: argparse.Namespace) -> int:
    """Hosts that are killed, several at a time, beside one that goes on."""
    with Bench() as bench:
        farm = bench.farm(args.slots * (1 + args.at_a_time), takes=args.takes)
        driver = bench.drive([(farm.address, args.slots)])
        before, freed, doomed = dict(driver.pid), [], []
        try:
            while len(freed) < args.count:
                count = min(args.at_a_time, args.count - len(freed))
                free = farm.ask("describe")["free"]
                for _ in range(count):
                    command = [sys.executable, __file__, "host", farm.address, str(args.slots)]
                    doomed.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
                for host in doomed:
                    assert host.stdout is not None
                    if not host.stdout.readline():
                        raise RuntimeError("a host did not start")
                at = time.monotonic()
                for host in doomed:
                    host.kill()
                for number in range(1, count + 1):
                    while farm.ask("describe")["free"] < free - args.slots * (count - number):
                        if time.monotonic() - at > WAIT_LIMIT:
                            raise TimeoutError("a dead host's slots were not freed")
                        time.sleep(0.05)
                    freed.append(time.monotonic() - at)
                _end(doomed)
        finally:
            _end(doomed)
        touched = sum(driver.pid[slot] != before[slot] for slot in before) + driver.history.count(Lost)
        verdict = bench.judge(driver)
    measured = "slots free after p50 %.1f s, p99 %.1f s, longest %.1f s; the other host: %d of its slots touched" % (
        p(freed, 50),
        p(freed, 99),
        max(freed),
        touched,
    )
    wanted = "free <= 10 s, another host's environments untouched"
    return row("%d hosts killed (%d at a time)" % (args.count, args.at_a_time), wanted, measured, verdict)


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
    processes.clear()


def host(args: argparse.Namespace) -> int:
    """A host that steps until it is killed; `hosts` starts it."""
    with Pool(ENV, [(args.farm, args.slots)]) as pool, Driver(pool, OTHERS) as driver:
        driver.until(lambda: len(driver.sent_at) == args.slots, "its first steps")
        print("steps", flush=True)
        driver.until(lambda: False, "its end", 600.0)
    return 0


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


def partitions(args: argparse.Namespace) -> int:
    """A farm in a network namespace of its own, cut off for longer or shorter than two heartbeats."""
    rng = random.Random(args.seed)
    with Bench() as bench, contextlib.closing(Wire()) as wire:
        key = bench.folder / "farm.key"
        subprocess.run([sys.executable, str(ROOT / "farm.py"), "--new-key", str(key)], check=True, capture_output=True)
        near = bench.farm(args.slots, "--key-file", str(key), takes=args.takes)
        far = Farm(
            *(bench.folder, args.slots, ["--key-file", str(key)], ENV, bench.kwargs(takes=args.takes)),
            host=Wire.FAR,
            before=["ip", "netns", "exec", wire.space],
        )
        try:
            driver = bench.drive([(near.address, args.slots), (far.address, args.slots)], key_file=key)
            beyond = [slot for slot in driver.pid if driver.pool.name_of(slot) == far.address]
            short, back = 0, []
            for number in range(args.count):
                end, seconds = ("near", "far")[number % 2], rng.uniform(0.1, 8.0)
                at = time.monotonic()
                wire.turn(end, "down")
                time.sleep(seconds)
                wire.turn(end, "up")
                plugged = time.monotonic()

                def is_back(plugged: float = plugged) -> bool:
                    return all(driver.sent_at[slot] > plugged for slot in beyond)

                driver.until(is_back, "the farm beyond the wire")
                back.append(min(driver.sent_at[slot] for slot in beyond) - plugged)
                short += not any(driver.lost_at.get(slot, 0.0) > at for slot in beyond)
                time.sleep(0.5)
            touched = sum(isinstance(e, Lost) and e.slot not in beyond for e in driver.history.events)
            verdict = bench.judge(driver)
        finally:
            far.stop()
    measured = "%s from the wire's return to the next step; %d cuts cost nothing; %d slots of the near farm lost" % (
        times(back),
        short,
        touched,
    )
    wanted = "0 lost, 0 doubled, 0 swapped, 0 cross-slot; back <= 2 s"
    return row("%d partitions of network namespaces, 0.1 to 8 s" % args.count, wanted, measured, verdict)


INSIDE = ["nan", "inf", "wrong_shape", "raise", "raise_unpicklable", "exit", "segfault", "abort", "spin", "hang_in_c"]
INSIDE += ["stop", "leak", "slow", "print", "grandchild"]


def soak(args: argparse.Namespace) -> int:
    """SAC learns Pendulum from two farms while everything fails at random; before and after, nothing does."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from agents import networks

    with Bench() as bench:
        switch = bench.folder / "harm"
        kwargs = {"fault": INSIDE, "probability": args.inside, "only_if": str(switch), "takes": args.takes}
        options = ["--step-timeout", "1", "--recycle-memory", "300M", "--memory", "600M", "--spares", "1"]
        env = "journal:FaultyPendulum"
        both = [Farm(bench.folder, args.slots, options, env, kwargs) for _ in range(2)]
        proxies = [bench.proxy(farm, every=args.every, seed=args.seed) for farm in both]
        for proxy in proxies:
            proxy.say("calm")
        try:
            with Farmer(env, [(proxy.addresses[0], args.slots) for proxy in proxies], seed=args.seed) as farmer:
                agent = networks.make_sac(
                    farmer.observation_space,
                    farmer.action_space,
                    seed=args.seed,
                    hidden=(64, 64),
                    learning_rate=1e-3,
                    memory_limit=args.memory,
                    updates_per_step=args.updates,
                )
                trouble = Trouble(args, agent, farmer, both, proxies, switch)
                trouble.start()
                with contextlib.suppress(KeyboardInterrupt):
                    agent.fit(farmer, nb_steps=10**9, verbose=0)
                trouble.join(30)
                if trouble.error is not None:
                    raise trouble.error
                if not trouble.done:
                    raise KeyboardInterrupt
                played = agent.test(farmer, nb_episodes=10, visualize=False, verbose=0)
                farmer.abandon()
                end = time.monotonic() + 10
                while farmer.busy and time.monotonic() < end:
                    time.sleep(0.05)
                ledgers = [farm["ledger"] for farm in farmer.status()["farms"]]
        finally:
            for farm in both:
                farm.stop()
    adds_up = all(ledger["sent"] == sum(n for name, n in ledger.items() if name != "sent") for ledger in ledgers)
    told = {name: sum(ledger[name] for ledger in ledgers) for name in ledgers[0] if name not in ("sent", "done")}
    print("ledgers: %s" % ledgers)
    measured = "%s; goodput %.1f %% of fault-free; mean return of 10 episodes %.0f; steps not done: %s; ledger %s" % (
        trouble.summary(),
        100 * trouble.goodput(),
        float(np.mean(played.history["episode_reward"])),
        ", ".join("%d %s" % (n, name) for name, n in told.items() if n) or "none",
        "sums" if adds_up else "**wrong**",
    )
    wanted = "drift <= 1 %, goodput >= 95 %, Pendulum is learnt (about -150)"
    row("%g min of SAC on Pendulum under faults of all kinds" % args.minutes, wanted, measured, None)
    return 0 if adds_up else 1


class Trouble(threading.Thread):
    """Breaks things by a Poisson process, each kind with a rate of its own, and keeps an eye on host and farms."""

    def __init__(
        self,
        args: argparse.Namespace,
        agent: Any,
        farmer: Farmer,
        farms: list[Farm],
        proxies: list[Proxy],
        switch: Path,
    ):
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self.done = False
        self.counts: dict[str, int] = {}
        self.samples: list[dict[str, float]] = []
        self._args, self._agent, self._farmer = args, agent, farmer
        self._farms, self._proxies, self._switch = farms, proxies, switch
        self._rng = random.Random(args.seed)
        self._spans: dict[str, list[tuple[float, float]]] = {"calm": [], "harm": []}  # seconds, steps
        self._network: dict[str, int] = {}

    def run(self) -> None:
        try:
            self._run()
            self.done = True
        except BaseException as error:
            self.error = error
        os.kill(os.getpid(), signal.SIGINT)  # `fit` ends between two steps

    def _run(self) -> None:
        self._span(self._args.warm_up, None)
        self._span(self._args.calm, "calm")
        self._switch.touch()
        for proxy in self._proxies:
            proxy.say("harm")
        self._span(60 * self._args.minutes, "harm")
        self._switch.unlink()
        for proxy in self._proxies:
            proxy.say("calm")
            for kind, count in proxy.counts().items():
                self._network[kind] = self._network.get(kind, 0) + count
        self._span(15.0, None)
        self._span(self._args.calm, "calm")

    def _span(self, seconds: float, name: str | None) -> None:
        """Lets time pass, with or without faults; a look at everything every second."""
        begin, steps = time.monotonic(), self._agent.step
        rates = {"kill": self._args.kill, "stop": self._args.kill, "away": self._args.away}
        due = {kind: begin + self._rng.expovariate(1 / mean) for kind, mean in rates.items()}
        looked = 0.0
        while (now := time.monotonic()) < begin + seconds:
            if name == "harm":
                for kind, at in due.items():
                    if now >= at:
                        self._harm(kind)
                        due[kind] = time.monotonic() + self._rng.expovariate(1 / rates[kind])
            if now - looked >= 1.0:
                looked = now
                if name is not None:
                    self.samples.append(self._look(now))
            time.sleep(0.1)
        if name is not None:
            self._spans[name].append((time.monotonic() - begin, self._agent.step - steps))
        print("%s: %d steps in %.0f s" % (name, self._agent.step - steps, seconds), file=sys.stderr, flush=True)

    def _harm(self, kind: str) -> None:
        if kind == "away":  # the second farm: the first one's daemon lives through all of it, so that it can be watched
            farm, proxy = self._farms[1], self._proxies[1]
            kind = self._rng.choice(("farm killed", "farm stopped", "farm cut off"))
            if kind == "farm killed":
                farm.kill()
                farm.start()
            else:
                os.kill(farm.pid, signal.SIGSTOP) if kind == "farm stopped" else proxy.say("hold")
                time.sleep(6.0)
                os.kill(farm.pid, signal.SIGCONT) if kind == "farm stopped" else proxy.say("go")
        else:
            workers = [pid for farm in self._farms for pid in farm.children()]
            if not workers:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rng.choice(workers), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            kind = "kill -9" if kind == "kill" else "SIGSTOP"
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def _look(self, now: float) -> dict[str, float]:
        found = {"at": now}
        for name, pid in (("host", os.getpid()), ("farm", self._farms[0].pid)):
            process = psutil.Process(pid)
            found["RSS of the " + name] = process.memory_info().rss
            found["descriptors of the " + name] = process.num_fds()
            found["threads of the " + name] = process.num_threads()
            zombies = 0
            for child in process.children():
                with contextlib.suppress(psutil.Error):
                    zombies += child.status() == psutil.STATUS_ZOMBIE
            found["zombies of the " + name] = zombies
        return found

    def goodput(self) -> float:
        """Steps per second under faults as a share of those without."""
        rate = {name: sum(n for _, n in spans) / sum(s for s, _ in spans) for name, spans in self._spans.items()}
        return rate["harm"] / rate["calm"]

    def summary(self) -> str:
        """What was done to them, and how much of everything they hold at the end, beside the beginning."""
        drifts = []
        tenth = max(1, min(len(self.samples) // 5, int(self._args.calm)))
        for name in self.samples[0]:
            if name == "at":
                continue
            before, after = (
                statistics.median(sample[name] for sample in part)
                for part in (self.samples[:tenth], self.samples[-tenth:])
            )
            if name.startswith("zombies"):
                drifts.append("%d %s" % (after, name))
            elif name.startswith("RSS"):
                drifts.append(
                    "%s %.0f -> %.0f MB (%+.1f %%)" % (name, before / 2**20, after / 2**20, _drift(before, after))
                )
            else:
                drifts.append("%s %d -> %d" % (name, before, after))
        done = dict(self.counts, **self._network)
        return "%s; %s" % (", ".join("%d %s" % (n, kind) for kind, n in done.items()), ", ".join(drifts))


def _drift(before: float, after: float) -> float:
    return 100 * (after - before) / before


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run: Callable[[argparse.Namespace], int], **numbers: float) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=(run.__doc__ or "").splitlines()[0])
        sub.set_defaults(run=run)
        for name, default in dict(numbers, seed=0).items():
            sub.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
        return sub

    command(kills, count=1000, slots=4, spares=0, takes=0.02, block=50, calm=5.0, pause=0.1)
    command(hangs, count=200, slots=4, takes=0.02, deadline=0.5, pause=0.1)
    leaking = command(leak, steps=10_000, slots=2, cap=200, length=25, takes=0.0, limit=600.0)
    leaking.add_argument("--hard", action="store_true", help="without recycling: the cap ends workers in mid-episode")
    command(crashloop, slots=4, takes=0.02, seconds=60.0)
    command(network, faults=10_000, steps=200_000, farms=2, proxies=8, slots=4, every=30, limit=1500.0)
    command(farms, count=200, slots=2, at_a_time=4, takes=0.02, calm=10.0)
    command(hosts, count=50, slots=2, at_a_time=5, takes=0.02)
    command(partitions, count=20, slots=2, takes=0.02)
    command(
        *(soak,),
        **{
            "minutes": 60.0,
            "slots": 4,
            "takes": 0.05,
            "updates": 0.5,
            "memory": 20_000,
            "calm": 60.0,
            "warm_up": 180.0,
        },
        **{"inside": 0.001, "every": 2000, "kill": 20.0, "away": 120.0},
    )
    one = command(host)
    one.add_argument("farm")
    one.add_argument("slots", type=int)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 when the history is no correct one."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = parse(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
