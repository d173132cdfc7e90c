"""Peak memory of a full replay of a million transitions, beside one copy of what it holds.

python -m benchmarks.memory.replay

339 floats observed, 22 acted, episodes of 100 steps on 8 interleaved environments, and a tenth more transitions than
fit, so that the ring goes round. One copy is an observation, an action and a reward in float32 and two flags for each
transition held. A process of its own fills; its memory before the first transition is taken off its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import psutil

from benchmarks.shared.table import machine, table, verdict

OBS, ACTIONS, STREAMS, EPISODE = 339, 22, 8, 100
BATCH, BATCHES = 256, 200
GOAL = 1.1


def fill(limit: int) -> dict[str, float]:
    """Fills a replay and draws from it; peak bytes above the start, microseconds an added transition and a batch."""
    from agents.memory import ReplayMemory

    rng = np.random.default_rng(0)
    # Every transition's numbers differ from its neighbours', and none is made anew: that would be memory, too.
    frames = rng.standard_normal((1009, OBS)).astype(np.float32)
    actions = rng.uniform(-1, 1, (1013, ACTIONS)).astype(np.float32)
    memory = ReplayMemory(limit)
    me = psutil.Process()
    before = me.memory_info().rss
    steps = limit + limit // 10
    start = time.perf_counter()
    for i in range(steps):
        stream, t = i % STREAMS, i // STREAMS  # an episode's last observation is no other one's first
        at = (t + t // EPISODE + 131 * stream) % len(frames)
        over = (t + 1) % EPISODE == 0
        memory.add(
            stream, frames[at], actions[i % len(actions)], float(i % 7), frames[(at + 1) % len(frames)], over, False
        )
    added = (time.perf_counter() - start) / steps * 1e6
    full = len(memory)
    start = time.perf_counter()
    for _ in range(BATCHES):
        memory.draw(BATCH)
    drawn = (time.perf_counter() - start) / BATCHES * 1e6
    return {"held": full, "bytes": peak(me) - before, "us_added": added, "us_batch": drawn}


def peak(process: psutil.Process) -> int:
    """The most bytes of RAM that this process has had; where the system does not say, those that it has."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return int(process.memory_info().rss)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=1_000_000, help="transitions")
    parser.add_argument("--fill", action="store_true", help="be the process that fills")
    args = parser.parse_args()
    if args.fill:
        print(json.dumps(fill(args.limit)))
        return
    command = [sys.executable, "-m", "benchmarks.memory.replay", "--fill", "--limit", str(args.limit)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
    found = json.loads(done.stdout.splitlines()[-1])
    once = found["held"] * (4 * OBS + 4 * ACTIONS + 4 + 2)
    ratio = found["bytes"] / once
    mib = ["%.0f" % (size / 2**20) for size in (once, found["bytes"])]
    head = (
        "limit",
        "transitions held",
        "one copy, MiB",
        "peak, MiB",
        "ratio",
        "goal",
        "us to add",
        "us a batch of 256",
    )
    speeds = ["%.1f" % found["us_added"], "%.0f" % found["us_batch"]]
    row = [args.limit, int(found["held"]), *mib, "%.3f" % ratio, verdict(ratio, GOAL, most=True), *speeds]
    print(table(head, [row]))
    print("\n%s." % machine())


if __name__ == "__main__":
    main()
