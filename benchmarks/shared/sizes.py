"""What every learner of `learning/updates.py` is told, and the random replay that all of them learn from."""

from __future__ import annotations

import argparse

import numpy as np

ROWS = 100_000  #: transitions in replay
EPISODE = 100  #: steps, after which an episode terminates


def arguments() -> argparse.Namespace:
    """The command line of a peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", dest="who", default="")
    parser.add_argument("--agent", choices=("sac", "ddpg"), required=True)
    parser.add_argument("--obs", type=int, required=True)
    parser.add_argument("--actions", type=int, required=True)
    parser.add_argument("--hidden", type=int, nargs="+", required=True)
    parser.add_argument("--batch", type=int, required=True)
    return parser.parse_args()


def random_rows(obs: int, actions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ROWS of (observation, action in [-1, 1], reward, terminated), the same for all: float32, bool."""
    rng = np.random.RandomState(0)
    terminated = np.arange(1, ROWS + 1) % EPISODE == 0
    return (
        rng.standard_normal((ROWS, obs)).astype(np.float32),
        rng.uniform(-1, 1, (ROWS, actions)).astype(np.float32),
        rng.standard_normal(ROWS).astype(np.float32),
        terminated,
    )
