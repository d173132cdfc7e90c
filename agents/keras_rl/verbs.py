"""keras-rl's verbs of an agent: one observation in, one action out, and what its loggers read."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from agents.core import Agent


class KerasRLAgent(Agent):
    """For an agent with networks, a memory in keras-rl's manner, and metrics of its own."""

    networks: dict[str, keras.Model]
    memory: Any
    memory_interval: int
    metric_functions: list[tuple[str, Any]]  #: of the critic, by name
    recent_observation: Any = None
    recent_action: Any = None

    @property
    def uses_learning_phase(self) -> bool:
        return False

    @property
    def layers(self) -> list[Any]:
        """Of all networks that learn."""
        return [layer for model in self.networks.values() for layer in model.layers]

    @property
    def own_metrics(self) -> list[str]:
        """Names of what an update returns."""
        return ["loss", *(name for name, _ in self.metric_functions), "mean_q"]  # keras-rl's order

    @property
    def metrics_names(self) -> list[str]:
        return self.own_metrics + (list(self.processor.metrics_names) if self.processor is not None else [])

    def reset_states(self) -> None:
        """The state of keras-rl's own `forward` begins anew."""
        self.recent_action = self.recent_observation = None

    def forward(self, observation: Any) -> np.ndarray:
        """keras-rl's: the environment's action for one observation, (nb_actions,).

        Raises:
            ValueError: an observation of another shape than the actor takes.
        """
        self.check_observation(observation)
        state = self.memory.get_recent_state(observation)
        chosen = self.act([state], [0])[0]
        self.recent_observation, self.recent_action = observation, chosen
        found: np.ndarray = self.to_env(chosen)
        return found

    def backward(self, reward: float, terminal: bool = False) -> list[Any]:
        """keras-rl's: stores what `forward` began and learns; returns metrics."""
        if self.step % self.memory_interval == 0:  # without training too: `forward` looks back by it
            self.memory.append(self.recent_observation, self.recent_action, reward, terminal, training=self.training)
        if not self.training:
            return [np.nan for _ in self.metrics_names]
        return self.learn(1, 1)

    def select_action(self, state: list[Any]) -> np.ndarray:
        """keras-rl's: the environment's action for one state (window_length observations), with noise in training."""
        found: np.ndarray = self.to_env(self.act([state], [0])[0])
        return found
