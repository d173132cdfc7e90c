"""A TCP proxy between a host and a farm that harms what goes through it, by a seed, and counts what it did.

python -m benchmarks.faults.proxy --to 127.0.0.1:20099 --ports 4 --every 30 --seed 1

Its first line says where it listens, as JSON. It obeys lines on its standard input: `counts` (answered by a line of
JSON), `calm` and `harm` (no faults, and again), `fault` (one to the next segment, also while it is calm), `hold` and
`go` (nothing passes, as behind a pulled cable; and it passes again), `cut` (every connection ends). It ends when its
standard input does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
from collections import Counter

KINDS = ("drop", "delay", "reset", "cut", "duplicate", "flip")
"""drop: what goes one way vanishes for up to 0.2 s and is never sent again, as a broken middlebox does it.
delay: it comes up to 0.3 s late. reset: RST to both ends. cut: FIN to one end or both; the other end may not notice.
duplicate: a segment comes twice. flip: one bit of it is another."""


class FaultProxy:
    """All ports of one proxy, in one event loop."""

    def __init__(self, target: tuple[str, int], every: int, kinds: tuple[str, ...], seed: int, most: int):
        """Harms one in `every` segments, until `most` have been."""
        self._target = target
        self._every, self._kinds, self._most = every, kinds, most
        self._rng = random.Random(seed)
        self.counts = Counter(dict.fromkeys(kinds, 0))
        self.calm = False
        self._wanted = 0  # faults that were ordered one by one
        self._open = asyncio.Event()
        self._open.set()
        self._lines: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()

    async def listen(self, ports: int) -> list[asyncio.Server]:
        """One listening socket for each port that is wanted."""
        return [await asyncio.start_server(self._accept, "127.0.0.1", 0) for _ in range(ports)]

    def obey(self, word: str) -> None:
        """One line from whoever started this."""
        if word == "counts":
            print(json.dumps(self.counts), flush=True)
        elif word == "calm":
            self.calm = True
        elif word == "harm":
            self.calm = False
        elif word == "fault":
            self._wanted += 1
        elif word == "hold":
            self._open.clear()
        elif word == "go":
            self._open.set()
        elif word == "cut":
            for line in list(self._lines):
                for end in line:
                    end.close()
        else:
            raise ValueError("no such word: %r" % word)

    async def _accept(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            far_in, far_out = await asyncio.open_connection(*self._target)
        except OSError:
            near_out.close()
            return
        line = (near_out, far_out)
        self._lines.add(line)
        pumps = [
            asyncio.ensure_future(pump)
            for pump in (self._pump(near_in, far_out, line), self._pump(far_in, near_out, line))
        ]
        try:
            # When one way ends, the other may still have something to bring: TCP closes each by itself.
            await asyncio.gather(*pumps)
        finally:
            self._lines.discard(line)
            for pump in pumps:
                pump.cancel()
            for end in line:
                end.close()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, line: tuple[asyncio.StreamWriter, ...]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._open.wait()
                kind = self._draw()
                if kind is not None:
                    data = await self._harm(kind, data, source, line)
                if sink.is_closing():
                    return
                sink.write(data)
                await sink.drain()
            if sink.can_write_eof() and not sink.is_closing():
                sink.write_eof()

    def _draw(self) -> str | None:
        if self._wanted:
            self._wanted -= 1
        elif self.calm or self.counts.total() >= self._most or self._rng.randrange(self._every):
            return None
        kind = self._rng.choice(self._kinds)
        self.counts[kind] += 1
        return kind

    async def _harm(
        self, kind: str, data: bytes, source: asyncio.StreamReader, line: tuple[asyncio.StreamWriter, ...]
    ) -> bytes:
        if kind == "drop":
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(_swallow(source), self._rng.uniform(0.0, 0.2))
            return b""
        if kind == "delay":
            await asyncio.sleep(self._rng.uniform(0.0, 0.3))
        elif kind == "reset":
            for end in line:
                _linger_not(end.get_extra_info("socket"))
                end.transport.abort()
            return b""
        elif kind == "cut":
            ends = self._rng.choice((line, line[:1], line[1:]))
            for end in ends:
                end.close()
            return b""
        elif kind == "duplicate":
            return data + data
        elif kind == "flip":
            bit = self._rng.randrange(8 * len(data))
            harmed = bytearray(data)
            harmed[bit // 8] ^= 1 << bit % 8
            return bytes(harmed)
        return data


async def _swallow(source: asyncio.StreamReader) -> None:
    while await source.read(1 << 16):
        pass


def _linger_not(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # a close then sends RST instead of FIN
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def serve(args: argparse.Namespace) -> None:
    """Until standard input ends."""
    host, _, port = args.to.rpartition(":")
    proxy = FaultProxy((host, int(port)), args.every, tuple(args.kinds), args.seed, args.most)
    servers = await proxy.listen(args.ports)
    print(json.dumps(["127.0.0.1:%d" % server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    words = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
    while line := await words.readline():
        proxy.obey(line.decode().strip())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--ports", type=int, default=1, metavar="N", help="to listen on, so that one farm looks like N")
    parser.add_argument("--every", type=int, default=30, metavar="N", help="one segment in N is harmed")
    parser.add_argument("--most", type=int, default=sys.maxsize, metavar="N", help="faults in all")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parse()))
