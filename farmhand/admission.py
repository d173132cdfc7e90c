"""Admission: a new connection waits here until it is let in, and costs the farm nothing.

    accept -> a newcomer, read by one selector -> proven -> admitted: a thread of the server, and Pyro4's messages

One thread accepts connections and reads from all newcomers, and never waits for a single one. What they may send is
bounded: a proof of the key has one length (`wire.auth`), and on a farm without a key a greeting has at most
GREETING_LIMIT bytes. They have PROOF_LIMIT seconds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

import msgpack
import Pyro4
import Pyro4.errors
from Pyro4 import message

from wire import auth, sealed

PROOF_LIMIT = 5.0  #: s from the connection to the end of its proof or greeting
GREETING_LIMIT = 1 << 16  #: bytes before a caller is known
NEWCOMERS = 256  #: at a time; when one more comes, the one that has waited longest is dismissed
PAUSE = 0.1  #: s without accepting, when this process has no file descriptor left
ALIVE = ((10, "TCP_KEEPIDLE"), (5, "TCP_KEEPINTVL"), (3, "TCP_KEEPCNT"))  # a machine that vanished is noticed in 25 s

log = logging.getLogger("farm")


class Refusals:
    """Logs refused connections, at most one line a second: a stranger must not fill the farm's log either."""

    def __init__(self) -> None:
        self._untold = 0
        self._last = ""
        self._next = 0.0

    def tell(self, who: Any, why: str) -> None:
        """Writes the line, or keeps it for the next round."""
        self._untold += 1
        self._last = f"a connection of {who} was refused: {why}"
        self.tell_rest()

    def tell_rest(self) -> None:
        """Logs what was kept back, once its time has come."""
        if self._untold and time.monotonic() >= self._next:
            log.warning("%s%s", self._last, f" (and {self._untold - 1} more)" if self._untold > 1 else "")
            self._untold, self._next = 0, time.monotonic() + 1.0


class Newcomer:
    """A connection that has proven nothing yet."""

    def __init__(self, sock: socket.socket, who: Any, key: bytes | None):
        self.sock = sock
        self.who = who[0] if isinstance(who, tuple) and who else "this machine"
        self.deadline = time.monotonic() + PROOF_LIMIT
        self.challenge = auth.Challenge(key) if key is not None else None
        self.heard = b""  # of a greeting; a challenge keeps what it needs itself

    def fileno(self) -> int:
        return self.sock.fileno()


