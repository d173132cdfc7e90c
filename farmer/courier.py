"""Carries commands to one farm and replies back, with two threads however many slots it has.

The *poller* hands over whatever is queued and waits at the farm until something is ready. A command that comes while
it waits there does not wait with it: the *sender* brings that one over a connection of its own and does not stay. So a
slow slot delays nobody, and under load one call carries many commands. A caller who is about to wait for results anyway
makes the poller's call himself (`drive`), which saves two changes of thread a step.

The poller's calls are the heartbeat in both directions: the farm frees a lease that is silent (LEASE_LIMIT there), and
a farm that gives no sign for SILENCE is left. A connection that breaks is replaced, as long as that takes no longer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from farmer.connection import Connection
from wire import protocol
from wire.errors import FarmError, FarmLost, LeaseLost

WAIT = 2.0  #: s that the poller stays at the farm when nothing is ready
IDLE = 1.0  #: s between calls when nothing is under way
ANSWER_LIMIT = 1.0  #: s beyond its wait that a poller's call may take, before its connection counts as broken
SILENCE = 4.0  #: s without a sign of the farm, after which it is left: two heartbeats
RECONNECT_LIMIT = 1.0  #: s for one try to connect again
SETTLE = 0.1  #: s between a broken connection and the question about it: what the farm has got by then, it has read

Command = list[Any]  # [slot, seq, kind, body]
Reply = list[Any]  # [slot, seq, kind, flags, body, crc]

log = logging.getLogger("farmer")


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
        self._poll_line: Connection = connection
        self._send_line: Connection | None = None
        self._line = 0  # grows with each connection that replaces a broken one; the farm ignores what comes by older
        self._on_replies, self._on_lost = on_replies, on_lost
        self._queue: list[Command] = []
        self._under_way: set[tuple[int, int]] = set()
        self._together = False  # the reader wants everything that is under way
        self._polling = self._driven = self._broken = self._closed = False
        self._seen = time.monotonic()  # when the farm last answered
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
            replies = self._call(self._poll_line, commands, min(wait, WAIT), together, self._line)
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
            line = self._another(RECONNECT_LIMIT)
            try:
                line.release(self.lease)  # which also ends the poller's wait at the farm
            finally:
                line.close()
        except FarmError:
            pass  # the farm is gone; should it come back, it frees the lease by itself
        deadline = time.monotonic() + limit
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _call(
        self, line: Connection, commands: list[Command], wait: float, together: int, number: int, limit: float = 0.0
    ) -> list[Reply]:
        replies = line.exchange(self.lease, commands, wait, together, number, limit or wait + ANSWER_LIMIT)
        self._seen = time.monotonic()
        return replies

    # The threads.

    def _poll(self) -> None:
        try:
            while self._poll_once():
                pass
        except FarmError as error:
            self._lose(error)
        except Exception as error:  # whatever it is, slots that wait for this thread must not wait for ever
            log.exception("the connection to %s failed in a way that nobody foresaw", self.address)
            self._lose(FarmLost("the farm at %s: %s: %s" % (self.address, type(error).__name__, error)))
        self._poll_line.close()

    def _poll_once(self) -> bool:
        """One call to the farm, or one recovery; False when it is time to end.

        Raises:
            FarmError: the farm is to be left.
        """
        with self._state:
            self._state.wait_for(self._has_work, IDLE)
            if self._closed:
                return False
            if self._driven:
                return True
            broken, number = self._broken, self._line
            commands: list[Command] = []
            if not broken:
                commands, self._queue = self._queue, []
            wait = WAIT if self._under_way else 0.0
            together = len(self._under_way) if self._together else 1
            self._polling = True
        try:
            if broken:
                self._recover()
            else:
                self._take(self._call(self._poll_line, commands, wait, together, number))
        except LeaseLost:
            raise
        except FarmError:
            if broken:
                raise
            with self._state:
                self._broken = True
        finally:
            with self._state:
                self._polling = False
        return True

    def _has_work(self) -> bool:
        return self._closed or bool(not self._driven and (self._queue or self._under_way or self._broken))

    def _send(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or (self._queue and self._polling and not self._broken))
                if self._closed:
                    if self._send_line is not None:
                        self._send_line.close()
                    return
                commands, self._queue = self._queue, []
                number = self._line
            try:
                if self._send_line is None:
                    self._send_line = self._another(RECONNECT_LIMIT)
                self._take(self._call(self._send_line, commands, 0.0, 1, number, WAIT + ANSWER_LIMIT))
            except FarmError:
                with self._state:
                    if self._send_line is not None:
                        self._send_line.close()
                        self._send_line = None
                    if number == self._line:  # else they were asked about meanwhile
                        self._broken = True  # what became of these commands is asked by the poller

    def _recover(self) -> None:
        """After a broken connection: asks what became of each command. Nothing is sent twice.

        Raises:
            FarmError: the farm gave no sign for SILENCE, or it has forgotten the lease.
        """
        deadline = max(self._seen + SILENCE, time.monotonic() + RECONNECT_LIMIT)
        with self._state:
            self._state.wait_for(lambda: self._closed, SETTLE)
        while not self._closed:
            try:
                self._reconnect(max(0.1, min(RECONNECT_LIMIT, deadline - time.monotonic())))
                return
            except LeaseLost:
                raise
            except FarmError as error:
                with self._state:
                    if time.monotonic() >= deadline:
                        raise
                    self._state.wait_for(lambda: self._closed, min(0.25, deadline - time.monotonic()))
                log.debug("%s", error)

    def _reconnect(self, limit: float) -> None:
        line = self._another(limit)
        self._poll_line.close()
        self._poll_line = line
        with self._state:
            # The number tells the farm, in any case, that calls on older connections are to get nothing more. What
            # still stands in the queue was handed to nobody, and goes its way after this.
            self._line += 1
            queued = {(command[0], command[1]) for command in self._queue}
            asked = [[slot, seq, protocol.ASK, b""] for slot, seq in sorted(self._under_way - queued)]
        self._take(self._call(line, asked, 0.0, 1, self._line, limit))
        with self._state:
            self._broken = False

    def _take(self, replies: list[Reply]) -> None:
        if not replies:
            return
        with self._state:
            self._under_way.difference_update((reply[0], reply[1]) for reply in replies)
        self._on_replies(replies)  # among them the second of two, after an ASK: its number tells the pool

    def _lose(self, error: FarmError) -> None:
        with self._state:
            over = self._closed
            self._closed = True
            self._under_way.clear()
            self._state.notify_all()
        if not over:
            self._on_lost(error)
