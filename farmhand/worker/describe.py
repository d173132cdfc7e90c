"""A space in plain words: how a farm describes observations and actions to its hosts.

    describe(env.observation_space)
    {"kind": "box", "dtype": "<f4", "shape": (3,), "low": array(...), "high": array(...)}

Spaces are known by the names of their classes, never by importing gym or gymnasium: either of them, of any age, may
have made the space, or the simulator's author may have written a look-alike. `farmer.spaces` is the way back.

Runs unchanged on Python 2.7 to 3.13, with nothing but the standard library and numpy.
"""

import inspect

import numpy


def kind_of(space):
    """The kind of a space: "box", "discrete", ...; "other" for one that is not known here.

    The first known name among the class and its bases decides, so a subclass of Box is a Box.
    """
    for cls in inspect.getmro(space.__class__):
        if cls.__name__ in _DESCRIBERS:
            return _KINDS[cls.__name__]
    return "other"


def describe(space):
    """Describes a space with dicts, lists, arrays, texts and numbers only.

    Args:
        space: a gym or gymnasium space, anything that looks like one, or None.

    Returns:
        A dict with "kind" and what that kind needs; None for None. A space we have no words for, or one that
        lacks what its name promises, is of kind "other" and carries its text.
    """
    if space is None:
        return None
    for cls in inspect.getmro(space.__class__):
        describer = _DESCRIBERS.get(cls.__name__)
        if describer is not None:
            try:
                return describer(space)
            except (AttributeError, TypeError, ValueError) as error:
                return _other(space, "; it looks like a %s, but: %s" % (cls.__name__, error))
    return _other(space)


def _other(space, why=""):
    return {"kind": "other", "text": repr(space)[:500] + why}


def box_dtype(space):
    """The dtype of a Box. gym before 0.9.6 gave it none, and meant float32."""
    return numpy.dtype(getattr(space, "dtype", None) or "float32")


def _box(space):
    dtype = box_dtype(space)
    low = numpy.asarray(space.low)
    shape = getattr(space, "shape", None)
    shape = tuple(int(length) for length in (low.shape if shape is None else shape))
    return {
        "kind": "box",
        "dtype": dtype.str,
        "shape": shape,
        # Old ones keep their bounds in float64 whatever their dtype is.
        "low": numpy.broadcast_to(low, shape).astype(dtype),
        "high": numpy.broadcast_to(numpy.asarray(space.high), shape).astype(dtype),
    }


def _discrete(space):
    return {
        "kind": "discrete",
        "n": int(space.n),
        "start": int(getattr(space, "start", 0)),  # since gym 0.22
        "dtype": _dtype(space),
    }


def _multi_discrete(space):
    start = getattr(space, "start", None)  # since gymnasium 1.0
    return {
        "kind": "multi_discrete",
        "nvec": numpy.asarray(space.nvec),
        "start": None if start is None else numpy.asarray(start),
        "dtype": _dtype(space),
    }


def _multi_binary(space):
    n = space.n
    sizes = tuple(int(size) for size in n) if isinstance(n, (tuple, list, numpy.ndarray)) else int(n)
    return {"kind": "multi_binary", "n": sizes}


def _dict(space):
    return {"kind": "dict", "spaces": [(key, describe(part)) for key, part in space.spaces.items()]}


def _tuple(space):
    return {"kind": "tuple", "spaces": [describe(part) for part in space.spaces]}


def _dtype(space):
    return numpy.dtype(getattr(space, "dtype", None) or "int64").str


_DESCRIBERS = {
    "Box": _box,
    "Discrete": _discrete,
    "MultiDiscrete": _multi_discrete,
    "MultiBinary": _multi_binary,
    "Dict": _dict,
    "Tuple": _tuple,
}
_KINDS = {
    "Box": "box",
    "Discrete": "discrete",
    "MultiDiscrete": "multi_discrete",
    "MultiBinary": "multi_binary",
    "Dict": "dict",
    "Tuple": "tuple",
}
