"""What it is worth that episodes begin where they end first, and that resets begin by themselves and ahead of time.

python -m benchmarks.steps.placement            # about 2 minutes; --cases few resets for one of them

`few`: FEW[i] episodes on two farms of 4 slots, 20 and 60 ms a step, once as `Farmer.vacant(episodes)` says and once
in the order of the slots, the slow farm's first; beside the least time that any order can take.
`resets`: 8 environments with a barrier, 20 ms a step, 200 ms a reset, episodes of 20 to 60 steps; beside gymnasium's
AsyncVectorEnv, with 0, 1, 2 and 4 slots ahead. The ideal is a step that never waits for a reset.
`begin`: how long after the end's arrival a slot's next first observation comes, where the caller is away for 100 ms
after each `send`, beside the same with the reset sent when the caller is back, as it was before.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv

from benchmarks.shared.farm import ROOT, Episodes, local_farm
from benchmarks.shared.table import machine, table
from farmer import Farmer, make_vec

ENV = "benchmarks.shared.farm:Episodes"
FEW, LENGTH, EACH = (2, 3, 6, 12), 25, 4
STEP, SLOW, RESET = 0.02, 0.06, 0.2  #: s
ENVS, LEAST, MOST, AHEAD = 8, 20, 60, (0, 1, 2, 4)


# Few episodes.


def few(rounds: int, out: Path) -> str:
    """Seconds until the last of a few episodes ends."""
    rows = []
    with (
        local_farm(ENV, EACH, out / "slow", kwargs={"step": SLOW, "least": LENGTH, "most": LENGTH}) as slow,
        local_farm(ENV, EACH, out / "fast", kwargs={"step": STEP, "least": LENGTH, "most": LENGTH}) as fast,
        Farmer(ENV, [(slow, EACH), (fast, EACH)], seed=0) as pool,
    ):
        play(pool, 2 * EACH, lambda left: pool.vacant()[:left])  # so that all have been seen
        for episodes in FEW:
            placed, in_order = [], []
            for _ in range(rounds):
                placed.append(play(pool, episodes, pool.vacant))
                in_order.append(play(pool, episodes, lambda left: pool.vacant()[:left]))
            least = shortest(episodes)
            median = statistics.median(placed)
            rows.append(
                [episodes, "%.2f" % median, "%.2f" % statistics.median(in_order), "%.2f" % least]
                + ["%.0f %%" % (100 * least / median)]
            )
    head = ("episodes", "placed, s", "in the order of the slots, s", "least possible, s", "share of that")
    text = "Two farms of %d slots, %g and %g ms a step, episodes of %d steps.\n\n"
    return text % (EACH, 1000 * STEP, 1000 * SLOW, LENGTH) + table(head, rows)


def play(pool: Farmer, episodes: int, vacant: Callable[[int], list[int]]) -> float:
    """Seconds that so many episodes take."""
    start, left, running = time.perf_counter(), episodes, 0
    while left or running:
        begin = vacant(left) if left else []
        if begin:
            pool.reset(begin)
            left, running = left - len(begin), running + len(begin)
        batch = pool.recv()
        over = batch.terminated | batch.truncated
        running -= int(over.sum())
        slots = batch.slot[~over]
        if len(slots):
            pool.send(np.zeros((len(slots), 22), np.float32), slots)
    return time.perf_counter() - start


def shortest(episodes: int) -> float:
    """What the best order of all takes: each episode goes where it ends first."""
    ends = [(LENGTH * step, LENGTH * step) for step in (STEP, SLOW) for _ in range(EACH)]
    heapq.heapify(ends)
    last = 0.0
    for _ in range(episodes):
        last, each = heapq.heappop(ends)
        heapq.heappush(ends, (last + each, each))
    return last


# Slow resets.


def resets(rounds: int, seconds: float, out: Path) -> str:
    """Milliseconds a batch of a barrier whose environments have slow resets."""
    settings = {"step": STEP, "reset": RESET, "least": LEAST, "most": MOST}
    found: dict[str, list[float]] = {}
    slots = sum(ENVS + ahead for ahead in AHEAD)
    with local_farm(ENV, slots, out / "resets", kwargs=settings) as address:
        faces: dict[str, Any] = {"AsyncVectorEnv": AsyncVectorEnv([lambda: Episodes(**settings)] * ENVS)}
        for ahead in AHEAD:
            faces["make_vec, ahead=%d" % ahead] = make_vec(ENV, ENVS, [(address, slots)], ahead=ahead)
        try:
            for envs in faces.values():
                envs.reset(seed=0)
            for _ in range(rounds):
                for name, envs in faces.items():
                    found.setdefault(name, []).append(batch_s(envs, seconds))
        finally:
            for envs in faces.values():
                envs.close()
    rows = []
    for name, times in found.items():
        median = statistics.median(times)
        rows.append([name, "%.1f" % (1000 * median), "%.0f %%" % (100 * STEP / median)])
    text = "%d environments with a barrier, %g ms a step, %g ms a reset, episodes of %d to %d steps.\n\n"
    head = ("library", "ms a batch", "share of the ideal")
    return text % (ENVS, 1000 * STEP, 1000 * RESET, LEAST, MOST) + table(head, rows)


def batch_s(envs: gymnasium.vector.VectorEnv[Any, Any, Any], seconds: float) -> float:
    """Seconds a batch."""
    actions = np.zeros((ENVS, 22), np.float32)
    batches, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        envs.step(actions)
        batches += 1
    return (time.perf_counter() - start) / batches


def begin(rounds: int, out: Path) -> str:
    """Milliseconds that a caller who learns for 100 ms waits for the next first observation."""
    waits: dict[bool, list[float]] = {True: [], False: []}
    settings = {"step": STEP, "reset": 0.08, "least": 1, "most": 1}
    with (
        local_farm(ENV, 1, out / "begin", kwargs=settings) as address,
        make_vec(ENV, 1, [(address, 1)], "SameStep") as envs,
    ):
        envs.reset(seed=0)
        for _ in range(10 * rounds):
            for follow, found in waits.items():
                envs._pool.follow = follow
                envs.send(np.zeros((1, 22), np.float32))
                time.sleep(0.1)
                start = time.perf_counter()
                envs.recv(1)
                found.append(1000 * (time.perf_counter() - start))
    rows = [
        ["by itself", "%.1f" % statistics.median(waits[True])],
        ["when the caller is back", "%.1f" % statistics.median(waits[False])],
    ]
    text = "A caller who is away for 100 ms after each action; 20 ms a step, 80 ms a reset, one step an episode.\n\n"
    return text + table(("the reset begins", "ms that `recv` waits"), rows)


def main(argv: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=("few", "resets", "begin"), default=["few", "resets", "begin"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round of `resets`")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "placement", help="for the farms' logs")
    args = parser.parse_args(argv)
    for case in args.cases:
        if case == "few":
            print(few(args.rounds, args.out))
        elif case == "resets":
            print(resets(args.rounds, args.seconds, args.out))
        else:
            print(begin(args.rounds, args.out))
        print(flush=True)
    print("%s." % machine())


if __name__ == "__main__":
    main()
