"""Episodes go where they end first, and a reset begins without being asked for: real farms, one eight times slower."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from typing import ClassVar

import keras
import numpy as np
import pytest
from agent_parts import Recorder, linear_agent
from farms import ask_farm, farm_here
from gymnasium.vector import AutoresetMode
from helpers import poll_until

import farmer
from farmer import Farmer, RemoteEnv
from farmer.commands import Commands
from farmer.farmlist import FarmAddress
from farmer.placement import Placement
from farmer.remote_farm import RemoteFarm
from farmer.remote_slot import RemoteSlot
from wire import protocol
from wire.errors import FarmTimeout, NoFreeSlot

NEXT, SAME, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED
STEADY, COUNTING, GATED = "environments:SlowingEnv", "environments:CountingEnv", "environments:GatedEnv"
LENGTH = 8
NEVER = {"nb_steps_warmup_critic": 10**9, "nb_steps_warmup_actor": 10**9}


@contextlib.contextmanager
def two_farms():
    """(slow, fast): two slots each, episodes of LENGTH steps, 200 and 25 ms a step: a busy machine keeps them apart."""
    with contextlib.ExitStack() as farms:
        kwargs = [{"length": LENGTH, "first": first, "fresh": 10**9} for first in (0.2, 0.025)]
        yield [farms.enter_context(farm_here("SlowingEnv", each, slots=2)) for each in kwargs]


@pytest.fixture(scope="module")
def speeds():
    """Farms that tests share; a pool has the slow one's slots first."""
    with two_farms() as addresses:
        yield addresses


@pytest.fixture
def both(speeds):
    """A pool that has seen each slot step."""
    with Farmer(STEADY, [(address, 2) for address in speeds], seed=1) as pool:
        slots = pool.vacant()
        pool.reset(slots)
        for _ in range(LENGTH):
            pool.recv(len(slots))
            pool.send(np.zeros((len(slots), 1), np.float32), slots)
        pool.recv(len(slots))
        yield pool


class Places(keras.callbacks.Callback):
    """Notes the farm of each episode."""

    def __init__(self):
        super().__init__()
        self.farms, self.slots = [], []

    def on_episode_end(self, episode, logs=None):
        self.farms.append(logs["farm"])
        self.slots.append(logs["slot"])


# Fewer episodes, or environments, than slots.


def test_a_few_episodes_are_played_by_the_fast_farm(speeds, both):
    seen, agent = Places(), linear_agent(schedule="overlap", **NEVER)
    agent.fit(both, nb_steps=None, nb_episodes=2, verbose=0, callbacks=[seen])
    assert seen.farms == [speeds[1]] * 2
    agent.fit(both, nb_steps=None, nb_episodes=3, verbose=0, callbacks=[seen])
    assert seen.farms == [speeds[1]] * 5, "its third one begins there later and still ends first"


@pytest.mark.slow
def test_evaluation_episodes_are_played_by_the_fast_farm(speeds, both):
    seen, agent = Places(), linear_agent(schedule="overlap", **NEVER)
    agent.test(both, nb_episodes=2, visualize=False, verbose=0, callbacks=[seen])
    assert seen.farms == [speeds[1]] * 2


@pytest.mark.slow
def test_under_sync_the_first_slots_play_whatever_their_speed(both):
    seen = Places()
    Recorder().fit(both, nb_steps=None, nb_episodes=2, verbose=0, callbacks=[seen])
    assert sorted(seen.slots) == [0, 1]


@pytest.mark.slow
def test_with_many_episodes_every_slot_plays_and_every_result_is_taken(speeds, both):
    seen, agent = Places(), linear_agent(schedule="overlap", **NEVER)
    before = both.status()["ledger"]["done"]
    agent.fit(both, nb_steps=None, nb_episodes=20, verbose=0, callbacks=[seen])
    assert set(seen.slots) == {0, 1, 2, 3}
    assert seen.farms.count(speeds[1]) > seen.farms.count(speeds[0])
    ledger = both.status()["ledger"]
    assert ledger["done"] == ledger["sent"] == before + 20 * LENGTH


