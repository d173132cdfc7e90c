"""Keeps the leases in step with the farmlist: farms join, leave, vanish and come back while the pool goes on.

One thread looks at the list and at the farms; whatever may block (connecting, leasing, freeing) is an *errand*, in a
thread of its own for each farm and outside the pool's lock, so that a dead address delays neither the pool nor another
farm. What runs is never cut: a slot that is not wanted any more leaves when its episode is over.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium

from farmer import balance
from farmer.connection import Connection
from farmer.courier import Courier, Reply
from farmer.farmlist import PORT, FarmAddress, load_farmlist
from farmer.places import Farm, Place, key_of
from farmer.spaces import build_space
from farmer.tunnel import Tunnel
from wire import codec
from wire.errors import (
    FarmError,
    FarmlistError,
    FarmLost,
    FarmRefused,
    FarmUnreachable,
    LeaseLost,
    NoFreeSlot,
    ProtocolMismatch,
)

RETRY = 0.5  #: s between tries to reach a farm that is away
CONNECT_LIMIT = 1.0  #: s for each step of such a try
MORE = 5.0  #: s between tries to get slots that other hosts hold, and at a farm that says no
LOOK = 0.5  #: s between looks at the farmlist; an edit counts once two looks in a row have seen it

log = logging.getLogger("farmer")


class Keeper:
    """The farms of one pool, and the threads that see to them. Attributes and `apply`, `shed` need the pool's lock."""

    def __init__(
        self,
        env: str,
        source: str | os.PathLike[str] | Iterable[Any],
        slots: int | None,
        key: bytes | None,
        lock: threading.Condition,
        on_replies: Callable[[Farm, Courier, list[Reply]], None],
        on_left: Callable[[Place, str], None],
    ):
        """Touches nothing yet; `open` does.

        Args:
            env: a name from the farms' catalogs.
            source: path of a farmlist.py, or its entries.
            slots: how many in all; None takes all of the list.
            key: of these farms; None for farms without one.
            lock: the pool's, notified when slots come or go.
            on_replies: gets what a courier brings.
            on_left: gets each place whose farm is gone, and why; with the lock held.
        """
        self.env = env
        self._source = source if isinstance(source, (str, os.PathLike)) else list(source)
        self._slots = slots
        self._key = key
        self._lock = lock
        self._on_replies, self._on_left = on_replies, on_left
        self.farms: list[Farm] = []
        self.places: list[Place] = []
        self.gone: dict[FarmAddress, Farm] = {}  # were in the list; their ledgers count, and they may come again
        self.farmlist_trouble: str | None = None
        self.ready: dict[str, Any] | None = None
        self.spaces: tuple[gymnasium.Space[Any] | None, gymnasium.Space[Any] | None] = (None, None)
        self._looked: bytes | None = None  # what the list held when it was last loaded
        self._glimpsed: bytes | None = None  # what it held at the last look
        self._over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="farm keeper", daemon=True)

    # The pool's calls.

    def open(self) -> None:
        """Leases the slots of all farms that are there.

        Raises:
            FarmlistError, FarmUnreachable, FarmRefused: see `Farmer`.
        """
        self._looked = self._glimpsed = self._content()
        addresses = load_farmlist(self._source)
        with self._lock:
            self.farms += [Farm(address) for address in addresses]
        lines = self._connect_all()
        try:
            self._plan(lines)
            for farm in list(self.farms):
                if farm in lines and farm.wanted:
                    self._join(farm, lines.pop(farm))
        finally:
            for line in lines.values():
                line.close()

    def start(self) -> None:
        """Begins to look after the farms."""
        self._thread.start()

    def close(self) -> None:
        """Frees every slot and ends every thread, within a few seconds."""
        with self._lock:
            self._over = True
            couriers = [farm.courier for farm in self.farms if farm.courier is not None]
            errands = [farm.errand for farm in self.farms if farm.errand is not None]
            for farm in self.farms:
                farm.courier = None
                self._leave(farm, "the farmer was closed")
            self._lock.notify_all()
        self._wake.set()
        closing = [threading.Thread(target=courier.close, name="closing %s" % courier.address) for courier in couriers]
        for thread in closing:
            thread.start()
        for thread in [*closing, *errands, self._thread]:
            if thread.ident is not None:
                thread.join(10.0)
        for farm in self.farms:
            _end_tunnel(farm)

    def refarm(self) -> None:
        """Reads the list again and follows it.

        Raises:
            FarmlistError: it is broken; everything stays as it was.
        """
        content = self._content()
        self._looked = self._glimpsed = content
        try:
            addresses = load_farmlist(self._source)
        except FarmlistError as error:
            self.farmlist_trouble = str(error)
            raise
        self.farmlist_trouble = None
        with self._lock:
            self.apply(addresses)

    def shed(self, farm: Farm) -> None:
        """Lets go of idle slots that are over what is wanted of a farm."""
        surplus = len(farm.by_far) - farm.wanted
        if surplus <= 0:
            return
        for place in [place for place in farm.by_far.values() if place.idle][::-1][:surplus]:
            del farm.by_far[place.far]
            farm.let_go.append(place.far)
        farm.next_try = 0.0
        self._wake.set()

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
            added = self.gone.pop(key, None) or Farm(address)
            added.address, added.leaving, added.trouble, added.next_try = address, False, None, 0.0
            self.farms.append(added)
        self._deal()
        for farm in self.farms:
            self.shed(farm)
            self._forgive(farm)
        self._lock.notify_all()
        self._wake.set()

    def _deal(self) -> None:
        """Says how many slots of each farm are wanted."""
        staying = [farm for farm in self.farms if not farm.leaving]
        for farm in self.farms:
            farm.wanted = 0 if farm.leaving else farm.address.slots
        if self._slots is not None:
            there = [farm for farm in staying if farm.courier is not None or farm.trouble is None]
            for farm in staying:
                farm.wanted = 0
            capacities = [farm.address.slots for farm in there]
            shares = balance.share(capacities, self._slots, [farm.pace for farm in there])
            for farm, count in zip(there, shares, strict=True):
                farm.wanted = count

    # At the start.

    def _connect_all(self) -> dict[Farm, Connection]:
        """Connections to the farms that answer; those that do not get their trouble. All are tried at once."""
        with ThreadPoolExecutor(len(self.farms), "connecting") as threads:
            tries = {farm: threads.submit(self._connect, farm) for farm in self.farms}
        lines: dict[Farm, Connection] = {}
        refusal: BaseException | None = None
        for farm, one in tries.items():
            error = one.exception()
            if error is None:
                lines[farm] = one.result()
            elif isinstance(error, FarmUnreachable):
                farm.trouble = str(error)
            else:
                refusal = refusal or error
        if refusal is not None:
            for line in lines.values():
                line.close()
            raise refusal
        return lines

    def _plan(self, lines: dict[Farm, Connection]) -> None:
        troubles = [farm.trouble for farm in self.farms if farm.trouble is not None]
        if not lines:
            there = dict.fromkeys(_command(self.env, farm.address) for farm in self.farms)
            raise FarmUnreachable("\n".join(troubles) + "\n  now: start one there: " + ", or: ".join(there))
        for farm, line in lines.items():
            if farm.address.slots > int(line.about["slots"]):
                raise NoFreeSlot(_too_many(farm.address, int(line.about["slots"])))
        listed = sum(farm.address.slots for farm in self.farms)
        if self._slots is not None and listed < self._slots:
            raise NoFreeSlot("%d slots were asked for; the farmlist has %d" % (self._slots, listed))
        free = {farm: min(farm.address.slots, int(line.about["free"])) for farm, line in lines.items()}
        if not any(free.values()):
            for farm, line in lines.items():
                self._check_offered(farm, line)  # a wrong name is the nearer mistake
            raise NoFreeSlot("no slot is free on %s: other hosts hold them" % ", ".join(str(f.address) for f in lines))
        if self._slots is None:
            for farm in self.farms:
                farm.wanted = farm.address.slots
        else:
            shares = balance.share(list(free.values()), self._slots, [farm.pace for farm in free])
            for farm, count in zip(free, shares, strict=True):
                farm.wanted = count
        for farm in [farm for farm, count in free.items() if farm.wanted and not count]:
            with contextlib.closing(lines.pop(farm)) as line:
                self._check_offered(farm, line)
            farm.next_try = time.monotonic() + MORE
            self._tell(farm, _few(farm.address, 0, farm.wanted))
        for trouble in troubles:
            log.warning(
                "FarmUnreachable: %s\n  now: going on with %s; it is retried all the time",
                trouble,
                ", ".join(str(farm.address) for farm in lines),
            )

    def _connect(self, farm: Farm, limit: float | None = None) -> Connection:
        if farm.address.ssh is not None and farm.tunnel is None:
            farm.tunnel = Tunnel(farm.address)
        line = Connection(farm.address, self._key, farm.tunnel, limit)
        farm.told_s = _pace_in(line.about, self.env)
        return line

    # The thread.

    def _run(self) -> None:
        looked = time.monotonic()
        while True:
            self._wake.wait(min(LOOK, RETRY))
            self._wake.clear()
            with self._lock:
                if self._over:
                    return
                self._send_errands()
            if self._is_file and time.monotonic() - looked >= LOOK:
                looked = time.monotonic()
                self._look()

    def _send_errands(self) -> None:
        for farm in list(self.farms):
            if farm.leaving and farm.courier is None and farm.errand is None:
                self._bury(farm)
            elif farm.errand is None and self._next(farm) is not None:
                farm.errand = threading.Thread(
                    target=self._errand, args=(farm,), name="errand to %s" % farm.address, daemon=True
                )
                farm.errand.start()

    def _bury(self, farm: Farm) -> None:
        _end_tunnel(farm)
        self.farms.remove(farm)
        self.gone[farm.key] = farm
        log.info("%s has left", farm.address)

    def _next(self, farm: Farm) -> Callable[[Farm], None] | None:
        """What is to be done about a farm now. The lock is held."""
        due = time.monotonic() >= farm.next_try
        if self._over:
            return None
        if farm.courier is None:
            return self._rejoin if farm.wanted and due else None
        if farm.leaving and not farm.by_far:
            return self._part
        if farm.let_go:
            return self._give_back if due else None
        return self._extend if len(farm.by_far) < farm.wanted and due else None

    def _errand(self, farm: Farm) -> None:
        while True:
            with self._lock:
                errand = self._next(farm)
                if errand is None:
                    farm.errand = None
                    return
                farm.next_try = time.monotonic() + RETRY
            try:
                errand(farm)
            except FarmError as error:
                self._blame(farm, error)
            except Exception as error:  # a farm must be tried again, whatever it is
                log.exception("%s: this was not foreseen", farm.address)
                with self._lock:
                    farm.trouble = "%s: %s" % (type(error).__name__, error)
                    farm.next_try = time.monotonic() + MORE

    # Troubles.

    def _blame(self, farm: Farm, error: FarmError) -> None:
        """An errand failed. What a farm refuses it will refuse again, so it is asked seldom, but for slots."""
        is_refused = isinstance(error, (FarmRefused, ProtocolMismatch))
        is_final = is_refused and not isinstance(error, (NoFreeSlot, LeaseLost))
        with self._lock:
            farm.next_try = time.monotonic() + (MORE if is_final else RETRY)
            if is_refused:
                self._tell(farm, str(error))
            elif farm.trouble is None:  # else its loss has been told, and each try has other words
                self._tell(farm, "%s\n  now: it is retried all the time" % error)
            else:
                farm.trouble = str(error)
            self._forgive(farm)

    def _tell(self, farm: Farm, trouble: str | None) -> None:
        """Notes what is wrong with a farm, and logs it when it is new."""
        if trouble is not None and trouble != farm.trouble and not self._over:
            log.warning("%s", trouble)
        farm.trouble = trouble

    def _forgive(self, farm: Farm) -> None:
        """A farm that is there with all that is wanted of it has no trouble any more. The lock is held."""
        if farm.courier is not None and len(farm.by_far) >= farm.wanted and not farm.let_go:
            farm.trouble = None

    # Errands: without the lock, but where they say so.

    def _rejoin(self, farm: Farm) -> None:
        self._join(farm, self._connect(farm, CONNECT_LIMIT))
        log.info("%s is there: %d slots", farm.address, len(farm.by_far))

    def _join(self, farm: Farm, line: Connection) -> None:
        """Leases the farm's slots and starts its courier. Raises FarmError; then nothing was leased."""
        try:
            leased, trouble = self._acquire(farm, line)
        except BaseException:
            line.close()
            raise
        courier = Courier(
            line,
            leased["lease"],
            lambda replies: self._on_replies(farm, courier, replies),
            lambda error: self._on_lost(farm, courier, error),
        )
        with self._lock:
            unwanted = self._over or not farm.wanted
            if not unwanted:
                farm.by_far, farm.let_go = {}, []
                self._seat(farm, leased["slots"])
                farm.courier = courier
                self._tell(farm, trouble)
        if unwanted:
            with contextlib.suppress(FarmError):  # it frees a lease that nobody uses by itself
                line.release(leased["lease"])
            line.close()
        else:
            courier.start()

    def _acquire(self, farm: Farm, line: Connection) -> tuple[dict[str, Any], str | None]:
        about = line.about
        if farm.leases:  # a farm that slept may not have noticed that its host was gone
            for lease in list(farm.leases):
                line.release(lease)
                farm.leases.remove(lease)
            about = line.describe()
        self._check_offered(farm, line)
        count, trouble = _affordable(farm, about, 0)
        return line.acquire(self.env, count), trouble

    def _check_offered(self, farm: Farm, line: Connection) -> None:
        """What a farm says it has is what this pool is for; asked before anything is leased.

        Raises:
            NoSuchEnvironment: it has no environment of that name; in its own words, with the names near it.
            FarmLost: nobody can read how it describes it.
            FarmRefused: its spaces are others than those of the first farm.
        """
        if self.env not in line.about["envs"]:
            line.release(line.acquire(self.env, 1)["lease"])
        try:
            ready = codec.decode(line.about["envs"][self.env])
            spaces = build_space(ready["observation_space"]), build_space(ready["action_space"])
        except (codec.CodecError, KeyError, TypeError) as error:
            raise FarmLost("the farm at %s described its environment badly: %r" % (farm.address, error)) from None
        if self.ready is None:
            self.ready, self.spaces = ready, spaces
        elif spaces != self.spaces:
            raise FarmRefused(
                "%s at %s has other spaces than on the first farm: %s instead of %s\n"
                "  now: give both the same version of the environment, and the same arguments"
                % (self.env, farm.address, spaces, self.spaces)
            )

    def _seat(self, farm: Farm, numbers: list[int]) -> None:
        """Gives slots of a farm to places of the pool. The lock is held."""
        spare = [place for place in farm.places if not place.here and place.idle]
        for far in numbers:
            if far in farm.by_far or far in farm.let_go:
                continue
            if not spare:
                spare.append(Place(len(self.places), farm))
                self.places.append(spare[0])
                farm.places.append(spare[0])
            place = spare.pop(0)
            place.far, place.not_before = far, 0.0
            farm.by_far[far] = place
        self.shed(farm)
        self._lock.notify_all()

    def _extend(self, farm: Farm) -> None:
        courier = farm.courier
        if courier is None:
            return
        with contextlib.closing(self._connect(farm, CONNECT_LIMIT)) as line:
            count, trouble = _affordable(farm, line.about, len(farm.by_far))
            leased = line.acquire(self.env, count, courier.lease)
        with self._lock:
            if farm.courier is courier:
                self._seat(farm, leased["slots"])
                self._tell(farm, trouble)
                self._forgive(farm)
                farm.next_try = time.monotonic() + MORE

    def _give_back(self, farm: Farm) -> None:
        courier, numbers = farm.courier, list(farm.let_go)
        if courier is None:
            return
        with contextlib.closing(self._connect(farm, CONNECT_LIMIT)) as line:
            line.release(courier.lease, numbers)
        with self._lock:
            if farm.courier is courier:
                farm.let_go = [number for number in farm.let_go if number not in numbers]
                farm.next_try = 0.0
                self._forgive(farm)

    def _part(self, farm: Farm) -> None:
        with self._lock:
            courier = farm.courier
            if courier is None or farm.by_far or not farm.leaving:
                return
            farm.courier = None
            farm.leases.append(courier.lease)
        courier.close()
        self._wake.set()

    # When a farm is gone.

    def _on_lost(self, farm: Farm, courier: Courier, error: FarmError) -> None:
        with self._lock:
            if farm.courier is not courier:
                return
            farm.courier = None
            farm.leases.append(courier.lease)
            farm.next_try = 0.0
            self._leave(farm, str(error))
            left = sum(len(other.by_far) for other in self.farms)
            self._lock.notify_all()
        self._wake.set()
        log.warning("%s\n  now: going on with %d slots; it is retried all the time", error, left)

    def _leave(self, farm: Farm, why: str) -> None:
        farm.trouble = why
        places = list(farm.by_far.values())
        farm.by_far, farm.let_go = {}, []
        for place in places:
            self._on_left(place, why)

    # The list.

    @property
    def _is_file(self) -> bool:
        return isinstance(self._source, (str, os.PathLike))

    def _content(self) -> bytes | None:
        """What the list's file holds, None where it cannot be read."""
        if not isinstance(self._source, (str, os.PathLike)):
            return None
        try:
            return Path(self._source).read_bytes()
        except OSError:
            return None

    def _look(self) -> None:
        """Follows an edit that stands still: editors empty a file, or take it away, before they write it."""
        content, before = self._content(), self._glimpsed
        self._glimpsed = content
        if content == self._looked or content != before:
            return
        try:
            self.refarm()
        except FarmlistError as error:
            log.error("FarmlistError: %s\n  now: going on with the list as it was", error)


