"""Large observations beside Gymnasium's AsyncVectorEnv, with and without its shared memory, in the same run.

python -m benchmarks.steps.large              # about 3 minutes; --slots 8 --observations "1 MB float32" for a part

Every library is in a process of its own; ours has its farm on loopback beside it. The environment answers at once with
an array that it has already, so what is measured is the way. Rounds go FarmVectorEnv, Farmer, AsyncVectorEnv, and a
ratio is the median of the rounds' ratios, so that what else the machine does falls on all. CPU is that of the process
that trains, which is all that a farm on another machine takes from it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared.farm import ROOT, local_farm
from benchmarks.shared.peer_process import Peer
from benchmarks.shared.table import machine, table
from benchmarks.shared.vector_env import LARGE
from benchmarks.steps.throughput import BOTH, median, microseconds, spread

ENV = "benchmarks.shared.vector_env:Frames"
START_LIMIT = 120.0  #: s
PEERS = {"async": "AsyncVectorEnv, shared memory", "async-piped": "AsyncVectorEnv, pipes"}


def measured(kind: str, slots: int, rounds: int, seconds: float, out: Path) -> dict[str, list[dict[str, Any]]]:
    """What each library's rounds found, by its name in the table."""
    folder = out / ("%s-%d" % (kind.replace(" ", "-"), slots))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in [*BOTH, *PEERS.values()]}
    message = {"seconds": seconds}
    with contextlib.ExitStack() as running:
        address = running.enter_context(local_farm(ENV, 2 * slots, folder, kwargs={"kind": kind}))
        farmlist = json.dumps([[address, 2 * slots]])
        ours = [
            sys.executable,
            "-m",
            "benchmarks.peers.ours_slots",
            "--env",
            ENV,
            "--farmlist",
            farmlist,
            "--slots",
            str(slots),
        ]
        mine = running.enter_context(Peer([*ours, "--vector"], START_LIMIT))
        theirs = {}
        for library, name in PEERS.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.peers.vector",
                "--library",
                "%s %s" % (library, kind),
                "--slots",
                str(slots),
            ]
            theirs[name] = running.enter_context(Peer(command, START_LIMIT))
        for number in range(rounds):
            for how in BOTH:
                found[how].append(mine.ask(dict(message, how=how)))
            for name, peer in theirs.items():
                found[name].append(peer.ask(message))
            said = ", ".join("%s %.0f us" % (name, microseconds(each[-1])) for name, each in found.items())
            print("%s, %d slots, round %d of %d: %s" % (kind, slots, number + 1, rounds, said), file=sys.stderr)
    return found


def rows_of(kind: str, slots: int, found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Of the table: each library, and how ours compare."""
    shape, dtype, *_ = LARGE[kind]
    size = math.prod(shape) * np.dtype(dtype).itemsize
    us = {name: [microseconds(each) for each in rounds] for name, rounds in found.items()}
    rows = []
    for name, times in us.items():
        cpu = median(each["cpu"] / each["steps"] * 1e6 for each in found[name])
        row = [kind, str(slots), name, "%.0f" % median(times), "%.0f" % median(size / t for t in times), "%.0f" % cpu]
        for peer in PEERS.values():
            ratios = [mine / its for mine, its in zip(times, us[peer], strict=True)]
            row.append("%.2f (%s)" % (median(ratios), spread(ratios, "%.2f")) if name in BOTH else "")
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--observations", nargs="+", choices=LARGE, default=list(LARGE))
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round of one library")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "large", help="for logs")
    args = parser.parse_args(argv)
    rows = []
    for kind in args.observations:
        for slots in args.slots:
            rows += rows_of(kind, slots, measured(kind, slots, args.rounds, args.seconds, args.out))
    beside = ["/ %s (least-most)" % name for name in PEERS.values()]
    print(table(("observation", "slots", "library", "us a step", "MB/s", "host CPU, us a step", *beside), rows))
    print("\n%s." % machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
