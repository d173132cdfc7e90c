"""One farm over Pyro4: the only file of the host's side that knows Pyro4.

A farm is four verbs: describe, acquire, exchange, release. Another engine can stand behind them without a change
elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgpack
import Pyro4
import Pyro4.errors
import Pyro4.util
from Pyro4.socketutil import SocketConnection

from farmer.farmlist import FarmAddress, load_farmlist
from farmer.tunnel import Tunnel
from wire import auth, protocol, sealed
from wire.errors import (
    FarmError,
    FarmLost,
    FarmRefused,
    FarmTimeout,
    FarmUnreachable,
    KeyRefused,
    MessageDamaged,
    ProtocolMismatch,
    from_wire,
)

CONNECT_LIMIT = 5.0  #: s for connecting and for the first answer, unless the caller says otherwise
ANSWER_LIMIT = 3.0  #: s without an answer, after which a call fails
AT_ONCE = 1 << 14  #: bytes that are taken from a socket at a time
LONG = (
    1 << 16
)  #: bytes from which on memory is kept for them: to get it anew from the system costs more than to fill it
EXCHANGE_LIMIT = 8.0  #: the same for an exchange, unless the caller says otherwise: more than the longest wait


def _configure() -> None:
    Pyro4.config.SERIALIZER = "msgpack"
    Pyro4.config.SERIALIZERS_ACCEPTED = {"msgpack"}
    Pyro4.config.MAX_MESSAGE_SIZE = protocol.MAX_BODY
    Pyro4.config.SOCK_NODELAY = True


class Connection:
    """One TCP connection to one farm. For one thread at a time."""

    def __init__(
        self,
        address: FarmAddress,
        key: bytes | None = None,
        tunnel: Tunnel | None = None,
        limit: float | None = None,
    ):
        """Connects, proves the key, and checks that a farm of our protocol answers.

        Args:
            address: of the farmlist.
            key: the farm's, proven by both ends before anything else; None for a farm without one.
            tunnel: the way to an ssh:// address; opened here when it is not open.
            limit: seconds for each of connecting and the first answer; None: CONNECT_LIMIT.

        Raises:
            FarmUnreachable: nothing answers there, or something that is no farm.
            KeyRefused: the farm has another key, or one side has none.
            ProtocolMismatch: a farm of another version.
        """
        self.address = address
        self._key, self._tunnel = key, tunnel
        limit = CONNECT_LIMIT if limit is None else limit
        self._check = 0  # the checksum of what `begin` has sent
        self._watch, self._watched = select.poll(), -1  # for `is_answered`, and the descriptor that it looks at
        started = time.monotonic()
        self._proxy = open_proxy("farm", address, key, tunnel, limit)
        try:
            self.about = self.describe()
        except FarmError as error:
            self.close()
            cause = error.__cause__ or error
            if auth.WANTS_KEY in str(cause):
                raise _wants_key(address) from None
            raise _unreachable(address, cause, time.monotonic() - started) from None
        if self.about.get("protocol") != protocol.VERSION:
            self.close()
            raise ProtocolMismatch(
                "the farm at %s speaks protocol %s, this host %d\n  now: bring both to the same version of this project"
                % (address, self.about.get("protocol"), protocol.VERSION)
            )
        self._proxy._pyroTimeout = ANSWER_LIMIT

    def another(self, limit: float | None = None) -> Connection:
        """One more connection to the same farm; errors as of the first."""
        return Connection(self.address, self._key, self._tunnel, limit)

    def describe(self) -> dict[str, Any]:
        """Protocol, identity, slots, free slots, environments with their spaces, their seconds a step."""
        return self._call("describe")

    def acquire(self, env: str, count: int, lease: str | None = None) -> dict[str, Any]:
        """Leases slots, or adds to a lease until it has `count`: {"lease", "slots", "ready"}."""
        return self._call("acquire", env, count, protocol.VERSION, lease)

    def exchange(
        self, lease: str, commands: list[Any], wait: float, together: int = 1, line: int = 0, limit: float | None = None
    ) -> list[Any]:
        """Hands over commands [slot, seq, kind, body]; returns replies [slot, seq, kind, flags, body, crc].

        A reply's `crc` is what `codec.decode` takes with its body, of a large one.

        Args:
            lease: whose slots they are for.
            commands: all of them are done, or none.
            wait: seconds to wait for a first reply.
            together: replies that are waited for a moment longer.
            line: grows with each connection that replaces a broken one; calls on older ones get nothing more.
            limit: seconds for the answer; None: EXCHANGE_LIMIT.

        Raises:
            MessageDamaged: the message or its answer was changed on the way.
            FarmError: no answer, or no such lease.
        """
        self.begin(lease, commands, wait, together, line, limit)
        return self.finish()

    def begin(
        self, lease: str, commands: list[Any], wait: float, together: int = 1, line: int = 0, limit: float | None = None
    ) -> None:
        """The first half of `exchange`, which waits for nothing; `finish` must be the next call.

        Args:
            lease, commands, wait, together, line: as of `exchange`.
            limit: seconds for each of taking the message and giving the answer.
        """
        self._check = protocol.checksum([lease, wait, together, line], commands, protocol.sums(commands))
        limit = EXCHANGE_LIMIT if limit is None else limit
        if self._proxy._pyroTimeout != limit:  # setting it costs a system call
            self._proxy._pyroTimeout = limit
        try:
            self._proxy._post("exchange", (lease, commands, wait, together, line, self._check))
        except Exception as error:
            raise self._in_words(error, "exchange") from error

    def fileno(self) -> int:
        """Of the socket, which becomes readable with the answer to `begin`; -1 when it is closed."""
        return self._proxy._fileno()

    def is_answered(self, wait: float) -> bool:
        """Whether the answer to `begin`, or the connection's end, is there; after `wait` seconds at most."""
        fd = self.fileno()
        if fd < 0:
            return True  # `finish` says so
        if self._watched != fd:
            self._watch, self._watched = select.poll(), fd
            self._watch.register(fd, select.POLLIN)
        return bool(self._watch.poll(wait * 1000))

    def finish(self) -> list[Any]:
        """The second half of `exchange`: waits for the answer. Errors as its."""
        try:
            answer = self._proxy._fetch()
        except Exception as error:
            raise self._in_words(error, "exchange") from error
        try:
            replies, told = self._without_error(answer)
            sums = protocol.sums(replies)
            whole = protocol.checksum([self._check], replies, sums) == told
        except (TypeError, ValueError, IndexError):
            whole = False
        if not whole:
            self.close()
            raise MessageDamaged("an answer of the farm at %s was changed on its way here" % self.address)
        return [[*reply, crc] for reply, crc in zip(replies, sums, strict=True)]

    def release(self, lease: str, slots: list[int] | None = None) -> None:
        """Ends a lease, or takes some slots out of it."""
        self._call("release", lease, slots)

    def close(self) -> None:
        """Closes the socket; a lease of it lives on at the farm until it is released or expires."""
        self._proxy._pyroRelease()

    def _call(self, verb: str, *args: Any) -> Any:
        try:
            answer = self._proxy._pyroInvoke(verb, args, {})
        except Exception as error:
            raise self._in_words(error, verb) from error
        return self._without_error(answer)

    def _in_words(self, error: Exception, verb: str) -> FarmError:
        if isinstance(error, Pyro4.errors.TimeoutError):
            return FarmTimeout("the farm at %s gave no answer to %s" % (self.address, verb))
        # A damaged answer may raise anything in Pyro4, and a farm sends any class.
        self.close()  # nobody knows what stands in this stream next
        return FarmLost("the farm at %s: %s: %s" % (self.address, type(error).__name__, error))

    def _without_error(self, answer: Any) -> Any:
        if isinstance(answer, dict) and "error" in answer:
            name, text = answer["error"]
            raise from_wire(name, "the farm at %s: %s" % (self.address, text))
        return answer


