"""When updates are made: at once after the steps that earned them, or in a second thread while environments step.

Either way the number of updates follows the number of steps by the asked ratio; neither side may run ahead by more than
a band. What is owed is counted in whole steps and updates, so it neither drifts nor gets lost between two
calls of `fit`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

FUSED = 8  #: updates in one compiled call when many environments feed the agent
FUSED_LONG = 32  #: and where so many are to be made in a row: the fixed cost of a call is then shared by more
LONGEST = 2 * FUSED_LONG  #: updates between two moments at which a save, or the actor's copy, can have the weights


def whole_calls(owed: int) -> int:
    """How many of the updates that are owed to make in one go: whole calls, none when fewer than FUSED are owed."""
    return min(owed // FUSED * FUSED, LONGEST)


def in_calls(count: int) -> list[int]:
    """The compiled calls that make `count` updates, by their lengths."""
    long, rest = divmod(count, FUSED_LONG)
    short, rest = divmod(rest, FUSED)
    return [FUSED_LONG] * long + [FUSED] * short + [rest] * (rest > 0)


class UpdateBudget:
    """Updates that steps have earned and nobody has made yet."""

    def __init__(self, updates_per_step: float):
        """Raises ValueError for a ratio that is not positive."""
        if not 0 < updates_per_step < float("inf"):
            raise ValueError("updates_per_step must be a positive number, not %r" % (updates_per_step,))
        self.ratio = float(updates_per_step)
        self.steps = 0  # that have earned updates
        self.paid = 0  # updates that were made for them

    @property
    def owed(self) -> int:
        """Whole updates to be made now."""
        return int(self.steps * self.ratio + 1e-9) - self.paid


class Learner:
    """A thread that makes the updates that an agent owes while its owner collects."""

    def __init__(self, agent: Any, nb_slots: int):
        """Starts with `start`. The agent has `budget`, `pay(count)` and `publish()`."""
        self.agent = agent
        self.band = max(2 * FUSED, int(2 * agent.budget.ratio * nb_slots) + FUSED)
        self.error: BaseException | None = None
        self._news: list[float] | None = None
        self._change = threading.Condition()
        self._ending = False
        # No daemon: Python waits for it at the end, instead of tearing TensorFlow down under a running update.
        self._thread = threading.Thread(target=self._run, name="learner")

    def start(self) -> None:
        """Begins to pay."""
        self._thread.start()

    def earn(self, steps: int) -> list[float] | None:
        """`steps` more were made; returns the newest metrics, if there are new ones.

        Raises:
            Whatever an update raised; the learner has ended then.
        """
        with self._change:
            self.agent.budget.steps += steps
            self._change.notify_all()
            news, self._news = self._news, None
        self._reraise()
        return news

    def wait(self, limit: float) -> bool:
        """Waits until the learner is behind by no more than the band; False when it still is after `limit` seconds."""
        return self._wait(self.band, limit)

    def settle(self, limit: float) -> bool:
        """Waits until nothing is owed that fills a call; False when it still is after `limit` seconds."""
        return self._wait(FUSED - 1, limit)

    def stop(self, limit: float | None = None) -> bool:
        """Ends the thread after the call that it is in; False when that takes longer than `limit` seconds."""
        with self._change:
            self._ending = True
            self._change.notify_all()
        if self._thread.ident is not None:
            self._thread.join(limit)
        return not self._thread.is_alive()

    def _wait(self, owed: int, limit: float) -> bool:
        deadline = time.monotonic() + limit
        with self._change:
            while self.agent.budget.owed > owed and self.error is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._change.wait(left)
        self._reraise()
        return True

    def _reraise(self) -> None:
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while self._work():
                pass
        except BaseException as error:
            with self._change:
                self.error = error
                self._change.notify_all()

    def _work(self) -> bool:
        with self._change:
            while self.agent.budget.owed < FUSED and not self._ending:
                self._change.wait()
            if self._ending:
                return False
            count = whole_calls(self.agent.budget.owed)
        values = self.agent.pay(count)
        self.agent.publish()
        with self._change:
            self._news = values
            self._change.notify_all()
        return True