@pytest.mark.slow
def test_vacant_slots_come_the_fastest_first_where_a_number_is_given(both):
    assert both.vacant() == [0, 1, 2, 3]
    assert sorted(both.vacant(2)) == [2, 3]
    assert sorted(both.vacant(100)) == [0, 1, 2, 3]
    assert sorted(both.vacant(100)[:2]) == [2, 3]
    assert both.vacant(0) == []


@pytest.mark.slow
def test_the_status_tells_how_fast_farms_and_slots_are(speeds, both):
    slow, fast = both.status()["farms"]
    assert [slow["farm"], fast["farm"]] == speeds
    assert fast["step_s"] < slow["step_s"]
    assert max(place["step_s"] for place in fast["places"]) < min(place["step_s"] for place in slow["places"])


@pytest.mark.slow
def test_fewer_environments_than_slots_are_made_on_the_farm_that_has_been_fast():
    with two_farms() as addresses:
        farmlist = [(address, 2) for address in addresses]
        with farmer.make_vec(STEADY, 2, farmlist) as envs:
            assert {envs._pool.name_of(slot) for slot in range(2)} == set(addresses), "nobody knows yet"
            envs.reset()
            for _ in range(5):
                envs.step(np.zeros((2, 1), np.float32))
        with farmer.make_vec(STEADY, 2, farmlist) as envs:
            assert [envs._pool.name_of(slot) for slot in range(2)] == [addresses[1]] * 2
        with contextlib.closing(RemoteEnv(STEADY, farmlist)) as env:
            assert env._farmer.name_of(0) == addresses[1]


def pool_of(*paces):
    """A placement after episodes of 10 steps, and a place for each pace on a farm of its own."""
    placement, places = Placement(), []
    for slot, pace in enumerate(paces):
        farm = RemoteFarm(FarmAddress("127.0.0.1", 20000 + slot, 1))
        places.append(RemoteSlot(slot, farm))
        places[-1].assign(0)
        farm.slots.append(places[-1])
        if pace is not None:
            places[-1].step_s.add(pace)
        places[-1].steps = 10
        placement.ended(places[-1])
        places[-1].steps = 0
    return placement, places


def test_a_slow_slot_waits_for_a_fast_one_no_longer_than_its_own_episode_takes():
    placement, (fast, slow) = pool_of(1.0, 3.0)
    fast.episode, fast.sent = True, protocol.STEP
    for steps, waited, chosen in (
        (2, 0.0, []),
        (9, 0.0, []),
        (20, 0.0, []),
        (25, 0.0, [1]),
        (9, 5.0, []),
        (9, 25.0, [1]),
    ):
        fast.steps, fast.sent_at = steps, 100.0 - waited
        assert placement.chosen([fast, slow], [1], 1, 100.0) == chosen, (steps, waited)


def test_an_episode_in_a_slower_place_is_worth_what_the_reset_would_take():
    placement, (own, other, unknown) = pool_of(1.0, 3.0, None)
    own.reset_s.add(19.0)
    assert not placement.is_worth(own, other, 0.0), "10 steps there take 20 s longer"
    assert placement.is_worth(other, own, 0.0)
    assert placement.is_worth(own, unknown, 0.0)
    own.sent, own.sent_at = protocol.RESET, 100.0
    assert not placement.is_worth(own, other, 119.0)
    assert placement.is_worth(own, other, 121.0), "its reset takes longer than usual"
    own.sent = None
    own.farm.by_number.clear()
    assert placement.is_worth(own, other, 0.0), "its farm is gone"


class Watched(Commands):
    """Commands that a test may tell what a pool has seen."""

    made: ClassVar[list[Commands]] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.made.append(self)


class WatchedFarmer(Farmer):
    commands_type = Watched


class Hanging(Recorder):
    """Slot 0's first action makes its environment hang."""

    schedule = "overlap"

    def act(self, states, slots):
        hang = 0 in slots and not any(0 in asked for _, asked in self.asked)
        super().act(states, slots)
        return np.array([[0.75 if hang and slot == 0 else 0.0] for slot in slots], np.float32)


