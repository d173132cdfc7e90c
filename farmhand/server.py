"""The server of a farm, in place of Pyro4's: connections that `admission` let in, and the calls on them.

Pyro4 4.82 gives every connection a thread as soon as it is accepted, and when it has none left it reads the next one's
greeting in the loop that accepts: one silent client then stops a farm for all. It believes a header's length before it
knows the sender, and with some flags it unpacks what a stranger compressed or marshalled. Here

- a connection gets a thread only after admission: it has proven the key, or greeted where there is none;
- messages are read under limits of time and size, and only plain ones (`messages.py`): no compression, no marshal, no
  batches, no classes.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgpack
import Pyro4
import Pyro4.constants
import Pyro4.errors
import Pyro4.util
from Pyro4 import message
from Pyro4.socketserver.threadpool import NoFreeWorkersError
from Pyro4.socketserver.threadpoolserver import ClientConnectionJob, SocketServer_Threadpool
from Pyro4.socketutil import SocketConnection

from farmhand.admission import Admission, Newcomer, failure
from farmhand.messages import LongAnswer, decoded, pieces
from wire import sealed

MESSAGE_LIMIT = 10.0  #: s for a message that has begun, and for an answer to be taken (COMMTIMEOUT)
FIRST_CALL_LIMIT = 60.0  #: s for the first call on a connection that was let in; a script's user may be typing it
AT_ONCE = 1 << 14  #: bytes that are taken from a socket at a time, or more where a message is longer
BACKLOG = 1024  #: connections that the system keeps until they are accepted; Pyro4 has 100

log = logging.getLogger("farm")


class Server(SocketServer_Threadpool):
    """Pyro4's server with admission before it. Takes over the socket and the threads of one that Pyro4 made."""

    def __init__(self, made: SocketServer_Threadpool, key: bytes | None):
        super().__init__()
        for unused in (self, made):
            unused._selector.close()
        self.__dict__.update(made.__dict__)
        made.sock = made.pool = made.housekeeper = None  # or its end would close ours
        self._jobs: set[_Job] = set()
        self.sock.listen(BACKLOG)
        self.sock.setblocking(False)
        self.admission = Admission(self.sock, key, self._is_full, self._admit)

    @property
    def connections(self) -> int:
        """How many are served now."""
        return len(self._jobs)

    def loop(self, loopCondition: Callable[[], bool] = lambda: True) -> None:
        """Lets connections in until the farm stops."""
        try:
            while self.sock is not None and not self.shutting_down and loopCondition():
                try:
                    self.admission.round()
                except OSError as error:  # of one connection; the others go on
                    if not self.shutting_down:
                        log.warning("at admission: %s", error)
        finally:
            self.admission.close()

    def events(self, eventsockets: Any) -> None:
        """Pyro4's, for daemons that share a loop; a farm has its own."""
        self.admission.round()

    def _is_full(self) -> bool:
        return len(self.pool.busy) >= Pyro4.config.THREADPOOL_SIZE

    def _admit(self, newcomer: Newcomer, session: bytes | None) -> None:
        newcomer.sock.settimeout(MESSAGE_LIMIT)
        job = _Job(self, newcomer, session)
        self._jobs.add(job)
        try:
            self.pool.process(job)
        except NoFreeWorkersError:  # another connection has taken the last thread meanwhile
            job.close()

    def ended(self, job: _Job) -> None:
        """A connection is closed."""
        self._jobs.discard(job)

    def close(self) -> None:
        """Ends all connections as well: their threads would wait for hosts that are not told of the end."""
        for job in list(self._jobs):
            job.hang_up()
        super().close()


