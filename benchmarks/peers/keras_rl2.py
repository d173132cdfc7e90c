"""keras-rl2's own DDPGAgent as a peer of `learning/updates.py`, which starts it in `.venv-peers/keras-rl2`.

An update is its `backward`, called as its `fit` calls it: one transition stored, one batch drawn and learnt from.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from benchmarks.shared.peer_process import serve
from benchmarks.shared.sizes import ROWS, arguments, random_rows

tf.compat.v1.disable_eager_execution()  # its actor's update is built from a graph's tensors
# It compares layers' inputs by ==, which TensorFlow 2 makes element by element unless it is told not to.
tf.compat.v1.disable_tensor_equality()

from rl.agents import DDPGAgent  # noqa: E402
from rl.memory import SequentialMemory  # noqa: E402
from tensorflow.keras.layers import Concatenate, Dense, Flatten, Input  # noqa: E402
from tensorflow.keras.models import Model  # noqa: E402


def make(obs: int, actions: int, hidden: list[int], batch: int) -> DDPGAgent:
    """The agent of keras-rl's DDPG example, in other sizes."""
    seen = Input((1, obs))
    x = Flatten()(seen)
    for width in hidden:
        x = Dense(width, "relu")(x)
    actor = Model(seen, Dense(actions, "tanh")(x))
    action, seen = Input((actions,)), Input((1, obs))
    x = Concatenate()([action, Flatten()(seen)])
    for width in hidden:
        x = Dense(width, "relu")(x)
    critic = Model([action, seen], Dense(1)(x))
    agent = DDPGAgent(
        nb_actions=actions,
        actor=actor,
        critic=critic,
        critic_action_input=action,
        memory=SequentialMemory(limit=ROWS, window_length=1),
        batch_size=batch,
        nb_steps_warmup_critic=0,
        nb_steps_warmup_actor=0,
        target_model_update=5e-3,
    )
    agent.compile(tf.keras.optimizers.legacy.Adam(learning_rate=1e-3))
    return agent


def main() -> None:
    """Serves until stdin closes."""
    args = arguments()
    agent = make(args.obs, args.actions, args.hidden, args.batch)
    rows = random_rows(args.obs, args.actions)
    for row in zip(*rows):  # noqa: B905  (Python 3.8 has no strict=)
        agent.memory.append(*row)
    agent.training, agent.step = True, 1

    def burst(count: int) -> None:
        for _ in range(count):
            at = agent.step % ROWS
            agent.recent_observation, agent.recent_action = rows[0][at], rows[1][at]
            agent.backward(rows[2][at], bool(rows[3][at]))
            agent.step += 1

    start: list[np.ndarray] = []

    def fingerprint() -> float:
        now = [np.concatenate([w.ravel() for w in model.get_weights()]) for model in (agent.actor, agent.critic)]
        start[:] = start or now
        return float(np.prod([np.abs(a - b).mean() for a, b in zip(now, start)]))  # noqa: B905

    serve({"keras-rl2": "1.0.5", "its TensorFlow": tf.__version__}, burst, fingerprint, (8,))


if __name__ == "__main__":
    main()