def _affordable(farm: Farm, about: dict[str, Any], held: int) -> tuple[int, str | None]:
    """How many slots of a farm the host can have in all, and what there is to say about it.

    Raises:
        NoFreeSlot: none.
    """
    offered, free = int(about["slots"]), int(about["free"])
    count = min(farm.wanted, held + free)
    if count >= farm.wanted:
        return count, None
    few = _too_many(farm.address, offered) if farm.wanted > offered else _few(farm.address, count, farm.wanted)
    if not count:
        raise NoFreeSlot(few)
    return count, few


def _pace_in(about: dict[str, Any], env: str) -> float | None:
    """Seconds a step as a farm tells them, None where it has not seen any."""
    try:
        pace = float(about["paces"][env])
    except (KeyError, TypeError, ValueError):
        return None
    return pace if 0 < pace < math.inf else None


def _end_tunnel(farm: Farm) -> None:
    if farm.tunnel is not None:
        farm.tunnel.close()
        farm.tunnel = None


def _few(address: FarmAddress, count: int, wanted: int) -> str:
    return "%s has %d of %d slots for this host: the others are another's, or do not start" % (address, count, wanted)


def _command(env: str, address: FarmAddress) -> str:
    """What starts a farm at an address; behind ssh it listens on its own machine's 127.0.0.1."""
    command = "python farm.py %s" % env
    if address.ssh is None and address.host not in ("127.0.0.1", "localhost"):
        command += " --host %s --key-file PATH" % address.host
    return command if address.port == PORT else command + " --port %d" % address.port


def _too_many(address: FarmAddress, offered: int) -> str:
    return "the farmlist wants %d slots of %s, which offers %d\n  now: start it with --slots %d, or want less" % (
        address.slots,
        address,
        offered,
        address.slots,
    )
