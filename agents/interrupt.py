"""Ctrl-C, or whatever else ends a loop, without tearing a step apart."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupt:
    """Whether the user wants the loop to end."""

    def __init__(self) -> None:
        self.wanted = False


_running: list[Interrupt] = []  # of the loops of this process


def stop_loops() -> bool:
    """Ends the loops that run in this process as Ctrl-C does, from any thread, also where Ctrl-C itself is ignored.

    Returns:
        Whether one ran.
    """
    for interrupt in list(_running):
        interrupt.wanted = True
    return bool(_running)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Turns the first Ctrl-C into a wish, so that no command is half sent; the second one raises at once.

    Outside the main thread, where Python delivers no signals, and where somebody else handles SIGINT, only
    `stop_loops` does that.
    """
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.wanted:
            raise KeyboardInterrupt
        interrupt.wanted = True

    if ours:
        signal.signal(signal.SIGINT, handle)
    _running.append(interrupt)
    try:
        yield interrupt
    finally:
        _running.remove(interrupt)
        if ours:
            signal.signal(signal.SIGINT, before)
