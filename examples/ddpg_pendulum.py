"""A swing-up with keras-rl's interface: python examples/ddpg_pendulum.py

Written for keras-rl; the import of DDPGAgent is the only line that is ours.
"""

import argparse

import gymnasium as gym

from agents import DDPGAgent  # keras-rl: from rl.agents import DDPGAgent

from rl.memory import SequentialMemory  # isort: skip
from rl.random import OrnsteinUhlenbeckProcess  # isort: skip
from tensorflow.keras.layers import Activation, Concatenate, Dense, Flatten, Input  # isort: skip
from tensorflow.keras.models import Model, Sequential  # isort: skip
from tensorflow.keras.optimizers import Adam  # isort: skip

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20000)
parser.add_argument("--weights", default="ddpg_pendulum.h5f")
args = parser.parse_args()

env = gym.make("Pendulum-v1")
nb_actions = env.action_space.shape[0]
shape = (1, *env.observation_space.shape)

actor = Sequential(
    [Input(shape), Flatten(), Dense(64), Activation("relu"), Dense(64), Activation("relu"), Dense(nb_actions)]
)

action_input = Input((nb_actions,), name="action_input")
observation_input = Input(shape, name="observation_input")
x = Concatenate()([action_input, Flatten()(observation_input)])
x = Dense(64, activation="relu")(x)
x = Dense(64, activation="relu")(x)
critic = Model(inputs=[action_input, observation_input], outputs=Dense(1)(x))

agent = DDPGAgent(
    nb_actions=nb_actions,
    actor=actor,
    critic=critic,
    critic_action_input=action_input,
    memory=SequentialMemory(limit=100000, window_length=1),
    nb_steps_warmup_critic=200,
    nb_steps_warmup_actor=200,
    random_process=OrnsteinUhlenbeckProcess(size=nb_actions, theta=0.15, mu=0.0, sigma=0.3),
    gamma=0.99,
    target_model_update=1e-3,
)
agent.compile(Adam(learning_rate=1e-3, clipnorm=1.0), metrics=["mae"])
agent.fit(env, nb_steps=args.steps, visualize=False, verbose=1, nb_max_episode_steps=200)
agent.save_weights(args.weights, overwrite=True)
agent.test(env, nb_episodes=3, visualize=False, nb_max_episode_steps=200)
