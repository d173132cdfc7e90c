"""Deep Deterministic Policy Gradient (Lillicrap et al. 2015, arXiv 1509.02971) with keras-rl's constructor and methods.

    from agents import DDPGAgent

The same sections in the same order as `sac.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from agents.models import (
    alone,
    check_actor,
    check_critic,
    clipped_error,
    copy_of,
    hard_update,
    named_metrics,
    normalized,
    own,
    soft_update,
)
from agents.noise import NoiseBank
from agents.offpolicy import OffPolicyAgent


class DDPGAgent(OffPolicyAgent):
    """An actor and a critic built by the user, learning off-policy from replay.

    The actor's output is the action itself, as in keras-rl, and is clipped to the bounds of the space after noise; with
    `scale_actions` it is an action in [-1, 1], which the agent scales to those bounds.
    """

    needs_bounds = False

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
        *,
        scale_actions: bool = False,
        **kwargs: Any,
    ):
        """keras-rl's arguments, and after them those of `OffPolicyAgent`.

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
            random_process: keras-rl's exploration noise, in the actor's units; each environment has a state of its own.
            custom_model_objects: for models with layers of the user's.
            target_model_update: below 1 the share of the online weights an update (eq. 7's tau), from 1 the updates
                between full copies.
            scale_actions: the actor works in [-1, 1] whatever the environment's bounds are.
            **kwargs: `processor`, `n_step`, `updates_per_step`, `schedule`, `normalize_observations`,
                `on_lost_episode`, `seed`:
                see docs/agents.md.

        Raises:
            ValueError: the networks do not fit each other or nb_actions.
        """
        check_actor(actor, nb_actions, "one value an action")
        self.critic_action_input_idx = check_critic(nb_actions, actor, critic, critic_action_input)
        settings = nb_actions, memory, gamma, batch_size, train_interval, memory_interval, target_model_update
        super().__init__(*settings, scale_actions=scale_actions, **kwargs)
        if delta_range is not None:
            delta_clip = float(delta_range[1])
            warnings.warn("delta_range is keras-rl's former name: taken as delta_clip=%g" % delta_clip, stacklevel=2)
        self.actor, self.critic, self.critic_action_input = actor, critic, critic_action_input
        self.networks = {"actor": actor, "critic": critic}
        self.nb_steps_warmup_critic, self.nb_steps_warmup_actor = nb_steps_warmup_critic, nb_steps_warmup_actor
        self.delta_clip, self.random_process = delta_clip, random_process
        self.custom_model_objects = custom_model_objects or {}
        self._noise = NoiseBank(random_process) if random_process is not None else None

    def compile(self, optimizer: Any, metrics: Sequence[Any] = ()) -> None:
        """Makes targets, optimizers and the compiled update.

        Args:
            optimizer: one for both (the actor gets a copy), or a pair (actor's, critic's); optimizers or their names.
            metrics: of the critic's prediction against its target, as names (mae) or functions.
        """
        pair = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer, optimizer]
        if len(pair) != 2:
            raise ValueError("optimizer must be one or a pair (actor's, critic's), not %d" % len(pair))
        self.actor_optimizer, self.critic_optimizer = (own(one) for one in pair)
        self.metric_functions = named_metrics(metrics)
        with keras.saving.custom_object_scope(self.custom_model_objects):
            self.target_actor, self.target_critic = copy_of(self.actor), copy_of(self.critic)
            self.update_target_models_hard()
            self.actor_optimizer.build(self.actor.trainable_variables)
            self.critic_optimizer.build(self.critic.trainable_variables)
            self._finish_compile()

    # What the learner's loop asks for.

    @property
    def targets(self) -> dict[str, keras.Model]:
        return {"actor": self.target_actor, "critic": self.target_critic}

    @property
    def optimizers(self) -> dict[str, Any]:
        return {"actor": self.actor_optimizer, "critic": self.critic_optimizer}

    @property
    def nb_warmup(self) -> int:
        return min(self.nb_steps_warmup_critic, self.nb_steps_warmup_actor)

    def _phase(self, count: int, before: int) -> tuple[bool, bool]:
        return self.step > self.nb_steps_warmup_critic, self.step > self.nb_steps_warmup_actor

    # Acting.

    def _choose(self, output: np.ndarray, slots: Sequence[int]) -> np.ndarray:
        if self.training and self._noise is not None:
            output = output + np.stack([self._noise.sample(slot) for slot in slots]).reshape(output.shape)
        return self.actions.clipped(output)

    def began(self, slot: int) -> None:
        if self._noise is not None:
            self._noise.reset(slot)

    def reset_states(self) -> None:
        """Noise begins anew; so does the state of keras-rl's own `forward`."""
        super().reset_states()
        if self._noise is not None:
            self._noise.reset_all()

    # Learning: pure functions of a batch. B is the batch size, A the number of actions, W the window.

    def _update_many(
        self, states: Any, action: Any, reward: Any, next_states: Any, discount: Any, norm: Any, before: Any,
        critic: bool, actor: bool,
    ) -> Any:  # fmt: skip
        """K updates; states [(K, B, W, ...)], action (K, B, A), reward and discount (K, B); metrics (K, M).

        `before` is the number of updates made so far; `critic` and `actor` say which of them learn by now.
        """
        states, next_states = normalized(states, norm), normalized(next_states, norm)
        count = action.shape[0]
        rows = tf.TensorArray(tf.float32, count, element_shape=(len(self.own_metrics),))
        for k in tf.range(count):
            here, there = [x[k] for x in states], [x[k] for x in next_states]
            row = tf.zeros(len(self.own_metrics))
            if critic:
                row = self.update_critic(here, action[k], reward[k], there, discount[k])
            if actor:
                self.update_actor(here)
            self.update_targets(before + tf.cast(k, tf.int64) + 1)
            rows = rows.write(k, row)
        return rows.stack()

    def critic_target(self, reward: Any, next_states: Any, discount: Any) -> Any:
        """y = r + discount Q'(s', mu'(s')), (B,); discount is 0 where the task ended (algorithm 1)."""
        next_action = self.target_actor(alone(next_states), training=False)  # (B, A)
        return reward + discount * self._q(self.target_critic, next_action, next_states, False)

    def update_critic(self, states: Any, action: Any, reward: Any, next_states: Any, discount: Any) -> Any:
        """One step on the critic's loss (algorithm 1, L); returns loss, metrics and mean Q."""
        target = self.critic_target(reward, next_states, discount)  # (B,)
        with tf.GradientTape() as tape:
            q = self._q(self.critic, action, states, True)  # (B,)
            loss = tf.reduce_mean(clipped_error(target - q, self.delta_clip))
            if self.critic.losses:
                loss += tf.add_n(self.critic.losses)
        variables = self.critic.trainable_variables
        self.critic_optimizer.apply(tape.gradient(loss, variables), variables)
        extra = [tf.reduce_mean(metric(target[:, None], q[:, None])) for _, metric in self.metric_functions]
        return tf.stack([loss, *extra, tf.reduce_mean(q)])

    def update_actor(self, states: Any) -> None:
        """One step up the critic's value of the actor's actions (algorithm 1, eq. 6)."""
        with tf.GradientTape() as tape:
            action = self.actor(alone(states), training=True)  # (B, A)
            loss = -tf.reduce_mean(self._q(self.critic, action, states, False))
            if self.actor.losses:
                loss += tf.add_n(self.actor.losses)
        variables = self.actor.trainable_variables
        self.actor_optimizer.apply(tape.gradient(loss, variables), variables)

    def update_targets(self, number: Any) -> None:
        """The targets follow, a little each update or wholly every so many; `number` counts updates from 1."""
        if self.target_model_update < 1:
            soft_update(self.target_actor, self.actor, self.target_model_update)
            soft_update(self.target_critic, self.critic, self.target_model_update)
        elif number % int(self.target_model_update) == 0:
            hard_update(self.target_actor, self.actor)
            hard_update(self.target_critic, self.critic)

    # Checkpoints.

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, values = super().state()
        return arrays, dict(values, noise=self._noise.n_steps if self._noise is not None else 0)

    def load_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        super().load_state(arrays, values)
        if self._noise is not None:
            self._noise.n_steps = values["noise"]
