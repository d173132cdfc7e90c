"""A small agent whose parts all tell of one moment, so that a save of two moments is seen at once."""

from __future__ import annotations

import contextlib

import numpy as np

from agents.memory import ReplayMemory


class Teller:
    """Has what a checkpoint asks of an agent. Entry i of its replay observes i; its weights are all its step."""

    def __init__(self, limit=60, size=50, seed=0):
        self.memory = ReplayMemory(limit, seed=seed)
        self.weights = np.zeros(size, np.float32)
        self.rng = np.random.default_rng(seed)
        self.step = self.nb_updates = 0
        self.pauses = 0
        self._open = {}

    @contextlib.contextmanager
    def paused(self):
        self.pauses += 1
        yield

    def get_config(self):
        return {"size": len(self.weights), "made_by": Teller}

    def play(self, steps):
        """So many steps of three interleaved episodes, some of which end or are lost."""
        for _ in range(steps):
            stream, count = int(self.rng.integers(3)), self.memory.count
            fate = self.rng.random()
            if fate < 0.1:
                self.memory.cut(stream)
                self._open.pop(stream, None)
                continue
            here = self._open.get(stream, count)
            there = count + 1 if here == count else count
            self.memory.add(stream, [here], [float(here)], here / 2, [there], fate > 0.9, False)
            self._open[stream] = there
            if fate > 0.9:
                del self._open[stream]
        self.step += steps
        self.nb_updates = 2 * self.step
        self.weights[:] = self.step

    def state(self):
        values = {"step": self.step, "updates": self.nb_updates, "count": self.memory.count}
        return {"actor/0": self.weights.copy(), "half": self.weights / 2}, dict(
            values, rng=self.rng.bit_generator.state
        )

    def check_state(self, arrays, values):
        if set(arrays) != {"actor/0", "half"} or arrays["actor/0"].shape != self.weights.shape:
            raise ValueError("%d weights, not %d" % (arrays["actor/0"].size, self.weights.size))

    def load_state(self, arrays, values):
        self.weights = arrays["actor/0"].copy()
        self.step, self.nb_updates = values["step"], values["updates"]
        self.rng.bit_generator.state = values["rng"]
        self._open.clear()
        self.told = arrays, values


def replay_of(memory):
    """Everything in the ring by number."""
    numbers = np.arange(memory.oldest, memory.count)
    return dict(memory.columns(numbers), numbers=numbers)


def check_one_moment(agent, extra):
    """Raises AssertionError unless a loaded agent's parts are all of the step that `extra` tells."""
    arrays, values = agent.told
    assert agent.step == values["step"] == extra["step"]
    assert (agent.weights == agent.step).all()
    assert (arrays["half"] == agent.step / 2).all()
    assert agent.memory.count == values["count"]
    found = replay_of(agent.memory)
    if not agent.memory.count:
        return
    steps = found["step"]
    np.testing.assert_array_equal(found["obs/0"][:, 0], found["numbers"])
    np.testing.assert_array_equal(found["action"][steps, 0], found["numbers"][steps])
    np.testing.assert_array_equal(found["reward"][steps], found["numbers"][steps] / 2)
