"""What DDPG and SAC share: learning from replay, of many environments.

Updates are pure functions of a batch in their own files. Here they are fed and counted; what observations, actions,
the compiled program, weights and saved states are is in the files of these names.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from agents import agent_state, weights
from agents.acting import Acting
from agents.actions import Actions
from agents.arguments import check_count, check_gamma, check_seed
from agents.keras_rl.verbs import KerasRLAgent
from agents.learner import in_calls
from agents.memory import ReplayMemory
from agents.models import q_values
from agents.observations import Observations
from agents.pool_api import Pool
from agents.runs import Episode
from agents.scaling import RunningNorm
from agents.scheduled import ScheduledAgent
from agents.store import Store, store_of
from agents.transitions import Transitions
from agents.updates import Updates, check_finite, fold

SCHEDULES = ("overlap", "sync")
ON_LOST_EPISODE = ("keep", "drop")

log = logging.getLogger("agents")


class OffPolicyAgent(ScheduledAgent, KerasRLAgent):
    """An agent that learns from replay. A subclass has the networks, `_update_many` and `_choose`."""

    #: Models that act and learn, by the name under which they are saved.
    networks: dict[str, keras.Model]
    critic_action_input_idx: int  #: the place of the action among a critic's inputs
    needs_bounds = True  #: whether it acts only where actions have bounds

    def __init__(
        self,
        nb_actions: int,
        memory: Any,
        gamma: float,
        batch_size: int,
        train_interval: int,
        memory_interval: int,
        target_model_update: float,
        n_step: int = 1,
        updates_per_step: float | None = None,
        schedule: str = "overlap",
        normalize_observations: bool | None = None,
        seed: int | None = None,
        scale_actions: bool = True,
        action_space: Any = None,
        processor: Any = None,
        on_lost_episode: str = "keep",
    ):
        """See the subclasses, and docs/agents.md.

        Raises:
            ValueError: a number that makes no sense.
            TypeError: no memory.
        """
        check_gamma(gamma)
        check_count("batch_size", batch_size)
        check_count("memory_interval", memory_interval)
        check_seed(seed)
        _check_settings(train_interval, target_model_update, schedule, on_lost_episode, n_step, updates_per_step)
        super().__init__(1 / train_interval if updates_per_step is None else updates_per_step, processor)
        self._store: Store = store_of(memory, 1)
        self.nb_actions, self.memory, self.gamma, self.batch_size = nb_actions, memory, gamma, int(batch_size)
        self.train_interval, self.memory_interval = train_interval, memory_interval
        self.target_model_update, self.n_step, self.schedule = target_model_update, int(n_step), schedule
        self.seed = seed
        self.window_length = int(memory.window_length)
        self.nb_episodes_begun = 0
        self.compiled = False
        self.fault_folder: str | os.PathLike[str] = "."  #: where the batch of a diverged update is written
        self.rng = np.random.default_rng(seed)  #: of exploration
        self.scale_actions = scale_actions
        self.observations = Observations(
            lambda: self.actor_inputs, self.window_length, normalize_observations, lambda: self.processor
        )
        self.actions = Actions(nb_actions, scale_actions, self.needs_bounds, lambda: self.processor)
        if action_space is not None:
            self.actions.prepare(action_space)
        self.on_lost_episode = on_lost_episode
        if on_lost_episode == "drop" and not isinstance(self._store, ReplayMemory):
            raise ValueError(
                "keras-rl's SequentialMemory cannot take an episode back, so on_lost_episode must be 'keep'\n"
                f"  now: memory=agents.ReplayMemory(limit={memory.limit}), or on_lost_episode='keep'"
            )
        self.metric_functions = []

    # What a subclass says.

    @property
    def actor_inputs(self) -> list[Any]:
        return list(self.networks["actor"].inputs)

    @property
    def optimizers(self) -> dict[str, Any]:
        """By the name under which they are saved."""
        raise NotImplementedError

    @property
    def targets(self) -> dict[str, keras.Model]:
        """By the name under which they are saved."""
        raise NotImplementedError

    @property
    def nb_warmup(self) -> int:
        """Steps before anything learns."""
        raise NotImplementedError

    def _choose(self, output: np.ndarray, slots: Sequence[int]) -> np.ndarray:
        """Actions (n, nb_actions) from the actor's outputs."""
        raise NotImplementedError

    def _update_many(self, *batches: Any) -> Any:
        """The compiled loop: K updates, their metrics as (K, M)."""
        raise NotImplementedError

    def _phase(self, count: int, before: int) -> tuple[Any, ...]:
        """What `_update_many` needs beside the batches for the `count` updates after the first `before`."""
        raise NotImplementedError

    def _finish_compile(self) -> None:
        """Once networks, targets and optimizers stand."""
        self.acting = Acting(self.networks["actor"])
        self.program = Updates(self._update_many)
        self.compiled = True

    # Weights and settings.

    @property
    def normalize_observations(self) -> bool | None:
        """Whether to normalise; None leaves it to the environment's space."""
        return self.observations.normalize

    @normalize_observations.setter
    def normalize_observations(self, wanted: bool | None) -> None:
        self.observations.normalize = wanted

    @property
    def norm(self) -> RunningNorm | None:
        """Running statistics of observations, None without normalisation."""
        return self.observations.norm

    def get_config(self) -> dict[str, Any]:
        """Settings as plain values."""
        names = ["nb_actions", "gamma", "batch_size", "train_interval", "memory_interval", "target_model_update"]
        names += ["n_step", "schedule", "normalize_observations", "seed", "window_length", "on_lost_episode"]
        config = {name: getattr(self, name) for name in names}
        return dict(
            config, agent=type(self).__name__, updates_per_step=self.budget.ratio, memory=self.memory.get_config()
        )

    def save_weights(self, filepath: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes each network beside the others, and the statistics of observations; see `agents.weights`.

        Raises:
            FileExistsError: one is there and `overwrite` is false; nothing was written.
        """
        with self.paused():
            weights.save(filepath, self.networks, None if self.norm is None else self.norm.state(), overwrite)

    def load_weights(self, filepath: str | os.PathLike[str]) -> None:
        """Reads what `save_weights` wrote under the same name; targets follow.

        Raises:
            FileNotFoundError: a file is missing; nothing was changed.
            ValueError: the weights are of other networks; nothing was changed.
        """
        weights.check(filepath, self.networks)
        with self.paused():
            statistics = weights.read_statistics(filepath)
            if statistics is not None:  # refused before anything is changed
                self.observations.check_state(statistics)
            weights.load(filepath, self.networks)
            if statistics is not None:
                self.observations.load_state(statistics)
            if self.compiled:
                self.update_target_models_hard()
                self.publish()

    def update_target_models_hard(self) -> None:
        """Copies the online weights to the targets."""
        for name, target in self.targets.items():
            target.set_weights(self.networks[name].get_weights())

    # What the loop calls.

    def prepare(self, pool: Pool) -> None:
        """Checks the networks against the environment's spaces."""
        self.actions.check(pool.action_space, type(self).__name__)
        self.actions.prepare(pool.action_space)
        self.observations.prepare(pool.observation_space)
        self._store = store_of(self.memory, pool.nb_slots)

    def _on_train_begin(self) -> None:
        super()._on_train_begin()
        if self._store.most < self._fewest:
            warnings.warn(
                f"nothing will be learnt: the first update waits for {self._fewest} transitions (batch_size"
                f" {self.batch_size}, window_length {self.window_length}), and a memory with"
                f" limit={self.memory.limit} never holds more than {self._store.most}\n"
                "  now: a larger limit, or a smaller batch_size",
                stacklevel=2,
            )

    def check_observation(self, obs: Any) -> None:
        self.observations.check(obs)

    def to_env(self, action: Any) -> Any:
        return self.actions.to_env(action)

    def seeds(self, first: int, count: int) -> list[int | None] | None:
        if self.seed is None:
            return None
        begun, self.nb_episodes_begun = self.nb_episodes_begun, self.nb_episodes_begun + count
        numbers = range(begun, begun + count)
        return [int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]) for number in numbers]

    def observe(self, observations: list[Any]) -> None:
        self.observations.observe(observations)

    def act(self, states: list[list[Any]], slots: Sequence[int]) -> np.ndarray:
        """Actions (n, nb_actions) for n states, in one forward pass.

        Raises:
            FloatingPointError: the actor gave NaN or infinity; nothing of it is sent.
        """
        began = time.perf_counter()
        output = self.acting.outputs(self.observations.inputs(states), self.observations.statistics, self.nb_updates)
        if not np.isfinite(output).all():
            raise FloatingPointError(
                f"the actor gives {output} after {self.nb_updates} updates: the training has diverged\n"
                "  now: load() an earlier save, then try a smaller learning rate or clipnorm"
            )
        actions = self._choose(output, slots).astype(np.float32)
        self.meters.acted(len(states), time.perf_counter() - began)
        return actions

    def remember(self, episode: Episode, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        if self.step % self.memory_interval == 0 or terminated or truncated:
            action = np.ravel(episode.chosen)
            self._store.add(episode.slot, episode.obs, action, reward, next_obs, terminated, truncated)

    def interrupted(self, slot: int) -> None:
        self._store.cut(slot)

    def lost(self, slot: int) -> None:
        if self.on_lost_episode == "keep":
            self._store.cut(slot)
            return
        assert isinstance(self._store, ReplayMemory)
        count = self._store.drop(slot)
        log.info("%d transitions of the lost episode in slot %d are drawn no more", count, slot)

    # Learning.

    def is_warm(self) -> bool:
        return self.step > self.nb_warmup and len(self._store) >= self._fewest

    @property
    def _fewest(self) -> int:
        """Transitions that the first update waits for."""
        return self.batch_size + self.window_length

    def update(self, count: int = 1) -> list[float]:
        """`count` updates on fresh batches, many in a compiled call (`in_calls`); the metrics' means.

        Raises:
            FloatingPointError: a metric is NaN or infinite; the batch that showed it is saved, its file named.
        """
        began = time.perf_counter()
        rows = []
        with self._busy:
            for size, values, found in self.program.run(in_calls(count), self._batches, self.nb_updates):
                check_finite(values, found, self.nb_updates, self.own_metrics, os.fspath(self.fault_folder))
                self.nb_updates += size
                rows.append(values)
        means = [float(value) for value in np.concatenate(rows).mean(0)]
        self.meters.updated(count, time.perf_counter() - began, self.own_metrics, means)
        return means

    def _batches(self, count: int, before: int) -> tuple[Transitions, tuple[Any, ...]]:
        """What was drawn for the `count` updates after the first `before`, and the same as `_update_many` takes it."""
        found = self._store.draw(count * self.batch_size, self.n_step, self.gamma)
        template = getattr(self._store, "template", None)
        states, next_states = (
            fold(self.observations.from_replay(leaves, template), count) for leaves in (found.state, found.next_state)
        )
        columns = [np.asarray(x, np.float32) for x in (found.action, found.reward, found.discount)]
        action, reward, discount = fold(columns, count)
        parts = (states, action, reward, next_states, discount, self.observations.statistics)
        tensors = tf.nest.map_structure(tf.convert_to_tensor, (*parts, np.int64(before)))
        return found, (*tensors, *self._phase(count, before))

    def _q(self, critic: keras.Model, action: Any, states: Any, training: bool) -> Any:
        return q_values(critic, self.critic_action_input_idx, action, states, training)

    # The acting copy.

    def publish(self) -> None:
        self.acting.publish(self.nb_updates)

    def act_by_copy(self, on: bool) -> None:
        self.acting.overlapped = on

    @property
    def policy_updates(self) -> int:  # type: ignore[override]
        """Updates that the weights had that now act."""
        return self.acting.updates if self.compiled else 0

    # Checkpoints.

    def variables(self) -> Iterator[tuple[str, Any]]:
        """All that learns and follows, by the name under which it is saved."""
        yield from agent_state.variables_of(self.networks)
        yield from agent_state.variables_of({f"target_{name}": model for name, model in self.targets.items()})
        yield from agent_state.variables_of({f"{name}_optimizer": one for name, one in self.optimizers.items()})

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything but replay, as arrays and plain values: what `load_state` takes."""
        arrays = {name: np.asarray(variable) for name, variable in self.variables()}
        arrays.update({f"observations/{name}": value for name, value in self.observations.state().items()})
        random_arrays, random_values = agent_state.global_random_state()
        values = {
            "step": int(self.step),
            "nb_updates": self.nb_updates,
            "nb_episodes_begun": self.nb_episodes_begun,
            "debt": [self.budget.steps, self.budget.paid],
            "rng": self.rng.bit_generator.state,
        }
        return arrays | random_arrays, values | random_values

    def check_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Raises ValueError when this is of an agent of another form."""
        agent_state.check_variables(dict(self.variables()), arrays)

    def load_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Takes what `state` gave; `check_state` has passed."""
        for name, variable in self.variables():
            variable.assign(arrays[name])
        prefix = "observations/"
        norm = {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
        if norm:
            self.observations.load_state(norm)
        self.step, self.nb_updates = values["step"], values["nb_updates"]
        self.nb_episodes_begun = values["nb_episodes_begun"]
        self.budget.steps, self.budget.paid = values["debt"]
        self.rng.bit_generator.state = values["rng"]
        agent_state.set_global_random_state(arrays, values)
        self.publish()


def _check_settings(
    train_interval: float,
    target_model_update: float,
    schedule: str,
    on_lost_episode: str,
    n_step: int,
    updates_per_step: float | None,
) -> None:
    if not train_interval > 0:
        raise ValueError(f"train_interval must be more than 0, not {train_interval!r}")
    if target_model_update < 0:
        raise ValueError(f"target_model_update must be 0 or more, not {target_model_update!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if on_lost_episode not in ON_LOST_EPISODE:
        raise ValueError(f"on_lost_episode must be one of {', '.join(ON_LOST_EPISODE)}, not {on_lost_episode!r}")
    if int(n_step) != n_step or n_step < 1:
        raise ValueError(f"n_step must be a whole number from 1, not {n_step!r}")
    if updates_per_step is not None and train_interval != 1:
        raise ValueError("give train_interval (steps an update) or updates_per_step, not both")
