"""The gate of a farm: who has not shown yet who he is waits here, and costs the farm nothing.

    accept -> a newcomer, heard by one selector -> proven -> a thread of the pool, and Pyro4's messages

Pyro4 4.82 gives every connection a thread as soon as it is accepted, and when it has none left it reads the next one's
greeting in the loop that accepts: one silent client then stops a farm for all. It believes a header's length before it
knows the sender, and with some flags it unpacks what a stranger compressed or marshalled. So a farm has this server
instead of Pyro4's:

- One thread accepts and hears all newcomers, without ever waiting for one of them. What they send is bounded: a proof
  has one length (`wire.auth`), and without a key a greeting has at most GREETING_LIMIT bytes. They have PROOF_LIMIT
  seconds.
- Only who has proven himself (with a key) or greeted (without) gets a thread.
- After that Pyro4's messages are read under limits of time and size, and only plain ones: no compression, no marshal,
  no batches, no classes. What msgpack gives is numbers, texts, bytes, lists and dicts.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import selectors
import socket
import struct
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

from wire import auth, sealed

PROOF_LIMIT = 5.0  #: s from the connection to the end of its proof or greeting
MESSAGE_LIMIT = 10.0  #: s for a message that has begun, and for an answer to be taken (COMMTIMEOUT)
FIRST_CALL_LIMIT = 60.0  #: s for the first call on a connection that was let in; a script's user may be typing it
GREETING_LIMIT = 1 << 16  #: bytes before a caller is known
LONG = (1 << 16) - 1  #: bytes; msgpack counts those of longer ones in 32 bits, and a copy of those takes its time
AT_ONCE = 1 << 14  #: bytes that are taken from a socket at a time, or more where a message is longer
NEWCOMERS = 256  #: at a time; one more, and the one who has waited longest goes
BACKLOG = 1024  #: connections that the system keeps until they are accepted; Pyro4 has 100
PAUSE = 0.1  #: s without accepting, when this process has no file descriptor left
ALIVE = ((10, "TCP_KEEPIDLE"), (5, "TCP_KEEPINTVL"), (3, "TCP_KEEPCNT"))  # a machine that vanished is noticed in 25 s

log = logging.getLogger("farm")


class Refusals:
    """Tells of refused connections, a line a second at most: a stranger shall not fill the farm's log either."""

    def __init__(self) -> None:
        self._untold = 0
        self._last = ""
        self._next = 0.0

    def tell(self, who: Any, why: str) -> None:
        """Writes the line, or keeps it for the next round."""
        self._untold += 1
        self._last = "a connection of %s was refused: %s" % (who, why)
        self.tell_rest()

    def tell_rest(self) -> None:
        """What was kept back, once its time has come."""
        if self._untold and time.monotonic() >= self._next:
            log.warning("%s%s", self._last, " (and %d more)" % (self._untold - 1) if self._untold > 1 else "")
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


