"""Gradient updates per second beside SBX, Stable-Baselines3 and keras-rl2, in the same run.

python -m benchmarks.peers.make        # once: makes the peers' environments
python -m benchmarks.learning.updates      # all cases, about 20 minutes; --cases sac-339 for one

An update is one batch drawn from a replay of 100,000 random transitions, and one step of critic, actor and (SAC)
temperature with its targets. Each library runs in a process of its own with its threads as it sets them, makes as many
updates in a call as makes it fastest, and rests while another one is timed: rounds go A, B, C, A, B, C. A ratio is the
median of the rounds' ratios, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from dataclasses import dataclass

from benchmarks.peers.make import Missing, python_of
from benchmarks.shared.peer_process import Peer, PeerError
from benchmarks.shared.table import machine, table, verdict

OURS = "ours"


@dataclass(frozen=True)
class Case:
    """Sizes, and the least ratio to each peer."""

    agent: str
    obs: int
    actions: int
    goals: dict[str, float]
    hidden: tuple[int, ...] = (256, 256)
    batch: int = 256

    def command(self, library: str) -> list[str]:
        """How the library is started for this case."""
        starts = {
            OURS: lambda: [sys.executable, "-m", "benchmarks.peers.ours_updates"],
            "SBX": lambda: [python_of("sbx"), "-m", "benchmarks.peers.sbx", "--library", "sbx"],
            "SB3": lambda: [python_of("sbx"), "-m", "benchmarks.peers.sbx", "--library", "sb3"],
            "keras-rl2": lambda: [python_of("keras-rl2"), "-m", "benchmarks.peers.keras_rl2"],
        }
        sizes = ["--agent", self.agent, "--obs", str(self.obs), "--actions", str(self.actions)]
        return starts[library]() + sizes + ["--batch", str(self.batch), "--hidden", *map(str, self.hidden)]

    def __str__(self) -> str:
        widths = "-".join(map(str, self.hidden))
        return "%s %d/%d, %s, batch %d" % (self.agent.upper(), self.obs, self.actions, widths, self.batch)


# The goals are issue 3's; where it has none for a peer, the peer is shown all the same.
CASES = {
    "sac-339": Case("sac", 339, 22, {"SBX": 1.3, "SB3": 3.0}),
    "sac-3": Case("sac", 3, 1, {"SBX": 1.0, "SB3": 3.0}),
    "ddpg-339": Case("ddpg", 339, 22, {"SBX": 1.2, "keras-rl2": 5.0}),
    "ddpg-3": Case("ddpg", 3, 1, {"SBX": 1.2, "keras-rl2": 0.0}),
    "ddpg-small": Case("ddpg", 3, 1, {"SBX": 0.0, "keras-rl2": 10.0}, hidden=(16, 16, 16), batch=32),
}


def measure(case: Case, rounds: int, seconds: float, about: dict[str, str]) -> list[list[str]]:
    """The table's rows for a case; versions go to `about`. A library that fails is told on stderr and left out."""
    speeds: dict[str, list[float]] = {}
    calls = {}
    with contextlib.ExitStack() as running:
        peers = {}
        for library in (OURS, *case.goals):
            try:
                peer = running.enter_context(Peer(case.command(library)))
            except (Missing, PeerError) as error:
                print("%s: no figure for %s: %s" % (case, library, error), file=sys.stderr, flush=True)
                continue
            peers[library], speeds[library] = peer, []
            calls[library] = peer.about.pop("updates in a call")
            about.update(peer.about)
        for number in range(rounds):
            for library, peer in peers.items():
                updates, took = peer.run(seconds)
                speeds[library].append(updates / took)
            said = ", ".join("%s %.0f" % (library, found[-1]) for library, found in speeds.items())
            print("%s, round %d of %d: %s updates/s" % (case, number + 1, rounds, said), file=sys.stderr, flush=True)
    rows = []
    for library, found in speeds.items():
        middle = "%.0f" % statistics.median(found)
        spread = "%.0f-%.0f" % (min(found), max(found))
        row = [str(case), library, middle, spread, str(calls[library]), "", ""]
        if library != OURS and OURS in speeds:
            ratio = statistics.median(a / b for a, b in zip(speeds[OURS], found, strict=True))
            goal = case.goals[library]
            row[5:] = ["%.2f" % ratio, verdict(ratio, goal) if goal else "none"]
        rows.append(row)
    return rows


def main() -> int:
    """Prints the table; the exit code is 1 when a library is missing from it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="a library is timed for in a round")
    args = parser.parse_args()
    rows: list[list[str]] = []
    about: dict[str, str] = {}
    for name in args.cases:
        rows += measure(CASES[name], args.rounds, args.seconds, about)
    head = ("case", "library", "updates/s", "least-most", "updates a call", "ours / it", "goal")
    print(table(head, rows))
    print("\n%s.\n%s." % (machine(), ", ".join("%s %s" % pair for pair in about.items())))
    return int(len(rows) < sum(1 + len(CASES[name].goals) for name in args.cases))


if __name__ == "__main__":
    sys.exit(main())
