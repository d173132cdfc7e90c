"""Where the next episodes begin: what a pool has seen of its slots, put into numbers for `balance`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from farmer import balance
from farmer.places import Place
from wire import protocol


class Placement:
    """How long episodes take in each slot of one pool. Its lock is held in every call."""

    def __init__(self) -> None:
        self._steps = balance.Pace()  # of an episode

    def ended(self, place: Place) -> None:
        """The episode of a place is over, by itself or by the caller's own limit."""
        if place.steps:
            self._steps.add(place.steps)

    def chosen(self, places: Sequence[Place], vacant: Sequence[int], episodes: int, now: float) -> list[int]:
        """Those of the vacant slots that should begin now, the fastest first; see `balance.to_begin`.

        Args:
            places: all of the pool.
            vacant: numbers of some of them.
            episodes: how many are still to be begun.
            now: by the clock of `Place.sent_at`.
        """
        if not vacant or episodes <= 0:
            return []
        steps = self._steps.mean
        costs = self._costs(places, 1.0 if steps is None else steps)
        free = [costs[slot] for slot in vacant]
        busy: list[tuple[float, float]] = []
        if steps is not None:  # else nobody knows when they will be vacant
            busy = [
                (_left(p, costs[p.slot], steps, now), costs[p.slot]) for p in places if p.here and p.sent is not None
            ]
        return [vacant[number] for number in balance.to_begin(free, busy, episodes)]

    def is_worth(self, own: Place, other: Place, now: float) -> bool:
        """Whether to go on with an episode that waits in another place, and not wait for the own place's reset.

        Not where the other one is so much slower that its steps will take longer than the reset does.
        """
        mine, its = own.step_s.mean, other.step_s.mean
        if not own.here or mine is None or its is None or its <= balance.ALIKE * mine:
            return True
        saved = own.reset_s.mean or 0.0
        if own.sent == protocol.RESET:
            saved = max(saved, now - own.sent_at)  # one that takes long is expected to take as long again
        return (its - mine) * (self._steps.mean or 1.0) <= saved

    def _costs(self, places: Sequence[Place], steps: float) -> list[float]:
        """Seconds of an episode of so many steps, by slot; a new slot is taken for one as the others of its farm."""
        paces = {farm: farm.pace for farm in {place.farm for place in places}}
        least = min((pace for pace in paces.values() if pace is not None), default=1.0)
        resets = {farm: _mean(farm.places) for farm in paces}
        costs = []
        for place in places:
            step = place.step_s.mean or paces[place.farm] or least
            costs.append(steps * step + (place.reset_s.mean or resets[place.farm]))
        return costs


def _mean(places: Iterable[Place]) -> float:
    seen = [mean for place in places if (mean := place.reset_s.mean) is not None]
    return sum(seen) / len(seen) if seen else 0.0


def _left(place: Place, cost: float, steps: float, now: float) -> float:
    """Seconds until a busy slot is vacant.

    An episode that is longer than usual is expected to go on for as long as it is over that, and a command that takes
    longer than usual for as long as it has been under way: so nobody waits for long for a slot that hangs.
    """
    waited = now - place.sent_at
    if place.abandoned:
        return waited
    if place.sent == protocol.RESET:
        return max(cost, waited)
    return cost * abs(steps - place.steps) / steps + max(0.0, waited - cost / steps)
