"""The farmer: leases on all farms of the farmlist, as one pool of environments with `send` and `recv`.

farmer = Farmer("Pendulum-v1", [("127.0.0.1", 4)])
farmer.reset(farmer.vacant())
batch = farmer.recv()                       # whoever is ready
farmer.send(actions, batch.slot)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from farmer.arguments import check_seeds, check_whole
from farmer.batch import Batch, Row, batch_of
from farmer.commands import Commands
from farmer.ledger import total
from farmer.link import Link, Reply, fetch
from farmer.membership import Membership
from farmer.placement import Placement
from farmer.remote_farm import RemoteFarm
from farmer.remote_slot import RemoteSlot
from farmer.replies import ReplyReader
from farmer.values import Values
from wire import auth, codec, protocol
from wire.errors import BadAction, FarmerClosed, FarmTimeout, NothingSent


class Farmer:
    """All environments of one name, over all farms of a list.

    Verbs of the pool are for one thread; replies are collected by threads of the links meanwhile. After `close` each
    raises FarmerClosed; `status` still tells the ledger.
    """

    #: What commands and results go through; a subclass may watch them.
    commands_type: type[Commands] = Commands

    def __init__(
        self,
        env: str,
        farmlist: str | os.PathLike[str] | Iterable[Any] = "farmlist.py",
        slots: int | None = None,
        seed: int | None = None,
        key_file: str | os.PathLike[str] | None = None,
    ):
        """Leases the slots.

        Args:
            env: a name from the farms' catalogs.
            farmlist: path of a farmlist.py, whose edits are followed, or pairs of (address, slots).
            slots: how many environments in all, on the fastest farms as far as they have told, and on equally fast ones
                in proportion to their slots; None takes all of the list.
            seed: of the episodes' seeds; None draws other ones each time. `reset` can be given seeds of its own.
            key_file: the key of these farms; None takes FARM_KEY, or no key where that is not set either.

        Raises:
            ValueError: slots below 1, or a negative seed.
            TypeError: they are no whole numbers.
            BadKey: the key file cannot be used.
            FarmlistError: the list is missing or wrong.
            FarmUnreachable: no farm of the list answered.
            FarmRefused: a farm does not offer `env`, or not with the spaces of the first, or has fewer slots than the
                list wants.
        """
        if slots is not None:
            check_whole("slots", slots, 1, "or None for all of the farmlist")
        if seed is not None:
            check_whole("seed", seed, 0, "or None")
        self.env = env
        self._seeds = np.random.default_rng(seed)  # also without a seed: an episode that has one can be played again
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._closed = False
        self._placement = Placement()
        key = auth.find_key(key_file)
        self._members = Membership(env, farmlist, slots, key, self._arrived, self._on_replies, self._on_left)
        self.commands = self.commands_type(
            self._members.slots, self._placement, self._arrived, self._members.release_surplus
        )
        try:
            self._members.open()
        except BaseException:
            self.close()
            raise
        offer = self._members.offer
        assert offer.ready is not None
        self.observation_space, self.action_space = offer.spaces
        self._values = Values(env, self.observation_space, self.action_space)
        self.commands.reader = ReplyReader(self._values, self.observation_space)
        self.metadata: dict[str, Any] = offer.ready.get("metadata") or {}
        self._members.start()

    # The pool's verbs.

    @property
    def nb_slots(self) -> int:
        """Environments that are there now."""
        with self._lock:
            return sum(len(farm.by_number) for farm in self._members.farms)

    @property
    def busy(self) -> int:
        """Environments with a command under way."""
        return self.commands.under_way

    @property
    def nb_ready(self) -> int:
        """Results that `recv` would give at once."""
        return len(self.commands.rows)

    @property
    def follow(self) -> bool:
        """Whether an episode that ends is followed by a reset at once, without the caller.

        It begins when the last result arrives; the environment chooses its seed. For `collect`, whose rows tell it.
        """
        return self.commands.follow

    @follow.setter
    def follow(self, follow: bool) -> None:
        self.commands.follow = follow

    def name_of(self, slot: int) -> str:
        """The farm a slot is on, as host:port."""
        return str(self.commands.slot(slot).farm.address)

    def vacant(self, episodes: int | None = None) -> list[int]:
        """Slots without an episode and with nothing under way: new, finished, or replaced after a loss.

        Args:
            episodes: how many are still to be begun, where that is known. Then only the slots that should begin one now
                are given, the fastest first: a slot that is so slow that the others will have played all of them before
                it ends its one stays vacant.
        """
        with self._lock:
            self._check_open()
            vacant = self.commands.vacant()
            if episodes is None:
                return vacant
            return self._placement.chosen(self._members.slots, vacant, episodes, time.perf_counter())

    def pace(self, slot: int) -> float | None:
        """Seconds from a step's sending to its result's arrival, lately; None before the first."""
        return self.commands.slot(slot).step_s.mean

    def is_worth(self, slot: int, other: int) -> bool:
        """Whether an episode that waits in `other`, already reset, is better than waiting for the reset of `slot`."""
        with self._lock:
            own, its = self.commands.slot(slot), self.commands.slot(other)
            return self._placement.is_worth(own, its, time.perf_counter())

    def reset(self, slots: Sequence[int], seeds: Sequence[int | None] | None = None, options: Any = None) -> None:
        """Begins an episode in each slot; its first observation comes by `recv` with `first`.

        Args:
            slots: which of the vacant ones.
            seeds: one for each, where None leaves it to the environment; not given, the farmer draws them.
            options: of the environment's own `reset`, the same for all.

        Raises:
            BadSlot: a slot is not vacant.
            TypeError: a seed that is no whole number.
        """
        slots = [int(slot) for slot in slots]
        if seeds is None:
            seeds = [int(self._seeds.integers(2**31)) for _ in slots]
        check_seeds(seeds)
        with self._lock:
            self._check_open()
            self.commands.check_vacant(slots)
            bodies = [codec.encode({"seed": seed, "options": options}) for seed in seeds]
            links = self.commands.dispatch(slots, protocol.RESET, bodies)
        for link in links:
            link.begin()

    def send(self, actions: Any, slots: Sequence[int], repeat: int = 1) -> None:
        """Gives each slot its next action; all are checked before any is sent.

        A slot that was lost since the last `recv` gets none, and the row that says so is already there to be received.

        Args:
            actions: one for each slot, (n, *action_shape) for a Box.
            slots: where to.
            repeat: how often the worker applies it (rewards are summed, an episode's end stops it).

        Raises:
            BadAction: a wrong number, shape or dtype, or NaN; nothing was sent.
            BadSlot: a slot is busy or has no episode; nothing was sent.
        """
        self._send(actions, slots, repeat, True)

    def step(self, actions: Any, slots: Sequence[int], timeout: float | None = 60.0) -> Batch:
        """`send`, and `recv` of all that is then under way, in one call: the fastest way to step all in a row.

        It costs one call to each farm, and no change of thread. Arguments and errors as theirs.
        """
        self._send(actions, slots, 1, False)
        return self.recv(self.busy + self.nb_ready, timeout)

    def call(self, action: Any, slot: int, timeout: float | None) -> list[Row]:
        """One slot's step, for a pool that has no other: rows just as they came."""
        self._send([action], [slot], 1, False)
        return self.collect(1, timeout)

    def hand_over(self, actions: Any, slots: Sequence[int]) -> None:
        """`send` for a caller who collects next: the call that waits for the results takes the actions along."""
        self._send(actions, slots, 1, False)

    def wait_vacant(self, slots: set[int], timeout: float) -> list[int]:
        """Those of the slots that are vacant, as soon as there is one; none after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while True:
                self._check_open()
                found = [slot for slot in self.commands.vacant() if slot in slots]
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                self._arrived.wait(min(left, 0.5))  # after a failed reset a slot is vacant by time alone

    def _send(self, actions: Any, slots: Sequence[int], repeat: int, begin: bool) -> None:
        self._check_open()
        slots = [int(slot) for slot in slots]
        if len(actions) != len(slots):
            raise BadAction(f"{len(actions)} actions for {len(slots)} slots")
        bodies = self._values.actions(actions, slots, repeat)
        with self._lock:
            self._check_open()
            lost = self.commands.check_ready(slots)
            if lost:
                there = [(slot, body) for slot, body in zip(slots, bodies, strict=True) if slot not in lost]
                slots, bodies = [slot for slot, _ in there], [body for _, body in there]
            links = self.commands.dispatch(slots, protocol.STEP, bodies)
        if begin:
            for link in links:
                link.begin()

    def recv(self, min_ready: int = 1, timeout: float | None = 60.0) -> Batch:
        """Collect the results that are in, at least `min_ready` of them.

        A slot that was lost does not hold the batch up: its row says so in `lost`. When nothing is under way because
        farms are away, it waits for one to come back and returns an empty batch then: `vacant` has the slots.

        Args:
            min_ready: rows to wait for; 1 never waits for a straggler.
            timeout: seconds to wait for them; None waits for ever.

        Raises:
            NothingSent: no command is under way, and there are slots to give some to.
            FarmTimeout: nothing came in time; late results stay addressed to their own step.
        """
        return batch_of(self.collect(min_ready, timeout), self._values)

    def collect(self, min_ready: int = 1, timeout: float | None = 60.0) -> list[Row]:
        """As `recv`, but rows with everything just as the environment gave it."""
        check_whole("min_ready", min_ready, 0)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._check_open()
            if self.commands.is_nothing_asked():
                raise NothingSent("recv with no command under way: reset or send first")
        is_first = True
        while True:
            with self._lock:
                if self._is_enough(min_ready):
                    return self.commands.take_rows()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0 and not is_first:  # what is there comes in any case
                    if self.commands.rows:
                        return self.commands.take_rows()
                    raise FarmTimeout(f"no result within {timeout} s; under way: {self.busy}\n{self._troubles()}")
                links = self._links_at_work(min_ready)
            is_first = False
            if fetch(links, 60.0 if left is None else max(0.0, left)):
                continue
            with self._lock:
                if not self._is_enough(min_ready):
                    # Slots that wait after a failed reset become vacant by time alone, without a notification.
                    self._arrived.wait(left if self.busy else min(left or 0.5, 0.5))

    def abandon(self, slots: Sequence[int] | None = None) -> None:
        """Forgets running episodes, all or those of some slots; each is vacant once what is under way in it is back."""
        with self._lock:
            self.commands.abandon(slots)

    def status(self) -> dict[str, Any]:
        """Farms with their slots, troubles and ledgers: every step that was sent is in exactly one bucket.

        Returns:
            "env", "slots", "busy", "farmlist" (what is wrong with its last edit, else None), "ledger" (of all farms,
            those among them that have left) and "farms": for each "farm", "connected", "leaving", "slots", "wanted",
            "busy", "trouble", "step_s" (seconds a step, the way included; None: not known), "ledger", "dropped" (late
            replies that nobody asked for any more; no steps) and "places": "slot", "far" (its number on the farm, None
            while it has none), "busy", "step_s" and "ledger" of each.
        """
        with self._lock:
            return {
                "env": self.env,
                "slots": self.nb_slots,
                "busy": self.busy,
                "farmlist": self._members.farmlist_trouble,
                "ledger": total(slot.ledger() for slot in self._members.slots),
                "farms": [farm.status() for farm in self._members.farms],
            }

    def refarm(self) -> dict[str, Any]:
        """Reads the farmlist again, at once: new farms join, removed ones finish their episodes and leave.

        A file's edits are followed without this, within a few seconds.

        Raises:
            FarmlistError: it is broken; everything stays as it was.
        """
        self._check_open()
        self._members.refarm()
        return self.status()

    def close(self) -> None:
        """Frees every slot and ends every thread, within a few seconds. A second time it does nothing."""
        with self._lock:
            self._closed = True
            self.commands.close()
        self._members.close()

    def __enter__(self) -> Farmer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Farmer {self.env}: {self.nb_slots} slots on {len(self._members.farms)} farms>"

    # Inside.

    def _on_replies(self, farm: RemoteFarm, link: Link, replies: list[Reply]) -> None:
        with self._lock:
            self.commands.on_replies(farm, link, replies)

    def _on_left(self, slot: RemoteSlot, why: str) -> None:
        self.commands.on_left(slot, why)  # membership holds the lock

    def _links_at_work(self, min_ready: int) -> list[Link]:
        """Those with commands under way; they are told what the caller waits for. The lock is held."""
        links = [farm.link for farm in self._members.farms if farm.under_way and farm.link is not None]
        everything = min_ready >= self.nb_ready + self.busy
        for link in links:
            link.want(everything)
        return links

    def _is_enough(self, min_ready: int) -> bool:
        self._check_open()  # another thread may close while this one waits
        return self.commands.is_enough(min_ready)

    def _check_open(self) -> None:
        if self._closed:
            raise FarmerClosed(f"this farmer of {self.env} is closed: make a new one")

    def _troubles(self) -> str:
        return "\n".join(f"  {farm.address}: {farm.trouble or 'connected'}" for farm in self._members.farms)
