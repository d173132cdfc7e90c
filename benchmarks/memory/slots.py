"""What memory a farm takes beside its simulators, and a pool on the host for each slot.

python -m benchmarks.memory.slots

- the farm's own process, with 64 slots that have stepped;
- a worker beside a bare process that builds the same environment and steps it as often, of memory that no other process
  shares (PSS counts a page of n processes as 1/n; of processes that map the same libraries RSS counts them each time);
- the host's pool: what Python holds (tracemalloc) with many slots and with few, by slot.

Linux alone: it reads /proc. Each figure is the median of some rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from benchmarks.shared.farm import ROOT, local_farm
from benchmarks.shared.table import machine, table, verdict
from farmer import Farmer

FEW, MANY, STEPS = 8, 64, 300
ENVS = {"numpy alone": "benchmarks.shared.vector_env:Steps", "with gymnasium": "Pendulum-v1"}
GOALS = {"farm": 60.0, "worker": 5.0, "pool": 20.0}  #: MB, MB, KB: issue 5's
MB, KB = 1e6, 1e3

BARE = """
import importlib, json, sys, numpy
if ":" in sys.argv[1]:
    module, factory = sys.argv[1].split(":")
    sys.path.insert(0, sys.argv[2])
    env = getattr(importlib.import_module(module), factory)()
else:
    import gymnasium
    env = gymnasium.make(sys.argv[1])
env.reset(seed=1)
action = numpy.zeros(env.action_space.shape, numpy.float32)
for _ in range(int(sys.argv[3])):
    if any(env.step(action)[2:4]):
        env.reset()
print("ready", flush=True)
sys.stdin.read()
"""


def processes(address: str) -> tuple[psutil.Process, list[psutil.Process]]:
    """The farm's process at an address of this machine, and its workers."""
    port = int(address.rpartition(":")[2])
    for child in psutil.Process().children():
        if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in child.net_connections("tcp")):
            return child, child.children()
    raise RuntimeError("no child of this process listens at %s" % address)


def stepped(pool: Farmer, steps: int) -> None:
    """An episode in every slot, and so many steps of each."""
    shape = pool.action_space.shape
    pool.reset(pool.vacant())
    there = 0
    while there < pool.nb_slots:
        there += len(pool.recv(1, 300.0))
    slots = list(range(pool.nb_slots))
    for _ in range(steps):
        batch = pool.step(np.zeros((len(slots), *shape), np.float32), slots)
        if over := batch.slot[batch.terminated | batch.truncated].tolist():
            pool.reset(over)
            there = 0
            while there < len(over):
                there += len(pool.recv(1, 300.0))


@contextlib.contextmanager
def bare(env: str, steps: int) -> Iterator[psutil.Process]:
    """A process that steps the environment with no farm, and waits then."""
    # As a farm starts its workers: without threads of numpy's own.
    quiet = dict(os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    process = subprocess.Popen(
        [sys.executable, "-c", BARE, env, str(ROOT), str(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=quiet,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the bare process of %s did not step" % env)
        yield psutil.Process(process.pid)
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


def private(process: psutil.Process) -> int:
    """Bytes that only this process holds, and its share of what it holds with others."""
    return int(process.memory_full_info().pss)


def worker_rows(rounds: int, steps: int, out: Path) -> list[list[str]]:
    """What a worker takes beside the bare simulator."""
    rows = []
    for what, env in ENVS.items():
        ours, theirs, over = [], [], []
        for number in range(rounds):
            # One of each at a time, for whoever shares a page changes another one's part of it.
            folder = out / ("worker-%d" % number)
            with (
                local_farm(env, 1, folder, options=["--spares", "0"]) as address,
                Farmer(env, [(address, 1)]) as pool,
            ):
                stepped(pool, steps)
                (worker,) = processes(address)[1]
                with bare(env, steps) as other:
                    ours.append(private(worker))
                    theirs.append(private(other))
                    over.append(ours[-1] - theirs[-1])
            print("worker, %s, %d: %.2f MB over" % (what, number + 1, over[-1] / MB), file=sys.stderr, flush=True)
        extra = statistics.median(over) / MB
        sizes = "%.1f MB, bare %.1f MB" % (statistics.median(ours) / MB, statistics.median(theirs) / MB)
        rows.append(["a worker over its simulator, %s" % what, sizes, "%.2f MB" % extra])
        rows[-1].append(verdict(extra, GOALS["worker"], most=True))
    return rows


def farm_row(rounds: int, steps: int, out: Path) -> list[str]:
    """What the farm's process holds."""
    sizes = []
    for number in range(rounds):
        env = ENVS["numpy alone"]
        with local_farm(env, MANY, out / ("farm-%d" % number)) as address, Farmer(env, [(address, MANY)]) as pool:
            stepped(pool, steps)
            sizes.append(processes(address)[0].memory_info().rss)
        print("farm, %d: %.1f MB" % (number + 1, sizes[-1] / MB), file=sys.stderr, flush=True)
    size = statistics.median(sizes) / MB
    goal = verdict(size, GOALS["farm"], most=True)
    return ["the farm's process, %d slots" % MANY, "RSS", "%.1f MB" % size, goal]


def pool_row(rounds: int, steps: int, out: Path) -> list[str]:
    """What each further slot adds to the host's pool; measured in processes of their own, which nothing else fills."""
    slopes = []
    env = ENVS["numpy alone"]
    with local_farm(env, MANY, out / "pool") as address:
        for number in range(rounds):
            few, many = (_traced_elsewhere(address, slots, steps) for slots in (FEW, MANY))
            slopes.append((many - few) / (MANY - FEW) / KB)
            print("pool, %d: %.2f KB a slot" % (number + 1, slopes[-1]), file=sys.stderr, flush=True)
    slope = statistics.median(slopes)
    what = "the host's pool, each slot from %d to %d" % (FEW, MANY)
    return [what, "its last observation included", "%.2f KB" % slope, verdict(slope, GOALS["pool"], most=True)]


def _traced_elsewhere(address: str, slots: int, steps: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory.slots", "--traced", json.dumps([address, slots, steps])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout)


def traced(address: str, slots: int, steps: int) -> int:
    """Bytes that a pool of so many slots holds, of all that Python gives out."""
    tracemalloc.start()
    with Farmer(ENVS["numpy alone"], [(address, slots)], slots=slots) as pool:
        stepped(pool, steps)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=("farm", "worker", "pool"), default=["farm", "worker", "pool"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each slot before it is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "memory", help="folder for logs")
    parser.add_argument("--traced", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.traced is not None:
        print(traced(*args.traced))
        return 0
    if not sys.platform.startswith("linux"):
        print("memory.py reads /proc, and this is %s" % sys.platform, file=sys.stderr)
        return 2
    rows: list[list[str]] = []
    if "farm" in args.cases:
        rows.append(farm_row(args.rounds, args.steps, args.out))
    if "worker" in args.cases:
        rows += worker_rows(args.rounds, args.steps, args.out)
    if "pool" in args.cases:
        rows.append(pool_row(args.rounds, args.steps, args.out))
    print(table(("what", "how", "figure", "goal"), rows))
    print("\n%s." % machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
