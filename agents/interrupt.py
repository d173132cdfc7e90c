"""Ctrl-C that does not tear a step apart."""

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


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Turns the first Ctrl-C into a wish, so that no command is half sent; the second one raises at once.

    Outside the main thread, where Python delivers no signals, and where somebody else handles SIGINT, nothing changes.
    """
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.wanted:
            raise KeyboardInterrupt
        interrupt.wanted = True

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
