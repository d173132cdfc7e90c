"""An exchange whose host wants several replies together: it waits for the last of them, and for none of them long."""

import os
import signal
import threading
import time

import pytest
from supervised import Holder, supervised

from wire import codec, protocol
from wire.errors import LeaseLost

LATE = 3.0  #: s that a straggler takes; every answer without it must come in a fraction of that
SOON = 2.0


@pytest.fixture
def supervisor():
    with supervised("SlowEnv", slots=4) as it:
        yield it


@pytest.fixture
def holder(supervisor):
    holder = Holder(supervisor, 4)
    for slot in range(4):
        holder.reset(slot)
    yield holder
    holder.release()


def step_all(holder, sleeps, number, together=4):
    """Gives all their steps in one exchange; (the slots that it came back with, seconds that it took)."""
    steps = [
        [slot, number, protocol.STEP, codec.encode({"action": [sleep], "repeat": 1})]
        for slot, sleep in enumerate(sleeps)
    ]
    began = time.monotonic()
    replies = holder.supervisor.exchange(holder.token, steps, 5.0, together)
    return sorted(reply[0] for reply in replies), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("straggler", range(4))
def test_a_straggler_delays_nobody_wherever_it_sits(holder, straggler):
    sleeps = [LATE if slot == straggler else 0.0 for slot in range(4)]
    came, took = step_all(holder, sleeps, 1000)
    assert straggler not in came
    assert came
    assert took < SOON
    rest = {holder.take()[0] for _ in range(4 - len(came))}
    assert rest | set(came) == {0, 1, 2, 3}


def test_all_come_in_one_exchange_where_they_are_there(holder):
    together = 0
    for number in range(30):
        came, _ = step_all(holder, [0.0] * 4, 3000 + number)
        together += len(came) == 4
        for _ in range(4 - len(came)):
            holder.take()
    assert together > 0, "they never came together, though all answer at once"


def test_a_worker_that_dies_while_it_is_waited_for_is_told_soon(holder):
    number = holder.slots[-1]
    pid = holder.supervisor.slots[number].pid
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    timer.start()
    came, took = step_all(holder, [0.0, 0.0, 0.0, LATE], 4000)
    timer.join()
    assert came
    assert took < SOON
    answers = {}
    end = time.monotonic() + 10.0
    while len(answers) + len(came) < 4 and time.monotonic() < end:
        answers.update((reply[0], reply) for reply in holder.supervisor.exchange(holder.token, [], 5.0, 4))
    assert answers[number][2] == protocol.LOST


@pytest.mark.slow
def test_a_lease_that_ends_while_it_waits_ends_the_wait(holder):
    timer = threading.Timer(0.2, holder.release)
    timer.start()
    began = time.monotonic()
    with pytest.raises(LeaseLost):
        step_all(holder, [LATE] * 4, 5000)
    assert time.monotonic() - began < LATE
    timer.join()
