"""The rules for time limits and for replacing workers: numbers in, decisions out.

No process, no pipe and no clock here: `deadlines`, `recycling`, `spares` and `memory_cap` measure and act.

    limit = TimeLimit(given=None, enough=100)     # learnt from what this environment's steps take
    limit.saw(0.02)
    limit.seconds                                 # for one step; a command that repeats it k times has k times that
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# Learnt limits. They end what never returns, not what is slow: a step of OpenSim's arm takes 1 ms in the median, 2.2 s
# at its p99 and more at times, depending on the policy: a learner makes it a thousand times slower from one step to the
# next.
FACTOR = 10.0  #: times the running p99
FLOOR = 60.0  #: s; no learnt limit is shorter
UNKNOWN = 600.0  #: s, as long as too few were seen
ENOUGH_STEPS, ENOUGH_RESETS = 100, 20

#: s before the next try, after so many failures in a row.
BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
#: Workers in a row that may end before they did anything useful, before that counts as a failure to start.
BARREN_ENDS = 2
BARREN_STEPS = 10  #: steps after which a worker was useful, however it ends
BARREN_LIFE = 60.0  #: s after which it was, whatever it did

# A worker's pace: whole episodes are compared, since the steps of one may differ from its beginning to its end.
BLOCK_STEPS, BLOCK_EPISODES = 200, 3  #: of this many steps and episodes at least, the median is taken
SLOWER = 2.0  #: times as slow as when fresh
SLOW_BLOCKS = 2  #: in a row
NOTICEABLE = 0.001  #: s a step; what is lost below that is the machine's noise

SHARE = 0.8  #: of the machine's memory, divided by the slots, is where recycling begins by itself


@dataclass(frozen=True)
class Limits:
    """The limits that the farm's owner gave; None: not given.

    Attributes:
        start, reset, step: seconds for a construction, a reset, one step. The last two are learnt when not given.
        memory: bytes of a worker and all that it started; over it, it is ended at once.
        recycle_memory: bytes over which it is replaced at its episode's end.
        memory_share: the same, not given but from the machine's memory: only for a worker that also grew to twice
            what it had after its first episode, since replacing one that simply needs that much would not help.
        recycle_resets, recycle_steps: how many a worker does before it is replaced at its episode's end.
        spares: workers in stock for each environment; None: decided by what they take and what is free.
    """

    start: float = 120.0
    reset: float | None = None
    step: float | None = None
    memory: int | None = None
    recycle_memory: int | None = None
    memory_share: int | None = None
    recycle_resets: int | None = None
    recycle_steps: int | None = None
    spares: int | None = 0

    @property
    def shortest(self) -> float:
        """The shortest time limit that can be in force; no learnt one is shorter than FLOOR."""
        return min(self.start, self.reset or FLOOR, self.step or FLOOR)


def memory_share(total: int, slots: int) -> int:
    """Bytes that a worker may have before it counts as one that leaks, when the farm's owner gave no limit."""
    return int(SHARE * total / slots)


