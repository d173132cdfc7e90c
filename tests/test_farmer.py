"""The farmer: leases on real farms, routing, losses, and the ledger of every step."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from farms import ROOT, TESTS, ask_farm, closed_port, farm_here, running_farm
from gymnasium.error import ClosedEnvironmentError
from helpers import poll_until
from proxy import Proxy

from farmer import Farmer, RemoteEnv
from farmer.pyro import proxy as proxy_module
from wire import protocol
from wire.errors import (
    BadAction,
    BadSlot,
    EnvironmentFault,
    FarmerClosed,
    FarmTimeout,
    FarmUnreachable,
    NoFreeSlot,
    NoSuchEnvironment,
    NothingSent,
    ProtocolMismatch,
)

COUNTING = "environments:CountingEnv"
SLOW = "environments:SlowEnv"
RAISING = "environments:RaisingEnv"


@pytest.fixture(scope="module")
def lasting_farm():
    with running_farm(COUNTING, slots=4, kwargs={"length": 5}) as farm:
        yield farm


@pytest.fixture
def farm(lasting_farm):
    """Four free slots of CountingEnv that no test may break."""
    lasting_farm.wait_until_free()
    return lasting_farm


@pytest.fixture(scope="module")
def lasting_slow_farm():
    with running_farm(SLOW, slots=4) as farm:
        yield farm


@pytest.fixture
def slow_farm(lasting_slow_farm):
    """Four free slots of SlowEnv that no test may break."""
    lasting_slow_farm.wait_until_free()
    return lasting_slow_farm


@pytest.fixture(scope="module")
def lasting_farms_of_2_and_6():
    with running_farm(SLOW, slots=2) as small, running_farm(SLOW, slots=6) as large:
        yield small, large


@pytest.fixture
def farms_of_2_and_6(lasting_farms_of_2_and_6):
    for each in lasting_farms_of_2_and_6:
        each.wait_until_free()
    return lasting_farms_of_2_and_6


def started(farmer):
    """Begins an episode in every slot; returns the slots."""
    slots = farmer.vacant()
    farmer.reset(slots)
    batch = farmer.recv(min_ready=len(slots))
    assert sorted(batch.slot.tolist()) == slots
    return slots


def assert_ledgers_sum(farmer):
    """Every step that was sent is in exactly one bucket; returns the sum over the farms."""
    total = {}
    for farm in farmer.status()["farms"]:
        ledger = farm["ledger"]
        assert ledger["sent"] == sum(count for name, count in ledger.items() if name != "sent"), ledger
        for name, count in ledger.items():
            total[name] = total.get(name, 0) + count
    return total


def free_slots(farm):
    return farm.describe()["free"]


def actions(n, value=0.5):
    return np.full((n, 1), value, "float32")


# The pool's verbs.


@pytest.mark.slow
def test_a_batch_has_the_documented_arrays(farm):
    with Farmer(COUNTING, [(farm.address, 4)]) as farmer:
        farmer.reset([0, 1, 2], seeds=[7, 8, 9], options={"level": 1})
        batch = farmer.recv(min_ready=3)
        assert len(batch) == 3
        assert batch.first.all()
        assert sorted((info["seed"], info["options"]["level"]) for info in batch.info) == [(7, 1), (8, 1), (9, 1)]
        for step in range(1, 6):
            farmer.send(actions(3, step / 8), batch.slot)
            batch = farmer.recv(min_ready=3)
            assert (batch.slot.dtype, batch.obs.dtype, batch.reward.dtype) == (np.int32, np.float32, np.float32)
            assert batch.obs.shape == (3, 3)
            assert batch.obs[:, 1:].tolist() == [[step, step / 8]] * 3
            assert batch.reward.tolist() == [step] * 3
            assert (batch.env_s.dtype, batch.trip_s.dtype) == (np.float32, np.float32)
            assert (batch.env_s.shape, batch.trip_s.shape) == ((3,), (3,))
            for flags, expected in (
                (batch.terminated, False),
                (batch.truncated, step == 5),
                (batch.lost, False),
                (batch.first, False),
            ):
                assert flags.dtype == bool
                assert flags.tolist() == [expected] * 3
        assert farmer.vacant() == [0, 1, 2, 3]
        total = assert_ledgers_sum(farmer)
        assert (total["sent"], total["done"]) == (15, 15)


@pytest.mark.slow
def test_recv_gives_who_is_ready_and_waits_for_no_straggler(slow_farm):
    with Farmer(SLOW, [(slow_farm.address, 2)]) as farmer:
        started(farmer)
        farmer.send([[4.0], [0.0]], [0, 1])
        for step in range(1, 6):
            batch = farmer.recv()
            assert batch.slot.tolist() == [1]
            assert batch.obs[0, 1] == step
            farmer.send([[0.0]], [1])
        assert farmer.busy == 2
        late = {row.slot: row for row in farmer.collect(min_ready=2)}
        assert late[0].obs[1] == 1


@pytest.mark.slow
def test_a_batch_tells_the_seconds_in_the_environment_and_of_the_whole_way(slow_farm):
    with Farmer(SLOW, [(slow_farm.address, 2)]) as farmer:
        farmer.reset([0, 1])
        batch = farmer.recv(min_ready=2)
        assert (batch.env_s >= 0).all()
        assert (batch.trip_s > batch.env_s).all()
        for repeat in (1, 2):
            slept = {0: 0.0625 * repeat, 1: 1.5 * repeat}
            began = time.perf_counter()
            farmer.send([[0.0625], [1.5]], [0, 1], repeat)
            time.sleep(1.6)  # nobody asks for them yet; they arrive all the same, and that is what counts
            rows = {row.slot: row for row in farmer.collect(min_ready=2)}
            whole = time.perf_counter() - began
            for slot, row in rows.items():
                assert slept[slot] <= row.env_s < row.trip_s < whole
            assert rows[0].trip_s < slept[1], "a fast one is not counted until the slow one is back"


def test_the_seconds_of_a_step_by_the_callers_own_thread_are_told_too(slow_farm):
    with Farmer(SLOW, [(slow_farm.address, 1)]) as farmer:
        started(farmer)
        for _ in range(3):
            batch = farmer.step([[0.0625]], [0])
            assert 0.0625 <= batch.env_s[0] < batch.trip_s[0] < 10.0


def test_seeds_of_a_seeded_farmer_repeat(farm):
    def seeds():
        with Farmer(COUNTING, [(farm.address, 2)], seed=5) as farmer:
            farmer.reset([0, 1])
            return sorted(info["seed"] for info in farmer.recv(min_ready=2).info)

    assert seeds() == seeds() != [None, None]


def test_a_farmer_without_a_seed_draws_one_for_each_episode_so_that_a_black_box_can_be_played(farm):
    def seeds():
        with Farmer(COUNTING, [(farm.address, 2)]) as farmer:
            farmer.reset([0, 1])
            return [info["seed"] for info in farmer.recv(min_ready=2).info]

    drawn = seeds() + seeds()
    assert all(isinstance(seed, int) for seed in drawn)
    assert len(set(drawn)) == 4


def test_none_given_for_a_seed_stays_none_in_the_environment(farm):
    with Farmer(COUNTING, [(farm.address, 1)]) as farmer:
        farmer.reset([0], [None])
        assert farmer.recv().info[0]["seed"] is None
    with contextlib.closing(RemoteEnv(COUNTING, [(farm.address, 1)])) as env:
        assert env.reset()[1]["seed"] is None
        assert env.reset(seed=7)[1]["seed"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["OldGymEnv", "SeedlessEnv"])
def test_an_environment_whose_reset_takes_no_seed_works_with_the_seeds_that_a_farmer_draws(factory):
    with farm_here(factory) as address, Farmer("environments:" + factory, [(address, 1)]) as farmer:
        farmer.reset([0])
        assert not farmer.recv().lost[0]


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ([[0.5, 0.5]], "shape"),
        ([0.5], "shape"),
        ([[float("nan")]], "not finite"),
        ([[float("inf")]], "not finite"),
        ([["much"]], "no array"),
        ([[[0.5]]], "shape"),
        ([[0.5], [0.5]], "2 actions for 1 slots"),
        ([], "0 actions for 1 slots"),
    ],
)
def test_a_bad_action_is_refused_at_the_host_and_nothing_is_sent(farm, action, words):
    with Farmer(COUNTING, [(farm.address, 1)]) as farmer:
        started(farmer)
        with pytest.raises(BadAction, match=words):
            farmer.send(action, [0])
        assert farmer.busy == 0
        assert assert_ledgers_sum(farmer)["sent"] == 0
        farmer.send([[0.5]], [0])
        assert farmer.recv().obs[0, 1] == 1, "the refused one did not count"


def test_one_bad_action_keeps_back_the_good_ones_beside_it(farm):
    with Farmer(COUNTING, [(farm.address, 2)]) as farmer:
        started(farmer)
        with pytest.raises(BadAction, match="slot 1"):
            farmer.send([[0.5], [float("nan")]], [0, 1])
        assert farmer.busy == 0


@pytest.mark.slow
def test_a_slot_that_can_not_take_the_command_is_refused_and_nothing_is_sent(slow_farm):
    with Farmer(SLOW, [(slow_farm.address, 3)]) as farmer:
        farmer.reset([0, 1])
        farmer.recv(min_ready=2)
        farmer.send([[3.0]], [0])
        for slots, words in (
            ([1, 0], "slot 0 is busy"),
            ([1, 2], "slot 2 has no episode"),
            ([1, 3], "slots 0 to 2"),
            ([1, -1], "slots 0 to 2"),
            ([1, 1], "twice"),
        ):
            with pytest.raises(BadSlot, match=words):
                farmer.send([[0.0], [0.0]], slots)
        for slots, words in (([2, 0], "not vacant"), ([2, 1], "not vacant"), ([2, 7], "slots 0"), ([2, 2], "twice")):
            with pytest.raises(BadSlot, match=words):
                farmer.reset(slots)
        assert farmer.busy == 1
        assert farmer.recv().obs[0, 1] == 1


def test_recv_with_nothing_under_way_says_so(farm):
    with Farmer(COUNTING, [(farm.address, 1)]) as farmer:
        with pytest.raises(NothingSent):
            farmer.recv()
        started(farmer)
        with pytest.raises(NothingSent):
            farmer.recv(timeout=0.1)


def test_after_close_every_verb_says_so(farm):
    farmer = Farmer(COUNTING, [(farm.address, 2)])
    started(farmer)
    farmer.send(np.zeros((2, 1)), [0, 1])
    poll_until(lambda: not farmer.busy, 30, "results that nobody takes")
    farmer.close()
    farmer.close()
    for verb in (
        farmer.vacant,
        lambda: farmer.reset([0]),
        lambda: farmer.send(np.zeros((1, 1)), [0]),
        lambda: farmer.step(np.zeros((1, 1)), [0]),
        farmer.recv,
        farmer.refarm,
    ):
        with pytest.raises(FarmerClosed, match=r"this farmer of %s is closed: make a new one" % COUNTING):
            verb()
    assert farmer.status()["ledger"]["sent"] == 2


def test_a_close_by_another_thread_ends_a_recv_that_waits(slow_farm):
    farmer = Farmer(SLOW, [(slow_farm.address, 1)])
    started(farmer)
    farmer.send([[5.0]], [0])
    closing = threading.Timer(0.2, farmer.close)
    closing.start()
    with pytest.raises(FarmerClosed):
        farmer.recv(timeout=30)
    closing.join()


@pytest.mark.slow
def test_a_late_result_stays_addressed_to_its_own_step(slow_farm):
    with Farmer(SLOW, [(slow_farm.address, 1)]) as farmer:
        started(farmer)
        farmer.send([[3.0]], [0])
        with pytest.raises(FarmTimeout, match=r"no result within 0\.1 s; under way: 1"):
            farmer.recv(timeout=0.1)
        with pytest.raises(BadSlot, match="busy"):
            farmer.send([[0.25]], [0])
        batch = farmer.recv()
        assert batch.obs[0, 1:].tolist() == [1, 3.0]
        farmer.send([[0.0]], [0])
        assert farmer.recv().obs[0, 1:].tolist() == [2, 0.0]


@pytest.mark.slow
def test_what_was_abandoned_never_becomes_the_answer_to_something_else(slow_farm):
    with Farmer(SLOW, [(slow_farm.address, 2)]) as farmer:
        started(farmer)
        farmer.send([[2.0], [2.0]], [0, 1])
        farmer.abandon([0])
        assert farmer.vacant() == []
        batch = farmer.recv(min_ready=2)
        assert batch.slot.tolist() == [1]
        poll_until(lambda: farmer.vacant() == [0], 30, "the abandoned slot")
        farmer.reset([0])
        batch = farmer.recv()
        assert batch.first.tolist() == [True]
        assert batch.obs[0, 1] == 0
        total = assert_ledgers_sum(farmer)
        assert (total["sent"], total["done"], total["abandoned"]) == (2, 1, 1)


@pytest.mark.slow
def test_a_remote_env_that_timed_out_goes_on_after_a_reset(slow_farm):
    env = RemoteEnv(SLOW, [(slow_farm.address, 1)], timeout=30.0)
    try:
        env.reset()
        env._timeout = 0.2
        with pytest.raises(FarmTimeout):
            env.step(actions(1, 2.0)[0])
        env._timeout = 30.0
        observation, _ = env.reset()
        assert observation[1:].tolist() == [0, 0]
        assert env.step(actions(1, 0.0)[0])[0][1] == 1
    finally:
        env.close()


# Losses.


@pytest.mark.slow
def test_a_worker_killed_in_a_step_loses_that_step_only_and_is_replaced():
    with running_farm(SLOW, slots=2) as farm, Farmer(SLOW, [(farm.address, 2)]) as farmer:
        started(farmer)
        farmer.send([[0.0], [0.0]], [0, 1])
        farmer.recv(min_ready=2)
        farmer.send([[60.0], [0.0]], [0, 1])
        poll_until(lambda: farm.status()[0]["state"] == "stepping", 30, "the step")
        pid = farm.workers()[0]
        os.kill(pid, signal.SIGKILL)
        rows = {}
        while len(rows) < 2:
            rows.update({row.slot: row for row in farmer.collect()})
        assert rows[0].lost
        assert rows[0].truncated
        assert not rows[0].terminated
        assert (rows[0].env_s, rows[0].trip_s) == (0.0, 0.0)
        assert f"slot 0 (pid {pid}) was killed by SIGKILL" in rows[0].info["lost"]
        assert "after 1 steps" in rows[0].info["lost"]
        assert rows[0].obs[1] == 1, "the last good observation"
        assert rows[1].obs[1] == 2
        assert not rows[1].lost
        poll_until(lambda: 0 in farmer.vacant(), 30, "the slot")
        farmer.reset([0])
        assert farmer.recv().first.tolist() == [True]
        total = assert_ledgers_sum(farmer)
        assert (total["sent"], total["done"], total["crashed"]) == (4, 3, 1)


@pytest.mark.slow
def test_a_worker_that_is_killed_between_steps_costs_the_next_step():
    with running_farm(COUNTING, slots=1) as farm, Farmer(COUNTING, [(farm.address, 1)]) as farmer:
        started(farmer)
        (pid,) = farm.workers()
        os.kill(pid, signal.SIGKILL)
        poll_until(lambda: farm.status()[0]["starts"] == 2, 30, "a new worker")
        farmer.send(actions(1), [0])
        batch = farmer.recv()
        assert batch.lost.tolist() == [True]
        farmer.reset([0])
        assert farmer.recv().first.tolist() == [True]
        assert assert_ledgers_sum(farmer)["crashed"] == 1


@pytest.mark.slow
def test_an_environment_that_raises_is_a_lost_row_with_the_far_traceback():
    with running_farm(RAISING, slots=1) as farm:
        with Farmer(RAISING, [(farm.address, 1)]) as farmer:
            started(farmer)
            farmer.send(actions(1, 0.75), [0])
            batch = farmer.recv()
            assert batch.lost.tolist() == [True]
            assert "ValueError: asked to raise in step" in batch.info[0]["lost"]
            assert "environments.py" in batch.info[0]["lost"]
            farmer.reset(farmer.vacant())
            assert farmer.recv().first.tolist() == [True]
            total = assert_ledgers_sum(farmer)
            assert (total["sent"], total["invalid"]) == (1, 1)
        env = RemoteEnv(RAISING, [(farm.address, 1)])
        try:
            env.reset()
            with pytest.raises(EnvironmentFault, match=r"(?s)asked to raise in step.*Traceback"):
                env.step(actions(1, 0.75)[0])
            with pytest.raises(BadSlot, match="reset it first"):
                env.step(actions(1, 0.0)[0])
            assert env.reset()[0][1] == 0
        finally:
            env.close()


@pytest.mark.slow
def test_a_worker_that_leaves_in_a_step_is_told_with_its_exit_code():
    with running_farm(RAISING, slots=1) as farm, Farmer(RAISING, [(farm.address, 1)]) as farmer:
        started(farmer)
        farmer.send(actions(1, 1.0), [0])
        assert "exited with code 9" in farmer.recv().info[0]["lost"]


# Many farms.


def play(farmer, seconds, sleep):
    """Keeps every slot busy for a while; returns steps by farm and how many slots of each were busy on average."""
    steps, busy = {}, {}
    slots = started(farmer)
    farmer.send([[sleep(farmer.name_of(slot))] for slot in slots], slots)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        batch = farmer.recv()
        assert not batch.lost.any()
        for slot in batch.slot:
            name = farmer.name_of(slot)
            steps[name] = steps.get(name, 0) + 1
        farmer.send([[sleep(farmer.name_of(slot))] for slot in batch.slot], batch.slot)
        for row in farmer.status()["farms"]:
            busy.setdefault(row["farm"], []).append(row["busy"])
    return steps, {farm: np.mean(counts) for farm, counts in busy.items()}


@pytest.mark.slow
def test_two_farms_stay_busy_and_their_steps_are_in_proportion_to_their_slots(farms_of_2_and_6):
    small, large = farms_of_2_and_6
    with Farmer(SLOW, [(small.address, 2), (large.address, 6)]) as farmer:
        assert farmer.nb_slots == 8
        steps, busy = play(farmer, 3.0, lambda farm: 0.15)
        assert busy[small.address] > 0.6 * 2
        assert busy[large.address] > 0.6 * 6
        assert 2.0 < steps[large.address] / steps[small.address] < 4.5
        assert_ledgers_sum(farmer)


@pytest.mark.slow
def test_a_farm_that_is_twice_as_slow_makes_half_the_steps_of_a_slot(farms_of_2_and_6):
    small, large = farms_of_2_and_6
    with Farmer(SLOW, [(small.address, 2), (large.address, 6)]) as farmer:
        steps, _ = play(farmer, 5.0, lambda farm: 0.3 if farm == small.address else 0.6)
        assert 1.1 < steps[large.address] / steps[small.address] < 2.2


@pytest.mark.slow
def test_fewer_slots_than_the_list_has_are_dealt_in_proportion():
    # Farms of its own: those of other tests have told by now which of them is fast.
    with (
        farm_here("SlowEnv", slots=2) as small,
        farm_here("SlowEnv", slots=6) as large,
        Farmer(SLOW, [(small, 2), (large, 6)], slots=4),
    ):
        assert [ask_farm(address, "describe")["free"] for address in (small, large)] == [1, 3]


def test_another_hosts_slots_are_never_touched(farms_of_2_and_6):
    small, large = farms_of_2_and_6
    both = [(small.address, 2), (large.address, 6)]
    with Farmer(SLOW, both, slots=4) as first:
        started(first)
        first.send([[0.5]] * 4, range(4))
        with Farmer(SLOW, both) as second:
            assert second.nb_slots == 4, "what is left"
            started(second)
            with pytest.raises(NoFreeSlot, match="no slot is free"):
                Farmer(SLOW, both)
        batch = first.recv(min_ready=4)
        assert batch.obs[:, 1].tolist() == [1] * 4
        assert not batch.lost.any()
    assert (free_slots(small), free_slots(large)) == (2, 6)


@pytest.mark.slow
def test_threads_do_not_grow_with_slots():
    with running_farm(COUNTING, slots=32) as farm:
        before = threading.active_count()
        with Farmer(COUNTING, [(farm.address, 32)]) as farmer:
            slots = started(farmer)
            farmer.send(actions(32), slots)
            assert len(farmer.recv(min_ready=32)) == 32
            assert threading.active_count() - before == 3, "two for the farm, and the keeper"


# Wrong lists and wrong farms: nothing is leased.


@pytest.mark.parametrize(("slots", "seed"), [(0, None), (-1, None), (None, -1)])
def test_slots_and_seeds_that_there_cannot_be_are_refused_in_words(slots, seed):
    with pytest.raises(ValueError, match=r"(slots must be 1|seed must be 0) or more, or None.* not (0|-1)$"):
        Farmer(COUNTING, [("127.0.0.1:9", 1)], slots=slots, seed=seed)


@pytest.mark.parametrize("wrong", [{"slots": "x"}, {"slots": 1.5}, {"slots": True}, {"seed": "a"}])
def test_slots_and_seeds_that_are_no_whole_numbers_are_refused_in_words(wrong):
    with pytest.raises(TypeError, match=r"(slots|seed) must be a whole number, or None.* not ('x'|1.5|True|'a')$"):
        Farmer(COUNTING, [("127.0.0.1:9", 1)], **wrong)


def test_a_seed_or_a_count_that_is_no_number_is_refused_before_anything_is_sent(farm):
    with Farmer(COUNTING, [(farm.address, 2)]) as farmer:
        with pytest.raises(TypeError, match=r"a seed must be a whole number or None, not 'a'$"):
            farmer.reset([0, 1], [1, "a"])
        assert farmer.vacant() == [0, 1]
        with pytest.raises(TypeError, match=r"min_ready must be a whole number, not 'x'$"):
            farmer.recv("x")


def test_a_remote_env_refuses_arguments_of_the_environment_and_pictures_in_words(farm):
    with pytest.raises(TypeError, match=r"(?s)RemoteEnv has no argument 'g'.*--env-kwargs '\{\"g\": \.\.\.\}'"):
        RemoteEnv(COUNTING, [(farm.address, 1)], g=9.81)
    env = RemoteEnv(COUNTING, [(farm.address, 1)])
    with pytest.raises(NotImplementedError, match="is not rendered here"):
        env.render()
    env.close()


def test_a_closed_remote_env_says_so(farm):
    env = RemoteEnv(COUNTING, [(farm.address, 1)])
    env.reset()
    env.close()
    env.close()
    for verb in (env.reset, lambda: env.step(0)):
        with pytest.raises(ClosedEnvironmentError, match="the environment %s is closed: make a new one" % COUNTING):
            verb()


def test_more_slots_than_a_farm_offers_are_refused(farm):
    with pytest.raises(NoFreeSlot, match=r"wants 5 slots of \S+, which offers 4\n  now: start it with --slots 5"):
        Farmer(COUNTING, [(farm.address, 5)])
    with pytest.raises(NoFreeSlot, match="5 slots were asked for; the farmlist has 4"):
        Farmer(COUNTING, [(farm.address, 4)], slots=5)
    assert free_slots(farm) == 4


def test_an_environment_that_a_farm_does_not_offer_is_refused_with_those_it_does(farm, slow_farm):
    with pytest.raises(NoSuchEnvironment, match=rf"does not offer 'environments:CountingEn'.*\n  close: {COUNTING}"):
        Farmer("environments:CountingEn", [(farm.address, 4), (slow_farm.address, 4)])
    assert (free_slots(farm), free_slots(slow_farm)) == (4, 4)


def test_a_farm_without_the_environment_is_skipped_with_a_word(farm, slow_farm, caplog):
    with Farmer(COUNTING, [(slow_farm.address, 4), (farm.address, 4)]) as farmer:
        assert farmer.nb_slots == 4
        lacking = farmer.status()["farms"][0]
        assert f"the farm at {slow_farm.address}: this farm does not offer {COUNTING!r}" in lacking["trouble"]
        assert "now: going on without this farm" in caplog.text
    assert (free_slots(farm), free_slots(slow_farm)) == (4, 4)


def test_a_wrong_name_is_told_as_one_also_while_other_hosts_hold_all_slots(slow_farm):
    with Farmer(SLOW, [(slow_farm.address, 4)]):
        with pytest.raises(NoSuchEnvironment, match="does not offer 'environments:SlowEn'"):
            Farmer("environments:SlowEn", [(slow_farm.address, 2)])
        with pytest.raises(NoFreeSlot, match="other hosts hold them"):
            Farmer(SLOW, [(slow_farm.address, 2)])


def test_an_address_where_nothing_listens_is_told_with_what_to_do():
    port = closed_port()
    with pytest.raises(FarmUnreachable, match=rf"no farm answered at 127.0.0.1:{port} within") as caught:
        Farmer(COUNTING, [(f"127.0.0.1:{port}", 1)])
    assert "farm.py is not running there" in str(caught.value)
    assert f"python farm.py {COUNTING}" in str(caught.value)


def test_a_name_that_nobody_knows_is_told():
    with pytest.raises(FarmUnreachable, match=r"slave\.invalid:20099"):
        Farmer(COUNTING, [("slave.invalid", 1)])


@contextlib.contextmanager
def listening(answer):
    """Something that listens and is no farm; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        over = threading.Event()

        def serve():
            held = []
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    held.append(server.accept()[0])
                    if answer is not None:
                        held[-1].recv(4096)
                        held[-1].sendall(answer)
                        held[-1].close()
            for one in held:
                one.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield "127.0.0.1:%d" % server.getsockname()[1]
        finally:
            over.set()
            thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + b"x" * 100, b"SSH-2.0-x\r\n", b""]
)
def test_what_is_no_farm_is_told_and_a_farm_beside_it_is_used(farm, answer):
    with listening(answer) as address:
        with pytest.raises(FarmUnreachable, match=address) as caught:
            Farmer(COUNTING, [(address, 1)])
        assert "no farm" in str(caught.value).partition("likely:")[2]
        with Farmer(COUNTING, [(address, 1), (farm.address, 4)]) as farmer:
            assert farmer.nb_slots == 4


