"""The host's side: reads the farmlist, keeps leases on all farms, and moves actions and results.

from farmer import Farmer
farmer = Farmer("Pendulum-v1", farmlist="farmlist.py")

Importing it makes "farm/Pendulum-v1", and any other name of a farm, known to `gymnasium.make` and `gymnasium.make_vec`.
"""

from farmer.batch import Batch
from farmer.env import RemoteEnv
from farmer.farmlist import FarmAddress, load_farmlist
from farmer.pool import Farmer
from farmer.pyro.proxy import open_object
from farmer.registry import install
from farmer.vector import FarmVectorEnv, Ready, make_vec

__all__ = [
    "Batch",
    "FarmAddress",
    "FarmVectorEnv",
    "Farmer",
    "Ready",
    "RemoteEnv",
    "load_farmlist",
    "make_vec",
    "open_object",
]

install()
