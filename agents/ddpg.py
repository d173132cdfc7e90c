"""Deep Deterministic Policy Gradient (Lillicrap et al. 2015, arXiv 1509.02971) with keras-rl's constructor and methods.

    from agents import DDPGAgent

Updates are pure functions fused into one compiled call; for a pool of environments several updates make one call.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import rl.core
import tensorflow as tf

from agents.core import Agent, Episode
from agents.memory import store_of
from agents.noise import NoiseBank

FUSED = 8  #: updates in one compiled call when many environments feed the agent


class DDPGAgent(Agent):
    """An actor and a critic built by the user, learning off-policy from replay.

    The actor's output is the action itself; it is clipped to the environment's bounds after noise.
    """

    def __init__(
        self,
        nb_actions: int,
        actor: keras.Model,
        critic: keras.Model,
        critic_action_input: Any,
        memory: Any,
        gamma: float = 0.99,
        batch_size: int = 32,
        nb_steps_warmup_critic: int = 1000,
        nb_steps_warmup_actor: int = 1000,
        train_interval: int = 1,
        memory_interval: int = 1,
        delta_range: Any = None,
        delta_clip: float = np.inf,
        random_process: Any = None,
        custom_model_objects: dict[str, Any] | None = None,
        target_model_update: float = 0.001,
        **kwargs: Any,
    ):
        """keras-rl's arguments.

        Args:
            nb_actions: components of an action.
            actor: (None, window_length, *obs_shape) to (None, nb_actions).
            critic: the action and the actor's inputs, in the order of its own inputs, to (None, 1).
            critic_action_input: which of the critic's inputs takes the action.
            memory: `agents.ReplayMemory`, or for one environment keras-rl's SequentialMemory.
            gamma: discount a step.
            batch_size: transitions an update.
            nb_steps_warmup_critic, nb_steps_warmup_actor: steps before each learns.
            train_interval: steps an update.
            memory_interval: every how many steps one is stored.
            delta_range: keras-rl's former name of delta_clip, as (-x, x).
            delta_clip: where the critic's loss turns from squared to linear (Huber).
            random_process: keras-rl's exploration noise; each environment gets a state of its own.
            custom_model_objects: for models with layers of the user's.
            target_model_update: below 1 the share of the online weights an update (eq. 7's tau), from 1 the updates
                between full copies.
            **kwargs: `processor`.

        Raises:
            ValueError: the networks do not fit each other or nb_actions.
        """
        super().__init__(**kwargs)
        _check_networks(nb_actions, actor, critic, critic_action_input)
        if delta_range is not None:
            delta_clip = float(delta_range[1])
        if target_model_update < 0:
            raise ValueError("target_model_update must be 0 or more, not %r" % target_model_update)
        self.nb_actions, self.actor, self.critic = nb_actions, actor, critic
        self.critic_action_input = critic_action_input
        self.critic_action_input_idx = [x is critic_action_input for x in critic.inputs].index(True)
        self.memory, self.gamma, self.batch_size = memory, gamma, batch_size
        self.nb_steps_warmup_critic, self.nb_steps_warmup_actor = nb_steps_warmup_critic, nb_steps_warmup_actor
        self.train_interval, self.memory_interval = train_interval, memory_interval
        self.delta_clip, self.random_process = delta_clip, random_process
        self.custom_model_objects = custom_model_objects or {}
        self.target_model_update = target_model_update
        self.window_length = int(memory.window_length)
        self.nb_updates = 0
        self.compiled = False
        self._store = store_of(memory, 1)
        self._noise = NoiseBank(random_process) if random_process is not None else None
        self._low: Any = None
        self._high: Any = None
        self._owed = 0  # steps for which no update was made yet
        self._metrics: list[tuple[str, Any]] = []

    # keras-rl's surface.

    @property
    def uses_learning_phase(self) -> bool:
        return False

    @property
    def layers(self) -> list[Any]:
        """Of both networks."""
        return self.actor.layers + self.critic.layers

    @property
    def metrics_names(self) -> list[str]:
        names = ["loss", *(name for name, _ in self._metrics), "mean_q"]  # keras-rl's order
        return names + (list(self.processor.metrics_names) if self.processor is not None else [])

    def compile(self, optimizer: Any, metrics: Sequence[Any] = ()) -> None:
        """Makes targets, optimizers and the compiled update.

        Args:
            optimizer: one for both (the actor gets a copy), or a pair (actor's, critic's); optimizers or their names.
            metrics: of the critic's prediction against its target, as names (mae) or functions.
        """
        pair = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer, optimizer]
        if len(pair) != 2:
            raise ValueError("optimizer must be one or a pair (actor's, critic's), not %d" % len(pair))
        self.actor_optimizer, self.critic_optimizer = (_own(keras.optimizers.get(one)) for one in pair)
        self._metrics = [(m if isinstance(m, str) else m.__name__, keras.losses.get(m)) for m in metrics]
        with keras.saving.custom_object_scope(self.custom_model_objects):
            self.target_actor, self.target_critic = _copy(self.actor), _copy(self.critic)
        self.update_target_models_hard()
        self.actor_optimizer.build(self.actor.trainable_variables)
        self.critic_optimizer.build(self.critic.trainable_variables)
        self._forward = tf.function(lambda states: self.actor(states, training=False), reduce_retracing=True)
        self._updates, self._by_xla = tf.function(self._update_many, jit_compile=True), True
        self.compiled = True

    def update_target_models_hard(self) -> None:
        """Copies the online weights to the targets."""
        self.target_actor.set_weights(self.actor.get_weights())
        self.target_critic.set_weights(self.critic.get_weights())

    def save_weights(self, filepath: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes both networks beside each other: `x.h5f` becomes `x_actor.weights.h5` and `x_critic.weights.h5`.

        Keras 3 insists on that ending.

        Raises:
            FileExistsError: one is there and `overwrite` is false; nothing was written.
        """
        paths = _weight_files(filepath)
        if not overwrite:
            for path in paths:
                if os.path.exists(path):
                    raise FileExistsError("%s is there already; save_weights(..., overwrite=True) replaces it" % path)
        for model, path in zip((self.actor, self.critic), paths, strict=True):
            model.save_weights(path, overwrite=True)

    def load_weights(self, filepath: str | os.PathLike[str]) -> None:
        """Reads what `save_weights` wrote under the same name; targets follow.

        Raises:
            FileNotFoundError: a file is missing; nothing was changed.
            ValueError: the weights are of other networks; nothing was changed.
        """
        paths = _weight_files(filepath)
        for path in paths:
            if not os.path.exists(path):
                raise FileNotFoundError("no weights at %s" % path)
        models = (self.actor, self.critic)
        before = [model.get_weights() for model in models]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "error", UserWarning
                )  # that is how Keras tells of layers that it left as they were
                for model, path in zip(models, paths, strict=True):
                    model.load_weights(path)
        except (ValueError, OSError, UserWarning) as error:
            for model, weights in zip(models, before, strict=True):
                model.set_weights(weights)
            raise ValueError("the weights at %s do not fit this agent's networks: %s" % (filepath, error)) from error
        if self.compiled:
            self.update_target_models_hard()

    def reset_states(self) -> None:
        """Noise begins anew; so does the state of keras-rl's own `forward`."""
        if self._noise is not None:
            self._noise.reset_all()
        self.recent_action = self.recent_observation = None

    def forward(self, observation: Any) -> np.ndarray:
        """keras-rl's: the action for one observation, (nb_actions,)."""
        state = self.memory.get_recent_state(observation)
        action = self.act([state], [0])[0]
        self.recent_observation, self.recent_action = observation, action
        return action

    def backward(self, reward: float, terminal: bool = False) -> list[Any]:
        """keras-rl's: stores what `forward` began and learns; returns metrics."""
        if self.step % self.memory_interval == 0:  # without training too: `forward` looks back by it
            self.memory.append(self.recent_observation, self.recent_action, reward, terminal, training=self.training)
        if not self.training:
            return [np.nan for _ in self.metrics_names]
        return self.learn(1, 1)

    def select_action(self, state: list[Any]) -> np.ndarray:
        """keras-rl's: the action for one state (window_length observations), with noise while training."""
        return self.act([state], [0])[0]

    # What the loop calls.

    def prepare(self, pool: Any) -> None:
        """Checks the networks against the environment's spaces."""
        space = pool.action_space
        if space is None or not hasattr(space, "low"):
            raise ValueError("DDPG wants a Box of actions; this environment has %r" % (space,))
        if not self._maps_actions and self.nb_actions != int(np.prod(space.shape)):
            raise ValueError(
                "the actor gives %d actions, the environment takes %d (%s)\n"
                "  now: build the networks with nb_actions=%d"
                % (self.nb_actions, np.prod(space.shape), space, np.prod(space.shape))
            )
        shape = getattr(pool.observation_space, "shape", None)
        if self.processor is None and len(self.actor.inputs) == 1 and shape is not None:
            wanted = (self.window_length, *shape)
            taken = tuple(self.actor.inputs[0].shape[1:])
            if len(taken) != len(wanted) or any(
                mine not in (None, theirs) for mine, theirs in zip(taken, wanted, strict=True)
            ):
                raise ValueError(
                    "the actor takes %s, the environment gives %s (window_length %d first)\n"
                    "  now: build it with that input" % (taken, wanted, self.window_length)
                )
        self._store = store_of(self.memory, pool.nb_slots)
        # What a processor makes of an action is clipped where it is sent; the agent's own range is then unknown.
        self._low, self._high = (None, None) if self._maps_actions else (np.ravel(space.low), np.ravel(space.high))

    @property
    def _maps_actions(self) -> bool:
        return (
            self.processor is not None and type(self.processor).process_action is not rl.core.Processor.process_action
        )

    def began(self, slot: int) -> None:
        if self._noise is not None:
            self._noise.reset(slot)

    def act(self, states: list[list[Any]], slots: Sequence[int]) -> np.ndarray:
        """Actions (n, nb_actions) for n states, in one forward pass.

        Raises:
            FloatingPointError: the actor gave NaN or infinity; nothing of it is sent.
        """
        actions = np.array(self._forward(self._inputs(self._states(states))))
        if not np.isfinite(actions).all():
            raise FloatingPointError(
                "the actor gives %s after %d updates: the training has diverged\n"
                "  now: load() an earlier save, then try a smaller learning rate or clipnorm"
                % (actions, self.nb_updates)
            )
        if self.training and self._noise is not None:
            actions = actions + np.stack([self._noise.sample(slot) for slot in slots]).reshape(actions.shape)
        if self._low is not None:
            actions = np.clip(actions, self._low, self._high)
        return actions.astype(np.float32)

    def remember(self, episode: Episode, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        if self.step % self.memory_interval == 0 or terminated or truncated:
            self._store.add(
                episode.slot, episode.obs, np.ravel(episode.chosen), reward, next_obs, terminated, truncated
            )

    def interrupted(self, slot: int) -> None:
        self._store.cut(slot)

    def learn(self, steps: int, nb_slots: int) -> list[Any]:
        nothing = [np.nan for _ in self.metrics_names]
        warm = self.step > min(self.nb_steps_warmup_critic, self.nb_steps_warmup_actor)
        if not warm or len(self._store) < self.batch_size + self.window_length:
            return nothing
        self._owed += steps
        count = 1 if nb_slots == 1 else FUSED
        values = None
        while self._owed >= count * self.train_interval:
            self._owed -= count * self.train_interval
            values = self.update(count)
        if values is None:
            return nothing
        return values + (list(self.processor.metrics) if self.processor is not None else [])

    # Learning.

    def update(self, count: int = 1) -> list[float]:
        """`count` updates on fresh batches in one compiled call; the metrics' means."""
        found = self._store.draw(count * self.batch_size)
        states = self._split(self._states(found.state), count)
        next_states = self._split(self._states(found.next_state), count)
        columns = [np.asarray(found.action, np.float32), found.reward, 1.0 - found.terminated]
        action, reward, proceed = (_fold(np.asarray(c, np.float32), count) for c in columns)
        learn_critic = self.step > self.nb_steps_warmup_critic
        learn_actor = self.step > self.nb_steps_warmup_actor
        before = tf.constant(self.nb_updates, tf.int64)
        values = self._run_updates(states, action, reward, next_states, proceed, before, learn_critic, learn_actor)
        self.nb_updates += count
        return [float(value) for value in values]

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

    def _update_many(
        self,
        states: Any,
        action: Any,
        reward: Any,
        next_states: Any,
        proceed: Any,
        before: Any,
        critic: bool,
        actor: bool,
    ) -> Any:
        """The compiled loop over batches stacked on the first axis: action (K, B, nb_actions), reward (K, B).

        `before` is the number of updates made so far.
        """
        every = int(self.target_model_update)
        total = tf.zeros(2 + len(self._metrics))
        for k in tf.range(tf.shape(action)[0]):
            batch = [x[k] for x in states], action[k], reward[k], [x[k] for x in next_states], proceed[k]
            if critic:
                total += self.update_critic(*batch)
            if actor:
                self.update_actor(batch[0])
            if self.target_model_update < 1:
                soft_update(self.target_actor, self.actor, self.target_model_update)
                soft_update(self.target_critic, self.critic, self.target_model_update)
            elif (before + tf.cast(k, tf.int64) + 1) % every == 0:
                hard_update(self.target_actor, self.actor)
                hard_update(self.target_critic, self.critic)
        return total / tf.cast(tf.shape(action)[0], tf.float32)

    def update_critic(self, states: Any, action: Any, reward: Any, next_states: Any, proceed: Any) -> Any:
        """One step on the critic's loss (algorithm 1, L); returns loss, metrics and mean Q."""
        next_action = self.target_actor(_alone(next_states), training=False)  # (B, nb_actions)
        next_q = self._q(self.target_critic, next_action, next_states, False)  # (B,)
        target = reward + self.gamma * proceed * next_q  # (B,)  only `terminated` cuts the return
        with tf.GradientTape() as tape:
            q = self._q(self.critic, action, states, True)  # (B,)
            loss = tf.reduce_mean(clipped_error(target - q, self.delta_clip))
            if self.critic.losses:
                loss += tf.add_n(self.critic.losses)
        variables = self.critic.trainable_variables
        self.critic_optimizer.apply(tape.gradient(loss, variables), variables)
        extra = [tf.reduce_mean(metric(target[:, None], q[:, None])) for _, metric in self._metrics]
        return tf.stack([loss, *extra, tf.reduce_mean(q)])

    def update_actor(self, states: Any) -> None:
        """One step up the critic's value of the actor's actions (algorithm 1, eq. 6)."""
        with tf.GradientTape() as tape:
            action = self.actor(_alone(states), training=True)  # (B, nb_actions)
            loss = -tf.reduce_mean(self._q(self.critic, action, states, False))
            if self.actor.losses:
                loss += tf.add_n(self.actor.losses)
        variables = self.actor.trainable_variables
        self.actor_optimizer.apply(tape.gradient(loss, variables), variables)

    def _q(self, critic: keras.Model, action: Any, states: Any, training: bool) -> Any:
        inputs = list(states)
        inputs.insert(self.critic_action_input_idx, action)
        return tf.squeeze(critic(inputs, training=training), -1)

    def _states(self, states: Any) -> list[np.ndarray]:
        """States as the networks' observation inputs, a list of (n, ...) arrays."""
        batch = np.asarray(states)
        if self.processor is not None:
            batch = self.processor.process_state_batch(batch)
        return [np.asarray(x, np.float32) for x in (batch if isinstance(batch, list) else [batch])]

    def _inputs(self, states: list[np.ndarray]) -> Any:
        return _alone([tf.constant(x) for x in states])

    def _split(self, states: list[np.ndarray], count: int) -> list[np.ndarray]:
        return [_fold(x, count) for x in states]


def soft_update(target: keras.Model, online: keras.Model, tau: float) -> None:
    """target <- (1 - tau) target + tau online (algorithm 1, last lines)."""
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


def _fold(array: np.ndarray, count: int) -> np.ndarray:
    return array.reshape(count, -1, *array.shape[1:])


def _alone(inputs: list[Any]) -> Any:
    return inputs[0] if len(inputs) == 1 else inputs


def _copy(model: keras.Model) -> keras.Model:
    """A model of the same form. Lambda layers are shared: they have no weights, and Keras does not rebuild one."""

    def layer(given: Any) -> Any:
        return given if isinstance(given, keras.layers.Lambda) else type(given).from_config(given.get_config())

    return keras.models.clone_model(model, clone_function=layer, recursive=True)


def _own(optimizer: Any) -> Any:
    return type(optimizer).from_config(optimizer.get_config())


def _weight_files(filepath: str | os.PathLike[str]) -> list[str]:
    name = os.fspath(filepath)
    for ending in (".weights.h5", ".h5f", ".h5", ".hdf5"):
        name = name.removesuffix(ending)
    return [name + "_actor.weights.h5", name + "_critic.weights.h5"]


def _check_networks(nb_actions: int, actor: Any, critic: Any, critic_action_input: Any) -> None:
    if len(actor.outputs) != 1 or tuple(actor.outputs[0].shape) != (None, nb_actions):
        raise ValueError(
            "the actor must give (None, %d), one value an action; it gives %s"
            % (nb_actions, [tuple(x.shape) for x in actor.outputs])
        )
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
