"""Replay from many interleaved environments, in numpy rings that hold each observation once.

An entry is one observation and, once the environment has answered, the action taken there and what came of it: a
transition. Its next observation is the next entry of the same stream, found by number, so that no neighbour in the ring
matters and time limits can bootstrap. The newest entry of a running episode is its head, no transition yet; that of an
episode that ended stays as its last observation. Those of a dropped episode stay as entries that are no transitions.

    memory = ReplayMemory(1_000_000)
    memory.add("slot 3", obs, action, reward, next_obs, terminated, truncated)
    batch = memory.draw(256, n_step=3, gamma=0.99)
    target = batch.reward + batch.discount * q(batch.next_state)
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rl.memory import Experience, Memory, SequentialMemory

from agents import nest

#: What keras-rl's memory gets as `terminal` at a time limit. Its one flag both ends an episode (any true value) and
#: stops bootstrapping; ours stops it only where the flag is exactly 1.
TRUNCATED = 2


@dataclass
class Transitions:
    """Sampled transitions, n of them, each over the `steps` steps that follow each other in its episode.

    Attributes:
        state, next_state: one array a leaf of the observation, each (n, window_length, *leaf_shape); zeros before the
            episode's start.
        action: (n, *action_shape), the first step's.
        reward: float32 (n,), the sum of gamma**k r_k over the steps.
        terminated: bool (n,), the task ended at the last step: do not bootstrap.
        truncated: bool (n,), it was cut off there.
        discount: float32 (n,), what the next state's value counts: gamma**steps, 0 where terminated.
        steps: int32 (n,), from 1 to the n_step asked for; fewer where the episode ended or goes no further yet.
    """

    state: list[np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    next_state: list[np.ndarray]
    terminated: np.ndarray
    truncated: np.ndarray
    discount: np.ndarray
    steps: np.ndarray


class ReplayMemory(Memory):
    """A ring of `limit` observations; entry number i, counted from the first ever, lies at i % limit.

    `add` and `draw` serve our agents; `append`, `sample` and `get_recent_state` are keras-rl's, for one environment.
    One thread may draw while another adds: each call holds `lock`, and who needs several calls to see one state holds
    it around them.
    """

    def __init__(self, limit: int, window_length: int = 1, seed: int | None = None, **kwargs: Any):
        """Allocates at the first transition, when shapes and dtypes are known; memory is used only as it fills.

        Args:
            limit: observations kept. An episode of T steps takes T + 1.
            window_length: observations of one episode that make a state.
            seed: of the draws.

        Raises:
            ValueError: a limit below 2 or a window below 1.
        """
        if limit < 2 or window_length < 1:
            raise ValueError(
                "limit must be at least 2 and window_length at least 1, not %r and %r" % (limit, window_length)
            )
        super().__init__(window_length=window_length, **kwargs)
        self.limit = int(limit)
        self.rng = np.random.default_rng(seed)
        self.lock = threading.RLock()
        self._count = 0  # entries ever begun
        self._complete = 0  # entries in the ring that are transitions
        self._rings: dict[str, np.ndarray] = {}
        self._observed: list[np.ndarray] = []  # those of the observation's leaves
        self._template: Any = None
        self._heads: dict[
            Hashable, int
        ] = {}  # the newest entry of each running episode; its `previous` is the last step
        self._saved = 0  # entries below were saved; those of them that changed since:
        self._altered: set[int] = set()
        self._pending: tuple[Any, Any, float, Any] | None = None  # keras-rl's append: waits for its next observation

    def __len__(self) -> int:
        """Transitions that can be drawn."""
        return self._complete

    @property
    def most(self) -> int:
        """Transitions that it can hold: the last observation of what runs or ran is an entry, too."""
        return self.limit - 1

    @property
    def nb_entries(self) -> int:
        """keras-rl's name for `len`."""
        return len(self)

    @property
    def count(self) -> int:
        """Entries ever begun; the ring holds the numbers from `oldest` to `count - 1`."""
        return self._count

    @property
    def oldest(self) -> int:
        """The smallest number that is still in the ring."""
        return max(0, self._count - self.limit)

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

        Where `obs` is not the stream's last `next_obs`, as when only every third step is stored, it gets an entry of
        its own: windows look past the gap, n-step returns end there.

        Args:
            stream: which environment; its episodes follow each other.
            obs, next_obs: observations of one structure, see `nest.flatten`.
            action: as it was sent.
            reward: of this step.
            terminated, truncated: the episode's end.

        Raises:
            ValueError: an observation or action of another structure, shape or kind of number than the first one;
                nothing was stored.
        """
        here, there, action = nest.flatten(obs), nest.flatten(next_obs), np.asarray(action)
        with self.lock:
            if not self._rings:
                self._install(nest.template_of(obs), _new_rings(self.limit, here, action))
            here, there = self._fitted(obs, here), self._fitted(next_obs, there)
            action = _as_first("action", action, self._rings["action"])
            number = self._begin(stream, here)
            self._complete_entry(number, action, reward, terminated, truncated)
            head = self._enter(there, number)
            self._rings["following"][number % self.limit] = head
            if terminated or truncated:
                self._heads.pop(stream, None)
            else:
                self._heads[stream] = head

    def cut(self, stream: Hashable) -> None:
        """The stream's episode ended without a transition (a lost slot, Ctrl-C): the last one it has is truncated."""
        with self.lock:
            head = self._heads.pop(stream, None)
            if head is not None:
                self._truncate_before(head)

    def drop(self, stream: Hashable) -> int:
        """The stream's episode ended and counts for nothing: none of its transitions is drawn any more.

        They keep their places in the ring until newer ones take them, so the ring holds that much less meanwhile. O(T)
        for an episode of T steps.

        Returns:
            How many they were.
        """
        with self.lock:
            head = self._heads.pop(stream, None)
            steps, rings = 0, self._rings
            number = -1 if head is None or head < self.oldest else int(rings["previous"][head % self.limit])
            while number >= self.oldest:
                at = number % self.limit
                rings["step"][at], rings["following"][at] = False, -1
                self._note_change(number)
                number = int(rings["previous"][at])
                steps += 1
            self._complete -= steps
            return steps

    def cut_all(self) -> None:
        """Every running episode ended without a transition."""
        with self.lock:
            for stream in list(self._heads):
                self.cut(stream)

    def draw(self, n: int, n_step: int = 1, gamma: float = 1.0) -> Transitions:
        """n transitions, uniformly with replacement.

        Args:
            n: rows.
            n_step: steps that a row sums, as far as they are there.
            gamma: the discount of one step.

        Raises:
            ValueError: the memory is empty, or n_step is below 1.
        """
        with self.lock:
            if not len(self):
                raise ValueError("the memory is empty")
            return self._gather(self._draw_numbers(n), n_step, gamma)

    def gather(self, numbers: Any, n_step: int = 1, gamma: float = 1.0) -> Transitions:
        """The transitions of these entries, in one vectorised read.

        Raises:
            ValueError: a number that is in the ring no more or no transition (`transitions` gives those that are), or
                an n_step below 1.
        """
        with self.lock:
            numbers = self._in_ring(numbers)
            whole = self._rings["step"][numbers % self.limit] if len(numbers) else np.ones(0, bool)
            if not whole.all():
                raise ValueError("entry %d is no transition; `transitions` gives those that are" % numbers[~whole][0])
            return self._gather(numbers, n_step, gamma)

    def transitions(self) -> np.ndarray:
        """The numbers of all complete transitions in the ring, int64 (len(self),), oldest observation first."""
        with self.lock:
            if not self._rings:
                return np.zeros(0, np.int64)
            places = np.flatnonzero(self._rings["step"])
            return np.sort(self.oldest + (places - self.oldest) % self.limit)

    # How entries come to be.

    def _install(self, template: Any, rings: dict[str, np.ndarray]) -> None:
        self._template, self._rings = template, rings
        self._observed = [rings["obs/%d" % leaf] for leaf in range(nest.nb_leaves(template))] if rings else []

    def _fitted(self, obs: Any, leaves: list[np.ndarray]) -> list[np.ndarray]:
        if nest.template_of(obs) != self._template:
            raise ValueError(
                "observations must all be built like the first, %s, not %s" % (self._template, nest.template_of(obs))
            )
        return [_as_first("observation", leaf, ring) for leaf, ring in zip(leaves, self._observed, strict=True)]

    def _begin(self, stream: Hashable, leaves: list[np.ndarray]) -> int:
        """The entry of this observation: the stream's head, or a new one."""
        head = self._heads.get(stream)
        if head is None or head + self.limit <= self._count:  # none, or the entry that comes next would take its place
            return self._enter(leaves, -1)
        at = head % self.limit
        # By bytes: NaN equals itself, and an array that the environment has changed since is not the one stored.
        if all(ring[at].tobytes() == leaf.tobytes() for ring, leaf in zip(self._observed, leaves, strict=True)):
            return head
        return self._enter(leaves, int(self._rings["previous"][at]))

    def _enter(self, leaves: list[np.ndarray], previous: int) -> int:
        """A new entry with no step taken yet, in the place of the oldest."""
        number, rings = self._count, self._rings
        at = number % self.limit
        self._complete -= int(rings["step"][at])
        for ring, leaf in zip(self._observed, leaves, strict=True):
            ring[at] = leaf
        rings["previous"][at] = previous
        rings["following"][at] = -1
        for flag in ("step", "terminated", "truncated"):
            rings[flag][at] = False
        self._count += 1
        return number

    def _complete_entry(
        self, number: int, action: np.ndarray, reward: float, terminated: bool, truncated: bool
    ) -> None:
        at, rings = number % self.limit, self._rings
        rings["action"][at] = action
        rings["reward"][at] = reward
        rings["terminated"][at] = terminated
        rings["truncated"][at] = truncated
        rings["step"][at] = True
        self._complete += 1
        self._note_change(number)

    def _truncate_before(self, head: int) -> None:
        """Marks the last step of the episode that this entry heads, where both are still in the ring."""
        last = int(self._rings["previous"][head % self.limit]) if head >= self.oldest else -1
        if last >= self.oldest:
            self._rings["truncated"][last % self.limit] = True
            self._note_change(last)

    def _note_change(self, number: int) -> None:
        if number < self._saved:
            self._altered.add(number)

    # How they are read.

    def _in_ring(self, numbers: Any) -> np.ndarray:
        numbers = np.asarray(numbers, np.int64)
        missing = numbers[(numbers < self.oldest) | (numbers >= self._count)]
        if len(missing):
            raise ValueError("the ring holds entries %d to %d, not %d" % (self.oldest, self._count - 1, missing[0]))
        return numbers

    def _draw_numbers(self, n: int) -> np.ndarray:
        """Numbers of transitions; those of other entries are thrown away and drawn again."""
        oldest, step = self.oldest, self._rings["step"]
        held = self._count - oldest
        if 16 * self._complete < held:  # nearly all entries are heads, or of dropped episodes
            return self.transitions()[self.rng.integers(self._complete, size=n)]
        found = np.zeros(0, np.int64)
        while len(found) < n:
            tried = self.rng.integers(
                oldest, self._count, size=8 + (n - len(found)) * held * 17 // (16 * self._complete)
            )
            found = np.concatenate([found, tried[step[tried % self.limit]]])
        return found[:n]

    def _gather(self, numbers: np.ndarray, n_step: int, gamma: float) -> Transitions:
        rings, at = self._rings, numbers % self.limit
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
        step, rewards, following = (self._rings[name] for name in ("step", "reward", "following"))
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
            numbers = np.where(missing[:, frame], -1, self._rings["previous"][places[:, frame]])
        windows = [np.take(ring, places, axis=0) for ring in self._observed]
        for window in windows:
            window[missing] = 0
        return windows

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
        return [nest.unflatten(self._template, [window[row, frame] for window in windows]) for frame in frames]

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

    # Checkpoints: what changed since the last one, as columns by entry number.

    def columns(self, numbers: Any) -> dict[str, np.ndarray]:
        """Everything about these entries, copied.

        Args:
            numbers: of entries in the ring, int (n,).

        Returns:
            Arrays with n rows: "obs/0", "obs/1", ... one a leaf, "action", "reward" float32, "previous" and
            "following" int64 (numbers of the same episode, -1: none), "step" (it is a complete transition),
            "terminated" and "truncated" bool. Where "step" is false, action and reward mean nothing. Empty before
            the first transition.

        Raises:
            ValueError: a number that is not in the ring.
        """
        with self.lock:
            places = self._in_ring(numbers) % self.limit
            return {name: np.take(ring, places, axis=0) for name, ring in self._rings.items()}

    def changed(self, since: int) -> np.ndarray:
        """The numbers in the ring from `since` on, and those altered after the last `mark_saved`; int64, sorted.

        A save is one hold of `lock` around `changed`, `columns`, `meta` and `mark_saved`; `since` is the `count` of the
        save before, 0 for a whole one.
        """
        with self.lock:
            old = [number for number in self._altered if self.oldest <= number < since]
            new = np.arange(max(since, self.oldest), self._count, dtype=np.int64)
            return np.concatenate([np.array(sorted(old), np.int64), new])

    def mark_saved(self) -> None:
        """All that is there now is saved; where writing it fails after all, the next save must be a whole one."""
        with self.lock:
            self._saved = self._count
            self._altered.clear()

    def meta(self) -> dict[str, Any]:
        """What `restore` needs besides the columns, for JSON: sizes, structure, running episodes, the draws' state."""
        with self.lock:
            return {
                "limit": self.limit,
                "window_length": self.window_length,
                "count": self._count,
                "template": self._template,
                "columns": {name: [ring.dtype.str, list(ring.shape[1:])] for name, ring in self._rings.items()},
                "heads": sorted(self._heads.values()),
                "rng": self.rng.bit_generator.state,
            }

    def restore(self, meta: Mapping[str, Any], parts: Iterable[tuple[Any, Mapping[str, np.ndarray]]]) -> None:
        """Becomes the memory that was saved; its running episodes are over, as after `cut_all`.

        The next save may go on from there: `changed(count)` gives what the end of those episodes altered.

        Args:
            meta: what `meta` gave at the last save.
            parts: (numbers, columns) of each save in order, read one by one; a later part overrides an earlier one,
                entries that were overwritten before the last save are passed over.

        Raises:
            ValueError: it is of a memory of another limit or window, or damaged; nothing was changed. Errors in
                reading `parts` pass through, and nothing was changed either.
        """
        self._check_sizes(meta)
        count, template, rings, heads, rng = _read_meta(meta)
        oldest, given = max(0, count - self.limit), np.zeros(self.limit, bool)
        for part in parts:
            numbers, columns = _read_part(part, rings, count)
            kept = numbers >= oldest
            for name, ring in rings.items():
                ring[numbers[kept] % self.limit] = columns[name][kept]
            given[numbers[kept] % self.limit] = True
        _check_links(rings, np.arange(oldest, count), given)
        with self.lock:
            self._count, self.rng = count, rng
            self._install(template, rings)
            self._complete = int(np.count_nonzero(rings["step"])) if rings else 0
            self._heads.clear()
            self._pending = None
            self.mark_saved()
            for head in heads:
                self._truncate_before(head)

    def _check_sizes(self, meta: Mapping[str, Any]) -> None:
        try:
            limit, window = int(meta["limit"]), int(meta["window_length"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged("%r in its description" % (error,)) from None
        if limit != self.limit:
            raise ValueError("the checkpoint's replay holds %d transitions, this agent's %d" % (limit, self.limit))
        if window != self.window_length:
            raise ValueError(
                "the checkpoint's replay stacks %d observations, this agent's %d" % (window, self.window_length)
            )


#: The columns that are the same for all observations and actions.
PLAIN_COLUMNS = {
    "reward": np.float32,
    "terminated": np.bool_,
    "truncated": np.bool_,
    "previous": np.int64,
    "following": np.int64,
    "step": np.bool_,
}


def _new_rings(limit: int, leaves: list[np.ndarray], action: np.ndarray) -> dict[str, np.ndarray]:
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


def _damaged(what: str) -> ValueError:
    return ValueError("the checkpoint's replay is damaged: " + what)


def _read_meta(
    meta: Mapping[str, Any],
) -> tuple[int, Any, dict[str, np.ndarray], list[int], np.random.Generator]:
    """Count, template, empty rings, heads and random generator of a description whose sizes are checked."""
    try:
        count, template, columns = int(meta["count"]), meta["template"], meta["columns"]
        heads = [int(head) for head in meta["heads"]]
        rng = np.random.Generator(np.random.PCG64())
        rng.bit_generator.state = meta["rng"]
        rings = _rings_like(int(meta["limit"]), template, columns) if columns else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged("%r in its description" % (error,)) from None
    if count < 0 or any(not 0 <= head < count for head in heads):
        raise _damaged("%d entries and running episodes at %s" % (count, heads))
    return count, template, rings, heads, rng


def _rings_like(limit: int, template: Any, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    like = {name: np.empty(tuple(shape), np.dtype(kind)) for name, (kind, shape) in columns.items()}
    rings = _new_rings(limit, [like["obs/%d" % leaf] for leaf in range(nest.nb_leaves(template))], like["action"])
    if {name: (ring.dtype, ring.shape[1:]) for name, ring in rings.items()} != {
        name: (array.dtype, array.shape) for name, array in like.items()
    }:
        raise ValueError("columns %s" % dict(columns))
    return rings


def _read_part(part: tuple[Any, Mapping[str, np.ndarray]], rings: dict[str, np.ndarray], count: int) -> tuple[Any, Any]:
    """A part's numbers and columns, as arrays that fit the rings."""
    numbers, given = np.asarray(part[0]), part[1]
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise _damaged("entry numbers of %s %s" % (numbers.dtype, numbers.shape))
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < count):
        raise _damaged("entries %d to %d of %d" % (numbers.min(), numbers.max(), count))
    columns = {}
    for name, ring in rings.items():
        if name not in given:
            raise _damaged("no column %r" % name)
        columns[name] = column = np.asarray(given[name])
        if (column.dtype, column.shape) != (ring.dtype, (len(numbers), *ring.shape[1:])):
            wanted = (ring.dtype, (len(numbers), *ring.shape[1:]))
            raise _damaged("column %r is %s %s instead of %s %s" % (name, column.dtype, column.shape, *wanted))
    return numbers.astype(np.int64), columns


def _check_links(rings: dict[str, np.ndarray], numbers: np.ndarray, given: np.ndarray) -> None:
    """Every entry is there, and points back to an earlier and on to a later one."""
    at = numbers % len(given)
    if not given[at].all():
        raise _damaged("entry %d is missing" % numbers[~given[at]][0])
    if not len(numbers):
        return
    previous, following, step = (rings[name][at] for name in ("previous", "following", "step"))
    wrong = (previous < -1) | (previous >= numbers) | (following > numbers[-1])
    wrong |= np.where(step, following <= numbers, following != -1)
    if wrong.any():
        raise _damaged("entry %d is linked to %d and %d" % (numbers[wrong][0], previous[wrong][0], following[wrong][0]))


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
                raise ValueError(_one_environment_only(self.memory, 2))
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
        "  now: %s" % (nb_slots, _ours(memory))
    )


def _ours(memory: SequentialMemory) -> str:
    return "memory=agents.ReplayMemory(limit=%d, window_length=%d)" % (memory.limit, memory.window_length)
