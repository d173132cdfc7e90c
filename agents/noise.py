"""Exploration noise of many environments: each has a state of its own, all share one annealing schedule."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np


class NoiseBank:
    """A keras-rl random process for the first slot that asks, and a copy of it for each other.

    The standard deviation of an annealed process falls with the steps of all slots together, as it would with one.
    """

    def __init__(self, process: Any):
        self._process = process
        self._copies: dict[int, Any] = {}

    def sample(self, slot: int) -> np.ndarray:
        """The next value of a slot's process, (size,)."""
        if slot not in self._copies:
            self.reset(slot)
        mine = self._copies[slot]
        shared = getattr(self._process, "n_steps", None)
        if shared is None:
            return np.asarray(mine.sample())
        mine.n_steps = shared
        value = mine.sample()
        self._process.n_steps = mine.n_steps
        return np.asarray(value)

    def reset(self, slot: int) -> None:
        """An episode begins in this slot."""
        if slot not in self._copies:  # the first one's is the user's own, as in keras-rl
            self._copies[slot] = copy.deepcopy(self._process) if self._copies else self._process
        if hasattr(self._process, "n_steps"):  # it begins with as much noise as there now is
            self._copies[slot].n_steps = self._process.n_steps
        self._copies[slot].reset_states()

    def reset_all(self) -> None:
        """All slots begin anew. Nothing is drawn before one does, so that two calls of `fit` draw as one long one."""
        self._copies.clear()

    @property
    def n_steps(self) -> int:
        """Values drawn so far, which is what annealing goes by."""
        return int(getattr(self._process, "n_steps", 0))

    @n_steps.setter
    def n_steps(self, value: int) -> None:
        if hasattr(self._process, "n_steps"):
            self._process.n_steps = value
