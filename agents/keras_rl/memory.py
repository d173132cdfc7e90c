"""keras-rl's interface of a memory: one environment, observation by observation."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from rl.memory import Experience, Memory

from agents import nest
from agents.transitions import TRUNCATED, Transitions


class KerasRLMemory(Memory):
    """`append`, `sample` and `get_recent_state` over a memory's own `add`, `draw` and `gather`."""

    limit: int
    lock: Any

    def __init__(self, window_length: int, **kwargs: Any):
        super().__init__(window_length=window_length, **kwargs)
        self._pending: tuple[Any, Any, float, Any] | None = None  # `append`: waits for its next observation

    # What a subclass has.

    @property
    def template(self) -> Any:
        """The structure of an observation."""
        raise NotImplementedError

    def add(
        self, stream: Hashable, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool
    ) -> None:
        """Stores one transition."""
        raise NotImplementedError

    def draw(self, n: int, n_step: int = 1, gamma: float = 1.0) -> Transitions:
        """n transitions."""
        raise NotImplementedError

    def gather(self, numbers: Any, n_step: int = 1, gamma: float = 1.0) -> Transitions:
        """The transitions of these numbers."""
        raise NotImplementedError

    def transitions(self) -> np.ndarray:
        """The numbers of all transitions."""
        raise NotImplementedError

    # keras-rl's verbs.

    @property
    def nb_entries(self) -> int:
        """keras-rl's name for `len`."""
        return len(self)

    def append(self, observation: Any, action: Any, reward: float, terminal: bool, training: bool = True) -> None:
        """keras-rl's: the transition is complete when the next observation comes.

        After a terminal entry keras-rl's loops append the last observation, which completes it and begins nothing.
        """
        super().append(observation, action, reward, terminal, training=training)
        if not training:
            return
        if self._pending is None:
            self._pending = (observation, action, reward, terminal)
            return
        obs, taken, gained, over = self._pending
        self.add("append", obs, taken, gained, observation, bool(over) and over != TRUNCATED, over == TRUNCATED)
        self._pending = None if over else (observation, action, reward, terminal)

    def sample(self, batch_size: int, batch_idxs: Any = None) -> list[Any]:
        """keras-rl's: a list of `Experience`; `batch_idxs` count from the oldest transition.

        Its states are lists of `window_length` observations as they were added, nested ones too.

        Raises:
            ValueError: the memory is empty.
        """
        with self.lock:
            found = self.draw(batch_size) if batch_idxs is None else self.gather(self.transitions()[batch_idxs])
        states = (self._observations(found.state, row) for row in range(len(found.reward)))
        next_states = (self._observations(found.next_state, row) for row in range(len(found.reward)))
        columns = (states, found.action, found.reward, next_states, found.terminated)
        return [
            Experience(state0, action, float(reward), state1, bool(terminal))
            for state0, action, reward, state1, terminal in zip(*columns, strict=True)
        ]

    def _observations(self, windows: list[np.ndarray], row: int) -> list[Any]:
        frames = range(self.window_length)
        return [nest.unflatten(self.template, [window[row, frame] for window in windows]) for frame in frames]

    def get_recent_state(self, current_observation: Any) -> list[Any]:
        """keras-rl's: the last `window_length` observations of the episode, zeros before its start; nested ones too."""
        if not nest.is_nest(current_observation):
            return super().get_recent_state(current_observation)
        state = [current_observation]
        ended_before = [False, *self.recent_terminals]
        for index in reversed(range(len(self.recent_observations))):
            if len(state) == self.window_length or (ended_before[index] and not self.ignore_episode_boundaries):
                break
            state.insert(0, self.recent_observations[index])
        zeros = [np.zeros_like(leaf) for leaf in nest.flatten(current_observation)]
        nothing = nest.unflatten(nest.template_of(current_observation), zeros)
        return [nothing] * (self.window_length - len(state)) + state

    def get_config(self) -> dict[str, Any]:
        """keras-rl's: what the memory was made with."""
        return dict(super().get_config(), limit=self.limit)
