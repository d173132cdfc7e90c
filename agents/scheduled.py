"""An agent whose updates follow its steps by a ratio: at once after the steps, or by a `Learner` beside them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from agents.core import Agent
from agents.learner import FUSED, Learner, UpdateBudget, whole_calls

log = logging.getLogger("agents")


class ScheduledAgent(Agent):
    """A subclass has `is_warm`, `update`, `publish` and `act_by_copy`; nothing here knows of replay.

    Attributes:
        budget: updates that steps have earned.
    """

    def __init__(self, updates_per_step: float, processor: Any = None):
        """Raises ValueError for a ratio that is not positive."""
        super().__init__(processor)
        self.budget = UpdateBudget(updates_per_step)
        self.nb_updates = 0
        self._busy = threading.RLock()  # held by whoever changes weights or replay as a whole
        self._unsettled: Learner | None = None

    # What a subclass says.

    def is_warm(self) -> bool:
        """Whether steps earn updates by now."""
        raise NotImplementedError

    def update(self, count: int = 1) -> list[float]:
        """Makes `count` updates; their metrics' means."""
        raise NotImplementedError

    def publish(self) -> None:
        """Hands the newest weights to the copy that acts."""
        raise NotImplementedError

    def act_by_copy(self, on: bool) -> None:
        """Whether to act by the copy from now on."""
        raise NotImplementedError

    # What the loop and the learner call.

    def learn(self, steps: int, nb_slots: int) -> list[Any]:
        """Makes what is owed for `steps` new steps; metrics, NaN where nothing was made."""
        nothing = [np.nan for _ in self.metrics_names]
        if not self.is_warm():
            return nothing
        self.budget.steps += steps
        smallest = 1 if nb_slots == 1 else FUSED
        values = None
        while self.budget.owed >= smallest:
            values = self.pay(whole_calls(self.budget.owed) or smallest)
        return nothing if values is None else self.with_processor(values)

    def pay(self, count: int) -> list[float]:
        """Makes `count` of the updates that are owed; a save sees all of it or nothing."""
        with self._busy:
            values = self.update(count)
            self.budget.paid += count
        return values

    def overlap(self, on: bool) -> None:
        """Whether a learner changes the weights while this agent acts: it then acts by a copy."""
        if on:
            self.publish()
        self.act_by_copy(on)

    def settles_later(self, learner: Learner) -> None:
        """A learner is still inside a long call after Ctrl-C."""
        self._unsettled = learner

    def settle(self) -> None:
        """Waits for that learner."""
        if self._unsettled is not None:
            self._unsettled.stop()
            if self._unsettled.error is not None:
                log.error("the updates that Ctrl-C left running failed: %s", self._unsettled.error)
            self._unsettled = None
            self.overlap(False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nobody updates: for saving and loading."""
        if self._unsettled is not None:
            self.settle()
        with self._busy:
            yield
