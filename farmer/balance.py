"""Which farm next? Pure functions: no network, no process."""

from __future__ import annotations

from collections.abc import Sequence


def share(capacities: Sequence[int], wanted: int) -> list[int]:
    """Deals `wanted` slots to farms in proportion to what each has.

    Each slot goes to the farm that is least loaded at that moment (slots in use over capacity); of equally loaded
    ones to the larger, then to the first.

    Args:
        capacities: slots that each farm has to give.
        wanted: how many to take; no more than the sum are taken.

    Returns:
        How many to take from each.
    """
    taken = [0] * len(capacities)
    for _ in range(min(wanted, sum(capacities))):
        farm = least_loaded(taken, capacities)
        assert farm is not None
        taken[farm] += 1
    return taken


def least_loaded(used: Sequence[int], capacities: Sequence[int]) -> int | None:
    """The farm whose next slot should be taken, None when all are full."""
    open_farms = [farm for farm, capacity in enumerate(capacities) if used[farm] < capacity]
    if not open_farms:
        return None
    return min(open_farms, key=lambda farm: (used[farm] / capacities[farm], -capacities[farm], farm))