class Admission:
    """Decides who is let in. For one thread, the one that calls `round`."""

    def __init__(
        self,
        listening: socket.socket,
        key: bytes | None,
        is_full: Callable[[], bool],
        admit: Callable[[Newcomer, bytes | None], None],
    ):
        """Takes a socket that listens.

        Args:
            listening: must not block.
            key: what newcomers have to prove; None: a greeting of Pyro4's is enough.
            is_full: whether no other connection can be served.
            admit: takes over a connection that is let in, with the key of its session if there is one.
        """
        self.refusals = Refusals()
        self._listening, self._key, self._is_full, self._hand_over = listening, key, is_full, admit
        self._newcomers: dict[int, Newcomer] = {}  # by descriptor, in the order in which they came
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ, None)

    def round(self) -> None:
        """Waits a second at most, and hears who is there; then dismisses those whose time is up."""
        for ready, _ in self._selector.select(self._pause()):
            if ready.data is None:
                self._accept()
            elif ready.data.fileno() in self._newcomers:  # not dismissed earlier in this round
                self._hear(ready.data)
        now = time.monotonic()
        for newcomer in list(self._newcomers.values()):
            if now < newcomer.deadline:
                break
            self._dismiss(newcomer, f"it had proven nothing after {PROOF_LIMIT:g} s")
        self.refusals.tell_rest()

    def close(self) -> None:
        """Dismisses everybody; the listening socket stays open."""
        for newcomer in list(self._newcomers.values()):
            self._dismiss(newcomer, None)
        self._selector.close()

    def _pause(self) -> float:
        oldest = next(iter(self._newcomers.values()), None)
        return 1.0 if oldest is None else max(0.0, min(1.0, oldest.deadline - time.monotonic()))

    def _accept(self) -> None:
        while True:
            try:
                sock, who = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    return  # it was gone before it was accepted
                if not self._make_room(f"there is no descriptor left for another: {error.strerror}"):
                    time.sleep(PAUSE)  # or this loop would spin: the connection is not accepted, and stays ready
                return
            if len(self._newcomers) >= NEWCOMERS:
                self._make_room(f"{NEWCOMERS} others wait for admission")
            self._welcome(Newcomer(sock, who, self._key))

    def _welcome(self, newcomer: Newcomer) -> None:
        newcomer.sock.setblocking(False)
        with contextlib.suppress(OSError):  # a socket of another family, or gone already
            newcomer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            newcomer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for value, name in ALIVE:
                if hasattr(socket, name):
                    newcomer.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._newcomers[newcomer.fileno()] = newcomer
        self._selector.register(newcomer, selectors.EVENT_READ, newcomer)

    def _make_room(self, why: str) -> bool:
        oldest = next(iter(self._newcomers.values()), None)
        if oldest is not None:
            self._dismiss(oldest, why)
        return oldest is not None

    def _hear(self, newcomer: Newcomer) -> None:
        try:
            data = newcomer.sock.recv(GREETING_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._dismiss(newcomer, None)
        elif newcomer.challenge is not None:
            self._judge_proof(newcomer, newcomer.challenge, data)
        else:
            self._judge_greeting(newcomer, data)

    def _judge_proof(self, newcomer: Newcomer, challenge: auth.Challenge, data: bytes) -> None:
        answer = challenge.feed(data)
        if challenge.session is not None and self._is_full():
            self._dismiss(
                newcomer, f"all {Pyro4.config.THREADPOOL_SIZE} connections are in use", auth.answer(auth.FULL)
            )
        elif challenge.refused is not None:
            wants = failure(auth.WANTS_KEY) if not answer and b"PYRO".startswith(data[:4]) else answer
            self._dismiss(newcomer, challenge.refused, wants)
        elif answer and not _tell(newcomer, answer):
            self._dismiss(newcomer, None)
        elif challenge.session is not None:
            self._admit(newcomer, challenge.session)

    def _judge_greeting(self, newcomer: Newcomer, data: bytes) -> None:
        newcomer.heard += data
        heard = newcomer.heard
        if heard.startswith(auth.MAGIC):
            self._dismiss(newcomer, "it wants to prove a key, and this farm has none", auth.answer(auth.NO_KEY))
            return
        if len(heard) < message.Message.header_size and any(
            start.startswith(heard[: len(start)]) for start in (b"PYRO", auth.MAGIC)
        ):
            return  # so far it may become either
        try:
            header = message.Message.from_header(heard[: message.Message.header_size])
        except Pyro4.errors.ProtocolError as error:
            self._dismiss(newcomer, str(error))
            return
        size = header.annotations_size + header.data_size
        if header.type != message.MSG_CONNECT or header.data_size < 0 or size > GREETING_LIMIT:
            self._dismiss(newcomer, f"it began with a message of kind {header.type} and {size} bytes")
        elif len(heard) >= message.Message.header_size + size:
            if self._is_full():
                why = f"all {Pyro4.config.THREADPOOL_SIZE} connections are in use"
                self._dismiss(newcomer, why, failure("this farm has no room: " + why))
            else:
                self._admit(newcomer, None)

    def _admit(self, newcomer: Newcomer, session: bytes | None) -> None:
        self._forget(newcomer)
        self._hand_over(newcomer, session)

    def _dismiss(self, newcomer: Newcomer, why: str | None, last_words: bytes = b"") -> None:
        """Closes a connection that is not admitted; one that closed by itself (`why` is None) is not logged."""
        if last_words:
            _tell(newcomer, last_words)
        self._forget(newcomer)
        newcomer.sock.close()
        if why is not None:
            self.refusals.tell(newcomer.who, why)

    def _forget(self, newcomer: Newcomer) -> None:
        del self._newcomers[newcomer.fileno()]
        self._selector.unregister(newcomer)


def _tell(newcomer: Newcomer, answer: bytes) -> bool:
    try:
        return newcomer.sock.send(answer) == len(answer)
    except OSError:
        return False  # gone, or it never reads: nobody waits for it


def failure(text: str) -> bytes:
    """What Pyro4's own clients understand as a refusal."""
    return message.Message(message.MSG_CONNECTFAIL, msgpack.packb(text), sealed.MSGPACK, 0, 0).to_bytes()