class Gate(SocketServer_Threadpool):
    """Pyro4's server with another way in. Takes over the socket and the threads of one that Pyro4 made."""

    _selector: selectors.BaseSelector

    def __init__(self, made: SocketServer_Threadpool, key: bytes | None):
        super().__init__()
        for unused in (self, made):
            unused._selector.close()
        self.__dict__.update(made.__dict__)
        made.sock = made.pool = made.housekeeper = None  # or its end would close ours
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.sock, selectors.EVENT_READ, None)
        self._key = key
        self._newcomers: dict[int, Newcomer] = {}  # by descriptor, in the order in which they came
        self._sessions: set[_Session] = set()
        self.refusals = Refusals()
        self.sock.listen(BACKLOG)
        self.sock.setblocking(False)

    def loop(self, loopCondition: Callable[[], bool] = lambda: True) -> None:
        """Accepts, hears and dismisses until the farm stops."""
        try:
            while self.sock is not None and not self.shutting_down and loopCondition():
                try:
                    self.events([])
                except OSError as error:  # of one connection; the others go on
                    if not self.shutting_down:
                        log.warning("at the gate: %s", error)
        finally:
            for newcomer in list(self._newcomers.values()):
                self._dismiss(newcomer, None)
            self._selector.close()

    def events(self, eventsockets: Any) -> None:
        """One round: whoever is there, then those whose time is up."""
        for ready, _ in self._selector.select(self._pause()):
            if ready.data is None:
                self._accept()
            elif ready.data.fileno() in self._newcomers:  # not dismissed earlier in this round
                self._hear(ready.data)
        now = time.monotonic()
        for newcomer in list(self._newcomers.values()):
            if now < newcomer.deadline:
                break
            self._dismiss(newcomer, "it had proven nothing after %g s" % PROOF_LIMIT)
        self.refusals.tell_rest()

    def _pause(self) -> float:
        oldest = next(iter(self._newcomers.values()), None)
        return 1.0 if oldest is None else max(0.0, min(1.0, oldest.deadline - time.monotonic()))

    def _accept(self) -> None:
        listening = self.sock
        while listening is not None and not self.shutting_down:
            try:
                sock, who = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    return  # it was gone before it was accepted
                if not self._make_room("there is no descriptor left for another: %s" % error.strerror):
                    time.sleep(PAUSE)  # or this loop would spin: the one who waits is not accepted, and stays ready
                return
            if len(self._newcomers) >= NEWCOMERS:
                self._make_room("%d others wait at the gate" % NEWCOMERS)
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
        if challenge.session is not None and self._full():
            self._dismiss(
                newcomer, "all %d connections are in use" % Pyro4.config.THREADPOOL_SIZE, auth.answer(auth.FULL)
            )
        elif challenge.refused is not None:
            wants = _failure(auth.WANTS_KEY) if not answer and b"PYRO".startswith(data[:4]) else answer
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
            self._dismiss(newcomer, "it began with a message of kind %d and %d bytes" % (header.type, size))
        elif len(heard) >= message.Message.header_size + size:
            if self._full():
                why = "all %d connections are in use" % Pyro4.config.THREADPOOL_SIZE
                self._dismiss(newcomer, why, _failure("this farm has no room: " + why))
            else:
                self._admit(newcomer, None)

    def _full(self) -> bool:
        return len(self.pool.busy) >= Pyro4.config.THREADPOOL_SIZE

    def _admit(self, newcomer: Newcomer, session: bytes | None) -> None:
        self._forget(newcomer)
        newcomer.sock.settimeout(MESSAGE_LIMIT)
        job = _Session(self, newcomer, session)
        self._sessions.add(job)
        try:
            self.pool.process(job)
        except NoFreeWorkersError:  # its last thread went to somebody else meanwhile
            job.close()

    def _dismiss(self, newcomer: Newcomer, why: str | None, last_words: bytes = b"") -> None:
        """Closes a connection that got nowhere; one that went by itself (`why` is None) is not worth a line."""
        if last_words:
            _tell(newcomer, last_words)
        self._forget(newcomer)
        newcomer.sock.close()
        if why is not None:
            self.refusals.tell(newcomer.who, why)

    def _forget(self, newcomer: Newcomer) -> None:
        del self._newcomers[newcomer.fileno()]
        self._selector.unregister(newcomer)

    def close(self) -> None:
        """Ends all sessions as well: their threads would wait for hosts that are not told of the end."""
        for session in list(self._sessions):
            session.hang_up()
        super().close()


def _tell(newcomer: Newcomer, answer: bytes) -> bool:
    try:
        return newcomer.sock.send(answer) == len(answer)
    except OSError:
        return False  # gone, or it never reads: it is not waited for


def _failure(text: str) -> bytes:
    """What Pyro4's own clients understand as a refusal."""
    return message.Message(message.MSG_CONNECTFAIL, msgpack.packb(text), sealed.MSGPACK, 0, 0).to_bytes()


