"""What agents do with Keras models: call, copy, follow, and check that they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from agents.scaling import CLIP, Statistics


def normalized(inputs: list[Any], norm: Statistics) -> list[Any]:
    """Observation inputs (..., *shape) in standard deviations from the mean, clipped; unchanged without statistics."""
    if not norm:
        return list(inputs)
    return [
        tf.clip_by_value((x - mean) * inverse, -CLIP, CLIP) for x, (mean, inverse) in zip(inputs, norm, strict=True)
    ]


def q_values(critic: keras.Model, action_at: int, action: Any, states: Any, training: bool) -> Any:
    """A critic's values (B,) of an action, put where it takes it among the observation inputs."""
    inputs = list(states)
    inputs.insert(action_at, action)
    return tf.squeeze(critic(inputs, training=training), -1)


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
