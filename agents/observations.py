"""Observations on their way to the networks: checked, in the networks' order, windowed, normalised."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import rl.core
import rl.processors

from agents import nest
from agents.scaling import RunningNorm, Statistics, is_wide


class Observations:
    """Of one agent.

    Attributes:
        window_length: observations of one episode that make a state.
        normalize: whether to; None leaves it to the space (`is_wide`).
        norm: running statistics, None without normalisation.
        statistics: what the networks' program takes of it.
    """

    def __init__(
        self,
        inputs: Callable[[], Sequence[Any]],
        window_length: int,
        normalize: bool | None,
        processor: Callable[[], Any],
    ):
        """Knows nothing of the environment yet.

        Args:
            inputs: gives the actor's inputs, (None, window_length, *shape) each.
            window_length: as above.
            normalize: as above.
            processor: gives keras-rl's processor, or None.
        """
        self._inputs_of_actor, self._processor = inputs, processor
        self.window_length, self.normalize = window_length, normalize
        self.norm: RunningNorm | None = None
        self.statistics: Statistics = []
        self._saved_norm: dict[str, np.ndarray] | None = None  # loaded before the environment was known
        self._space: Any = None  # where an environment has told it
        self._sound: set[Any] = set()  # forms of observations that the actor takes
        self._order: list[int] | None = None  # of an observation's leaves, as the networks take them

    def prepare(self, space: Any) -> None:
        """Takes the environment's space.

        Raises:
            ValueError: the actor takes something else.
        """
        self._space, self._sound = space, set()
        self._order = _leaf_order(space, [x.name for x in self._inputs_of_actor()])
        boxes = _boxes(space)
        processor = self._processor()
        if processor is None and boxes is not None:
            self._check_inputs([boxes[i].shape for i in self._order] if self._order else [b.shape for b in boxes])
        wanted = self.normalize
        if wanted is None:
            wanted = processor is None and is_wide(space)
        if not wanted:
            self.norm, self.statistics = None, []
        elif self.norm is None:
            shapes = [tuple(x.shape[2:]) for x in self._inputs_of_actor()]
            if processor is None and boxes is not None and len(boxes) == len(shapes):  # an input's may be open
                shapes = [tuple(boxes[i].shape) for i in self._order or range(len(boxes))]
            self.norm = RunningNorm(shapes)
            if self._saved_norm is not None:
                self.norm.load_state(self._saved_norm)
            self.statistics = self.norm.statistics()

    def _check_inputs(self, shapes: list[tuple[int, ...]]) -> None:
        taken = [tuple(x.shape[1:]) for x in self._inputs_of_actor()]
        if len(taken) != len(shapes):
            if len(taken) == 1:
                return  # a nest of equal parts may be one array to the network; its call says if not
            raise ValueError(f"the actor has {len(taken)} inputs, an observation {len(shapes)} parts")
        for mine, shape in zip(taken, shapes, strict=True):
            wanted = (self.window_length, *shape)
            if len(mine) != len(wanted) or any(m not in (None, w) for m, w in zip(mine, wanted, strict=True)):
                raise ValueError(
                    f"the actor takes {mine}, the environment gives {wanted}"
                    f" (window_length {self.window_length} first)\n"
                    "  now: build it with that input"
                )

    def check(self, obs: Any) -> None:
        """Raises ValueError for an observation of another shape than the actor takes."""
        form = obs.shape if isinstance(obs, np.ndarray) else None
        if form in self._sound or self._processes_states:  # what a processor makes of states is its own affair
            return
        leaves = [obs] if form is not None else nest.flatten(obs)
        try:
            inputs = [x.shape[2:] for x in self._ordered([np.asarray(leaf)[None, None] for leaf in leaves])]
        except (ValueError, IndexError):  # parts that do not stack, or fewer than the actor has inputs
            inputs = []
        given = [(self.window_length, *shape) for shape in inputs]
        taken = [tuple(x.shape[1:]) for x in self._inputs_of_actor()]
        if len(given) != len(taken) or not all(map(_is_taken, given, taken)):
            told = "" if self._space is None else f"\n  the environment's observation_space is {self._space}"
            raise ValueError(
                f"an observation of shape {_in_words([np.shape(x) for x in leaves])} ({_in_words(given)} with"
                f" window_length {self.window_length} first) does not fit the actor, which takes"
                f" {_in_words(taken)}{told}"
            )
        if form is not None:
            self._sound.add(form)

    def observe(self, observations: list[Any]) -> None:
        """Takes new observations into the statistics."""
        if self.norm is None:
            return
        leaves = self.inputs([[obs] for obs in observations])
        self.norm.update([x[:, 0] for x in leaves])
        self.statistics = self.norm.statistics()

    def inputs(self, states: list[list[Any]]) -> list[np.ndarray]:
        """n states (lists of observations) as the networks' observation inputs, float32 (n, window_length, ...)."""
        if self._processes_states:
            return _as_inputs(self._processor().process_state_batch(_batch_of(states)))
        if isinstance(states[0][0], np.ndarray):
            return [np.asarray(states, np.float32)]
        parts = [[nest.flatten(obs) for obs in state] for state in states]
        leaves = [
            np.asarray([[obs[i] for obs in state] for state in parts], np.float32) for i in range(len(parts[0][0]))
        ]
        return self._ordered(leaves)

    def from_replay(self, leaves: list[np.ndarray], template: Any) -> list[np.ndarray]:
        """The same from replay, whose leaves are (n, window_length, ...), of observations of the form `template`."""
        if not self._processes_states:
            return self._ordered([np.asarray(x, np.float32) for x in leaves])
        process = self._processor().process_state_batch
        if len(leaves) == 1:
            return _as_inputs(process(leaves[0]))
        n, window = leaves[0].shape[:2]
        states = [[nest.unflatten(template, [x[i, w] for x in leaves]) for w in range(window)] for i in range(n)]
        return _as_inputs(process(states))

    @property
    def _processes_states(self) -> bool:
        """Whether the processor changes states; keras-rl's MultiInputProcessor only takes them apart, as we do."""
        processor = self._processor()
        if processor is None:
            return False
        kind = type(processor).process_state_batch
        return kind not in (
            rl.core.Processor.process_state_batch,
            rl.processors.MultiInputProcessor.process_state_batch,
        )

    def _ordered(self, leaves: list[np.ndarray]) -> list[np.ndarray]:
        inputs = self._inputs_of_actor()
        if len(leaves) > 1 and len(inputs) == 1:  # parts of one form for a network with one input
            return [np.stack(leaves, axis=2)]
        if len(leaves) == 1 and len(inputs) > 1:  # a list of equal arrays that came as one
            return [leaves[0][:, :, i] for i in range(len(inputs))]
        return leaves if self._order is None else [leaves[i] for i in self._order]

    # Statistics as plain arrays, for checkpoints and weights.

    def state(self) -> dict[str, np.ndarray]:
        """The statistics; empty without normalisation."""
        return dict((self._saved_norm if self.norm is None else self.norm.state()) or {})

    def check_state(self, state: dict[str, np.ndarray]) -> None:
        """Raises ValueError when these are of observations of another shape."""
        if self.norm is not None:
            copy.deepcopy(self.norm).load_state(state)

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes what `state` gave; before the environment is known, too."""
        self._saved_norm = state
        if self.norm is None and self.normalize is not False:  # `forward` needs no environment
            shapes = [state[f"mean/{i}"].shape for i in range(len(self._inputs_of_actor()))]
            self.norm = RunningNorm(shapes)
        if self.norm is not None:
            self.norm.load_state(state)
            self.statistics = self.norm.statistics()


def _is_taken(given: tuple[int, ...], taken: tuple[int | None, ...]) -> bool:
    """Whether Keras takes an array of this shape for that input: a last axis of one may be missing, or be too many."""
    if len(given) == len(taken) + 1 and given[-1] == 1:
        given = given[:-1]
    elif len(given) == len(taken) - 1 and taken[-1] == 1:
        given = (*given, 1)
    return len(given) == len(taken) and all(t in (None, g) for g, t in zip(given, taken, strict=True))


def _in_words(shapes: list[Any]) -> str:
    return " and ".join(map(str, shapes))


def _as_inputs(batch: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.float32) for x in (batch if isinstance(batch, list) else [batch])]


def _batch_of(states: list[list[Any]]) -> Any:
    """As keras-rl hands states to a processor: an array where observations are arrays, else as they are."""
    return np.asarray(states) if isinstance(states[0][0], np.ndarray) else states


def _boxes(space: Any) -> list[Any] | None:
    """The Boxes of an observation's leaves in the order of `nest.flatten`; None where there is something else."""
    if isinstance(space, gymnasium.spaces.Dict):
        parts = [_boxes(space[key]) for key in sorted(space.spaces)]
    elif isinstance(space, gymnasium.spaces.Tuple):
        parts = [_boxes(part) for part in space.spaces]
    else:
        return [space] if getattr(space, "shape", None) is not None else None
    return None if any(part is None for part in parts) else [box for part in parts for box in part or []]


def _leaf_order(space: Any, names: list[str]) -> list[int] | None:
    """Where a Dict's keys are the names of the network's inputs, the places of its leaves in their order."""
    if not isinstance(space, gymnasium.spaces.Dict) or set(space.spaces) != set(names):
        return None
    return [sorted(space.spaces).index(name) for name in names]
