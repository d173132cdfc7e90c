"""The environment of the fault bench: `simulators/faulty.py`, which writes down what really happened to it.

python farm.py benchmarks.faults.journal:JournalEnv --env-kwargs '{"journal": "/tmp/journal"}'

Each object appends to a file of its own in the folder `journal`: a record before and one after each step, one after
each reset, of a fixed number of bytes and by one `write`. So whatever kills the process, what it did is on record.
`history.read_journal` reads it.
"""

import os
import struct
import time

import numpy as np

from simulators.faulty import NUMBERS, FaultyEnv

RECORD = struct.Struct("<BIIIId")  #: kind, who, episode, step, tag, action
RESET, BEGUN, DONE = range(3)


class JournalEnv(FaultyEnv):
    """A FaultyEnv; `journal` is the folder, every other argument is FaultyEnv's."""

    def __init__(self, journal, **kwargs):
        FaultyEnv.__init__(self, **kwargs)
        path = os.path.join(journal, "%d-%d" % (os.getpid(), self.who))
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def reset(self, seed=None, options=None):
        answer = FaultyEnv.reset(self, seed, options)
        self._write(RESET, self.steps, 0.0)
        return answer

    def step(self, action):
        number = float(action[0])
        self._write(BEGUN, self.steps + 1, number)
        answer = FaultyEnv.step(self, action)
        self._write(DONE, self.steps, number)
        return answer

    def close(self):
        FaultyEnv.close(self)
        os.close(self._journal)

    def _write(self, kind, step, action):
        os.write(self._journal, RECORD.pack(kind, self.who, self.episode, step, self._tag, action))


class FaultyPendulum:
    """gymnasium's Pendulum, slowed down, with the faults of a FaultyEnv beside it; for a training, without a journal.

    What the FaultyEnv answers counts where it is bad; where it is not, the pendulum's answer does.
    """

    def __init__(self, takes=0.0, orders=None, **kwargs):
        """A file in the folder `orders` is named after a fault: the first who comes by takes it away and does that."""
        import gymnasium

        self._env, self._takes, self._orders = gymnasium.make("Pendulum-v1"), takes, orders
        self._trouble = FaultyEnv(commands=True, **kwargs)
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
        self.spec = self._env.spec

    def reset(self, seed=None, options=None):
        self._trouble.reset()
        return self._env.reset(seed=seed, options=options)

    def step(self, action):
        time.sleep(self._takes)
        answer = self._env.step(action)
        bad = self._trouble.step([0.0, self._order()])
        if len(bad) != 5:
            return bad
        if np.shape(bad[0]) != (5,) or not np.isfinite(bad[0]).all():
            return (bad[0],) + answer[1:]
        return answer

    def _order(self):
        """The number of the fault that is wanted now; 0 for none, or where another environment was faster."""
        for name in os.listdir(self._orders) if self._orders else ():
            try:
                os.unlink(os.path.join(self._orders, name))
            except OSError:
                continue
            return NUMBERS[name.partition(".")[0]]
        return 0

    def close(self):
        self._trouble.close()
        self._env.close()