@pytest.mark.slow
def test_a_server_that_says_nothing_is_given_up_after_a_limit(monkeypatch):
    monkeypatch.setattr(proxy_module, "CONNECT_LIMIT", 0.5)
    with listening(None) as address, pytest.raises(FarmUnreachable, match="hangs"):
        Farmer(COUNTING, [(address, 1)])


@pytest.mark.slow
def test_a_farm_of_another_protocol_version_is_refused(tmp_path, farm):
    ours = protocol.VERSION
    script = tmp_path / "other_farm.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from wire import protocol; protocol.VERSION += 1\n"
        "import farm; sys.exit(farm.main())\n"
    )
    with running_farm(COUNTING, slots=1, script=script) as other:
        with pytest.raises(
            ProtocolMismatch, match=rf"{other.address} speaks protocol {ours + 1}, this host {ours}\n  now:"
        ):
            Farmer(COUNTING, [(farm.address, 4), (other.address, 1)])
        assert (free_slots(farm), free_slots(other)) == (4, 1)


@pytest.mark.slow
def test_the_others_are_used_when_a_farm_is_away_and_it_joins_when_it_comes(farm, caplog):
    port = closed_port()
    with Farmer(COUNTING, [(farm.address, 2), (f"127.0.0.1:{port}", 2)]) as farmer:
        assert farmer.nb_slots == 2
        assert f"going on with {farm.address}" in caplog.text
        assert [row["connected"] for row in farmer.status()["farms"]] == [True, False]
        with running_farm(COUNTING, slots=2, port=port):
            poll_until(lambda: farmer.nb_slots == 4, 30, "the second farm")
            assert len(started(farmer)) == 4


