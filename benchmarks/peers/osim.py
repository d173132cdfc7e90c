"""Who steps real muscles, each in a process of its own, as steps/osim.py starts them.

`bare` is one body and a loop around it; `async` and `tianshou-half` are other people's; `ours` is a pool over a farm.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks.shared.peer_process import answer_all, take_stdout

ACTIONS = {"L2M2019": 22, "Arm2D": 6}
DRAWN = 4096  #: actions of a slot, begun anew when they are used up
LONG = 600.0  #: s; a slot that is silent for so long hangs

#: Slots that want an action now; slots that made a step; the seconds that each of those was in the simulator.
Found = tuple[Sequence[int], Sequence[int], Sequence[float]]


def actions(name: str, slots: int, first: int = 0) -> np.ndarray:
    """Float32 (slots, DRAWN, A) in [0, 1], alike for all: uniform for the walker, all or nothing for the arm."""
    drawn = np.random.RandomState(0).random_sample((first + slots, DRAWN, ACTIONS[name]))[first:]
    return (drawn.round() if name == "Arm2D" else drawn).astype(np.float32)


class Stepper:
    """Some slots; a subclass says how they are stepped."""

    packages: tuple[str, ...] = ()  # whose versions are told

    def __init__(self, args: argparse.Namespace):
        self.slots = args.slots
        self.given = np.zeros(args.slots, np.int64)
        self.wanting: Sequence[int] = range(args.slots)  # slots with nothing under way between two rounds
        self.table = actions(args.body, args.slots, args.first)

    def exchange(self, actions: Any, slots: Sequence[int]) -> Found:
        """Actions (n, A) out to slots, some of all slots in."""
        raise NotImplementedError

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Steps for message["seconds"] after a second of warm-up; what arrives between the two instants counts."""
        wanting = self.wanting
        begin = time.perf_counter() + 1.0
        counting, start, steps, longest = False, 0.0, 0, 0.0
        inside = np.zeros(self.slots)
        while True:
            rows = np.asarray(wanting, np.int64)
            chosen = self.table[rows, self.given[rows] % DRAWN]
            self.given[rows] += 1
            wanting, stepped, seconds = self.exchange(chosen, rows)
            now = time.perf_counter()
            if not counting:
                counting = now >= begin
                start = now
                continue
            steps += len(stepped)
            for slot, one in zip(stepped, seconds, strict=True):
                inside[slot] += one
                longest = max(longest, one)
            if now - start >= message["seconds"]:
                break
        self.wanting = self.rest(wanting)
        return {"steps": steps, "seconds": now - start, "inside": float(inside.sum()), "longest": longest}

    def rest(self, wanting: Sequence[int]) -> Sequence[int]:
        """Waits until nothing is under way, if it can; `wanting` are the slots that have nothing, before and after."""
        return range(self.slots)

    def close(self) -> None:
        """Ends what it started."""


class Bare(Stepper):
    """No farm and no vector: one body, one loop."""

    def __init__(self, args: argparse.Namespace):
        from osim_env import Body

        super().__init__(args)
        self.body = Body(args.body)
        self.body.reset(seed=args.first)

    def exchange(self, actions: Any, slots: Sequence[int]) -> Found:
        _, _, terminated, truncated, info = self.body.step(actions[0])
        if terminated or truncated:
            self.body.reset()
        return [0], [0], [info["seconds"]]


class Async(Stepper):
    """Gymnasium's AsyncVectorEnv as it comes: all together, a slot that ended resets in the next step."""

    packages = ("gymnasium",)

    def __init__(self, args: argparse.Namespace):
        import gymnasium
        from osim_env import maker

        super().__init__(args)
        self.envs = gymnasium.vector.AsyncVectorEnv([maker(args.body)] * args.slots)
        self.envs.reset(seed=0)
        self.ended = np.zeros(args.slots, bool)

    def exchange(self, actions: Any, slots: Sequence[int]) -> Found:
        _, _, terminated, truncated, infos = self.envs.step(actions)
        stepped = np.flatnonzero(~self.ended)
        self.ended = terminated | truncated
        return range(self.slots), stepped.tolist(), [float(infos["seconds"][slot]) for slot in stepped]

    def close(self) -> None:
        self.envs.close()


class TianshouHalf(Stepper):
    """Tianshou's SubprocVectorEnv, whose step gives back whoever is ready once half of all are."""

    packages = ("tianshou",)

    def __init__(self, args: argparse.Namespace):
        from osim_env import maker
        from tianshou.env import SubprocVectorEnv

        super().__init__(args)
        self.envs = SubprocVectorEnv([maker(args.body)] * args.slots, wait_num=max(1, args.slots // 2))
        self.envs.reset()

    def exchange(self, actions: Any, slots: Sequence[int]) -> Found:
        _, _, terminated, truncated, infos = self.envs.step(actions, np.asarray(slots))
        there = np.array([info["env_id"] for info in infos])
        ended = there[terminated | truncated]
        if len(ended):
            self.envs.reset(ended)
        return there.tolist(), there.tolist(), [info["seconds"] for info in infos]

    def rest(self, wanting: Sequence[int]) -> Sequence[int]:
        """It has no way to wait without a step; what is under way is the next round's first."""
        return wanting

    def close(self) -> None:
        self.envs.close()


class Ours(Stepper):
    """A Farmer over a farm; who has ended begins anew while the others step."""

    def __init__(self, args: argparse.Namespace):
        from farmer import Farmer

        super().__init__(args)
        self.pool = Farmer("osim:" + args.body, [(args.farm, args.slots)], seed=0)
        self.pool.reset(range(args.slots))
        self.rest([])

    def exchange(self, actions: Any, slots: Sequence[int]) -> Found:
        if len(slots):
            self.pool.send(actions, slots)
        batch = self.pool.recv(1, LONG)
        if batch.lost.any():
            raise RuntimeError("lost: %s" % [info for info in batch.info if info])
        over = batch.terminated | batch.truncated
        if over.any():
            self.pool.reset(batch.slot[over])
        made = ~batch.first
        return batch.slot[~over].tolist(), batch.slot[made].tolist(), batch.env_s[made].tolist()

    def rest(self, wanting: Sequence[int]) -> Sequence[int]:
        there = len(wanting)
        while there < self.slots:
            there += len(self.exchange([], [])[0])
        return range(self.slots)

    def close(self) -> None:
        self.pool.close()


LIBRARIES: dict[str, type[Stepper]] = {"ours": Ours, "bare": Bare, "async": Async, "tianshou-half": TianshouHalf}


def main() -> None:
    """Serves until stdin closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--body", choices=ACTIONS, required=True)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first slot, which its actions follow")
    parser.add_argument("--farm", help="of ours: its address")
    args = parser.parse_args()
    pipe = take_stdout()
    stepper = LIBRARIES[args.library](args)
    try:
        answer_all(pipe, {name: version(name) for name in stepper.packages}, stepper.answer)
    finally:
        stepper.close()


if __name__ == "__main__":
    main()
