"""keras-rl's Agent with a loop over many environments.

keras-rl's own `fit` steps one environment and counts in np.int16, which under numpy 2 never passes 32,767; this one has
the same signature, takes one environment or a pool of them, and counts in Python's integers.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rl.core
from rl.callbacks import TestLogger, TrainEpisodeLogger, TrainIntervalLogger
from rl.memory import zeroed_observation
from tensorflow.keras.callbacks import History

from agents.callbacks import CallbackList, EpisodePrinter, Visualizer
from agents.interrupt import deferred_interrupt
from agents.local import LocalPool

WAIT = 30.0  #: s without any result, after which the loop says what it waits for
GLANCE = 0.5  #: s between two looks at whether Ctrl-C was pressed

log = logging.getLogger("agents")


def as_pool(env: Any) -> Any:
    """A pool as it is, one environment as a pool of one.

    Raises:
        TypeError: it is neither.
    """
    if callable(getattr(env, "send", None)) and callable(getattr(env, "recv", None)):
        return env
    return LocalPool([env])


@dataclass
class Episode:
    """A running episode of one slot."""

    number: int
    slot: int
    farm: str
    obs: Any = None
    action: Any = None  # as it was sent, after the processor
    chosen: Any = None  # as the agent chose it: what the critic must learn about
    steps: int = 0
    reward: float = 0.0
    start_steps: int = 0  # still to be made by start_step_policy, outside the count
    frames: deque[Any] = field(default_factory=deque)


class Agent(rl.core.Agent):
    """What all agents share: `fit` and `test` over many environments.

    A subclass says how to act on a batch of states (`act`), what to keep (`remember`) and when to learn (`learn`).
    """

    window_length = 1

    def act(self, states: list[list[Any]], slots: Sequence[int]) -> np.ndarray:
        """Actions for n states, (n, nb_actions), in one forward pass."""
        raise NotImplementedError

    def remember(self, episode: Episode, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        """One transition from `episode.obs` by `episode.chosen`."""

    def interrupted(self, slot: int) -> None:
        """The slot's episode ended without a transition."""

    def learn(self, steps: int, nb_slots: int) -> list[Any]:
        """Pays what is owed for `steps` new steps; returns metrics as `metrics_names`."""
        return []

    def prepare(self, pool: Any) -> None:
        """Checks that the agent fits the environments. Raises ValueError before anything is sent."""

    def began(self, slot: int) -> None:
        """An episode begins in a slot."""

    def fit(
        self,
        env: Any,
        nb_steps: int | None,
        action_repetition: int = 1,
        callbacks: list[Any] | None = None,
        verbose: int = 1,
        visualize: bool = False,
        nb_max_start_steps: int = 0,
        start_step_policy: Callable[[Any], Any] | None = None,
        log_interval: int = 10000,
        nb_max_episode_steps: int | None = None,
        *,
        nb_episodes: int | None = None,
    ) -> History:
        """Trains on one environment or on a pool of them.

        Args:
            env: a gym or gymnasium environment, or a pool as `farmer.Farmer`.
            nb_steps: transitions to collect, exactly; a step that was lost with its worker is not one. Or None.
            action_repetition: frames an action is applied for, in the worker; their rewards are summed.
            callbacks: keras-rl's or Keras's; episodes of different slots end in any order, each under its own number.
            verbose: 0 nothing, 1 intervals, 2 episodes.
            visualize: render after each action.
            nb_max_start_steps: up to so many steps at an episode's start that are not learnt from.
            start_step_policy: observation to action for those; random actions by default.
            log_interval: steps of an interval for verbose=1.
            nb_max_episode_steps: longer episodes are truncated (and bootstrapped).
            nb_episodes: episodes to train, exactly, where nb_steps is None.

        Returns:
            keras-rl's History: a value for each episode under `episode_reward`, `nb_episode_steps`, `nb_steps`.

        Raises:
            RuntimeError: the agent is not compiled.
            ValueError: a count below 1, or an agent that does not fit the environment.
            TypeError: `env` is no environment.
        """
        if not self.compiled:
            raise RuntimeError("the agent is not compiled: call compile() before fit()")
        if (nb_steps is None) == (nb_episodes is None):
            raise ValueError("give nb_steps or nb_episodes, one of them, not %r and %r" % (nb_steps, nb_episodes))
        _check_counts(nb_steps=nb_steps, nb_episodes=nb_episodes, action_repetition=action_repetition)
        nb_steps = None if nb_steps is None else int(nb_steps)  # 1e5 is a usual way to write it
        loggers: list[Any] = []
        if verbose and nb_steps is None:
            loggers.append(EpisodePrinter(nb_episodes or 0))
        elif verbose == 1:
            loggers.append(TrainIntervalLogger(interval=log_interval))
        elif verbose > 1:
            loggers.append(TrainEpisodeLogger())
        run = _Run(self, env, True, action_repetition, nb_max_episode_steps, nb_max_start_steps, start_step_policy)
        return run.run(nb_steps, nb_episodes, list(callbacks or []) + loggers, visualize)

    def test(
        self,
        env: Any,
        nb_episodes: int = 1,
        action_repetition: int = 1,
        callbacks: list[Any] | None = None,
        visualize: bool = True,
        nb_max_episode_steps: int | None = None,
        nb_max_start_steps: int = 0,
        start_step_policy: Callable[[Any], Any] | None = None,
        verbose: int = 1,
    ) -> History:
        """Plays exactly `nb_episodes` episodes without noise; nothing is stored or learnt. Arguments as `fit`'s."""
        if not self.compiled:
            raise RuntimeError("the agent is not compiled: call compile() before test()")
        _check_counts(nb_episodes=nb_episodes, action_repetition=action_repetition)
        loggers = [TestLogger()] if verbose else []
        run = _Run(self, env, False, action_repetition, nb_max_episode_steps, nb_max_start_steps, start_step_policy)
        return run.run(None, nb_episodes, list(callbacks or []) + loggers, visualize)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
            raise ValueError("%s must be a whole number from 1, not %r" % (name, value))


