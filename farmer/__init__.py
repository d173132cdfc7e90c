"""The host's side: reads the farmlist, keeps leases on all farms, and moves actions and results.

from farmer import Farmer
farmer = Farmer("Pendulum-v1", farmlist="farmlist.py")
"""

from farmer.env import RemoteEnv
from farmer.farmlist import FarmAddress, load_farmlist
from farmer.pool import Batch, Farmer

__all__ = ["Batch", "FarmAddress", "Farmer", "RemoteEnv", "load_farmlist"]
