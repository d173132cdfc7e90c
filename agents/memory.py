"""Replay of whole transitions from many interleaved environments, in numpy rings.

A transition carries its own next observation, so that time limits can bootstrap and no neighbour in the ring matters.
With `window_length` > 1 a state is a stack of the last observations of the same episode, zeros before its start.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rl.memory import Experience, Memory, SequentialMemory

#: What keras-rl's memory gets as `terminal` at a time limit. Its one flag both ends an episode (any true value) and
#: stops bootstrapping; ours stops it only where the flag is exactly 1.
TRUNCATED = 2


@dataclass
class Transitions:
    """Sampled transitions, n of them.

    Attributes:
        state, next_state: (n, window_length, *obs_shape).
        action: (n, *action_shape).
        reward: float32 (n,).
        terminated: bool (n,), the task ended: do not bootstrap.
        truncated: bool (n,).
    """

    state: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_state: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class ReplayMemory(Memory):
    """A ring of `limit` whole transitions.

    `add` and `gather` serve our agents; `append`, `sample` and `get_recent_state` are keras-rl's, for one environment.
    """

    def __init__(self, limit: int, window_length: int = 1, seed: int | None = None, **kwargs: Any):
        """Allocates at the first transition, when shapes and dtypes are known.

        Raises:
            ValueError: a limit or window below 1.
        """
        if limit < 1 or window_length < 1:
            raise ValueError("limit and window_length must be at least 1, not %r and %r" % (limit, window_length))
        super().__init__(window_length=window_length, **kwargs)
        self.limit = int(limit)
        self.rng = np.random.default_rng(seed)
        self._count = 0  # transitions ever added; number i lies at i % limit
        self._rings: dict[str, np.ndarray] = {}
        self._last: dict[Hashable, int] = {}  # number of the last transition of each running episode
        self._pending: tuple[Any, Any, float, Any] | None = None  # keras-rl's append: waits for its next observation

    def __len__(self) -> int:
        return min(self._count, self.limit)

    @property
    def nb_entries(self) -> int:
        return len(self)

    def add(
        self,
        stream: Hashable,
        obs: Any,
        action: Any,
        reward: float,
        next_obs: Any,
        terminated: bool,
        truncated: bool,
    ) -> None:
        """Stores one transition of an environment in O(1).

        Args:
            stream: which environment; its episodes follow each other.
            obs, next_obs: observations of one shape and dtype.
            action: as it was sent.
            reward: of this step.
            terminated, truncated: the episode's end.
        """
        if not self._rings:
            self._allocate(np.asarray(obs), np.asarray(action))
        at, rings = self._count % self.limit, self._rings
        rings["obs"][at] = obs
        rings["next_obs"][at] = next_obs
        rings["action"][at] = action
        rings["reward"][at] = reward
        rings["terminated"][at] = terminated
        rings["truncated"][at] = truncated
        rings["previous"][at] = self._last.get(stream, -1)
        if terminated or truncated:
            self._last.pop(stream, None)
        else:
            self._last[stream] = self._count
        self._count += 1

    def cut(self, stream: Hashable) -> None:
        """The stream's episode ended without a transition (a lost slot, Ctrl-C): the last one it has is truncated."""
        last = self._last.pop(stream, None)
        if last is not None and last >= self._count - self.limit:
            self._rings["truncated"][last % self.limit] = True

    def cut_all(self) -> None:
        """Every running episode ended without a transition."""
        for stream in list(self._last):
            self.cut(stream)

    def draw(self, n: int) -> Transitions:
        """n transitions, uniformly with replacement.

        Raises:
            ValueError: the memory is empty.
        """
        if not len(self):
            raise ValueError("the memory is empty")
        oldest = self._count - len(self)
        return self.gather(self.rng.integers(oldest, self._count, n))

    def gather(self, numbers: np.ndarray) -> Transitions:
        """The transitions of these numbers (0 is the first ever added), in one vectorised read."""
        numbers = np.asarray(numbers, np.int64)
        rings, at = self._rings, numbers % self.limit
        shape = (len(numbers), self.window_length, *rings["obs"].shape[1:])
        state = np.zeros(shape, rings["obs"].dtype)
        next_state = np.empty(shape, rings["obs"].dtype)
        current = numbers
        for back in range(self.window_length):
            there = current >= max(0, self._count - self.limit)
            place = np.where(there, current, 0) % self.limit
            frame = rings["obs"][place]
            frame[~there] = 0
            state[:, -1 - back] = frame
            current = np.where(there, rings["previous"][place], -1)
        next_state[:, :-1] = state[:, 1:]
        next_state[:, -1] = rings["next_obs"][at]
        return Transitions(
            state, rings["action"][at], rings["reward"][at], next_state, rings["terminated"][at], rings["truncated"][at]
        )

    def _allocate(self, obs: np.ndarray, action: np.ndarray) -> None:
        if obs.dtype == object:
            raise ValueError("observations must be arrays of numbers of one shape; a processor can make them so")
        kinds = obs.dtype if obs.dtype != np.float64 else np.dtype(np.float32)
        self._rings = {
            "obs": np.zeros((self.limit, *obs.shape), kinds),
            "next_obs": np.zeros((self.limit, *obs.shape), kinds),
            "action": np.zeros((self.limit, *action.shape), action.dtype),
            "reward": np.zeros(self.limit, np.float32),
            "terminated": np.zeros(self.limit, bool),
            "truncated": np.zeros(self.limit, bool),
            "previous": np.full(self.limit, -1, np.int64),
        }

    # keras-rl's interface: one environment, observation by observation.

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
        """keras-rl's: a list of `Experience`; `batch_idxs` count from the oldest transition."""
        oldest = self._count - len(self)
        found = self.draw(batch_size) if batch_idxs is None else self.gather(oldest + np.asarray(batch_idxs))
        columns = (found.state, found.action, found.reward, found.next_state, found.terminated)
        return [
            Experience(list(state0), action, float(reward), list(state1), bool(terminal))
            for state0, action, reward, state1, terminal in zip(*columns, strict=True)
        ]

    def get_config(self) -> dict[str, Any]:
        return dict(super().get_config(), limit=self.limit)

    # Checkpoints.

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays; rings only as far as they are filled."""
        state = {"ring/" + name: ring[: len(self)].copy() for name, ring in self._rings.items()}
        return dict(state, count=np.array(self._count), limit=np.array(self.limit))

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Takes what `state_dict` gave; running episodes are over.

        Raises:
            ValueError: it is of a memory of another limit; nothing was changed.
        """
        if int(state["limit"]) != self.limit:
            raise ValueError(
                "the checkpoint's replay holds %d transitions, this agent's %d" % (state["limit"], self.limit)
            )
        rings = {}
        for name, filled in state.items():
            if name.startswith("ring/"):
                rings[name[5:]] = ring = np.zeros((self.limit, *filled.shape[1:]), filled.dtype)
                ring[: len(filled)] = filled
        self._rings, self._count = rings, int(state["count"])
        self._last.clear()
        self._pending = None


