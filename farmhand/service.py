"""What a host may call: the farm's five verbs and its slots, as Pyro4 objects.

PYRO:farm@host:port      describe, acquire, exchange, release   (for a farmer)
                         status                                 (for people: a row for each slot; no farmer needs it)
PYRO:slot-3@host:port    reset, step, release                   (for a script, with Pyro4 alone)
"""

from __future__ import annotations

import functools
import ipaddress
import math
import platform
import socket
import threading
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import Pyro4

from farmhand.leases import LONGEST_WAIT
from farmhand.messages import LONG, LongAnswer
from farmhand.server import MESSAGE_LIMIT, Connection, GuardedDaemon
from farmhand.supervisor import Supervisor
from wire import codec, protocol
from wire.errors import FarmError, FarmRefused, MessageDamaged, NoFreeSlot, StartError

THREADS = 512  #: connections at a time; each of a host's farms takes two


def configure() -> None:
    """Sets Pyro4 up for a farm: plain data only, bounded messages and waits, small packets sent at once."""
    Pyro4.config.SERIALIZER = "msgpack"
    Pyro4.config.SERIALIZERS_ACCEPTED = {"msgpack"}
    Pyro4.config.MAX_MESSAGE_SIZE = protocol.MAX_BODY
    Pyro4.config.COMMTIMEOUT = MESSAGE_LIMIT
    Pyro4.config.SOCK_NODELAY = True
    Pyro4.config.SOCK_REUSE = True
    Pyro4.config.THREADPOOL_SIZE = THREADS
    Pyro4.config.DETAILED_TRACEBACK = False


def _answer(method: Callable[..., Any]) -> Callable[..., Any]:
    """Sends our errors as strings: {"error": [name, text]}."""

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        try:
            return method(*args)
        except FarmError as error:
            return {"error": [type(error).__name__, str(error)]}

    return call


class HostConnections:
    """The connections that the host of one lease calls by: one waits for replies, one only brings commands.

    A third one replaces one of them. The farm's lock guards it.
    """

    def __init__(self) -> None:
        self._waits: Connection | None = None
        self._brings: Connection | None = None

    def called(self, connection: Connection, waits: bool) -> None:
        """Notes by which connection a call came, and ends the one that it replaces.

        Its host has given that up. A network that lost the host's end without a word would hold ours open for ever,
        and with it a thread and a descriptor.
        """
        if not waits and self._waits is connection:
            return  # it has nothing to wait for just now
        if waits:
            replaced, self._waits = self._waits, connection
            if self._brings is connection:
                self._brings = None
        else:
            replaced, self._brings = self._brings, connection
        if replaced is not None and replaced is not connection:
            replaced.hang_up()

    def hang_up(self) -> None:
        """Ends them."""
        for connection in (self._waits, self._brings):
            if connection is not None:
                connection.hang_up()


@Pyro4.expose
class FarmService:
    """The farm itself, as hosts see it: its five verbs."""

    def __init__(self, supervisor: Supervisor):
        self._supervisor = supervisor
        self._id = uuid.uuid4().hex  # another one after each start, so that a host knows a restarted farm
        self._connections: dict[str, HostConnections] = {}  # by lease
        supervisor.leases.on_expired = self._hang_up

    def _hang_up(self, lease: str) -> None:
        connections = self._connections.pop(lease, None)
        if connections is not None:
            connections.hang_up()

    @_answer
    def describe(self) -> dict[str, Any]:
        """Protocol version, identity, slots, free slots, the environments with their spaces, and how fast they step."""
        about = {"protocol": protocol.VERSION, "farm": self._id, "name": socket.gethostname()}
        return dict(self._supervisor.describe(), python=platform.python_version(), **about)

    @_answer
    def acquire(self, env: str, count: int, version: int, token: str | None = None) -> dict[str, Any]:
        """Leases slots, or adds to a lease: {"lease": token, "slots": [numbers], "ready": the READY body}."""
        lease = self._supervisor.acquire(env, count, version, token=token)
        return {"lease": lease.token, "slots": lease.slots, "ready": self._supervisor.ready[env]}

    @_answer
    def exchange(self, lease: str, commands: list[Any], wait: float, together: int, generation: int, check: int) -> Any:
        """Commands in, [replies, checksum] out; see `Leases.exchange`."""
        _check_exchange(lease, commands, wait, together, generation)
        if protocol.checksum([lease, wait, together, generation], commands, protocol.sums(commands)) != check:
            raise MessageDamaged("a message was changed on its way; nothing of it was done")
        connection = Pyro4.current_context.client

        def accepted(is_new: bool) -> None:
            connections = self._connections.get(lease)
            if connections is None:
                connections = self._connections[lease] = HostConnections()
            connections.called(connection, wait > 0 or is_new)

        replies = self._supervisor.exchange(lease, commands, wait, together, generation, accepted)
        answer = [replies, protocol.checksum([check], replies, protocol.sums(replies))]
        return LongAnswer(answer) if any(len(reply[4]) > LONG for reply in replies) else answer

    @_answer
    def release(self, lease: str, slots: list[int] | None = None) -> None:
        """Ends a lease, or takes some slots out of it."""
        if slots is not None and not (isinstance(slots, list) and all(type(slot) is int for slot in slots)):
            raise FarmRefused("release takes a lease, and numbers of slots")
        with self._supervisor.lock:
            self._supervisor.release(str(lease), slots)
            if slots is None:
                self._connections.pop(str(lease), None)

    @_answer
    def status(self) -> list[dict[str, Any]]:
        """A row for each slot: the fifth verb, for people and tests. No farmer calls it."""
        return self._supervisor.status()


