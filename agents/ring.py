"""Rings of numpy arrays that hold each observation once, and the steps between them.

An entry is one observation and, once the environment has answered, the action taken there and what came of it: a
transition. Entry number i, counted from the first ever, lies at i % limit. Its next observation is the next entry of
the same episode, found by number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from agents import nest
from agents.transitions import Transitions

#: The columns that are the same for all observations and actions.
PLAIN_COLUMNS = {
    "reward": np.float32,
    "terminated": np.bool_,
    "truncated": np.bool_,
    "previous": np.int64,
    "following": np.int64,
    "step": np.bool_,
}


class Ring:
    """The storage of a replay. Its owner's lock is held in every call.

    Attributes:
        count: entries ever begun; the numbers from `oldest` to `count - 1` are there.
        complete: entries that are transitions.
        template: the structure of an observation.
        columns: arrays (limit, ...) by name, empty before the first entry.
    """

    def __init__(self, limit: int, window_length: int):
        """Allocates at the first entry, when shapes and dtypes are known."""
        self.limit, self.window_length = limit, window_length
        self.count = self.complete = 0
        self.template: Any = None
        self.columns: dict[str, np.ndarray] = {}
        self._observed: list[np.ndarray] = []  # those of the observation's leaves

    @property
    def oldest(self) -> int:
        """The smallest number that is still there."""
        return max(0, self.count - self.limit)

    def install(self, template: Any, columns: dict[str, np.ndarray]) -> None:
        """Takes its columns, for observations of this structure."""
        self.template, self.columns = template, columns
        self._observed = [columns["obs/%d" % leaf] for leaf in range(nest.nb_leaves(template))] if columns else []

    # How entries come to be.

    def fitted(self, obs: Any, leaves: list[np.ndarray]) -> list[np.ndarray]:
        """An observation's leaves in the columns' dtypes. Raises ValueError where they are of another form."""
        if nest.template_of(obs) != self.template:
            raise ValueError(
                "observations must all be built like the first, %s, not %s" % (self.template, nest.template_of(obs))
            )
        return [_as_first("observation", leaf, ring) for leaf, ring in zip(leaves, self._observed, strict=True)]

    def fitted_action(self, action: np.ndarray) -> np.ndarray:
        """An action in its column's dtype. Raises ValueError where it is of another form."""
        return _as_first("action", action, self.columns["action"])

    def holds(self, number: int, leaves: list[np.ndarray]) -> bool:
        """Whether an entry is this observation.

        By bytes: NaN equals itself, and an array that the environment has changed since is not the one stored.
        """
        at = number % self.limit
        return all(ring[at].tobytes() == leaf.tobytes() for ring, leaf in zip(self._observed, leaves, strict=True))

    def enter(self, leaves: list[np.ndarray], previous: int) -> int:
        """A new entry with no step taken yet, in the place of the oldest."""
        number, rings = self.count, self.columns
        at = number % self.limit
        self.complete -= int(rings["step"][at])
        for ring, leaf in zip(self._observed, leaves, strict=True):
            ring[at] = leaf
        rings["previous"][at] = previous
        rings["following"][at] = -1
        for flag in ("step", "terminated", "truncated"):
            rings[flag][at] = False
        self.count += 1
        return number

    def make_step(self, number: int, action: np.ndarray, reward: float, terminated: bool, truncated: bool) -> None:
        at, rings = number % self.limit, self.columns
        rings["action"][at] = action
        rings["reward"][at] = reward
        rings["terminated"][at] = terminated
        rings["truncated"][at] = truncated
        rings["step"][at] = True
        self.complete += 1

    def previous(self, number: int) -> int:
        """The entry before it in its episode, -1 at the start."""
        return int(self.columns["previous"][number % self.limit])

    def link(self, number: int, following: int) -> None:
        """Says which entry follows a step."""
        self.columns["following"][number % self.limit] = following

    def truncate(self, number: int) -> None:
        """Marks a step as its episode's last, cut off."""
        self.columns["truncated"][number % self.limit] = True

    def unmake_step(self, number: int) -> None:
        """An entry that was a transition is none any more."""
        at = number % self.limit
        self.columns["step"][at], self.columns["following"][at] = False, -1
        self.complete -= 1

    # How they are read.

    def checked(self, numbers: Any) -> np.ndarray:
        """Numbers as an array. Raises ValueError where one is not there."""
        numbers = np.asarray(numbers, np.int64)
        missing = numbers[(numbers < self.oldest) | (numbers >= self.count)]
        if len(missing):
            raise ValueError("the ring holds entries %d to %d, not %d" % (self.oldest, self.count - 1, missing[0]))
        return numbers

    def are_steps(self, numbers: np.ndarray) -> np.ndarray:
        """Which of these entries are transitions, bool (n,)."""
        return self.columns["step"][numbers % self.limit] if len(numbers) else np.ones(0, bool)

    def steps(self) -> np.ndarray:
        """The numbers of all transitions, int64 (complete,), oldest first."""
        if not self.columns:
            return np.zeros(0, np.int64)
        places = np.flatnonzero(self.columns["step"])
        return np.sort(self.oldest + (places - self.oldest) % self.limit)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Numbers of transitions; those of other entries are thrown away and drawn again."""
        oldest, step = self.oldest, self.columns["step"]
        held = self.count - oldest
        if 16 * self.complete < held:  # nearly all entries are heads, or of dropped episodes
            return self.steps()[rng.integers(self.complete, size=n)]
        found = np.zeros(0, np.int64)
        while len(found) < n:
            tried = rng.integers(oldest, self.count, size=8 + (n - len(found)) * held * 17 // (16 * self.complete))
            found = np.concatenate([found, tried[step[tried % self.limit]]])
        return found[:n]

    def take(self, numbers: Any) -> dict[str, np.ndarray]:
        """Everything about these entries, copied: the columns by name, each (n, ...)."""
        places = self.checked(numbers) % self.limit
        return {name: np.take(column, places, axis=0) for name, column in self.columns.items()}

    def gather(self, numbers: np.ndarray, n_step: int, gamma: float) -> Transitions:
        """The transitions of these entries over up to n_step steps."""
        rings, at = self.columns, numbers % self.limit
        last, steps, reward = self._walk(numbers, n_step, gamma)
        end = last % self.limit
        terminated = rings["terminated"][end]
        # One read of both, because one block costs a fifth of two: the allocator gives the system two of 2.8 MB back
        # each time and pays for every page again (2,048 states of 339 floats: 0.5 instead of 2.7 ms).
        windows = self._windows(np.concatenate([numbers, rings["following"][end]]))
        return Transitions(
            state=[window[: len(numbers)] for window in windows],
            action=np.take(rings["action"], at, axis=0),
            reward=reward,
            next_state=[window[len(numbers) :] for window in windows],
            terminated=terminated,
            truncated=rings["truncated"][end],
            discount=np.where(terminated, 0.0, float(gamma) ** steps).astype(np.float32),
            steps=steps,
        )

    def _walk(self, numbers: np.ndarray, n_step: int, gamma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The last entry, the number of steps and the discounted reward of each row's way of up to n_step steps."""
        if n_step < 1:
            raise ValueError("n_step must be at least 1, not %r" % (n_step,))
        step, rewards, following = (self.columns[name] for name in ("step", "reward", "following"))
        last, steps = numbers, np.ones(len(numbers), np.int32)
        total = rewards[last % self.limit].astype(np.float64)
        for k in range(1, n_step):
            after = following[last % self.limit]
            goes_on = step[after % self.limit]  # an episode's last observation is no step: nothing runs past an end
            if not goes_on.any():
                break
            total += np.where(goes_on, float(gamma) ** k * rewards[after % self.limit], 0.0)
            last = np.where(goes_on, after, last)
            steps += goes_on
        return last, steps, total.astype(np.float32)

    def _windows(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The states that end in these entries, one array a leaf, (n, window_length, *leaf_shape)."""
        if self.window_length == 1:
            places = (numbers % self.limit)[:, None]
            return [np.take(ring, places, axis=0) for ring in self._observed]
        places = np.zeros((len(numbers), self.window_length), np.int64)
        missing = np.zeros(places.shape, bool)
        for frame in reversed(range(self.window_length)):
            missing[:, frame] = numbers < self.oldest  # before the episode's start (-1), or overwritten
            places[:, frame] = np.where(missing[:, frame], 0, numbers % self.limit)
            numbers = np.where(missing[:, frame], -1, self.columns["previous"][places[:, frame]])
        windows = [np.take(ring, places, axis=0) for ring in self._observed]
        for window in windows:
            window[missing] = 0
        return windows


def new_columns(limit: int, leaves: list[np.ndarray], action: np.ndarray) -> dict[str, np.ndarray]:
    """Rings for entries like these; zeros, because the system gives those without using memory before it is written."""
    columns = {"obs/%d" % index: leaf for index, leaf in enumerate(leaves)}
    columns.update({name: np.zeros((), dtype) for name, dtype in PLAIN_COLUMNS.items()}, action=action)
    if action.dtype.kind not in "biufc":
        raise ValueError("actions must be numbers or arrays of numbers of one shape, not %s" % action.dtype)
    return {name: np.zeros((limit, *like.shape), like.dtype) for name, like in columns.items()}


def _as_first(what: str, array: np.ndarray, ring: np.ndarray) -> np.ndarray:
    """The array in the ring's dtype."""
    if array.shape == ring.shape[1:]:
        if array.dtype == ring.dtype:
            return array
        if np.can_cast(array.dtype, ring.dtype, "same_kind"):
            return array.astype(ring.dtype)
    raise ValueError(
        "the first %s was %s %s, this one is %s %s" % (what, ring.dtype, ring.shape[1:], array.dtype, array.shape)
    )