@pytest.mark.slow
def test_a_farm_that_is_killed_loses_its_rows_and_rejoins_on_the_same_port(farm):
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(running_farm(SLOW, COUNTING, slots=2, port=closed_port()))
        farmer = stack.enter_context(Farmer(COUNTING, [(farm.address, 2), (other.address, 2)]))
        slots = started(farmer)
        mine = [slot for slot in slots if farmer.name_of(slot) == other.address]
        stay = [slot for slot in slots if slot not in mine]
        other.freeze()  # so that it surely has not answered when it dies
        farmer.send(actions(4), slots)
        batch = farmer.recv(min_ready=2)
        assert sorted(batch.slot.tolist()) == stay
        other.kill()
        farmer.send(actions(2), stay)
        rows = {}
        while len(rows) < 4:
            rows.update({row.slot: row for row in farmer.collect(timeout=30)})
        assert all(rows[slot].lost and rows[slot].truncated for slot in mine)
        assert not any(rows[slot].lost for slot in stay)
        assert farmer.nb_slots == 2
        total = assert_ledgers_sum(farmer)
        assert (total["sent"], total["done"], total["lost with its farm"]) == (6, 4, 2)
        with running_farm(COUNTING, slots=2, port=other.port):
            poll_until(lambda: farmer.nb_slots == 4, 30, "the farm that came back")
            assert farmer.vacant() == mine
            started(farmer)
            farmer.send(actions(2), mine)
            assert farmer.recv(min_ready=2).obs[:, 1].tolist() == [1, 1]


