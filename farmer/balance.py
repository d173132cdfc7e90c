"""Which farm gives how many slots, and which slots begin the next episodes? No network, no process, no clock.

share([8, 8], 4, paces=[0.02, 0.06])        # [4, 0]: of the farm whose steps take a third of the time
to_begin([10.0, 30.0], [(5.0, 10.0)], 2)    # [0]: what begins in the second ends after all others
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np

#: Times the fastest one's time, up to which another counts as equally fast: less is what chance and other programs do.
ALIKE = 1.25
LATELY = 32  #: durations that a pace remembers, roughly
SHORTEST = 1e-6  #: s


class RecentMean:
    """How long something takes lately: the geometric mean, which one straggler hardly moves.

    A policy can make one step of a simulator a thousand times longer than the next, on any machine; that moves the
    figure by a fifth, and a slower machine moves it by all that it is slower.
    """

    __slots__ = ("_log", "_seen")

    def __init__(self) -> None:
        self._log = 0.0
        self._seen = 0

    def add(self, amount: float) -> None:
        """Counts one."""
        if self._seen < LATELY:
            self._seen += 1
        self._log += (math.log(amount if amount > SHORTEST else SHORTEST) - self._log) / self._seen

    @property
    def mean(self) -> float | None:
        """None as long as nothing was seen."""
        return math.exp(self._log) if self._seen else None


def share(capacities: Sequence[int], wanted: int, paces: Sequence[float | None] | None = None) -> list[int]:
    """Deals `wanted` slots to farms: to the fastest ones first, and among equally fast ones by what each has.

    Each slot goes to the farm that is least loaded at that moment (slots in use over capacity); of equally loaded
    ones to the larger, then to the first.

    Args:
        capacities: slots that each farm has to give.
        wanted: how many to take; no more than the sum are taken.
        paces: seconds a step of each, where it is known; an unknown farm counts as equally fast.

    Returns:
        How many to take from each.
    """
    taken = [0] * len(capacities)
    for _ in range(min(wanted, sum(capacities))):
        farm = least_loaded(taken, capacities, paces)
        assert farm is not None
        taken[farm] += 1
    return taken


def least_loaded(
    used: Sequence[int], capacities: Sequence[int], paces: Sequence[float | None] | None = None
) -> int | None:
    """The farm whose next slot should be taken, None when all are full."""
    open_farms = [farm for farm, capacity in enumerate(capacities) if used[farm] < capacity]
    if not open_farms:
        return None
    if paces is not None:
        known = [pace for farm in open_farms if (pace := paces[farm]) is not None]
        enough = ALIKE * min(known, default=0.0)
        open_farms = [farm for farm in open_farms if (pace := paces[farm]) is None or pace <= enough]
    return min(open_farms, key=lambda farm: (used[farm] / capacities[farm], -capacities[farm], farm))


def to_begin(vacant: Sequence[float], busy: Sequence[tuple[float, float]], episodes: int) -> list[int]:
    """Which vacant slots should begin an episode now, when so many more are wanted in all.

    With more episodes than the others can play meanwhile that is every slot, however slow. A slot is left vacant when
    the others will have ended all of them before it could end its one: it would only be waited for.

    Args:
        vacant: seconds that an episode takes, of each vacant slot.
        busy: of each other slot, the seconds until it is vacant, and those that an episode takes.
        episodes: to be begun.

    Returns:
        Numbers of vacant slots, the fastest first.
    """
    order = sorted(range(len(vacant)), key=lambda number: (vacant[number], number))
    each = np.maximum([vacant[number] for number in order], SHORTEST)
    left, others = np.reshape(np.asarray(busy, float), (-1, 2)).T

    def without(rank: int) -> int:
        """Episodes that the others end before the slot of this rank ends its first, and clearly so."""
        until = each[rank] / ALIKE
        faster = np.maximum(1, until // each[:rank]).sum()  # those before it begin one in any case
        return int(faster + (np.maximum(0.0, until - left) // np.maximum(others, SHORTEST)).sum())

    return order[: bisect.bisect_left(range(len(order)), episodes, key=without)]
