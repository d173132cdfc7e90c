"""Soft Actor-Critic with automatic temperature (Haarnoja et al. 2018, arXiv 1812.05905) in keras-rl's manner.

    from agents import SACAgent

The same sections in the same order as `ddpg.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from agents.models import (
    alone,
    check_actor,
    check_critic,
    copy_of,
    hard_update,
    named_metrics,
    normalized,
    own,
    soft_update,
)
from agents.offpolicy import OffPolicyAgent

LOG_STD = (-20.0, 2.0)  #: bounds of the policy's log deviation


class SACAgent(OffPolicyAgent):
    """A stochastic actor and two critics built by the user, learning off-policy with a bonus for entropy.

    The policy lives in [-1, 1]; the agent scales it to the environment's bounds.
    """

    def __init__(
        self,
        nb_actions: int,
        actor: keras.Model,
        critics: Any,
        critic_action_input: Any,
        memory: Any,
        gamma: float = 0.99,
        batch_size: int = 256,
        nb_steps_warmup: int = 1000,
        train_interval: int = 1,
        memory_interval: int = 1,
        target_model_update: float = 0.005,
        target_entropy: float | None = None,
        temperature: float = 1.0,
        learn_temperature: bool = True,
        custom_model_objects: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """keras-rl's manner of arguments, and after them those of `OffPolicyAgent`.

        Args:
            nb_actions: components of an action, A.
            actor: (None, window_length, *obs_shape) to (None, 2 A): means and log deviations before the tanh.
            critics: a pair of models as DDPG's critic, or one, which then gets a twin with weights of its own.
            critic_action_input: which of the first critic's inputs takes the action, in [-1, 1]; the second's is at the
                same place.
            memory: `agents.ReplayMemory`, or for one environment keras-rl's SequentialMemory.
            gamma: discount a step.
            batch_size: transitions an update.
            nb_steps_warmup: steps of uniformly random actions before anything learns.
            train_interval: steps an update.
            memory_interval: every how many steps one is stored.
            target_model_update: below 1 the share of the online weights an update, from 1 the updates between copies.
            target_entropy: what the temperature aims at, in nats of the action in [-1, 1]; -A by default (appendix D).
            temperature: alpha to begin with.
            learn_temperature: false keeps it there.
            custom_model_objects: for models with layers of the user's.
            **kwargs: `processor`, `n_step`, `updates_per_step`, `schedule`, `normalize_observations`,
                `on_lost_episode`, `seed`:
                see docs/agents.md.

        Raises:
            ValueError: the networks do not fit each other or nb_actions, or a temperature that is not positive.
        """
        check_actor(actor, 2 * nb_actions, "a mean and a log deviation an action")
        pair = list(critics) if isinstance(critics, (list, tuple)) else [critics]
        if len(pair) not in (1, 2):
            raise ValueError("critics must be one model or a pair, not %d" % len(pair))
        self.critic_action_input_idx = check_critic(nb_actions, actor, pair[0], critic_action_input)
        if len(pair) == 2:
            _check_twin(pair[0], pair[1], self.critic_action_input_idx)
        if not temperature > 0:
            raise ValueError("temperature must be more than 0, not %r" % (temperature,))
        super().__init__(
            nb_actions, memory, gamma, batch_size, train_interval, memory_interval, target_model_update, **kwargs
        )
        self.custom_model_objects = custom_model_objects or {}
        if len(pair) == 1:
            with keras.saving.custom_object_scope(self.custom_model_objects):
                pair.append(_twin_of(pair[0], self.rng))
        self.actor, self.critics, self.critic_action_input = actor, pair, critic_action_input
        self.networks = {"actor": actor, "critic": pair[0], "critic2": pair[1]}
        self.nb_steps_warmup = nb_steps_warmup
        self.target_entropy = -float(nb_actions) if target_entropy is None else float(target_entropy)
        self.learn_temperature = learn_temperature
        self._noise_seed = int(self.rng.integers(2**31))  # of the updates' noise, with their number
        self.log_temperature = tf.Variable(math.log(temperature), dtype=tf.float32, name="log_temperature")

    def compile(self, optimizer: Any, metrics: Sequence[Any] = ()) -> None:
        """Makes targets, optimizers and the compiled update.

        Args:
            optimizer: one for all (each gets a copy), or three (actor's, critics', temperature's); optimizers or names.
            metrics: of the first critic's prediction against its target, as names (mae) or functions.
        """
        three = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer] * 3
        if len(three) != 3:
            raise ValueError("optimizer must be one or three (actor's, critics', temperature's), not %d" % len(three))
        self.actor_optimizer, self.critic_optimizer, self.temperature_optimizer = (own(one) for one in three)
        self.metric_functions = named_metrics(metrics)
        with keras.saving.custom_object_scope(self.custom_model_objects):
            self.target_critics = [copy_of(critic) for critic in self.critics]
            self.update_target_models_hard()
            self.actor_optimizer.build(self.actor.trainable_variables)
            self.critic_optimizer.build(self._critic_variables)
            self.temperature_optimizer.build([self.log_temperature])
            self._finish_compile()

    # What the learner's loop asks for.

    @property
    def own_metrics(self) -> list[str]:
        return [*super().own_metrics, "actor_loss", "temperature", "entropy_nats"]

    @property
    def targets(self) -> dict[str, keras.Model]:
        return {"critic": self.target_critics[0], "critic2": self.target_critics[1]}

    @property
    def optimizers(self) -> dict[str, Any]:
        return {
            "actor": self.actor_optimizer,
            "critic": self.critic_optimizer,
            "temperature": self.temperature_optimizer,
        }

    @property
    def nb_warmup(self) -> int:
        return self.nb_steps_warmup

    @property
    def temperature(self) -> float:
        """alpha, the weight of entropy."""
        return math.exp(float(self.log_temperature.numpy()))

    @property
    def _critic_variables(self) -> list[Any]:
        return [variable for critic in self.critics for variable in critic.trainable_variables]

    def _phase(self, count: int, before: int) -> tuple[Any, ...]:
        return (tf.constant(self._noise(count, before)),)

    def _noise(self, count: int, before: int) -> np.ndarray:
        """Of the `count` updates after the first `before`, (K, 2, B, A): for next and present actions.

        A generator for each call needs no state in a checkpoint, and XLA's own is slow on a CPU.
        """
        rng = np.random.default_rng([self._noise_seed, before])
        return rng.standard_normal((count, 2, self.batch_size, self.nb_actions), np.float32)

    # Acting.

    def _choose(self, output: np.ndarray, slots: Sequence[int]) -> np.ndarray:
        mean, log_std = np.split(output, 2, axis=-1)  # (n, A) each
        if not self.training:
            return np.tanh(mean)
        if self.step < self.nb_steps_warmup:
            return self.rng.uniform(-1.0, 1.0, mean.shape)
        noise = self.rng.standard_normal(mean.shape)
        return np.tanh(mean + np.exp(np.clip(log_std, *LOG_STD)) * noise)

    # Learning: pure functions of a batch. B is the batch size, A the number of actions, W the window.

    def _update_many(
        self, states: Any, action: Any, reward: Any, next_states: Any, discount: Any, norm: Any, before: Any, noise: Any
    ) -> Any:
        """K updates; states [(K, B, W, ...)], action (K, B, A), reward and discount (K, B); metrics (K, M).

        `before` is the number of updates made so far, `noise` (K, 2, B, A) makes actions of policies.
        """
        states, next_states = normalized(states, norm), normalized(next_states, norm)
        count = action.shape[0]
        rows = tf.TensorArray(tf.float32, count, element_shape=(len(self.own_metrics),))
        for k in tf.range(count):
            here, there = [x[k] for x in states], [x[k] for x in next_states]
            critic = self.update_critic(here, action[k], reward[k], there, discount[k], noise[k, 0])
            actor_loss, entropy = self.update_actor(here, noise[k, 1])
            temperature = self.update_temperature(entropy)
            self.update_targets(before + tf.cast(k, tf.int64) + 1)
            rows = rows.write(k, tf.concat([critic, [actor_loss, temperature, entropy]], 0))
        return rows.stack()

    def critic_target(self, reward: Any, next_states: Any, discount: Any, noise: Any) -> Any:
        """y = r + discount (min Q'(s', a') - alpha log pi(a'|s')), (B,), with a' from the policy (eq. 3 and 5)."""
        next_action, log_prob = self._sample(next_states, noise, False)  # (B, A), (B,)
        q = tf.minimum(*(self._q(critic, next_action, next_states, False) for critic in self.target_critics))
        return reward + discount * (q - tf.exp(self.log_temperature) * log_prob)

    def update_critic(self, states: Any, action: Any, reward: Any, next_states: Any, discount: Any, noise: Any) -> Any:
        """One step on both critics' losses (eq. 5); returns their mean loss, metrics and mean Q of the first."""
        target = self.critic_target(reward, next_states, discount, noise)  # (B,)
        variables = self._critic_variables
        with tf.GradientTape() as tape:
            qs = [self._q(critic, action, states, True) for critic in self.critics]  # (B,) each
            losses = [0.5 * tf.reduce_mean(tf.square(target - q)) for q in qs]
            total = tf.add_n([*losses, *(extra for critic in self.critics for extra in critic.losses)])
        self.critic_optimizer.apply(tape.gradient(total, variables), variables)
        extra = [tf.reduce_mean(metric(target[:, None], qs[0][:, None])) for _, metric in self.metric_functions]
        return tf.stack([tf.add_n(losses) / 2, *extra, tf.reduce_mean(qs[0])])

    def update_actor(self, states: Any, noise: Any) -> tuple[Any, Any]:
        """One step on E[alpha log pi - min Q] by the reparameterised action (eq. 9); returns loss and entropy."""
        variables = self.actor.trainable_variables
        with tf.GradientTape() as tape:
            action, log_prob = self._sample(states, noise, True)  # (B, A), (B,)
            q = tf.minimum(*(self._q(critic, action, states, False) for critic in self.critics))  # (B,)
            loss = tf.reduce_mean(tf.exp(self.log_temperature) * log_prob - q)
            total = tf.add_n([loss, *self.actor.losses])
        self.actor_optimizer.apply(tape.gradient(total, variables), variables)
        return loss, -tf.reduce_mean(log_prob)

    def update_temperature(self, entropy: Any) -> Any:
        """One step on J(alpha) = alpha (entropy - target entropy), by log alpha (eq. 18); returns alpha."""
        if self.learn_temperature:
            # By log alpha the factor alpha of the gradient falls away, as in the authors' own code.
            self.temperature_optimizer.apply([entropy - self.target_entropy], [self.log_temperature])
        return tf.exp(self.log_temperature)

    def update_targets(self, number: Any) -> None:
        """The targets follow, a little each update or wholly every so many; `number` counts updates from 1."""
        for target, critic in zip(self.target_critics, self.critics, strict=True):
            if self.target_model_update < 1:
                soft_update(target, critic, self.target_model_update)
            elif number % int(self.target_model_update) == 0:
                hard_update(target, critic)

    def _sample(self, states: Any, noise: Any, training: bool) -> tuple[Any, Any]:
        """Actions (B, A) in (-1, 1) of the policy, and the logarithms of their densities (B,)."""
        mean, log_std = tf.split(self.actor(alone(states), training=training), 2, axis=-1)  # (B, A) each
        return squashed_gaussian(mean, tf.clip_by_value(log_std, *LOG_STD), noise)

    # Checkpoints.

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, values = super().state()
        return arrays, dict(values, noise_seed=self._noise_seed)

    def load_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        super().load_state(arrays, values)
        self._noise_seed = values["noise_seed"]

    def variables(self) -> Any:
        yield from super().variables()
        yield "log_temperature", self.log_temperature


def squashed_gaussian(mean: Any, log_std: Any, noise: Any) -> tuple[Any, Any]:
    """tanh(mean + exp(log_std) noise), (B, A), and the logarithm of its density, (B,) (appendix C, eq. 26).

    log(1 - tanh(u)^2) is written as 2 (log 2 - u - softplus(-2 u)), which keeps its digits where tanh is close to 1.
    """
    u = mean + tf.exp(log_std) * noise
    gaussian = -0.5 * tf.square(noise) - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2.0 * (math.log(2.0) - u - tf.nn.softplus(-2.0 * u))
    return tf.tanh(u), tf.reduce_sum(gaussian - squash, axis=-1)


def _twin_of(critic: keras.Model, rng: np.random.Generator) -> keras.Model:
    """A model of the same form with weights of its own: each kernel's values in another order."""
    twin = copy_of(critic)
    twin.set_weights([rng.permuted(w.ravel()).reshape(w.shape) if w.ndim > 1 else w for w in critic.get_weights()])
    return twin


def _check_twin(first: keras.Model, second: keras.Model, action_at: int) -> None:
    shapes = [
        [tuple(x.shape) for x in model.inputs] + [tuple(x.shape) for x in model.outputs] for model in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "both critics must take and give the same, with the action as input %d: %s" % (action_at, shapes)
        )
    if first is second or any(mine is theirs for mine in first.variables for theirs in second.variables):
        raise ValueError("the two critics must not share weights; give one, and the agent makes its twin")
