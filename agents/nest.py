"""Observations of several parts: a dict, tuple or list of arrays as a list of leaves, and back.

A template says what was taken apart, in JSON: "array" for a leaf, {"dict": {key: template}}, {"tuple": [template, ...]}
or {"list": [template, ...]}.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: The template of an observation that is one array.
LEAF = "array"


def flatten(obs: Any) -> list[np.ndarray]:
    """The arrays of an observation: a dict's by sorted key, a sequence's in order.

    A tuple or list is taken apart only where it holds an array with at least one axis, a dict or another sequence to
    be taken apart. A list of numbers, or of lists of numbers, is one array.

    Args:
        obs: an array, a number, or dicts and sequences of them.

    Returns:
        One array a leaf, float64 as float32. They may share memory with `obs`.

    Raises:
        ValueError: a leaf that is no array of numbers, or a dict with keys that are not text.
    """
    if isinstance(obs, np.ndarray):
        return [_leaf(obs)]
    if isinstance(obs, dict):
        return [leaf for key in _keys(obs) for leaf in flatten(obs[key])]
    if is_nest(obs):
        return [leaf for part in obs for leaf in flatten(part)]
    return [_leaf(obs)]


def template_of(obs: Any) -> Any:
    """What `unflatten` needs to build an observation like this one; equal for observations of one structure.

    Raises:
        ValueError: a dict with keys that are not text.
    """
    if isinstance(obs, np.ndarray):
        return LEAF
    if isinstance(obs, dict):
        return {"dict": {key: template_of(obs[key]) for key in _keys(obs)}}
    if is_nest(obs):
        return {"list" if isinstance(obs, list) else "tuple": [template_of(part) for part in obs]}
    return LEAF


def unflatten(template: Any, leaves: list[np.ndarray]) -> Any:
    """The observation again; a named tuple comes back as a tuple.

    Raises:
        ValueError: more or fewer leaves than the template has, or no template.
    """
    if nb_leaves(template) != len(leaves):
        raise ValueError("%d leaves do not fit the template %r" % (len(leaves), template))
    return _build(template, iter(leaves))


def nb_leaves(template: Any) -> int:
    """How many arrays `flatten` gives for an observation of this template.

    Raises:
        ValueError: it is no template.
    """
    if template == LEAF:
        return 1
    if isinstance(template, dict) and len(template) == 1:
        ((kind, parts),) = template.items()
        if kind == "dict" and isinstance(parts, dict):
            return sum(map(nb_leaves, parts.values()))
        if kind in ("tuple", "list") and isinstance(parts, list):
            return sum(map(nb_leaves, parts))
    raise ValueError("%r is no template of an observation" % (template,))


def is_nest(obs: Any) -> bool:
    """Whether `flatten` takes it apart."""
    if isinstance(obs, tuple | list):
        return any(part.ndim >= 1 if isinstance(part, np.ndarray) else is_nest(part) for part in obs)
    return isinstance(obs, dict)


def _build(template: Any, leaves: Any) -> Any:
    if template == LEAF:
        return next(leaves)
    ((kind, parts),) = template.items()
    if kind == "dict":
        return {key: _build(parts[key], leaves) for key in sorted(parts)}
    return (tuple if kind == "tuple" else list)(_build(part, leaves) for part in parts)


def _keys(obs: dict[Any, Any]) -> list[str]:
    for key in obs:
        if not isinstance(key, str):
            raise ValueError("the keys of an observation must be text, not %r" % (key,))
    return sorted(obs)


def _leaf(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise ValueError("observations must be arrays of numbers of one shape; a processor can make them so")
    return array.astype(np.float32) if array.dtype == np.float64 else array