def open_object(name: str, address: str, key_file: str | os.PathLike[str] | None = None) -> Pyro4.Proxy:
    """One Pyro4 object of a farm with a key, for a script.

    with open_object("slot-0", "127.0.0.1:20099", "farm.key") as slot: slot.reset(7)

    Args:
        name: `slot-3`, or `farm`.
        address: as in farmlist.py, but for ssh://.
        key_file: the farm's key; None takes FARM_KEY, or else no key at all.

    Returns:
        The proxy, to be closed by `with`. It is for this one connection: when that is lost, open another.

    Raises:
        BadKey, FarmUnreachable, KeyRefused: in words.
    """
    where = load_farmlist([(address, 1)])[0]
    proxy = open_proxy(name, where, auth.find_key(key_file), None)
    if proxy._pyroHmacKey is not None:
        proxy._pyroTimeout = None  # a step may take its time
    return proxy


def open_proxy(
    name: str, address: FarmAddress, key: bytes | None, tunnel: Tunnel | None, limit: float = CONNECT_LIMIT
) -> _Swift:
    """A proxy of an object of a farm: with a key proven and connected, without one it connects at its first call.

    Raises:
        FarmUnreachable, KeyRefused, FarmRefused: in words.
    """
    _configure()
    path = tunnel.open() if tunnel is not None else None
    if key is None:
        proxy = _Swift("PYRO:%s@%s" % (name, address if path is None else "./u:" + path))
        proxy._pyroTimeout = limit
        return proxy
    started = time.monotonic()
    sock = None
    try:
        sock = _connected(address, path, limit)
        session = auth.prove(sock, key, limit)
        return _Proven(name, sock, session, limit)
    except FarmRefused as error:
        _close(sock)
        raise type(error)("the farm at %s: %s" % (address, error)) from None
    except OSError as error:
        _close(sock)
        raise _unreachable(address, error, time.monotonic() - started) from None


