"""Thousands of faults one after the other, and what farm and host hold after each thousand, for `bench.py drift`."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from typing import Any

import numpy as np
import psutil

from benchmarks.faults.parts import WAIT_LIMIT, Bench, Farm, Proxy, row
from farmer import Farmer
from farmer.connection import Connection
from farmer.farmlist import load_farmlist
from simulators.faulty import NUMBERS
from wire.errors import FarmError

ENV = "faulty"
OTHERS = 6  #: slots beside those of the host: of other hosts, and of leases that nobody uses until they expire
USEFUL = 11  #: steps after which a worker's end is no failure to start; else its slot would wait in quarantine
#: What goes wrong, and how often beside the others. A worker's start is dear, so fewer of them end.
SHARES = {
    **{"nan": 8, "raise": 8, "wrong_shape": 4, "raise_unpicklable": 4, "print": 2},
    **{"exit": 1, "segfault": 1, "stop": 1, "kill -9": 4},
    **{"cut connections": 8, "another host": 10, "a lease left alone": 1, "a stranger": 6},
}


def drift(args: argparse.Namespace) -> int:
    """What a farm and a host hold after thousands of faults."""
    rng, counts = random.Random(args.seed), Counter[str]()
    with Bench() as bench:
        options = ["--step-timeout", "0.5", "--reset-timeout", "2", "--start-timeout", "20", "--spares", "1"]
        farm = Farm(bench.folder, args.slots + OTHERS, options, ENV, {"commands": True, "length": 50, "takes": 0.002})
        try:
            proxy = bench.proxy(farm)
            proxy.say("calm")
            with Farmer(ENV, [(proxy.addresses[0], args.slots)]) as pool, Hurry(pool) as hurry:
                looks = [_look(farm, 0)]
                for number in range(1, args.faults + 1):
                    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
                    counts[kind] += 1
                    _harm(kind, rng, farm, proxy, hurry)
                    if number % (args.faults // args.looks) == 0:
                        looks.append(_look(farm, number))
                steps, lost = hurry.steps, hurry.lost
        finally:
            farm.stop()
    first, last = looks[1], looks[-1]
    changes = [
        "RSS of the %s %s MB" % (who, ", ".join("%.2f" % (look["RSS of the " + who] / 2**20) for look in looks))
        for who in ("farm", "host")
    ]
    growth = max(last["RSS of the " + who] / first["RSS of the " + who] - 1 for who in ("farm", "host"))
    measured = "after %s faults: %s; descriptors of the farm %s, threads %s; %d steps, %d told as lost; %s" % (
        ", ".join("%d" % look["faults"] for look in looks),
        "; ".join(changes),
        ", ".join("%d" % look["descriptors"] for look in looks),
        ", ".join("%d" % look["threads"] for look in looks),
        steps,
        lost,
        ", ".join("%d %s" % (n, kind) for kind, n in counts.most_common()),
    )
    row("%d faults one after the other" % args.faults, "drift <= 1 % after the first look", measured, None)
    return int(growth > 0.01)


class Hurry(threading.Thread):
    """Steps all slots as fast as they go, and gives out orders for faults; keeps nothing, so as not to grow itself."""

    def __init__(self, pool: Farmer):
        super().__init__(name="hurry", daemon=True)
        self.pool = pool
        self.orders: deque[int] = deque()  # numbers of faults that the next slots do
        self.made: Counter[int] = Counter()  # steps of each slot since its last loss
        self.pid: dict[int, int] = {}
        self.steps = self.lost = 0
        self.trouble: BaseException | None = None
        self._over = threading.Event()

    def __enter__(self) -> Hurry:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self.join(WAIT_LIMIT)

    def order(self, fault: int) -> None:
        """The next slot that has worked enough does this."""
        end = time.monotonic() + WAIT_LIMIT
        while len(self.orders) > 2:
            if self.trouble is not None:
                raise self.trouble
            if time.monotonic() > end:
                raise TimeoutError("nobody does what was ordered: %s" % self.pool.status())
            time.sleep(0.005)
        self.orders.append(fault)

    def run(self) -> None:
        try:
            ready: set[int] = set()
            while not self._over.is_set():
                vacant = self.pool.vacant()
                if vacant:
                    self.pool.reset(vacant)
                self._take(ready)
                slots = sorted(ready)
                ready.clear()
                if slots:
                    self.pool.send(np.array([[0.0, self._next(slot)] for slot in slots], "float32"), slots)
        except BaseException as error:
            self.trouble = error

    def _next(self, slot: int) -> int:
        return self.orders.popleft() if self.orders and self.made[slot] >= USEFUL else 0

    def _take(self, ready: set[int]) -> None:
        for got in self.pool.collect(1, WAIT_LIMIT):
            ready.discard(got.slot)
            self.lost += got.lost
            self.steps += not got.lost and not got.first
            self.made[got.slot] = 0 if got.lost else self.made[got.slot] + (not got.first)
            if got.first:
                self.pid[got.slot] = got.info["pid"]
            if not (got.terminated or got.truncated):
                ready.add(got.slot)


def _harm(kind: str, rng: random.Random, farm: Farm, proxy: Proxy, hurry: Hurry) -> None:
    if kind in NUMBERS:
        hurry.order(NUMBERS[kind])
    elif kind == "kill -9":
        victims = [pid for slot, pid in list(hurry.pid.items()) if hurry.made[slot] >= USEFUL]
        if victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(victims), signal.SIGKILL)
        time.sleep(0.05)
    elif kind == "cut connections":
        proxy.say("cut")
        time.sleep(0.1)
    elif kind == "a stranger":
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", farm.port), 2.0) as stranger:
            stranger.sendall(rng.randbytes(60))
            stranger.recv(10)
    else:
        with contextlib.suppress(FarmError):  # the free slots are taken for the moment
            _visit(farm, kind == "another host")


def _visit(farm: Farm, is_polite: bool) -> None:
    """Another host's short stay; one that is not polite goes without releasing what it has leased."""
    if is_polite:
        with Farmer(ENV, [(farm.address, 1)]) as other:
            other.reset([0])
            other.recv(1, 5.0)
        return
    with contextlib.closing(Connection(load_farmlist([(farm.address, 1)])[0])) as line:
        line.acquire(ENV, 1)


def _look(farm: Farm, faults: int) -> dict[str, float]:
    """How much both hold, once what the last faults began is over."""
    time.sleep(3.0)
    seen: dict[str, float] = {"faults": faults}
    for name, pid in (("farm", farm.pid), ("host", os.getpid())):
        seen["RSS of the " + name] = psutil.Process(pid).memory_info().rss
    process = psutil.Process(farm.pid)
    seen["descriptors"], seen["threads"] = process.num_fds(), process.num_threads()
    print(
        "%d faults: %s" % (faults, ", ".join("%s %d" % item for item in seen.items())),
        file=sys.stderr,
        flush=True,
    )
    return seen
