"""What acting for 64 observations costs beside acting for 1, with exploration noise and without.

python -m benchmarks.learning.acting

`agent.act` is what the loop of `fit` calls: it builds the batch, makes one forward pass, adds noise, clips and checks.
Observations are 339 floats, actions 22, networks 256-256. Rounds are interleaved and the medians are taken.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from agents import LocalPool, networks
from benchmarks.peers.ours_updates import Spaces
from benchmarks.shared.table import machine, table, verdict

OBS, ACTIONS, MANY, GOAL = 339, 22, 64, 2.0
ROUNDS, CALLS, WARM = 15, 100, 30


class Acting:
    """Calls of one agent for n observations; `round` times them."""

    def __init__(self, make: str, n: int, training: bool):
        self.name, self.n, self.training = make.removeprefix("make_").upper(), n, training
        env = Spaces(OBS, ACTIONS)
        self.agent = getattr(networks, make)(env.observation_space, env.action_space, seed=0, hidden=(256, 256))
        self.agent.prepare(LocalPool([env] * n))
        self.agent.training, self.agent.step = training, 10**6  # past its warm-up
        self.slots = list(range(n))
        for slot in self.slots:
            self.agent.began(slot)
        rows = np.random.default_rng(0).standard_normal((n, OBS)).astype(np.float32)
        self.states = [[row] for row in rows]  # window_length 1
        for _ in range(WARM):
            actions = self.agent.act(self.states, self.slots)
        assert actions.shape == (n, ACTIONS), actions.shape

    def round(self) -> float:
        """Microseconds a call."""
        start = time.perf_counter()
        for _ in range(CALLS):
            self.agent.act(self.states, self.slots)
        return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    """Prints the table."""
    makes = [make for make in ("make_sac", "make_ddpg") if hasattr(networks, make)]
    pairs = [(Acting(make, 1, noisy), Acting(make, MANY, noisy)) for make in makes for noisy in (True, False)]
    times: dict[Acting, list[float]] = {one: [] for pair in pairs for one in pair}
    for _ in range(ROUNDS):
        for one, found in times.items():
            found.append(one.round())
    rows = []
    for one, many in pairs:
        ratio = statistics.median(b / a for a, b in zip(times[one], times[many], strict=True))
        cost = ["%.0f" % statistics.median(times[acting]) for acting in (one, many)]
        how = "exploring" if one.training else "without noise"
        rows.append([one.name, how, *cost, "%.2f" % ratio, verdict(ratio, GOAL, most=True)])
    print(table(("agent", "acting", "1 observation, us", "%d observations, us" % MANY, "ratio", "goal"), rows))
    print("\n%s." % machine())


if __name__ == "__main__":
    main()
