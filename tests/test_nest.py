"""Observations of several parts: what is taken apart, in which order, and that it comes back."""

from __future__ import annotations

import json
from collections import namedtuple

import numpy as np
import pytest

from agents.nest import LEAF, flatten, nb_leaves, template_of, unflatten

ARRAY = np.arange(3, dtype=np.float32)
IMAGE = np.ones((2, 2), np.uint8)


def assert_equal(one, other):
    if isinstance(one, dict):
        assert sorted(one) == sorted(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, tuple | list):
        assert (type(one), len(one)) == (type(other), len(other))
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "obs",
    [
        ARRAY,
        np.array(2),
        {"b": ARRAY, "a": IMAGE},
        (ARRAY, IMAGE),
        [ARRAY, IMAGE],
        {"z": (IMAGE, [ARRAY, {"y": ARRAY, "x": np.array(1)}]), "empty": {}},
        (np.array(1), {"a": np.array(2)}),
        (np.array(1), (np.array(2), ARRAY)),
    ],
)
def test_what_was_taken_apart_comes_back_through_a_template_in_json(obs):
    leaves = flatten(obs)
    template = template_of(obs)
    assert nb_leaves(template) == len(leaves)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    assert_equal(unflatten(json.loads(json.dumps(template)), leaves), obs)


def test_a_dicts_leaves_come_by_sorted_key_whatever_its_order():
    one, other = {"b": ARRAY, "a": IMAGE}, {"a": IMAGE, "b": ARRAY}
    assert [leaf.dtype for leaf in flatten(one)] == [np.uint8, np.float32]
    assert [leaf.dtype for leaf in flatten(other)] == [np.uint8, np.float32]
    assert template_of(one) == template_of(other) == {"dict": {"a": LEAF, "b": LEAF}}
    by_another_order = {"dict": {"b": LEAF, "a": LEAF}}
    assert_equal(unflatten(by_another_order, flatten(one)), one)


@pytest.mark.parametrize(
    ("obs", "shape"),
    [
        ([1.0, 2.0], (2,)),
        ((1, 2, 3), (3,)),
        ([[1, 2], [3, 4]], (2, 2)),
        ([np.float32(1), np.array(2)], (2,)),
        (7, ()),
        (np.float64(7), ()),
        ([], (0,)),
    ],
)
def test_numbers_in_lists_are_one_array(obs, shape):
    (leaf,) = flatten(obs)
    assert leaf.shape == shape
    assert template_of(obs) == LEAF


def test_doubles_become_singles_and_other_dtypes_stay():
    for given, kept in ((np.float64, np.float32), (np.float16, np.float16), (np.int64, np.int64), (bool, bool)):
        assert flatten({"a": np.zeros(2, given)})[0].dtype == kept
    assert flatten([0.5])[0].dtype == np.float32


def test_a_named_tuple_is_a_tuple():
    pair = namedtuple("Pair", "left right")(ARRAY, IMAGE)
    assert template_of(pair) == {"tuple": [LEAF, LEAF]}
    assert type(unflatten(template_of(pair), flatten(pair))) is tuple


def test_what_is_no_array_of_numbers_is_refused():
    for obs in (np.array([None]), object(), {"a": "text"}, ["some", "text"]):
        with pytest.raises(ValueError, match="arrays of numbers of one shape; a processor"):
            flatten(obs)
    for walk in (flatten, template_of):
        with pytest.raises(ValueError, match="must be text, not 1"):
            walk({1: ARRAY})


def test_leaves_that_do_not_fit_and_templates_that_are_none_are_refused():
    with pytest.raises(ValueError, match="1 leaves do not fit"):
        unflatten(template_of((ARRAY, ARRAY)), [ARRAY])
    with pytest.raises(ValueError, match="2 leaves do not fit"):
        unflatten(LEAF, [ARRAY, ARRAY])
    for template in (
        None,
        3,
        "dict",
        {},
        {"dict": []},
        {"tuple": {"a": LEAF}},
        {"list": [None]},
        {"a": LEAF, "b": LEAF},
    ):
        with pytest.raises(ValueError, match="no template"):
            nb_leaves(template)