class _Session(ClientConnectionJob):
    """A connection that has a thread now."""

    def __init__(self, gate: Gate, newcomer: Newcomer, key: bytes | None):
        self.csock = Line(newcomer.sock, newcomer.heard)
        self.caddr = newcomer.who
        self.daemon = gate.daemon
        self._gate, self._key = gate, key

    def __call__(self) -> None:
        self.daemon.begin_session(self._key)
        try:
            super().__call__()
        finally:
            self.close()

    def handleConnection(self) -> bool:
        """A proof is all the greeting that is needed; who proves nothing greets as Pyro4 does."""
        if self._key is not None:
            return True
        try:
            return bool(self.daemon._handshake(self.csock))
        except (OSError, Pyro4.errors.PyroError) as error:
            log.debug("no greeting: %s", error)
            return False

    def hang_up(self) -> None:
        """Wakes the thread, wherever it waits on this connection."""
        with contextlib.suppress(OSError):
            self.csock.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._gate._sessions.discard(self)
        self.csock.close()


class Line(SocketConnection):
    """A connection as Pyro4 has it, with limits: a host may be silent between messages, but not within one.

    The socket's own limit, MESSAGE_LIMIT, is for one call of `recv`; who sends a byte now and then would stay below it
    for ever, so a message as a whole has that limit too.
    """

    def __init__(self, sock: socket.socket, ahead: bytes = b""):
        super().__init__(sock)
        self._ahead = ahead  # what was read at the gate
        self._deadline: float | None = None  # of the message that is being read
        self._first_call: float | None = time.monotonic() + FIRST_CALL_LIMIT  # whoever got a thread is to use it

    def hang_up(self) -> None:
        """Hears nothing more: the thread that reads from it closes it, once a call that is under way is answered."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

    def send(self, *pieces: sealed.Buffer) -> None:
        """Pyro4's own copies what is left after each part that the system took."""
        try:
            sealed.send(self.sock, *pieces)
        except TimeoutError:
            raise Pyro4.errors.TimeoutError("sending: nothing was taken for %g s" % MESSAGE_LIMIT) from None
        except OSError as error:
            raise Pyro4.errors.ConnectionClosedError("sending: %s" % error) from None

    def begin(self) -> None:
        """The next byte is the first of a message."""
        self._deadline = None

    def used(self) -> None:
        """A call came: from now on this one may be silent for as long as it likes."""
        self._first_call = None

    def recv(self, size: int) -> bytes:
        """Exactly `size` bytes. Memory grows with what is really there, not with what a header says.

        What comes with them is kept for the next call: a message is asked for in three parts and mostly there at once.
        """
        if size < 0:
            raise Pyro4.errors.ProtocolError("a message of %d bytes" % size)
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
                raise Pyro4.errors.TimeoutError("a message was not whole within %g s" % MESSAGE_LIMIT)
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
                raise Pyro4.errors.TimeoutError("nothing came for %g s or more" % MESSAGE_LIMIT) from None
            except OSError as error:
                raise Pyro4.errors.ConnectionClosedError("receiving: %s" % error) from None
            if not data:
                raise Pyro4.errors.ConnectionClosedError("receiving: the other end closed it")
            return bytes(data)


