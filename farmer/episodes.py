"""Episodes of a pool's slots that begin anew by themselves: what each vectorised face of the farms stands on.

episodes = Episodes(Farmer("Pendulum-v1", farmlist), 8, AutoresetMode.NEXT_STEP)
first = episodes.reset(range(8), [None] * 8, [None] * 8, timeout=600.0)
episodes.act(actions, range(8))
for result in episodes.results(8, timeout=600.0): ...
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

from farmer.batch import Row
from farmer.pool import Farmer
from wire.errors import BadSlot, EnvironmentFault, FarmTimeout, NothingSent

TRIES = 3  #: failures in a row after which a reset that the caller asked for is given up
NEWS = 30.0  #: s of waiting after which the log says what for
AGAIN = 0.2  #: s between looks at whether a slow reset is worth leaving for an episode that waits in a slower place

log = logging.getLogger("farmer")


@dataclass
class Result:
    """What an action led to, or the first observation of an episode.

    A lost episode is truncated at its last good observation, with reward 0 and the reason under "lost" in its info;
    no transition happened. `final_obs` and `final_info` are of the episode that ended, where the next one began
    within the same step.
    """

    slot: int
    obs: Any
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    final_obs: Any = None
    final_info: dict[str, Any] | None = None


@dataclass
class _Order:
    """A reset that is wanted, under way or done; over when its observation was given to the caller."""

    seed: int | None = None
    options: dict[str, Any] | None = None
    under_way: bool = False
    failures: int = 0
    why: str = ""

    @property
    def plain(self) -> bool:
        return self.seed is None and not self.options


@dataclass
class _Slot:
    """One environment, seen from the caller."""

    obs: Any = None  # the latest that was given
    begun: bool = False  # a reset that the caller asked for has been answered
    steps: int = 0  # of the episode that runs
    over: bool = False  # the end of its episode was given, and no observation of the next one
    asked: bool = False  # an action was given, and what it led to was not
    # What the action led to, or the loss of the episode, or both; not given yet.
    answers: list[Row] = field(default_factory=list)
    first: Row | None = None  # of the next episode; not given yet
    order: _Order | None = None


class Episodes:
    """The caller's slots of one pool, each in an episode of its own. For one thread.

    Under NEXT_STEP and SAME_STEP the next episode is begun when the end of the last one arrives, so it is reset while
    the caller learns and the other slots step. With `ahead`, the pool has more places than the caller has slots, and in
    those a next episode waits already reset: a slot whose episode ends goes on there, and the place that it had is
    reset for a later one.
    """

    def __init__(self, pool: Farmer, count: int, mode: AutoresetMode, max_steps: int | None = None, ahead: int = 0):
        """Takes a pool that nobody else uses.

        Args:
            pool: with `count` + `ahead` slots, called places here.
            count: the caller's slots.
            mode: when an episode begins that follows another one.
            max_steps: a time limit of this side's.
            ahead: episodes that are begun ahead of time; 0 under DISABLED, where none begins by itself.
        """
        self.mode = mode
        self._max_steps = max_steps
        self._pool = pool
        pool.follow = mode is not AutoresetMode.DISABLED
        self._count = count
        self._slots = [_Slot() for _ in range(count + ahead)]  # from `count` on those that are nobody's yet
        self._at = list(range(count + ahead))  # each slot's place in the pool
        self._who = list(range(count + ahead))  # and back
        self._asked: set[int] = set()
        self._ready: dict[int, None] = {}  # an ordered set: slots whose result can be given
        self._wanted: set[int] = set()  # slots whose order waits until they are vacant

    def reset(
        self,
        slots: Sequence[int],
        seeds: Sequence[int | None],
        options: Sequence[dict[str, Any] | None],
        timeout: float | None,
    ) -> list[Result]:
        """Begins an episode in each of the slots, whatever it was doing, and waits for its first observation.

        Raises:
            EnvironmentFault: a reset failed three times in a row.
            FarmTimeout: one did not answer, or its farm was away all the time.
        """
        anew = []
        for slot, seed, option in zip(slots, seeds, options, strict=True):
            state, wanted = self._slots[slot], _Order(seed, option)
            self._asked.discard(slot)
            self._ready.pop(slot, None)
            state.begun = state.asked = False
            state.answers.clear()
            if state.order is not None and state.order.plain and wanted.plain and state.order.failures == 0:
                continue  # this very reset was begun ahead of time
            state.first, state.order = None, wanted
            anew.append(slot)
        self._pool.abandon([self._at[slot] for slot in anew])
        self._wanted.update(anew)
        for slot in range(self._count, len(self._slots)):
            if self._slots[slot].order is None:
                self._order_next(slot)
        due = [self._slots[slot] for slot in slots]
        if not self._wait(lambda: sum(state.first is None for state in due), timeout, slots):
            raise self._late([slot for slot in slots if self._slots[slot].first is None], timeout)
        return [self._give_first(slot) for slot in slots]

    def act(self, actions: Sequence[Any], slots: Sequence[int], soon: bool = False) -> None:
        """Gives each slot its next action; it is ignored where the next episode is due (NEXT_STEP).

        Args:
            actions: one for each slot.
            slots: where to.
            soon: `results` is called next.

        Raises:
            BadAction, BadSlot, ResetNeeded: with nothing sent.
        """
        going = []
        for action, slot in zip(actions, slots, strict=True):
            state = self._state(slot)
            self._check_turn(slot, state)
            if not state.over and not state.answers:
                going.append((action, slot))
        if len(set(slots)) < len(slots):
            raise BadSlot("a slot is named twice in %s" % list(slots))
        if going:
            send = self._pool.hand_over if soon else self._pool.send
            send([action for action, _ in going], [self._at[slot] for _, slot in going])
        for slot in slots:
            self._slots[slot].asked = True
            self._asked.add(slot)
            self._settle(slot)

    def results(self, min_ready: int, timeout: float | None, whole: bool = False) -> list[Result]:
        """What the actions led to, in the order of the slots: all that is there, at least `min_ready`.

        Args:
            min_ready: how many to wait for; no more than there are actions to answer.
            timeout: seconds to wait.
            whole: fewer than `min_ready` are an error, and stay for the next call.

        Raises:
            NothingSent: there is no action to answer.
            FarmTimeout: none in time; late results stay addressed to their own step.
        """
        if not self._asked:
            raise NothingSent("no action is under way: send one first")
        enough = min(min_ready, len(self._asked))
        if not self._wait(lambda: enough - len(self._ready), timeout) and (whole or not self._ready):
            raise self._late(sorted(self._asked - self._ready.keys()), timeout)
        ready, self._ready = sorted(self._ready), {}
        self._asked.difference_update(ready)
        return [self._give(slot) for slot in ready]

    def obs(self, slot: int) -> Any:
        """The latest observation that was given; ResetNeeded before the first one."""
        if not self._slots[slot].begun:
            raise ResetNeeded("slot %d was never reset, or its reset failed: reset it first" % slot)
        return self._slots[slot].obs

    # What the caller has and what he is due.

    def _state(self, slot: int) -> _Slot:
        if not 0 <= slot < self._count:
            raise BadSlot("slot %r: there are slots 0 to %d" % (slot, self._count - 1))
        return self._slots[slot]

    def _check_turn(self, slot: int, state: _Slot) -> None:
        if not state.begun:
            raise ResetNeeded("slot %d was never reset, or its reset failed: reset before the next action" % slot)
        if state.asked:
            raise BadSlot("slot %d has an action under way: receive what it led to, or reset" % slot)
        if state.over and state.order is None:
            raise BadSlot(
                "the episode of slot %d is over, and nothing resets it in the mode %s\n"
                '  now: reset(options={"reset_mask": mask})' % (slot, self.mode.name)
            )

    def _settle(self, slot: int) -> None:
        state = self._slots[slot]
        if not state.asked:
            return
        if state.over:
            there = state.first is not None
        else:
            there = bool(state.answers) and (state.first is not None or not self._begins_within(state.answers[0]))
        if there:
            self._ready[slot] = None
        else:
            self._ready.pop(slot, None)

    def _begins_within(self, answer: Row) -> bool:
        return self.mode is AutoresetMode.SAME_STEP and (answer.terminated or answer.truncated)

    def _give(self, slot: int) -> Result:
        state = self._slots[slot]
        state.asked = False
        if state.over:
            return self._give_first(slot)
        answer = state.answers.pop(0)
        if not answer.lost:
            state.obs = answer.obs
        result = Result(slot, state.obs, answer.reward, answer.terminated, answer.truncated, answer.info)
        if not self._begins_within(answer):
            state.over = answer.terminated or answer.truncated
            return result
        result.final_obs, result.final_info = state.obs, answer.info
        first = self._give_first(slot)
        result.obs, result.info = first.obs, first.info
        if answer.lost:
            result.info = dict(first.info, lost=answer.info["lost"])
        return result

    def _give_first(self, slot: int) -> Result:
        state = self._slots[slot]
        first, state.first, state.order = state.first, None, None
        assert first is not None
        state.obs, state.begun, state.over = first.obs, True, False
        return Result(slot, first.obs, info=first.info)

    # What comes from the pool.

    def _wait(self, missing: Callable[[], int], timeout: float | None, strict: Iterable[int] = ()) -> bool:
        """Takes results in until none is missing, and says whether that came true in time."""
        began = time.monotonic()
        deadline = None if timeout is None else began + timeout
        told = False
        while True:
            again = self._offer()
            self._begin_wanted()
            count = missing()
            if count <= 0:
                return True
            self._give_up(strict)
            left = NEWS if deadline is None else min(NEWS, deadline - time.monotonic())
            left = min(left, AGAIN) if again else left
            if left <= 0:
                return False
            for row in self._rows(count, left):
                self._take(row)
            if not told and time.monotonic() - began >= NEWS:
                told = True
                log.warning("waiting for slots since %d s\n%s", NEWS, self._reasons(range(self._count)))

    def _rows(self, count: int, left: float) -> list[Row]:
        try:
            rows = self._pool.collect(count, left)
        except NothingSent:
            rows = []
        except FarmTimeout:
            return []
        if not rows:  # nothing is under way: the farm of a wanted slot is away, or a failed reset waits for its time
            self._pool.wait_vacant({self._at[slot] for slot in self._wanted}, left)
        return rows

    def _take(self, row: Row) -> None:
        slot = self._who[row.slot]
        state = self._slots[slot]
        order = state.order
        if row.first:
            assert order is not None
            state.first, state.steps, order.under_way, order.failures = row, 0, False, 0
        elif row.lost and order is not None:
            # Its reset failed, or the episode was lost before the caller had seen anything of it.
            if order.under_way:
                order.failures += 1
                order.why = row.info["lost"]
                log.info("slot %d could not be reset, and is tried again: %s", slot, order.why)
            state.first, order.under_way = None, False
            self._wanted.add(slot)
        else:
            self._limit(state, row)
            state.answers.append(row)
            if (row.terminated or row.truncated) and self.mode is not AutoresetMode.DISABLED:
                self._order_next(slot, row.followed)
        self._settle(slot)

    def _limit(self, state: _Slot, row: Row) -> None:
        state.steps += not row.lost
        if self._max_steps is not None and state.steps >= self._max_steps and not row.truncated:
            row.truncated = True
            if not row.terminated:  # else it is over there, too, and the next one may be under way
                self._pool.abandon([row.slot])

    def _order_next(self, slot: int, under_way: bool = False) -> None:
        self._slots[slot].order = _Order(under_way=under_way)
        if not under_way:
            self._wanted.add(slot)

    # Episodes that are begun ahead of time.

    def _go_on_ahead(self, slot: int) -> None:
        """The slot goes on where an episode waits already reset, if there is such a place and it is worth it."""
        ready = [
            other
            for other in range(self._count, len(self._slots))
            if self._slots[other].first is not None and self._pool.is_worth(self._at[slot], self._at[other])
        ]
        if ready:
            self._change_places(slot, min(ready, key=lambda other: (self._pool.pace(self._at[other]) or 0.0, other)))

    def _offer(self) -> bool:
        """Who waits for a reset goes on with an episode that is ready; whether some are left that were not worth it."""
        if not any(state.first is not None for state in self._slots[self._count :]):
            return False
        waiting = False
        for slot in range(self._count):
            state = self._slots[slot]
            if state.begun and state.order is not None and state.order.plain and state.first is None:
                self._go_on_ahead(slot)
                self._settle(slot)
                waiting = waiting or state.first is None
        return waiting

    def _change_places(self, slot: int, ahead: int) -> None:
        one, other = self._slots[slot], self._slots[ahead]
        at, who = self._at.copy(), self._who.copy()
        at[slot], at[ahead] = at[ahead], at[slot]
        who[at[slot]], who[at[ahead]] = slot, ahead
        wanted = self._wanted - {slot} | ({ahead} if slot in self._wanted else set())
        # Without a call in between, so that no Ctrl-C can leave half of it: then rows would go to another's slot.
        self._at, self._who, self._wanted = at, who, wanted
        one.order, other.order, one.first, other.first = other.order, one.order, other.first, one.first
        one.steps = 0

    def _begin_wanted(self) -> None:
        if not self._wanted:
            return
        there = sorted(self._wanted.intersection(self._who[place] for place in self._pool.vacant()))
        while there:
            options = self._order(there[0]).options
            # The same object, not an equal one: options may hold arrays, whose comparison has no truth value.
            alike = [slot for slot in there if self._order(slot).options is options]
            self._pool.reset([self._at[slot] for slot in alike], [self._order(slot).seed for slot in alike], options)
            for slot in alike:
                self._order(slot).under_way = True
            self._wanted.difference_update(alike)
            there = [slot for slot in there if slot in self._wanted]

    def _order(self, slot: int) -> _Order:
        order = self._slots[slot].order
        assert order is not None
        return order

    def _give_up(self, strict: Iterable[int]) -> None:
        for slot in strict:
            order = self._slots[slot].order
            if order is not None and order.failures >= TRIES:
                self._wanted.discard(slot)
                raise EnvironmentFault(
                    "slot %d on %s could not be reset, %d times in a row\n  the last time: %s"
                    % (slot, self._pool.name_of(self._at[slot]), order.failures, order.why)
                )

    def _late(self, slots: Sequence[int], timeout: float | None) -> FarmTimeout:
        return FarmTimeout(
            "slots %s gave no result within %s s\n%s\n"
            "  now: recv goes on waiting for them, reset begins anew; no late result is taken for another step's"
            % (list(slots), timeout, self._reasons(slots))
        )

    def _reasons(self, slots: Iterable[int]) -> str:
        troubles = {farm["farm"]: farm["trouble"] for farm in self._pool.status()["farms"]}
        lines = []
        for slot in slots:
            state, farm = self._slots[slot], self._pool.name_of(self._at[slot])
            if state.first is not None or (state.order is None and (not state.asked or state.answers)):
                continue
            doing = "its step is under way"
            if state.order is not None:
                doing = "its reset is under way" if state.order.under_way else "it waits for its place on the farm"
                doing += "; the last one failed: %s" % state.order.why if state.order.why else ""
            lines.append("  slot %d on %s: %s" % (slot, farm, doing))
            if troubles.get(farm):
                lines.append("    the farm: %s" % troubles[farm])
        return "\n".join(lines)
