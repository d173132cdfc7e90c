"""Where the next episodes begin: what a pool has seen of its slots, put into numbers for `balance`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from farmer import balance
from farmer.remote_slot import RemoteSlot
from wire import protocol


class Placement:
    """How long episodes take in each slot of one pool. Its lock is held in every call."""

    def __init__(self) -> None:
        self._steps = balance.RecentMean()  # of an episode

    def ended(self, slot: RemoteSlot) -> None:
        """The episode of a slot is over, by itself or by the caller's own limit."""
        if slot.steps:
            self._steps.add(slot.steps)

    def chosen(self, slots: Sequence[RemoteSlot], vacant: Sequence[int], episodes: int, now: float) -> list[int]:
        """Those of the vacant slots that should begin now, the fastest first; see `balance.to_begin`.

        Args:
            slots: all of the pool.
            vacant: numbers of some of them.
            episodes: how many are still to be begun.
            now: by the clock of `RemoteSlot.sent_at`.
        """
        if not vacant or episodes <= 0:
            return []
        steps = self._steps.mean
        costs = self._costs(slots, 1.0 if steps is None else steps)
        free = [costs[slot] for slot in vacant]
        busy: list[tuple[float, float]] = []
        if steps is not None:  # else nobody knows when they will be vacant
            busy = [
                (_left(p, costs[p.index], steps, now), costs[p.index])
                for p in slots
                if p.attached and p.sent is not None
            ]
        return [vacant[number] for number in balance.to_begin(free, busy, episodes)]

    def is_worth(self, own: RemoteSlot, other: RemoteSlot, now: float) -> bool:
        """Whether to go on with an episode that waits in another slot, and not wait for the own slot's reset.

        Not where the other one is so much slower that its steps will take longer than the reset does.
        """
        mine, its = own.step_s.mean, other.step_s.mean
        if not own.attached or mine is None or its is None or its <= balance.ALIKE * mine:
            return True
        saved = own.reset_s.mean or 0.0
        if own.sent == protocol.RESET:
            saved = max(saved, now - own.sent_at)  # one that takes long is expected to take as long again
        return (its - mine) * (self._steps.mean or 1.0) <= saved

    def _costs(self, slots: Sequence[RemoteSlot], steps: float) -> list[float]:
        """Seconds of an episode of so many steps, by slot; a new slot is taken for one as the others of its farm."""
        paces = {farm: farm.step_s for farm in {slot.farm for slot in slots}}
        least = min((pace for pace in paces.values() if pace is not None), default=1.0)
        resets = {farm: _mean(farm.slots) for farm in paces}
        costs = []
        for slot in slots:
            step = slot.step_s.mean or paces[slot.farm] or least
            costs.append(steps * step + (slot.reset_s.mean or resets[slot.farm]))
        return costs


def _mean(slots: Iterable[RemoteSlot]) -> float:
    seen = [mean for slot in slots if (mean := slot.reset_s.mean) is not None]
    return sum(seen) / len(seen) if seen else 0.0


def _left(slot: RemoteSlot, cost: float, steps: float, now: float) -> float:
    """Seconds until a busy slot is vacant.

    An episode that is longer than usual is expected to go on for as long as it is over that, and a command that takes
    longer than usual for as long as it has been under way: so nobody waits for long for a slot that hangs.
    """
    waited = now - slot.sent_at
    if slot.abandoned:
        return waited
    if slot.sent == protocol.RESET:
        return max(cost, waited)
    return cost * abs(steps - slot.steps) / steps + max(0.0, waited - cost / steps)
