"""Spaces there and back: the worker's description of a space, through the codec, to a gymnasium space."""

import re

import environments
import numpy as np
import pytest
from gymnasium import spaces

from farmer.spaces import build_space
from farmhand.worker.describe import describe
from wire import codec
from wire.errors import FarmError


def there_and_back(space):
    return build_space(codec.decode(codec.encode(describe(space))))


SPACES = [
    spaces.Box(-1.0, 1.0, (3,), np.float32),
    spaces.Box(np.array([-np.inf, 0.0]), np.array([np.inf, 1e300]), dtype=np.float64),
    spaces.Box(0, 255, (4, 5, 3), np.uint8),
    spaces.Box(-(2**62), 2**62, (2,), np.int64),
    spaces.Box(-5, 5, (), np.float16),
    spaces.Discrete(4),
    spaces.Discrete(3, start=-1),
    spaces.Discrete(3, dtype=np.int32),
    spaces.MultiDiscrete([2, 3, 4]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[1, 0], [-1, 2]]), dtype=np.int32),
    spaces.MultiBinary(5),
    spaces.MultiBinary([2, 3]),
    spaces.Tuple([spaces.Discrete(2), spaces.Tuple([spaces.MultiBinary(1)])]),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_comes_back_equal_with_its_dtype(space):
    back = there_and_back(space)
    assert back == space
    assert back.dtype == space.dtype
    assert back.shape == space.shape
    if isinstance(space, spaces.Box):
        np.testing.assert_array_equal(back.low, space.low)
        np.testing.assert_array_equal(back.high, space.high)
        assert (back.low.dtype, back.high.dtype) == (space.low.dtype, space.high.dtype)


def test_a_dict_space_keeps_the_order_of_its_keys():
    from collections import OrderedDict

    space = spaces.Dict(OrderedDict([("z", spaces.Discrete(2)), ("a", spaces.Box(0, 1, (2,)))]))
    back = there_and_back(space)
    assert list(back.spaces) == ["z", "a"]
    assert back == space


def test_no_space_stays_no_space():
    assert there_and_back(None) is None


def test_look_alikes_of_old_libraries_are_understood():
    env = environments.NestedEnv()
    back = there_and_back(env.observation_space)
    assert list(back.spaces) == ["image", "pair", "deep"]
    assert back["image"].dtype == np.uint8
    assert env.observation() in back
    assert there_and_back(env.action_space) == spaces.Discrete(4)


def test_an_old_box_without_dtype_is_float32():
    class Box:
        low = np.zeros(2)
        high = np.full(2, 10.0)

    assert there_and_back(Box()) == spaces.Box(0, 10, (2,), np.float32)


def test_a_subclass_of_a_box_is_a_box():
    class Sensors(spaces.Box):
        pass

    assert describe(Sensors(0, 1, (2,)))["kind"] == "box"


def test_a_space_that_does_not_travel_is_named_with_its_place():
    space = spaces.Dict({"note": spaces.Text(8), "x": spaces.Discrete(2)})
    with pytest.raises(FarmError, match=re.escape("['note'] that does not travel: Text(1, 8")) as caught:
        there_and_back(space)
    assert "now:" in str(caught.value)


def test_a_look_alike_that_lacks_its_parts_says_what_it_lacks():
    class Discrete:
        pass

    with pytest.raises(FarmError, match=r"it looks like a Discrete, but: .*'n'"):
        there_and_back(Discrete())


@pytest.mark.parametrize(
    "desc",
    [
        {},
        {"kind": "sphere"},
        {"kind": "discrete", "n": 0, "start": 0, "dtype": "<i8"},
        {"kind": "box", "dtype": "<f4", "shape": (2,), "low": [0, 0, 0], "high": [1, 1]},
        {"kind": "box", "dtype": "nonsense", "shape": (2,), "low": [0, 0], "high": [1, 1]},
        {"kind": "tuple", "spaces": [None]},
        {"kind": "dict", "spaces": ["ab", 3]},
    ],
)
def test_a_description_without_sense_is_one_named_error(desc):
    with pytest.raises(FarmError):
        build_space(desc)