@pytest.mark.slow
def test_a_slot_that_was_left_out_plays_when_the_faster_one_hangs():
    with (
        farm_here("HangingEnv", {"length": 5}, slots=2) as address,
        WatchedFarmer("environments:HangingEnv", [(address, 2)]) as pool,
    ):
        commands = Watched.made[-1]
        for index, pace in enumerate((0.02, 0.1)):
            commands.slot(index).step_s.add(pace)
        commands.slot(1).steps = 5
        commands.placement.ended(commands.slot(1))
        assert pool.vacant(2) == [0], "its two episodes end before one of the other slot"

        class Killer(Places):
            def on_episode_end(self, episode, logs=None):
                super().on_episode_end(episode, logs)
                if len(self.slots) == 1:
                    os.kill(ask_farm(address, "status")[0]["pid"], signal.SIGKILL)

        seen = Killer()
        Hanging().test(pool, nb_episodes=2, visualize=False, verbose=0, callbacks=[seen])
        assert seen.slots[0] == 1
        assert len(seen.slots) == 2


def test_a_slot_that_has_not_stepped_is_taken_for_one_as_its_farm_or_as_the_fastest():
    placement, places = pool_of(1.0, 3.0, None)
    assert placement.chosen(places, [1, 2], 1, 0.0) == [2]
    new = RemoteSlot(3, places[1].farm)
    assert placement.chosen([*places, new], [3, 0], 1, 0.0) == [0]
    assert placement.chosen(places, [], 5, 0.0) == placement.chosen(places, [0], 0, 0.0) == []


# Resets that begin without being asked for.


def states(address):
    """What each slot of a farm is doing."""
    return [row["state"] for row in ask_farm(address, "status")]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [NEXT, SAME])
def test_a_reset_follows_the_end_while_the_caller_is_busy_with_something_else(mode):
    with farm_here("CountingEnv", {"length": 2}) as address, farmer.make_vec(COUNTING, 1, [(address, 1)], mode) as envs:
        envs.reset()
        envs.step(np.zeros((1, 1), np.float32))
        envs.send(np.zeros((1, 1), np.float32))
        poll_until(lambda: ask_farm(address, "status")[0]["steps"] == 2, 30, "the second step")
        poll_until(lambda: states(address) == ["ready"], 30, "the reset")
        assert envs.recv(1).truncations.tolist() == [True]
        if mode is NEXT:
            assert envs.step(np.zeros((1, 1), np.float32))[0].tolist() == [[2, 0, 0]]


@pytest.mark.slow
def test_nothing_follows_by_itself_under_disabled():
    with (
        farm_here("CountingEnv", {"length": 1}) as address,
        farmer.make_vec(COUNTING, 1, [(address, 1)], DISABLED) as envs,
    ):
        envs.reset()
        assert envs.step(np.zeros((1, 1), np.float32))[3].tolist() == [True]
        time.sleep(0.3)
        assert states(address) == ["idle"]


def test_a_limit_of_this_side_on_the_very_step_that_ends_the_episode_leaves_its_reset_alone():
    with (
        farm_here("EndingEnv", {"length": 2}) as address,
        farmer.make_vec("environments:EndingEnv", 1, [(address, 1)], SAME, 10.0, max_episode_steps=2) as envs,
    ):
        envs.reset()
        for episode in (2, 3):
            envs.step(np.zeros((1, 1), np.float32))
            observations, _, terminated, truncated, _ = envs.step(np.zeros((1, 1), np.float32))
            assert (terminated.tolist(), truncated.tolist()) == ([True], [True])
            assert observations.tolist() == [[episode, 0, 0]]


@pytest.mark.slow
def test_a_slot_that_is_let_go_of_at_its_end_is_not_reset_again(caplog, tmp_path):
    farmlist = tmp_path / "farmlist.py"
    with farm_here("CountingEnv", {"length": 2}, slots=2) as address, contextlib.ExitStack() as stack:
        farmlist.write_text(f"farmlist_base = [({address!r}, 2)]\n")
        envs = stack.enter_context(farmer.make_vec(COUNTING, 2, farmlist, timeout=30.0))
        stack.enter_context(caplog.at_level(logging.INFO, "farmer"))
        envs.reset()
        envs.step(np.zeros((2, 1), np.float32))
        farmlist.write_text(f"farmlist_base = [({address!r}, 1)]\n")
        envs._pool.refarm()
        assert envs.step(np.zeros((2, 1), np.float32))[3].tolist() == [True, True]
        poll_until(lambda: ask_farm(address, "describe")["free"] == 1, 30, "the slot that is not wanted any more")
        poll_until(lambda: sorted(states(address)) == ["idle", "ready"], 30, "one reset")
        envs.timeout = 1.0
        with pytest.raises(FarmTimeout):
            envs.step(np.zeros((2, 1), np.float32))
        assert "could not be reset" not in caplog.text


