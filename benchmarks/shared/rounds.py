"""A round of environment steps, the same for ours and for every peer of throughput.py.

Two ways to step: `barrier` gives all slots an action and waits for all; `whoever_is_ready` gives each slot its next
action when its result is there. Sleeps are drawn before the clock starts, alike for all. Standard library and numpy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.shared.vector_env import ACTIONS

DRAWN = 512  #: sleeps of a slot, begun anew when they are used up
MARKS = 250  #: numbers that mark steps, below what an action and a byte may be

Exchange = Callable[[Any, Any], "tuple[np.ndarray, np.ndarray]"]


class WrongAnswer(Exception):
    """An observation does not belong to the action that its slot was given."""


def sleeps(message: dict[str, Any], slots: int) -> np.ndarray:
    """Seconds, float32 (slots, DRAWN).

    Args:
        message: "mean", seconds; "sigma", of the logarithm, 0 for always the mean; "slow", how often longer the first
            slot sleeps; "seed".
        slots: how many.
    """
    mean, sigma = message.get("mean", 0.0), message.get("sigma", 0.0)
    drawn = np.random.RandomState(message.get("seed", 0)).lognormal(-sigma * sigma / 2, sigma, (slots, DRAWN))
    drawn[0] *= message.get("slow", 1.0)
    return (mean * drawn).astype(np.float32)


def barrier(
    step: Callable[[np.ndarray], np.ndarray],
    slots: int,
    message: dict[str, Any],
    order: Callable[[], Any] = lambda: ...,
) -> dict[str, Any]:
    """Steps all slots together for message["seconds"] at least.

    Args:
        step: actions (slots, ACTIONS) in, observations (slots, ...) out.
        slots: how many.
        message: of the parent; see `sleeps`.
        order: the slots of the last observations, where they are not all in a row.
    """
    table = sleeps(message, slots)
    actions = np.zeros((slots, ACTIONS), np.float32)
    names = np.arange(slots, dtype=np.float32) % MARKS
    step(actions)
    batches, cpu = 0, time.process_time()
    start = now = time.perf_counter()  # one reading: `seconds` below is then never less than what was asked for
    until = start + message["seconds"]
    while now < until:
        actions[:, 0] = table[:, batches % DRAWN]
        actions[:, 1] = names + batches % MARKS
        obs = step(actions)
        batches += 1
        now = time.perf_counter()
    cpu = time.process_time() - cpu
    check(obs, actions[order(), 1])
    return {
        "steps": batches * slots,
        "seconds": now - start,
        "cpu": cpu,
        "counts": [batches] * slots,
        "slept": table[:, np.arange(batches) % DRAWN].sum(1, dtype=np.float64).tolist(),
    }


def whoever_is_ready(exchange: Exchange, slots: int, message: dict[str, Any]) -> dict[str, Any]:
    """Steps each slot as soon as it is ready, for message["seconds"] after message["warm"].

    What arrives between the two instants counts, whole; so what was under way at the first makes up for what is under
    way at the second.

    Args:
        exchange: takes actions (n, ACTIONS) and their slots (n,), or None and None when there is nothing to give;
            gives the slots that are ready by then, and their observations.
        slots: how many.
        message: of the parent; see `sleeps`.
    """
    table = sleeps(message, slots)
    given = np.zeros(slots, np.int64)
    asked, marks = np.zeros(slots, np.float32), np.zeros(slots, np.float32)
    counts, slept = np.zeros(slots, np.int64), np.zeros(slots)
    actions = np.zeros((slots, ACTIONS), np.float32)
    begin = time.perf_counter() + message.get("warm", 0.0)
    ready, counting, start, cpu = np.arange(slots), False, 0.0, 0.0
    own, since = 0.0, time.thread_time()  # what is done here, between two exchanges, is no part of the library's time
    while True:
        asked[ready] = table[ready, given[ready] % DRAWN]
        given[ready] += 1
        marks[ready] = (ready + given[ready]) % MARKS
        actions[: len(ready), 0], actions[: len(ready), 1] = asked[ready], marks[ready]
        own += time.thread_time() - since
        ready, obs = exchange(actions[: len(ready)], ready)
        since = time.thread_time()
        check(obs, marks[ready])
        now = time.perf_counter()
        if not counting:
            if now < begin:
                continue
            counting, start, cpu, own = True, now, time.process_time(), 0.0
            continue
        counts[ready] += 1
        slept[ready] += asked[ready]
        if now >= start + message["seconds"]:
            break
    cpu = time.process_time() - cpu - own
    under_way = slots - len(ready)
    while under_way:
        ready, obs = exchange(None, None)
        check(obs, marks[ready])
        under_way -= len(ready)
    return {
        "steps": int(counts.sum()),
        "seconds": now - start,
        "cpu": cpu,
        "counts": counts.tolist(),
        "slept": slept.tolist(),
    }


def check(obs: np.ndarray, marks: np.ndarray) -> None:
    """Each observation repeats the mark of its slot's action, at both ends.

    Raises:
        WrongAnswer: one does not.
    """
    for end in (0, -1):
        seen = obs.reshape(len(obs), -1)[:, end]
        if seen.shape != marks.shape or (seen != marks).any():
            raise WrongAnswer("the answers to %s are %s" % (marks, seen))
