"""Whether collecting and learning leave each other alone, and whether the asked updates per step are made.

python -m benchmarks.learning.overlap

A local farm of 8 slots, each sleeping 50 ms a step, 339 floats out and 22 in; networks 256-256, batch 256. Rounds are
interleaved and medians are taken:

- environment steps/s with one update a step, beside those of an agent that never leaves its warm-up;
- updates/s of `fit` at 20 updates a step, where the learner is the limit, beside `agent.update` in a bare loop;
- updates made per step made, of a whole `fit`, for each ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from agents import networks
from benchmarks.shared.farm import ROOT, local_farm
from benchmarks.shared.table import machine, table, verdict
from farmer import Farmer

ENV, SLOTS = "benchmarks.shared.farm:Sleeper", 8
WARMUP, NEVER = 300, 10**9
RATIOS = {0.25: 1600, 1.0: 1000, 4.0: 400, 20.0: 100}  #: updates a step -> steps of a round
BARE = (8, 32)  #: updates in a call of the bare loop; the faster one counts
BARE_SECONDS = 4.0


class Learner:
    """An agent at one ratio, compiled and past its warm-up unless that never ends."""

    def __init__(self, kind: str, farmer: Farmer, ratio: float, warmup: int = WARMUP):
        names = {"sac": ["nb_steps_warmup"], "ddpg": ["nb_steps_warmup_critic", "nb_steps_warmup_actor"]}[kind]
        settings: dict[str, Any] = dict.fromkeys(names, warmup)
        make = {"sac": "make_sac", "ddpg": "make_ddpg"}[kind]
        self.farmer, self.ratio = farmer, ratio
        self.agent = getattr(networks, make)(
            farmer.observation_space,
            farmer.action_space,
            seed=0,
            hidden=(256, 256),
            batch_size=256,
            updates_per_step=ratio,
            **settings,
        )
        self.fit(WARMUP + 40)  # compiles
        if (self.agent.nb_updates > 0) != (warmup < NEVER):
            raise RuntimeError("%d updates after a warm-up of %d" % (self.agent.nb_updates, warmup))

    def fit(self, steps: int) -> tuple[float, float, float]:
        """Environment steps/s, updates/s, and updates per step, of one call of `fit`."""
        agent = self.agent
        step, updates, start = agent.step, agent.nb_updates, time.perf_counter()
        agent.fit(self.farmer, nb_steps=steps, verbose=0)
        took = time.perf_counter() - start
        step, updates = agent.step - step, agent.nb_updates - updates
        return step / took, updates / took, updates / step

    def bare(self, count: int) -> float:
        """Updates/s of nothing but updates."""
        updates, start = 0, time.perf_counter()
        while time.perf_counter() - start < BARE_SECONDS:
            self.agent.update(count)
            updates += count
        return updates / (time.perf_counter() - start)


def measure(kind: str, farmer: Farmer, rounds: int) -> list[list[str]]:
    """The table's rows for one agent."""
    idle = Learner(kind, farmer, 1.0, NEVER)
    learners = {ratio: Learner(kind, farmer, ratio) for ratio in RATIOS}
    for count in BARE:
        learners[20.0].bare(count)  # compiles, where its number of updates is a new one
    off, on, bound = [], [], []
    bare: dict[int, list[float]] = {count: [] for count in BARE}
    ratios: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    for number in range(rounds):
        off.append(idle.fit(RATIOS[1.0])[0])
        for ratio, learner in learners.items():
            steps, updates, achieved = learner.fit(RATIOS[ratio])
            ratios[ratio].append(achieved)
            if ratio == 1.0:
                on.append(steps)
            if ratio == 20.0:
                bound.append(updates)
        for count in BARE:
            bare[count].append(learners[20.0].bare(count))
        print(
            "%s, round %d of %d: %.1f steps/s idle, %.1f learning; %.0f updates/s collecting, %.0f bare"
            % (kind, number + 1, rounds, off[-1], on[-1], bound[-1], max(found[-1] for found in bare.values())),
            file=sys.stderr,
            flush=True,
        )
    best = max(BARE, key=lambda count: statistics.median(bare[count]))
    rows = [
        _row(kind, "steps/s, 1 update a step", "not learning", on, off, 0.95),
        _row(kind, "updates/s, 20 asked a step", "bare loop of %d a call" % best, bound, bare[best], 0.9),
    ]
    for ratio, found in ratios.items():
        achieved = statistics.median(found)
        off_by = max(abs(one / ratio - 1) for one in found)
        met = "within 5 %%: %s" % ("met" if off_by <= 0.05 else "MISSED")
        rows.append(
            [kind.upper(), "updates per step", "%g asked" % ratio, "%.4f" % achieved, "%g" % ratio]
            + ["%.3f, worst %.1f %% off" % (achieved / ratio, 100 * off_by), met]
        )
    return rows


def _row(kind: str, what: str, beside: str, ours: list[float], base: list[float], goal: float) -> list[str]:
    ratio = statistics.median(a / b for a, b in zip(ours, base, strict=True))
    figures = ["%.1f" % statistics.median(found) for found in (ours, base)]
    return [kind.upper(), what, beside, *figures, "%.3f" % ratio, verdict(ratio, goal)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", nargs="+", choices=("sac", "ddpg"), default=["sac", "ddpg"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "overlap", help="folder for the farm's logs")
    args = parser.parse_args()
    rows: list[list[str]] = []
    with (
        local_farm(ENV, SLOTS, args.out) as address,
        Farmer(ENV, [(address, SLOTS)], seed=0) as farmer,
    ):
        for kind in args.agents:
            rows += measure(kind, farmer, args.rounds)
    print(table(("agent", "what", "beside", "it", "the other", "ratio", "goal"), rows))
    print("\n%s." % machine())


if __name__ == "__main__":
    main()
