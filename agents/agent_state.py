"""What a checkpoint holds of an agent beside its replay, as arrays and plain values."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np


class Saveable(Protocol):
    """An agent as `agents.checkpoint.Checkpointer` sees it."""

    step: int
    nb_updates: int
    #: `agents.ReplayMemory`; absent or None where an agent learns from no replay.
    memory: Any

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything but replay: arrays, and values that JSON can hold."""

    def check_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Raises ValueError when this is of an agent of another form."""

    def load_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Takes what `state` gave; `check_state` has passed."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Inside, nothing of the agent changes."""

    def get_config(self) -> dict[str, Any]:
        """Settings, for a reader of the checkpoint."""


def variables_of(owners: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name/index, variable) of models and optimizers by name."""
    for name, owner in owners.items():
        for index, variable in enumerate(owner.variables):
            yield f"{name}/{index}", variable


def check_variables(mine: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where a checkpoint's arrays are not of these variables."""
    theirs = {name for name in arrays if not name.startswith(("observations/", "random/"))}
    if theirs != set(mine):
        odd = sorted(theirs ^ set(mine))
        raise ValueError(f"it is of other networks or optimizers: {', '.join(odd[:4])}")
    for name, variable in mine.items():
        if tuple(variable.shape) != arrays[name].shape:
            raise ValueError(
                f"it has {name} of shape {arrays[name].shape}, this agent {tuple(variable.shape)}:"
                " other networks or another environment"
            )


def global_random_state() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """numpy's and Python's own generators, which keras-rl's policies and processes draw from."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, rest = random.getstate()
    values = {"numpy": [kind, position, has_gauss, gauss], "python": [version, list(numbers), rest]}
    return {"random/numpy": np.asarray(keys)}, values


def set_global_random_state(arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
    """Takes what `global_random_state` gave."""
    kind, position, has_gauss, gauss = values["numpy"]
    np.random.set_state((kind, arrays["random/numpy"], position, has_gauss, gauss))
    version, numbers, rest = values["python"]
    random.setstate((version, tuple(numbers), rest))
