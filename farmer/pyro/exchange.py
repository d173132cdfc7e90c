"""Commands to one farm and replies back, for every slot of one lease, with two connections and two threads.

A call of the *poll connection* hands over what is queued and stays at the farm until something is ready. A caller who
gives actions and then waits for results makes both halves of that call in their own thread: `begin` sends it with the
actions, and `fetch` takes the answers of all farms as they come. When the caller does something else for longer than
AWAY, the *poller* thread takes over. A command that comes while a call is at the farm does not wait for it: the
*sender* thread takes that one over a second connection and does not stay at the farm. So a slow slot delays no other,
and under load one call carries many commands. Each call is one Pyro4 call.

The poll connection is in one of three states. Whoever makes it HELD owns it; nobody else reads or writes it.

            begin (caller)              let_go (caller goes on with something else)
            _poll_once (poller)        ------------------------------------------->
    FREE  ---------------------->  HELD                                             OPEN  a call is at the farm,
     ^                              |  <-------------------------------------------       nobody waits for its answer
     |       read: answer taken     |      hold (caller), _poll_once (poller)
     +------------------------------+
     |      _give_up: no answer, Ctrl-C in the middle, an owner that is gone (FORSAKEN)
     +--- BROKEN (a flag beside the state) ---> _recover (poller): a new connection, a new generation, and an ASK for
                                                each command under way; after SILENCE the farm is lost

Rules:

1. The condition's lock guards all fields. It is never held while the network is read or written.
2. Only the thread that set HELD reads or writes the poll connection, and it proves that by `_is_mine` after each wait.
3. A command is in `_queue` (nobody has it), or handed over once. After a broken connection its fate is asked (ASK); a
   command is never handed over again. A reply from an older generation never comes: the farm gives those nothing.
4. Ctrl-C may strike the caller between any two lines. So the caller gives the connection up when anything was raised,
   and `_end_what_was_interrupted` finds what it left behind when it comes back; the poller finds it after FORSAKEN.
5. Who has put commands calls `begin` or `fetch` next. Commands that nobody sends within AWAY are sent by the poller, or
   by the sender while a call is at the farm.

The calls are the heartbeat in both directions: the farm frees a lease that is silent (LEASE_LIMIT there), and a farm
that gives no sign for SILENCE is left.
"""

from __future__ import annotations

import enum
import logging
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from farmer.pyro.connection import Connection
from wire import protocol
from wire.errors import FarmError, FarmLost, LeaseLost

WAIT = 2.0  #: s that a call of the poll connection stays at the farm when nothing is ready
IDLE = 1.0  #: s between calls when nothing is under way
AWAY = 0.02  #: s without the caller, after which the poller takes over
STALE = 0.002  #: s after which a call that was answered meanwhile is followed by one for what came since
GLANCE = 0.25  #: s that a caller waits for some farms before it looks whether another thread has brought something
GLANCE_BESIDE = 0.01  #: the same while one of the farms is a thread's
LITTLE = 1 << 15  #: bytes of bodies that a caller sends itself; a larger message could make it wait for the network
#: s beyond its wait that a call of the poll connection may take, before the connection counts as broken
ANSWER_LIMIT = 1.0
FORSAKEN = 2 * (WAIT + ANSWER_LIMIT)  #: s after which the holder was interrupted, and will not free the connection
SILENCE = 4.0  #: s without a sign of the farm, after which it is left: two heartbeats
RECONNECT_LIMIT = 1.0  #: s for one try to connect again
SETTLE = 0.1  #: s between a broken connection and the question about it: what the farm has got by then, it has read

Command = list[Any]  # [slot, seq, kind, body]
Reply = list[Any]  # [slot, seq, kind, flags, body, crc]

log = logging.getLogger("farmer")


class Call(enum.Enum):
    """What the poll connection does."""

    FREE = "no call is on it"
    OPEN = "a call is at the farm, and nobody waits for the answer"
    HELD = "a thread writes a call, or waits for its answer"


