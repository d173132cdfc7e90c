"""SBX and Stable-Baselines3 as peers of `learning/updates.py`, which starts it in `.venv-peers/sbx`."""

from __future__ import annotations

import gymnasium
import jax
import numpy as np
import sbx
import stable_baselines3
import torch
from stable_baselines3.common.logger import Logger

from benchmarks.shared.peer_process import serve
from benchmarks.shared.sizes import ROWS, arguments, random_rows


class Spaces(gymnasium.Env):
    """Nothing but its spaces; no step of it is ever taken."""

    def __init__(self, obs: int, actions: int):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)


def main() -> None:
    """Serves until stdin closes."""
    args = arguments()
    library = {"sbx": sbx, "sb3": stable_baselines3}[args.who]
    model = getattr(library, args.agent.upper())(
        "MlpPolicy",
        Spaces(args.obs, args.actions),
        buffer_size=ROWS,
        batch_size=args.batch,
        policy_kwargs={"net_arch": args.hidden},
        device="cpu",
        seed=0,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    fill(model.replay_buffer, *random_rows(args.obs, args.actions))

    def burst(count: int) -> None:
        model.train(gradient_steps=count, batch_size=args.batch)
        jax.block_until_ready([state.params for state in states(model)])

    about = {
        "jax": jax.__version__,
        "SBX": sbx.__version__,
        "Stable-Baselines3": stable_baselines3.__version__,
        "torch": torch.__version__,
    }
    start: list[list[np.ndarray]] = []

    def fingerprint() -> float:
        now = weights(model)
        start[:] = start or now
        return float(np.prod([np.abs(a - b).mean() for a, b in zip(now, start)]))  # noqa: B905  (same lengths)

    # SBX compiles a loop over the updates of a call and unrolls none of it; torch gains nothing from longer calls.
    serve(about, burst, fingerprint, (8, 32, 128) if library is sbx else (8, 32))


def fill(buffer, obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray) -> None:
    """SB3's buffer, used by both libraries, with one environment."""
    buffer.observations[:, 0] = obs
    buffer.next_observations[:-1, 0] = obs[1:]
    buffer.actions[:, 0] = actions
    buffer.rewards[:, 0] = rewards
    buffer.dones[:, 0] = terminated
    buffer.full, buffer.pos = True, 0


def states(model) -> list:
    """The train states of SBX's networks; none for SB3."""
    policy = model.policy
    return [policy.actor_state, policy.qf_state] if hasattr(policy, "qf_state") else []


def weights(model) -> list[np.ndarray]:
    """Of actor and critic, each as one vector."""
    found = states(model)
    if found:
        leaves = [jax.tree_util.tree_leaves(state.params) for state in found]
        return [np.concatenate([np.ravel(leaf) for leaf in group]) for group in leaves]
    nets = (model.policy.actor, model.policy.critic)
    return [torch.cat([p.detach().reshape(-1) for p in net.parameters()]).numpy().copy() for net in nets]


if __name__ == "__main__":
    main()
