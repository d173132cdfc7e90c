"""What a stranger at a farm's port can do, for the tests and for benchmarks/security/strangers.py.

with Recorder(farm.address) as wire: ...   # what a host says, as somebody on the way hears it
replay(farm.address, wire.heard[0])        # and says again
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import zlib
from collections.abc import Iterator

import msgpack
from Pyro4 import message

from wire import auth


def endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def connected(address: str, limit: float = 10.0) -> socket.socket:
    sock = socket.create_connection(endpoint(address), limit)
    sock.settimeout(limit)
    return sock


class Recorder:
    """A relay in front of a farm that keeps what hosts say, one entry a connection."""

    def __init__(self, address: str):
        self._farm = endpoint(address)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._socks: list[socket.socket] = []
        self.heard: list[bytearray] = []
        self.address = "127.0.0.1:%d" % self._listening.getsockname()[1]

    def __enter__(self) -> Recorder:
        self._run(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        for sock in [self._listening, *self._socks]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(5.0)

    def _run(self, target, *args) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                host, _ = self._listening.accept()
            except OSError:
                return
            farm = socket.create_connection(self._farm)
            self._socks += [host, farm]
            self.heard.append(bytearray())
            self._run(self._carry, host, farm, self.heard[-1])
            self._run(self._carry, farm, host, bytearray())

    def _carry(self, source: socket.socket, sink: socket.socket, heard: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                heard += data
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def answer_to(address: str, *parts: bytes, limit: float = 10.0) -> bytes:
    """Says the parts, waiting for something after each but the last; all that came until the farm hung up."""
    heard = b""
    with connected(address, limit) as sock:
        try:
            for part in parts[:-1]:
                sock.sendall(part)
                heard += sock.recv(1 << 16)
            sock.sendall(parts[-1])
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(1 << 16):
                heard += data
        except (ConnectionError, BrokenPipeError):
            pass  # it hung up in the middle
    return heard


def replay(address: str, heard: bytes, paced: bool) -> bytes:
    """Says a recorded connection again, all at once or in the order of the exchange."""
    if paced and heard.startswith(auth.MAGIC):
        proof = auth.HELLO.size + auth.PROOF
        return answer_to(address, heard[: auth.HELLO.size], heard[auth.HELLO.size : proof], heard[proof:])
    return answer_to(address, bytes(heard))


@contextlib.contextmanager
def silent(address: str, count: int) -> Iterator[list[socket.socket]]:
    """So many connections that say nothing."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connected(address)) for _ in range(count)]


def header(kind: int, size: int, flags: int = 0, annotations: int = 0, serializer: int = 6) -> bytes:
    """The first 24 bytes of one of Pyro4's messages, announcing so many bytes."""
    frame = message.Message(kind, b"", serializer, flags, 0)
    frame.data_size, frame.annotations_size = size, annotations
    return frame.to_bytes()


def frame(kind: int, body: bytes, flags: int = 0, serializer: int = 6, key: bytes | None = None) -> bytes:
    """One whole message of Pyro4's."""
    return message.Message(kind, body, serializer, flags, 1, hmac_key=key).to_bytes()


GREETING = frame(
    message.MSG_CONNECT, msgpack.packb({"handshake": "hello", "object": "farm"}), message.FLAGS_META_ON_CONNECT
)

#: What Pyro4 itself makes objects of, or feeds to something that trusts it.
NOT_PLAIN = [
    {"__class__": "Pyro4.core.Daemon", "state": []},
    {"__class__": "Pyro4.core.Proxy", "state": ["PYRO:a@b:1", [], [], [], 0, None, "hi", 0, None]},
    {"__class__": "Pyro4.util.PickleSerializer"},
    {"__class__": "builtins.SystemExit", "__exception__": True, "args": [1], "attributes": {}},
    msgpack.Timestamp(1, 2),
    msgpack.ExtType(0x30, b"x" * 16),
    msgpack.ExtType(0x31, b"9" * 4000),
]


def fuzzed(rng: random.Random) -> bytes:
    """A connection's worth of bytes: nonsense, or something good with a mistake in it."""
    kind = rng.randrange(9)
    noise = rng.randbytes(rng.randrange(1, 200))
    call = msgpack.packb(["slot-0", "step", [rng.choice([*NOT_PLAIN, [0.5], None, {}])], {}])
    if kind == 0:
        return noise
    if kind == 1:
        return b"PYRO" + noise
    if kind == 2:
        return auth.MAGIC + noise
    if kind == 3:
        return auth.HELLO.pack(auth.MAGIC, os.urandom(32)) + noise
    if kind == 4:
        size = rng.choice([0, 1, 65536, 65537, 200 << 20, 1 << 30, 0x7FFFFFFF, -1, -(1 << 31)])
        return _raw_header(rng.randrange(1, 7), size, rng.randrange(1 << 16)) + noise
    if kind == 5:
        flags = rng.choice([0, message.FLAGS_KEEPSERIALIZED, message.FLAGS_COMPRESSED, message.FLAGS_BATCH, 0x7F])
        return GREETING + frame(rng.choice([message.MSG_INVOKE, 99]), call, flags, rng.choice([6, 1, 3, 5]))
    if kind == 6:
        good = bytearray(GREETING + frame(message.MSG_INVOKE, call))
        for _ in range(rng.randrange(1, 5)):
            good[rng.randrange(len(good))] = rng.randrange(256)
        return bytes(good)
    if kind == 7:
        bomb = zlib.compress(bytes(1 << 20))
        return GREETING + frame(message.MSG_INVOKE, bomb, message.FLAGS_COMPRESSED)
    nested = b"\x91" * rng.randrange(1, 3000)
    return GREETING[: rng.randrange(1, len(GREETING))] if rng.random() < 0.5 else GREETING + frame(4, nested)


def _raw_header(kind: int, size: int, annotations: int) -> bytes:
    checksum = (kind + 48 + size + annotations + 6 + 1 + message.Message.checksum_magic) & 0xFFFF
    return struct.pack(message.Message.header_format, b"PYRO", 48, kind, 0, 1, size, 6, annotations, 0, checksum)


def fuzz(address: str, count: int, seed: int) -> None:
    """So many fuzzed connections; each is read until the farm hangs up, or a moment when it waits for more."""
    rng = random.Random(seed)
    for _ in range(count):
        try:
            with connected(address) as sock:
                sock.sendall(fuzzed(rng))
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
        except ConnectionError:
            pass  # it hung up while we were talking