class GuardedDaemon(Pyro4.Daemon):
    """Pyro4's daemon behind the gate: with a key nobody is heard without a proof, and messages are plain data."""

    transportServer: Any

    def __init__(self, host: str, port: int, key: bytes | None):
        self._session = threading.local()  # of the connection that a thread serves
        self._serializer = Pyro4.util.MsgpackSerializer()
        super().__init__(host=host, port=port)
        self.transportServer = Gate(self.transportServer, key)

    def begin_session(self, key: bytes | None) -> None:
        """This thread serves another connection from now on."""
        self._session.key = key
        self._session.seal = None if key is None else sealed.Seal(key)

    @property
    def _pyroHmacKey(self) -> bytes | None:
        """Pyro4 signs the errors of calls with it; here each connection has its own."""
        return getattr(self._session, "key", None)

    def _handshake(self, conn: Line, denied_reason: str | None = None) -> bool:
        """Answers Pyro4's greeting, on a farm without a key; as Pyro4 does it, but decoding plain data only."""
        conn.begin()
        asked = message.Message.recv(conn, [message.MSG_CONNECT])
        try:
            if denied_reason:
                raise Pyro4.errors.CommunicationError(denied_reason)
            greeting = _decoded(asked.data, asked.serializer_id, asked.flags, message.FLAGS_META_ON_CONNECT)
            response = self.validateHandshake(conn, greeting["handshake"])
            if asked.flags & message.FLAGS_META_ON_CONNECT:
                known = self.objectsById[Pyro4.constants.DAEMON_NAME]
                response = {"handshake": response, "meta": known.get_metadata(greeting["object"], as_lists=True)}
        except Exception as error:  # whatever a stranger's greeting sets off is his to read
            conn.send(_failure(str(error)))
            return False
        body = msgpack.packb(response)
        conn.send(message.Message(message.MSG_CONNECTOK, body, sealed.MSGPACK, asked.flags, asked.seq).to_bytes())
        return True

    def handleRequest(self, conn: Line) -> None:
        """Reads one call, makes it, answers; as Pyro4 does it, without what a farm has no use for.

        Raises:
            Pyro4.errors.PyroError: the connection is broken, or is not to be listened to any longer.
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
            raise Pyro4.errors.ProtocolError("a message of kind %d is no call" % kind)
        try:
            method, args, kwargs = self._call(_decoded(body, serializer, flags))
            Pyro4.current_context.client = conn
            conn.used()
            result = method(*args, **kwargs)
            if isinstance(result, LongAnswer):
                reply = sealed.in_pieces(sealed.RESULT, seq, _pieces(result, self._serializer.dumps), seal)
            else:
                reply = [sealed.packed(sealed.RESULT, seq, self._serializer.dumps(result), seal)]
        except Exception as error:  # of the call: the caller gets it
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


class LongAnswer(list[Any]):
    """Lists of plain values, among them long bytes, which are sent from where they lie."""


#: Of msgpack: what stands before the items of a list, and before bytes.
_HEADS = msgpack.Packer()
_LONG_BYTES = struct.Struct("!BI")


def _pieces(answer: list[Any], dumps: Callable[[Any], bytes]) -> list[bytes | bytearray]:
    """What msgpack makes of it, with long bytes as pieces of their own."""
    pieces: list[bytes | bytearray] = [bytearray()]
    _add(pieces, answer, dumps)
    return pieces


def _add(pieces: list[bytes | bytearray], value: Any, dumps: Callable[[Any], bytes]) -> None:
    if isinstance(value, list):
        pieces[-1] += _HEADS.pack_array_header(len(value))
        for each in value:
            _add(pieces, each, dumps)
    elif isinstance(value, (bytes, bytearray)) and len(value) > LONG:
        pieces[-1] += _LONG_BYTES.pack(0xC6, len(value))
        pieces += (value, bytearray())
    else:
        pieces[-1] += dumps(value)


def _decoded(body: sealed.Buffer, serializer: int, flags: int, allowed_flags: int = 0) -> Any:
    """The plain data in a message's body.

    Pyro4's own decoding makes objects of dicts with "__class__" in them, expands zlib without a limit, and gives one
    kind of message to marshal. None of that happens here.
    """
    if serializer != sealed.MSGPACK:
        raise Pyro4.errors.SerializeError('a farm speaks msgpack only: set Pyro4.config.SERIALIZER = "msgpack"')
    if flags & ~allowed_flags:
        raise Pyro4.errors.ProtocolError("a farm takes plain calls only: no batches, no compression, no one-way calls")
    # timestamp=1: as floats, or msgpack would make objects of its own.
    return msgpack.unpackb(body, raw=False, ext_hook=_number, timestamp=1)


def _number(code: int, data: bytes) -> int:
    """Pyro4 sends numpy's integers, and such as have more than 64 bits, in this form."""
    if code != 0x31 or len(data) > 40:
        raise Pyro4.errors.SerializeError("a farm takes plain data only")
    return int(data)
