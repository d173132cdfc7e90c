"""What a caller gives, checked in words before a farm hears of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def check_whole(name: str, value: Any, least: int, otherwise: str = "") -> None:
    """Refuses what is no whole number, or below `least`.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest that makes sense.
        otherwise: what may be given instead, for the text.

    Raises:
        TypeError, ValueError: in words.
    """
    otherwise = ", " + otherwise if otherwise else ""
    if not _is_whole(value):
        raise TypeError("%s must be a whole number%s, not %r" % (name, otherwise, value))
    if value < least:
        raise ValueError("%s must be %d or more%s, not %r" % (name, least, otherwise, value))


def check_seeds(seeds: Iterable[Any]) -> None:
    """Raises TypeError for a seed that is neither None nor a whole number."""
    for seed in seeds:
        if seed is not None and not _is_whole(seed):
            raise TypeError("a seed must be a whole number or None, not %r" % (seed,))


def refuse_unknown(verb: str, unknown: dict[str, Any]) -> None:
    """Raises TypeError for arguments that `verb` does not have: most often they are meant for the environment."""
    if not unknown:
        return
    raise TypeError(
        "%s has no argument %s\n"
        "  an environment is made on its farm, with the arguments that farm.py was given:\n"
        "  now: if %s is the environment's own, start the farm with --env-kwargs '{\"%s\": ...}'"
        % (verb, ", ".join(map(repr, unknown)), "it" if len(unknown) == 1 else "one", next(iter(unknown)))
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
