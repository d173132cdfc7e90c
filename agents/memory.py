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
from typing import Any

import numpy as np

from agents import nest, replay_state
from agents.keras_rl.memory import KerasRLMemory
from agents.ring import Ring, new_columns
from agents.transitions import TRUNCATED, Transitions

__all__ = ["TRUNCATED", "ReplayMemory", "Transitions"]


class ReplayMemory(KerasRLMemory):
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
        self._ring = Ring(self.limit, window_length)
        # The newest entry of each running episode; its `previous` is the last step.
        self._heads: dict[Hashable, int] = {}
        self._saved = 0  # entries below were saved; those of them that changed since:
        self._altered: set[int] = set()

    def __len__(self) -> int:
        """Transitions that can be drawn."""
        return self._ring.complete

    @property
    def most(self) -> int:
        """Transitions that it can hold: the last observation of what runs or ran is an entry, too."""
        return self.limit - 1

    @property
    def count(self) -> int:
        """Entries ever begun; the ring holds the numbers from `oldest` to `count - 1`."""
        return self._ring.count

    @property
    def oldest(self) -> int:
        """The smallest number that is still in the ring."""
        return self._ring.oldest

    @property
    def template(self) -> Any:
        """The structure of an observation, see `nest.template_of`; None before the first."""
        return self._ring.template

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
            ring = self._ring
            if not ring.columns:
                ring.install(nest.template_of(obs), new_columns(self.limit, here, action))
            here, there = ring.fitted(obs, here), ring.fitted(next_obs, there)
            action = ring.fitted_action(action)
            number = self._begin(stream, here)
            ring.make_step(number, action, reward, terminated, truncated)
            self._note_change(number)
            head = ring.enter(there, number)
            ring.link(number, head)
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
            steps, ring = 0, self._ring
            number = -1 if head is None or head < self.oldest else ring.previous(head)
            while number >= self.oldest:
                ring.unmake_step(number)
                self._note_change(number)
                number = ring.previous(number)
                steps += 1
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
            return self._ring.gather(self._ring.draw(self.rng, n), n_step, gamma)

    def gather(self, numbers: Any, n_step: int = 1, gamma: float = 1.0) -> Transitions:
        """The transitions of these entries, in one vectorised read.

        Raises:
            ValueError: a number that is in the ring no more or no transition (`transitions` gives those that are), or
                an n_step below 1.
        """
        with self.lock:
            numbers = self._ring.checked(numbers)
            whole = self._ring.are_steps(numbers)
            if not whole.all():
                raise ValueError("entry %d is no transition; `transitions` gives those that are" % numbers[~whole][0])
            return self._ring.gather(numbers, n_step, gamma)

    def transitions(self) -> np.ndarray:
        """The numbers of all complete transitions in the ring, int64 (len(self),), oldest observation first."""
        with self.lock:
            return self._ring.steps()

    def _begin(self, stream: Hashable, leaves: list[np.ndarray]) -> int:
        """The entry of this observation: the stream's head, or a new one."""
        head = self._heads.get(stream)
        if head is None or head + self.limit <= self.count:  # none, or the entry that comes next would take its place
            return self._ring.enter(leaves, -1)
        return head if self._ring.holds(head, leaves) else self._ring.enter(leaves, self._ring.previous(head))

    def _truncate_before(self, head: int) -> None:
        """Marks the last step of the episode that this entry heads, where both are still in the ring."""
        last = self._ring.previous(head) if head >= self.oldest else -1
        if last >= self.oldest:
            self._ring.truncate(last)
            self._note_change(last)

    def _note_change(self, number: int) -> None:
        if number < self._saved:
            self._altered.add(number)

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
            return self._ring.take(numbers)

    def changed(self, since: int) -> np.ndarray:
        """The numbers in the ring from `since` on, and those altered after the last `mark_saved`; int64, sorted.

        A save is one hold of `lock` around `changed`, `columns`, `meta` and `mark_saved`; `since` is the `count` of the
        save before, 0 for a whole one.
        """
        with self.lock:
            old = [number for number in self._altered if self.oldest <= number < since]
            new = np.arange(max(since, self.oldest), self.count, dtype=np.int64)
            return np.concatenate([np.array(sorted(old), np.int64), new])

    def mark_saved(self) -> None:
        """All that is there now is saved; where writing it fails after all, the next save must be a whole one."""
        with self.lock:
            self._saved = self.count
            self._altered.clear()

    def meta(self) -> dict[str, Any]:
        """What `restore` needs besides the columns, for JSON: sizes, structure, running episodes, the draws' state."""
        with self.lock:
            return replay_state.describe(self._ring, self._heads.values(), self.rng)

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
        found = replay_state.restored(meta, parts, self.limit, self.window_length)
        with self.lock:
            self._ring, self.rng = found.ring, found.rng
            self._heads.clear()
            self._pending = None
            self.mark_saved()
            for head in found.heads:
                self._truncate_before(head)
