"""The callbacks that keras-rl's own do not cover."""

from __future__ import annotations

from typing import Any

from rl.callbacks import Callback


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
            % (self._done, self.nb_episodes, logs["episode_reward"], logs["nb_episode_steps"], logs["farm"], logs["slot"])
        )


class Visualizer(Callback):
    """Renders after each action; gymnasium's `render` takes no mode, which keras-rl's own gives it."""

    def on_action_end(self, action: Any, logs: dict[str, Any] | None = None) -> None:
        if callable(getattr(self.env, "render", None)):
            self.env.render()
