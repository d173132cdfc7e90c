"""The session at the researcher's desk: an agent learns from all farms at once.

ipython -i train.py -- --env Pendulum-v1 --agent ddpg      then: r(100)
python train.py --env Pendulum-v1 --episodes 100           the same, unattended
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

    def _leave(number: int, frame: FrameType | None) -> None:
        """Ctrl-C while the rest is imported: nothing has begun, and a traceback through it tells nobody anything."""
        os.write(2, b"train.py: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, _leave)

import atexit
import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import tyro

from desk.folder import Folder
from desk.options import Options
from desk.screen import shell
from wire.errors import FarmError

if TYPE_CHECKING:
    from desk.session import Session


def open_session(argv: list[str] | None = None) -> Session | None:
    """A session from a command line, None when it cannot start (which it has said then)."""
    options = tyro.cli(Options, args=argv, prog="train.py", description=__doc__)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for library in ("absl", "tensorflow", "h5py", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        options.check()
        folder = Folder(options.folder)
    except (FarmError, ValueError) as error:
        complain(error)
        return None
    try:
        session = _session(options, folder)
    except BaseException as error:
        folder.free()
        if not isinstance(error, FarmError | ValueError | OSError):
            raise
        complain(error)
        return None
    atexit.register(session.close)
    return session


def _session(options: Options, folder: Folder) -> Session:
    from desk.session import Session  # and TensorFlow, which takes seconds: a mistake in an option is told before

    if getattr(signal.getsignal(signal.SIGINT), "__name__", "") == "_leave":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return Session(options, folder)


def complain(error: BaseException) -> None:
    """What went wrong, in words."""
    print("train.py: %s: %s" % (type(error).__name__, error), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Trains unattended.

    Returns:
        The exit code: 0, 1 when the training failed, 2 when it could not start, 130 when Ctrl-C ended it and 143 when
        SIGTERM did.
    """
    session = None
    try:
        session = open_session(argv)
        return 2 if session is None else _unattended(session)
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    finally:
        if session is not None:
            session.close()


def _unattended(session: Session) -> int:
    n = session.options.episodes or 100
    with _ended_by_sigterm() as terminated:
        try:
            code = 0 if session.r(n) >= n else 130
        except KeyboardInterrupt:  # before or after its loop, which ends by itself
            code = 130
        except (FarmError, OSError) as error:
            complain(error)
            code = 1
        except (FloatingPointError, ValueError) as error:
            complain(error)
            return 1  # and the save before this one stays: these weights may be what failed
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is under way
        try:
            session.save()
            session.plot()
        except (FarmError, FloatingPointError, ValueError, OSError) as error:
            complain(error)
            return 1
    return 143 if code == 130 and terminated.is_set() else code


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[threading.Event]:
    """SIGTERM ends the training as Ctrl-C does, also where a shell has had that ignored; gives whether it came."""
    from agents.interrupt import stop_loops

    terminated = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        terminated.set()
        if not stop_loops():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    if shell() is None and not sys.flags.interactive:
        sys.exit(main())
    try:
        session = open_session(sys.argv[1:])
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        session = None
    if session is not None:
        names = session.names()
        globals().update(names)
        session.greet()
        if session.options.episodes:
            names["r"](session.options.episodes)
