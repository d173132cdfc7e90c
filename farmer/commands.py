"""Commands that go out and results that come back: one pool's episodes, and the ledger of their steps.

The one writer of what a slot is doing. Every method is called with the pool's lock held.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from farmer.batch import Row
from farmer.link import Command, Link, Reply
from farmer.placement import Placement
from farmer.remote_farm import RemoteFarm
from farmer.remote_slot import RemoteSlot
from farmer.replies import ReplyReader
from wire import codec, protocol
from wire.errors import BadSlot

#: The reset that follows an episode by itself; the environment chooses its seed.
NEXT = codec.encode({"seed": None, "options": None})
#: s before a slot whose reset failed twice running is vacant again, so that a broken one does not keep the host busy
RESET_RETRY = 1.0


class Commands:
    """What is under way in each slot of a pool, and the rows that wait to be received.

    Attributes:
        rows: results that nobody has taken yet.
        under_way: slots with a command under way.
        follow: whether an episode that ends is followed by a reset at once.
        reader: reads replies; set before the first command.
        placement: what it has been told of episodes.
    """

    reader: ReplyReader

    def __init__(
        self,
        slots: Sequence[RemoteSlot],
        placement: Placement,
        arrived: threading.Condition,
        on_idle: Callable[[RemoteFarm], None],
    ):
        """Sends nothing yet.

        Args:
            slots: all of the pool, in a list that membership writes.
            placement: is told of episodes that end.
            arrived: the pool's lock, notified when results come.
            on_idle: called for a farm of which a slot has ended its episode.
        """
        self._slots = slots
        self.placement = placement
        self._arrived, self._on_idle = arrived, on_idle
        self.rows: deque[Row] = deque()
        self.under_way = 0
        self.follow = False
        self._closed = False
        self._ended: list[Row] = []  # with `follow`: results that ended an episode, among those just taken

    def slot(self, index: int) -> RemoteSlot:
        """The slot of that number in the pool.

        Raises:
            BadSlot: there is none.
        """
        if not 0 <= index < len(self._slots):
            raise BadSlot(f"slot {index!r}: this pool has slots 0 to {len(self._slots) - 1}")
        return self._slots[index]

    def vacant(self) -> list[int]:
        """Slots that may be reset now."""
        now = time.monotonic()
        # Busy ones are told first and at the least cost: a trainer asks this after each batch, over all slots.
        idle = [slot for slot in self._slots if slot.sent is None and not slot.episode]
        return [slot.index for slot in idle if slot.attached and now >= slot.not_before]

    def check_vacant(self, indices: Sequence[int]) -> None:
        """Raises BadSlot where a slot cannot begin an episode, or is named twice."""
        for index in indices:
            if not self.slot(index).idle:
                raise BadSlot(f"slot {index} is not vacant: its episode runs, or a command is under way")
        _check_once(indices)

    def check_ready(self, indices: Sequence[int]) -> set[int]:
        """The slots that were lost since their rows were last taken; the others can take an action.

        Raises:
            BadSlot: one cannot, or is named twice.
        """
        lost = {row.slot for row in self.rows if row.lost}
        for index in indices:
            slot = self.slot(index)
            if index not in lost and (slot.sent is not None or not slot.episode):
                what = "is busy" if slot.sent is not None else "has no episode: reset it first"
                raise BadSlot(f"slot {index} {what}")
        _check_once(indices)
        return lost

    def is_enough(self, min_ready: int) -> bool:
        """Whether whoever waits for `min_ready` rows should wait no longer."""
        if self.rows:
            return len(self.rows) >= min(min_ready, len(self.rows) + self.under_way)
        if self.under_way and any(slot.sent is not None and not slot.abandoned for slot in self._slots):
            return False
        return bool(self.vacant())  # nothing to wait for; the caller has slots to start

    def is_nothing_asked(self) -> bool:
        """Whether no row will ever come, and there are slots to give commands to."""
        if self.rows or self.under_way:
            return False
        return bool(self.vacant()) or any(slot.episode for slot in self._slots)

    def take_rows(self) -> list[Row]:
        """All rows that are there."""
        rows = list(self.rows)
        self.rows.clear()
        return rows

    # Out.

    def dispatch(self, indices: Sequence[int], kind: int, bodies: Sequence[bytes]) -> list[Link]:
        """Puts a command for each slot, on its farm's link; the links that have some now."""
        by_farm: dict[RemoteFarm, list[Command]] = {}
        now = time.perf_counter()
        for index, body in zip(indices, bodies, strict=True):
            slot = self._slots[index]
            slot.seq += 1
            slot.sent, slot.sent_at, slot.abandoned = kind, now, False
            slot.farm.under_way += 1
            self.under_way += 1
            if kind == protocol.STEP:
                slot.counts["sent"] += 1
            if not slot.attached:
                why = slot.farm.trouble or f"slot {index} has left with its farm, or is wanted no more"
                self.finish(slot, protocol.LOST, None, why, "lost with its farm")
                continue
            by_farm.setdefault(slot.farm, []).append([slot.number, slot.seq, kind, body])
        links = []
        for farm, commands in by_farm.items():
            assert farm.link is not None
            farm.link.put(commands)
            links.append(farm.link)
        return links

    def abandon(self, indices: Sequence[int] | None) -> None:
        """Forgets running episodes, all or those of some slots."""
        slots = self._slots if indices is None else [self.slot(int(index)) for index in indices]
        gone = {slot.index for slot in slots}
        self.rows = deque(row for row in self.rows if row.slot not in gone)
        for slot in slots:
            if slot.episode and indices is not None:  # the caller's own end of one
                self.placement.ended(slot)
            slot.episode = False
            slot.abandoned = slot.sent is not None
            self._on_idle(slot.farm)

    def close(self) -> None:
        """From now on, what is under way when a farm leaves is abandoned."""
        self._closed = True

    # Back.

    def on_replies(self, farm: RemoteFarm, link: Link, replies: list[Reply]) -> None:
        """Takes what a link brought."""
        now = time.perf_counter()
        if farm.link is not link:
            return
        for number, seq, kind, _, body, crc in replies:
            slot = farm.by_number.get(number)
            if slot is None or slot.seq != seq or slot.sent is None:
                farm.dropped += 1  # an answer to nothing that is asked now
                continue
            value, why, bucket = self.reader.read(slot.sent, kind, body, crc)
            self.finish(slot, kind, value, why, bucket, now - slot.sent_at)
        if self._ended:
            self._follow()
        self._arrived.notify_all()

    def on_left(self, slot: RemoteSlot, why: str) -> None:
        """The slot's farm is gone."""
        if self._closed:
            slot.episode, slot.abandoned = False, slot.sent is not None
        if slot.sent is not None:
            self.finish(slot, protocol.LOST, None, why, "lost with its farm")
        elif slot.episode:
            slot.episode = False
            self.rows.append(_lost_row(slot, why))

    def finish(
        self, slot: RemoteSlot, kind: int, value: Any, why: str | None, bucket: str, trip_s: float = 0.0
    ) -> None:
        """The command under way in a slot has ended: its row, and its place in the ledger."""
        sent, slot.sent = slot.sent, None
        slot.farm.under_way -= 1
        self.under_way -= 1
        if sent == protocol.STEP:
            slot.counts["abandoned" if slot.abandoned else bucket] += 1
        if slot.abandoned:
            slot.abandoned = slot.episode = False
        elif why is not None:
            self._failed(slot, sent, why)
        elif kind == protocol.OBSERVATION:
            obs, info, env_s = value
            slot.episode, slot.last_obs, slot.failed_resets, slot.steps = True, obs, 0, 0
            slot.reset_s.add(trip_s)
            self.rows.append(Row(slot.index, obs, first=True, info=info, env_s=float(env_s), trip_s=trip_s))
        else:
            self._stepped(slot, value, trip_s)
        if not slot.episode:
            self._on_idle(slot.farm)

    def _failed(self, slot: RemoteSlot, sent: int | None, why: str) -> None:
        slot.episode = False
        if sent == protocol.RESET:
            # The first one may be a worker's death of any cause, and a spare stands: only a second one waits.
            slot.failed_resets += 1
            if slot.failed_resets > 1:
                slot.not_before = time.monotonic() + RESET_RETRY
        self.rows.append(_lost_row(slot, why))

    def _stepped(self, slot: RemoteSlot, value: Any, trip_s: float) -> None:
        obs, reward, terminated, truncated, info, env_s = value
        slot.episode, slot.last_obs = not (terminated or truncated), obs
        row = Row(slot.index, obs, float(reward), terminated, truncated, False, False, info, float(env_s), trip_s)
        self.rows.append(row)
        slot.steps += 1
        slot.step_s.add(trip_s)
        if not slot.episode:
            self.placement.ended(slot)
            if self.follow:
                self._ended.append(row)

    def _follow(self) -> None:
        """Begins the next episodes of those that have just ended, but where the slot was let go of."""
        rows, self._ended = [row for row in self._ended if self._slots[row.slot].attached], []
        for row in rows:
            row.followed = True
        self.dispatch([row.slot for row in rows], protocol.RESET, [NEXT] * len(rows))


def _lost_row(slot: RemoteSlot, why: str) -> Row:
    return Row(slot.index, slot.last_obs, truncated=True, lost=True, info={"lost": why})


def _check_once(indices: Sequence[int]) -> None:
    if len(set(indices)) < len(indices):
        raise BadSlot(f"a slot is named twice in {list(indices)}")
