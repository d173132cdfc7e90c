"""Microseconds per remote step on loopback beside Gymnasium's AsyncVectorEnv, in the same run.

python -m benchmarks.steps.latency

The environment does nothing: 339 floats out, 22 in, as OpenSim's L2M2019. Ours and the peer's rounds are interleaved
and the medians are taken, so that what else the machine does falls on both.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np

from benchmarks.shared.table import machine
from farmer import Farmer, RemoteEnv

ROOT = Path(__file__).resolve().parents[2]

ENV = "benchmarks.steps.latency:Noop"
ROUNDS, STEPS = 9, 400


class Noop(gymnasium.Env):
    """Costs nothing but its observation."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (339,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 1.0, (22,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(339, np.float32), {}

    def step(self, action):
        return np.full(339, action[0], np.float32), 0.0, False, False, {}


def start_farm(slots: int) -> tuple[subprocess.Popen, str]:
    """A farm of this file's environment; (process, address)."""
    command = [sys.executable, str(ROOT / "farm.py"), ENV, "--slots", str(slots), "--port", "0"]
    farm = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    found = re.match(r"farm at (\S+?),", farm.stdout.readline())
    return farm, found.group(1)


def median_rounds(*timed: Callable[[], float]) -> list[float]:
    """Runs the candidates in turn, ROUNDS times; the median of each in microseconds per call."""
    results: list[list[float]] = [[] for _ in timed]
    for _ in range(ROUNDS):
        for times, run in zip(results, timed, strict=True):
            times.append(run())
    return [statistics.median(times) for times in results]


def timed(step: Callable[[], object]) -> Callable[[], float]:
    """Microseconds per call of `step`."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        return (time.perf_counter() - start) / STEPS * 1e6

    return run


def main() -> None:
    """Prints the table."""
    action = np.full(22, 0.5, np.float32)
    farm, address = start_farm(9)
    try:
        with Farmer(ENV, [(address, 9)], slots=8) as pool:
            remote = RemoteEnv(ENV, [(address, 9)])
            remote.reset()
            pool.reset(pool.vacant())
            batch = pool.recv(min_ready=8)
            slots, actions = np.sort(batch.slot), np.tile(action, (8, 1))
            one = gymnasium.vector.AsyncVectorEnv([Noop])
            eight = gymnasium.vector.AsyncVectorEnv([Noop] * 8)
            one.reset()
            eight.reset()

            figures = median_rounds(
                timed(lambda: remote.step(action)),
                timed(lambda: one.step(actions[:1])),
                timed(lambda: pool.step(actions, slots)),
                timed(lambda: eight.step(actions)),
            )
            remote.close()
            one.close()
            eight.close()
    finally:
        farm.terminate()
        farm.wait()
        farm.stdout.close()
    print("| environments | ours, us per batch | AsyncVectorEnv, us per batch | ratio |")
    print("|---|---|---|---|")
    print("| 1 | %.0f | %.0f | %.2f |" % (figures[0], figures[1], figures[0] / figures[1]))
    print("| 8 | %.0f | %.0f | %.2f |" % (figures[2], figures[3], figures[2] / figures[3]))
    print("\n%s." % machine())


if __name__ == "__main__":
    main()
