"""Random actions, drawn from an action space as a worker describes it (`worker/describe.py`).

    draw = sampler(codec.decode(ready)["action_space"], np.random.default_rng(1))
    action = draw()

For measuring an environment without an agent. Boxes are drawn as gymnasium's `sample` draws them: evenly between two
bounds, exponentially from one, and normally where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from wire.errors import StartError

Draw = Callable[[], Any]


def sampler(space: dict[str, Any] | None, rng: np.random.Generator) -> Draw:
    """A function that draws an action.

    Raises:
        StartError: the environment does not say what its actions are, or in words that this module does not know.
    """
    kind = "none" if space is None else space["kind"]
    if space is None or kind not in _SAMPLERS:
        text = kind if space is None else space.get("text", kind)
        raise StartError(
            f"no action can be drawn from its action space, {text}; known are {', '.join(_SAMPLERS)}\n"
            "  now: give the environment's factory a wrapper with one of those"
        )
    return _SAMPLERS[kind](space, rng)


def _box(space: dict[str, Any], rng: np.random.Generator) -> Draw:
    dtype = np.dtype(space["dtype"])
    low, high = (np.asarray(space[name]) for name in ("low", "high"))
    if dtype.kind != "f":
        # 64 bits hold the bounds of all but uint64, and numpy draws up to, and not with, `high`.
        top = np.minimum(high.astype("float64"), 2.0**62).astype("int64") + 1
        return lambda: rng.integers(low.astype("int64"), np.maximum(top, low.astype("int64") + 1)).astype(dtype)
    low, high = low.astype("float64"), high.astype("float64")
    below, above = low > -np.finfo(dtype).max, high < np.finfo(dtype).max

    def draw() -> Any:
        free = rng.normal(size=low.shape)
        from_one = np.where(below, low, high) + np.where(below, 1, -1) * rng.exponential(size=low.shape)
        between = np.where(below & above, low, 0) + rng.random(low.shape) * np.where(below & above, high - low, 0)
        value = np.where(below & above, between, np.where(below | above, from_one, free)).astype(dtype)
        # Rounding to float32 may have left them by a bit. A scalar's array is one of no dimension.
        return np.asarray(np.clip(value, space["low"], space["high"]))

    return draw


def _discrete(space: dict[str, Any], rng: np.random.Generator) -> Draw:
    return lambda: space["start"] + int(rng.integers(space["n"]))


def _multi_discrete(space: dict[str, Any], rng: np.random.Generator) -> Draw:
    counts = np.asarray(space["nvec"], "int64")
    start = 0 if space["start"] is None else np.asarray(space["start"], "int64")
    return lambda: (start + rng.integers(counts)).astype(space["dtype"])


def _multi_binary(space: dict[str, Any], rng: np.random.Generator) -> Draw:
    return lambda: rng.integers(2, size=space["n"], dtype="int8")


def _dict(space: dict[str, Any], rng: np.random.Generator) -> Draw:
    parts = [(key, sampler(part, rng)) for key, part in space["spaces"]]
    return lambda: {key: draw() for key, draw in parts}


def _tuple(space: dict[str, Any], rng: np.random.Generator) -> Draw:
    parts = [sampler(part, rng) for part in space["spaces"]]
    return lambda: tuple(draw() for draw in parts)


_SAMPLERS: dict[str, Callable[[dict[str, Any], np.random.Generator], Draw]] = {
    "box": _box,
    "discrete": _discrete,
    "multi_discrete": _multi_discrete,
    "multi_binary": _multi_binary,
    "dict": _dict,
    "tuple": _tuple,
}
