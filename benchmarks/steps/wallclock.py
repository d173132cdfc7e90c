"""Minutes instead of hours: the time until a policy is good, with 1 slot and with 16.

python -m benchmarks.steps.wallclock                       # about 3 minutes: Pendulum-v1 with 50 ms of sleep a step

SAC trains through a local farm, one update a step in both runs, with the same settings and the same seed. Its actor is
copied every SNAP steps with the time since `fit` began. After the training each copy plays EPISODES whole episodes
without noise and without sleep; the first one whose mean return is at least GOAL says when the policy was good. Both
runs compile the network's programs before the clock starts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from benchmarks.shared.farm import ROOT, local_farm
from benchmarks.shared.table import machine, table, verdict

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from agents import LocalPool, networks
from agents.checkpoint import Checkpointer
from farmer import Farmer

from rl.callbacks import Callback  # isort: skip  (keras-rl's callbacks want agents' bridge first)

ENV = "benchmarks.shared.farm:slow_pendulum"
GOAL, EPISODES, SNAP = -200.0, 20, 100
#: Small networks and a high rate, with which Pendulum is learnt in few steps; what is compared are slots, not agents.
SETTINGS: dict[str, Any] = {
    "hidden": (64, 64),
    "learning_rate": 2e-3,
    "gamma": 0.98,
    "target_model_update": 0.02,
    "nb_steps_warmup": 400,
    "normalize_observations": False,
}
FARM_GOAL = 8.0  #: times as fast with 16 slots as with 1


class Copy(NamedTuple):
    """The actor at one moment."""

    seconds: float
    steps: int
    weights: list[np.ndarray]


class Copier(Callback):
    """Keeps a copy of the actor every SNAP steps."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self.steps = 0
        self.start = time.perf_counter()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, step: int, logs: dict[str, Any] | None = None) -> None:
        self.steps += 1
        if self.steps % SNAP == 0:
            took = time.perf_counter() - self.start
            self.copies.append(Copy(took, self.steps, self.model.actor.get_weights()))


def train(slots: int, steps: int, sleep: float, seed: int, out: Path) -> list[Copy]:
    """Copies of the actor in the course of one training."""
    copier = Copier()
    with (
        local_farm(ENV, slots, out / ("slots-%d" % slots), kwargs={"sleep": sleep}) as address,
        Farmer(ENV, [(address, slots)], seed=seed) as farmer,
    ):
        agent = networks.make_sac(farmer.observation_space, farmer.action_space, seed=seed, **SETTINGS)
        rehearse(agent, out / "start")
        agent.fit(farmer, nb_steps=steps, verbose=0, callbacks=[copier])
        made = agent.nb_updates
    print("%d slots: %d steps, %d updates in %.1f s" % (slots, steps, made, copier.copies[-1].seconds), flush=True)
    return copier.copies


def rehearse(agent: Any, folder: Path) -> None:
    """Compiles all programs of a training, and takes back everything else that this did."""
    before = Checkpointer(folder)
    before.save(agent)
    warmup, agent.nb_steps_warmup = agent.nb_steps_warmup, 20
    pool = LocalPool([gymnasium.make("Pendulum-v1") for _ in range(2)])
    agent.fit(pool, nb_steps=60, verbose=0)
    agent.nb_steps_warmup = warmup
    before.load(agent)


def first_good(copies: list[Copy], seed: int) -> tuple[Copy | None, list[float]]:
    """The first copy that reaches GOAL, and the mean return of each up to it."""
    pool = LocalPool([gymnasium.make("Pendulum-v1") for _ in range(EPISODES)])
    agent = networks.make_sac(pool.observation_space, pool.action_space, seed=seed, **SETTINGS)
    means: list[float] = []
    for copy in copies:
        if copy.steps <= SETTINGS["nb_steps_warmup"]:
            continue
        agent.actor.set_weights(copy.weights)
        agent.nb_episodes_begun = 0  # so all play the same episodes
        played = agent.test(pool, nb_episodes=EPISODES, visualize=False, verbose=0)
        means.append(float(np.mean(played.history["episode_reward"])))
        if means[-1] >= GOAL:
            return copy, means
    return None, means


def main(argv: list[str] | None = None) -> int:
    """Prints the table; the exit code is 1 when a run did not get there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs=2, default=[1, 16], metavar=("FEW", "MANY"))
    parser.add_argument("--steps", type=int, default=2000, help="of the run with few slots; that with many has 3 times")
    parser.add_argument("--sleep", type=float, default=0.05, help="seconds a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "wallclock", help="for the farms' logs")
    args = parser.parse_args(argv)
    rows, found = [], []
    for slots, steps in zip(args.slots, (args.steps, 3 * args.steps), strict=True):
        copies = train(slots, steps, args.sleep, args.seed, args.out)
        copy, means = first_good(copies, args.seed)
        found.append(copy)
        if copy is None:
            best = max(means, default=float("nan"))
            rows.append([slots, "not within %.1f" % copies[-1].seconds, "> %d" % steps, "best %.1f" % best])
        else:
            rows.append([slots, "%.1f" % copy.seconds, copy.steps, "%.1f" % means[-1]])
    print(table(("slots", "s until %g" % GOAL, "steps until then", "mean return of %d episodes" % EPISODES), rows))
    few, many = found
    if few is not None and many is not None:
        ratio = few.seconds / many.seconds
        print("\n%.1f times as fast; goal %s." % (ratio, verdict(ratio, FARM_GOAL)))
    print("\n%g ms a step, seed %d. %s." % (1000 * args.sleep, args.seed, machine()))
    return int(few is None or many is None)


if __name__ == "__main__":
    sys.exit(main())
