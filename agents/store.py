"""What an agent may learn from: our memory, or keras-rl's for one environment."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

from rl.memory import SequentialMemory

from agents.keras_rl.sequential import SequentialStore, one_environment_only
from agents.memory import ReplayMemory
from agents.transitions import Transitions


class Store(Protocol):
    """A replay as an agent uses it."""

    @property
    def most(self) -> int:
        """Transitions that it can hold."""

    def __len__(self) -> int:
        """Transitions that can be drawn."""

    def add(
        self, stream: Hashable, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool
    ) -> None:
        """One transition of an environment."""

    def cut(self, stream: Hashable) -> None:
        """The stream's episode ended without a transition."""

    def draw(self, n: int, n_step: int = 1, gamma: float = 1.0) -> Transitions:
        """n transitions."""


def store_of(memory: Any, nb_slots: int) -> Store:
    """The memory as something with `add`, `cut` and `draw`.

    Raises:
        TypeError: it is none of ours and not keras-rl's SequentialMemory.
        ValueError: keras-rl's memory for more than one environment.
    """
    if isinstance(memory, ReplayMemory):
        return memory
    if not isinstance(memory, SequentialMemory):
        raise TypeError("memory must be agents.ReplayMemory or rl.memory.SequentialMemory, not %r" % (memory,))
    if nb_slots > 1:
        raise ValueError(one_environment_only(memory, nb_slots))
    return SequentialStore(memory)