def _connected(address: FarmAddress, path: str | None, limit: float) -> socket.socket:
    if path is None:
        sock = socket.create_connection((address.host, address.port), limit)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(limit)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.close()


_MSGPACK = Pyro4.util.MsgpackSerializer()


class _Swift(Pyro4.Proxy):
    """A proxy whose messages are made and read faster than Pyro4 does it; the connecting it leaves to Pyro4."""

    _pyroSeq: int
    _pyroConnection: Any
    _seal: sealed.Seal | None
    _busy: threading.RLock

    def __init__(self, uri: str, connected_socket: socket.socket | None = None):
        object.__setattr__(self, "_seal", None)
        object.__setattr__(self, "_busy", threading.RLock())  # connecting asks for metadata by a call
        super().__init__(uri, connected_socket=connected_socket)

    def _line(self) -> _Line | None:
        """The connection; None before the first call on it, which is Pyro4's."""
        line = self._pyroConnection
        if line is not None and not isinstance(line, _Line):
            line.keep_open = True  # or its end would close the socket
            line = self._pyroConnection = _Line(line.sock, line.objectId)
        return line

    def _pyroInvoke(self, methodname: str, vargs: Any, kwargs: Any, flags: int = 0, objectId: str | None = None) -> Any:
        """Pyro4's call."""
        with self._busy:
            line = self._line()
            if line is None:
                return super()._pyroInvoke(methodname, vargs, kwargs, flags, objectId)
            self._post(methodname, vargs, kwargs, objectId)
            return self._fetch()

    def _post(self, methodname: str, vargs: Any, kwargs: Any = None, objectId: str | None = None) -> None:
        """The first half of a call on a connection that has had its first one."""
        line = self._line()
        if line is None:
            raise Pyro4.errors.ConnectionClosedError("the connection to the farm is closed")
        call = (objectId or line.objectId, methodname, vargs, kwargs or {})
        self._pyroSeq = (self._pyroSeq + 1) & 0xFFFF
        try:
            line.send(sealed.packed(sealed.INVOKE, self._pyroSeq, _MSGPACK.dumps(call), self._seal))
        except BaseException:  # also Ctrl-C: half a message would be taken for the beginning of the next one
            self._pyroRelease()
            raise

    def _fetch(self) -> Any:
        """The second half: waits for the answer to `_post`."""
        line = self._line()
        if line is None:
            raise Pyro4.errors.ConnectionClosedError("the connection to the farm is closed")
        try:
            kind, answer, seq, _, body = sealed.read(line.recv, self._seal, protocol.MAX_BODY)
            if (kind, seq) != (sealed.RESULT, self._pyroSeq):
                raise sealed.BadMessage("an answer to something else")
        except sealed.BadMessage as error:
            self._pyroRelease()
            raise Pyro4.errors.ProtocolError(str(error)) from None
        except BaseException:  # also Ctrl-C: what is still to come would be taken for the next call's answer
            self._pyroRelease()
            raise
        # As Pyro4 does it, without a copy of the body.
        value = msgpack.unpackb(body, raw=False, object_hook=_MSGPACK.object_hook, ext_hook=_MSGPACK.ext_hook)
        if answer & sealed.EXCEPTION:
            raise value
        return value

    def _fileno(self) -> int:
        """Of the socket; -1 when it is closed."""
        line = self._pyroConnection
        return -1 if line is None else line.sock.fileno()