@pytest.mark.slow
def test_an_action_for_a_slot_that_was_lost_since_the_last_recv_goes_nowhere_and_its_row_says_so():
    with running_farm(COUNTING, slots=2) as farm, Farmer(COUNTING, [(farm.address, 2)]) as farmer:
        farmer.reset([0, 1])
        farmer.recv(min_ready=2)
        farm.kill()
        poll_until(lambda: farmer.nb_ready == 2, 30, "the host to notice")
        before = farmer.status()["farms"][0]["ledger"]["sent"]
        farmer.send([[0.0], [0.0]], [0, 1])
        batch = farmer.recv(min_ready=2)
        assert batch.lost.tolist() == [True, True]
        assert farmer.status()["farms"][0]["ledger"]["sent"] == before
        with pytest.raises(BadSlot, match="has no episode"):
            farmer.send([[0.0]], [0])


@pytest.mark.slow
def test_the_slots_of_a_host_that_is_killed_are_free_again(slow_farm):
    code = (
        f"import sys, time; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from farmer import Farmer\n"
        f"farmer = Farmer({SLOW!r}, [(sys.argv[1], 3)])\n"
        "farmer.reset([0, 1, 2]); farmer.recv(3); farmer.send([[1.0]], [0]); print('holding', flush=True)\n"
        "time.sleep(60)"
    )
    host = subprocess.Popen([sys.executable, "-c", code, slow_farm.address], stdout=subprocess.PIPE, cwd=TESTS)
    try:
        assert host.stdout.readline() == b"holding\n"
        assert free_slots(slow_farm) == 1
        time.sleep(3)  # longer than a heartbeat: a living host keeps what it has
        assert free_slots(slow_farm) == 1
    finally:
        host.kill()
        host.wait()
        host.stdout.close()
    poll_until(lambda: free_slots(slow_farm) == 4, 30, "the slots of the dead host")


