"""Leases alone: a host's right to slots, without processes and without a network."""

from __future__ import annotations

import threading
import time

import pytest
from helpers import poll_until

from farmhand import leases as module
from farmhand.leases import Leases
from farmhand.slots import Slot, State
from wire import protocol
from wire.errors import LeaseLost, NoFreeSlot, NoSuchEnvironment, ProtocolMismatch

RESET = [0, 1, protocol.RESET, b"body"]


class RecordedWork:
    """Workers that do nothing, and remember what they were asked to do."""

    def __init__(self):
        self.frames, self.holders = [], []

    def command(self, slot, kind, body, frame):
        self.frames.append((slot.number, kind, body))

    def attend(self, worker, event):
        raise AssertionError("nothing is registered here")

    def one_due(self, numbers, selector):
        return None

    def held(self, slot, env, selector):
        self.holders.append((slot.number, env))
        slot.env = env or slot.env


@pytest.fixture
def work():
    return RecordedWork()


@pytest.fixture
def leases(work):
    """Of a farm with two slots for each of two environments, whose workers are idle."""
    slots = [Slot(number, "ab"[number % 2], State.IDLE) for number in range(4)]
    found = Leases(slots, {"a": b"", "b": b""}, ["a", "b"], threading.RLock(), work)
    yield found
    found.end_all("the test is over")


def test_slots_that_run_the_environment_already_come_first(leases, work):
    assert leases.acquire("b", 3, protocol.VERSION).slots == [1, 3, 0]
    assert work.holders == [(1, "b"), (3, "b"), (0, "b")]
    assert leases.acquire("a", 1, protocol.VERSION, numbers=[2]).slots == [2]


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (("a", 5, protocol.VERSION), NoFreeSlot),
        (("a", 0, protocol.VERSION), NoFreeSlot),
        (("c", 1, protocol.VERSION), NoSuchEnvironment),
        (("a", 1, protocol.VERSION - 1), ProtocolMismatch),
    ],
)
def test_a_lease_that_cannot_be_had_changes_nothing(leases, work, asked, error):
    with pytest.raises(error):
        leases.acquire(*asked)
    assert not work.holders


def test_adding_to_a_lease_twice_adds_once(leases):
    lease = leases.acquire("a", 1, protocol.VERSION)
    for _ in range(2):
        assert leases.acquire("a", 3, protocol.VERSION, token=lease.token).slots == [0, 2, 1]


def test_a_released_slot_is_free_and_the_others_stay(leases, work):
    lease = leases.acquire("a", 2, protocol.VERSION)
    leases.release(lease.token, [0, 3])
    assert lease.slots == [2]
    assert work.holders[-1] == (0, None)
    with pytest.raises(LeaseLost, match="slot 0 is not in this lease"):
        leases.exchange(lease.token, [RESET], 0.0)
    leases.release(lease.token)
    with pytest.raises(LeaseLost, match="not known here"):
        leases.exchange(lease.token, [], 0.0)
    leases.release(lease.token)


def test_a_command_goes_to_the_worker_and_its_reply_to_the_holder(leases, work):
    lease = leases.acquire("a", 1, protocol.VERSION)
    assert leases.exchange(lease.token, [RESET], 0.0) == []
    assert work.frames == [(0, protocol.RESET, b"body")]
    deliver_later(leases, lease, protocol.OBSERVATION, b"seen")
    assert leases.exchange(lease.token, [], 5.0) == [[0, 1, protocol.OBSERVATION, 0, b"seen"]]


def deliver_later(leases, lease, kind, body):
    """From another thread, as the loop of a farm does, once a call waits."""
    slot = leases.slots[lease.slots[0]]

    def deliver():
        poll_until(lambda: lease.waiting, 10, "the call")
        leases.deliver(slot, slot.replied(kind, 0, slot.ticket, body))
        leases.wake(slot)

    threading.Thread(target=deliver).start()


def test_a_call_of_an_older_generation_does_nothing_and_gets_nothing(leases, work):
    lease = leases.acquire("a", 1, protocol.VERSION)
    told = []
    assert leases.exchange(lease.token, [], 0.0, generation=2, accepted=told.append) == []
    assert leases.exchange(lease.token, [RESET], 5.0, generation=1, accepted=told.append) == []
    assert leases.exchange(lease.token, [], 0.0, generation=2, accepted=told.append) == []
    assert told == [True, False]
    assert not work.frames


def test_a_new_generation_ends_the_call_that_waits_on_the_old_one(leases):
    lease = leases.acquire("a", 1, protocol.VERSION)
    found = []
    waits = threading.Thread(target=lambda: found.append(leases.exchange(lease.token, [], 5.0)))
    waits.start()
    poll_until(lambda: lease.waiting, 10, "the call")
    leases.exchange(lease.token, [], 0.0, generation=1)
    waits.join(4.0)
    assert found == [[]]


def test_a_lease_whose_host_does_not_call_ends_and_one_that_cannot_expire_stays(leases, work):
    silent = leases.acquire("a", 1, protocol.VERSION)
    lasting = leases.acquire("a", 1, protocol.VERSION, expires=False)
    ended = []
    leases.on_expired = ended.append
    leases.expire()
    assert not ended
    silent.seen = lasting.seen = time.monotonic() - module.LEASE_LIMIT - 1.0
    leases.expire()
    assert ended == [silent.token]
    assert leases.find(silent.token) is None
    assert leases.find(lasting.token) is lasting
    assert work.holders[-1] == (0, None)


def test_replies_too_large_for_one_message_come_in_several(leases, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    lease = leases.acquire("a", 2, protocol.VERSION)
    commands = [[number, 1, protocol.RESET, b""] for number in lease.slots]
    leases.exchange(lease.token, commands, 0.0)
    for number in lease.slots:
        slot = leases.slots[number]
        leases.deliver(slot, slot.replied(protocol.OBSERVATION, 0, slot.ticket, b"8 bytes."))
    assert [leases.exchange(lease.token, [], 0.0)[0][0] for _ in lease.slots] == lease.slots
