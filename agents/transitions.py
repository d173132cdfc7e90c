"""Sampled transitions, as every memory gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: What keras-rl's memory gets as `terminal` at a time limit. Its one flag both ends an episode (any true value) and
#: stops bootstrapping; ours stops it only where the flag is exactly 1.
TRUNCATED = 2


@dataclass
class Transitions:
    """Sampled transitions, n of them, each over the `steps` steps that follow each other in its episode.

    Attributes:
        state, next_state: one array a leaf of the observation, each (n, window_length, *leaf_shape); zeros before the
            episode's start.
        action: (n, *action_shape), the first step's.
        reward: float32 (n,), the sum of gamma**k r_k over the steps.
        terminated: bool (n,), the task ended at the last step: do not bootstrap.
        truncated: bool (n,), it was cut off there.
        discount: float32 (n,), what the next state's value counts: gamma**steps, 0 where terminated.
        steps: int32 (n,), from 1 to the n_step asked for; fewer where the episode ended or goes no further yet.
    """

    state: list[np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    next_state: list[np.ndarray]
    terminated: np.ndarray
    truncated: np.ndarray
    discount: np.ndarray
    steps: np.ndarray
