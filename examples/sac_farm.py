"""SAC in keras-rl's manner, on all environments of a farm: python examples/sac_farm.py --env Pendulum-v1

Start one first: python farm.py Pendulum-v1
"""

import argparse

from tensorflow.keras.layers import Concatenate, Dense, Flatten, Input
from tensorflow.keras.models import Model
from tensorflow.keras.optimizers import Adam

from agents import ReplayMemory, SACAgent
from agents.checkpoint import Autosave, Checkpointer
from agents.metrics import MetricsLogger
from farmer import Farmer

parser = argparse.ArgumentParser()
parser.add_argument("--env", default="Pendulum-v1")
parser.add_argument("--farm", default="127.0.0.1:20099")
parser.add_argument("--slots", type=int, default=2)
parser.add_argument("--steps", type=int, default=10000)
parser.add_argument("--out", default="runs/sac_farm")
args = parser.parse_args()


def hidden(x):
    return Dense(256, activation="relu")(Dense(256, activation="relu")(x))


with Farmer(args.env, [(args.farm, args.slots)]) as farmer:
    nb_actions = farmer.action_space.shape[0]
    shape = (1, *farmer.observation_space.shape)

    observation = Input(shape)
    actor = Model(observation, Dense(2 * nb_actions)(hidden(Flatten()(observation))))  # means and log deviations

    action, seen = Input((nb_actions,)), Input(shape)
    critic = Model([action, seen], Dense(1)(hidden(Concatenate()([action, Flatten()(seen)]))))

    agent = SACAgent(nb_actions, actor, critic, action, ReplayMemory(limit=100_000), nb_steps_warmup=1000, gamma=0.98)
    agent.compile(Adam(1e-3))
    callbacks = [MetricsLogger(args.out), Autosave(Checkpointer(args.out + "/checkpoint", every_s=300))]
    agent.fit(farmer, nb_steps=args.steps, callbacks=callbacks, verbose=1, log_interval=2000)
    agent.save_weights(args.out + "/sac", overwrite=True)
    agent.test(farmer, nb_episodes=4, visualize=False)
