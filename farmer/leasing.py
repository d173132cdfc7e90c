"""What is done at one farm: connect, lease, add to the lease, give slots back, part; and what follows its loss."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from farmer.farm_tasks import MORE
from farmer.farmlist import FarmAddress
from farmer.link import Link, Reply, Route
from farmer.offer import Offer
from farmer.remote_farm import RemoteFarm
from farmer.remote_slot import RemoteSlot
from wire.errors import FarmError, NoFreeSlot

CONNECT_LIMIT = 1.0  #: s for each step of a later try to connect

log = logging.getLogger("farmer")


class Leasing:
    """The leases of one pool. Methods are tasks of one farm and called without the pool's lock, but where they say so.

    Attributes:
        slots: all that the pool ever had; written here alone, under the lock.
        is_over: no farm is joined any more; set under the lock.
    """

    def __init__(
        self,
        offer: Offer,
        route_to: Callable[[FarmAddress], Route],
        lock: threading.Condition,
        on_replies: Callable[[RemoteFarm, Link, list[Reply]], None],
        on_left: Callable[[RemoteSlot, str], None],
        on_change: Callable[[], None],
    ):
        """Touches nothing yet.

        Args:
            offer: what every farm must have.
            route_to: makes the way to a farm.
            lock: the pool's, notified when slots come or go.
            on_replies: gets what a link brings.
            on_left: gets each slot whose farm is gone, and why; with the lock held.
            on_change: called when there may be something else to do about a farm.
        """
        self.offer = offer
        self.slots: list[RemoteSlot] = []
        self.is_over = False
        self._route_to = route_to
        self._lock = lock
        self._on_replies, self._on_left, self._on_change = on_replies, on_left, on_change

    def connect(self, farm: RemoteFarm, limit: float | None = None) -> tuple[Link, dict[str, Any]]:
        """A link to the farm, and what the farm offers. Raises FarmError."""
        if farm.route is None:
            farm.route = self._route_to(farm.address)
        link = farm.route.connect(limit)
        try:
            about = self._described(farm, link)
        except BaseException:
            link.close()
            raise
        return link, about

    def _described(self, farm: RemoteFarm, link: Link) -> dict[str, Any]:
        about = link.describe()
        farm.reported_step_s = self.offer.step_s(about)
        return about

    def rejoin(self, farm: RemoteFarm) -> None:
        """Joins a farm again, or one that is new in the list. Raises FarmError."""
        self.join(farm, self.connect(farm, CONNECT_LIMIT))
        log.info("%s is there: %d slots", farm.address, len(farm.by_number))

    def join(self, farm: RemoteFarm, answered: tuple[Link, dict[str, Any]]) -> None:
        """Leases the farm's slots and starts its link. Raises FarmError; then nothing was leased."""
        link, about = answered
        try:
            numbers, trouble = self._acquire(farm, link, about)
        except BaseException:
            link.close()
            raise
        with self._lock:
            unwanted = self.is_over or not farm.wanted
            if not unwanted:
                farm.by_number, farm.let_go = {}, []
                link.start(
                    lambda replies: self._on_replies(farm, link, replies),
                    lambda error: self._on_lost(farm, link, error),
                )
                farm.link = link
                self._assign(farm, numbers)
                farm.set_trouble(trouble)
        if unwanted:
            link.close()

    def _acquire(self, farm: RemoteFarm, link: Link, about: dict[str, Any]) -> tuple[list[int], str | None]:
        if farm.leases:  # a farm that slept may not have noticed that its host was gone
            for lease in list(farm.leases):
                link.end_lease(lease)
                farm.leases.remove(lease)
            about = link.describe()
        self.offer.check(farm.address, about)
        count, trouble = _affordable(farm, about, 0)
        return link.acquire(self.offer.env, count), trouble

    def extend(self, farm: RemoteFarm) -> None:
        """Leases the slots that are still wanted of a farm. Raises FarmError."""
        link = farm.link
        if link is None:
            return
        count, trouble = _affordable(farm, self._described(farm, link), len(farm.by_number))
        numbers = link.acquire(self.offer.env, count)
        with self._lock:
            if farm.link is link:
                self._assign(farm, numbers)
                farm.set_trouble(trouble)
                farm.clear_trouble()
                farm.next_try = time.monotonic() + MORE

    def give_back(self, farm: RemoteFarm) -> None:
        """Tells the farm which slots were let go of. Raises FarmError."""
        link, numbers = farm.link, list(farm.let_go)
        if link is None:
            return
        link.release(numbers)
        with self._lock:
            if farm.link is link:
                farm.let_go = [number for number in farm.let_go if number not in numbers]
                farm.next_try = 0.0
                farm.clear_trouble()

    def part(self, farm: RemoteFarm) -> None:
        """Ends the lease of a farm that is in the list no more, once all its episodes are over."""
        with self._lock:
            link = farm.link
            if link is None or farm.by_number or not farm.leaving:
                return
            farm.link = None
            farm.leases.append(link.lease)
        link.close()
        self._on_change()

    # The lock is held.

    def _assign(self, farm: RemoteFarm, numbers: list[int]) -> None:
        """Gives slots of a farm to slots of the pool. The lock is held."""
        unattached = [slot for slot in farm.slots if not slot.attached and slot.idle]
        for number in numbers:
            if number in farm.by_number or number in farm.let_go:
                continue
            if not unattached:
                unattached.append(RemoteSlot(len(self.slots), farm))
                self.slots.append(unattached[0])
                farm.slots.append(unattached[0])
            unattached.pop(0).assign(number)
        self.release_surplus(farm)
        self._lock.notify_all()

    def release_surplus(self, farm: RemoteFarm) -> None:
        """Lets go of idle slots that are over what is wanted of a farm."""
        surplus = len(farm.by_number) - farm.wanted
        if surplus <= 0:
            return
        for slot in [slot for slot in farm.by_number.values() if slot.idle][::-1][:surplus]:
            del farm.by_number[slot.number]
            farm.let_go.append(slot.number)
        farm.next_try = 0.0
        self._on_change()

    def detach(self, farm: RemoteFarm, why: str) -> None:
        """The farm's slots are its slots no more; what was under way there is lost."""
        farm.trouble = why
        slots = list(farm.by_number.values())
        farm.by_number, farm.let_go = {}, []
        for slot in slots:
            self._on_left(slot, why)

    # Of a link.

    def _on_lost(self, farm: RemoteFarm, link: Link, error: FarmError) -> None:
        with self._lock:
            if farm.link is not link:
                return
            farm.link = None
            farm.leases.append(link.lease)
            farm.next_try = 0.0
            self.detach(farm, str(error))
            left = sum(slot.attached for slot in self.slots)
            self._lock.notify_all()
        self._on_change()
        log.warning("%s\n  now: going on with %d slots; it is retried all the time", error, left)


def _affordable(farm: RemoteFarm, about: dict[str, Any], held: int) -> tuple[int, str | None]:
    """How many slots of a farm the host can have in all, and what there is to say about it.

    Raises:
        NoFreeSlot: none.
    """
    offered, free = int(about["slots"]), int(about["free"])
    count = min(farm.wanted, held + free)
    if count >= farm.wanted:
        return count, None
    words = too_many(farm.address, offered) if farm.wanted > offered else few(farm.address, count, farm.wanted)
    if not count:
        raise NoFreeSlot(words)
    return count, words


def few(address: FarmAddress, count: int, wanted: int) -> str:
    """The words for a farm that gives fewer slots than wanted."""
    return f"{address} has {count} of {wanted} slots for this host: other hosts hold the rest, or they do not start"


def too_many(address: FarmAddress, offered: int) -> str:
    """The words for a farmlist that wants more than a farm has."""
    return (
        f"the farmlist wants {address.slots} slots of {address}, which offers {offered}\n"
        f"  now: start it with --slots {address.slots}, or want less"
    )