class Exchange:
    """The way to one farm under one lease.

    `on_replies(replies)` and `on_lost(error)` are called from its threads and in `fetch`; after `on_lost` it is over.
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
        self.poll_connection: Connection = connection
        self._send_connection: Connection | None = None
        self._generation = 0  # grows with each new poll connection; the farm ignores calls of older ones
        self._on_replies, self._on_lost = on_replies, on_lost
        self._queue: list[Command] = []
        self._under_way: set[tuple[int, int]] = set()
        self._together = False  # the reader wants everything that is under way
        self.state = Call.FREE
        self._holder = 0  # the thread that made it HELD
        self._reading = False  # its holder takes an answer, which has limits of its own
        self.begun = 0.0  # when the call was sent that is on the poll connection
        self._seen = time.monotonic()  # when the farm last answered
        self._left = 0.0  # when the caller was last here; 0: the poller need not wait for it
        self._wanted = False  # the caller waits for a connection that the poller holds
        self._dozing = False  # the poller sleeps long, since there is nothing to do
        self._broken = self._closed = False
        lock = threading.RLock()
        self._state = threading.Condition(lock)  # the poller waits on it
        self._to_send = threading.Condition(lock)  # the sender does
        self._threads = [
            threading.Thread(target=target, name="%s %s" % (name, self.address), daemon=True)
            for name, target in (("poller", self._poll), ("sender", self._send))
        ]

    def start(self) -> None:
        """Starts both threads."""
        for thread in self._threads:
            thread.start()

    # What the caller does.

    def put(self, commands: list[Command]) -> None:
        """Queues commands; returns at once. The caller's next call is `begin` or `fetch`, which have them sent."""
        with self._state:
            self._queue += commands
            self._under_way.update((command[0], command[1]) for command in commands)
            if self.state is not Call.FREE:
                self._to_send.notify()

    def begin(self) -> None:
        """Has what is queued sent at once, by the caller where that takes no waiting."""
        with self._state:
            self._end_what_was_interrupted()
            if not self._queue or self.state is not Call.FREE or self._broken or self._closed:
                self._wake_if_dozing()
                return
            if sum(len(command[3]) for command in self._queue) > LITTLE:
                self._left = 0.0
                self._state.notify()
                return
            commands, together = self._taken()
        self._write(commands, WAIT, together)
        self.let_go()

    def want(self, everything: bool) -> None:
        """Says whether the reader waits for all that is under way, or for whoever is ready."""
        self._together = everything

    def close(self, limit: float = 3.0) -> None:
        """Releases the lease and ends both threads, within `limit` seconds or so."""
        with self._state:
            self._closed = True
            self._notify()
        try:
            connection = self._another(RECONNECT_LIMIT)
            try:
                connection.release(self.lease)  # which also ends the poller's wait at the farm
            finally:
                connection.close()
        except FarmError:
            pass  # the farm is gone; should it come back, it frees the lease by itself
        deadline = time.monotonic() + limit
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    # The poll connection. It belongs to whoever made it HELD; the state's lock is not held meanwhile.

    def _taken(self) -> tuple[list[Command], int]:
        """Holds the connection, which is free: the commands to go, and how many replies are wanted together."""
        self.state, self._holder, self.begun = Call.HELD, threading.get_ident(), time.monotonic()
        commands, self._queue = self._queue, []
        return commands, len(self._under_way) if self._together else 1

    def _write(self, commands: list[Command], wait: float, together: int) -> bool:
        """Sends a call; whether that went well."""
        try:
            self.poll_connection.begin(self.lease, commands, wait, together, self._generation, WAIT + ANSWER_LIMIT)
        except FarmError:
            self._give_up()
            return False
        except BaseException:  # Ctrl-C in the middle of a message
            self._give_up()
            raise
        self.begun = time.monotonic()
        return True

    def read(self, is_caller: bool) -> None:
        """Waits for the answer, frees the connection, and hands over what came."""
        if not self._is_mine():
            return  # it took so long that the poller has given the call up
        replies: list[Reply] = []
        try:
            self._reading = True
            replies = self.poll_connection.finish()
            with self._state:
                if self._is_mine():
                    self.state, self._holder = Call.FREE, 0
                self._seen = time.monotonic()
                self._left = self._seen if is_caller or (self._wanted and not self._queue) else 0.0
                self._wanted = False
            self._take(replies, is_caller)
        except FarmError:  # should the lease be lost, the question about the commands will tell
            self._give_up()
        except BaseException:  # Ctrl-C, maybe between the answer and its place: the farm still knows what it was
            with self._state:
                self._under_way.update((reply[0], reply[1]) for reply in replies)
            self._give_up()
            raise
        finally:
            self._reading = False

    def _is_mine(self) -> bool:
        return self.state is Call.HELD and self._holder == threading.get_ident()

    def _give_up(self) -> None:
        """The poller finds out what became of the call."""
        with self._state:
            self._broken, self.state, self._holder = True, Call.FREE, 0
            self._state.notify()

    def hold(self) -> bool:
        """Takes the connection with a call on it for a caller that waits; whether it has it."""
        with self._state:
            self._end_what_was_interrupted()
            if self._broken or self._closed or self.state is Call.HELD or not self._under_way:
                self._wanted = self.state is Call.HELD
                return False
            if self.state is Call.OPEN:
                self.state, self._holder = Call.HELD, threading.get_ident()
                return True
            commands, together = self._taken()
        return self._write(commands, WAIT, together)

    def _end_what_was_interrupted(self) -> None:
        """A connection that this thread holds before it has begun anything: Ctrl-C came before it could let go."""
        if self._is_mine():
            self._give_up()

    def let_go(self) -> None:
        """The caller goes on with something else; what came up meanwhile is sent."""
        if self.state is Call.FREE and not self._queue and not (self._dozing and self._under_way):
            return  # the usual case: all is answered, and nothing has come up
        with self._state:
            self._left = time.monotonic()
            if self._is_mine():
                self.state, self._holder = Call.OPEN, 0
                if self._left > self.begun + WAIT + ANSWER_LIMIT and not self.poll_connection.is_answered(0.0):
                    self._give_up()
            waiting = self._queue and self.state is Call.FREE
            self._wake_if_dozing()
        if waiting:
            self.begin()

    def _wake_if_dozing(self) -> None:
        if self._dozing and (self._queue or self._under_way):
            self._dozing = False
            self._state.notify()

    def sweep(self) -> None:
        """One more call, which waits for nothing: the answer just read was there for a while."""
        with self._state:
            if self.state is not Call.FREE or self._broken or self._closed or not self._under_way:
                return
            commands, together = self._taken()
        if self._write(commands, 0.0, together) and self.poll_connection.is_answered(GLANCE_BESIDE):
            self.read(is_caller=True)

    def _notify(self) -> None:
        self._state.notify_all()
        self._to_send.notify_all()

    # The threads.

    def _poll(self) -> None:
        try:
            while self._poll_once():
                pass
        except FarmError as error:
            self._lose(error)
        except Exception as error:  # whatever it is, slots that wait for this thread must not wait for ever
            log.exception("the connection to %s failed in an unforeseen way", self.address)
            self._lose(FarmLost("the farm at %s: %s: %s" % (self.address, type(error).__name__, error)))
        self.poll_connection.close()

    def _poll_once(self) -> bool:
        """One call to the farm, or one recovery; False when it is time to end.

        Raises:
            FarmError: the farm is to be left.
        """
        with self._state:
            while not self._is_due():
                pass
            if self._closed:
                return False
            broken, is_open = self._broken, self.state is Call.OPEN
            if not broken:
                wait = WAIT if self._under_way else 0.0
                commands, together = ([], 0) if is_open else self._taken()
                self.state, self._holder = Call.HELD, threading.get_ident()
        if broken:
            self._recover()
        elif is_open or self._write(commands, wait, together):
            limit = self.begun + WAIT + ANSWER_LIMIT - time.monotonic()
            if not _readable([self.poll_connection], max(0.0, limit)):
                self._give_up()
                return True
            self.read(is_caller=False)
        return True

    def _is_due(self) -> bool:
        """Whether the poller has something to do; if not, waits for a while."""
        now = time.monotonic()
        if self.state is Call.HELD and not self._reading and now > self.begun + FORSAKEN:
            self._give_up()
        if self._closed or (self._broken and self.state is not Call.HELD):
            return True
        if self.state is Call.HELD:
            nap = AWAY
        elif self._queue or self._under_way or self.state is Call.OPEN:
            nap = self._left + AWAY - now
        else:
            nap = self._seen + IDLE - now
            self._dozing = nap > AWAY
        if nap <= 0:
            return True
        self._state.wait(nap)
        self._dozing = False
        return False

    def _send(self) -> None:
        while True:
            with self._state:
                while not (self._closed or (self._queue and self.state is not Call.FREE and not self._broken)):
                    self._to_send.wait()
                if self._closed:
                    if self._send_connection is not None:
                        self._send_connection.close()
                    return
                commands, self._queue = self._queue, []
                generation = self._generation
            try:
                if self._send_connection is None:
                    self._send_connection = self._another(RECONNECT_LIMIT)
                self._take(self._asked(self._send_connection, commands, generation, WAIT + ANSWER_LIMIT), False)
            except FarmError:
                with self._state:
                    if self._send_connection is not None:
                        self._send_connection.close()
                        self._send_connection = None
                    if generation == self._generation:  # else they were asked about meanwhile
                        self._broken = True  # what became of these commands is asked by the poller
                        self._state.notify()

    def _asked(self, connection: Connection, commands: list[Command], generation: int, limit: float) -> list[Reply]:
        replies = connection.exchange(self.lease, commands, 0.0, 1, generation, limit)
        self._seen = time.monotonic()
        return replies

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
        connection = self._another(limit)
        self.poll_connection.close()
        self.poll_connection = connection
        with self._state:
            # The generation tells the farm, in any case, that calls on older connections get nothing more. What is
            # still in the queue was not handed over, and is sent after this.
            self._generation += 1
            queued = {(command[0], command[1]) for command in self._queue}
            asked = [[slot, seq, protocol.ASK, b""] for slot, seq in sorted(self._under_way - queued)]
        self._take(self._asked(connection, asked, self._generation, limit), False)
        with self._state:
            self._broken, self.state, self._left = False, Call.FREE, 0.0

    def _take(self, replies: list[Reply], is_caller: bool) -> None:
        if not replies:
            return
        with self._state:
            self._under_way.difference_update((reply[0], reply[1]) for reply in replies)
        self._on_replies(replies)  # among them the second of two, after an ASK: its number tells the pool
        if self._queue and not is_caller:
            with self._state:  # what follows an episode's end is not to wait for the caller
                self._left = 0.0
                self._state.notify()

    def _lose(self, error: FarmError) -> None:
        with self._state:
            over = self._closed
            self._closed = True
            self._under_way.clear()
            self._notify()
        if not over:
            self._on_lost(error)


