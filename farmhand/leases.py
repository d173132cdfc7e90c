"""Leases: a host's right to some slots of a farm, and the replies that wait for it.

    lease = leases.acquire(env, 4, protocol.VERSION)
    leases.exchange(lease.token, [[slot, seq, kind, body], ...], wait=5.0)   # [[slot, seq, kind, flags, body], ...]
    leases.release(lease.token)

A host may come by one connection after another, as networks fail: it numbers them, and this number, the *generation*,
is all that is known of connections here. A call of an older generation does nothing and gets nothing.

The replies of a lease's workers are read by the very call of its host that waits for them (`exchange`), so that a reply
needs no second thread on its way out.
"""

from __future__ import annotations

import logging
import math
import secrets
import select
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from farmhand.slots import Reply, Slot
from farmhand.wake_pipe import WakePipe
from wire import protocol
from wire.errors import LeaseLost, NoFreeSlot, NoSuchEnvironment, ProtocolMismatch
from wire.names import not_offered

LEASE_LIMIT = 8.0  #: s without a call of its holder, after which a lease is freed; hosts call every 2 s
LONGEST_WAIT = 5.0  #: s that one exchange may be asked to wait
LOOK_AGAIN = 0.25  #: s after which a waiting exchange looks whether another one has cleared the wake-up meant for it
LINGER = 0.005  #: s after the first reply that an exchange waits for the others its host wants together
MOST_BYTES = 64 << 20  #: of replies that one exchange gives; a message has a limit, and both ends hold it in memory

log = logging.getLogger("farm")


class Work(Protocol):
    """What a lease needs of the workers in its slots. Every call comes with the lock held."""

    def command(self, slot: Slot, kind: int, body: bytes, frame: bytes) -> None:
        """Gives the worker in a slot a frame that the slot has allowed."""

    def attend(self, worker: Any, event: str) -> None:
        """Reads from a worker, as the selector of its lease said."""

    def one_due(self, numbers: Sequence[int], selector: selectors.BaseSelector) -> int | None:
        """The pipe of one worker in these slots whose reply is awaited by this selector."""

    def held(self, slot: Slot, env: str | None, selector: selectors.BaseSelector | None) -> None:
        """A slot has another holder, who wants this environment and reads by this selector; None: no holder."""


@dataclass
class Lease:
    """A host's right to some slots, and the replies that wait for it.

    Attributes:
        token: what its host proves it by.
        env: the environment that it was made for.
        slots: numbers.
        seen: when its host last called.
        expires: whether it ends after LEASE_LIMIT without a call.
        outbox: (slot, reply) that its host has not taken.
        generation: the number of its host's present connection.
        waiting: calls that are in `exchange` now.
        over: whether it has ended.
    """

    token: str
    env: str
    slots: list[int]
    seen: float
    expires: bool = True
    outbox: list[tuple[int, Reply]] = field(default_factory=list)
    generation: int = 0
    waiting: int = 0
    over: bool = False
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    wake_pipe: WakePipe = field(default_factory=WakePipe)

    def __post_init__(self) -> None:
        self.selector.register(self.wake_pipe.fd, selectors.EVENT_READ, None)

    def take_replies(self) -> list[tuple[int, Reply]]:
        """The replies that wait for it, and if they are too large for one message the first of them."""
        found, size = self.outbox, 0
        for count, (_, reply) in enumerate(found):
            size += len(reply.body)
            if size > MOST_BYTES and count:
                self.outbox = found[count:]
                return found[:count]
        self.outbox = []
        return found

    def close(self) -> None:
        """Closes its descriptors once it is over and no call waits on them, without waiting for the collector."""
        if self.over and not self.waiting:
            self.selector.close()
            self.wake_pipe.close()


