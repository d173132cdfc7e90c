"""A pipe that wakes a thread that waits in a selector or in `poll`."""

from __future__ import annotations

import contextlib
import os


class WakePipe:
    """Register `fd` for reading; `wake` makes it readable until `clear`. Any thread may call `wake`."""

    def __init__(self) -> None:
        self.fd, self._write_end = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_end, False)

    def wake(self) -> None:
        """Makes `fd` readable."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._write_end, b"!")

    def clear(self) -> None:
        """Takes back all calls of `wake` so far."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        """Closes both ends."""
        for fd in (self.fd, self._write_end):
            os.close(fd)
        self.fd = self._write_end = -1