class _Proven(_Swift):
    """A proxy over a connection that has proven its key. Both ends sign all messages with a key of this connection."""

    def __init__(self, name: str, sock: socket.socket, session: bytes, limit: float):
        super().__init__(name, connected_socket=sock)
        self._pyroHmacKey = session
        self._pyroTimeout = limit
        object.__setattr__(self, "_seal", sealed.Seal(session))
        self._pyroConnection = _Line(sock, name)  # not the one that Pyro4 made, which would be left open after an error

    def _line(self) -> _Line:
        """There is none but the one that has proven itself."""
        if self._pyroConnection is None:
            raise Pyro4.errors.ConnectionClosedError("the connection to the farm is closed; open another")
        line: _Line = self._pyroConnection
        return line

    def _pyroGetMetadata(self, objectId: str | None = None, known_metadata: Any = None) -> None:
        # Pyro4 asks for this already while it is made, when it cannot sign yet; a script's first call asks again.
        if self._pyroHmacKey is not None:
            super()._pyroGetMetadata(objectId, known_metadata)


class _Line(SocketConnection):
    """Pyro4 asks for a message in three parts; here the first takes from the socket all that is there."""

    def __init__(self, sock: socket.socket, name: str):
        super().__init__(sock, name)
        self._ahead = b""
        self._room = memoryview(b"")

    def send(self, data: bytes) -> None:
        """Pyro4's own copies what is left after each part that the system took."""
        try:
            sealed.send(self.sock, data)
        except TimeoutError:
            raise Pyro4.errors.TimeoutError("sending: timeout") from None
        except OSError as error:
            raise Pyro4.errors.ConnectionClosedError("sending: connection lost: %s" % error) from None

    def recv(self, size: int) -> sealed.Buffer:
        """Exactly `size` bytes."""
        ahead = self._ahead
        if size - len(ahead) > LONG:
            return self._long(size)
        while len(ahead) < size:
            ahead += self._received(lambda: self.sock.recv(AT_ONCE))
        self._ahead = ahead[size:]
        return ahead[:size]

    def _long(self, size: int) -> memoryview:
        """The same for a long one, in memory that the next long one is read to as well."""
        if len(self._room) < size:
            self._room = memoryview(bytearray(size))
        data, got = self._room[:size], len(self._ahead)
        data[:got], self._ahead = self._ahead, b""
        while got < size:
            got += self._received(functools.partial(self.sock.recv_into, data[got:]))
        return data

    def _received(self, recv: Callable[[], Any]) -> Any:
        try:
            got = recv()
        except TimeoutError:
            raise Pyro4.errors.TimeoutError("receiving: timeout") from None
        except OSError as error:
            raise Pyro4.errors.ConnectionClosedError("receiving: connection lost: %s" % error) from None
        if not got:
            raise Pyro4.errors.ConnectionClosedError("receiving: the farm closed the connection")
        return got


#: What comes from something that listens, but does not speak as a farm does.
_NO_FARM = (Pyro4.errors.ProtocolError, Pyro4.errors.DaemonError, Pyro4.errors.ConnectionClosedError)


def _wants_key(address: FarmAddress) -> KeyRefused:
    return KeyRefused(
        "the farm at %s wants a key, and this host has none\n"
        "  now: copy the farm's key file here and name it: train.py --key-file PATH, Farmer(key_file=PATH), or FARM_KEY"
        % address
    )


def _unreachable(address: FarmAddress, cause: BaseException, waited: float) -> FarmUnreachable:
    if address.ssh is not None:
        likely = "the tunnel stands, but farm.py is not running on that machine, or on another port (%s)" % cause
    elif isinstance(cause, _NO_FARM) or "magic" in str(cause):
        likely = "something listens there that is no farm (or a farm of another Pyro version): %s" % cause
    elif isinstance(cause, (Pyro4.errors.TimeoutError, TimeoutError)):
        likely = "the machine is off, a firewall swallows the port, or the farm hangs"
    elif "getaddrinfo" in str(cause) or "Name or service" in str(cause):
        likely = "no machine of that name is known here"
    else:
        likely = "farm.py is not running there, or on another port (%s)" % cause
    return FarmUnreachable("no farm answered at %s within %.1f s\n  likely: %s" % (address, waited, likely))
