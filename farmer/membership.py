"""Keeps the leases in step with the farmlist: farms join, leave, vanish and come back while the pool goes on.

One thread looks at the list and at the farms; what may block (connecting, leasing, freeing) is a task of
`farmer/farm_tasks.py`. What runs is never cut: a slot that is not wanted any more leaves when its episode is over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from farmer import balance
from farmer.farm_tasks import MORE, RETRY, FarmTasks, Task
from farmer.farmlist import PORT, FarmAddress
from farmer.leasing import Leasing, few, too_many
from farmer.link import Link, Reply
from farmer.offer import Offer
from farmer.remote_farm import RemoteFarm, key_of
from farmer.remote_slot import RemoteSlot
from farmer.routes import RouteFactory, route_to
from farmer.watched_farmlist import WatchedFarmlist
from wire.errors import (
    FarmError,
    FarmlistError,
    FarmRefused,
    FarmUnreachable,
    LeaseLost,
    NoFreeSlot,
    NoSuchEnvironment,
    ProtocolMismatch,
)

CONNECT_LIMIT = 1.0  #: s for each step of a later try to connect
LOOK = 0.5  #: s between looks at the farmlist

log = logging.getLogger("farmer")


class Membership:
    """The farms of one pool, and the threads that look after them.

    `farms` is written here alone. It, `slots` and `apply` need the pool's lock.
    """

    def __init__(
        self,
        env: str,
        source: str | os.PathLike[str] | Iterable[Any],
        slots: int | None,
        key: bytes | None,
        lock: threading.Condition,
        on_replies: Callable[[RemoteFarm, Link, list[Reply]], None],
        on_left: Callable[[RemoteSlot, str], None],
        route_to: RouteFactory = route_to,
    ):
        """Touches nothing yet; `open` does.

        Args:
            env: a name from the farms' catalogs.
            source: path of a farmlist.py, or its entries.
            slots: how many in all; None takes all of the list.
            key: of these farms; None for farms without one.
            lock: the pool's, notified when slots come or go.
            on_replies: gets what a link brings.
            on_left: gets each slot whose farm is gone, and why; with the lock held.
            route_to: makes the way to a farm.
        """
        self.offer = Offer(env)
        self.farms: list[RemoteFarm] = []
        self.farmlist_trouble: str | None = None
        self._env = env
        self._list = WatchedFarmlist(source)
        self._nb_slots = slots
        self._lock = lock
        self._left: dict[FarmAddress, RemoteFarm] = {}  # were in the list; their ledgers count, and they may come again
        self._wake = threading.Event()
        self._leasing = Leasing(
            self.offer, lambda address: route_to(address, env, key), lock, on_replies, on_left, self._wake.set
        )
        self._tasks = FarmTasks(lock, self._next_task, self._on_failed)
        self._thread = threading.Thread(target=self._run, name="farm membership", daemon=True)

    @property
    def slots(self) -> list[RemoteSlot]:
        """All that the pool ever had, by their index."""
        return self._leasing.slots

    def release_surplus(self, farm: RemoteFarm) -> None:
        """Lets go of idle slots that are over what is wanted of a farm. The lock is held."""
        self._leasing.release_surplus(farm)

    # The pool's calls.

    def open(self) -> None:
        """Leases the slots of all farms that are there.

        Raises:
            FarmlistError, FarmUnreachable, FarmRefused: see `Farmer`.
        """
        addresses = self._list.load()
        with self._lock:
            self.farms += [RemoteFarm(address) for address in addresses]
        links = self._connect_all()
        try:
            self._plan(links)
            for farm in list(self.farms):
                if farm in links and farm.wanted:
                    self._leasing.join(farm, links.pop(farm))
        finally:
            for link, _ in links.values():
                link.close()

    def start(self) -> None:
        """Begins to look after the farms."""
        self._thread.start()

    def close(self) -> None:
        """Frees every slot and ends every thread, within a few seconds."""
        with self._lock:
            self._leasing.is_over = True
            links = [farm.link for farm in self.farms if farm.link is not None]
            tasks = [farm.task for farm in self.farms if farm.task is not None]
            for farm in self.farms:
                farm.link = None
                self._leasing.detach(farm, "the farmer was closed")
            self._lock.notify_all()
        self._wake.set()
        closing = [threading.Thread(target=link.close, name=f"closing {link.address}") for link in links]
        for thread in closing:
            thread.start()
        for thread in [*closing, *tasks, self._thread]:
            if thread.ident is not None:
                thread.join(10.0)
        for farm in self.farms:
            farm.close_route()

    def refarm(self) -> None:
        """Reads the list again and follows it.

        Raises:
            FarmlistError: it is broken; everything stays as it was.
        """
        try:
            addresses = self._list.load()
        except FarmlistError as error:
            self.farmlist_trouble = str(error)
            raise
        self.farmlist_trouble = None
        with self._lock:
            self.apply(addresses)

    def apply(self, addresses: list[FarmAddress]) -> None:
        """Follows a list: new farms join, others change how many slots they give, removed ones finish and leave."""
        wanted = {key_of(address): address for address in addresses}
        for farm in self.farms:
            address = wanted.pop(farm.key, None)
            if address is None and not farm.leaving:
                log.info("%s is removed from the farmlist: its episodes are finished, then it leaves", farm.address)
            farm.leaving = address is None
            if address is not None and address != farm.address:
                log.info("%s has %d slots in the farmlist now, not %d", address, address.slots, farm.address.slots)
                farm.address, farm.next_try = address, 0.0
        for key, address in wanted.items():
            log.info("%s with %d slots is new in the farmlist", address, address.slots)
            added = self._left.pop(key, None) or RemoteFarm(address)
            added.address, added.leaving, added.trouble, added.next_try = address, False, None, 0.0
            self.farms.append(added)
        self._share_out()
        for farm in self.farms:
            self._leasing.release_surplus(farm)
            farm.clear_trouble()
        self._lock.notify_all()
        self._wake.set()

    def _share_out(self) -> None:
        """Says how many slots of each farm are wanted."""
        staying = [farm for farm in self.farms if not farm.leaving]
        for farm in self.farms:
            farm.wanted = 0 if farm.leaving else farm.address.slots
        if self._nb_slots is not None:
            there = [farm for farm in staying if farm.link is not None or farm.trouble is None]
            for farm in staying:
                farm.wanted = 0
            self._want_shares(there, [farm.address.slots for farm in there])

    def _want_shares(self, farms: list[RemoteFarm], capacities: list[int]) -> None:
        assert self._nb_slots is not None
        shares = balance.share(capacities, self._nb_slots, [farm.step_s for farm in farms])
        for farm, count in zip(farms, shares, strict=True):
            farm.wanted = count

    # At the start.

    def _connect_all(self) -> dict[RemoteFarm, tuple[Link, dict[str, Any]]]:
        """Links to the farms that answer, with what they offer; the others get their trouble. All are tried at once."""
        with ThreadPoolExecutor(len(self.farms), "connecting") as threads:
            tries = {farm: threads.submit(self._leasing.connect, farm) for farm in self.farms}
        links: dict[RemoteFarm, tuple[Link, dict[str, Any]]] = {}
        refusal: BaseException | None = None
        for farm, one in tries.items():
            error = one.exception()
            if error is None:
                links[farm] = one.result()
            elif isinstance(error, FarmUnreachable):
                farm.trouble = str(error)
            else:
                refusal = refusal or error
        if refusal is not None:
            for link, _ in links.values():
                link.close()
            raise refusal
        return links

    def _plan(self, links: dict[RemoteFarm, tuple[Link, dict[str, Any]]]) -> None:
        """Says how many slots of each farm are wanted; takes those out of `links` that are not joined now."""
        unreachable = [farm.trouble for farm in self.farms if farm.trouble is not None]
        if not links:
            commands = dict.fromkeys(_command(self._env, farm.address) for farm in self.farms)
            raise FarmUnreachable("\n".join(unreachable) + "\n  now: start one there: " + ", or: ".join(commands))
        self._skip_without_env(links)
        for farm, (_, about) in links.items():
            if farm.address.slots > int(about["slots"]):
                raise NoFreeSlot(too_many(farm.address, int(about["slots"])))
        listed = sum(farm.address.slots for farm in self.farms)
        if self._nb_slots is not None and listed < self._nb_slots:
            raise NoFreeSlot(f"{self._nb_slots} slots were asked for; the farmlist has {listed}")
        free = {farm: min(farm.address.slots, int(about["free"])) for farm, (_, about) in links.items()}
        if not any(free.values()):
            for farm, (_, about) in links.items():
                self.offer.check(farm.address, about)
            raise NoFreeSlot(f"no slot is free on {', '.join(str(f.address) for f in links)}: other hosts hold them")
        if self._nb_slots is None:
            for farm in self.farms:
                farm.wanted = farm.address.slots
        else:
            self._want_shares(list(free), list(free.values()))
        for farm in [farm for farm, count in free.items() if farm.wanted and not count]:
            link, about = links.pop(farm)
            with contextlib.closing(link):
                self.offer.check(farm.address, about)
            farm.next_try = time.monotonic() + MORE
            farm.set_trouble(few(farm.address, 0, farm.wanted))
        for trouble in unreachable:
            there = ", ".join(str(farm.address) for farm in links)
            log.warning("FarmUnreachable: %s\n  now: going on with %s; it is retried all the time", trouble, there)

    def _skip_without_env(self, links: dict[RemoteFarm, tuple[Link, dict[str, Any]]]) -> None:
        """Goes on without the farms that do not offer the environment.

        Raises:
            NoSuchEnvironment: none of those that answered offers it.
        """
        lacking = [farm for farm, (_, about) in links.items() if self._env not in about["envs"]]
        if len(lacking) == len(links):
            self.offer.check(lacking[0].address, links[lacking[0]][1])
        for farm in lacking:
            link, about = links.pop(farm)
            link.close()
            farm.next_try = time.monotonic() + MORE
            try:
                self.offer.check(farm.address, about)
            except NoSuchEnvironment as error:
                farm.trouble = str(error)
                log.warning("%s\n  now: going on without this farm; it is asked again all the time", error)

    # The thread.

    def _run(self) -> None:
        looked = time.monotonic()
        while True:
            self._wake.wait(min(LOOK, RETRY))
            self._wake.clear()
            with self._lock:
                if self._leasing.is_over:
                    return
                for farm in list(self.farms):
                    if farm.leaving and farm.link is None and farm.task is None:
                        self._drop(farm)
                    else:
                        self._tasks.start(farm)
            if self._list.is_file and time.monotonic() - looked >= LOOK:
                looked = time.monotonic()
                self._follow_edits()

    def _drop(self, farm: RemoteFarm) -> None:
        farm.close_route()
        self.farms.remove(farm)
        self._left[farm.key] = farm
        log.info("%s has left", farm.address)

    def _follow_edits(self) -> None:
        if not self._list.has_changed():
            return
        try:
            self.refarm()
        except FarmlistError as error:
            log.error("FarmlistError: %s\n  now: going on with the list as it was", error)

    # Troubles.

    def _on_failed(self, farm: RemoteFarm, error: FarmError) -> None:
        """A task failed. What a farm refuses it will refuse again, so it is asked seldom, but for slots."""
        is_refused = isinstance(error, (FarmRefused, ProtocolMismatch))
        is_final = is_refused and not isinstance(error, (NoFreeSlot, LeaseLost))
        with self._lock:
            farm.next_try = time.monotonic() + (MORE if is_final else RETRY)
            if is_refused:
                farm.set_trouble(str(error))
            elif farm.trouble is None:  # else its loss has been told, and each try has other words
                farm.set_trouble(f"{error}\n  now: it is retried all the time")
            else:
                farm.trouble = str(error)
            farm.clear_trouble()

    def _next_task(self, farm: RemoteFarm) -> Task | None:
        """What is to be done about a farm now. The lock is held."""
        due = time.monotonic() >= farm.next_try
        if self._leasing.is_over:
            return None
        if farm.link is None:
            return self._leasing.rejoin if farm.wanted and due else None
        if farm.leaving and not farm.by_number:
            return self._leasing.part
        if farm.let_go:
            return self._leasing.give_back if due else None
        return self._leasing.extend if len(farm.by_number) < farm.wanted and due else None


def _command(env: str, address: FarmAddress) -> str:
    """What starts a farm at an address; behind ssh it listens on its own machine's 127.0.0.1."""
    command = f"python farm.py {env}"
    if address.ssh is None and address.host not in ("127.0.0.1", "localhost"):
        command += f" --host {address.host} --key-file PATH"
    return command if address.port == PORT else f"{command} --port {address.port}"