@Pyro4.expose
class SlotService:
    """One slot as an object of its own, for scripts that have Pyro4 and nothing else.

    The first call leases the slot to the connection that it came by; `release`, or the end of the connection, frees it.
    Arrays come as lists. A farmer is faster: it sends bytes that no program on the way decodes.
    """

    def __init__(self, supervisor: Supervisor, number: int):
        self._supervisor = supervisor
        self._number = number
        self._lock = threading.Lock()
        self._holder: Any = None
        self._lease = ""
        self._seq = 0

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> list[Any]:
        """Begins an episode: [observation, info].

        Raises:
            RuntimeError: another connection holds the slot, or the environment failed.
        """
        return self._call(protocol.RESET, {"seed": seed, "options": options})

    def step(self, action: Any) -> list[Any]:
        """One step: [observation, reward, terminated, truncated, info].

        Raises:
            RuntimeError: another connection holds the slot, or the environment failed.
        """
        return self._call(protocol.STEP, {"action": action, "repeat": 1})

    def release(self) -> None:
        """Frees the slot, if this connection holds it."""
        self._disconnected(Pyro4.current_context.client)

    def _disconnected(self, connection: Any) -> None:  # private: Pyro4 exposes what is public
        if connection is not self._holder:
            return  # without the lock, which the holder keeps during a whole step
        with self._lock:
            if connection is self._holder and self._holder is not None:
                self._supervisor.release(self._lease)
                self._holder = None

    def _call(self, kind: int, body: dict[str, Any]) -> list[Any]:
        self._refuse_others()  # at once, also while the holder is in a long step
        with self._lock:
            self._take()
            self._seq += 1
            commands = [[self._number, self._seq, kind, codec.encode(body)]]
            replies: list[list[Any]] = []
            while not replies:
                replies = self._supervisor.exchange(self._lease, commands, LONGEST_WAIT)
                commands = []
        _, _, kind, _, answer = replies[0]
        value = codec.decode(answer)
        if kind in (protocol.FAULT, protocol.LOST):
            raise RuntimeError(value["text"] + "\n" + value.get("traceback", ""))
        return list(_plain(value[:-1]))  # without the seconds it took

    def _refuse_others(self) -> None:
        if self._holder not in (None, Pyro4.current_context.client):
            raise RuntimeError(f"slot {self._number} is held by another connection")

    def _take(self) -> None:
        self._refuse_others()
        connection = Pyro4.current_context.client
        if self._holder is connection:
            return
        env = self._supervisor.slots[self._number].env
        try:
            lease = self._supervisor.acquire(env, 1, protocol.VERSION, expires=False, numbers=[self._number])
        except NoFreeSlot:
            raise RuntimeError(f"slot {self._number} is leased to another host") from None
        self._lease, self._holder = lease.token, connection


class FarmDaemon(GuardedDaemon):
    """The farm's daemon, which also frees the slots of scripts whose connection ends."""

    def __init__(self, host: str, port: int, key: bytes | None = None):
        """Binds the address.

        Args:
            host: without a key, one of this machine alone.
            port: 0 takes a free one.
            key: what every connection has to prove first; None: every program on this machine may call.

        Raises:
            StartError: it cannot be bound, or is wider than loopback without a key; in words.
        """
        check_host(host, key is not None)
        configure()
        self._slots: list[SlotService] = []
        try:
            super().__init__(host, port, key)
        except OSError as error:
            raise StartError(
                f"cannot listen on {host}:{port}: {error.strerror or error}\n"
                "  now: another farm may run there; stop it, or choose another with --port"
            ) from None

    def offer(self, supervisor: Supervisor) -> None:
        """Registers the farm and its slots."""
        self.register(FarmService(supervisor), "farm")
        for slot in supervisor.slots:
            service = SlotService(supervisor, slot.number)
            self._slots.append(service)
            self.register(service, f"slot-{slot.number}")

    def clientDisconnect(self, conn: Any) -> None:
        """Pyro4's hook."""
        for slot in self._slots:
            slot._disconnected(conn)


def check_host(host: str, has_key: bool) -> None:
    """A farm executes its callers' orders, so it listens on loopback only, unless callers prove that they have its key.

    Raises:
        StartError: the address is wider than loopback, and there is no key.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not has_key:
        raise StartError(
            f"--host {host} would let anyone on that network run this farm: callers have to prove that "
            "they know its key\n"
            f"  now: farm.py --new-key farm.key; farm.py ... --host {host} --key-file farm.key; the same "
            "file on the host\n"
            "  or leave it on 127.0.0.1 and write ('ssh://user@this-machine', SLOTS) into the host's farmlist.py"
        )


def _check_exchange(lease: Any, commands: Any, wait: Any, together: Any, generation: Any) -> None:
    """Checks the types of what comes from outside, once, before anything of it is done."""
    good = isinstance(lease, str) and isinstance(commands, list)
    good = good and isinstance(together, int) and isinstance(generation, int)
    good = good and isinstance(wait, (int, float)) and math.isfinite(wait)
    for command in commands if good else ():
        if type(command) is not list or len(command) != 4:
            good = False
            break
        slot, seq, kind, body = command
        if not (type(slot) is type(seq) is type(kind) is int and type(body) is bytes):
            good = False
            break
        if not (0 <= slot < 1 << 63 and 0 <= seq < 1 << 63 and 0 <= kind < 1 << 63):
            good = False
            break
    if not good:
        raise FarmRefused("exchange takes a lease, commands [slot, seq, kind, body], seconds and a number")


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
