"""Small things that many tests need.

poll_until(lambda: worker.poll() is not None, limit=5, what="the worker's end")
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def poll_until(condition: Callable[[], Found], limit: float, what: str) -> Found:
    """Waits until `condition()` is true, and gives back what it returned.

    Args:
        condition: asked about every 20 ms, at least once, and once more when time is up.
        limit: seconds.
        what: what is waited for, as the message should name it.

    Raises:
        AssertionError: it did not come true in time; the text has the last value.
    """
    end = time.monotonic() + limit
    while True:
        late = time.monotonic() >= end
        found = condition()
        if found:
            return found
        if late:
            raise AssertionError(f"waited {limit:g} s for {what}; the last answer was {found!r}")
        time.sleep(0.02)
