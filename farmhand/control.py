"""Commands of a farm's owner to a farm that runs: a socket in the folder of its logs, for the same user only.

python farm.py --release 3 --port 20099

Hosts do not use it, and it needs no key: the file's permissions decide who may.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wire.errors import FarmError, StartError

NAME = "control"
LIMIT = 5.0  #: s for a request and its answer
LONGEST = 4096  #: bytes of either

log = logging.getLogger("farm")


class Control:
    """Answers requests, one at a time: `{"release": 3}` is `verbs["release"](3)`, and the answer is its text."""

    def __init__(self, folder: Path, verbs: dict[str, Callable[[Any], str]]):
        """Opens the socket. Where that is impossible, the farm runs without it and logs why."""
        self._verbs = verbs
        self._path = folder / NAME
        self._socket = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()  # of a farm that was killed
            self._socket.bind(str(self._path))
            os.chmod(self._path, 0o600)
            self._socket.listen(4)
        except OSError as error:
            log.warning("no --release on this farm: cannot make %s: %s", self._path, error)
            self._socket.close()
            return
        self._thread.start()

    def close(self) -> None:
        """Closes the socket."""
        if self._thread.ident is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread's wait
            self._thread.join(LIMIT)
            self._socket.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection:
                connection.settimeout(LIMIT)
                try:
                    connection.sendall(json.dumps(self._answer(connection.recv(LONGEST))).encode())
                except OSError as error:
                    log.info("a request from this machine broke off: %s", error)

    def _answer(self, request: bytes) -> dict[str, str]:
        try:
            ((verb, argument),) = json.loads(request).items()
            return {"done": self._verbs[verb](argument)}
        except FarmError as error:
            return {"error": str(error)}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"error": f"not understood: {request[:200]!r}"}


def ask(folder: Path, verb: str, argument: Any) -> str:
    """Asks the farm whose logs are in `folder`.

    Raises:
        StartError: no farm is there, it does not answer, or it refuses.
    """
    path = folder / NAME
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(LIMIT)
            connection.connect(str(path))
            connection.sendall(json.dumps({verb: argument}).encode())
            answer = json.loads(connection.recv(LONGEST) or b"{}")
    except (OSError, ValueError) as error:
        raise StartError(
            f"no farm of this user answers at {path}: {error}\n"
            "  now: name its port with --port, or the folder of its logs with --log-dir"
        ) from None
    if "done" not in answer:
        raise StartError(answer.get("error", "the farm ended before it answered"))
    return str(answer["done"])
