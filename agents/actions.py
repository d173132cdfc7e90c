"""Actions between an agent and its environment: their bounds, and the scaling to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import rl.core

from agents.scaling import ActionScale


class Actions:
    """Of one agent.

    Attributes:
        nb_actions: components of an action.
        scales: whether the agent works in [-1, 1] and its actions are scaled to the environment's bounds.
        low, high: the environment's bounds, (nb_actions,); None where they are not known, or where a processor maps
            actions: what it makes of one is clipped where it is sent.
    """

    def __init__(self, nb_actions: int, scale: bool, bounded: bool, processor: Callable[[], Any]):
        """Knows no bounds yet.

        Args:
            nb_actions: as above.
            scale: whether the agent works in [-1, 1].
            bounded: whether the agent needs bounds in any case.
            processor: gives keras-rl's processor, or None.
        """
        self.nb_actions = nb_actions
        self.low: np.ndarray | None = None
        self.high: np.ndarray | None = None
        self._wanted, self._bounded, self._processor = scale, bounded, processor
        self._scale: ActionScale | None = None

    def check(self, space: Any, agent: str) -> None:
        """Raises ValueError when the agent's actions cannot be those of the space; `agent` is its name."""
        # keras-rl cares for the space only where actions are scaled to it or clipped by it.
        fits = hasattr(space, "low") or (not self._bounded and (self.maps or (space is None and not self._wanted)))
        if not fits:
            raise ValueError(f"{agent} wants a Box of actions; this environment has {space!r}")
        if not self.maps and space is not None and self.nb_actions != int(np.prod(space.shape)):
            taken = np.prod(space.shape)
            raise ValueError(
                f"the actor gives {self.nb_actions} actions, the environment takes {taken} ({space})\n"
                f"  now: build the networks with nb_actions={taken}"
            )

    def prepare(self, space: Any) -> None:
        """Takes the environment's bounds."""
        if self.scales:
            self._scale = ActionScale(space.low, space.high)
        self.low, self.high = (None, None)
        if not self.maps and space is not None:
            self.low, self.high = np.ravel(space.low), np.ravel(space.high)

    @property
    def maps(self) -> bool:
        """Whether a processor maps actions."""
        processor = self._processor()
        return processor is not None and type(processor).process_action is not rl.core.Processor.process_action

    @property
    def scales(self) -> bool:
        """A processor that maps actions scales them itself."""
        return self._wanted and not self.maps

    def clipped(self, output: np.ndarray) -> np.ndarray:
        """Within [-1, 1], or within the bounds where actions are not scaled."""
        if self.scales:
            return np.clip(output, -1.0, 1.0)
        return output if self.low is None else np.clip(output, self.low, self.high)

    def to_env(self, action: Any) -> Any:
        """The environment's action for the agent's.

        Raises:
            RuntimeError: the bounds to scale to are not known yet.
        """
        if not self.scales:
            return action
        if self._scale is None:
            raise RuntimeError(
                "the bounds of actions are not known before fit or test\n"
                "  now: give the agent action_space=env.action_space"
            )
        return self._scale.to_env(action)
