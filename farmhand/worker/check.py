"""Checks every observation, action and reward against its space, before it goes any further.

    find = check.finder(describe.describe(env.observation_space))
    trouble = find(observation)           # None, or (where in the value, what is wrong there)

    check.observation(find, observation)  # raises InvalidObservation with both in its text

What is refused, and what is not:

    shape            anything but the declared one
    dtype            what the declared one could not take without a loss of kind: floats for integers, objects, texts;
                     float64 for float32, integers for floats, int64 for uint8 (values from 0 to 255) are fine
    NaN, Inf         always, whatever the bounds say: no network and no running mean survives one. A number that float32
                     cannot hold counts as infinite, for that is what it becomes in the network
    bounds           observations: over them by more than SLACK of their range, for many simulators leave what they
                     declare by a little; actions: over them by more than rounding. low >= high bounds nothing.
                     Left out with `bounds=False` (farm.py --check-bounds off)
    no known space   every number and every array in the value is looked at for NaN and Inf

Python 2.7 to 3.13, with nothing but the standard library and numpy.
"""

import numbers
import sys

import numpy

import codec

#: The part of a bounded range that an observation may leave it by. Of a range with one end: the part of that end.
SLACK = 0.1
#: The same for an action, whose sender knows the bounds: what scaling in float32 may miss them by.
ROUNDING = 1e-5
#: What float32 can hold.
LARGEST = float(numpy.finfo("float32").max)

#: Elements up to which Python compares an array's numbers faster than numpy. In a loop numpy is the faster one from ten
#: on, but between two steps its ufuncs are gone from the processor's caches, and each costs 3 to 8 us.
FEW = 64

_INTS = (int, long) if sys.version_info[0] == 2 else (int,)  # type: ignore[name-defined]  # noqa: F821


class Invalid(ValueError):
    """A value that is not in its space."""


class InvalidObservation(Invalid):
    """`reset` or `step` returned an observation that is not in the observation space."""


class InvalidReward(Invalid):
    """`step` returned a reward that is no finite number."""


class InvalidAction(Invalid):
    """An action that is not in the action space: the environment never got it, and is unchanged."""


def observation(find, value):
    """Raises InvalidObservation if there is trouble with the value."""
    trouble = find(value)
    if trouble is not None:
        raise InvalidObservation("observation%s %s" % trouble)


def action(find, value):
    """Raises InvalidAction if there is trouble with the value."""
    trouble = find(value)
    if trouble is not None:
        raise InvalidAction(
            "action%s %s\n"
            "  the environment was not stepped, and its episode has ended with this\n"
            "  now: reset begins a new one" % trouble
        )


def reward(value):
    """A reward as a float, from any number or an array of one.

    Raises:
        InvalidReward: it is not one number, not finite, or more than float32 can hold.
    """
    if isinstance(value, (float, numpy.floating)) or type(value) in _INTS:
        number = value
    else:
        number = _one_number(value)
    if not -LARGEST <= number <= LARGEST:  # NaN neither
        raise InvalidReward("step returned a reward of %s, which is no finite number" % (value,))
    return float(number)


def _one_number(value):
    if isinstance(value, numbers.Real):
        return value
    array = numpy.asarray(value)
    if array.size == 1 and array.dtype.kind in "biufO":
        try:
            return float(array.reshape(-1)[0])
        except (TypeError, ValueError):
            pass
    raise InvalidReward("step returned a reward that is not one number: %s" % _words(value))


def finder(space, bounds=True, slack=SLACK):
    """A function that looks for trouble in a value.

    Args:
        space: as `describe.describe` tells it, or None.
        bounds: whether bounds are looked at.
        slack: the part of a range that a value may leave it by.

    Returns:
        find(value) -> None, or (path, what): where in the value, as Python would write it, and what is wrong there.
    """
    make = _MAKERS.get(None if space is None else space["kind"])
    return _find_anywhere if make is None else make(space, bounds, slack)


# ---- one finder for each kind of space ----


