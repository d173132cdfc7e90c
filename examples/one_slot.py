"""One slot of a farm, driven with Pyro4 and nothing else: python examples/one_slot.py 127.0.0.1:20099"""

import sys

import Pyro4

Pyro4.config.SERIALIZER = "msgpack"
with Pyro4.Proxy("PYRO:slot-0@" + (sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:20099")) as slot:
    observation, info = slot.reset(7)
    for _ in range(3):
        observation, reward, terminated, truncated, info = slot.step([0.5])
        print(observation, reward)
    slot.release()
