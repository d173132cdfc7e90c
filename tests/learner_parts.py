"""A seeded environment, small networks and small agents for the tests of what learns."""

from __future__ import annotations

import gymnasium
import keras
import numpy as np
from rl.random import OrnsteinUhlenbeckProcess

from agents import DDPGAgent, ReplayMemory, SACAgent


class Wander(gymnasium.Env):
    """A random walk that the action pushes, for `length` steps: all of it follows from its seed and its actions.

    `shown` has every observation and `actions` every action, as they were given and taken. From step `nan_at` on,
    counted over all episodes, rewards are NaN.
    """

    def __init__(self, length=5, low=(-1.0,), high=(1.0,), bound=np.inf, size=3, nan_at=None):
        self.observation_space = gymnasium.spaces.Box(-bound, bound, (size,))
        self.action_space = gymnasium.spaces.Box(np.float32(low), np.float32(high))
        self.length, self.nan_at, self.bound = length, nan_at, bound
        self.made = self.total = 0
        self.shown, self.actions, self.seeds = [], [], []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.made = 0
        self.at = self.np_random.normal(size=self.observation_space.shape)
        return self._observation(), {}

    def step(self, action):
        self.made, self.total = self.made + 1, self.total + 1
        self.actions.append(np.array(action))
        self.at = self.at + self.np_random.normal(0.1, 0.3, self.at.shape) + 0.1 * float(np.sum(action))
        reward = -float(np.mean(self.at**2))
        if self.nan_at is not None and self.total >= self.nan_at:
            reward = float("nan")
        return self._observation(), reward, False, self.made >= self.length, {}

    def _observation(self):
        shown = np.clip(self.at, -self.bound, self.bound).astype(np.float32)
        self.shown.append(shown)
        return shown.copy()


class Nested(gymnasium.Env):
    """Wander's walk as a dict {position, speed} or as a tuple of both; the parts differ in shape."""

    def __init__(self, kind="dict", length=5):
        box = gymnasium.spaces.Box
        position, speed = box(-np.inf, np.inf, (2,)), box(-np.inf, np.inf, (3,))
        if kind == "dict":
            self.observation_space = gymnasium.spaces.Dict({"speed": speed, "position": position})
        else:
            self.observation_space = gymnasium.spaces.Tuple((position, speed))
        self.action_space, self.kind, self.walk = box(-1, 1, (1,)), kind, Wander(length, size=5)

    def reset(self, *, seed=None, options=None):
        return self._parts(self.walk.reset(seed=seed)[0]), {}

    def step(self, action):
        obs, *rest = self.walk.step(action)
        return self._parts(obs), *rest

    def _parts(self, obs):
        return {"position": obs[:2], "speed": obs[2:]} if self.kind == "dict" else (obs[:2], obs[2:])


class Pictures(gymnasium.Env):
    """Shows pictures of 6 x 6 bytes."""

    def __init__(self, length=5):
        self.observation_space = gymnasium.spaces.Box(0, 255, (6, 6, 1), np.uint8)
        self.action_space, self.length, self.made = gymnasium.spaces.Box(-1, 1, (1,)), length, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made = 0
        return self._picture(), {}

    def step(self, action):
        self.made += 1
        return self._picture(), float(np.sum(action)), False, self.made >= self.length, {}

    def _picture(self):
        return self.np_random.integers(0, 256, (6, 6, 1), np.uint8)


def hidden(x, dense=keras.layers.Dense):
    """A layer of five tanh and one of four relu."""
    return dense(4, "relu")(dense(5, "tanh")(x))


def small_actor(outputs, obs_dim=3, window_length=1, final=None):
    """A perceptron of two hidden layers from observations to `outputs` numbers."""
    seen = keras.Input((window_length, obs_dim), name="observation")
    return keras.Model(seen, keras.layers.Dense(outputs, final)(hidden(keras.layers.Flatten()(seen))))


def small_critic(nb_actions, obs_dim=3, window_length=1):
    """A perceptron of two hidden layers from action and observation to a value, and its action input."""
    action, seen = keras.Input((nb_actions,), name="action"), keras.Input((window_length, obs_dim), name="seen")
    x = hidden(keras.layers.Concatenate()([action, keras.layers.Flatten()(seen)]))
    return keras.Model([action, seen], keras.layers.Dense(1)(x)), action


def sac(nb_actions=1, obs_dim=3, window_length=1, optimizer=None, metrics=(), models=None, seed=7, **settings):
    """A compiled SAC agent; `models` are (actor, critics, action input) instead of the small ones."""
    if seed is not None:
        keras.utils.set_random_seed(seed)
    if models is None:
        (first, action), (second, _) = (small_critic(nb_actions, obs_dim, window_length) for _ in range(2))
        models = small_actor(2 * nb_actions, obs_dim, window_length), [first, second], action
    settings = dict({"batch_size": 4, "nb_steps_warmup": 6, "memory": ReplayMemory(500, window_length, 1)}, **settings)
    agent = SACAgent(nb_actions, *models, seed=seed, **settings)
    agent.compile(keras.optimizers.Adam(1e-2) if optimizer is None else optimizer, metrics)
    return agent


def ddpg(nb_actions=1, obs_dim=3, window_length=1, optimizer=None, metrics=(), models=None, seed=7, **settings):
    """A compiled DDPG agent that scales its actions; `models` are (actor, critic, action input)."""
    if seed is not None:
        keras.utils.set_random_seed(seed)
    if models is None:
        models = (
            small_actor(nb_actions, obs_dim, window_length, "tanh"),
            *small_critic(nb_actions, obs_dim, window_length),
        )
    chosen = {"batch_size": 4, "nb_steps_warmup_critic": 6, "nb_steps_warmup_actor": 6, "scale_actions": True}
    chosen["memory"] = ReplayMemory(500, window_length, 1)
    agent = DDPGAgent(nb_actions, *models, seed=seed, **dict(chosen, **settings))
    agent.compile(keras.optimizers.Adam(1e-2) if optimizer is None else optimizer, metrics)
    return agent


def annealed_noise(steps=60):
    """keras-rl's noise with a memory, whose deviation falls over so many steps."""
    return OrnsteinUhlenbeckProcess(theta=0.15, mu=0.0, sigma=0.5, sigma_min=0.1, n_steps_annealing=steps, size=1)


#: Both agents by name, as functions of settings.
AGENTS = {"DDPG": ddpg, "SAC": sac}


def everything_of(agent):
    """All that a training has made of an agent, as arrays by name."""
    arrays, values = agent.state()
    memory = agent.memory
    columns = memory.columns(np.arange(memory.oldest, memory.count))
    arrays.update({"replay/" + name: column for name, column in columns.items()})
    return arrays, dict(values, memory=memory.meta())


def assert_same(first, second):
    """Two results of `everything_of` are equal bit for bit; the first difference is named."""
    (arrays, values), (other_arrays, other_values) = first, second
    assert set(arrays) == set(other_arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, other_arrays[name], err_msg=name, strict=True)
    assert set(values) == set(other_values)
    for name, value in values.items():
        assert value == other_values[name], name