def _box_finder(space, bounds, slack):
    dtype, shape = numpy.dtype(space["dtype"]), space["shape"]
    text = "%s %s %s" % (space.get("called", "Box"), dtype, shape)
    kinds = {"f": "biuf", "i": "biu", "u": "biu"}.get(dtype.kind, dtype.kind)
    low, high = _limits(space, dtype, slack) if bounds else _no_limits(dtype)
    smallest, largest = _no_limits(dtype)
    unbounded = bool((low <= smallest).all() and (high >= largest).all())

    def is_good(array):
        if unbounded and array.dtype == dtype and array.dtype.itemsize <= 4:
            return dtype.kind != "f" or numpy.isfinite(array).all()
        return (array >= low).all() and (array <= high).all()  # NaN is in no bounds

    size = int(numpy.prod(shape, dtype="int64"))
    only_finite = unbounded and size <= codec.FEW_FLOATS and dtype.str == "<f4"
    pairs = None
    if not only_finite and size <= FEW and dtype.kind in "biuf":
        pairs = list(zip(*(numpy.broadcast_to(limit, shape).ravel().tolist() for limit in (low, high))))

    def find(value):
        if type(value) is numpy.ndarray and value.dtype == dtype and value.shape == shape:
            if only_finite:
                if codec.surely_finite(value.tobytes()):
                    return None
            elif pairs is not None:
                for number, (least, most) in zip(value.ravel().tolist(), pairs):
                    if not least <= number <= most:  # NaN neither
                        break
                else:
                    return None
        return find_anything(value)

    def find_anything(value):
        array = value
        if type(value) is not numpy.ndarray:
            array = _as_array(value)
            if array is None:
                return "", "is no array: %s; its space is %s" % (_words(value), text)
        if array.dtype.kind not in kinds:
            return "", "is of dtype %s; its space is %s" % (array.dtype, text)
        if array.shape != shape:
            return "", "has shape %s; its space is %s" % (array.shape, text)
        try:
            if is_good(array):
                return None
        except (FloatingPointError, Warning):  # a simulator may have made numpy's warnings into errors
            pass
        return _trouble_of(array, low, high, space)

    return find


def _limits(space, dtype, slack):
    """The lowest and the highest that each component may be."""
    low, high = (numpy.asarray(space[name]) for name in ("low", "high"))
    if dtype.kind != "f":  # whole numbers count something: they are in, or out
        backwards = (low >= high) & (dtype.kind != "b")
        smallest, largest = _no_limits(dtype)
        return numpy.where(backwards, smallest, low), numpy.where(backwards, largest, high)
    low, high = low.astype("float64"), high.astype("float64")
    with numpy.errstate(all="ignore"):
        both = numpy.isfinite(low) & numpy.isfinite(high)
        room = numpy.where(both, high - low, 0.0)
        more_low = slack * numpy.where(both, room, numpy.maximum(1.0, abs(low)))
        more_high = slack * numpy.where(both, room, numpy.maximum(1.0, abs(high)))
        backwards = ~(low < high)
        low = numpy.where(backwards, -LARGEST, numpy.maximum(low - more_low, -LARGEST))
        high = numpy.where(backwards, LARGEST, numpy.minimum(high + more_high, LARGEST))
    # Compared in the environment's own dtype, which is faster; float16 cannot hold the largest float32.
    if dtype == numpy.float32:
        return low.astype(dtype), high.astype(dtype)
    return low, high


def _no_limits(dtype):
    if dtype.kind in "iu":
        info = numpy.iinfo(dtype)
        return numpy.asarray(info.min, dtype), numpy.asarray(info.max, dtype)
    if dtype.kind == "b":
        return numpy.asarray(False), numpy.asarray(True)
    return numpy.float32(-LARGEST), numpy.float32(LARGEST)


def _discrete_finder(space, bounds, slack):
    first, last = space["start"], space["start"] + space["n"] - 1

    def find(value):
        if type(value) not in _INTS:
            if isinstance(value, numpy.ndarray) and value.shape == () and value.dtype.kind in "iub":
                value = int(value)
            elif not isinstance(value, _INTS + (numpy.integer, numpy.bool_)):
                return "", "is no whole number: %s; its space is Discrete from %d to %d" % (_words(value), first, last)
        if bounds and not first <= value <= last:
            return "", "is %d; its space is Discrete from %d to %d" % (value, first, last)
        return None

    return find


def _multi_discrete_finder(space, bounds, slack):
    counts = numpy.asarray(space["nvec"], "int64")
    start = numpy.zeros_like(counts) if space["start"] is None else numpy.asarray(space["start"], "int64")
    return _whole_numbers_finder("MultiDiscrete", start, start + counts - 1, bounds)


def _multi_binary_finder(space, bounds, slack):
    shape = space["n"] if isinstance(space["n"], tuple) else (space["n"],)
    return _whole_numbers_finder("MultiBinary", numpy.zeros(shape, "int64"), numpy.ones(shape, "int64"), bounds)


