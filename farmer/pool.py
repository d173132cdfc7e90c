"""The farmer: leases on all farms of the farmlist, as one pool of environments with `send` and `recv`.

farmer = Farmer("Pendulum-v1", [("127.0.0.1", 4)])
farmer.reset(farmer.vacant())
batch = farmer.recv()                       # whoever is ready
farmer.send(actions, batch.slot)
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from farmer.arguments import check_seeds, check_whole
from farmer.courier import Courier, Reply, fetch
from farmer.keeper import Keeper
from farmer.placement import Placement
from farmer.places import LOST_BUCKETS, Farm, Place, total
from farmer.spaces import why_unsound
from farmer.values import Values
from wire import auth, codec, protocol
from wire.errors import BadAction, BadSlot, FarmerClosed, FarmTimeout, NothingSent

#: The reset that follows an episode by itself; the environment chooses its seed.
NEXT = codec.encode({"seed": None, "options": None})
#: s before a slot whose reset failed twice running is vacant again, so that a broken one does not keep the host busy
RESET_RETRY = 1.0


@dataclass
class Batch:
    """Results of the slots that were ready; every array has them as first axis, n.

    Attributes:
        slot: int32 (n,).
        obs: (n, *obs_shape) in the environment's dtype, or a list where observations are no arrays of one shape.
        reward: float32 (n,).
        terminated: bool (n,), the task ended: do not bootstrap.
        truncated: bool (n,), cut off (time limit, lost slot): bootstrap.
        lost: bool (n,), no transition happened; `obs` is the last good one (zeros when there was none).
        first: bool (n,), the first observation of an episode, no transition.
        info: n dicts; of a lost row {"lost": why}.
        env_s: float32 (n,), seconds inside the environment (all repeats; of a first row its reset), as its worker
            measured them; 0 of a lost row.
        trip_s: float32 (n,), seconds from the sending of the command to the arrival of its reply, on this machine's
            clock; what is over `env_s` was spent on the way; 0 of a lost row.
    """

    slot: np.ndarray
    obs: Any
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    lost: np.ndarray
    first: np.ndarray
    info: list[dict[str, Any]]
    env_s: np.ndarray
    trip_s: np.ndarray

    def __len__(self) -> int:
        return len(self.slot)


@dataclass(slots=True)
class Row:
    """One result, just as it came."""

    slot: int
    obs: Any
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    lost: bool = False
    first: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    env_s: float = 0.0
    trip_s: float = 0.0
    followed: bool = False  # the reset of the slot's next episode is on its way already


class Farmer:
    """All environments of one name, over all farms of a list.

    Verbs of the pool are for one thread; replies are collected by threads of the couriers meanwhile. After `close` each
    raises FarmerClosed; `status` still tells the ledger.

    Attributes:
        follow: whether an episode that ends is followed by a reset at once, when its last result arrives and without
            the caller; the environment chooses its seed. For `collect`, whose rows tell it.
    """

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
        self._rows: deque[Row] = deque()
        self._sent = 0  # places with a command under way
        self._closed = False
        self.follow = False
        self._ended: list[Row] = []  # with `follow`: results that ended an episode, among those just taken
        self._placement = Placement()
        key = auth.find_key(key_file)
        self._keeper = Keeper(env, farmlist, slots, key, self._arrived, self._on_replies, self._on_left)
        self._places, self._farms = self._keeper.places, self._keeper.farms
        try:
            self._keeper.open()
        except BaseException:
            self.close()
            raise
        assert self._keeper.ready is not None
        self.observation_space, self.action_space = self._keeper.spaces
        self._values = Values(env, self.observation_space, self.action_space)
        self.metadata: dict[str, Any] = self._keeper.ready.get("metadata") or {}
        self._keeper.start()

    # The pool's verbs.

    @property
    def nb_slots(self) -> int:
        """Environments that are there now."""
        with self._lock:
            return sum(len(farm.by_far) for farm in self._farms)

    @property
    def busy(self) -> int:
        """Environments with a command under way."""
        return self._sent

    def name_of(self, slot: int) -> str:
        """The farm a slot is on, as host:port."""
        return str(self._place(slot).farm.address)

    def vacant(self, episodes: int | None = None) -> list[int]:
        """Slots without an episode and with nothing under way: new, finished, or replaced after a loss.

        Args:
            episodes: how many are still to be begun, where that is known. Then only the slots that should begin one now
                are given, the fastest first: a slot that is so slow that the others will have played all of them before
                it ends its one stays vacant.
        """
        with self._lock:
            self._check_open()
            vacant = self._vacant()
            if episodes is None:
                return vacant
            return self._placement.chosen(self._places, vacant, episodes, time.perf_counter())

    def pace(self, slot: int) -> float | None:
        """Seconds from a step's sending to its result's arrival, lately; None before the first."""
        return self._place(slot).step_s.mean

    def is_worth(self, slot: int, other: int) -> bool:
        """Whether an episode that waits in `other`, already reset, is better than waiting for the reset of `slot`."""
        with self._lock:
            return self._placement.is_worth(self._place(slot), self._place(other), time.perf_counter())

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
            for slot in slots:
                place = self._place(slot)
                if place.sent is not None or place.episode:
                    raise BadSlot("slot %d is not vacant: its episode runs, or a command is under way" % slot)
            _check_once(slots)
            bodies = [codec.encode({"seed": seed, "options": options}) for seed in seeds]
            couriers = self._dispatch(slots, protocol.RESET, bodies)
        for courier in couriers:
            courier.begin()

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
        return self.recv(self._sent + len(self._rows), timeout)

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
                found = [slot for slot in self._vacant() if slot in slots]
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                self._arrived.wait(min(left, 0.5))  # after a failed reset a slot is vacant by time alone

    def _send(self, actions: Any, slots: Sequence[int], repeat: int, begin: bool) -> None:
        self._check_open()
        slots = [int(slot) for slot in slots]
        if len(actions) != len(slots):
            raise BadAction("%d actions for %d slots" % (len(actions), len(slots)))
        bodies = self._values.actions(actions, slots, repeat)
        with self._lock:
            self._check_open()
            lost = {row.slot for row in self._rows if row.lost}  # since the caller's last recv
            for slot in slots:
                place = self._place(slot)
                if slot not in lost and (place.sent is not None or not place.episode):
                    what = "is busy" if place.sent is not None else "has no episode: reset it first"
                    raise BadSlot("slot %d %s" % (slot, what))
            _check_once(slots)
            there = [(slot, body) for slot, body in zip(slots, bodies, strict=True) if slot not in lost]
            couriers = self._dispatch([slot for slot, _ in there], protocol.STEP, [body for _, body in there])
        if begin:
            for courier in couriers:
                courier.begin()

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
        return self._batch(self.collect(min_ready, timeout))

    def collect(self, min_ready: int = 1, timeout: float | None = 60.0) -> list[Row]:
        """As `recv`, but rows with everything just as the environment gave it."""
        check_whole("min_ready", min_ready, 0)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._check_open()
            if not (self._rows or self._sent) and (self._vacant() or any(place.episode for place in self._places)):
                raise NothingSent("recv with no command under way: reset or send first")
        is_first = True
        while True:
            with self._lock:
                if self._enough(min_ready):
                    return self._given()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0 and not is_first:  # what is there comes in any case
                    if self._rows:
                        return self._given()
                    raise FarmTimeout(
                        "no result within %s s; under way: %d\n%s" % (timeout, self.busy, self._troubles())
                    )
                couriers = self._couriers_at_work(min_ready)
            is_first = False
            wait = 60.0 if left is None else max(0.0, left)
            if fetch(couriers, wait):
                continue
            with self._lock:
                if not self._enough(min_ready):
                    # Slots that wait after a failed reset become vacant by time alone, without a notification.
                    self._arrived.wait(left if self._sent else min(left or 0.5, 0.5))

    def abandon(self, slots: Sequence[int] | None = None) -> None:
        """Forgets running episodes, all or those of some slots; each is vacant once what is under way in it is back."""
        with self._lock:
            places = self._places if slots is None else [self._place(int(slot)) for slot in slots]
            gone = {place.slot for place in places}
            self._rows = deque(row for row in self._rows if row.slot not in gone)
            for place in places:
                if place.episode and slots is not None:  # the caller's own end of one
                    self._placement.ended(place)
                place.episode = False
                place.abandoned = place.sent is not None
                self._keeper.shed(place.farm)

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
            farms = [_status_of(farm) for farm in self._farms]
            return {
                "env": self.env,
                "slots": self.nb_slots,
                "busy": self.busy,
                "farmlist": self._keeper.farmlist_trouble,
                "ledger": total(place.ledger() for place in self._places),
                "farms": farms,
            }

    def refarm(self) -> dict[str, Any]:
        """Reads the farmlist again, at once: new farms join, removed ones finish their episodes and leave.

        A file's edits are followed without this, within a few seconds.

        Raises:
            FarmlistError: it is broken; everything stays as it was.
        """
        self._check_open()
        self._keeper.refarm()
        return self.status()

    def close(self) -> None:
        """Frees every slot and ends every thread, within a few seconds. A second time it does nothing."""
        with self._lock:
            self._closed = True
        self._keeper.close()

    def __enter__(self) -> Farmer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<Farmer %s: %d slots on %d farms>" % (self.env, self.nb_slots, len(self._farms))

    # Commands and replies; the lock is held.

    def _vacant(self) -> list[int]:
        now = time.monotonic()
        # Busy ones are told first and at the least cost: a trainer asks this after each batch, over all slots.
        idle = [p for p in self._places if p.sent is None and not p.episode]
        return [p.slot for p in idle if p.here and now >= p.not_before]

    def _given(self) -> list[Row]:
        rows = list(self._rows)
        self._rows.clear()
        return rows

    def _couriers_at_work(self, min_ready: int) -> list[Courier]:
        """Those with commands under way; they are told what the caller waits for."""
        couriers = [farm.courier for farm in self._farms if farm.sent and farm.courier is not None]
        for courier in couriers:
            courier.want(min_ready >= len(self._rows) + self._sent)
        return couriers

    def _enough(self, min_ready: int) -> bool:
        self._check_open()  # another thread may close while this one waits
        if self._rows:
            return len(self._rows) >= min(min_ready, len(self._rows) + self._sent)
        if self._sent and any(place.sent is not None and not place.abandoned for place in self._places):
            return False
        return bool(self._vacant())  # nothing to wait for; the caller has slots to start

    def _check_open(self) -> None:
        if self._closed:
            raise FarmerClosed("this farmer of %s is closed: make a new one" % self.env)

    def _place(self, slot: int) -> Place:
        if not 0 <= slot < len(self._places):
            raise BadSlot("slot %r: this pool has slots 0 to %d" % (slot, len(self._places) - 1))
        return self._places[slot]

    def _dispatch(self, slots: list[int], kind: int, bodies: list[bytes]) -> list[Courier]:
        """Queues commands, each with its farm's courier; the couriers that have some now."""
        by_farm: dict[Farm, list[Any]] = {}
        now = time.perf_counter()
        for slot, body in zip(slots, bodies, strict=True):
            place = self._places[slot]
            place.seq += 1
            place.sent, place.sent_at, place.abandoned = kind, now, False
            place.farm.sent += 1
            self._sent += 1
            if kind == protocol.STEP:
                place.counts["sent"] += 1
            if not place.here:
                why = place.farm.trouble or "slot %d has left with its farm, or is wanted no more" % slot
                self._finish(place, protocol.LOST, None, why, "lost with its farm")
                continue
            by_farm.setdefault(place.farm, []).append([place.far, place.seq, kind, body])
        couriers = []
        for farm, commands in by_farm.items():
            assert farm.courier is not None
            farm.courier.put(commands)
            couriers.append(farm.courier)
        return couriers

    def _on_replies(self, farm: Farm, courier: Courier, replies: list[Reply]) -> None:
        now = time.perf_counter()
        with self._lock:
            if farm.courier is not courier:
                return
            for far, seq, kind, _, body, crc in replies:
                place = farm.by_far.get(far)
                if place is None or place.seq != seq or place.sent is None:
                    farm.dropped += 1  # an answer to nothing that is asked now
                    continue
                value, why, bucket = self._read(place.sent, kind, body, crc)
                self._finish(place, kind, value, why, bucket, now - place.sent_at)
            if self._ended:
                self._follow()
            self._arrived.notify_all()

    def _follow(self) -> None:
        """Begins the next episodes of those that have just ended, but where the slot was let go of."""
        rows, self._ended = [row for row in self._ended if self._places[row.slot].here], []
        for row in rows:
            row.followed = True
        self._dispatch([row.slot for row in rows], protocol.RESET, [NEXT] * len(rows))

    def _read(self, sent: int, kind: int, body: bytes, crc: int | None = None) -> tuple[Any, str | None, str]:
        """What a reply says: its value, why there is none, and the ledger's bucket."""
        if kind == protocol.TRANSITION and sent == protocol.STEP:
            known = self._values.transition(body, crc)
            if known is not None:
                return known, None, "done"
        try:
            value = codec.decode(body, crc)
            if kind == protocol.LOST:
                bucket = value.get("bucket", "crashed")
                return None, str(value["text"]), bucket if bucket in LOST_BUCKETS else "invalid"
            if kind == protocol.FAULT:
                return None, _words(value), "invalid"
            self._check_sound(sent, kind, value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # a damaged body is a ValueError
            return None, "an invalid result: %s" % error, "invalid"
        if kind == protocol.TRANSITION:
            self._values.remember(body, value)
        return value, None, "done"

    def _check_sound(self, sent: int, kind: int, value: Any) -> None:
        """Nothing that a replay could not bear gets further than this, whatever a worker says.

        Raises:
            ValueError, TypeError: what is wrong with it.
        """
        if kind != (protocol.OBSERVATION if sent == protocol.RESET else protocol.TRANSITION):
            raise ValueError("%s in answer to %s" % (protocol.NAMES.get(kind, kind), protocol.NAMES[sent]))
        if kind == protocol.OBSERVATION:
            obs, info, env_s = value
        else:
            obs, reward, _, _, info, env_s = value
            if not math.isfinite(reward):
                raise ValueError("the reward is %r" % reward)
        if not isinstance(info, dict) or not math.isfinite(env_s):
            raise ValueError("info %r and seconds %r" % (info, env_s))
        why = why_unsound(self.observation_space, obs)
        if why is not None:
            raise ValueError("the observation " + why)

    def _on_left(self, place: Place, why: str) -> None:
        """The place's farm is gone. The lock is held."""
        if self._closed:
            place.episode, place.abandoned = False, place.sent is not None
        if place.sent is not None:
            self._finish(place, protocol.LOST, None, why, "lost with its farm")
        elif place.episode:
            place.episode = False
            self._rows.append(self._lost_row(place, why))

    def _finish(self, place: Place, kind: int, value: Any, why: str | None, bucket: str, trip_s: float = 0.0) -> None:
        sent, place.sent = place.sent, None
        place.farm.sent -= 1
        self._sent -= 1
        if sent == protocol.STEP:
            place.counts["abandoned" if place.abandoned else bucket] += 1
        if place.abandoned:
            place.abandoned = place.episode = False
        elif why is not None:
            place.episode = False
            if sent == protocol.RESET:
                # The first one may be a worker's death of any cause, and a spare stands: only a second one waits.
                place.failed_resets += 1
                if place.failed_resets > 1:
                    place.not_before = time.monotonic() + RESET_RETRY
            self._rows.append(self._lost_row(place, why))
        elif kind == protocol.OBSERVATION:
            obs, info, env_s = value
            place.episode, place.last_obs, place.failed_resets, place.steps = True, obs, 0, 0
            place.reset_s.add(trip_s)
            self._rows.append(Row(place.slot, obs, first=True, info=info, env_s=float(env_s), trip_s=trip_s))
        else:
            obs, reward, terminated, truncated, info, env_s = value
            place.episode, place.last_obs = not (terminated or truncated), obs
            row = Row(place.slot, obs, float(reward), terminated, truncated, False, False, info, float(env_s), trip_s)
            self._rows.append(row)
            place.steps += 1
            place.step_s.add(trip_s)
            if not place.episode:
                self._placement.ended(place)
                if self.follow:
                    self._ended.append(row)
        if not place.episode:
            self._keeper.shed(place.farm)

    def _lost_row(self, place: Place, why: str) -> Row:
        return Row(place.slot, place.last_obs, truncated=True, lost=True, info={"lost": why})

    def _troubles(self) -> str:
        return "\n".join("  %s: %s" % (f.address, f.trouble or "connected") for f in self._farms)

    def _batch(self, rows: list[Row]) -> Batch:
        return Batch(
            slot=np.array([row.slot for row in rows], np.int32),
            obs=self._values.stacked([row.obs for row in rows]),
            reward=np.array([row.reward for row in rows], np.float32),
            terminated=np.array([row.terminated for row in rows], bool),
            truncated=np.array([row.truncated for row in rows], bool),
            lost=np.array([row.lost for row in rows], bool),
            first=np.array([row.first for row in rows], bool),
            info=[row.info for row in rows],
            env_s=np.array([row.env_s for row in rows], np.float32),
            trip_s=np.array([row.trip_s for row in rows], np.float32),
        )


def _status_of(farm: Farm) -> dict[str, Any]:
    places = [
        {
            "slot": place.slot,
            "far": place.far if place.here else None,
            "busy": place.sent is not None,
            "step_s": place.step_s.mean,
            "ledger": place.ledger(),
        }
        for place in farm.places
    ]
    return {
        "farm": str(farm.address),
        "connected": farm.courier is not None,
        "leaving": farm.leaving,
        "slots": len(farm.by_far),
        "wanted": farm.wanted,
        "busy": sum(place.sent is not None for place in farm.by_far.values()),
        "trouble": farm.trouble,
        "step_s": farm.pace,
        "ledger": farm.ledger(),
        "dropped": farm.dropped,
        "places": places,
    }


def _check_once(slots: list[int]) -> None:
    if len(set(slots)) < len(slots):
        raise BadSlot("a slot is named twice in %s" % slots)


def _words(value: dict[str, Any]) -> str:
    text = "%s: %s" % (value["type"], value["text"]) if "type" in value else value["text"]
    return text + ("\n" + value["traceback"] if value.get("traceback") else "")