class Waiting(Recorder):
    """Learns until the farm has begun the next episode of each slot that ended."""

    def __init__(self, address):
        super().__init__()
        self.address, self.ended, self.waited = address, 0, 0

    def remember(self, episode, reward, next_obs, terminated, truncated):
        super().remember(episode, reward, next_obs, terminated, truncated)
        self.ended += terminated or truncated

    def learn(self, steps, nb_slots):
        if self.ended == 2 and not self.waited:  # both have
            poll_until(lambda: states(self.address) == ["ready"] * 2, 30, "resets while it learns")
            self.waited += 1
        return super().learn(steps, nb_slots)


def test_episodes_begin_while_the_agent_learns_and_not_after_it():
    with farm_here("CountingEnv", {"length": 3}, slots=2) as address, Farmer(COUNTING, [(address, 2)]) as pool:
        agent = Waiting(address)
        agent.fit(pool, nb_steps=12, verbose=0)
        assert agent.waited
        assert len(agent.remembered) == 12


# Episodes that are begun ahead of time.


def gated(tmp_path, num_envs, ahead, mode, stack, timeout=20.0):
    """Environments whose second reset waits for a file, and their farm."""
    slots = num_envs + ahead
    address = stack.enter_context(farm_here("GatedEnv", {"gate": str(tmp_path / "gate"), "length": 3}, slots=slots))
    envs = stack.enter_context(farmer.make_vec(GATED, num_envs, [(address, slots)], mode, timeout=timeout, ahead=ahead))
    return address, envs


@pytest.mark.slow
@pytest.mark.parametrize("mode", [NEXT, SAME])
def test_a_reset_that_takes_for_ever_costs_nothing_while_an_episode_waits_ahead(mode, tmp_path):
    with contextlib.ExitStack() as stack:
        address, envs = gated(tmp_path, 1, 1, mode, stack)
        act = np.zeros((1, 1), np.float32)
        assert envs.num_envs == 1
        envs.reset()
        poll_until(lambda: states(address) == ["ready"] * 2, 30, "both resets")
        observations = [envs.step(act)[0].tolist()[0] for _ in range(3 + (mode is NEXT))]
        assert observations[-1] == [1, 0, 0], "the first of an episode, and none of a second reset"
        for step in (1, 2):
            assert envs.step(act)[0].tolist() == [[1, step, 0]]
        if mode is NEXT:
            assert envs.step(act)[3].tolist() == [True]
        envs.timeout = 0.3
        with pytest.raises(FarmTimeout):  # that was all that waited
            envs.step(act)
        # Its own reset goes on waiting; that of the place which it had before is over first.
        first = next(row["pid"] for row in ask_farm(address, "status") if row["slot"] == 0)
        (tmp_path / f"gate-{first}").touch()
        assert envs.recv(1, timeout=20.0).observations.tolist() == [[2, 0, 0]]


@pytest.mark.slow
def test_rows_stay_with_their_slot_whatever_place_it_goes_on_in():
    kwargs = {"length": 4, "reset_takes": 0.02, "limit": 1.0}
    with (
        farm_here("SlowEnv", kwargs, slots=5) as address,
        farmer.make_vec("environments:SlowEnv", 3, [(address, 5)], SAME, 20.0, ahead=2) as envs,
    ):
        observations, _ = envs.reset()
        places = set()
        for turn in range(1, 41):
            act = np.array([[0.001], [0.002], [0.003]], np.float32) * (1 + turn % 3)
            before = observations
            observations, rewards, _, truncated, infos = envs.step(act)
            seen = np.stack([infos["final_obs"][i] if truncated[i] else observations[i] for i in range(3)])
            np.testing.assert_array_equal(seen[:, 1], before[:, 1] + 1)
            np.testing.assert_array_equal(seen[:, 0], before[:, 0])
            np.testing.assert_array_equal(seen[:, 2], act[:, 0])
            np.testing.assert_array_equal(rewards, seen[:, 1])
            np.testing.assert_array_equal(truncated, seen[:, 1] == 4)
            assert not observations[truncated, 1].any()
            places.add(tuple(envs.episodes._at[:3]))
        assert len(places) > 1
        ledger = envs.status()["ledger"]
        assert ledger["sent"] == ledger["done"] == 120