class _Job(ClientConnectionJob):
    """Serves one admitted connection, in a thread of the pool."""

    def __init__(self, server: Server, newcomer: Newcomer, key: bytes | None):
        self.csock = Connection(newcomer.sock, newcomer.heard)
        self.caddr = newcomer.who
        self.daemon = server.daemon
        self._server, self._key = server, key

    def __call__(self) -> None:
        self.daemon.begin_session(self._key)
        try:
            super().__call__()
        finally:
            self.close()

    def handleConnection(self) -> bool:
        """A proof of the key replaces the greeting; without a key a host greets as Pyro4 does."""
        if self._key is not None:
            return True
        try:
            return bool(self.daemon._handshake(self.csock))
        except (OSError, Pyro4.errors.PyroError) as error:
            log.debug("no greeting: %s", error)
            return False

    def hang_up(self) -> None:
        """Ends the thread's wait on this connection, wherever it waits."""
        with contextlib.suppress(OSError):
            self.csock.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.ended(self)
        self.csock.close()


class Connection(SocketConnection):
    """A connection as Pyro4 has it, with limits: a host may be silent between messages, but not within one.

    The socket's own limit, MESSAGE_LIMIT, is for one call of `recv`. A host that sends a byte now and then would stay
    below it for ever, so a whole message has that limit too.
    """

    def __init__(self, sock: socket.socket, ahead: bytes = b""):
        super().__init__(sock)
        self._ahead = ahead  # what was read at admission
        self._deadline: float | None = None  # of the message that is being read
        self._first_call: float | None = time.monotonic() + FIRST_CALL_LIMIT  # a host that got a thread has to use it

    def hang_up(self) -> None:
        """Ends its reading: the thread that reads from it answers the call that is under way, and then closes it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

    def send(self, *pieces: sealed.Buffer) -> None:
        """Without the copies that Pyro4 makes of what is left after each part."""
        try:
            sealed.send(self.sock, *pieces)
        except TimeoutError:
            raise Pyro4.errors.TimeoutError(f"sending: nothing was taken for {MESSAGE_LIMIT:g} s") from None
        except OSError as error:
            raise Pyro4.errors.ConnectionClosedError(f"sending: {error}") from None

    def begin(self) -> None:
        """The next byte is the first of a message."""
        self._deadline = None

    def used(self) -> None:
        """A call came: from now on the host may be silent for any time."""
        self._first_call = None

    def recv(self, size: int) -> bytes:
        """Exactly `size` bytes. Memory grows with what is really there, not with what a header says.

        What comes with them is kept for the next call: Pyro4 reads a message in three parts, which mostly come at once.
        """
        if size < 0:
            raise Pyro4.errors.ProtocolError(f"a message of {size} bytes")
        if self._deadline is None and self._ahead:
            self._deadline = time.monotonic() + MESSAGE_LIMIT
        data = self._ahead
        if len(data) < size:
            data = self._more(size)
        self._ahead = data[size:]
        return data[:size]

    def _more(self, size: int) -> bytes:
        parts, got = [self._ahead], len(self._ahead)
        while got < size:
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise Pyro4.errors.TimeoutError(f"a message was not whole within {MESSAGE_LIMIT:g} s")
            parts.append(self._from_socket(max(AT_ONCE, min(size - got, 1 << 20))))
            got += len(parts[-1])
            if self._deadline is None:
                self._deadline = time.monotonic() + MESSAGE_LIMIT
        return b"".join(parts)

    def _from_socket(self, size: int) -> bytes:
        while True:
            try:
                data = self.sock.recv(size)
            except TimeoutError:
                if self._deadline is None and (self._first_call is None or time.monotonic() < self._first_call):
                    continue  # between messages
                raise Pyro4.errors.TimeoutError(f"nothing came for {MESSAGE_LIMIT:g} s or more") from None
            except OSError as error:
                raise Pyro4.errors.ConnectionClosedError(f"receiving: {error}") from None
            if not data:
                raise Pyro4.errors.ConnectionClosedError("receiving: the other end closed it")
            return bytes(data)


class GuardedDaemon(Pyro4.Daemon):
    """Pyro4's daemon with this server: with a key nobody is heard without a proof, and messages are plain data."""

    transportServer: Any

    def __init__(self, host: str, port: int, key: bytes | None):
        self._session = threading.local()  # of the connection that a thread serves
        self._serializer = Pyro4.util.MsgpackSerializer()
        super().__init__(host=host, port=port)
        self.transportServer = Server(self.transportServer, key)

    @property
    def connections(self) -> int:
        """How many connections are served now."""
        return int(self.transportServer.connections)

    def begin_session(self, key: bytes | None) -> None:
        """From now on this thread serves another connection."""
        self._session.key = key
        self._session.seal = None if key is None else sealed.Seal(key)

    @property
    def _pyroHmacKey(self) -> bytes | None:
        """Pyro4 signs the errors of calls with it; here each connection has its own."""
        return getattr(self._session, "key", None)

    def _handshake(self, conn: Connection, denied_reason: str | None = None) -> bool:
        """Answers Pyro4's greeting, on a farm without a key; as Pyro4 does it, but decoding plain data only."""
        conn.begin()
        asked = message.Message.recv(conn, [message.MSG_CONNECT])
        try:
            if denied_reason:
                raise Pyro4.errors.CommunicationError(denied_reason)
            greeting = decoded(asked.data, asked.serializer_id, asked.flags, message.FLAGS_META_ON_CONNECT)
            response = self.validateHandshake(conn, greeting["handshake"])
            if asked.flags & message.FLAGS_META_ON_CONNECT:
                known = self.objectsById[Pyro4.constants.DAEMON_NAME]
                response = {"handshake": response, "meta": known.get_metadata(greeting["object"], as_lists=True)}
        except Exception as error:  # whatever a stranger's greeting causes, only the stranger reads it
            conn.send(failure(str(error)))
            return False
        body = msgpack.packb(response)
        conn.send(message.Message(message.MSG_CONNECTOK, body, sealed.MSGPACK, asked.flags, asked.seq).to_bytes())
        return True

    def handleRequest(self, conn: Connection) -> None:
        """Reads one call, makes it and answers, as Pyro4 does, but without the features that a farm does not use.

        Raises:
            Pyro4.errors.PyroError: the connection is broken, or must be closed.
        """
        conn.begin()
        seal = getattr(self._session, "seal", None)
        try:
            kind, flags, seq, serializer, body = sealed.read(conn.recv, seal, Pyro4.config.MAX_MESSAGE_SIZE)
        except sealed.BadMessage as error:
            raise Pyro4.errors.SecurityError(str(error)) from None
        if kind == sealed.PING:
            conn.send(sealed.packed(sealed.PING, seq, b"pong", seal))
            return
        if kind != sealed.INVOKE:
            raise Pyro4.errors.ProtocolError(f"a message of kind {kind} is no call")
        try:
            method, args, kwargs = self._call(decoded(body, serializer, flags))
            Pyro4.current_context.client = conn
            conn.used()
            result = method(*args, **kwargs)
            if isinstance(result, LongAnswer):
                reply = sealed.in_pieces(sealed.RESULT, seq, pieces(result, self._serializer.dumps), seal)
            else:
                reply = [sealed.packed(sealed.RESULT, seq, self._serializer.dumps(result), seal)]
        except Exception as error:  # of the called method: it goes to the caller
            lines = Pyro4.util.formatTraceback(detailed=False)
            self._sendExceptionResponse(conn, seq, sealed.MSGPACK, error, lines)
            return
        conn.send(*reply)

    def _call(self, call: Any) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
        """The method that a call names, and its arguments.

        Raises:
            Pyro4.errors.PyroError, AttributeError: it names none that may be called.
        """
        if not isinstance(call, list) or len(call) != 4:
            raise Pyro4.errors.ProtocolError("no call")
        name, method, args, kwargs = call
        if not (isinstance(name, str) and isinstance(method, str) and isinstance(args, list)):
            raise Pyro4.errors.ProtocolError("no call")
        if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
            raise Pyro4.errors.ProtocolError("no call")
        target = self.objectsById.get(name)
        if target is None or inspect.isclass(target):
            raise Pyro4.errors.DaemonError("unknown object")
        return Pyro4.util.getAttribute(target, method), args, kwargs
