"""Default networks, and agents with settings that work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import keras
import numpy as np
from rl.random import GaussianWhiteNoiseProcess

from agents.arguments import check_seed
from agents.ddpg import DDPGAgent
from agents.memory import ReplayMemory
from agents.sac import SACAgent

#: Of one observation: a shape, or by name the shapes of its parts.
Shapes = tuple[int, ...] | dict[str, tuple[int, ...]]


def mlp_actor(
    observation_shape: Shapes,
    nb_actions: int,
    hidden: Sequence[int] = (256, 256),
    stochastic: bool = False,
    layer_norm: bool = False,
    window_length: int = 1,
    seed: int | None = None,
) -> keras.Model:
    """A multi-layer perceptron from (None, window_length, *observation_shape) to actions in [-1, 1].

    Args:
        observation_shape: of one observation, or a dict of its parts' shapes.
        nb_actions: components of an action, A.
        hidden: widths of the layers.
        stochastic: gives means and log deviations (None, 2 A), as SAC wants, instead of actions (None, A).
        layer_norm: normalises each hidden layer before its ReLU.
        window_length: observations a state.
        seed: of the weights.
    """
    seeds = keras.random.SeedGenerator(seed)
    inputs = _inputs(observation_shape, window_length)
    x = _hidden(_joined(inputs), hidden, layer_norm, seeds)
    if stochastic:
        x = keras.layers.Dense(2 * nb_actions, kernel_initializer=_kernel(seeds), name="mean_and_log_std")(x)
    else:
        # First actions near the middle: arXiv 1509.02971, section 7.
        small = keras.initializers.RandomUniform(-3e-3, 3e-3, seed=_next(seeds))
        x = keras.layers.Dense(nb_actions, "tanh", kernel_initializer=small, name="action")(x)
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], x, name="actor")


def mlp_critic(
    observation_shape: Shapes,
    nb_actions: int,
    hidden: Sequence[int] = (256, 256),
    layer_norm: bool = False,
    window_length: int = 1,
    seed: int | None = None,
) -> tuple[keras.Model, Any]:
    """A perceptron from action and observation to a value; returns (critic, its action input)."""
    seeds = keras.random.SeedGenerator(seed)
    action = keras.Input((nb_actions,), name="action")
    inputs = _inputs(observation_shape, window_length)
    x = _joined(inputs)
    # One layer over both, written as a sum of two: the actor's gradient then runs back through the action's part alone.
    both = _kernel_of(int(x.shape[-1]) + nb_actions, hidden[0], seeds)
    x = keras.layers.Dense(hidden[0], kernel_initializer=both(0), name="of_observation")(x)
    of_action = keras.layers.Dense(hidden[0], use_bias=False, kernel_initializer=both(1), name="of_action")(action)
    x = _activated(keras.layers.Add()([x, of_action]), layer_norm)
    x = _hidden(x, hidden[1:], layer_norm, seeds)
    value = keras.layers.Dense(1, kernel_initializer=_kernel(seeds), name="value")(x)
    return keras.Model([action, *inputs], value, name="critic"), action


def make_ddpg(
    observation_space: Any,
    action_space: Any,
    seed: int | None = None,
    hidden: Sequence[int] = (128, 128),
    learning_rate: float = 1e-3,
    memory_limit: int = 200_000,
    layer_norm: bool = False,
    **settings: Any,
) -> DDPGAgent:
    """A compiled DDPG agent for observations of numbers or images and a bounded action.

    Args:
        observation_space: a gymnasium Box, or a Dict of them.
        action_space: a bounded Box.
        seed: of weights, noise, sampling and episodes.
        hidden: widths of both networks.
        learning_rate: of both Adam optimizers.
        memory_limit: observations in replay.
        layer_norm: in both networks.
        **settings: any of DDPGAgent's, instead of the ones chosen here.

    Raises:
        ValueError: a space that DDPG cannot learn on, or a setting that makes no sense.
    """
    check_seed(seed)
    shape, nb_actions = _fits("DDPG", observation_space, action_space)
    if seed is not None:
        np.random.seed(seed)  # keras-rl's random processes draw from numpy's global generator
    actor = mlp_actor(shape, nb_actions, hidden, layer_norm=layer_norm, seed=seed)
    critic, action = mlp_critic(shape, nb_actions, hidden, layer_norm, seed=None if seed is None else seed + 1)
    chosen: dict[str, Any] = {
        "memory": ReplayMemory(memory_limit, seed=seed),
        "batch_size": 128,
        "nb_steps_warmup_critic": 1000,
        "nb_steps_warmup_actor": 1000,
        "target_model_update": 5e-3,
        "gamma": 0.98,
        "random_process": GaussianWhiteNoiseProcess(sigma=0.1, size=nb_actions),
        "scale_actions": True,
        "action_space": action_space,
        "seed": seed,
    }
    agent = DDPGAgent(nb_actions, actor, critic, action, **dict(chosen, **settings))
    agent.compile(keras.optimizers.Adam(learning_rate))
    return agent


def make_sac(
    observation_space: Any,
    action_space: Any,
    seed: int | None = None,
    hidden: Sequence[int] = (256, 256),
    learning_rate: float = 3e-4,
    memory_limit: int = 1_000_000,
    layer_norm: bool = False,
    **settings: Any,
) -> SACAgent:
    """A compiled SAC agent for observations of numbers or images and a bounded action; arguments as `make_ddpg`."""
    check_seed(seed)
    shape, nb_actions = _fits("SAC", observation_space, action_space)
    seeds = [None] * 3 if seed is None else [seed, seed + 1, seed + 2]
    actor = mlp_actor(shape, nb_actions, hidden, True, layer_norm, seed=seeds[0])
    pairs = [mlp_critic(shape, nb_actions, hidden, layer_norm, seed=one) for one in seeds[1:]]
    chosen: dict[str, Any] = {
        "memory": ReplayMemory(memory_limit, seed=seed),
        "seed": seed,
        "action_space": action_space,
    }
    agent = SACAgent(nb_actions, actor, [c for c, _ in pairs], pairs[0][1], **dict(chosen, **settings))
    agent.compile(keras.optimizers.Adam(learning_rate))
    return agent


def _fits(name: str, observation_space: Any, action_space: Any) -> tuple[Shapes, int]:
    """The shapes for the networks. Raises ValueError for a space the agent cannot learn on."""
    if not isinstance(action_space, gymnasium.spaces.Box) or not action_space.is_bounded():
        raise ValueError("%s wants a bounded Box of actions, and this environment has %s" % (name, action_space))
    nb_actions = int(np.prod(action_space.shape))
    if isinstance(observation_space, gymnasium.spaces.Box):
        return tuple(observation_space.shape), nb_actions
    if isinstance(observation_space, gymnasium.spaces.Dict):
        parts = {key: observation_space[key] for key in sorted(observation_space.spaces)}
        if all(isinstance(part, gymnasium.spaces.Box) for part in parts.values()):
            return {key: tuple(part.shape) for key, part in parts.items() if part.shape is not None}, nb_actions
    raise ValueError(
        "%s wants a Box of observations, or a Dict of Boxes, and this environment has %s\n"
        "  now: flatten it in a factory of your own (gymnasium.wrappers.FlattenObservation) and farm that"
        % (name, observation_space)
    )


def _inputs(shapes: Shapes, window_length: int) -> list[Any]:
    parts = shapes if isinstance(shapes, dict) else {"observation": shapes}
    return [keras.Input((window_length, *parts[name]), name=name) for name in sorted(parts)]


def _joined(inputs: list[Any]) -> Any:
    flat = [keras.layers.Flatten()(x) for x in inputs]
    return flat[0] if len(flat) == 1 else keras.layers.Concatenate()(flat)


def _hidden(x: Any, widths: Sequence[int], layer_norm: bool, seeds: keras.random.SeedGenerator) -> Any:
    for width in widths:
        x = _activated(keras.layers.Dense(width, kernel_initializer=_kernel(seeds))(x), layer_norm)
    return x


def _activated(x: Any, layer_norm: bool) -> Any:
    return keras.layers.ReLU()(keras.layers.LayerNormalization()(x) if layer_norm else x)


def _kernel_of(fan_in: int, width: int, seeds: keras.random.SeedGenerator) -> Callable[[int], keras.Initializer]:
    """Glorot's initializer for parts of one kernel of `fan_in` rows."""
    limit = float(np.sqrt(6.0 / (fan_in + width)))
    first = _next(seeds)
    return lambda part: keras.initializers.RandomUniform(-limit, limit, seed=first + part)


def _next(seeds: keras.random.SeedGenerator) -> int:
    return int(np.asarray(seeds.next())[1] % 2**31)


def _kernel(seeds: keras.random.SeedGenerator) -> keras.Initializer:
    return keras.initializers.GlorotUniform(seed=_next(seeds))
