"""A TCP proxy before a farm: cuts, damages, delays or doubles what goes through it, on command.

proxy = Proxy(farm.port)
proxy.fault = lambda data, forward: data.replace(b"\\x00", b"\\x01")
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time


class Proxy:
    """A TCP proxy before a farm that cuts every connection on command, or after the next bytes to the farm."""

    def __init__(self, port):
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.1)
        self.address = "127.0.0.1:%d" % self._server.getsockname()[1]
        self.cut_after = None  # bytes that the next request must hold; its connection is cut once they are forwarded
        self.cuts = 0
        self.fault = None  # (bytes, whether they go to the farm) -> the bytes that arrive instead; None cuts
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self._pairs = []

    def _accept(self):
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                near = self._server.accept()[0]
                try:
                    far = socket.create_connection(("127.0.0.1", self._target), 5.0)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self._pairs.append((near, far))
                for source, sink, forward in ((near, far, True), (far, near, False)):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, sink, forward)))
                    self._threads[-1].start()

    def _pump(self, source, sink, forward):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self.fault is not None:
                    data = self.fault(data, forward)
                    if data is None:
                        self.cuts += 1
                        source.shutdown(socket.SHUT_RDWR)
                        return
                sink.sendall(data)
                if forward and self.cut_after is not None and self.cut_after in data:
                    self.cut_after = None
                    self.cuts += 1
                    # The host's end only: the farm does not notice, as with a cable that is pulled.
                    source.shutdown(socket.SHUT_RDWR)
                    return
        if not forward or self._over.is_set():
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self.cuts += 1
        for near, _ in self._pairs:
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)

    def sever(self):
        """Cuts every connection at both ends, also those of which the farm has not noticed that they are cut."""
        self.cuts += 1
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for pair in pairs:
            for end in pair:
                end.close()

    def close(self):
        self._over.set()
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for pair in self._pairs:
            for end in pair:
                end.close()
        self._server.close()


class Faults:
    """Random faults for a proxy, `count` of each kind in all, one in `every` pieces of data."""

    KINDS = ("flip", "double", "drop", "delay", "cut")

    def __init__(self, seed, count, every, kinds=KINDS):
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._left = [kind for kind in kinds for _ in range(count)]
        self._every = every
        self.made = dict.fromkeys(kinds, 0)

    @property
    def over(self):
        return not self._left

    def __call__(self, data, forward):
        with self._lock:
            if not self._left or self._rng.randrange(self._every):
                return data
            kind = self._left.pop(self._rng.randrange(len(self._left)))
            self.made[kind] += 1
            bit = self._rng.randrange(8 * len(data))
        if kind == "flip":
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            return bytes(damaged)
        if kind == "delay":
            time.sleep(0.3)
        return {"double": data + data, "drop": b"", "cut": None}.get(kind, data)