def parse_size(text: str) -> int:
    """`2G`, `1.5G`, `500M`, `800000K` or a number of bytes, as bytes.

    Raises:
        ValueError: it is none of these, or not more than 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size <= 0:
        raise ValueError(f"a size is wanted, as 2G, 500M or a number of bytes, not {text!r}")
    return size


def in_words(size: float) -> str:
    """Bytes in the unit that people would use."""
    for unit in ("bytes", "KB", "MB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"


class Times:
    """Durations, counted in boxes of which each is 9 % longer than the one before; old ones are forgotten slowly."""

    SMALLEST = 1e-6
    PER_DOUBLING = 8
    BOXES = 8 * 40  # up to 12 days
    MEMORY = 20000
    HEAP = 64  #: that are put into their boxes together, so that a step costs no more than an append

    def __init__(self) -> None:
        self.total = 0
        self._boxes = [0] * self.BOXES
        self._heap: list[float] = []

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.total += 1
        self._heap.append(seconds)
        if len(self._heap) >= self.HEAP:
            self._sort()

    def _sort(self) -> None:
        boxes = self._boxes
        for seconds in self._heap:
            box = int(math.log2(max(seconds, self.SMALLEST) / self.SMALLEST) * self.PER_DOUBLING)
            boxes[min(box, self.BOXES - 1)] += 1
        self._heap.clear()
        if self.total >= self.MEMORY:
            self._boxes = [count // 2 for count in boxes]
            self.total = sum(self._boxes)

    def quantile(self, share: float) -> float:
        """The duration that `share` of them do not exceed, at most 9 % too long; 0 when there are none."""
        self._sort()
        wanted, seen = share * self.total, 0
        for box, count in enumerate(self._boxes):
            seen += count
            if count and seen >= wanted:
                return float(self.SMALLEST * 2.0 ** ((box + 1) / self.PER_DOUBLING))
        return 0.0


class TimeLimit:
    """The seconds that one kind of command of one environment may take: given, or learnt from those before.

    Attributes:
        seconds: the limit in force.
        given: whether the farm's owner named it.
    """

    EVERY = 50  # durations; the quantile is looked for no more often

    def __init__(self, given: float | None, enough: int):
        self.given = given is not None
        self.seconds = UNKNOWN if given is None else given
        self._enough = enough
        self._longest = 0.0
        self._times = Times()
        self._seen = 0

    def saw(self, seconds: float) -> None:
        """Counts one duration. A command that was broken off counts with its limit, so that a limit too short grows."""
        self._times.add(seconds)
        if self.given:
            return
        self._seen += 1
        if self._seen > self._enough and self._seen % self.EVERY:
            return
        self._longest = max(self._longest, seconds)  # of the first ones: later the quantile counts
        if self._seen < self._enough:
            self.seconds = max(UNKNOWN, FACTOR * self._longest)
        else:
            self.seconds = max(FLOOR, FACTOR * self._times.quantile(0.99))

    def typical(self) -> float | None:
        """The median of what was seen, None before anything was."""
        return self._times.quantile(0.5) if self._times.total else None

    def origin(self) -> str:
        """Where the limit comes from, in words."""
        if self.given:
            return "given"
        if self._seen < self._enough:
            return "too few were seen to learn it"
        return f"learnt from {self._seen} of them"


class WorkerPace:
    """How fast one worker steps now, beside how fast it stepped when it was fresh."""

    def __init__(self) -> None:
        self._fresh = 0.0
        self._episodes = 0
        self._slow = 0
        self._block = Times()

    def step(self, seconds: float) -> None:
        """Counts one step."""
        self._block.add(seconds)

    def episode_over(self) -> bool:
        """Whether the worker has become twice as slow; to be called once between two episodes."""
        self._episodes += 1
        if self._episodes < BLOCK_EPISODES or self._block.total < BLOCK_STEPS:
            return False
        median = self._block.quantile(0.5)
        self._episodes, self._block = 0, Times()
        if not self._fresh:
            self._fresh = median
            return False
        slow = median >= SLOWER * self._fresh and median - self._fresh >= NOTICEABLE
        self._slow = self._slow + 1 if slow else 0
        return self._slow >= SLOW_BLOCKS


def why_recycle(limits: Limits, resets: int, steps: int, memory: int, memory_when_fresh: int, slow: bool) -> str | None:
    """Why a worker is to be replaced now that its episode is over; None when it goes on.

    Args:
        limits: what was said.
        resets, steps: made by this worker.
        memory, memory_when_fresh: bytes now, and after its first episode; 0 when nobody looked.
        slow: whether its pace says so.
    """
    if limits.recycle_memory is not None and memory > limits.recycle_memory:
        return "memory"
    if limits.memory_share is not None and memory > max(limits.memory_share, 2 * memory_when_fresh):
        return "memory"
    if limits.recycle_resets is not None and resets >= limits.recycle_resets:
        return "resets"
    if limits.recycle_steps is not None and steps >= limits.recycle_steps:
        return "steps"
    return "slow" if slow else None


def back_off(failures: int) -> float:
    """Seconds before the next try, after so many failures in a row."""
    return BACK_OFF[min(failures, len(BACK_OFF)) - 1] if failures > 0 else 0.0


def spares_that_fit(needs: dict[str, int], missing: int, available: int) -> int:
    """1 when a worker more of each environment takes at most a quarter of what will be free, else 0.

    Args:
        needs: bytes of a worker that stands, by environment; it grows when it works.
        missing: bytes that workers still to be started will take.
        available: bytes that are free now.
    """
    return int(sum(needs.values()) * 4 <= available - missing)
