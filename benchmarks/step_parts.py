"""Where the time of eight remote steps goes: the farm's core, the call over Pyro4, and AsyncVectorEnv, in the same run.

python benchmarks/step_parts.py

The environment is that of `step_latency.py`; rounds are interleaved and the medians are taken.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
from step_latency import Noop, median_rounds, start_farm, timed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from farmer.connection import Connection
from farmer.farmlist import load_farmlist
from farmhand.catalog import Catalog
from farmhand.supervisor import Supervisor
from wire import codec, protocol

ENV, SLOTS = "step_latency:Noop", 8


def stepper(exchange: Callable[..., list], slots: list[int]) -> Callable[[], None]:
    """Resets the slots; returns a function that steps them all once, by `exchange(commands, wait, together)`."""
    seq = 0

    def all_slots(kind: int, body: bytes) -> None:
        nonlocal seq
        seq += 1
        missing = len(slots)
        commands = [[slot, seq, kind, body] for slot in slots]
        while missing:
            missing -= len(exchange(commands, 5.0, missing))
            commands = []

    all_slots(protocol.RESET, codec.encode({"seed": None, "options": None}))
    action = codec.encode({"action": np.full(22, 0.5, np.float32), "repeat": 1})
    return lambda: all_slots(protocol.STEP, action)


def main() -> None:
    """Prints the table."""
    folder = str(Path(__file__).resolve().parent)
    with tempfile.TemporaryDirectory() as logs:
        here = Supervisor(Catalog([ENV], folder=folder), SLOTS, log_dir=logs)
        here.start()
        farm, address = start_farm(SLOTS)
        peer = gymnasium.vector.AsyncVectorEnv([Noop] * SLOTS)
        try:
            lease = here.acquire(ENV, SLOTS, protocol.VERSION)
            core = stepper(lambda commands, wait, n: here.exchange(lease.token, commands, wait, n), lease.slots)
            line = Connection(load_farmlist([(address, SLOTS)])[0])
            far = line.acquire(ENV, SLOTS)
            remote = stepper(lambda commands, wait, n: line.exchange(far["lease"], commands, wait, n), far["slots"])
            peer.reset()
            actions = np.full((SLOTS, 22), 0.5, np.float32)
            time.sleep(2.0)  # until every process has come to rest
            nothing = timed(lambda: line.exchange(far["lease"], [], 0.0))
            figures = median_rounds(timed(lambda: peer.step(actions)), timed(core), timed(remote), nothing)
            line.close()
        finally:
            peer.close()
            farm.terminate()
            farm.wait()
            here.stop("the benchmark is over")
    names = (
        "AsyncVectorEnv.step",
        "Supervisor.exchange in the farm's process",
        "the same over Pyro4",
        "a Pyro4 call of nothing",
    )
    print("| part, %d environments | us |\n|---|---|" % SLOTS)
    for name, figure in zip(names, figures, strict=True):
        print("| %s | %.0f |" % (name, figure))


if __name__ == "__main__":
    main()
