"""What keras-rl's own callbacks do not cover."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import rl.callbacks
from rl.callbacks import Callback


class CallbackList(rl.callbacks.CallbackList):
    """keras-rl's list, which also takes Keras 3's callbacks.

    keras-rl builds it on `tensorflow.python.keras`, whose list asks each callback for methods that Keras 3's lack; so
    what it inherits from there is replaced.
    """

    def __init__(self, callbacks: Sequence[Any]):
        self.callbacks = list(callbacks)

    def set_model(self, model: Any) -> None:
        for callback in self.callbacks:
            callback.set_model(model)

    def set_params(self, params: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.set_params(params)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        for callback in self.callbacks:
            callback.on_train_begin(logs or {})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        for callback in self.callbacks:
            callback.on_train_end(logs or {})


class EpisodePrinter(Callback):
    """A line an episode, for a training that is measured in episodes: keras-rl's loggers need a number of steps."""

    def __init__(self, nb_episodes: int):
        super().__init__()
        self.nb_episodes = nb_episodes
        self._done = 0

    def on_episode_end(self, episode: int, logs: dict[str, Any] | None = None) -> None:
        logs = logs or {}
        self._done += 1
        print(
            "episode %d/%d: reward %.3f, steps %d, on %s slot %d"
            % (
                self._done,
                self.nb_episodes,
                logs["episode_reward"],
                logs["nb_episode_steps"],
                logs["farm"],
                logs["slot"],
            )
        )


class Visualizer(Callback):
    """Renders after each action: gym's former `render` is told a mode, gymnasium's takes none."""

    def on_action_end(self, action: Any, logs: dict[str, Any] | None = None) -> None:
        render = getattr(self.env, "render", None)
        if callable(render):
            render(mode="human") if "mode" in inspect.signature(render).parameters else render()
