"""How long a slot is without its environment after `kill -9` of its worker, and what the others lose by it.

python -m benchmarks.faults.recovery --kills 200 --spares 1

A real farm, a real host. Recovery is from the kill to the first observation of the slot's next episode at the host;
start-up is what one worker takes alone, from its process to its environment. Kills come one at a time, at any slot.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from farmer import Farmer
from farmhand.catalog import Catalog
from farmhand.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[2]

ENV = "benchmarks.faults.recovery:Sleeper"


class Sleeper:
    """A step of 10 ms."""

    def reset(self):
        return np.zeros(4, "float32")

    def step(self, action):
        time.sleep(0.01)
        return np.zeros(4, "float32"), 0.0, False, {}


def start_up(times: int = 7) -> list[float]:
    """Seconds from the start of one worker alone to its environment."""
    took = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as logs:
            farm = Supervisor(Catalog([ENV], folder=str(ROOT)), 1, log_dir=logs)
            began = time.perf_counter()
            farm.start()
            took.append(time.perf_counter() - began)
            farm.stop("measured")
    return took


def start_farm(slots: int, spares: int, logs: str) -> tuple[subprocess.Popen, str]:
    """A farm of this file's environment; (process, address)."""
    command = [sys.executable, str(ROOT / "farm.py"), ENV, "--slots", str(slots), "--spares", str(spares)]
    farm = subprocess.Popen(
        [*command, "--port", "0", "--log-dir", logs],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert farm.stdout is not None
    found = re.match(r"farm at (\S+?),", farm.stdout.readline())
    assert found is not None
    return farm, found.group(1)


class Host:
    """Keeps every slot stepping, and says when a lost one is back."""

    def __init__(self, pool: Farmer):
        self.pool = pool
        self.steps = 0

    def play(self, seconds: float, until: int | None = None) -> float | None:
        """Steps for so long, or until slot `until` has begun an episode; returns when that was."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.pool.reset(self.pool.vacant())
            batch = self.pool.recv()
            if until is not None and (batch.first & (batch.slot == until)).any():
                self._answer(batch)
                return time.perf_counter()
            self._answer(batch)
        return None

    def _answer(self, batch: object) -> None:
        self.steps += int((~batch.first & ~batch.lost).sum())
        going = batch.slot[~(batch.terminated | batch.truncated)]
        self.pool.send([[0.0] for _ in going], going)


def main() -> None:
    """Prints one line a figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--every", type=float, default=1.0, help="seconds from a recovery to the next kill")
    args = parser.parse_args()
    alone = start_up()
    with tempfile.TemporaryDirectory() as logs:
        farm, address = start_farm(args.slots, args.spares, logs)
        try:
            with Farmer(ENV, [(address, args.slots)]) as pool:
                recovered = kills(Host(pool), farm, address, args)
        finally:
            farm.terminate()
            farm.wait()
            farm.stdout.close()
    print("start-up of one worker alone, median of 7: %.0f ms" % (1e3 * np.median(alone)))
    print("recovered: %d of %d, with %d spare(s)" % (len(recovered), args.kills, args.spares))
    print("recovery, median, p99, max: %.0f, %.0f, %.0f ms" % tuple(1e3 * np.percentile(recovered, [50, 99, 100])))


def kills(host: Host, farm: subprocess.Popen, address: str, args: argparse.Namespace) -> list[float]:
    """Seconds of each recovery."""
    from Pyro4 import Proxy

    chance = random.Random(0)
    host.play(3.0)
    process = psutil.Process(farm.pid)
    cpu, began, steps = sum(process.cpu_times()[:2]), time.perf_counter(), host.steps
    recovered = []
    with Proxy("PYRO:farm@" + address) as status:
        for _ in range(args.kills):
            host.play(args.every)
            rows = [row for row in status.status() if row["state"] in ("ready", "stepping")]
            victim = chance.choice(rows)
            killed = time.perf_counter()
            os.kill(victim["pid"], signal.SIGKILL)
            back = host.play(30.0, until=victim["slot"])
            if back is not None:
                recovered.append(back - killed)
    took = time.perf_counter() - began
    print("steps a second meanwhile: %.0f" % ((host.steps - steps) / took))
    print("the farm's own processor time: %.1f %%" % (100 * (sum(process.cpu_times()[:2]) - cpu) / took))
    return recovered


if __name__ == "__main__":
    main()
