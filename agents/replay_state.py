"""A replay as columns and a description: what a checkpoint holds of it.

The description, for JSON: "limit", "window_length", "count", "template" (the structure of an observation), "columns"
(name: dtype and shape of a row), "heads" (the newest entries of running episodes) and "rng". The columns of an entry
are those of `agents.ring.Ring`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from agents import nest
from agents.ring import Ring, new_columns

Part = tuple[Any, Mapping[str, np.ndarray]]  #: entry numbers and their columns


class SavedReplay(Protocol):
    """A replay as `agents.checkpoint.Checkpointer` sees it; `agents.ReplayMemory` has docstrings for each."""

    lock: Any

    @property
    def count(self) -> int:
        """Entries ever begun."""

    @property
    def oldest(self) -> int:
        """The smallest number that is still there."""

    def changed(self, since: int) -> np.ndarray:
        """Numbers to be written again."""

    def columns(self, numbers: Any) -> dict[str, np.ndarray]:
        """Everything about these entries."""

    def mark_saved(self) -> None:
        """All that is there now is saved."""

    def meta(self) -> dict[str, Any]:
        """The description."""

    def restore(self, meta: Mapping[str, Any], parts: Iterable[Part]) -> None:
        """Becomes what was saved."""


class NoReplay:
    """Stands for the replay of an agent that has none."""

    count = oldest = 0

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def changed(self, since: int) -> np.ndarray:
        """Nothing."""
        return np.zeros(0, np.int64)

    def columns(self, numbers: Any) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def mark_saved(self) -> None:
        """Nothing to do."""

    def meta(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, meta: Mapping[str, Any], parts: Iterable[Part]) -> None:
        """Raises ValueError when there was a replay."""
        if meta:
            raise ValueError("it holds a replay, and this agent learns from none")


@dataclass
class Restored:
    """A ring as it was saved, with the heads of the episodes that ran and the draws' generator."""

    ring: Ring
    heads: list[int]
    rng: np.random.Generator


def describe(ring: Ring, heads: Iterable[int], rng: np.random.Generator) -> dict[str, Any]:
    """The description of a replay."""
    return {
        "limit": ring.limit,
        "window_length": ring.window_length,
        "count": ring.count,
        "template": ring.template,
        "columns": {name: [column.dtype.str, list(column.shape[1:])] for name, column in ring.columns.items()},
        "heads": sorted(heads),
        "rng": rng.bit_generator.state,
    }


def restored(meta: Mapping[str, Any], parts: Iterable[Part], limit: int, window_length: int) -> Restored:
    """The replay that was saved.

    Args:
        meta: its description at the last save.
        parts: of each save in order, read one by one; a later part overrides an earlier one, entries that were
            overwritten before the last save are passed over.
        limit, window_length: of the memory that takes it.

    Raises:
        ValueError: it is of a memory of another limit or window, or damaged. Errors in reading `parts` pass through.
    """
    _check_sizes(meta, limit, window_length)
    count, template, columns, heads, rng = _read_meta(meta)
    oldest, given = max(0, count - limit), np.zeros(limit, bool)
    for part in parts:
        numbers, found = _read_part(part, columns, count)
        kept = numbers >= oldest
        for name, column in columns.items():
            column[numbers[kept] % limit] = found[name][kept]
        given[numbers[kept] % limit] = True
    _check_links(columns, np.arange(oldest, count), given)
    ring = Ring(limit, window_length)
    ring.install(template, columns)
    ring.count = count
    ring.complete = int(np.count_nonzero(columns["step"])) if columns else 0
    return Restored(ring, heads, rng)


def _check_sizes(meta: Mapping[str, Any], mine: int, stacked: int) -> None:
    try:
        limit, window = int(meta["limit"]), int(meta["window_length"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged("%r in its description" % (error,)) from None
    if limit != mine:
        raise ValueError("the checkpoint's replay holds %d transitions, this agent's %d" % (limit, mine))
    if window != stacked:
        raise ValueError("the checkpoint's replay stacks %d observations, this agent's %d" % (window, stacked))


def _damaged(what: str) -> ValueError:
    return ValueError("the checkpoint's replay is damaged: " + what)


def _read_meta(
    meta: Mapping[str, Any],
) -> tuple[int, Any, dict[str, np.ndarray], list[int], np.random.Generator]:
    """Count, template, empty rings, heads and random generator of a description whose sizes are checked."""
    try:
        count, template, columns = int(meta["count"]), meta["template"], meta["columns"]
        heads = [int(head) for head in meta["heads"]]
        rng = np.random.Generator(np.random.PCG64())
        rng.bit_generator.state = meta["rng"]
        rings = _rings_like(int(meta["limit"]), template, columns) if columns else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged("%r in its description" % (error,)) from None
    if count < 0 or any(not 0 <= head < count for head in heads):
        raise _damaged("%d entries and running episodes at %s" % (count, heads))
    return count, template, rings, heads, rng


def _rings_like(limit: int, template: Any, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    like = {name: np.empty(tuple(shape), np.dtype(kind)) for name, (kind, shape) in columns.items()}
    rings = new_columns(limit, [like["obs/%d" % leaf] for leaf in range(nest.nb_leaves(template))], like["action"])
    if {name: (ring.dtype, ring.shape[1:]) for name, ring in rings.items()} != {
        name: (array.dtype, array.shape) for name, array in like.items()
    }:
        raise ValueError("columns %s" % dict(columns))
    return rings


def _read_part(part: tuple[Any, Mapping[str, np.ndarray]], rings: dict[str, np.ndarray], count: int) -> tuple[Any, Any]:
    """A part's numbers and columns, as arrays that fit the rings."""
    numbers, given = np.asarray(part[0]), part[1]
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise _damaged("entry numbers of %s %s" % (numbers.dtype, numbers.shape))
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < count):
        raise _damaged("entries %d to %d of %d" % (numbers.min(), numbers.max(), count))
    columns = {}
    for name, ring in rings.items():
        if name not in given:
            raise _damaged("no column %r" % name)
        columns[name] = column = np.asarray(given[name])
        if (column.dtype, column.shape) != (ring.dtype, (len(numbers), *ring.shape[1:])):
            wanted = (ring.dtype, (len(numbers), *ring.shape[1:]))
            raise _damaged("column %r is %s %s instead of %s %s" % (name, column.dtype, column.shape, *wanted))
    return numbers.astype(np.int64), columns


def _check_links(rings: dict[str, np.ndarray], numbers: np.ndarray, given: np.ndarray) -> None:
    """Every entry is there, and points back to an earlier and on to a later one."""
    at = numbers % len(given)
    if not given[at].all():
        raise _damaged("entry %d is missing" % numbers[~given[at]][0])
    if not len(numbers):
        return
    previous, following, step = (rings[name][at] for name in ("previous", "following", "step"))
    wrong = (previous < -1) | (previous >= numbers) | (following > numbers[-1])
    wrong |= np.where(step, following <= numbers, following != -1)
    if wrong.any():
        raise _damaged("entry %d is linked to %d and %d" % (numbers[wrong][0], previous[wrong][0], following[wrong][0]))