class Leases:
    """The leases of one farm. The farm's lock guards them; their public methods take it.

    Attributes:
        slots: all of the farm.
        on_expired: called with the token of a lease whose host did not call, once it has ended; with the lock held.
    """

    def __init__(self, slots: list[Slot], offered: Mapping[str, bytes], names: list[str], lock: Any, work: Work):
        """
        Args:
            slots: all of the farm.
            offered: the environments that can be leased; it may fill later.
            names: those that the farm's owner named, for messages.
            lock: the farm's.
            work: does what is asked of the slots' workers.
        """
        self.slots, self._offered, self._names, self._lock, self._work = slots, offered, names, lock, work
        self._leases: dict[str, Lease] = {}
        self.on_expired: Callable[[str], None] = lambda token: None

    # What a host may ask for. Any thread.

    def acquire(
        self,
        env: str,
        count: int,
        version: int,
        expires: bool = True,
        numbers: list[int] | None = None,
        token: str | None = None,
    ) -> Lease:
        """Leases `count` slots that run `env`, or exactly the slots in `numbers`.

        With the `token` of a lease it adds to that one until it has `count`; asking twice adds once.

        Returns:
            The lease; it ends by `release`, or after LEASE_LIMIT without a call when it `expires`.

        Raises:
            ProtocolMismatch, NoSuchEnvironment, NoFreeSlot, LeaseLost: nothing was leased.
        """
        if version != protocol.VERSION:
            raise ProtocolMismatch(
                f"this farm speaks protocol {protocol.VERSION}, the host {version}: bring both to the same version"
            )
        if env not in self._offered:
            raise NoSuchEnvironment(not_offered(env, self._names))
        with self._lock:
            wanted = self.slots if numbers is None else [self.slots[n] for n in numbers]
            free = sorted((slot for slot in wanted if slot.is_free), key=lambda slot: (slot.env != env, slot.number))
            known = None if token is None else self._called(token)
            if known is not None:
                count = max(0, count - len(known.slots))
            if count > len(free) or count < (token is None):
                raise NoFreeSlot(
                    f"{count} slots were asked for; this farm has {len(self.slots)} and {len(free)} are free"
                )
            lease = known or Lease(secrets.token_hex(16), env, [], time.monotonic(), expires)
            self._leases[lease.token] = lease
            for slot in free[:count]:
                lease.slots.append(slot.number)
                slot.take(lease.token)
                self._work.held(slot, env, lease.selector)
        return lease

    def exchange(
        self,
        token: str,
        commands: list[Any],
        wait: float,
        together: int = 1,
        generation: int | None = None,
        accepted: Callable[[bool], None] | None = None,
    ) -> list[list[Any]]:
        """Hands over commands and returns every reply that is in, at the latest after `wait` seconds.

        Args:
            token: the lease.
            commands: [slot, seq, kind, body] each.
            wait: seconds to wait for a first reply; 0 takes what is there.
            together: replies that the host wants in one go; the first one waits for them, but only for LINGER.
            generation: which of its connections, one after the other, the host calls by; None: it has but one.
            accepted: called with the lock held, unless the call is refused or outdated, with whether it begins a new
                generation.

        Returns:
            [slot, seq, kind, flags, body] each, maybe none; none and nothing done for a call of an older generation.

        Raises:
            LeaseLost: the lease is not known (any more).
        """
        with self._lock:
            lease = self._called(token)
            if generation is None:
                generation = lease.generation
            if generation < lease.generation:
                return []  # it was delayed on a connection that its host has given up: an answer would go nowhere
            if accepted is not None:
                accepted(generation > lease.generation)
            if generation > lease.generation:
                lease.generation = generation
                lease.wake_pipe.wake()  # a call that waits on the old connection ends now and takes nothing with it
            for number, seq, kind, body in commands:
                slot = self.slots[number] if 0 <= number < len(self.slots) else None
                if slot is None or slot.lease != token:
                    raise LeaseLost(f"slot {number!r} is not in this lease")
                frame, reply = slot.command(kind, seq, body)
                if frame is not None:
                    self._work.command(slot, kind, body, frame)
                if reply is not None:
                    lease.outbox.append((slot.number, reply))
            lease.waiting += 1
        try:
            return self._replies(lease, wait, together, generation)
        finally:
            with self._lock:
                lease.waiting -= 1
                lease.close()

    def _replies(self, lease: Lease, wait: float, together: int, generation: int) -> list[list[Any]]:
        """What is in for a lease, as `exchange` says; without the lock while it waits."""
        deadline = time.monotonic() + min(wait, LONGEST_WAIT)
        lingering, last = False, None
        pause = 0.0 if lease.outbox else max(0.0, deadline - time.monotonic())
        while True:
            if last is not None:  # nobody is asked after until this one, too, has answered, or the time is over
                _wait_for((last, lease.wake_pipe.fd), pause)
                pause = 0.0
            events = lease.selector.select(min(pause, LOOK_AGAIN))
            with self._lock:
                for key, _ in events:
                    if key.data is None:
                        lease.wake_pipe.clear()
                    else:
                        self._work.attend(*key.data)
                self._known(lease.token)
                if lease.generation != generation:
                    lease.wake_pipe.wake()  # this call may have read what the one on the new connection waits for
                    return []
                if lease.outbox and not lingering:
                    lingering, deadline = True, min(deadline, time.monotonic() + LINGER)
                pause = deadline - time.monotonic()
                if len(lease.outbox) >= together or pause <= 0:
                    return [[number, r.seq, r.kind, r.flags, r.body] for number, r in lease.take_replies()]
                # Each wake-up less is a dozen microseconds for the others.
                last = self._work.one_due(lease.slots[::-1], lease.selector) if lingering else None

    def release(self, token: str, numbers: list[int] | None = None) -> None:
        """Ends a lease, or takes some slots out of it; what is unknown has ended already."""
        with self._lock:
            lease = self._leases.get(token)
            if lease is not None and numbers is None:
                self._end(lease, "released")
            elif lease is not None:
                gone = [number for number in lease.slots if number in (numbers or ())]
                lease.slots = [number for number in lease.slots if number not in gone]
                lease.outbox = [(number, reply) for number, reply in lease.outbox if number not in gone]
                self._free(gone, "released")

    # For the farm; the lock is held.

    def find(self, token: str | None) -> Lease | None:
        """The lease with this token, if there is one."""
        return self._leases.get(token or "")

    def deliver(self, slot: Slot, reply: Reply | None) -> None:
        """Puts a reply into the outbox of the slot's holder, if it has one."""
        lease = self.find(slot.lease)
        if reply is not None and lease is not None:
            lease.outbox.append((slot.number, reply))

    def wake(self, slot: Slot) -> None:
        """Has a call of the slot's holder look into its outbox: what came was not read by that call."""
        lease = self.find(slot.lease)
        if lease is not None:
            lease.wake_pipe.wake()

    def expire(self) -> None:
        """Ends the leases whose hosts did not call."""
        now = time.monotonic()
        for lease in list(self._leases.values()):
            if lease.expires and now - lease.seen > LEASE_LIMIT:
                self._end(lease, f"their host did not call for {LEASE_LIMIT:g} s")
                self.on_expired(lease.token)

    def end_all(self, reason: str) -> None:
        """Ends every lease."""
        for lease in list(self._leases.values()):
            self._end(lease, reason)

    # Inside; the lock is held.

    def _known(self, token: str) -> Lease:
        lease = self._leases.get(token)
        if lease is None:
            raise LeaseLost(
                f"this lease is not known here: it was released, or its host did not call for {LEASE_LIMIT:g} s"
            )
        return lease

    def _called(self, token: str) -> Lease:
        """Its host has just called. (The end of a call's wait says nothing: its host may be dead since.)"""
        lease = self._known(token)
        lease.seen = time.monotonic()
        return lease

    def _end(self, lease: Lease, reason: str) -> None:
        del self._leases[lease.token]
        self._free(lease.slots, reason)
        lease.wake_pipe.wake()
        lease.over = True
        lease.close()

    def _free(self, numbers: list[int], reason: str) -> None:
        for number in numbers:
            slot = self.slots[number]
            slot.free()
            self._work.held(slot, None, None)
        log.info("slots %s are free: %s", numbers, reason)


def _wait_for(pipes: tuple[int, ...], seconds: float) -> None:
    """Until there is something to read in one of these, or it is closed."""
    poll = select.poll()
    for pipe in pipes:
        poll.register(pipe, select.POLLIN)
    poll.poll(math.ceil(seconds * 1e3))