def test_an_episode_ahead_that_is_lost_is_begun_anew_and_the_lost_one_goes_on_there():
    with (
        farm_here("RaisingEnv", {"length": 20}, slots=2) as address,
        farmer.make_vec("environments:RaisingEnv", 1, [(address, 2)], NEXT, 20.0, ahead=1) as envs,
    ):
        envs.reset()
        poll_until(lambda: states(address) == ["ready"] * 2, 30, "the episode ahead")
        for _ in range(18):
            envs.step(np.zeros((1, 1), np.float32))
            if envs.episodes._slots[1].first is not None:
                break
            time.sleep(0.05)  # on a busy machine the one ahead may be the last to be reset
        _, _, _, truncated, infos = envs.step(np.full((1, 1), 1.0, np.float32))  # ends the process
        assert truncated.tolist() == [True]
        assert infos["_lost"].tolist() == [True]
        assert envs.step(np.zeros((1, 1), np.float32))[0].tolist() == [[1, 0, 0]]
        assert envs.episodes._at == [1, 0]
        for step in range(1, 21):
            assert envs.step(np.zeros((1, 1), np.float32))[0].tolist() == [[1, step, 0]]
        assert envs.step(np.zeros((1, 1), np.float32))[0][0, 1] == 0


@pytest.mark.slow
def test_with_an_episode_ahead_a_barrier_does_not_wait_for_a_farm_that_is_gone():
    with contextlib.ExitStack() as farms:
        going, staying = (farms.enter_context(contextlib.ExitStack()) for _ in range(2))
        addresses = [stack.enter_context(farm_here("CountingEnv", {"length": 9})) for stack in (going, staying)]
        envs = farms.enter_context(farmer.make_vec(COUNTING, 1, [(one, 1) for one in addresses], timeout=30.0, ahead=1))
        envs.reset()
        envs.step(np.zeros((1, 1), np.float32))
        going.close()
        assert envs.step(np.zeros((1, 1), np.float32))[3].tolist() == [True]
        for step in range(9):
            assert envs.step(np.zeros((1, 1), np.float32))[0].tolist() == [[1, step, 0]]


@pytest.mark.slow
def test_a_place_ahead_that_is_slow_is_not_taken_for_a_fast_one(speeds, monkeypatch):
    monkeypatch.setattr(Farmer, "commands_type", Watched)
    with farmer.make_vec(STEADY, 2, [(speeds[1], 2), (speeds[0], 2)], ahead=2) as envs:
        envs.reset()
        at = [envs._pool.name_of(place) for place in envs.episodes._at[:2]]
        for place in range(4):  # as after many episodes
            Watched.made[-1].slot(place).step_s.add(0.025 if envs._pool.name_of(place) == speeds[1] else 0.075)
        for _ in range(4 * LENGTH):
            envs.step(np.zeros((2, 1), np.float32))
        after = [envs._pool.name_of(place) for place in envs.episodes._at[:2]]
        assert after.count(speeds[1]) >= at.count(speeds[1])
        assert after == [speeds[1]] * 2


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"ahead": -1}, ValueError, "ahead must be 0 or more"),
        ({"ahead": 1.5}, TypeError, "whole number"),
        ({"ahead": 1, "autoreset_mode": DISABLED}, ValueError, "under DISABLED"),
        ({"ahead": 2}, NoFreeSlot, "were asked for"),
        ({"ahead": 4, "num_envs": None}, NoFreeSlot, "4 slots ahead were asked for, and 4 are free"),
    ],
)
def test_slots_ahead_that_make_no_sense_or_are_not_there_are_refused(speeds, more, error, words):
    settings = {"num_envs": 3, "farmlist": [(address, 2) for address in speeds], **more}
    with pytest.raises(error, match=words):
        farmer.make_vec(STEADY, **settings)


def test_all_that_are_free_but_those_ahead_are_the_callers(speeds):
    with farmer.make_vec(STEADY, None, [(address, 2) for address in speeds], ahead=1) as envs:
        assert envs.num_envs == 3
        assert envs.spec.kwargs["ahead"] == 1
