"""keras-rl's Agent for one environment and for many.

keras-rl's own `fit` steps one environment and counts in np.int16, which under numpy 2 never passes 32,767; this one has
the same signature, takes one environment or a pool of them, and counts in Python's integers. The loops are in `runs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rl.core
from rl.callbacks import TestLogger, TrainEpisodeLogger, TrainIntervalLogger
from tensorflow.keras.callbacks import History

from agents.arguments import check_count
from agents.keras_rl.callbacks import EpisodePrinter
from agents.keras_rl.single_run import SingleRun
from agents.local import LocalPool, refuse_vector_env
from agents.meters import Meters
from agents.pool_api import Pool
from agents.runs import Episode, Limits, PoolRun, Run


def as_pool(env: Any) -> Pool:
    """A pool as it is, one environment as a pool of one.

    Raises:
        TypeError: it is neither.
    """
    refuse_vector_env(env)
    if callable(getattr(env, "send", None)) and callable(getattr(env, "recv", None)):
        return env
    return LocalPool([env])


class Agent(rl.core.Agent):
    """What all agents share: `fit` and `test` over many environments.

    A subclass says how to act on a batch of states (`act`), what to keep (`remember`) and when to learn (`learn`).
    """

    window_length = 1
    schedule = "sync"  #: "overlap": a subclass has what `learner.Learner` asks for
    nb_updates = 0
    policy_updates = 0  #: updates that the weights had that now act

    def __init__(self, processor: Any = None):
        super().__init__(processor)
        self.meters = Meters()

    def act(self, states: list[list[Any]], slots: Sequence[int]) -> np.ndarray:
        """Actions for n states, (n, nb_actions), in one forward pass."""
        raise NotImplementedError

    def to_env(self, action: Any) -> Any:
        """The environment's action for one that `act` gave."""
        return action

    def observe(self, observations: list[Any]) -> None:
        """New observations of training, before anything is done with them."""

    def remember(self, episode: Episode, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        """One transition from `episode.obs` by `episode.chosen`."""

    def interrupted(self, slot: int) -> None:
        """The slot's episode ended without a transition."""

    def lost(self, slot: int) -> None:
        """The same, because its worker or its farm was lost."""
        self.interrupted(slot)

    def check_observation(self, obs: Any) -> None:
        """Raises ValueError for an observation that the agent cannot take, before anything is done with it."""

    def learn(self, steps: int, nb_slots: int) -> list[Any]:
        """Pays what is owed for `steps` new steps; returns metrics as `metrics_names`."""
        return []

    def with_processor(self, values: Sequence[float]) -> list[Any]:
        """An update's metrics and the processor's."""
        return list(values) + (list(self.processor.metrics) if self.processor is not None else [])

    def prepare(self, pool: Pool) -> None:
        """Checks that the agent fits the environments. Raises ValueError before anything is sent."""

    def began(self, slot: int) -> None:
        """An episode begins in a slot."""

    def seeds(self, first: int, count: int) -> list[int | None] | None:
        """Seeds of `count` episodes from number `first` of this run on; None where the environments choose."""
        return None

    def settle(self) -> None:
        """Waits for what Ctrl-C left running."""

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
            FloatingPointError: the training has diverged; the batch that showed it is saved and named.
        """
        if not self.compiled:
            raise RuntimeError("the agent is not compiled: call compile() before fit()")
        if (nb_steps is None) == (nb_episodes is None):
            raise ValueError("give nb_steps or nb_episodes, one of them, not %r and %r" % (nb_steps, nb_episodes))
        _check_counts(nb_steps=nb_steps, nb_episodes=nb_episodes, action_repetition=action_repetition)
        _check_limits(nb_max_episode_steps, nb_max_start_steps)
        nb_steps = None if nb_steps is None else int(nb_steps)  # 1e5 is a usual way to write it
        loggers: list[Any] = []
        if verbose and nb_steps is None:
            loggers.append(EpisodePrinter(nb_episodes or 0))
        elif verbose == 1:
            loggers.append(TrainIntervalLogger(interval=log_interval))
        elif verbose > 1:
            loggers.append(TrainEpisodeLogger())
        limits = Limits(
            nb_steps, nb_episodes, action_repetition, nb_max_episode_steps, nb_max_start_steps, start_step_policy
        )
        return self._run(env, True, limits).run(list(callbacks or []) + loggers, visualize)

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
        _check_limits(nb_max_episode_steps, nb_max_start_steps)
        loggers = [TestLogger()] if verbose else []
        limits = Limits(
            None, nb_episodes, action_repetition, nb_max_episode_steps, nb_max_start_steps, start_step_policy
        )
        return self._run(env, False, limits).run(list(callbacks or []) + loggers, visualize)

    def _run(self, env: Any, training: bool, limits: Limits) -> Run:
        pool = as_pool(env)
        # keras-rl's order of events, to the letter. A pool of one slot may get a second one, and learns meanwhile.
        single = isinstance(pool, LocalPool) and pool.nb_slots == 1
        return (SingleRun if single else PoolRun)(self, env, pool, training, limits)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None:
            check_count(name, value)


def _check_limits(nb_max_episode_steps: int | None, nb_max_start_steps: int) -> None:
    if nb_max_episode_steps is not None:
        check_count("nb_max_episode_steps", nb_max_episode_steps, 0)  # 0 is keras-rl's other way to say "no limit"
    check_count("nb_max_start_steps", nb_max_start_steps, 0)
