"""Stable-Baselines3's SAC on all environments of a farm: python examples/sb3_farm.py --env Pendulum-v1

Start a farm first: python farm.py Pendulum-v1. Needs `pip install -e '.[sb3]'`, or `make sb3` and .venv-sb3/bin/python.
"""

import argparse

from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from farmer.sb3 import FarmVecEnv

parser = argparse.ArgumentParser()
parser.add_argument("--env", default="Pendulum-v1")
parser.add_argument("--farm", default="127.0.0.1:20099")
parser.add_argument("--slots", type=int, default=4)
parser.add_argument("--steps", type=int, default=10000)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--out", default="runs/sb3_farm")
args = parser.parse_args()

envs = VecMonitor(FarmVecEnv(args.env, args.slots, farmlist=[(args.farm, args.slots)]))
# As many updates as steps, whatever the number of environments.
model = SAC("MlpPolicy", envs, learning_starts=1000, gradient_steps=-1, gamma=0.98, learning_rate=1e-3, seed=args.seed)
model.learn(args.steps, log_interval=4)
model.save(args.out + "/sac")
mean, deviation = evaluate_policy(model, envs, n_eval_episodes=args.slots)
print("return of %d episodes: %.1f (deviation %.1f)" % (args.slots, mean, deviation))
envs.close()
