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
import logging
from typing import TYPE_CHECKING

import tyro

from session.folder import Folder
from session.options import Options
from session.screen import shell
from wire.errors import FarmError

if TYPE_CHECKING:
    from session.session import Session


def open_session(argv: list[str] | None = None) -> Session | None:
    """A session from a command line, None when it cannot start (which it has said then)."""
    try:
        return _opened(argv)
    finally:
        if getattr(signal.getsignal(signal.SIGINT), "__name__", "") == "_leave":
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _opened(argv: list[str] | None) -> Session | None:
    options = tyro.cli(Options, args=argv, prog="train.py", description=__doc__)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for library in ("absl", "tensorflow", "h5py", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        options.check()
        folder = Folder(options.folder)
    except (FarmError, ValueError, OSError) as error:
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
    atexit.register(session.leave)
    return session


def _session(options: Options, folder: Folder) -> Session:
    from session.farms import Farms

    farms = Farms(options, folder.path)
    try:
        from session.session import Session  # and TensorFlow, which takes seconds: what farms refuse is told before

        return Session(options, folder, farms)
    except BaseException:
        farms.close()
        raise


def complain(error: BaseException) -> None:
    """What went wrong, in words."""
    print("train.py: %s: %s" % (type(error).__name__, error), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Trains unattended.

    Returns:
        The exit code: 0, 1 when the training failed, 2 when it could not start, 128 and the signal's number when one
        ended it: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
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
    from session.ending import Unattended

    n = session.options.episodes or 100
    with Unattended() as ended:
        code = 0
        try:
            if session.r(n) < n:
                code = 1
        except KeyboardInterrupt:  # before or after its loop, which ends by itself
            code = 1
        except (FarmError, OSError) as error:
            complain(error)
            code = 1
        except (FloatingPointError, ValueError) as error:
            complain(error)
            return 1  # and the save before this one stays: these weights may be what failed
        ended.saving = True
        if code and ended.number:
            code = 128 + ended.number
        try:
            session.save()
            session.plot()
        except (FarmError, FloatingPointError, ValueError, OSError) as error:
            complain(error)
            return 1
    return code


def _prompt() -> None:
    """The session at the prompt, whose names come into this module."""
    session = None
    try:
        session = open_session(sys.argv[1:])
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, KeyboardInterrupt):
            print("train.py: interrupted", file=sys.stderr)
    if session is None:  # and the prompt comes whatever is raised here
        print("train.py: nothing was started; leave with exit, and correct the line", file=sys.stderr)
        return
    from session.ending import Prompt

    prompt = Prompt(session)
    prompt.watch()
    names = prompt.names()
    globals().update(names)
    session.greet()
    if session.options.episodes:
        names["r"](session.options.episodes)


if __name__ == "__main__":
    if shell() is None and not sys.flags.interactive:
        sys.exit(main())
    _prompt()