class _Run:
    """One call of `fit` or `test`."""

    def __init__(
        self,
        agent: Agent,
        env: Any,
        training: bool,
        repetition: int,
        max_episode_steps: int | None,
        max_start_steps: int,
        start_policy: Callable[[Any], Any] | None,
    ):
        self.agent, self.env, self.training = agent, env, training
        self.pool = as_pool(env)
        self.repetition, self.max_episode_steps = repetition, max_episode_steps
        self.max_start_steps, self.start_policy = max_start_steps, start_policy
        self.running: dict[int, Episode] = {}
        self.under_way = 0  # steps that were sent and count towards nb_steps
        self.done_steps = self.begun = self.ended = 0
        self.parked: list[Episode] = []  # want an action, and the steps under way already fill the budget
        self.info_names: list[str] | None = None
        # keras-rl's order of events, to the letter. A pool of one slot may get a second one, and learns meanwhile.
        self.one_by_one = isinstance(self.pool, LocalPool) and self.pool.nb_slots == 1

    def run(self, nb_steps: int | None, nb_episodes: int | None, callbacks: list[Any], visualize: bool) -> History:
        """The loop with its callbacks around it."""
        agent = self.agent
        agent.prepare(self.pool)
        self.nb_steps, self.nb_episodes = nb_steps, nb_episodes
        history = History()
        self.callbacks = CallbackList(callbacks + ([Visualizer()] if visualize else []) + [history])
        self.callbacks.set_model(agent)
        self.callbacks._set_env(self.env)
        params = {"nb_steps": nb_steps} if self.training else {"nb_episodes": nb_episodes}
        self.callbacks.set_params(params)
        agent.training = self.training
        agent.reset_states()
        self.pool.abandon()
        aborted = False
        agent._on_train_begin() if self.training else agent._on_test_begin()
        self.callbacks.on_train_begin()
        try:
            with deferred_interrupt() as self.interrupt:
                while not self._finished() and not self.interrupt.wanted:
                    self._turn()
            aborted = self.interrupt.wanted
        except KeyboardInterrupt:
            aborted = True
        finally:
            for slot in self.running:
                if self.training:
                    agent.interrupted(slot)
            self.running.clear()
            self.pool.abandon()
            self.callbacks.on_train_end(logs={"did_abort": aborted})
            agent._on_train_end() if self.training else agent._on_test_end()
            agent.training = False
        return history

    def _finished(self) -> bool:
        if self.nb_steps is not None:
            return self.done_steps >= self.nb_steps
        assert self.nb_episodes is not None
        return self.ended >= self.nb_episodes

    def _turn(self) -> None:
        """Start episodes, take who is ready, act for them, and learn while the environments step."""
        self._start_episodes()
        batch = self._receive()
        if batch is None:
            return
        made: list[tuple[Episode, dict[str, Any]]] = []
        ready = [episode for i in range(len(batch.slot)) if (episode := self._row(batch, i, made)) is not None]
        if self.one_by_one:
            self._tell(made)
            self._send(ready)
        else:
            self._send(ready)
            self._tell(made)

    def _receive(self) -> Any:
        """Whoever is ready; None when Ctrl-C came first. Long waits say what they wait for."""
        waited = 0.0
        while not self.interrupt.wanted:
            try:
                return self.pool.recv(min_ready=1, timeout=GLANCE)
            except TimeoutError:
                waited += GLANCE
                if waited % WAIT < GLANCE:
                    log.warning("nothing came for %g s; waiting for %s", waited, self.pool.status())
        return None

    def _start_episodes(self) -> None:
        slots = [slot for slot in self.pool.vacant() if slot not in self.running]
        if self.nb_episodes is not None:
            slots = slots[: self.nb_episodes - self.begun]
        elif self.nb_steps is not None:
            slots = slots[: max(0, self.nb_steps - self.done_steps - self.under_way)]
        if slots:
            self.pool.reset(slots)
        for slot in slots:
            episode = Episode(self.begun, slot, self.pool.name_of(slot))
            episode.frames = deque(maxlen=self.agent.window_length)
            if self.max_start_steps:
                episode.start_steps = int(np.random.randint(self.max_start_steps))
            self.begun += 1
            self.running[slot] = episode
            self.agent.began(slot)

    def _row(self, batch: Any, i: int, made: list[tuple[Episode, dict[str, Any]]]) -> Episode | None:
        """Takes one row in; returns the episode if it wants an action now."""
        slot, info = int(batch.slot[i]), batch.info[i]
        episode = self.running.get(slot)
        if episode is None:
            return None
        counted = episode.action is not None and episode.start_steps == 0 and not batch.first[i]
        if counted:
            self.under_way -= 1
        if batch.lost[i]:
            log.warning("slot %d on %s: %s", slot, episode.farm, info.get("lost", "lost"))
            self._lost(episode)
            return None
        obs, reward = batch.obs[i], float(batch.reward[i])
        terminated, truncated = bool(batch.terminated[i]), bool(batch.truncated[i])
        processor = self.agent.processor
        if processor is not None:
            if batch.first[i]:
                obs = processor.process_observation(obs)
            else:
                obs, reward, done, info = processor.process_step(obs, reward, terminated or truncated, info)
                if done and not (terminated or truncated):
                    terminated = True
                    self.pool.abandon([slot])
        if batch.first[i]:
            episode.obs = obs
            self.callbacks.on_episode_begin(episode.number, logs={"slot": slot, "farm": episode.farm})
            return episode
        if not counted:
            episode.start_steps -= 1
            episode.action, episode.obs = None, obs
            if terminated or truncated:  # over before it began, as keras-rl: another one
                self._forget(episode)
                return None
            return episode
        episode.steps += 1
        episode.reward += reward
        self.done_steps += 1
        self.agent.step += self.training
        if self.max_episode_steps and episode.steps >= self.max_episode_steps and not terminated and not truncated:
            truncated = True
            self.pool.abandon([slot])
        if self.training:
            self.agent.remember(episode, reward, obs, terminated, truncated)
        logs = {"action": episode.action, "observation": obs, "reward": reward, "episode": episode.number}
        logs.update(info=self._numbers(info), slot=slot, farm=episode.farm, over=terminated or truncated)
        made.append((episode, logs))
        episode.obs = obs
        if terminated or truncated:
            del self.running[slot]
            return None
        return episode

    def _send(self, ready: list[Episode]) -> None:
        if self.nb_steps is not None:  # what is left of the budget; the rest stays where it is
            ready = [episode for episode in self.parked if self.running.get(episode.slot) is episode] + ready
            left = max(0, self.nb_steps - self.done_steps - self.under_way)
            ready, self.parked = ready[:left], ready[left:]
        if not ready:
            return
        free = [episode for episode in ready if episode.start_steps == 0]
        chosen: dict[int, Any] = {}
        if free:
            if self.one_by_one:
                self.callbacks.on_step_begin(free[0].steps)
            actions = self.agent.act([self._state(episode) for episode in free], [episode.slot for episode in free])
            chosen = {episode.slot: action for episode, action in zip(free, actions, strict=True)}
            self.under_way += len(free)
        for episode in ready:
            if episode.start_steps:
                chosen[episode.slot] = self._start_action(episode)
            episode.action = episode.chosen = chosen[episode.slot]
            if self.agent.processor is not None:
                episode.action = self.agent.processor.process_action(episode.chosen)
            if self.one_by_one:
                self.callbacks.on_action_begin(episode.action)
        self.pool.send(
            [self._shaped(episode.action) for episode in ready], [e.slot for e in ready], repeat=self.repetition
        )
        if self.one_by_one:
            self.callbacks.on_action_end(ready[0].action)

    def _tell(self, made: list[tuple[Episode, dict[str, Any]]]) -> None:
        metrics = self._learn(len(made))
        for episode, logs in made:
            self._told(episode, logs, metrics)

    def _learn(self, steps: int) -> list[Any]:
        if not steps:
            return []
        if not self.training:
            return [np.nan for _ in self.agent.metrics_names]
        return self.agent.learn(steps, self.pool.nb_slots)

    def _told(self, episode: Episode, logs: dict[str, Any], metrics: list[Any]) -> None:
        over = logs.pop("over")
        steps = episode.steps - 1
        if not self.one_by_one:
            self.callbacks.on_step_begin(steps)
            self.callbacks.on_action_begin(logs["action"])
            self.callbacks.on_action_end(logs["action"])
        self.callbacks.on_step_end(steps, logs=dict(logs, metrics=metrics))
        if over:
            self._ended(episode)

    def _ended(self, episode: Episode) -> None:
        self.ended += 1
        logs = {"episode_reward": episode.reward, "nb_episode_steps": episode.steps, "nb_steps": self.agent.step}
        if not self.training:
            logs["nb_steps"] = episode.steps
        self.callbacks.on_episode_end(episode.number, logs=dict(logs, slot=episode.slot, farm=episode.farm))

    def _lost(self, episode: Episode) -> None:
        """The episode ends as truncated at its last good observation; the step that was lost is none.

        In a test another one is played instead: half an episode's return would count as a whole one's.
        """
        if episode.steps == 0 or not self.training:
            self._forget(episode)
            return
        if self.training:
            self.agent.interrupted(episode.slot)
        self.running.pop(episode.slot, None)
        self._ended(episode)

    def _forget(self, episode: Episode) -> None:
        """An episode without a step was none."""
        self.running.pop(episode.slot, None)
        if self.nb_episodes is not None:
            self.nb_episodes += 1  # its number is used up
            self.ended += 1

    def _state(self, episode: Episode) -> list[Any]:
        """The last window_length observations, zeros before the episode's start."""
        episode.frames.append(episode.obs)
        missing = self.agent.window_length - len(episode.frames)
        return [zeroed_observation(episode.obs)] * missing + list(episode.frames)

    def _start_action(self, episode: Episode) -> Any:
        if self.start_policy is not None:
            return self.start_policy(episode.obs)
        return self.pool.action_space.sample()

    def _shaped(self, action: Any) -> Any:
        space = self.pool.action_space
        shape = getattr(space, "shape", None)
        if not shape or np.size(action) != np.prod(shape):
            return action
        return (
            np.clip(np.reshape(action, shape), space.low, space.high)
            if hasattr(space, "low")
            else np.reshape(action, shape)
        )

    def _numbers(self, info: dict[str, Any]) -> dict[str, Any]:
        """The infos that keras-rl's loggers can average: real scalars, the same names each time."""
        real = {k: v for k, v in info.items() if isinstance(v, (int, float, np.number)) and not isinstance(v, bool)}
        if self.info_names is None:
            self.info_names = list(real)
        return {name: real.get(name, np.nan) for name in self.info_names}
