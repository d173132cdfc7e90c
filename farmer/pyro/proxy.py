"""Proxies of a farm's Pyro4 objects: how to connect, prove the key, and exchange messages faster than Pyro4 does.

with open_object("slot-0", "127.0.0.1:20099", "farm.key") as slot: slot.reset(7)
"""

from __future__ import annotations

import contextlib
import functools
import os
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
from farmer.pyro.tunnel import Tunnel
from wire import auth, protocol, sealed
from wire.errors import FarmRefused, FarmUnreachable, KeyRefused

CONNECT_LIMIT = 5.0  #: s for connecting and for the first answer, unless the caller says otherwise
AT_ONCE = 1 << 14  #: bytes that are taken from a socket at a time
#: Bytes from which on memory is kept for them: to get it anew from the system costs more than to fill it.
LONG = 1 << 16


def _configure() -> None:
    Pyro4.config.SERIALIZER = "msgpack"
    Pyro4.config.SERIALIZERS_ACCEPTED = {"msgpack"}
    Pyro4.config.MAX_MESSAGE_SIZE = protocol.MAX_BODY
    Pyro4.config.SOCK_NODELAY = True


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
) -> _FastProxy:
    """A proxy of an object of a farm: with a key proven and connected, without one it connects at its first call.

    Raises:
        FarmUnreachable, KeyRefused, FarmRefused: in words.
    """
    _configure()
    path = tunnel.open() if tunnel is not None else None
    if key is None:
        proxy = _FastProxy("PYRO:%s@%s" % (name, address if path is None else "./u:" + path))
        proxy._pyroTimeout = limit
        return proxy
    started = time.monotonic()
    sock = None
    try:
        sock = _connected(address, path, limit)
        session = auth.prove(sock, key, limit)
        return _ProvenProxy(name, sock, session, limit)
    except FarmRefused as error:
        _close(sock)
        raise type(error)("the farm at %s: %s" % (address, error)) from None
    except OSError as error:
        _close(sock)
        raise unreachable(address, error, time.monotonic() - started) from None


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


class _FastProxy(Pyro4.Proxy):
    """A proxy whose messages are made and read faster than Pyro4 does it; the connecting it leaves to Pyro4."""

    _pyroSeq: int
    _pyroConnection: Any
    _seal: sealed.Seal | None
    _busy: threading.RLock

    def __init__(self, uri: str, connected_socket: socket.socket | None = None):
        object.__setattr__(self, "_seal", None)
        object.__setattr__(self, "_busy", threading.RLock())  # connecting asks for metadata by a call
        super().__init__(uri, connected_socket=connected_socket)

    def _socket(self) -> _Socket | None:
        """The connection; None before the first call on it, which is Pyro4's."""
        connection = self._pyroConnection
        if connection is not None and not isinstance(connection, _Socket):
            connection.keep_open = True  # or its end would close the socket
            connection = self._pyroConnection = _Socket(connection.sock, connection.objectId)
        return connection

    def _pyroInvoke(self, methodname: str, vargs: Any, kwargs: Any, flags: int = 0, objectId: str | None = None) -> Any:
        """Pyro4's call."""
        with self._busy:
            connection = self._socket()
            if connection is None:
                return super()._pyroInvoke(methodname, vargs, kwargs, flags, objectId)
            self._post(methodname, vargs, kwargs, objectId)
            return self._fetch()

    def _post(self, methodname: str, vargs: Any, kwargs: Any = None, objectId: str | None = None) -> None:
        """The first half of a call on a connection that has had its first one."""
        connection = self._socket()
        if connection is None:
            raise Pyro4.errors.ConnectionClosedError("the connection to the farm is closed")
        call = (objectId or connection.objectId, methodname, vargs, kwargs or {})
        self._pyroSeq = (self._pyroSeq + 1) & 0xFFFF
        try:
            connection.send(sealed.packed(sealed.INVOKE, self._pyroSeq, _MSGPACK.dumps(call), self._seal))
        except BaseException:  # also Ctrl-C: half a message would be taken for the beginning of the next one
            self._pyroRelease()
            raise

    def _fetch(self) -> Any:
        """The second half: waits for the answer to `_post`."""
        connection = self._socket()
        if connection is None:
            raise Pyro4.errors.ConnectionClosedError("the connection to the farm is closed")
        try:
            kind, answer, seq, _, body = sealed.read(connection.recv, self._seal, protocol.MAX_BODY)
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
        connection = self._pyroConnection
        return -1 if connection is None else connection.sock.fileno()


class _ProvenProxy(_FastProxy):
    """A proxy over a connection that has proven its key. Both ends sign all messages with a key of this connection."""

    def __init__(self, name: str, sock: socket.socket, session: bytes, limit: float):
        super().__init__(name, connected_socket=sock)
        self._pyroHmacKey = session
        self._pyroTimeout = limit
        object.__setattr__(self, "_seal", sealed.Seal(session))
        self._pyroConnection = _Socket(
            sock, name
        )  # not the one that Pyro4 made, which would be left open after an error

    def _socket(self) -> _Socket:
        """There is none but the one that has proven itself."""
        if self._pyroConnection is None:
            raise Pyro4.errors.ConnectionClosedError("the connection to the farm is closed; open another")
        connection: _Socket = self._pyroConnection
        return connection

    def _pyroGetMetadata(self, objectId: str | None = None, known_metadata: Any = None) -> None:
        # Pyro4 asks for this already while it is made, when it cannot sign yet; a script's first call asks again.
        if self._pyroHmacKey is not None:
            super()._pyroGetMetadata(objectId, known_metadata)


class _Socket(SocketConnection):
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


def wants_key(address: FarmAddress) -> KeyRefused:
    return KeyRefused(
        "the farm at %s wants a key, and this host has none\n"
        "  now: copy the farm's key file here and name it: train.py --key-file PATH, Farmer(key_file=PATH), or FARM_KEY"
        % address
    )


def unreachable(address: FarmAddress, cause: BaseException, waited: float) -> FarmUnreachable:
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
