"""The plain data in a farm's Pyro4 messages: how a call is read and how a long answer is written.

Pyro4's own decoding makes objects of dicts with "__class__" in them, expands zlib without a limit, and gives one kind
of message to marshal. Here numbers, texts, bytes, lists and dicts are all there is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack
import Pyro4
import Pyro4.errors

from wire import sealed

LONG = (1 << 16) - 1  #: bytes; msgpack counts those of longer ones in 32 bits, and a copy of those takes its time


class LongAnswer(list[Any]):
    """Lists of plain values, among them long bytes, which are sent without a copy."""


#: Of msgpack: what stands before the items of a list, and before bytes.
_HEADS = msgpack.Packer()
_LONG_BYTES = struct.Struct("!BI")


def pieces(answer: list[Any], dumps: Callable[[Any], bytes]) -> list[bytes | bytearray]:
    """What msgpack makes of it, with long bytes as pieces of their own."""
    parts: list[bytes | bytearray] = [bytearray()]
    _add(parts, answer, dumps)
    return parts


def _add(parts: list[bytes | bytearray], value: Any, dumps: Callable[[Any], bytes]) -> None:
    if isinstance(value, list):
        parts[-1] += _HEADS.pack_array_header(len(value))
        for each in value:
            _add(parts, each, dumps)
    elif isinstance(value, (bytes, bytearray)) and len(value) > LONG:
        parts[-1] += _LONG_BYTES.pack(0xC6, len(value))
        parts += (value, bytearray())
    else:
        parts[-1] += dumps(value)


def decoded(body: sealed.Buffer, serializer: int, flags: int, allowed_flags: int = 0) -> Any:
    """The plain data in a message's body.

    Raises:
        Pyro4.errors.PyroError, ValueError: it is anything else.
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
