"""Ctrl-C while a training runs at the prompt, and signals that are handled for a while."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from agents.interrupt import stop_loops

SAME = 1.0  #: s within which several Ctrl-C are one, by an impatient finger


@contextlib.contextmanager
def handled(numbers: list[int], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has signals handled that are not ignored; only the main thread can."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
        before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def one_ctrl_c() -> Iterator[None]:
    """Ctrl-C in a training at the prompt: the first ends its loop; one more, not at once, ends what takes so long."""
    since = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal since
        now = time.monotonic()
        if now - since <= SAME:
            return
        first, since = not since, now
        if not (first and stop_loops()):
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with handled([signal.SIGINT], handle):
            yield
    else:
        yield  # somebody else handles it