def fetch(exchanges: Sequence[Exchange], wait: float) -> bool:
    """Takes what these farms answer first, in the caller's thread.

    Args:
        exchanges: of the farms that have commands.
        wait: seconds, at most; it may be less.

    Returns:
        Whether it could; if not, the exchanges' threads are at it.
    """
    held: list[Exchange] = []
    try:
        for exchange in exchanges:
            if exchange.hold():
                held.append(exchange)
        came = time.monotonic()
        glance = GLANCE if len(held) == len(exchanges) else GLANCE_BESIDE
        answered = _readable([exchange.poll_connection for exchange in held], min(wait, glance)) if held else []
        at_once = time.monotonic() < came + STALE
        for number, exchange in enumerate(held):
            if number not in answered:  # reading the others' answers may take long
                exchange.let_go()
        for number in answered:
            exchange = held[number]
            stale = at_once and came > exchange.begun + STALE
            exchange.read(is_caller=True)
            if stale:
                exchange.sweep()
    finally:
        for exchange in held:
            exchange.let_go()
    return bool(held)


def _readable(connections: Sequence[Connection], wait: float) -> list[int]:
    """Which of them have an answer, or an end, to be read, after `wait` seconds at most."""
    if len(connections) == 1:
        return [0] if connections[0].is_answered(wait) else []
    poll, numbers = select.poll(), {}
    for number, connection in enumerate(connections):
        fd = connection.fileno()
        if fd < 0:
            return [number]  # closed: reading it says so
        numbers[fd] = number
        poll.register(fd, select.POLLIN)
    return [numbers[fd] for fd, _ in poll.poll(wait * 1000)]
