"""What ends a session from outside: Ctrl-C, SIGTERM, and SIGHUP (the terminal was closed, or ssh dropped).

A training that runs is ended at a whole step and then saved, whoever asks. Where a shell has a signal ignored, as
nohup does with SIGHUP, it stays so.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from agents.interrupt import stop_loops
from session.ctrl_c import SAME, handled
from session.screen import say
from session.session import Session
from wire.errors import FarmError

LASTING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def forget_the_terminal() -> None:
    """After a hang-up nothing can be printed to it, and a line that nobody reads shall not stop a save."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)


def _write(text: str) -> None:
    """From within a signal's handler, where `print` may be in the middle of another line."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class Unattended:
    """The signals of a training without a prompt; used with `with`.

    The first one ends the loop, or raises KeyboardInterrupt where none has begun. From then on only Ctrl-C does more:
    a second one ends the process at once. SIGTERM and SIGHUP may well come twice, from a shell and from the system.

    Attributes:
        number: of the first signal, 0 before.
        saving: set it when the loop is over; nothing is raised any more.
    """

    def __init__(self) -> None:
        self.number = 0
        self.saving = False
        self._since = 0.0

    def __enter__(self) -> Unattended:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(handled([signal.SIGINT, *LASTING], self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            forget_the_terminal()
        if self.number:
            if number == signal.SIGINT and time.monotonic() - self._since > SAME:
                _write("train.py: ended without a save\n")
                os._exit(130)
            return
        self.number, self._since = number, time.monotonic()
        if number == signal.SIGINT:
            _write("train.py: stopping, and saving what was learnt; a second Ctrl-C ends at once, without a save\n")
        if not self.saving and not stop_loops():
            raise KeyboardInterrupt


class Prompt:
    """The verbs as the prompt has them: a mistake is told in a line, and SIGTERM and SIGHUP end it with a save."""

    def __init__(self, session: Session):
        """Changes nothing yet."""
        self.session = session
        self._running: list[str] = []  # verbs
        self._number = 0

    def watch(self) -> None:
        """From now on, to the end of the process, SIGTERM and SIGHUP save what was trained and end it."""
        for number in LASTING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def names(self) -> dict[str, Any]:
        """What there is to type; the session's own methods raise where these say what is wrong."""
        one = self.session
        verbs = (one.r, one.test, one.save, one.load, one.status, one.plot, one.refarm)
        own = {"agent": one.agent, "farmer": one.farmer, "session": one}
        return dict({verb.__name__: self._told(verb) for verb in verbs}, **own)

    def _told(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = None
            self._running.append(verb.__name__)
            try:
                result = verb(*args, **kwargs)
            except (FarmError, FloatingPointError, ValueError, OSError) as error:
                say("%s: %s" % (type(error).__name__, error))
            except KeyboardInterrupt:
                say("%s() was interrupted%s" % (verb.__name__, _KEPT.get(verb.__name__, "")))
            finally:
                self._running.pop()
                if self._number:
                    self._end()
            return result if verb.__name__ == "test" else None  # the others have said theirs

        return call

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            return  # the end is under way
        if number == getattr(signal, "SIGHUP", None):
            forget_the_terminal()
        if not self._running and stop_loops():
            return  # a training that somebody called by other means; it has to come back first
        self._number = number
        if not self._running:
            self._end()
        elif self._running[-1] in ("r", "test") and not stop_loops():
            raise KeyboardInterrupt  # before its loop

    def _end(self) -> None:
        """The prompt would survive any exception, so the process ends here."""
        name = signal.Signals(self._number).name
        _write("\ntrain.py: ended by %s; what was trained since the last save is saved first\n" % name)
        try:
            self.session.leave()
            sys.stdout.flush()
        finally:
            os._exit(128 + self._number)


_KEPT = {"save": "; the saves before it are as they were"}
