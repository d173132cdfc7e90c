"""A farm in this process: no daemon, no socket, for debugging and for tests.

farmer = Farmer("Pendulum-v1", [("local:", 2)])

Environments run in worker processes as on any farm, in this process's Python and from its working directory. The farm
begins with the first connection to it, and ends with the farmer. This is the one file of the host's side that
imports a farm's, and only when such an address is used.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farmer.farmlist import FarmAddress
from farmer.link import Command, OnLost, OnReplies
from wire import protocol
from wire.errors import FarmError, FarmLost, FarmRefused, FarmUnreachable, StartError

if TYPE_CHECKING:
    from farmhand.supervisor import Supervisor

WAIT = 2.0  #: s that the reading thread waits for replies at a time; also the heartbeat of the lease

log = logging.getLogger("farmer")


class LocalRoute:
    """A `farmer.link.Route` to a farm that it starts itself."""

    def __init__(self, address: FarmAddress, env: str):
        """Starts nothing yet.

        Args:
            address: one with the scheme `local`; it has as many slots as are wanted of it.
            env: as farm.py takes it.
        """
        self._address, self._env = address, env
        self._farm: Supervisor | None = None
        self._logs: tempfile.TemporaryDirectory[str] | None = None

    def connect(self, limit: float | None = None) -> LocalLink:
        """As `Route.connect`; the limit is that of a farm's start, whatever `limit` says.

        Raises:
            FarmUnreachable: the environment cannot be built.
        """
        if self._farm is None:
            self._farm = self._start()
        return LocalLink(self._address, self._farm)

    def _start(self) -> Supervisor:
        from farmhand.catalog import Catalog
        from farmhand.supervisor import Supervisor

        self._logs = tempfile.TemporaryDirectory(prefix="farm-local-")
        try:
            catalog = Catalog([self._env], folder=os.getcwd())
            farm = Supervisor(catalog, self._address.slots, sys.executable, Path(self._logs.name))
            farm.start()
        except StartError as error:
            self.close()
            raise FarmUnreachable(f"the farm in this process did not start: {error}") from None
        except BaseException:
            self.close()
            raise
        return farm

    def close(self) -> None:
        """Ends the farm with its workers, within about 4 s."""
        farm, self._farm = self._farm, None
        if farm is not None:
            farm.stop("the farmer was closed")
        logs, self._logs = self._logs, None
        if logs is not None:
            logs.cleanup()


class LocalLink:
    """A `farmer.link.Link` that calls the supervisor itself.

    Commands are handed over in the thread that begins them; one thread waits for replies.
    """

    def __init__(self, address: FarmAddress, farm: Supervisor):
        self.address = address
        self.lease = ""
        self._farm = farm
        self._lock = threading.Lock()  # of the queue
        self._sending = threading.RLock()  # held while commands are handed over
        self._queue: list[Command] = []
        self._closed = False
        self._on_replies: OnReplies | None = None
        self._on_lost: OnLost | None = None
        self._thread = threading.Thread(target=self._read, name=f"reader of {address}", daemon=True)

    def describe(self) -> dict[str, Any]:
        """As `Link.describe`."""
        return self._farm.describe()

    def acquire(self, env: str, count: int) -> list[int]:
        """As `Link.acquire`."""
        lease = self._farm.acquire(env, count, protocol.VERSION, token=self.lease or None)
        self.lease = lease.token
        return list(lease.slots)

    def release(self, slots: Sequence[int]) -> None:
        """As `Link.release`."""
        self._farm.release(self.lease, list(slots))

    def end_lease(self, lease: str) -> None:
        """As `Link.end_lease`."""
        self._farm.release(lease)

    def start(self, on_replies: OnReplies, on_lost: OnLost) -> None:
        """As `Link.start`."""
        self._on_replies, self._on_lost = on_replies, on_lost
        self._thread.start()

    def put(self, commands: list[Command]) -> None:
        """As `Link.put`."""
        with self._lock:
            self._queue += commands

    def begin(self) -> None:
        """As `Link.begin`."""
        while self._queue and not self._closed:
            with self._sending:
                self._hand_over()

    def _hand_over(self) -> None:
        commands: list[Command] = []
        try:
            with self._lock:
                commands, self._queue = self._queue, []
            if commands:
                self._deliver(self._exchange(commands, 0.0))
        except FarmError as error:
            self._lose(error)
        except BaseException:  # Ctrl-C: the farm knows what it has got, and what it answered
            with self._lock:
                if commands is not self._queue:
                    self._queue[:0] = [[slot, seq, protocol.ASK, b""] for slot, seq, *_ in commands]
            raise

    def want(self, everything: bool) -> None:
        """As `Link.want`: replies come as they are there."""

    @staticmethod
    def fetch(links: Sequence[LocalLink], wait: float) -> bool:
        """As `Link.fetch`: the links' own threads bring replies."""
        for link in links:
            link.begin()
        return False

    def close(self) -> None:
        """As `Link.close`."""
        self._closed = True
        if self.lease:
            self._farm.release(self.lease)  # which ends the reader's wait
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(3.0)

    def _read(self) -> None:
        while not self._closed:
            try:
                replies = self._exchange([], WAIT)
            except FarmError as error:
                self._lose(error)
                return
            except Exception as error:  # whatever it is, slots that wait for this thread must not wait for ever
                log.exception("the farm in this process failed in an unforeseen way")
                self._lose(FarmLost(f"{self.address}: {type(error).__name__}: {error}"))
                return
            self._deliver(replies)
            if self._queue:  # what the callback has put
                self.begin()

    def _exchange(self, commands: list[Command], wait: float) -> list[list[Any]]:
        try:
            replies = self._farm.exchange(self.lease, commands, wait)
        except FarmRefused as error:
            raise type(error)(f"the farm at {self.address}: {error}") from None
        return [[*reply, crc] for reply, crc in zip(replies, protocol.sums(replies), strict=True)]

    def _deliver(self, replies: list[list[Any]]) -> None:
        if replies and self._on_replies is not None:
            self._on_replies(replies)

    def _lose(self, error: FarmError) -> None:
        closed, self._closed = self._closed, True
        if not closed and self._on_lost is not None:
            self._on_lost(error)
