"""Which thread makes the calls to a farm: the caller's while it is there, the exchange's own while it is not."""

import collections
import threading
import time

import numpy as np
import psutil
import pytest
from farms import ask_farm, running_farm
from helpers import poll_until

from farmer import Farmer
from farmer.pyro import exchange as exchange_module
from farmer.pyro.connection import Connection
from farmer.replies import ReplyReader

COUNTING = "environments:CountingEnv"
SLOW = "environments:SlowEnv"
LENGTH = 10_000


@pytest.fixture(scope="module")
def lasting_farm():
    with running_farm(COUNTING, slots=4, kwargs={"length": LENGTH}) as farm:
        yield farm


@pytest.fixture
def farm(lasting_farm):
    """Four free slots."""
    lasting_farm.wait_until_free()
    return lasting_farm


@pytest.fixture(scope="module")
def lasting_slow_farm():
    with running_farm(SLOW, slots=4) as farm:
        yield farm


@pytest.fixture
def slow_farm(lasting_slow_farm):
    """Four free slots that sleep as long as an action says."""
    lasting_slow_farm.wait_until_free()
    return lasting_slow_farm


@pytest.fixture
def readers(monkeypatch):
    """How often each thread has read an answer with replies in it, by the name of the thread."""
    counts = collections.Counter()
    finish = Connection.finish

    def counted(self):
        replies = finish(self)
        if replies:
            counts[threading.current_thread().name.split()[0]] += 1
        return replies

    monkeypatch.setattr(Connection, "finish", counted)
    return counts


def started(farmer):
    slots = farmer.vacant()
    farmer.reset(slots)
    assert len(farmer.recv(min_ready=len(slots))) == len(slots)
    return slots


def actions(count):
    return np.zeros((count, 1), np.float32)


def whoever_is_ready(farmer, slots, batches):
    """That many batches, and more until every slot was among them."""
    ready, seen = np.array(slots), collections.Counter()
    while batches > 0 or len(seen) < len(slots):
        batches -= 1
        farmer.send(actions(len(ready)), ready)
        batch = farmer.recv()
        ready = batch.slot
        seen.update(ready.tolist())
        assert not batch.lost.any()
    return seen


@pytest.mark.slow
def test_a_caller_who_sends_and_receives_makes_the_calls_itself(farm, readers):
    with Farmer(COUNTING, [(farm.address, 4)]) as farmer:
        slots = started(farmer)
        readers.clear()
        seen = whoever_is_ready(farmer, slots, 300)
        assert sorted(seen) == slots
    assert readers["MainThread"] > 0.5 * sum(readers.values()), readers


@pytest.mark.slow
def test_so_it_does_with_two_farms(farm, readers):
    with (
        running_farm(COUNTING, slots=2, kwargs={"length": LENGTH}) as other,
        Farmer(COUNTING, [(farm.address, 2), (other.address, 2)]) as farmer,
    ):
        slots = started(farmer)
        readers.clear()
        seen = whoever_is_ready(farmer, slots, 300)
        assert sorted(seen) == slots
        ledger = farmer.status()["ledger"]
        assert ledger["sent"] == ledger["done"] + ledger["under way"]
    assert readers["MainThread"] > 0.5 * sum(readers.values()), readers


@pytest.mark.slow
def test_a_threads_work_goes_back_to_the_caller_who_waits_for_it(slow_farm, readers, exchanges):
    with Farmer(SLOW, [(slow_farm.address, 4)]) as farmer:
        slots = started(farmer)
        farmer.send([[0.3], [0.6], [0.6], [0.6]], slots)
        poll_until(lambda: is_held(exchanges[0]), 30, "a thread at the farm")
        ready = farmer.recv().slot
        readers.clear()
        for _ in range(100):
            farmer.send([[0.01]] * len(ready), ready)
            ready = farmer.recv().slot
    assert readers["MainThread"] > 0.5 * sum(readers.values()), readers


def is_held(exchange):
    return exchange.state is exchange_module.Call.HELD


def test_while_the_caller_is_away_a_thread_brings_the_results(farm, readers):
    with Farmer(COUNTING, [(farm.address, 4)]) as farmer:
        slots = started(farmer)
        for _ in range(3):
            readers.clear()
            for slot in slots:
                farmer.send(actions(1), [slot])
            poll_until(lambda: farmer.nb_ready == 4, 30, "the results, without a recv")
            assert readers["MainThread"] == 0, readers
            assert sorted(farmer.recv().slot.tolist()) == slots


def test_what_came_since_the_first_result_comes_with_it(slow_farm, monkeypatch, exchanges):
    monkeypatch.setattr(exchange_module, "AWAY", 60.0)  # no thread helps
    with Farmer(SLOW, [(slow_farm.address, 4)]) as farmer:
        slots = started(farmer)
        exchanges[0].want(False)
        farmer.send([[0.01], [0.1], [0.1], [0.1]], slots)
        poll_until(lambda: is_answered(exchanges[0]), 30, "the first result")
        time.sleep(2.0)  # twenty times as long as the others take
        assert sorted(farmer.recv(min_ready=1).slot.tolist()) == slots


def is_answered(exchange):
    return exchange.poll_connection.is_answered(0.0)


def test_without_a_wait_recv_takes_what_is_there(farm, monkeypatch, exchanges):
    monkeypatch.setattr(exchange_module, "AWAY", 60.0)
    with Farmer(COUNTING, [(farm.address, 4)]) as farmer:
        slots = started(farmer)
        farmer.send(actions(4), slots)
        poll_until(lambda: is_answered(exchanges[0]), 30, "the first result")
        assert len(farmer.recv(min_ready=4, timeout=0)) >= 1


