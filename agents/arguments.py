"""Numbers that a caller gives, checked in words before anything is built or sent."""

from __future__ import annotations

from typing import Any

import numpy as np

_NUMBERS = (int, float, np.integer, np.floating)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError for what is no whole number from `least`; 1e5 is a usual way to write one."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS) or value % 1 != 0 or value < least:
        raise ValueError("%s must be a whole number from %d, not %r" % (name, least, value))


def check_seed(seed: Any) -> None:
    """Raises ValueError for what is neither None nor a whole number from 0."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
        raise ValueError("seed must be a whole number from 0, or None, not %r" % (seed,))


def check_gamma(gamma: Any) -> None:
    """Raises ValueError for a discount outside [0, 1], under which values would grow without end."""
    if not isinstance(gamma, _NUMBERS) or not 0 <= gamma <= 1:
        raise ValueError("gamma, the discount a step, must be a number from 0 to 1, not %r" % (gamma,))
