"""keras-rl's own SequentialMemory behind the verbs of `agents.ReplayMemory`."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

import numpy as np
from rl.memory import SequentialMemory

from agents import nest
from agents.transitions import TRUNCATED, Transitions


class SequentialStore:
    """keras-rl's own SequentialMemory behind the verbs of ours, for a single environment."""

    def __init__(self, memory: SequentialMemory):
        self.memory = memory
        self.lock = threading.RLock()
        self._open: tuple[Hashable, Any, Any] | None = None  # stream, action, next observation of a running episode

    def __len__(self) -> int:
        return self._usable(int(self.memory.nb_entries))

    @property
    def most(self) -> int:
        """Transitions that it can hold."""
        return self._usable(int(self.memory.limit))

    def _usable(self, entries: int) -> int:
        return max(0, entries - self.memory.window_length - 1)

    def add(
        self, stream: Hashable, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool
    ) -> None:
        """One transition; at an episode's end the last observation follows, as keras-rl's own loop does it."""
        with self.lock:
            if self._open is not None and self._open[0] != stream:
                raise ValueError(one_environment_only(self.memory, 2))
            terminal = 1 if terminated else TRUNCATED if truncated else 0
            self.memory.append(obs, action, reward, terminal, training=True)
            self._open = (stream, action, next_obs)
            if terminal:
                self._close()

    def cut(self, stream: Hashable) -> None:
        """The stream's episode ended without a transition: the last one it has is truncated."""
        with self.lock:
            if self._open is not None and self._open[0] == stream:
                self.memory.terminals[-1] = TRUNCATED
                self._close()

    def cut_all(self) -> None:
        """The running episode ended without a transition."""
        with self.lock:
            if self._open is not None:
                self.cut(self._open[0])

    def _close(self) -> None:
        assert self._open is not None
        _, action, last = self._open
        self.memory.append(last, action, 0.0, 0, training=True)
        self._open = None

    def draw(self, n: int, n_step: int = 1, gamma: float = 1.0) -> Transitions:
        """n transitions by keras-rl's own sampling.

        Raises:
            ValueError: more than one step; keras-rl's memory has none.
        """
        if n_step != 1:
            raise ValueError(
                "keras-rl's SequentialMemory gives single steps, not n_step=%r\n  now: %s"
                % (n_step, _ours(self.memory))
            )
        with self.lock:
            found = self.memory.sample(n)
        terminated = np.array([e.terminal1 == 1 for e in found])
        return Transitions(
            state=_stacked([e.state0 for e in found]),
            action=np.array([e.action for e in found]),
            reward=np.array([e.reward for e in found], np.float32),
            next_state=_stacked([e.state1 for e in found]),
            terminated=terminated,
            truncated=np.array([e.terminal1 == TRUNCATED for e in found]),
            discount=np.where(terminated, 0.0, gamma).astype(np.float32),
            steps=np.ones(len(found), np.int32),
        )


def _stacked(states: list[list[Any]]) -> list[np.ndarray]:
    """States, lists of observations, as one array a leaf; keras-rl's zeros take the dtype of what follows them."""
    rows = [[nest.flatten(obs) for obs in state] for state in states]
    return [
        np.array([[frame[leaf] for frame in row] for row in rows], like.dtype) for leaf, like in enumerate(rows[0][-1])
    ]


def one_environment_only(memory: SequentialMemory, nb_slots: int) -> str:
    """The words for such a memory beside several environments."""
    return (
        "keras-rl's SequentialMemory holds one environment's steps in a row; %d environments would be mixed up\n"
        "  now: %s" % (nb_slots, _ours(memory))
    )


def _ours(memory: SequentialMemory) -> str:
    return "memory=agents.ReplayMemory(limit=%d, window_length=%d)" % (memory.limit, memory.window_length)