def _whole_numbers_finder(name, low, high, bounds):
    as_box = {"called": name, "dtype": "<i8", "shape": low.shape, "low": low, "high": high}
    # The form by the Box's finder, the bounds here: low == high is a bound of these.
    find_form = _box_finder(as_box, False, 0.0)

    def find(value):
        trouble = find_form(value)
        if trouble is not None or not bounds:
            return trouble
        array = numpy.asarray(value)
        if (array >= low).all() and (array <= high).all():
            return None
        return _trouble_of(array, low, high, as_box)

    return find


def _dict_finder(space, bounds, slack):
    parts = [(key, finder(part, bounds, slack)) for key, part in space["spaces"]]
    keys = set(key for key, _ in parts)

    def find(value):
        if not hasattr(value, "keys"):
            return "", "is no dict: %s; its space is a Dict of %s" % (_words(value), sorted(keys, key=str))
        for key, find_in_part in parts:
            if key not in value:
                return "", "lacks %r, which its space has" % (key,)
            trouble = find_in_part(value[key])
            if trouble is not None:
                return "[%r]%s" % (key, trouble[0]), trouble[1]
        if len(value) != len(keys):
            more = sorted((key for key in value if key not in keys), key=str)
            return "", "has %s, which its space lacks" % ", ".join(repr(key) for key in more)
        return None

    return find


def _tuple_finder(space, bounds, slack):
    finders = [finder(part, bounds, slack) for part in space["spaces"]]

    def find(value):
        if not isinstance(value, (tuple, list)):
            return "", "is no tuple: %s; its space is a Tuple of %d" % (_words(value), len(finders))
        if len(value) != len(finders):
            return "", "is a tuple of %d; its space is a Tuple of %d" % (len(value), len(finders))
        for position, find_in_part in enumerate(finders):
            trouble = find_in_part(value[position])
            if trouble is not None:
                return "[%d]%s" % (position, trouble[0]), trouble[1]
        return None

    return find


_MAKERS = {
    "box": _box_finder,
    "discrete": _discrete_finder,
    "multi_discrete": _multi_discrete_finder,
    "multi_binary": _multi_binary_finder,
    "dict": _dict_finder,
    "tuple": _tuple_finder,
}


def _find_anywhere(value, depth=0):
    """For a space without a description: looks for NaN and Inf wherever there are numbers."""
    if isinstance(value, float):
        if not -LARGEST <= value <= LARGEST:
            return "", "is %r" % (value,)
    elif isinstance(value, (numpy.ndarray, numpy.generic)):
        array = numpy.asarray(value)
        if array.dtype.kind in "fc" and not numpy.isfinite(array).all():
            return _first_bad(array, ~numpy.isfinite(array), "not finite")
    elif depth < 100:  # what is nested deeper, or contains itself, the codec refuses
        children = ()
        if isinstance(value, dict):
            children = value.items()
        elif isinstance(value, (tuple, list)):
            children = enumerate(value)
        for key, child in children:
            trouble = _find_anywhere(child, depth + 1)
            if trouble is not None:
                return "[%r]%s" % (key, trouble[0]), trouble[1]
    return None


# ---- words ----


def _trouble_of(array, low, high, space):
    """What is wrong with an array of the right form: what is not finite first, then what is out of bounds."""
    with numpy.errstate(all="ignore"):
        if array.dtype.kind == "f":
            bad = ~(abs(array.astype("float64")) <= LARGEST)
            if bad.any():
                return _first_bad(array, bad, "not finite")
        bad = ~((array >= low) & (array <= high))
    if not bad.any():
        return None
    path, words = _first_bad(array, bad, "out of bounds")
    at = tuple(int(position) for position in numpy.argwhere(bad)[0])
    bounds = tuple(numpy.broadcast_to(numpy.asarray(space[name]), array.shape)[at] for name in ("low", "high"))
    return path, words + ", its space says [%s, %s] (farm.py --check-bounds off lets it pass)" % bounds


def _first_bad(array, bad, what):
    at = tuple(int(position) for position in numpy.argwhere(bad)[0])
    path = "[%s]" % ", ".join("%d" % position for position in at) if at else ""
    count = int(bad.sum())
    more = "" if count == 1 else "; %d of its %d values are %s" % (count, array.size, what)
    return path, "is %s%s%s" % (array[at], ", %s" % what if what != "not finite" else "", more)


def _as_array(value):
    try:
        array = numpy.asarray(value)
    except Exception:  # lists of unequal lengths, or an object whose own conversion fails
        return None
    return None if array.dtype.kind == "O" else array


def _words(value):
    try:
        text = repr(value)
    except Exception:
        text = "its repr raises"
    return "%s %s" % (type(value).__name__, text[:200])