# Broken connections.


@pytest.fixture
def proxy(slow_farm):
    proxy = Proxy(slow_farm.port)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("sleep", [0.0, 0.5])
def test_a_step_whose_connection_broke_is_done_once_and_its_result_comes(slow_farm, proxy, sleep):
    with Farmer(SLOW, [(proxy.address, 1)]) as farmer:
        started(farmer)
        for step in range(1, 5):
            proxy.cut_after = b'"action"'
            farmer.send([[sleep]], [0])
            batch = farmer.recv(timeout=30)
            assert not batch.lost.any(), batch.info
            assert batch.obs[0, 1:].tolist() == [step, sleep], "not done twice, and its own result"
        assert proxy.cuts == 4
        total = assert_ledgers_sum(farmer)
        assert (total["sent"], total["done"]) == (4, 4)


@pytest.mark.slow
def test_a_connection_that_breaks_while_results_are_waited_for_loses_nothing(slow_farm, proxy):
    with Farmer(SLOW, [(proxy.address, 4)]) as farmer:
        slots = started(farmer)
        for step in range(1, 4):
            farmer.send([[1.0 + slot / 10] for slot in slots], slots)
            timer = threading.Timer(0.2, proxy.cut)
            timer.start()
            seen = {}
            while len(seen) < 4:
                seen.update({row.slot: row for row in farmer.collect(timeout=30)})
            timer.join()
            assert [seen[slot].obs[1] for slot in slots] == [step] * 4
            assert not any(row.lost for row in seen.values())
        assert assert_ledgers_sum(farmer)["done"] == 12
