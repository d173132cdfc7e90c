"""What the training loop counts."""

import math
import threading

import numpy as np
import pytest

from agents.meters import Meters


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meters(clock):
    return Meters(clock)


def test_an_interval_tells_its_speeds_and_the_ratio_that_came_out(meters, clock):
    meters.stepped([0.5, 0.25, 0.25, 1.0], [0.75, 0.5, 0.5, 1.25], [0, 0, 0, 0])
    meters.updated(3, 0.5, [], [])
    meters.updated(5, 0.5, [], [])
    clock.now += 2.0
    taken = meters.take()
    assert (taken["steps"], taken["updates"], taken["seconds"]) == (4, 8, 2.0)
    assert (taken["steps_per_s"], taken["updates_per_s"], taken["updates_per_step"]) == (2.0, 4.0, 2.0)


def test_times_are_means_in_milliseconds_each_over_its_own_count(meters, clock):
    meters.stepped(np.float32([0.25, 0.75]), np.float32([0.5, 1.5]), [1, 2])
    meters.acted(4, 0.5)  # two of them are still under way
    meters.acted(1, 0.25)
    meters.updated(10, 0.5, [], [])
    clock.now += 1.0
    taken = meters.take()
    assert taken["env_time_ms"] == 500.0
    assert taken["network_time_ms"] == 500.0
    assert taken["acting_time_ms"] == 150.0
    assert taken["learning_time_ms"] == 50.0


def test_a_step_of_unknown_length_takes_no_time_off_the_others_way(meters, clock):
    meters.stepped([0.5, 0.25], [0.25, 0.5], [0, 0])  # the first one's clocks disagree
    assert meters.take()["network_time_ms"] == 125.0


def test_shares_are_parts_of_the_interval(meters, clock):
    meters.waited(1.0)
    meters.waited(1.0)
    meters.throttled(0.5)
    meters.updated(1, 1.0, [], [])
    clock.now += 4.0
    taken = meters.take()
    assert (taken["waiting_share"], taken["throttled_share"], taken["learning_share"]) == (0.5, 0.125, 0.25)


def test_the_age_of_the_policy_is_a_mean_over_the_steps_whose_weights_are_known(meters):
    meters.stepped([0.0] * 3, [0.0] * 3, [2, 4, math.nan])
    meters.stepped([0.0], [0.0], np.array([9]))
    taken = meters.take()
    assert taken["steps"] == 4
    assert taken["policy_age_updates"] == 5.0


def test_losses_are_means_over_the_updates_and_nan_is_none(meters):
    names = ["loss", "mean_q", "never"]
    meters.updated(1, 0.1, names, [1.0, math.nan, math.nan])
    meters.updated(3, 0.1, names, np.float32([5.0, 2.0, math.nan]))
    meters.updated(0, 0.0, names, [100.0, 100.0, 100.0])
    taken = meters.take()
    assert taken["train/loss"] == 4.0
    assert taken["train/mean_q"] == 2.0
    assert "train/never" not in taken


def test_taking_begins_anew_and_nothing_has_no_mean(meters, clock):
    meters.stepped([0.5], [0.5], [3])
    meters.acted(1, 0.5)
    meters.waited(0.5)
    meters.throttled(0.5)
    meters.updated(1, 0.5, ["loss"], [1.0])
    clock.now += 2.0
    meters.take()
    clock.now += 1.0
    taken = meters.take()
    assert (taken.pop("steps"), taken.pop("updates"), taken.pop("seconds")) == (0, 0, 1.0)
    assert [taken.pop(name) for name in ("steps_per_s", "updates_per_s")] == [0.0, 0.0]
    assert [taken.pop(name) for name in ("waiting_share", "learning_share", "throttled_share")] == [0.0] * 3
    assert sorted(taken) == [
        "acting_time_ms",
        "env_time_ms",
        "learning_time_ms",
        "network_time_ms",
        "policy_age_updates",
        "updates_per_step",
    ]
    assert all(math.isnan(value) for value in taken.values())


def test_an_interval_without_any_time_has_no_speed(meters):
    meters.stepped([0.5], [0.5], [3])
    assert math.isnan(meters.take()["steps_per_s"])


def test_nothing_is_lost_between_threads():
    meters = Meters()
    totals, over = [0.0, 0.0], threading.Event()

    def collect():
        for _ in range(2000):
            meters.stepped([0.001], [0.002], [1])

    def learn():
        for _ in range(2000):
            meters.updated(1, 0.001, ["loss"], [1.0])

    def take():
        while not over.is_set():
            taken = meters.take()
            totals[0] += taken["steps"]
            totals[1] += taken["updates"]

    counting = [threading.Thread(target=target) for target in (collect, collect, learn, learn)]
    taking = threading.Thread(target=take)
    for thread in [*counting, taking]:
        thread.start()
    for thread in counting:
        thread.join()
    over.set()
    taking.join()
    taken = meters.take()
    assert [totals[0] + taken["steps"], totals[1] + taken["updates"]] == [4000, 4000]
