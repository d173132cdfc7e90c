"""From a farm's description of a space back to a gymnasium space.

    space = build_space({"kind": "box", "dtype": "<f4", "shape": (3,), "low": low, "high": high})

The description is made in the simulator's process, so a host never builds a simulator to learn its spaces.
"""

from collections import OrderedDict
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from wire.errors import FarmError

Description = dict[str, Any]


def build_space(desc: Description | None) -> gymnasium.Space[Any] | None:
    """Builds the gymnasium space that a farm described.

    Args:
        desc: what the worker's `describe` made of a space; None where the environment has none.

    Returns:
        A space with the same dtype, bounds, order of keys and start; None for None.

    Raises:
        FarmError: a space of a kind that does not travel, or a description that makes no sense.
    """
    if desc is None:
        return None
    return _build(desc, "")


def why_unsound(space: gymnasium.Space[Any] | None, value: Any) -> str | None:
    """What keeps an observation out of a replay, in words; None when it is sound.

    Shapes and finite numbers are looked at, as deep as dicts and tuples go. Bounds are not: simulators leave theirs.
    """
    if isinstance(space, spaces.Box):
        if np.shape(value) != space.shape:
            return "has shape %s instead of %s" % (np.shape(value), space.shape)
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            return "is of %s" % array.dtype
        return None if array.dtype.kind != "f" or np.isfinite(array).all() else "holds NaN or infinity"
    if isinstance(space, spaces.Dict):
        if not isinstance(value, dict) or value.keys() != space.spaces.keys():
            return "is no dict of %s" % list(space.spaces)
        found = (why_unsound(part, value[key]) for key, part in space.spaces.items())
        return next((why for why in found if why is not None), None)
    if isinstance(space, spaces.Tuple):
        if not isinstance(value, (tuple, list)) or len(value) != len(space.spaces):
            return "is no tuple of %d" % len(space.spaces)
        found = (why_unsound(part, one) for part, one in zip(space.spaces, value, strict=True))
        return next((why for why in found if why is not None), None)
    return None


def _build(desc: Description, path: str) -> gymnasium.Space[Any]:
    where = f" at {path}" if path else ""
    kind = desc.get("kind") if isinstance(desc, dict) else None
    if kind == "other":
        raise FarmError(
            f"the farm offers a space{where} that does not travel: {desc.get('text')}\n"
            f"  known are {', '.join(_BUILDERS)}\n"
            "  now: give the environment's factory a wrapper on the farm that turns this space into one of those"
        )
    if kind not in _BUILDERS:
        raise FarmError(f"the farm described a space{where} of kind {kind!r}; known are {', '.join(_BUILDERS)}")
    try:
        return _BUILDERS[kind](desc, path)
    except FarmError:
        raise
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError) as error:  # gymnasium checks by assert
        raise FarmError(
            f"the farm described a {kind} space{where} that cannot be: {error!r} in {desc!r:.300}"
        ) from error


def _box(desc: Description, path: str) -> spaces.Box:
    dtype = np.dtype(desc["dtype"])
    low, high = (np.asarray(desc[name], dtype) for name in ("low", "high"))
    # gymnasium keeps native byte order only; the values are the same.
    return spaces.Box(low, high, tuple(desc["shape"]), dtype.newbyteorder("=").type)


def _discrete(desc: Description, path: str) -> spaces.Discrete:
    dtype: Any = np.dtype(desc["dtype"]).type
    others = {} if dtype is np.int64 else {"dtype": dtype}  # gymnasium before 1.3 knows no other
    return spaces.Discrete(int(desc["n"]), start=int(desc.get("start", 0)), **others)


def _multi_discrete(desc: Description, path: str) -> spaces.MultiDiscrete:
    dtype: Any = np.dtype(desc["dtype"]).type
    start = desc.get("start")
    return spaces.MultiDiscrete(
        np.asarray(desc["nvec"], dtype), dtype, start=None if start is None else np.asarray(start, dtype)
    )


def _multi_binary(desc: Description, path: str) -> spaces.MultiBinary:
    n = desc["n"]
    return spaces.MultiBinary(n if isinstance(n, int) else list(n))


def _dict(desc: Description, path: str) -> spaces.Dict:
    # gymnasium sorts the keys of a plain dict, and keeps the order of an OrderedDict.
    return spaces.Dict(OrderedDict((key, _build(part, f"{path}[{key!r}]")) for key, part in desc["spaces"]))


def _tuple(desc: Description, path: str) -> spaces.Tuple:
    return spaces.Tuple([_build(part, f"{path}[{index}]") for index, part in enumerate(desc["spaces"])])


_BUILDERS = {
    "box": _box,
    "discrete": _discrete,
    "multi_discrete": _multi_discrete,
    "multi_binary": _multi_binary,
    "dict": _dict,
    "tuple": _tuple,
}
