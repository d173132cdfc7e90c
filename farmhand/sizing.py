"""How many slots a machine should have: measurements in, a decision out. No process and no clock here.

    machine = Machine(cores=8, free=32 << 30, most=64)
    while (slots := next_slots(machine, need, rows)) is not None:
        rows.append(...)                          # measured by `autotune`
    decide(machine, need, rows, stop).slots

A number of slots is worth it while each further slot brings at least WORTH of what the first one brings alone. So one
measurement that is a tenth too high decides nothing, and a hyper-thread that brings a third of a core is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from farmhand.limits import SHARE, in_words

WORTH = 0.2  #: of the first slot's rate, which each further one must bring
SATURATED = 0.85  #: of the cores; from there on they are what is short
HANDS_FULL = 0.8  #: of one core, for handing out the steps
OTHERS = 0.1  #: of the cores, busy with other programs: from there on more workers get more of them by taking them away
GROWS, GROWS_PART = 1 << 20, 0.01  #: bytes, and the part of its memory, that a worker must grow by before it counts


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        cores: that may be used; not whole where a container says so.
        free: bytes that were free before anything was started.
        most: slots, more are not looked at.
    """

    cores: float
    free: int
    most: int

    @property
    def room(self) -> int:
        """Bytes that workers may take; the rest stays for a trainer, for the daemon, and for what grows."""
        return int(SHARE * self.free)


@dataclass(frozen=True)
class Need:
    """What one worker needs: the cores it keeps busy while it steps, and bytes."""

    cores: float
    memory: int

    def slots_for_cores(self, machine: Machine) -> int:
        """So many keep all cores busy."""
        return math.ceil(round(machine.cores / max(self.cores, 1e-3), 3))

    def slots_for_memory(self, machine: Machine) -> int:
        """So many fit."""
        return machine.room // max(self.memory, 1)


@dataclass(frozen=True)
class Row:
    """A number of slots that was measured.

    Attributes:
        slots: workers that stepped at the same time.
        rate: environment steps a second of all together.
        busy: cores that they kept busy, with what `own` says.
        own: cores that handing out the steps took.
        memory: bytes that they held together.
        others: cores that other programs kept busy meanwhile.
    """

    slots: int
    rate: float
    busy: float
    own: float
    memory: int
    others: float = 0.0


@dataclass(frozen=True)
class Stop:
    """Why no more slots were measured: "memory", "time" or "trouble", and in words."""

    reason: str
    text: str


@dataclass(frozen=True)
class Decision:
    """The number, what limits it ("cores", "hands", "gain", "memory", "time", "trouble" or "most"), that in words, and
    a verdict for each row."""

    slots: int
    reason: str
    why: str
    verdicts: list[str]


def next_slots(machine: Machine, need: Need, rows: list[Row]) -> int | None:
    """The next number to measure; None when the answer is known, or there is nothing more to look at.

    Doubled each time, and the numbers at which cores or memory should be used up. Twice the first of these is the
    most: those rows show that it is true.
    """
    last = rows[-1].slots
    best = _best(machine, need, rows)[0]
    if last >= 1.5 * best.slots:
        return None
    enough = need.slots_for_cores(machine)
    numbers = {2**k for k in range(24)} | {round(machine.cores), machine.most, need.slots_for_memory(machine)}
    if not any(abs(number - enough) <= 0.15 * number for number in numbers):
        numbers.add(enough)
    return min((n for n in numbers if last < n <= min(machine.most, 2 * enough)), default=None)


def fits(machine: Machine, need: Need, slots: int) -> bool:
    """Whether so many workers may be started."""
    return slots <= need.slots_for_memory(machine)


def _best(machine: Machine, need: Need, rows: list[Row]) -> tuple[Row, list[str]]:
    """The last row that was worth it, and a verdict for each."""
    best, verdicts = rows[0], ["one alone"]
    for row in rows[1:]:
        each = (row.rate - best.rate) / (row.slots - best.slots) / rows[0].rate
        if row.memory > machine.room:
            verdicts.append(f"too much memory: {in_words(machine.room)} may be used")
            continue
        if row.slots > need.slots_for_cores(machine) and row.others >= OTHERS * machine.cores:
            verdicts.append("not counted: beyond the cores, it takes from other programs")
            continue
        brings = f"each more brings {max(0.0, 100 * each):.0f} % of one"
        verdicts.append(("worth it: " if each >= WORTH else "not worth it: ") + brings)
        if each >= WORTH:
            best = row
    return best, verdicts


def decide(machine: Machine, need: Need, rows: list[Row], stop: Stop | None) -> Decision:
    """The number of slots, from what was measured.

    Args:
        machine: what there is.
        need: of one worker.
        rows: by growing numbers of slots, from 1 on.
        stop: why there are no more rows; None where there is nothing more to look at.
    """
    best, verdicts = _best(machine, need, rows)
    reason, why = _reason(machine, need, rows, best, stop)
    return Decision(best.slots, reason, why, verdicts)


def _reason(machine: Machine, need: Need, rows: list[Row], best: Row, stop: Stop | None) -> tuple[str, str]:
    tried = rows[-1]
    if tried.memory > machine.room:
        return "memory", memory_words(machine, need)
    if tried is not best:
        more = f"{tried.slots} slots bring little more"
        if tried.busy + tried.others >= SATURATED * machine.cores:
            others = (
                f", and {tried.others:.2f} more with other programs" if tried.others >= OTHERS * machine.cores else ""
            )
            return "cores", f"{more}: {tried.busy:.2f} of {machine.cores:g} cores are busy{others}"
        if tried.own >= HANDS_FULL:
            return "hands", (
                f"{more}: handing out steps as short as these takes a core by itself, here as in a farm\n"
                "  (train.py --action-repetition makes a command of several)"
            )
        return "gain", (
            f"{more}, with {tried.busy:.2f} of {machine.cores:g} cores busy: they wait for something else "
            "that they share (memory, disk, a licence, "
            "another program)"
        )
    if stop is not None:
        return stop.reason, stop.text
    if best.slots >= machine.most:
        return "most", f"more were not looked at (--max-slots {machine.most}), and may be worth it"
    return "cores", f"each keeps {need.cores:.2f} of {machine.cores:g} cores busy"


def memory_words(machine: Machine, need: Need) -> str:
    """Why no more fit."""
    return (
        f"memory: a worker takes {in_words(need.memory)}, and of {in_words(machine.free)} free "
        f"{in_words(machine.room)} may be used"
    )


def growth(samples: list[tuple[int, int]]) -> float:
    """Bytes a step that a worker grows by for good; 0 when it does not, as far as can be seen.

    Args:
        samples: (steps so far, bytes), from its first step on. Only the second half counts: what a simulator fills in
            its first steps it keeps.
    """
    half = samples[len(samples) // 2 :]
    steps, memory = np.array(half or [(0, 0)], "float64").T
    if len(half) < 3 or steps[-1] == steps[0]:
        return 0.0
    slope = float(np.polyfit(steps - steps[0], memory, 1)[0])
    grown = slope * (steps[-1] - steps[0])
    return slope if grown >= max(GROWS, GROWS_PART * memory[0]) else 0.0


def memory_need(fresh: int, most: int, growth: float, episode: float) -> int:
    """Bytes to count for one worker.

    Args:
        fresh: after its first steps.
        most: the most it ever had.
        growth: bytes a step.
        episode: steps of one. A worker that grows is replaced once it has doubled, at the end of an episode.
    """
    return int(2 * fresh + growth * episode) if growth else most
