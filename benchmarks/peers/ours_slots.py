"""Ours, in a process of its own, as one of the libraries that throughput.py and large.py start."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from benchmarks.shared.peer_process import answer_all, take_stdout
from benchmarks.shared.rounds import barrier, whoever_is_ready
from farmer import Farmer, make_vec

START_LIMIT = 900.0  #: s for all workers to stand


class Pool:
    """A Farmer with an episode in every slot."""

    def __init__(self, env: str, farmlist: list[Any], slots: int):
        self.pool = Farmer(env, farmlist, slots=slots)
        if self.pool.nb_slots != slots:
            raise RuntimeError("%d slots of %d are there: %s" % (self.pool.nb_slots, slots, self.pool.status()))
        self.pool.reset(self.pool.vacant())
        there = 0
        while there < slots:
            there += len(self.received(START_LIMIT)[0])
        self.slots = self.order = np.arange(slots)

    def received(self, timeout: float = 60.0) -> tuple[np.ndarray, np.ndarray]:
        """Slots that are ready, and their observations."""
        batch = self.pool.recv(1, timeout)
        if batch.lost.any():
            raise RuntimeError("lost: %s" % [info for info in batch.info if info])
        return batch.slot, batch.obs

    def exchange(self, actions: Any, slots: Any) -> tuple[np.ndarray, np.ndarray]:
        """Next actions out, whoever is ready in."""
        if actions is not None:
            self.pool.send(actions, slots)
        return self.received()

    def step(self, actions: np.ndarray) -> np.ndarray:
        """All slots together; observations are in the order of `order`."""
        batch = self.pool.step(actions, self.slots)
        self.order = batch.slot
        return batch.obs

    def discarded(self) -> int:
        """Steps without a result, and results that nobody asked for any more."""
        status = self.pool.status()
        ledger = status["ledger"]
        return ledger["sent"] - ledger["done"] - ledger["under way"] + sum(farm["dropped"] for farm in status["farms"])


def main() -> None:
    """Serves until stdin closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="benchmarks.shared.vector_env:Steps")
    parser.add_argument("--farmlist", type=json.loads, required=True, help="[[address, slots], ...]")
    parser.add_argument("--slots", type=int, nargs="+", required=True, help="of each pool; a message names its pool")
    parser.add_argument("--vector", action="store_true", help="and a FarmVectorEnv of as many as the first pool")
    args = parser.parse_args()
    pipe = take_stdout()
    farmlist = [tuple(entry) for entry in args.farmlist]
    pools = {count: Pool(args.env, farmlist, count) for count in args.slots}
    first = args.slots[0]
    envs = make_vec(args.env, first, farmlist) if args.vector else None
    if envs is not None:
        envs.reset(seed=0)

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        how, count = message["how"], message.get("slots", first)
        if how == "FarmVectorEnv.step":
            assert envs is not None
            return barrier(lambda actions: envs.step(actions)[0], count, message)
        pool = pools[count]
        found = (
            barrier(pool.step, count, message, lambda: pool.order)
            if how == "Farmer.step"
            else whoever_is_ready(pool.exchange, count, message)
        )
        return dict(found, discarded=pool.discarded(), farms=[pool.pool.name_of(slot) for slot in range(count)])

    try:
        answer_all(pipe, {"numpy": np.__version__}, answer)
    finally:
        for pool in pools.values():
            pool.pool.close()
        if envs is not None:
            envs.close()


if __name__ == "__main__":
    main()
