"""Actions and results of one environment: arrays on this side, bytes on the way.

values = Values("Pendulum-v1", observation_space, action_space)
bodies = values.actions(actions, slots, repeat=1)     # checked, one body for each slot
value = values.transition(body)                       # None where only the general way can say what it is

The steps of an environment mostly have one and the same header, so all actions of a batch are checked and written at
once, and a result is read without its header; whatever is not of that kind goes the general way.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from wire import codec
from wire.errors import BadAction

MOST_FORMS = 16  #: headers that are remembered; a farm that goes on inventing them must not fill the memory

_TWO_DOUBLES = struct.Struct("<dd")  # the reward and the seconds, after the observation


class Values:
    """For one thread at a time."""

    def __init__(
        self, env: str, observation_space: gymnasium.Space[Any] | None, action_space: gymnasium.Space[Any] | None
    ):
        self._env, self._action_space, self._observation_space = env, action_space, observation_space
        self._action_forms: dict[int, codec.Form] = {}  # by repeat
        self._result_forms: dict[bytes, tuple[codec.Form, Any, Any, bool, bool]] = {}  # by front

    # Actions.

    def actions(self, actions: Sequence[Any], slots: Sequence[int], repeat: int) -> list[bytes]:
        """The body of a STEP for each slot.

        Raises:
            BadAction: a wrong shape or dtype, or NaN.
        """
        bodies = self._all_at_once(actions, repeat)
        if bodies is not None:
            return bodies
        each = zip(actions, slots, strict=True)
        return [codec.encode({"action": self._checked(action, slot), "repeat": repeat}) for action, slot in each]

    def _all_at_once(self, actions: Sequence[Any], repeat: int) -> list[bytes] | None:
        """None where one of them is no good, or the space is no Box: they are looked at one by one then."""
        space = self._action_space
        if not isinstance(space, gymnasium.spaces.Box):
            return None
        try:
            array = np.asarray(actions, space.dtype)
        except (TypeError, ValueError):
            return None
        if array.shape != (len(actions), *space.shape) or not array.size or not _is_finite(array):
            return None
        form = self._action_forms.get(repeat)
        if form is None:
            form = codec.Form(codec.encode({"action": array[0], "repeat": repeat}))
            if len(self._action_forms) < MOST_FORMS:
                self._action_forms[repeat] = form
        raw, size = array.tobytes(), array.nbytes // len(array)
        return [form.encode(raw[at : at + size]) for at in range(0, len(raw), size)]

    def _checked(self, action: Any, slot: int) -> Any:
        space = self._action_space
        if isinstance(space, gymnasium.spaces.Box):
            try:
                array = np.asarray(action, dtype=space.dtype)
            except (TypeError, ValueError) as error:
                raise BadAction("the action for slot %d is no array: %s" % (slot, error)) from None
            if array.shape != space.shape:
                raise BadAction(
                    "the action for slot %d has shape %s; %s wants %s" % (slot, array.shape, self._env, space.shape)
                )
            if not _is_finite(array):
                raise BadAction("the action for slot %d is not finite: %s" % (slot, array))
            return array
        if space is not None and not space.contains(action):
            raise BadAction("the action for slot %d, %r, is not in %s" % (slot, action, space))
        return action

    # Results.

    def transition(self, body: bytes, crc: int | None = None) -> tuple[Any, ...] | None:
        """A sound TRANSITION like one that was seen before, decoded; None says nothing about the body.

        Args: as of `codec.decode`.
        """
        known = self._result_forms.get(codec.front_of(body))
        if known is None:
            return None
        form, shape, dtype, terminated, truncated = known
        start = form.start_in(body, crc)
        if start is None:
            return None
        obs: np.ndarray = np.ndarray(shape, dtype, body, start).copy()
        reward, seconds = _TWO_DOUBLES.unpack_from(body, len(body) - _TWO_DOUBLES.size)
        if not (math.isfinite(reward) and math.isfinite(seconds)):
            return None
        few = dtype.str == "<f4" and obs.size <= codec.FEW_FLOATS
        if not (few and codec.surely_finite(body[start : -_TWO_DOUBLES.size])) and not _is_finite(obs):
            return None
        return obs, reward, terminated, truncated, {}, seconds

    def remember(self, body: bytes, value: tuple[Any, ...]) -> None:
        """A sound TRANSITION that was decoded in the general way: the next ones may be like it."""
        obs, reward, terminated, truncated, info, seconds = value
        plain = type(obs) is np.ndarray and obs.dtype.kind in "biuf" and type(info) is dict and not info
        numbers = type(reward) is np.float64 and type(seconds) is np.float64
        if plain and numbers and type(terminated) is type(truncated) is bool and len(self._result_forms) < MOST_FORMS:
            form = codec.Form(body)
            self._result_forms[form.front] = (form, obs.shape, obs.dtype, terminated, truncated)

    def stacked(self, observations: list[Any]) -> Any:
        """Observations as one array; as they are where the space is no Box, or one has another shape."""
        space = self._observation_space
        if not isinstance(space, gymnasium.spaces.Box):
            return observations
        full = [np.zeros(space.shape, space.dtype) if obs is None else obs for obs in observations]
        if all(type(obs) is np.ndarray and obs.dtype == space.dtype and obs.shape == space.shape for obs in full):
            out = np.empty((len(full), *space.shape), space.dtype)
            for row, obs in enumerate(full):
                out[row] = obs
            return out
        if any(np.shape(obs) != np.shape(full[0]) for obs in full):
            return full
        return np.stack(full)


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or b"\0" not in np.isfinite(array).tobytes()  # `all` would run through Python
