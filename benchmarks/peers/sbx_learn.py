"""SBX's SAC on an environment, as `learning/returns.py halfcheetah --peer` starts it in `.venv-peers/sbx`.

Progress goes to stderr; the last line of stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import gymnasium
import numpy as np
import sbx
from stable_baselines3.common.callbacks import BaseCallback


class Progress(BaseCallback):
    """A line each 5,000 steps."""

    def _on_step(self) -> bool:
        if self.num_timesteps % 5000 == 0:
            returns = [episode["r"] for episode in self.model.ep_info_buffer][-10:]
            mean = np.mean(returns) if returns else np.nan
            print("SBX: %d steps, last 10 episodes %.1f" % (self.num_timesteps, mean), file=sys.stderr, flush=True)
        return True


def evaluate(model: sbx.SAC, name: str, episodes: int, seed: int) -> list[float]:
    """Returns of whole episodes, the policy's mean action."""
    env, returns = gymnasium.make(name), []
    for number in range(episodes):
        obs, _ = env.reset(seed=seed + number)
        total, over = 0.0, False
        while not over:
            action, _ = model.predict(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return returns


def main() -> None:
    """Trains, evaluates, prints the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--episodes", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    model = sbx.SAC("MlpPolicy", gymnasium.make(args.env), seed=args.seed, **args.settings)
    start = time.monotonic()
    model.learn(args.steps, callback=Progress())
    trained = time.monotonic() - start
    returns = evaluate(model, args.env, args.episodes, seed=10_000 + args.seed)
    updates = int(model._n_updates)
    print(json.dumps({"returns": returns, "train_s": trained, "updates": updates, "library": "SBX " + sbx.__version__}))


if __name__ == "__main__":
    main()
