"""The commands of a farm, the replies to them, and the frame that carries both through a worker's pipe.

One table for all three parties. A host sends *commands* to a farm, the farm passes them on to the worker in
the slot, the worker's *replies* travel back the same way. Bodies are bytes of `wire.codec`; a farm hands
them on unread.

    command     body                                   reply         body
    CONSTRUCT   {"env": ..., "kwargs": {...}, ...}     READY         {"observation_space": ..., ...}
    RESET       {"seed": int|None, "options": ...}     OBSERVATION   (observation, info, seconds)
    STEP        {"action": ..., "repeat": int}         TRANSITION    (observation, reward, terminated, truncated, info,
                                                                      seconds)
    CLOSE       empty                                  none: the worker ends
    ASK         empty (host to farm only)              the reply that the step with this number had, or LOST
    any         -                                      FAULT         {"type", "text", "traceback", "where"}
    any         -                                      LOST          {"text": why there is no answer and never will be}

Every command carries a sequence number of its slot and lease; its reply carries the same one. A reply with another
number is dropped, never handed to the next call. `seconds` are what the environment's own `reset` took, or its `step`
calls of all repeats together, by the worker's clock: what is more on the host's clock is the way there and back. It
and the reward travel as numpy's float64, so that they stand among the buffers and not in the header: all steps of an
environment that tells nothing in its info then have the same header, and `codec.Form` reads and makes them.

This file runs unchanged on Python 2.7 to 3.13, with nothing but the standard library.
"""

import struct
import zlib

VERSION = 4  #: a host and a farm work together only when this number is the same on both sides

# Commands.
CONSTRUCT = 1
RESET = 2
STEP = 3
CLOSE = 4
ASK = 5

# Replies.
READY = 11
OBSERVATION = 12
TRANSITION = 13
FAULT = 14
LOST = 15

NAMES = {
    CONSTRUCT: "construct",
    RESET: "reset",
    STEP: "step",
    CLOSE: "close",
    ASK: "ask",
    READY: "ready",
    OBSERVATION: "observation",
    TRANSITION: "transition",
    FAULT: "fault",
    LOST: "lost",
}

# Flags of a TRANSITION, so that a farm knows the end of an episode without reading the body.
TERMINATED = 1
TRUNCATED = 2

HEADER = struct.Struct("!BBQI")  #: kind, flags, sequence number, length of the body

LARGE = 1 << 14  #: bytes of a body from which on going over it costs more than a second number for it
CODEC_SUM_AT = 8  #: where in a body that begins over which the codec's checksum goes (wire/codec.py)
MAX_BODY = 1 << 28  #: bytes; a longer body is refused before a byte of it is read


class FrameError(ValueError):
    """What came through a pipe is no frame: the other end is broken, or something else wrote into the pipe."""


def pack(kind, seq, body=b"", flags=0):
    """One frame as bytes: header and body."""
    return head(kind, seq, len(body), flags) + body


def head(kind, seq, length, flags=0):
    """The header alone, for a body that is written by itself."""
    if length > MAX_BODY:
        raise FrameError("a body of %d bytes is over the limit of %d" % (length, MAX_BODY))
    return HEADER.pack(kind, flags, seq, length)


def sums(rows):
    """For rows that end with a body: the CRC-32 of each large one but for its first bytes, None for the others.

    `codec.decode` takes it, so that nobody goes over a megabyte twice.
    """
    return [zlib.crc32(memoryview(row[-1])[CODEC_SUM_AT:]) if len(row[-1]) > LARGE else None for row in rows]


def checksum(words, rows, of_bodies):
    """CRC-32 over plain words and over rows that end with a body: what one exchange hands over, in either direction.

    TCP's own sum lets one damaged segment in 65,536 through. A body has the codec's, but the numbers beside it say
    whose it is. For host and farm only, both of Python 3: `repr` differs on 2.7. `of_bodies` are the rows' `sums`.
    """
    crc = zlib.crc32(repr((words, [row[:-1] for row in rows])).encode())
    for row, known in zip(rows, of_bodies):
        crc = zlib.crc32(row[-1] if known is None else row[-1][:CODEC_SUM_AT] + b"%d" % known, crc)
    return crc


LONG = 1 << 16  #: bytes of a body from which on a copy of it costs more than a look at what is to be read


class FrameReader(object):
    """Cuts a stream of bytes into frames, however the bytes are dealt out.

    Who can read into memory asks `room` first, and so spares long bodies a copy:

        room = reader.room()
        frames = reader.feed(os.read(fd, size)) if room is None else reader.filled(os.readv(fd, [room]))
    """

    def __init__(self):
        self._buffer = bytearray()
        self._long = None  # the long body that is being read: (kind, flags, seq, body)
        self._got = 0  # bytes of it

    def room(self):
        """Where the next bytes of the stream belong, when a long body is being read; else None."""
        return None if self._long is None else memoryview(self._long[3])[self._got :]

    def filled(self, count):
        """So many bytes were read into `room`; returns frames as `feed` does. This body is a bytearray."""
        self._got += count
        if self._got < len(self._long[3]):
            return []
        frame, self._long = self._long, None
        return [frame]

    def feed(self, data):
        """Takes the next bytes of the stream; returns the frames that are whole now.

        Returns:
            A list of (kind, flags, seq, body).

        Raises:
            FrameError: the stream holds something that is no frame; the reader is of no further use.
        """
        if self._long is not None:
            taken = data[: len(self._long[3]) - self._got]
            self.room()[: len(taken)] = taken
            frames = self.filled(len(taken))
            rest = data[len(taken) :]
            return frames + self.feed(rest) if rest else frames
        buffer = self._buffer
        if not buffer and len(data) >= HEADER.size:
            kind, flags, seq, length = HEADER.unpack_from(data)
            if len(data) == HEADER.size + length and kind in NAMES and length <= MAX_BODY:
                return [(kind, flags, seq, bytes(data[HEADER.size :]))]  # one frame and nothing else, as mostly
        buffer += data
        frames = []
        start = 0
        while len(buffer) - start >= HEADER.size:
            kind, flags, seq, length = HEADER.unpack_from(buffer, start)
            if kind not in NAMES or length > MAX_BODY:
                raise FrameError("not a frame: kind %d, body of %d bytes" % (kind, length))
            end = start + HEADER.size + length
            if len(buffer) < end:
                if length > LONG:
                    self._long, self._got = (kind, flags, seq, bytearray(length)), len(buffer) - start - HEADER.size
                    self._long[3][: self._got] = buffer[start + HEADER.size :]
                    start = len(buffer)
                break
            frames.append((kind, flags, seq, bytes(buffer[start + HEADER.size : end])))
            start = end
        if start:
            del buffer[:start]
        return frames
