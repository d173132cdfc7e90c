"""A fixture for every test: it fails one that leaves a process, a thread or a listening socket behind.

Each conftest.py imports it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid

import psutil
import pytest
from helpers import poll_until

# Every process that a test starts inherits this, so an orphan is known even after its parent died and it became
# init's child. It is another one in each run, so two runs beside each other do not see each other's.
_MARK = "TEST_RUN_OF_THIS_FARM"
_RUN = uuid.uuid4().hex
os.environ[_MARK] = _RUN

# Helpers that multiprocessing starts once and keeps until this process ends. (TensorFlow's pools are threads of C++,
# which `threading` does not see.)
_KEPT_BY_LIBRARIES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

_PATIENCE = 30.0  # seconds: closing is seldom done when the call that asks for it returns; less on a busy machine

# A shell that starts the tests in the background has SIGINT ignored, and so would every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Fails a test after which more processes, threads or listening sockets are there than before.

    What a fixture of a wider scope holds was there before, if that fixture is asked for by the test.
    """
    before = _present()
    yield
    with contextlib.suppress(AssertionError):
        poll_until(lambda: not _present().keys() - before.keys(), _PATIENCE, "the end of what the test started")
    left = _present()
    lines = sorted(left[key] for key in left.keys() - before.keys())
    if lines:
        pytest.fail("the test left behind:\n  " + "\n  ".join(lines), pytrace=False)


def _present() -> dict[object, str]:
    """What is there now: a key that stays the same, and words for it."""
    return {**_processes(), **_threads(), **_sockets()}


def _processes() -> dict[object, str]:
    found = {}
    me = psutil.Process()
    children = {child.pid for child in me.children(recursive=True)}
    for process in psutil.process_iter():
        if process.pid == me.pid or not (process.pid in children or _is_of_this_run(process)):
            continue
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
            command = _command(process)
            if not any(name in command for name in _KEPT_BY_LIBRARIES):
                key = ("process", process.pid, process.create_time())
                found[key] = f"process {process.pid}: {command}"
    return found


def _command(process: psutil.Process) -> str:
    # A zombie has no command line any more; psutil counts it among the processes that do not exist.
    if process.status() == psutil.STATUS_ZOMBIE:
        return f"{process.name()} (it ended, and nobody waited for it)"
    return " ".join(process.cmdline()) or process.name()


def _is_of_this_run(process: psutil.Process) -> bool:
    try:
        return process.environ().get(_MARK) == _RUN
    except (psutil.Error, OSError):
        return False


def _threads() -> dict[object, str]:
    return {
        ("thread", id(thread)): f"{'daemon ' if thread.daemon else ''}thread {thread.name}"
        for thread in threading.enumerate()
        if thread is not threading.current_thread()
    }


def _sockets() -> dict[object, str]:
    return {
        ("socket", connection.fd, connection.laddr): "socket listening on {}:{}".format(*connection.laddr)
        for connection in psutil.Process().net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
