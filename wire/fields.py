"""Reads single fields of bodies that a farm otherwise passes on without decoding them.

A body is `wire.codec`'s: a JSON header, then raw buffers. Each field is at the end of one of them, so nothing else is
decoded, and an observation of a million pixels costs no more than a small one.

    repeat_of(body of a STEP)            how often the action is to be applied
    seconds_of(body of a TRANSITION)     what the environment took for it, by its worker's clock
"""

from __future__ import annotations

import re
import struct

from wire import codec

_LENGTH = struct.Struct("<I")
_LENGTH_AT, _HEADER_AT = 8, 12  # after the magic and the checksum
_REPEAT = re.compile(rb'"repeat":(\d{1,9})\}$')
_ONCE = b'"repeat":1}'
_NUMBER = b'["n","<f8"]]'  # the last of a tuple, and so its bytes are the last of the buffers
_DOUBLE = struct.Struct("<d")
LONGEST = 1e9  #: s; what says more is no time
_TAIL = 32  # bytes; `repeat` stands in these


def _header_end(body: bytes) -> int:
    return _HEADER_AT + _LENGTH.unpack_from(body, _LENGTH_AT)[0] if len(body) >= _HEADER_AT else 0


def repeat_of(body: bytes) -> int:
    """The `repeat` of a STEP, at least 1; also 1 for a body that is no STEP's: its worker reports that fault."""
    end = _header_end(body)
    if body.endswith(_ONCE, _HEADER_AT, end):
        return 1
    match = _REPEAT.search(body[max(_HEADER_AT, end - _TAIL) : end])
    if match is not None:
        return max(1, int(match[1]))
    try:
        return max(1, int(codec.decode(body)["repeat"]))  # of a host that puts it elsewhere
    except (codec.CodecError, KeyError, TypeError, ValueError, OverflowError):
        return 1


def seconds_of(body: bytes) -> float:
    """The seconds at the end of an OBSERVATION or a TRANSITION; 0 when there are none."""
    if not body.endswith(_NUMBER, _HEADER_AT, _header_end(body)) or len(body) < _HEADER_AT + len(_NUMBER) + 8:
        return 0.0
    seconds: float = _DOUBLE.unpack_from(body, len(body) - 8)[0]
    return min(max(0.0, seconds), LONGEST)