class SequentialStore:
    """keras-rl's own SequentialMemory behind the verbs of ours, for a single environment."""

    def __init__(self, memory: SequentialMemory):
        self.memory = memory
        self._open: tuple[Hashable, Any, Any] | None = None  # stream, action, next observation of a running episode

    def __len__(self) -> int:
        return max(0, int(self.memory.nb_entries) - self.memory.window_length - 1)

    def add(
        self, stream: Hashable, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool
    ) -> None:
        """One transition; at an episode's end the last observation follows, as keras-rl's own loop does it."""
        if self._open is not None and self._open[0] != stream:
            raise ValueError(_one_environment_only(self.memory, 2))
        terminal = 1 if terminated else TRUNCATED if truncated else 0
        self.memory.append(obs, action, reward, terminal, training=True)
        self._open = (stream, action, next_obs)
        if terminal:
            self._close()

    def cut(self, stream: Hashable) -> None:
        """The stream's episode ended without a transition: the last one it has is truncated."""
        if self._open is not None and self._open[0] == stream:
            self.memory.terminals[-1] = TRUNCATED
            self._close()

    def cut_all(self) -> None:
        """The running episode ended without a transition."""
        if self._open is not None:
            self.cut(self._open[0])

    def _close(self) -> None:
        assert self._open is not None
        _, action, last = self._open
        self.memory.append(last, action, 0.0, 0, training=True)
        self._open = None

    def draw(self, n: int) -> Transitions:
        """n transitions by keras-rl's own sampling."""
        found = self.memory.sample(n)
        return Transitions(
            np.array([e.state0 for e in found]),
            np.array([e.action for e in found]),
            np.array([e.reward for e in found], np.float32),
            np.array([e.state1 for e in found]),
            np.array([e.terminal1 == 1 for e in found]),
            np.array([e.terminal1 == TRUNCATED for e in found]),
        )


def store_of(memory: Any, nb_slots: int) -> Any:
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
        raise ValueError(_one_environment_only(memory, nb_slots))
    return SequentialStore(memory)


def _one_environment_only(memory: SequentialMemory, nb_slots: int) -> str:
    return (
        "keras-rl's SequentialMemory holds one environment's steps in a row; %d environments would be mixed up\n"
        "  now: memory=agents.ReplayMemory(limit=%d, window_length=%d)" % (nb_slots, memory.limit, memory.window_length)
    )
