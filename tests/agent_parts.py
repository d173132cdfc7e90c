"""Agents and environments that the tests of `agents/` share."""

from __future__ import annotations

import gymnasium
import keras
import numpy as np

from agents import Agent, DDPGAgent, ReplayMemory


class Counter(gymnasium.Env):
    """Observes [its number, episode, step]; the reward is the count of all its steps, the end as it is told.

    `log` has each transition as (observation, action, reward, next observation, terminated, truncated).
    """

    def __init__(self, length=5, number=0, terminates=False, truncates=True):
        self.observation_space = gymnasium.spaces.Box(0, np.inf, (3,))
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,))
        self.length, self.number = length, number
        self.terminates, self.truncates = terminates, truncates
        self.episode, self.made, self.total, self.log = 0, 0, 0, []

    def reset(self, *, seed=None, options=None):
        self.episode, self.made = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action):
        before = self._observation()
        self.made, self.total = self.made + 1, self.total + 1
        over = self.made >= self.length
        ends = over and self.terminates, over and self.truncates and not self.terminates
        self.log.append((before, np.array(action), float(self.total), self._observation(), *ends))
        return self._observation(), float(self.total), *ends, {"total": float(self.total), "name": "counter"}

    def _observation(self):
        return np.array([self.number, self.episode, self.made], np.float32)


class OldCounter(Counter):
    """The same by gym's former rules: reset gives the observation alone, step four values."""

    def reset(self):
        return super().reset()[0]

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if truncated:
            info["TimeLimit.truncated"] = True
        return obs, reward, terminated or truncated, info


class Recorder(Agent):
    """Acts by its slot and learns nothing; notes what the loop told it."""

    metrics_names = ("loss",)

    def __init__(self, processor=None):
        super().__init__(processor)
        self.compiled = True
        self.remembered, self.cuts, self.learnt, self.asked = [], [], [], []

    def act(self, states, slots):
        self.asked.append((states, list(slots)))
        return np.full((len(states), 1), 0.5, np.float32)

    def remember(self, episode, reward, next_obs, terminated, truncated):
        self.remembered.append((episode.slot, episode.obs, episode.chosen, reward, next_obs, terminated, truncated))

    def interrupted(self, slot):
        self.cuts.append(slot)

    def learn(self, steps, nb_slots):
        self.learnt.append(steps)
        return [0.25]


def linear_agent(obs_dim=3, nb_actions=1, window_length=1, memory=None, optimizer=None, metrics=(), **settings):
    """A DDPG agent of two linear networks: the whole of it can be computed by hand."""
    keras.utils.set_random_seed(7)
    observation = keras.Input((window_length, obs_dim), name="observation")
    actor = keras.Model(observation, keras.layers.Dense(nb_actions)(keras.layers.Flatten()(observation)))
    action, seen = keras.Input((nb_actions,), name="action"), keras.Input((window_length, obs_dim), name="seen")
    both = keras.layers.Concatenate()([action, keras.layers.Flatten()(seen)])
    critic = keras.Model([action, seen], keras.layers.Dense(1)(both))
    memory = ReplayMemory(10_000, window_length, seed=1) if memory is None else memory
    agent = DDPGAgent(nb_actions, actor, critic, action, memory, **settings)
    agent.compile(keras.optimizers.SGD(0.01) if optimizer is None else optimizer, metrics=metrics)
    return agent
