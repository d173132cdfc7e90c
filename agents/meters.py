"""What a training spends its time on: the loop counts into it, a logger takes what came together since the last time.

meters = Meters()
meters.stepped(batch.env_s, batch.trip_s, policy_age)
meters.updated(count, seconds, agent.metrics_names, values)
meters.take()["updates_per_s"]
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Meters:
    """Sums since the last `take`; the collector's and the learner's thread may both count.

    Attributes:
        steps, updates, acted_steps: so many were made.
        acting_s, learning_s, waiting_s, throttled_s: seconds that went into each.
        env_s, network_s: seconds of all steps together, inside the environments and on the way to them and back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._began = self._clock()
        self.steps = self.updates = self.acted_steps = 0
        self.acting_s = self.learning_s = self.waiting_s = self.throttled_s = 0.0
        self.env_s = self.network_s = 0.0
        self._ages = _Mean()
        self._train: dict[str, _Mean] = {}

    def acted(self, n: int, seconds: float) -> None:
        """One forward pass chose n actions."""
        with self._lock:
            self.acted_steps += n
            self.acting_s += seconds

    def waited(self, seconds: float) -> None:
        """The collector had nothing to do until a result came."""
        with self._lock:
            self.waiting_s += seconds

    def throttled(self, seconds: float) -> None:
        """The collector held back until the learner had caught up."""
        with self._lock:
            self.throttled_s += seconds

    def stepped(self, env_s: Any, trip_s: Any, policy_age: Any) -> None:
        """n transitions came in.

        Args:
            env_s: (n,) seconds in the environment.
            trip_s: (n,) seconds from the sending of the action to the arrival of its result.
            policy_age: (n,) updates now minus updates of the weights that chose the action; NaN where no weights did.
        """
        env, trip = np.asarray(env_s, np.float64), np.asarray(trip_s, np.float64)
        ages = np.asarray(policy_age, np.float64).ravel()
        ages = ages[~np.isnan(ages)]
        with self._lock:
            self.steps += env.size
            self.env_s += float(env.sum())
            self.network_s += float(np.maximum(trip - env, 0.0).sum())
            self._ages.add(float(ages.sum()), ages.size)

    def updated(self, count: int, seconds: float, names: Sequence[str], values: Sequence[Any]) -> None:
        """The learner made `count` updates in one call.

        Args:
            count: updates.
            seconds: that all of them took.
            names: of the losses and metrics.
            values: their means over the call; NaN where there is none.
        """
        with self._lock:
            self.updates += count
            self.learning_s += seconds
            for name, value in zip(names, values, strict=True):
                number = float(value)
                if count and number == number:  # not NaN
                    self._train.setdefault(name, _Mean()).add(number * count, count)

    def take(self) -> dict[str, float]:
        """What came together since the last `take`, and begins anew.

        Returns:
            By name, with the unit in it; NaN for a mean of nothing. A share is a part of the time since the last
            `take`; a call is counted whole in the interval that it ended in.
            `steps`, `updates`, `seconds`: how many, in how long a time.
            `steps_per_s`, `updates_per_s`, `updates_per_step`: the speeds, and the ratio that came out.
            `env_time_ms`, `network_time_ms`: of a step, in the environment and on the way there and back.
            `acting_time_ms`, `learning_time_ms`: of one action's choice and of one update.
            `waiting_share`, `throttled_share`: the collector's, for results and for the learner.
            `learning_share`: the learner's.
            `policy_age_updates`: how many updates old the weights were that chose an action.
            `train/NAME`: each loss and metric, a mean over the updates.
        """
        with self._lock:
            seconds = self._clock() - self._began
            taken = {
                "steps": float(self.steps),
                "updates": float(self.updates),
                "seconds": seconds,
                "steps_per_s": _ratio(self.steps, seconds),
                "updates_per_s": _ratio(self.updates, seconds),
                "updates_per_step": _ratio(self.updates, self.steps),
                "env_time_ms": 1e3 * _ratio(self.env_s, self.steps),
                "network_time_ms": 1e3 * _ratio(self.network_s, self.steps),
                "acting_time_ms": 1e3 * _ratio(self.acting_s, self.acted_steps),
                "learning_time_ms": 1e3 * _ratio(self.learning_s, self.updates),
                "waiting_share": _ratio(self.waiting_s, seconds),
                "learning_share": _ratio(self.learning_s, seconds),
                "throttled_share": _ratio(self.throttled_s, seconds),
                "policy_age_updates": self._ages.value(),
            }
            taken.update({"train/" + name: mean.value() for name, mean in self._train.items()})
            self._begin()
        return taken


class _Mean:
    """A sum and how many went into it."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    def value(self) -> float:
        return _ratio(self.total, self.count)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
