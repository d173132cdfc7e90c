"""Pyro4's messages with its HMAC, written and read in one go.

line.sendall(packed(INVOKE, seq, body, seal))
kind, flags, seq, body = read(line.recv, seal)      # recv(n) gives exactly n bytes

The bytes are those of Pyro4 4.82 with `_pyroHmacKey` set, so its own proxies and daemons understand them. Its class for
messages takes 10 us for each of the four messages of a step with a key when the processor has done something else
meanwhile; this takes a third of it. Standard library only.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
from collections.abc import Callable, Sequence

INVOKE, RESULT, PING = 4, 5, 6
EXCEPTION = 1  # flag of a RESULT
MSGPACK = 6
VERSION = 48  # of Pyro4's protocol
HEADER = struct.Struct(
    "!4sHHHHiHHHH"
)  # tag, version, kind, flags, seq, size, serializer, size of annotations, 0, checksum
SIGNED = struct.Struct(HEADER.format + "4sH20s")  # and one annotation: the HMAC
ANNOTATION = struct.Struct("!4sH")
MAGIC = 0x34E9
MOST_PIECES = 512  #: that a system takes in one call; Linux takes 1,024

Buffer = bytes | bytearray | memoryview


class BadMessage(ValueError):
    """What came is no message, or not one that this connection may carry."""


class Seal:
    """Signs and checks with the key of one connection; SHA-1 because Pyro4 has it so, which is sound inside an HMAC."""

    def __init__(self, key: bytes):
        self._mac = hmac.new(key, digestmod=hashlib.sha1)

    def of(self, *parts: Buffer) -> bytes:
        """The 20 bytes for these."""
        mac = self._mac.copy()
        for part in parts:
            mac.update(part)
        return mac.digest()


def packed(kind: int, seq: int, body: bytes, seal: Seal | None, flags: int = 0) -> bytes:
    """One message, signed where there is a seal."""
    return _head(kind, seq, len(body), None if seal is None else seal.of(body), flags) + body


def in_pieces(kind: int, seq: int, body: Sequence[Buffer], seal: Seal | None) -> list[Buffer]:
    """The same message for a body in pieces, which are not joined: a copy of megabytes costs more than all else."""
    return [_head(kind, seq, sum(map(len, body)), None if seal is None else seal.of(*body), 0), *body]


def send(sock: socket.socket, *pieces: Buffer) -> None:
    """Sends all of them, one after the other, as fast as the other end takes them; the time limit is of one call.

    Raises:
        OSError: of the socket.
    """
    if len(pieces) == 1:
        data = pieces[0]
        sent = sock.send(data)
        while sent < len(data):
            sent += sock.send(memoryview(data)[sent:])
        return
    left = [memoryview(piece) for piece in reversed(pieces) if len(piece)]  # the next one stands last
    while left:
        sent = sock.sendmsg(left[: -MOST_PIECES - 1 : -1])
        while left and sent >= len(left[-1]):
            sent -= len(left.pop())
        if sent:
            left[-1] = left[-1][sent:]


def _head(kind: int, seq: int, size: int, signature: bytes | None, flags: int) -> bytes:
    annotations = 0 if signature is None else ANNOTATION.size + len(signature)
    checksum = (kind + VERSION + size + annotations + MSGPACK + flags + seq + MAGIC) & 0xFFFF
    fields = (b"PYRO", VERSION, kind, flags, seq, size, MSGPACK, annotations, 0, checksum)
    if signature is None:
        return HEADER.pack(*fields)
    return SIGNED.pack(*fields, b"HMAC", len(signature), signature)


def read(recv: Callable[[int], Buffer], seal: Seal | None, limit: int) -> tuple[int, int, int, int, Buffer]:
    """The next message: kind, flags, seq, serializer and body, which is of the kind that `recv` gives.

    Raises:
        BadMessage: it is none, is longer than `limit`, or is not signed as this connection wants it.
    """
    tag, version, kind, flags, seq, size, serializer, annotations, _, checksum = HEADER.unpack(recv(HEADER.size))
    if tag != b"PYRO" or version != VERSION:
        raise BadMessage("not a message of Pyro4")
    if checksum != (kind + version + size + annotations + flags + serializer + seq + MAGIC) & 0xFFFF:
        raise BadMessage("a header with a wrong checksum")
    if size < 0 or size + annotations > limit:
        raise BadMessage("a message of %d bytes, the limit is %d" % (size + annotations, limit))
    data = recv(annotations + size)
    body = data[annotations:]
    signature, others = _annotations(data, annotations)
    if seal is None:
        if signature is not None:
            raise BadMessage("it is signed, and this connection has no key")
    elif signature is None or not hmac.compare_digest(signature, seal.of(body, *others)):
        raise BadMessage("its signature is not that of this connection")
    return kind, flags, seq, serializer, body


def _annotations(data: Buffer, end: int) -> tuple[bytes | None, list[bytes]]:
    """The signature, and what else is signed beside the body, in Pyro4's order: by name."""
    signature, others, at = None, {}, 0
    while at < end:
        if end - at < ANNOTATION.size:
            raise BadMessage("an annotation that is cut off")
        name, size = ANNOTATION.unpack_from(data, at)
        at += ANNOTATION.size
        if size > end - at:
            raise BadMessage("an annotation that is cut off")
        if name == b"HMAC":
            signature = bytes(data[at : at + size])
        else:
            others[name] = bytes(data[at : at + size])
        at += size
    return signature, [others[name] for name in sorted(others)]
