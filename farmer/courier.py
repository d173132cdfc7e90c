"""Carries commands to one farm and replies back, with two threads however many slots it has.

The *poller* hands over whatever is queued and waits at the farm until something is ready. A command that comes while
it waits there does not wait with it: the *sender* brings that one over a connection of its own and does not stay. So a
slow slot delays nobody, and under load one call carries many commands. A caller who is about to wait for results anyway
makes the poller's call himself (`drive`), which saves two changes of thread a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from farmer.connection import Connection
from wire import protocol
from wire.errors import FarmError, LeaseLost

WAIT = 4.0  #: s that the poller stays at the farm when nothing is ready
HEARTBEAT = 2.0  #: s between calls when nothing is under way; a farm frees a lease that is silent for longer
RECOVER_LIMIT = 5.0  #: s to reach a farm again after a broken connection, before what is under way is lost

Command = list[Any]  # [slot, seq, kind, body]
Reply = list[Any]  # [slot, seq, kind, flags, body]


class Courier:
    """The way to one farm under one lease.

    `on_replies(replies)` and `on_lost(error)` are called from its threads; after `on_lost` it is over.
    """

    def __init__(
        self,
        connection: Connection,
        lease: str,
        on_replies: Callable[[list[Reply]], None],
        on_lost: Callable[[FarmError], None],
    ):
        self.address = connection.address
        self._another = connection.another
        self.lease = lease
        self._poll_line: Connection | None = connection
        self._send_line: Connection | None = None
        self._on_replies, self._on_lost = on_replies, on_lost
        self._queue: list[Command] = []
        self._under_way: set[tuple[int, int]] = set()
        self._together = False  # the reader wants everything that is under way
        self._polling = self._driven = self._broken = self._closed = False
        self._state = threading.Condition()
        self._threads = [
            threading.Thread(target=target, name="%s %s" % (name, self.address), daemon=True)
            for name, target in (("poller", self._poll), ("sender", self._send))
        ]

    def start(self) -> None:
        """Starts both threads."""
        for thread in self._threads:
            thread.start()

    def put(self, commands: list[Command], wake: bool = True) -> None:
        """Queues commands; returns at once. Without `wake` the caller drives next, so no thread need be woken."""
        with self._state:
            self._queue += commands
            self._under_way.update((command[0], command[1]) for command in commands)
            if wake or self._polling:
                self._state.notify_all()

    def want(self, everything: bool) -> None:
        """Says whether the reader waits for all that is under way, or for whoever is ready."""
        self._together = everything

    def drive(self, wait: float) -> bool:
        """Makes the poller's next call in the caller's thread, if the poller is not at the farm.

        Returns:
            Whether it did; replies went to `on_replies` then, in this thread.
        """
        replies: list[Reply] = []
        mine = False
        try:
            with self._state:
                if self._polling or self._driven or self._broken or self._closed or not self._under_way:
                    return False
                mine = self._driven = self._polling = True
                commands, self._queue = self._queue, []
                together = len(self._under_way) if self._together else 1
            assert self._poll_line is not None
            replies = self._poll_line.exchange(self.lease, commands, min(wait, WAIT), together)
        except FarmError:
            self._broken = True  # the poller finds out what became of it
        except BaseException:
            self._broken = mine  # Ctrl-C in the middle of a call
            raise
        finally:
            if mine:
                with self._state:
                    self._driven = self._polling = False
                    if self._broken or self._closed or self._queue:
                        self._state.notify_all()
        self._take(replies)
        with self._state:
            if self._under_way:
                self._state.notify_all()  # the poller brings the rest, should the caller not come back for it
        return True

    def close(self, limit: float = 3.0) -> None:
        """Releases the lease and ends both threads, within `limit` seconds or so."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        try:
            line = self._another()
            line.release(self.lease)  # which also ends the poller's wait at the farm
            line.close()
        except FarmError:
            pass  # the farm is gone, and the lease with it
        deadline = time.monotonic() + limit
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    # The threads.

    def _poll(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(self._has_work, HEARTBEAT)
                if self._closed:
                    break
                if self._driven:
                    continue
                commands, self._queue = self._queue, []
                wait = WAIT if self._under_way else 0.0
                together = len(self._under_way) if self._together else 1
                self._polling = True
                broken = self._broken
            try:
                if broken:
                    self._recover()
                    continue
                assert self._poll_line is not None
                self._take(self._poll_line.exchange(self.lease, commands, wait, together))
            except LeaseLost as error:
                self._lose(error)
                break
            except FarmError as error:
                if broken:
                    self._lose(error)
                    break
                with self._state:
                    self._broken = True
            finally:
                with self._state:
                    self._polling = False
        for line in (self._poll_line, self._send_line):
            if line is not None:
                line.close()

    def _has_work(self) -> bool:
        return self._closed or bool(not self._driven and (self._queue or self._under_way or self._broken))

    def _send(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or (self._queue and self._polling and not self._broken))
                if self._closed:
                    return
                commands, self._queue = self._queue, []
            try:
                if self._send_line is None:
                    self._send_line = self._another()
                self._take(self._send_line.exchange(self.lease, commands, 0.0))
            except FarmError:
                with self._state:
                    self._broken = True  # what became of these commands is asked by the poller
                    self._send_line = None

    def _recover(self) -> None:
        """After a broken connection: asks what became of each command. Nothing is sent twice.

        Raises:
            FarmError: the farm cannot be reached, or has forgotten the lease.
        """
        self._poll_line = self._reach()
        with self._state:
            # What still stands in the queue was handed to nobody, and goes its way after this. Number 0 is nobody's:
            # asking about it tells the farm, in any case, that calls on the old connection are to get nothing more.
            queued = {(command[0], command[1]) for command in self._queue}
            asked = [[slot, seq, protocol.ASK, b""] for slot, seq in sorted(self._under_way - queued)]
            asked += [[slot, 0, protocol.ASK, b""] for slot, _ in sorted(queued)]
            self._broken = False
            self._polling = True
        self._take(self._poll_line.exchange(self.lease, asked, 0.0))

    def _reach(self) -> Connection:
        deadline = time.monotonic() + RECOVER_LIMIT
        while True:
            try:
                return self._another()
            except FarmError:
                with self._state:
                    if time.monotonic() >= deadline or self._state.wait_for(lambda: self._closed, 0.5):
                        raise

    def _take(self, replies: list[Reply]) -> None:
        if not replies:
            return
        with self._state:
            # A reply that nobody waits for is the second of two, after an ASK: it is dropped here.
            fresh = [reply for reply in replies if (reply[0], reply[1]) in self._under_way]
            self._under_way.difference_update((reply[0], reply[1]) for reply in fresh)
        if fresh:
            self._on_replies(fresh)

    def _lose(self, error: FarmError) -> None:
        with self._state:
            over = self._closed
            self._closed = True
            self._under_way.clear()
            self._state.notify_all()
        if not over:
            self._on_lost(error)
