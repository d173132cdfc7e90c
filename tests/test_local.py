"""Environments of this process as a pool: what the farmer's tests do not show of it."""

import time

import numpy as np
from agent_parts import OldCounter
from environments import SlowEnv

from agents import LocalPool


def test_the_seconds_of_a_local_step_are_all_the_environments():
    pool = LocalPool([SlowEnv(reset_takes=0.5), SlowEnv(length=3)])
    pool.reset([0, 1])
    first = pool.recv()
    assert 0.5 <= first.env_s[0] < 5.0
    assert first.env_s[1] < 0.5
    began = time.perf_counter()
    pool.send(np.array([[0.0625], [0.03125]], np.float32), [0, 1], repeat=4)
    whole = time.perf_counter() - began
    batch = pool.recv()
    assert (batch.env_s.dtype, batch.trip_s.dtype) == (np.float32, np.float32)
    assert batch.env_s[0] >= 4 * 0.0625
    assert batch.env_s[1] >= 3 * 0.03125, "the end of the episode ended the repetition"
    assert batch.env_s.sum() <= np.float32(whole)
    for each in (first, batch):
        np.testing.assert_array_equal(each.env_s, each.trip_s)


class OldSeeded(OldCounter):
    """Takes a seed by gym's former method."""

    seeds = ()

    def seed(self, seed=None):
        self.seeds = (*self.seeds, seed)


def test_gyms_former_environments_are_told_a_seed_by_their_own_method_or_not_at_all():
    seeded, plain = OldSeeded(), OldCounter()
    pool = LocalPool([seeded, plain])
    pool.reset([0, 1], [7, 8])
    assert pool.recv().first.all()
    assert seeded.seeds == (7,)
