"""What DDPG and SAC share: replay, normalised observations, exploration by slot, and updates fused in compiled calls.

Updates are pure functions of a batch in their own files; here they are fed, looped over and counted.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import random
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import keras
import numpy as np
import rl.core
import rl.processors
import tensorflow as tf

from agents import nest
from agents.arguments import check_count, check_gamma, check_seed
from agents.core import Agent
from agents.learner import FUSED, Debt, Learner, in_calls, whole_calls
from agents.memory import ReplayMemory, Transitions, store_of
from agents.runs import Episode
from agents.scaling import CLIP, ActionScale, RunningNorm, Statistics, is_wide

SCHEDULES = ("overlap", "sync")
ON_LOST_EPISODE = ("keep", "drop")

log = logging.getLogger("agents")


class OffPolicyAgent(Agent):
    """An agent that learns from replay. A subclass has the networks, `_update_many` and `_choose`."""

    #: Models that act and learn, by the name under which they are saved.
    networks: dict[str, keras.Model]
    critic_action_input_idx: int  #: the place of the action among a critic's inputs

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
        super().__init__(processor)
        check_gamma(gamma)
        check_count("batch_size", batch_size)
        check_count("memory_interval", memory_interval)
        check_seed(seed)
        if not train_interval > 0:
            raise ValueError("train_interval must be more than 0, not %r" % (train_interval,))
        if target_model_update < 0:
            raise ValueError("target_model_update must be 0 or more, not %r" % target_model_update)
        if schedule not in SCHEDULES:
            raise ValueError("schedule must be one of %s, not %r" % (", ".join(SCHEDULES), schedule))
        if on_lost_episode not in ON_LOST_EPISODE:
            raise ValueError(
                "on_lost_episode must be one of %s, not %r" % (", ".join(ON_LOST_EPISODE), on_lost_episode)
            )
        if int(n_step) != n_step or n_step < 1:
            raise ValueError("n_step must be a whole number from 1, not %r" % (n_step,))
        if updates_per_step is not None and train_interval != 1:
            raise ValueError("give train_interval (steps an update) or updates_per_step, not both")
        self._store = store_of(memory, 1)
        self.nb_actions, self.memory, self.gamma, self.batch_size = nb_actions, memory, gamma, int(batch_size)
        self.train_interval, self.memory_interval = train_interval, memory_interval
        self.target_model_update, self.n_step, self.schedule = target_model_update, int(n_step), schedule
        self.normalize_observations, self.seed = normalize_observations, seed
        self.debt = Debt(1 / train_interval if updates_per_step is None else updates_per_step)
        self.window_length = int(memory.window_length)
        self.nb_updates = self.policy_updates = self.nb_episodes_begun = 0
        self.compiled = False
        self.fault_folder: str | os.PathLike[str] = "."  #: where the batch of a diverged update is written
        self.norm: RunningNorm | None = None
        self._statistics: Statistics = []
        self._saved_norm: dict[str, np.ndarray] | None = None  # loaded before the environment was known
        self._rng = np.random.default_rng(seed)
        self.scale_actions = scale_actions
        self._scale: ActionScale | None = None
        if action_space is not None:
            self._prepare_actions(action_space)
        self.on_lost_episode = on_lost_episode
        if on_lost_episode == "drop" and not isinstance(self._store, ReplayMemory):
            raise ValueError(
                "keras-rl's SequentialMemory cannot take an episode back, so on_lost_episode must be 'keep'\n"
                "  now: memory=agents.ReplayMemory(limit=%d), or on_lost_episode='keep'" % memory.limit
            )
        self._space: Any = None  # of observations, where an environment has told it
        self._sound: set[Any] = set()  # forms of observations that the actor takes
        self._order: list[int] | None = None  # of an observation's leaves, as the networks take them
        self._busy = threading.RLock()  # held by whoever changes weights or replay as a whole
        self._policy = threading.Lock()  # the acting copy is not read half written
        self._overlapped = False
        self._unsettled: Learner | None = None
        self._metrics: list[tuple[str, Any]] = []

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

    # keras-rl's surface.

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
        return ["loss", *(name for name, _ in self._metrics), "mean_q"]  # keras-rl's order

    @property
    def metrics_names(self) -> list[str]:
        return self.own_metrics + (list(self.processor.metrics_names) if self.processor is not None else [])

    def with_processor(self, values: Sequence[float]) -> list[Any]:
        """An update's metrics and the processor's."""
        return list(values) + (list(self.processor.metrics) if self.processor is not None else [])

    def get_config(self) -> dict[str, Any]:
        """Settings as plain values."""
        names = ["nb_actions", "gamma", "batch_size", "train_interval", "memory_interval", "target_model_update"]
        names += ["n_step", "schedule", "normalize_observations", "seed", "window_length", "on_lost_episode"]
        config = {name: getattr(self, name) for name in names}
        return dict(
            config, agent=type(self).__name__, updates_per_step=self.debt.ratio, memory=self.memory.get_config()
        )

    def _finish_compile(self) -> None:
        """Once networks, targets and optimizers stand."""
        actor = self.networks["actor"]
        self._acting = copy_of(actor)
        self._acting.set_weights(actor.get_weights())
        self._by_online = self._compiled_forward(actor)
        self._by_copy = self._compiled_forward(self._acting)
        self._updates, self._by_xla = tf.function(self._update_many, jit_compile=True), True
        self.compiled = True

    @staticmethod
    def _compiled_forward(model: keras.Model) -> Any:
        def forward(inputs: Any, norm: Any) -> Any:
            return model(alone(normalized(inputs, norm)), training=False)

        return tf.function(forward, reduce_retracing=True)

    def save_weights(self, filepath: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes each network beside the others: `x.h5f` becomes `x_actor.weights.h5`, `x_critic.weights.h5` and so on.

        Keras 3 insists on that ending. Statistics of observations, where there are any, go to `x_observations.npz`.

        Raises:
            FileExistsError: one is there and `overwrite` is false; nothing was written.
        """
        paths = _weight_files(filepath, list(self.networks))
        extra = _stem(filepath) + "_observations.npz"
        if not overwrite:
            for path in [*paths, *([extra] if self.norm is not None else [])]:
                if os.path.exists(path):
                    raise FileExistsError("%s is there already; save_weights(..., overwrite=True) replaces it" % path)
        with self.paused():
            for model, path in zip(self.networks.values(), paths, strict=True):
                model.save_weights(path, overwrite=True)
            if self.norm is not None:
                np.savez(extra, allow_pickle=False, **self.norm.state())

    def load_weights(self, filepath: str | os.PathLike[str]) -> None:
        """Reads what `save_weights` wrote under the same name; targets follow.

        Raises:
            FileNotFoundError: a file is missing; nothing was changed.
            ValueError: the weights are of other networks; nothing was changed.
        """
        paths = _weight_files(filepath, list(self.networks))
        for path in paths:
            if not os.path.exists(path):
                raise FileNotFoundError("no weights at %s" % path)
        with self.paused():
            extra, statistics = _stem(filepath) + "_observations.npz", None
            if os.path.exists(extra):
                with np.load(extra, allow_pickle=False) as file:
                    statistics = {name: file[name] for name in file.files}
                if self.norm is not None:  # refused before anything is changed
                    copy.deepcopy(self.norm).load_state(statistics)
            self._load_networks(filepath, paths)
            if statistics is not None:
                self._take_norm(statistics)
            if self.compiled:
                self.update_target_models_hard()
                self.publish()

    def _load_networks(self, filepath: Any, paths: list[str]) -> None:
        models = list(self.networks.values())
        before = [model.get_weights() for model in models]
        try:
            with warnings.catch_warnings():
                # That is how Keras tells of layers that it left as they were.
                warnings.simplefilter("error", UserWarning)
                for model, path in zip(models, paths, strict=True):
                    model.load_weights(path)
        except (ValueError, OSError, UserWarning) as error:
            for model, weights in zip(models, before, strict=True):
                model.set_weights(weights)
            raise ValueError("the weights at %s do not fit this agent's networks: %s" % (filepath, error)) from error

    def update_target_models_hard(self) -> None:
        """Copies the online weights to the targets."""
        for name, target in self.targets.items():
            target.set_weights(self.networks[name].get_weights())

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
        return self.to_env(chosen)

    def backward(self, reward: float, terminal: bool = False) -> list[Any]:
        """keras-rl's: stores what `forward` began and learns; returns metrics."""
        if self.step % self.memory_interval == 0:  # without training too: `forward` looks back by it
            self.memory.append(self.recent_observation, self.recent_action, reward, terminal, training=self.training)
        if not self.training:
            return [np.nan for _ in self.metrics_names]
        return self.learn(1, 1)

    def select_action(self, state: list[Any]) -> np.ndarray:
        """keras-rl's: the environment's action for one state (window_length observations), with noise in training."""
        return self.to_env(self.act([state], [0])[0])

    # What the loop calls.

    def prepare(self, pool: Any) -> None:
        """Checks the networks against the environment's spaces."""
        space = pool.action_space
        name = type(self).__name__
        if not self._acts_in(space):
            raise ValueError("%s wants a Box of actions; this environment has %r" % (name, space))
        if not self._maps_actions and space is not None and self.nb_actions != int(np.prod(space.shape)):
            raise ValueError(
                "the actor gives %d actions, the environment takes %d (%s)\n"
                "  now: build the networks with nb_actions=%d"
                % (self.nb_actions, np.prod(space.shape), space, np.prod(space.shape))
            )
        self._prepare_actions(space)
        self._prepare_observations(pool.observation_space)
        self._store = store_of(self.memory, pool.nb_slots)

    def _on_train_begin(self) -> None:
        super()._on_train_begin()
        if self._store.most < self._fewest:
            warnings.warn(
                "nothing will be learnt: the first update waits for %d transitions (batch_size %d, window_length %d),"
                " and a memory with limit=%d never holds more than %d\n"
                "  now: a larger limit, or a smaller batch_size"
                % (self._fewest, self.batch_size, self.window_length, self.memory.limit, self._store.most),
                stacklevel=2,
            )

    def check_observation(self, obs: Any) -> None:
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
        taken = [tuple(x.shape[1:]) for x in self.actor_inputs]
        if len(given) != len(taken) or not all(map(_is_taken, given, taken)):
            told = "" if self._space is None else "\n  the environment's observation_space is %s" % self._space
            raise ValueError(
                "an observation of shape %s (%s with window_length %d first) does not fit the actor, which takes %s%s"
                % (
                    _in_words([np.shape(x) for x in leaves]),
                    _in_words(given),
                    self.window_length,
                    _in_words(taken),
                    told,
                )
            )
        if form is not None:
            self._sound.add(form)

    def _acts_in(self, space: Any) -> bool:
        """Whether the agent's actions can be the environment's."""
        return hasattr(space, "low")

    def _prepare_actions(self, space: Any) -> None:
        """Takes the environment's bounds."""
        if self._scales:
            self._scale = ActionScale(space.low, space.high)

    @property
    def _scales(self) -> bool:
        """Whether actions go from [-1, 1] to the environment's bounds; a processor that maps them does it itself."""
        return self.scale_actions and not self._maps_actions

    def to_env(self, action: Any) -> Any:
        """The environment's action for one that `act` gave.

        Raises:
            RuntimeError: the bounds to scale to are not known yet.
        """
        if not self._scales:
            return action
        if self._scale is None:
            raise RuntimeError(
                "the bounds of actions are not known before fit or test\n"
                "  now: give the agent action_space=env.action_space"
            )
        return self._scale.to_env(action)

    def _prepare_observations(self, space: Any) -> None:
        self._space, self._sound = space, set()
        self._order = _leaf_order(space, [x.name for x in self.actor_inputs])
        boxes = _boxes(space)
        if self.processor is None and boxes is not None:
            self._check_inputs([boxes[i].shape for i in self._order] if self._order else [b.shape for b in boxes])
        wanted = self.normalize_observations
        if wanted is None:
            wanted = self.processor is None and is_wide(space)
        if not wanted:
            self.norm, self._statistics = None, []
        elif self.norm is None:
            shapes = [tuple(x.shape[2:]) for x in self.actor_inputs]
            if self.processor is None and boxes is not None and len(boxes) == len(shapes):  # an input's may be open
                shapes = [tuple(boxes[i].shape) for i in self._order or range(len(boxes))]
            self.norm = RunningNorm(shapes)
            if self._saved_norm is not None:
                self.norm.load_state(self._saved_norm)
            self._statistics = self.norm.statistics()

    def _check_inputs(self, shapes: list[tuple[int, ...]]) -> None:
        taken = [tuple(x.shape[1:]) for x in self.actor_inputs]
        if len(taken) != len(shapes):
            if len(taken) == 1:
                return  # a nest of equal parts may be one array to the network; its call says if not
            raise ValueError("the actor has %d inputs, an observation %d parts" % (len(taken), len(shapes)))
        for mine, shape in zip(taken, shapes, strict=True):
            wanted = (self.window_length, *shape)
            if len(mine) != len(wanted) or any(m not in (None, w) for m, w in zip(mine, wanted, strict=True)):
                raise ValueError(
                    "the actor takes %s, the environment gives %s (window_length %d first)\n"
                    "  now: build it with that input" % (mine, wanted, self.window_length)
                )

    @property
    def _maps_actions(self) -> bool:
        return (
            self.processor is not None and type(self.processor).process_action is not rl.core.Processor.process_action
        )

    def seeds(self, first: int, count: int) -> list[int | None] | None:
        if self.seed is None:
            return None
        begun, self.nb_episodes_begun = self.nb_episodes_begun, self.nb_episodes_begun + count
        numbers = range(begun, begun + count)
        return [int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]) for number in numbers]

    def observe(self, observations: list[Any]) -> None:
        if self.norm is None:
            return
        leaves = self._inputs([[obs] for obs in observations])
        self.norm.update([x[:, 0] for x in leaves])
        self._statistics = self.norm.statistics()

    def act(self, states: list[list[Any]], slots: Sequence[int]) -> np.ndarray:
        """Actions (n, nb_actions) for n states, in one forward pass.

        Raises:
            FloatingPointError: the actor gave NaN or infinity; nothing of it is sent.
        """
        began = time.perf_counter()
        inputs = [tf.constant(x) for x in self._inputs(states)]
        with self._policy:
            forward = self._by_copy if self._overlapped else self._by_online
            output = forward(inputs, self._statistics).numpy()
            if not self._overlapped:
                self.policy_updates = self.nb_updates
        if not np.isfinite(output).all():
            raise FloatingPointError(
                "the actor gives %s after %d updates: the training has diverged\n"
                "  now: load() an earlier save, then try a smaller learning rate or clipnorm"
                % (output, self.nb_updates)
            )
        actions = self._choose(output, slots).astype(np.float32)
        self.meters.acted(len(states), time.perf_counter() - began)
        return actions

    def remember(self, episode: Episode, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        if self.step % self.memory_interval == 0 or terminated or truncated:
            self._store.add(
                episode.slot, episode.obs, np.ravel(episode.chosen), reward, next_obs, terminated, truncated
            )

    def interrupted(self, slot: int) -> None:
        self._store.cut(slot)

    def lost(self, slot: int) -> None:
        if self.on_lost_episode == "keep":
            self._store.cut(slot)
        else:
            count = self._store.drop(slot)
            log.info("%d transitions of the lost episode in slot %d are drawn no more", count, slot)

    # Learning.

    def is_warm(self) -> bool:
        """Whether steps earn updates by now."""
        return self.step > self.nb_warmup and len(self._store) >= self._fewest

    @property
    def _fewest(self) -> int:
        """Transitions that the first update waits for."""
        return self.batch_size + self.window_length

    def learn(self, steps: int, nb_slots: int) -> list[Any]:
        nothing = [np.nan for _ in self.metrics_names]
        if not self.is_warm():
            return nothing
        self.debt.steps += steps
        smallest = 1 if nb_slots == 1 else FUSED
        values = None
        while self.debt.owed >= smallest:
            values = self.pay(whole_calls(self.debt.owed) or smallest)
        return nothing if values is None else self.with_processor(values)

    def pay(self, count: int) -> list[float]:
        """Makes `count` of the updates that are owed; a save sees all of it or nothing."""
        with self._busy:
            values = self.update(count)
            self.debt.paid += count
        return values

    def update(self, count: int = 1) -> list[float]:
        """`count` updates on fresh batches, many in a compiled call (`in_calls`); the metrics' means.

        While one call computes, a second thread gathers the batches of the next.

        Raises:
            FloatingPointError: a metric is NaN or infinite; the batch that showed it is saved, its file named.
        """
        began = time.perf_counter()
        sizes, rows = in_calls(count), []
        with self._busy, ThreadPoolExecutor(1, "gather") as ahead:
            found, batches = self._batches(sizes[0], self.nb_updates)
            for size, following in zip(sizes, [*sizes[1:], 0], strict=True):
                next_up = ahead.submit(self._batches, following, self.nb_updates + size) if following else None
                values = self._run_updates(*batches).numpy()
                self._check_finite(values, found, size)
                self.nb_updates += size
                rows.append(values)
                if next_up is not None:
                    found, batches = next_up.result()
        means = [float(value) for value in np.concatenate(rows).mean(0)]
        self.meters.updated(count, time.perf_counter() - began, self.own_metrics, means)
        return means

    def _batches(self, count: int, before: int) -> tuple[Transitions, tuple[Any, ...]]:
        """What was drawn for the `count` updates after the first `before`, and the same as `_update_many` takes it."""
        found = self._store.draw(count * self.batch_size, self.n_step, self.gamma)
        states, next_states = (self._fold(self._from_replay(x), count) for x in (found.state, found.next_state))
        columns = [np.asarray(x, np.float32) for x in (found.action, found.reward, found.discount)]
        action, reward, discount = self._fold(columns, count)
        parts = (states, action, reward, next_states, discount, self._statistics)
        tensors = tf.nest.map_structure(tf.convert_to_tensor, (*parts, np.int64(before)))
        return found, (*tensors, *self._phase(count, before))

    def _run_updates(self, *batches: Any) -> Any:
        """The compiled call; without XLA, and saying so, where XLA cannot compile an operation of the user's model."""
        try:
            return self._updates(*batches)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.InternalError) as error:
            if not self._by_xla:
                raise
            reason = str(error.message).strip().splitlines()[0]
            warnings.warn(
                "XLA cannot compile these networks; learning goes on without it, slower: %s" % reason, stacklevel=2
            )
            self._updates, self._by_xla = tf.function(self._update_many), False
            return self._updates(*batches)

    def _check_finite(self, values: np.ndarray, found: Transitions, count: int) -> None:
        bad = ~np.isfinite(values).all(1)
        if not bad.any():
            return
        k = int(np.argmax(bad))
        rows = slice(k * self.batch_size, (k + 1) * self.batch_size)
        number = self.nb_updates + k + 1
        path = Path(self.fault_folder) / ("diverged-update-%07d.npz" % number)
        arrays: dict[str, Any] = {"state/%d" % i: leaf[rows] for i, leaf in enumerate(found.state)}
        arrays.update({"next_state/%d" % i: leaf[rows] for i, leaf in enumerate(found.next_state)})
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, action=found.action[rows], reward=found.reward[rows], discount=found.discount[rows], **arrays)
        told = ", ".join("%s %g" % pair for pair in zip(self.own_metrics, values[k], strict=True))
        raise FloatingPointError(
            "update %d has diverged (%s); the batch that showed it is in %s\n"
            "  now: load() the last save, then look at that batch, or try a smaller learning rate or clipnorm"
            % (number, told, path)
        )

    def _q(self, critic: keras.Model, action: Any, states: Any, training: bool) -> Any:
        """A critic's values (B,) of an action, put where it takes it among the observation inputs."""
        inputs = list(states)
        inputs.insert(self.critic_action_input_idx, action)
        return tf.squeeze(critic(inputs, training=training), -1)

    # Overlap.

    def overlap(self, on: bool) -> None:
        """Whether a learner changes the weights while this agent acts: it then acts by a copy."""
        if on:
            self.publish()
        self._overlapped = on

    def publish(self) -> None:
        """Hands the newest weights to the acting copy."""
        with self._policy:
            for mine, theirs in zip(self._acting.variables, self.networks["actor"].variables, strict=True):
                mine.assign(theirs)
            self.policy_updates = self.nb_updates

    def settles_later(self, learner: Learner) -> None:
        """A learner is still inside a long call after Ctrl-C."""
        self._unsettled = learner

    def settle(self) -> None:
        if self._unsettled is not None:
            self._unsettled.stop()
            if self._unsettled.error is not None:
                log.error("the updates that Ctrl-C left running failed: %s", self._unsettled.error)
            self._unsettled = None
            self.overlap(False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nobody updates: for saving and loading."""
        if self._unsettled is not None:
            self.settle()
        with self._busy:
            yield

    # Values on their way to the networks.

    def _inputs(self, states: list[list[Any]]) -> list[np.ndarray]:
        """n states (lists of observations) as the networks' observation inputs, float32 (n, window_length, ...)."""
        if self._processes_states:
            return _as_inputs(self.processor.process_state_batch(_batch_of(states)))
        if isinstance(states[0][0], np.ndarray):
            return [np.asarray(states, np.float32)]
        parts = [[nest.flatten(obs) for obs in state] for state in states]
        leaves = [
            np.asarray([[obs[i] for obs in state] for state in parts], np.float32) for i in range(len(parts[0][0]))
        ]
        return self._ordered(leaves)

    def _from_replay(self, leaves: list[np.ndarray]) -> list[np.ndarray]:
        """The same from replay, whose leaves are (n, window_length, ...)."""
        if not self._processes_states:
            return self._ordered([np.asarray(x, np.float32) for x in leaves])
        if len(leaves) == 1:
            return _as_inputs(self.processor.process_state_batch(leaves[0]))
        template = self._store.template
        n, window = leaves[0].shape[:2]
        states = [[nest.unflatten(template, [x[i, w] for x in leaves]) for w in range(window)] for i in range(n)]
        return _as_inputs(self.processor.process_state_batch(states))

    @property
    def _processes_states(self) -> bool:
        """Whether the processor changes states; keras-rl's MultiInputProcessor only takes them apart, as we do."""
        if self.processor is None:
            return False
        kind = type(self.processor).process_state_batch
        return kind not in (
            rl.core.Processor.process_state_batch,
            rl.processors.MultiInputProcessor.process_state_batch,
        )

    def _ordered(self, leaves: list[np.ndarray]) -> list[np.ndarray]:
        if len(leaves) > 1 and len(self.actor_inputs) == 1:  # parts of one form for a network with one input
            return [np.stack(leaves, axis=2)]
        if len(leaves) == 1 and len(self.actor_inputs) > 1:  # a list of equal arrays that came as one
            return [leaves[0][:, :, i] for i in range(len(self.actor_inputs))]
        return leaves if self._order is None else [leaves[i] for i in self._order]

    @staticmethod
    def _fold(arrays: list[np.ndarray], count: int) -> list[np.ndarray]:
        """(K * B, ...) as (K, B, ...)."""
        return [x.reshape(count, -1, *x.shape[1:]) for x in arrays]

    # Checkpoints.

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything but replay, as arrays and plain values: what `load_state` takes."""
        arrays = {name: np.asarray(variable) for name, variable in self._variables()}
        norm = self._saved_norm if self.norm is None else self.norm.state()
        arrays.update({"observations/" + name: value for name, value in (norm or {}).items()})
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        arrays["random/numpy"] = np.asarray(keys)
        version, numbers, rest = random.getstate()
        values = {
            "step": int(self.step),
            "nb_updates": self.nb_updates,
            "nb_episodes_begun": self.nb_episodes_begun,
            "debt": [self.debt.steps, self.debt.paid],
            "rng": self._rng.bit_generator.state,
            "numpy": [kind, position, has_gauss, gauss],
            "python": [version, list(numbers), rest],
        }
        return arrays, values

    def check_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Raises ValueError when this is of an agent of another form."""
        mine = dict(self._variables())
        theirs = {name for name in arrays if not name.startswith(("observations/", "random/"))}
        if theirs != set(mine):
            odd = sorted(theirs ^ set(mine))
            raise ValueError("it is of other networks or optimizers: %s" % ", ".join(odd[:4]))
        for name, variable in mine.items():
            if tuple(variable.shape) != arrays[name].shape:
                raise ValueError(
                    "it has %s of shape %s, this agent %s: other networks or another environment"
                    % (name, arrays[name].shape, tuple(variable.shape))
                )

    def load_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Takes what `state` gave; `check_state` has passed."""
        for name, variable in self._variables():
            variable.assign(arrays[name])
        norm = {name[13:]: value for name, value in arrays.items() if name.startswith("observations/")}
        if norm:
            self._take_norm(norm)
        self.step, self.nb_updates = values["step"], values["nb_updates"]
        self.nb_episodes_begun = values["nb_episodes_begun"]
        self.debt.steps, self.debt.paid = values["debt"]
        self._rng.bit_generator.state = values["rng"]
        kind, position, has_gauss, gauss = values["numpy"]
        np.random.set_state((kind, arrays["random/numpy"], position, has_gauss, gauss))
        version, numbers, rest = values["python"]
        random.setstate((version, tuple(numbers), rest))
        self.publish()

    def _take_norm(self, state: dict[str, np.ndarray]) -> None:
        self._saved_norm = state
        if self.norm is None and self.normalize_observations is not False:  # `forward` needs no environment
            self.norm = RunningNorm([state["mean/%d" % i].shape for i in range(len(self.actor_inputs))])
        if self.norm is not None:
            self.norm.load_state(state)
            self._statistics = self.norm.statistics()

    def _variables(self) -> Iterator[tuple[str, Any]]:
        parts: dict[str, Any] = dict(self.networks)
        parts.update({"target_" + name: model for name, model in self.targets.items()})
        parts.update({name + "_optimizer": optimizer for name, optimizer in self.optimizers.items()})
        for part, owner in parts.items():
            for index, variable in enumerate(owner.variables):
                yield "%s/%d" % (part, index), variable


def normalized(inputs: list[Any], norm: Statistics) -> list[Any]:
    """Observation inputs (..., *shape) in standard deviations from the mean, clipped; unchanged without statistics."""
    if not norm:
        return list(inputs)
    return [
        tf.clip_by_value((x - mean) * inverse, -CLIP, CLIP) for x, (mean, inverse) in zip(inputs, norm, strict=True)
    ]


def soft_update(target: keras.Model, online: keras.Model, tau: float) -> None:
    """target <- (1 - tau) target + tau online (arXiv 1509.02971, algorithm 1, last lines)."""
    for mine, theirs in zip(target.variables, online.variables, strict=True):
        if mine.dtype.startswith("float"):
            mine.assign(mine + tau * (theirs - mine))


def hard_update(target: keras.Model, online: keras.Model) -> None:
    """target <- online."""
    for mine, theirs in zip(target.variables, online.variables, strict=True):
        if mine.dtype.startswith("float"):
            mine.assign(theirs)


def clipped_error(error: Any, clip: float) -> Any:
    """Half the square up to `clip` and linear beyond, as keras-rl's `huber_loss`."""
    if not np.isfinite(clip):
        return 0.5 * tf.square(error)
    size = tf.abs(error)
    return tf.where(size < clip, 0.5 * tf.square(error), clip * (size - 0.5 * clip))


def alone(inputs: list[Any]) -> Any:
    """A network's inputs as it wants them: one by itself, several as a list."""
    return inputs[0] if len(inputs) == 1 else inputs


def copy_of(model: keras.Model) -> keras.Model:
    """A model of the same form. Lambda layers are shared: they have no weights, and Keras does not rebuild one."""

    def layer(given: Any) -> Any:
        return given if isinstance(given, keras.layers.Lambda) else type(given).from_config(given.get_config())

    return keras.models.clone_model(model, clone_function=layer, recursive=True)


def own(optimizer: Any) -> Any:
    """An optimizer of the agent's own, of the same settings."""
    given = keras.optimizers.get(optimizer)
    config = given.get_config()
    if config.get("epsilon", 0) is None:  # Keras 2's way to write the default
        config["epsilon"] = keras.config.epsilon()
    return type(given).from_config(config)


def named_metrics(metrics: Sequence[Any]) -> list[tuple[str, Any]]:
    """Metrics by name or as functions of (target, prediction)."""
    return [(m if isinstance(m, str) else m.__name__, keras.losses.get(m)) for m in metrics]


def check_critic(nb_actions: int, actor: Any, critic: Any, critic_action_input: Any) -> int:
    """The place of the action among the critic's inputs.

    Raises:
        ValueError: the critic does not fit the actor or the number of actions.
    """
    if len(critic.outputs) != 1 or tuple(critic.outputs[0].shape) != (None, 1):
        raise ValueError("the critic must give (None, 1); it gives %s" % [tuple(x.shape) for x in critic.outputs])
    if not any(x is critic_action_input for x in critic.inputs):
        raise ValueError("critic_action_input is none of the critic's inputs %s" % [x.name for x in critic.inputs])
    if tuple(critic_action_input.shape) != (None, nb_actions):
        raise ValueError(
            "critic_action_input must take (None, %d), not %s" % (nb_actions, tuple(critic_action_input.shape))
        )
    if len(critic.inputs) != len(actor.inputs) + 1:
        raise ValueError(
            "the critic must take the action and the actor's %d inputs; it takes %d in all"
            % (len(actor.inputs), len(critic.inputs))
        )
    return [x is critic_action_input for x in critic.inputs].index(True)


def check_actor(actor: Any, outputs: int, what: str) -> None:
    """Raises ValueError when the actor does not give (None, outputs)."""
    if len(actor.outputs) != 1 or tuple(actor.outputs[0].shape) != (None, outputs):
        raise ValueError(
            "the actor must give (None, %d), %s; it gives %s" % (outputs, what, [tuple(x.shape) for x in actor.outputs])
        )


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


def _stem(filepath: str | os.PathLike[str]) -> str:
    name = os.fspath(filepath)
    for ending in (".weights.h5", ".h5f", ".h5", ".hdf5"):
        name = name.removesuffix(ending)
    return name


def _weight_files(filepath: str | os.PathLike[str], names: list[str]) -> list[str]:
    return ["%s_%s.weights.h5" % (_stem(filepath), name) for name in names]
