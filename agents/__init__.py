"""keras-rl agents on Keras 3 that learn from one environment or from a whole farm.

    from agents import DDPGAgent

They take anything with gymnasium's verbs, gym's, or a pool's (`agents.pool_api`), and know nothing of the network.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported: its notes on CPU features and CUDA

from agents.keras_rl import bridge

bridge.install()

from agents.core import Agent  # noqa: E402
from agents.ddpg import DDPGAgent  # noqa: E402
from agents.local import LocalPool  # noqa: E402
from agents.memory import ReplayMemory  # noqa: E402
from agents.networks import make_ddpg, make_sac  # noqa: E402
from agents.sac import SACAgent  # noqa: E402

__all__ = ["Agent", "DDPGAgent", "LocalPool", "ReplayMemory", "SACAgent", "make_ddpg", "make_sac"]
