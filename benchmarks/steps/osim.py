"""Real muscles stepped through a farm, beside bare processes and other people's vector environments, in the same run.

make osim && python -m benchmarks.peers.make osim      # once
python -m benchmarks.steps.osim                   # both cases, about 15 minutes on 2 cores

- walker: `osim:L2M2019`, 2D, difficulty 0, random actions; bare processes, one a slot, are what a machine can do;
- arm: `osim:Arm2D` under a fixed sequence of all-or-nothing actions, where one step in a hundred takes a second.

Rounds are interleaved, and a ratio is the median of the rounds' ratios. What arrives within a round counts. Processor
time is that of every process that a library has, the farm's and its host's included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.make import Missing, python_of
from benchmarks.shared.farm import ROOT, local_farm
from benchmarks.shared.osim_env import BODIES
from benchmarks.shared.peer_process import Peer
from benchmarks.shared.table import machine, table, verdict

START_LIMIT = 300.0  #: s for a library to stand
NAMES = {
    "ours": "ours",
    "bare": "bare processes",
    "async": "AsyncVectorEnv",
    "tianshou-half": "Tianshou Subproc, wait_num half",
}


class Side:
    """One library: its processes stand, and wait for rounds."""

    def __init__(self, name: str, body: str, slots: int, farm: str, until: ExitStack):
        python = sys.executable if name == "ours" else python_of("osim")
        base = [python, "-m", "benchmarks.peers.osim", "--library", name, "--body", body]
        # A bare process has one body, and no other means to have several than being several.
        each = (
            [["--first", str(slot)] for slot in range(slots)]
            if name == "bare"
            else [["--slots", str(slots), "--farm", farm]]
        )
        self.name, self.slots = name, slots
        self.peers = [until.enter_context(Peer(base + more, START_LIMIT)) for more in each]
        self.about = self.peers[0].about

    def round(self, seconds: float) -> dict[str, float]:
        """Steps a second, steps for each second of processor time, share of the slots' time inside the simulator."""
        cpu = processor_seconds()
        with ThreadPoolExecutor(len(self.peers)) as pool:
            found = list(pool.map(lambda peer: peer.ask({"seconds": seconds}), self.peers))
        cpu = processor_seconds() - cpu
        rate = sum(one["steps"] / one["seconds"] for one in found)
        # A second of warm-up costs as much as any other.
        busy = cpu / statistics.fmean(one["seconds"] + 1.0 for one in found)
        return {
            "steps": sum(one["steps"] for one in found),
            "rate": rate,
            "per cpu": rate / busy,
            "inside": sum(one["inside"] / one["seconds"] for one in found) / self.slots,
            "longest": max(one["longest"] for one in found),
        }


def processor_seconds() -> float:
    """Of every process that this one has started, directly or not, and that lives."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def measure(
    body: str, names: list[str], slots: int, rounds: int, seconds: float, out: Path
) -> tuple[dict[str, list[dict[str, float]]], dict[str, Any]]:
    """The rounds of each library, and the versions of the libraries."""
    farm = local_farm(
        "osim:" + body, slots, out / body, python_of("osim"), BODIES[body], ["--spares", "0", "--step-timeout", "300"]
    )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    about: dict[str, Any] = {}
    with farm as address, ExitStack() as until:
        sides = [Side(name, body, slots, address, until) for name in names]
        for number in range(rounds):
            for side in sides:
                found[side.name].append(side.round(seconds))
                about.update(side.about)
                said = json.dumps({key: round(value, 3) for key, value in found[side.name][-1].items()})
                line = "%s, round %d of %d, %s: %s" % (body, number + 1, rounds, side.name, said)
                print(line, file=sys.stderr, flush=True)
    return found, about


def ratio(found: dict[str, list[dict[str, float]]], key: str, name: str) -> float:
    """Ours by another's, the median of the rounds."""
    return statistics.median(a[key] / b[key] for a, b in zip(found["ours"], found[name], strict=True))


def middle(rounds: list[dict[str, float]], key: str) -> float:
    """The median of a figure."""
    return statistics.median(one[key] for one in rounds)


def text_of(body: str, slots: int, found: dict[str, list[dict[str, float]]]) -> str:
    """A table."""
    rows = []
    for name, rounds in found.items():
        beside = ["", "", ""]
        if name != "ours":
            by_wall = ratio(found, "rate", name)
            goal = verdict(by_wall, 0.97) if name == "bare" else "none"
            beside = ["%.3f" % by_wall, "%.3f" % ratio(found, "per cpu", name), goal]
        rows.append(
            [
                NAMES[name],
                "%.0f" % sum(one["steps"] for one in rounds),
                "%.1f" % middle(rounds, "rate"),
                "%.1f" % middle(rounds, "per cpu"),
                "%.1f %%" % (100 * middle(rounds, "inside")),
                "%.2f" % max(one["longest"] for one in rounds),
                *beside,
            ]
        )
    head = ("library", "steps", "steps/s", "steps per processor second", "time inside the simulator")
    head += ("longest step, s", "ours / it, steps/s", "per processor second", "goal")
    return "osim:%s, %d slots.\n\n%s" % (body, slots, table(head, rows))


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; the exit code is 2 where OpenSim is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=("walker", "arm"), default=["walker", "arm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a round")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "osim-steps", help="for logs")
    args = parser.parse_args(argv)
    about: dict[str, Any] = {}
    cases = {
        "walker": ("L2M2019", ["ours", "bare", "async"], 2),
        "arm": ("Arm2D", ["ours", "async", "tianshou-half"], 8),
    }
    for case in args.cases:
        body, names, slots = cases[case]
        try:
            found, versions = measure(body, names, slots, args.rounds, args.seconds, args.out)
        except Missing as error:
            print("osim.py: %s" % error, file=sys.stderr)
            return 2
        about.update(versions)
        print(text_of(body, slots, found) + "\n", flush=True)
    print("%s.\n%s." % (machine(), ", ".join("%s %s" % pair for pair in about.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
