"""Small things that many tests need.

poll_until(lambda: worker.poll() is not None, limit=30, what="the worker's end")
freeze(worker.pid)
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
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


def freeze(pid: int) -> None:
    """SIGSTOP, and waits until it has taken effect: `kill` comes back while threads of the process still run.

    What it had said before that may still be on its way. SIGCONT thaws it.
    """
    os.kill(pid, signal.SIGSTOP)
    poll_until(lambda: set(_thread_states(pid)) == {"T"}, 30, f"every thread of process {pid} to stand still")


def _thread_states(pid: int) -> list[str]:
    """Of each thread what Linux says it is doing: R, S, D, T for stopped, Z."""
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # this thread has ended meanwhile
            states.append((task / "stat").read_text().rpartition(")")[2].split()[0])  # behind the name
    return states