def test_actions_that_are_large_are_sent_by_a_thread(farm, monkeypatch):
    monkeypatch.setattr(exchange_module, "LITTLE", 0)
    began = collections.Counter()
    begin = Connection.begin

    def counted(self, lease, commands, *args):
        if commands:
            began[threading.current_thread().name.split()[0]] += 1
        return begin(self, lease, commands, *args)

    monkeypatch.setattr(Connection, "begin", counted)
    with Farmer(COUNTING, [(farm.address, 4)]) as farmer:
        slots = started(farmer)
        began.clear()
        farmer.send(actions(4), slots)
        poll_until(lambda: farmer.nb_ready == 4, 30, "the results, without a recv")
    assert set(began) <= {"poller", "sender"}, began


@pytest.mark.slow
def test_ctrl_c_while_the_caller_waits_costs_no_step_and_no_connection(exchanges):
    with running_farm(SLOW, slots=2) as farm, Farmer(SLOW, [(farm.address, 2)]) as farmer:
        slots = started(farmer)
        connection = exchanges[0].poll_connection
        farmer.send([[1.0], [1.0]], slots)
        interrupt = threading.Timer(0.2, lambda: psutil.Process().send_signal(2))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            farmer.recv(min_ready=2)
        interrupt.join()
        batch = farmer.recv(min_ready=2)
        assert sorted(batch.slot.tolist()) == slots
        assert not batch.lost.any()
        assert exchanges[0].poll_connection is connection


@pytest.mark.slow
def test_a_connection_whose_holder_was_interrupted_is_taken_from_it(farm, exchanges):
    with Farmer(COUNTING, [(farm.address, 4)]) as farmer:
        slots = started(farmer)
        farmer.send(actions(4), slots)
        other = threading.Thread(target=lambda: poll_until(exchanges[0].hold, 30, "the connection"))
        other.start()  # and never lets go of it
        other.join()
        batch = farmer.recv(min_ready=4, timeout=60)
        assert sorted(batch.slot.tolist()) == slots
        assert not batch.lost.any()
        whoever_is_ready(farmer, slots, 20)


def test_a_connection_that_the_caller_still_holds_is_no_hindrance(farm, exchanges):
    with Farmer(COUNTING, [(farm.address, 4)]) as farmer:
        slots = started(farmer)
        farmer.send(actions(4), slots)
        poll_until(exchanges[0].hold, 30, "the connection")  # as after a Ctrl-C at the worst instant
        began = time.monotonic()
        batch = farmer.recv(min_ready=4, timeout=60)
        assert sorted(batch.slot.tolist()) == slots
        assert not batch.lost.any()
        assert time.monotonic() < began + exchange_module.FORSAKEN


def test_ctrl_c_between_an_answer_and_its_place_loses_no_result(farm, monkeypatch):
    with Farmer(COUNTING, [(farm.address, 4)]) as farmer:
        slots = started(farmer)
        read, calls = ReplyReader.read, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return read(*args)

        monkeypatch.setattr(ReplyReader, "read", interrupted)
        monkeypatch.setattr(exchange_module, "AWAY", 60.0)  # it strikes the caller, not another thread
        farmer.hand_over(actions(4), slots)
        with pytest.raises(KeyboardInterrupt):
            farmer.recv(min_ready=4)
        seen = {}
        while len(seen) < 4:
            batch = farmer.recv()
            assert not batch.lost.any()
            seen.update(zip(batch.slot.tolist(), batch.obs[:, 1].tolist(), strict=True))
        assert seen == dict.fromkeys(slots, 1)
        ledger = farmer.status()["ledger"]
        assert (ledger["sent"], ledger["done"]) == (4, 4)


@pytest.mark.slow
def test_an_answer_that_takes_long_does_not_break_another_farms_connection(farm, monkeypatch, exchanges):
    with (
        running_farm(SLOW, slots=1) as other,
        running_farm(SLOW, slots=1) as third,
        Farmer(SLOW, [(other.address, 1), (third.address, 1)]) as farmer,
    ):
        slots = started(farmer)
        connections = [exchange.poll_connection for exchange in exchanges]
        finish = Connection.finish
        slow = connections[0]

        def slowly(self):
            replies = finish(self)
            if self is slow and replies:
                time.sleep(exchange_module.WAIT + exchange_module.ANSWER_LIMIT + 0.5)
            return replies

        monkeypatch.setattr(Connection, "finish", slowly)
        farmer.send([[0.0], [0.3]], slots)
        assert sorted(farmer.recv(min_ready=2).slot.tolist()) == slots
        assert [exchange.poll_connection for exchange in exchanges] == connections


@pytest.mark.slow
def test_a_caller_that_was_held_up_does_not_let_go_of_what_a_thread_holds_now(slow_farm, exchanges):
    with Farmer(SLOW, [(slow_farm.address, 4)]) as farmer:
        slots = started(farmer)
        farmer.send([[0.0], [3.0], [3.0], [3.0]], slots)
        poll_until(exchanges[0].hold, 30, "the connection")
        exchanges[0].read(is_caller=True)
        poll_until(lambda: is_held(exchanges[0]), 30, "a thread at the farm, in the caller's place")
        exchanges[0].let_go()
        assert is_held(exchanges[0])
        assert sorted(farmer.recv(min_ready=4).slot.tolist()) == slots


@pytest.mark.slow
def test_a_farm_that_has_forgotten_the_lease_is_told_by_the_caller_too(farm, exchanges):
    with Farmer(COUNTING, [(farm.address, 4)]) as farmer:
        slots = started(farmer)
        ask_farm(farm.address, "release", exchanges[0].lease)
        farmer.send(actions(4), slots)
        batch = farmer.recv(min_ready=4)
        assert batch.lost.all()
        poll_until(lambda: farmer.vacant() == slots, 30, "the slots again")
        started(farmer)
