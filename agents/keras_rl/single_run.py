"""keras-rl's own loop: one environment of this process, event by event."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from agents.runs import Episode, Run, is_real


class SingleRun(Run):
    """One environment of this process, event by event as keras-rl's own loop (tests/test_keras_rl.py compares them)."""

    goes_on = True

    def _turn(self) -> None:
        """One step; an episode's start and end with it."""
        episode = self.running.get(0) or self._start()
        obs, reward, terminated, truncated, info = self._step(episode)
        self._counted(episode, reward)
        if self._too_long(episode) and not terminated:
            truncated = True
        metrics: list[Any] = [np.nan for _ in self.agent.metrics_names]
        if self.training:
            self.agent.remember(episode, reward, obs, terminated, truncated)
            metrics = self.agent.learn(1, 1)
        episode.obs = obs
        logs = {"action": episode.action, "observation": obs, "reward": reward, "metrics": metrics}
        logs.update(episode=episode.number, info=info, slot=0, farm=episode.farm)
        self.callbacks.on_step_end(episode.steps - 1, logs=logs)
        if terminated or truncated:
            self.running.clear()
            self.pool.abandon()
            self._over(episode)

    def _start(self) -> Episode:
        number = self.begun
        self.callbacks.on_episode_begin(number, logs={"slot": 0, "farm": self.pool.name_of(0)})
        self.agent.reset_states()
        episode = self._begin(0)
        self._reset(episode)
        wanted = int(np.random.randint(self.limits.max_start_steps)) if self.limits.max_start_steps else 0
        for _ in range(wanted):
            action = self._start_action(episode)
            episode.obs, _, done, _ = self._frame(action)
            if done:
                warnings.warn(
                    "the environment ended before %d start steps were made; lower nb_max_start_steps" % wanted,
                    stacklevel=2,
                )
                self._reset(episode)
                break
        return episode

    def _reset(self, episode: Episode) -> None:
        self.pool.abandon()
        self.pool.reset([0], self.agent.seeds(episode.number, 1))
        batch = self.pool.recv()
        episode.obs = self._process(batch, 0)[0]
        self.agent.began(0)
        if self.training:
            self.agent.observe([episode.obs])

    def _frame(self, action: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        """One action for one frame, between its two events."""
        self.callbacks.on_action_begin(action)
        self.pool.send([self._shaped(action)], [0])
        batch = self.pool.recv()
        self._last = batch
        obs, reward, self._terminated, self._truncated, info = self._process(batch, 0)
        self.callbacks.on_action_end(action)
        return obs, reward, self._terminated or self._truncated, info

    def _step(self, episode: Episode) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One action of the agent, for as many frames as asked."""
        self.callbacks.on_step_begin(episode.steps)
        chosen = self.agent.act([episode.state(self.agent.window_length)], [0])[0]
        action = self._action_for(episode, chosen)
        total = 0.0
        infos: dict[str, Any] = {}
        for _ in range(self.limits.repetition):
            obs, reward, done, info = self._frame(action)
            total += reward
            for name, value in info.items():
                if is_real(value):
                    infos[name] = np.add(infos[name], value) if name in infos else value
            if done:
                break
        self._measured(self._last, [(0, episode.policy)])
        if self.training:
            self.agent.observe([obs])
        return obs, total, self._terminated, self._truncated, self._numbers(infos)
