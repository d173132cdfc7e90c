"""The benchmark of real muscles counts what arrives within its round, and says what is missing."""

from __future__ import annotations

import argparse
import time

import numpy as np
import pytest

from benchmarks.peers import make as peers
from benchmarks.peers import osim as peer_osim
from benchmarks.steps import osim as osim_steps


class Turns(peer_osim.Stepper):
    """Three slots; each call steps those that got an action, 10 ms each, and every fourth step ends an episode."""

    def __init__(self):
        super().__init__(argparse.Namespace(slots=3, body="Arm2D", first=0))
        self.seen, self.calls, self.fresh = [[] for _ in range(3)], 0, []

    def exchange(self, actions, slots):
        self.calls += 1
        time.sleep(0.01 * len(slots))
        for slot, action in zip(slots, actions, strict=True):
            self.seen[slot].append(action)
        ended = [slot for slot in slots if len(self.seen[slot]) % 4 == 0]
        there, self.fresh = self.fresh, ended
        going = [int(slot) for slot in slots if slot not in ended]
        return going + [int(slot) for slot in there], [int(slot) for slot in slots], [0.01] * len(slots)


def test_a_round_counts_every_step_that_arrives_in_it_and_what_it_took():
    stepper = Turns()
    found = stepper.answer({"seconds": 0.5})
    total = sum(len(seen) for seen in stepper.seen)
    assert 5 < found["steps"] < total, "the steps of the warm-up do not count"
    assert found["inside"] == pytest.approx(0.01 * found["steps"])
    assert found["inside"] <= found["seconds"]
    assert found["longest"] == 0.01
    assert 0.5 <= found["seconds"] < 20


def test_a_slots_actions_are_the_same_whoever_steps_it():
    stepper = Turns()
    stepper.answer({"seconds": 0.05})
    drawn = peer_osim.actions("Arm2D", 3)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    for slot, seen in enumerate(stepper.seen):
        np.testing.assert_array_equal(np.stack(seen), drawn[slot, : len(seen)])
    np.testing.assert_array_equal(peer_osim.actions("L2M2019", 1, first=1), peer_osim.actions("L2M2019", 2)[1:])


def test_without_opensim_it_says_what_to_type(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "HOME", tmp_path)
    assert osim_steps.main(["--out", str(tmp_path)]) == 2
    assert "python -m benchmarks.peers.make osim" in capsys.readouterr().err
