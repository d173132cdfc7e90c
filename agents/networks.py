"""Default networks, and a DDPG agent with settings that work."""

from __future__ import annotations

from typing import Any

import gymnasium
import keras
import numpy as np
from rl.random import GaussianWhiteNoiseProcess

from agents.ddpg import DDPGAgent
from agents.memory import ReplayMemory


def mlp_actor(
    observation_shape: tuple[int, ...],
    low: np.ndarray,
    high: np.ndarray,
    hidden: tuple[int, ...] = (64, 64),
    window_length: int = 1,
    seed: int | None = None,
) -> keras.Model:
    """A multi-layer perceptron from (None, window_length, *observation_shape) to actions within [low, high]."""
    seeds = keras.random.SeedGenerator(seed)
    observation = keras.Input((window_length, *observation_shape), name="observation")
    x = keras.layers.Flatten()(observation)
    for width in hidden:
        x = keras.layers.Dense(width, "relu", kernel_initializer=_kernel(seeds))(x)
    small = keras.initializers.RandomUniform(
        -3e-3, 3e-3, seed=_next(seeds)
    )  # first actions near the middle: DDPG, sec. 7
    x = keras.layers.Dense(low.size, "tanh", kernel_initializer=small)(x)
    scale, offset = ((high - low) / 2).ravel().tolist(), ((high + low) / 2).ravel().tolist()
    return keras.Model(observation, keras.layers.Rescaling(scale, offset, name="to_bounds")(x), name="actor")


def mlp_critic(
    observation_shape: tuple[int, ...],
    nb_actions: int,
    hidden: tuple[int, ...] = (64, 64),
    window_length: int = 1,
    seed: int | None = None,
) -> tuple[keras.Model, Any]:
    """A perceptron from action and observation to a value; returns (critic, its action input)."""
    seeds = keras.random.SeedGenerator(seed)
    action = keras.Input((nb_actions,), name="action")
    observation = keras.Input((window_length, *observation_shape), name="observation")
    x = keras.layers.Concatenate()([action, keras.layers.Flatten()(observation)])
    for width in hidden:
        x = keras.layers.Dense(width, "relu", kernel_initializer=_kernel(seeds))(x)
    value = keras.layers.Dense(1, kernel_initializer=_kernel(seeds))(x)
    return keras.Model([action, observation], value, name="critic"), action


def _next(seeds: keras.random.SeedGenerator) -> int:
    return int(np.asarray(seeds.next())[1] % 2**31)


def _kernel(seeds: keras.random.SeedGenerator) -> keras.Initializer:
    return keras.initializers.GlorotUniform(seed=_next(seeds))


def make_ddpg(
    observation_space: Any,
    action_space: Any,
    seed: int | None = None,
    hidden: tuple[int, ...] = (128, 128),
    learning_rate: float = 1e-3,
    memory_limit: int = 200_000,
    **settings: Any,
) -> DDPGAgent:
    """A compiled DDPG agent for a flat or image observation and a bounded action.

    Args:
        observation_space, action_space: gymnasium Boxes.
        seed: of weights, noise and sampling.
        hidden: widths of both networks.
        learning_rate: of both Adam optimizers.
        memory_limit: transitions in replay.
        **settings: any of DDPGAgent's, instead of the ones chosen here.

    Raises:
        ValueError: a space that DDPG cannot learn on.
    """
    if not isinstance(observation_space, gymnasium.spaces.Box):
        raise ValueError(
            "DDPG wants a Box of observations, and this environment has %s\n"
            "  now: flatten it in a factory of your own (gymnasium.wrappers.FlattenObservation) and farm that"
            % observation_space
        )
    if not isinstance(action_space, gymnasium.spaces.Box) or not action_space.is_bounded():
        raise ValueError("DDPG wants a bounded Box of actions, and this environment has %s" % action_space)
    if seed is not None:
        np.random.seed(seed)  # keras-rl's random processes draw from numpy's global generator
    nb_actions = int(np.prod(action_space.shape))
    actor = mlp_actor(observation_space.shape, action_space.low, action_space.high, hidden, seed=seed)
    critic, action = mlp_critic(observation_space.shape, nb_actions, hidden, seed=None if seed is None else seed + 1)
    span = float(np.mean(action_space.high - action_space.low)) / 2
    chosen: dict[str, Any] = {
        "memory": ReplayMemory(memory_limit, seed=seed),
        "batch_size": 128,
        "nb_steps_warmup_critic": 1000,
        "nb_steps_warmup_actor": 1000,
        "target_model_update": 5e-3,
        "gamma": 0.98,
        "random_process": GaussianWhiteNoiseProcess(sigma=0.1 * span, size=nb_actions),
    }
    agent = DDPGAgent(nb_actions, actor, critic, action, **dict(chosen, **settings))
    agent.compile(keras.optimizers.Adam(learning_rate))
    return agent
