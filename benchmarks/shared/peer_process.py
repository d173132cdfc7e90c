"""A peer in a process of its own: the parent asks for N seconds of updates, the peer answers how many it made.

    with Peer([python, "-m", "benchmarks.peers.sbx", ...]) as peer:      # the parent
        updates, seconds = peer.run(5.0)

    serve(about, burst, fingerprint)                      # the peer

One JSON line each way over pipes. The peer's prints go to its stderr, which is shown only where it fails; it ends when
its stdin closes. Both sides import this file, so it stays within the standard library of Python 3.8.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_LIMIT, RUN_LIMIT, STOP_LIMIT = 900.0, 300.0, 20.0  #: s; the first includes filling replay and compiling
TRIES, TRY = 3, 1.0  #: how often, and for how many s, a candidate for the updates in a call is tried
ROOT = Path(__file__).resolve().parents[2]


class PeerError(Exception):
    """A peer ended, or gave no answer in time; the text has the end of what it said."""


class Peer:
    """The parent's side."""

    def __init__(self, command: list[str], start_limit: float = START_LIMIT):
        self.command = command
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the peer)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=ROOT
        )
        self.about: dict[str, Any] = self._answer(start_limit)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, seconds: float) -> tuple[int, float]:
        """(updates, seconds they took), of about as many seconds."""
        answer = self.ask({"seconds": seconds})
        return answer["updates"], answer["seconds"]

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the peer answers; `seconds` in the message are how long it is to take.

        Raises:
            PeerError: it ended, or took RUN_LIMIT longer.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure() from None
        return self._answer(RUN_LIMIT + message["seconds"])

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Ends it, within STOP_LIMIT."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        patience = threading.Timer(limit, self._process.kill)
        patience.start()
        try:
            line = self._process.stdout.readline()
        finally:
            patience.cancel()
        if not line:
            raise self._failure()
        found: dict[str, Any] = json.loads(line)
        return found

    def _failure(self) -> PeerError:
        try:
            code = self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        return PeerError("%s ended (%s):\n  %s" % (" ".join(self.command), code, "\n  ".join(said[-8:])))


def serve(
    about: dict[str, Any], burst: Callable[[int], None], fingerprint: Callable[[], float], counts: tuple[int, ...]
) -> None:
    """The peer's side: answers until stdin closes.

    Args:
        about: for the table's foot, versions of libraries by name.
        burst: makes so many updates, and returns when they are made.
        fingerprint: a number that is another one after an update of any network, to see that they did learn.
        counts: updates in a call to try; the fastest is taken, and told in `about`.

    Raises:
        RuntimeError: updates changed nothing, or led to NaN.
    """
    pipe = take_stdout()
    before = fingerprint()
    for count in counts:
        burst(count)  # compiles
    tried = [{count: _timed(burst, count, TRY) for count in counts} for _ in range(TRIES)]
    fastest = min(counts, key=lambda count: statistics.median(t[count]["seconds"] / t[count]["updates"] for t in tried))
    after = fingerprint()
    if not abs(after) < float("inf") or before == after:
        raise RuntimeError("the updates learnt nothing: %r before, %r after" % (before, after))
    about = dict(about, **{"updates in a call": fastest})
    answer_all(pipe, about, lambda message: _timed(burst, fastest, message["seconds"]))


def take_stdout() -> Any:
    """The pipe to the parent; whatever prints from now on does not reach it."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


def answer_all(pipe: Any, about: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The peer's side: says what it is, then answers each message until stdin closes."""
    _say(pipe, about)
    for line in sys.stdin:
        _say(pipe, answer(json.loads(line)))


def _timed(burst: Callable[[int], None], count: int, seconds: float) -> dict[str, Any]:
    updates, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        burst(count)
        updates += count
    return {"updates": updates, "seconds": time.perf_counter() - start}


def _say(pipe: Any, message: dict[str, Any]) -> None:
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()
