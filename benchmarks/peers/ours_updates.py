"""Our agents as a peer of `learning/updates.py`, which starts it."""

from __future__ import annotations

import gymnasium
import keras
import numpy as np
import tensorflow as tf

from agents import LocalPool, networks
from benchmarks.shared.peer_process import serve
from benchmarks.shared.sizes import EPISODE, ROWS, arguments, random_rows


class Spaces(gymnasium.Env):
    """Nothing but its spaces; no step of it is ever taken."""

    def __init__(self, obs: int, actions: int):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)


def filled_agent(kind: str, obs: int, actions: int, hidden: tuple[int, ...], batch: int):
    """A compiled agent with ROWS transitions, past its warm-up."""
    env = Spaces(obs, actions)
    make = {"sac": "make_sac", "ddpg": "make_ddpg"}[kind]
    agent = getattr(networks, make)(
        env.observation_space,
        env.action_space,
        seed=0,
        hidden=hidden,
        batch_size=batch,
        memory_limit=ROWS,
        normalize_observations=False,  # no peer does it
    )
    agent.prepare(LocalPool([env]))
    agent.step, agent.training = 10 * ROWS, True
    rows = random_rows(obs, actions)
    last = np.zeros(obs, np.float32)
    for i, (state, action, reward, over) in enumerate(zip(*rows, strict=True)):
        # The next observation is the very next row: SB3 and keras-rl store it so, too.
        agent.memory.add(0, state, action, reward, rows[0][i + 1] if i + 1 < ROWS else last, bool(over), False)
    assert len(agent.memory) >= ROWS - ROWS // EPISODE - 1, len(agent.memory)
    return agent


def main() -> None:
    """Serves until stdin closes."""
    args = arguments()
    agent = filled_agent(args.agent, args.obs, args.actions, tuple(args.hidden), args.batch)

    def fingerprint() -> float:
        # A product, so that an actor or a critic that stands still shows.
        models = [agent.actor, agent.critic] if hasattr(agent, "critic") else [agent.actor, *agent.critics]
        now = [np.concatenate([weights.ravel() for weights in model.get_weights()]) for model in models]
        start[:] = start or now
        return float(np.prod([np.abs(a - b).mean() for a, b in zip(now, start, strict=True)]))

    start: list[np.ndarray] = []
    about = {"TensorFlow": tf.__version__, "Keras": keras.__version__}
    serve(about, agent.update, fingerprint, (8, 32, 128))


if __name__ == "__main__":
    main()
