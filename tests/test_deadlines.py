"""Limits of time: what never comes back is ended, told, and replaced, and nobody else waits for it."""

import os
import signal
import time

import numpy as np
import pytest
from farms import is_gone, running_farm
from helpers import poll_until
from supervised import Holder, Lost, supervised, wait_until_idle

from farmer import Farmer
from farmhand.limits import FLOOR, UNKNOWN, TimeLimit, Times
from wire import codec, fields

HANGS = ("asleep", "in a loop", "in C", "stopped")

# What a limit is.


def test_a_learnt_limit_is_generous_until_enough_were_seen_and_has_a_floor():
    limit = TimeLimit(None, enough=100)
    for _ in range(99):
        limit.saw(0.001)
    assert limit.seconds == UNKNOWN
    limit.saw(0.001)
    assert limit.seconds == FLOOR
    assert "learnt" in limit.origin()


def test_a_learnt_limit_is_ten_times_the_p99_of_slow_steps():
    limit = TimeLimit(None, enough=100)
    for _ in range(200):
        limit.saw(20.0)
    assert 200 <= limit.seconds <= 220


def test_a_learnt_limit_leaves_alone_a_step_thousands_of_times_slower_than_the_median():
    random = np.random.default_rng(0)
    limit = TimeLimit(None, enough=100)
    for number in range(20000):  # OpenSim's arm: 1 ms in the median, 2.5 s at most
        seconds = 2.5 if number % 200 == 150 else float(random.lognormal(np.log(0.001), 0.5))
        assert seconds < limit.seconds
        limit.saw(seconds)


def test_a_learnt_limit_that_breaks_off_honest_steps_grows():
    limit = TimeLimit(None, enough=100)
    for _ in range(200):
        limit.saw(1.0)
    assert limit.seconds == FLOOR
    for _ in range(60):
        limit.saw(limit.seconds)  # they took longer than that
    assert limit.seconds > 5 * FLOOR


def test_a_given_limit_stays():
    limit = TimeLimit(5.0, enough=2)
    for _ in range(10):
        limit.saw(100.0)
    assert limit.seconds == 5.0


def test_the_quantile_of_times_is_at_most_a_tenth_too_long():
    random = np.random.default_rng(1)
    sample = random.lognormal(0.0, 2.0, 5000)
    times = Times()
    for seconds in sample:
        times.add(float(seconds))
    for share in (0.5, 0.9, 0.99):
        true = np.quantile(sample, share)
        assert 0.97 * true <= times.quantile(share) <= 1.12 * true


def test_times_forget_what_is_long_ago():
    times = Times()
    for seconds in [10.0] * 1000 + [0.1] * 200_000:
        times.add(seconds)
    assert times.quantile(0.999) < 0.2


@pytest.mark.parametrize("repeat", [1, 4, 1000])
@pytest.mark.parametrize("action", [[0.5], np.zeros(22, "f4"), {"a": np.zeros((64, 64, 3), "u1"), "repeat": 7}, 3])
def test_a_steps_repeat_is_read_without_its_action(action, repeat):
    assert fields.repeat_of(codec.encode({"action": action, "repeat": repeat})) == repeat
    assert fields.repeat_of(codec.encode({"repeat": repeat, "action": action})) == repeat, "of another kind of host"


@pytest.mark.parametrize("body", [b"", b"junk", codec.encode(None), codec.encode({"repeat": "x"}), codec.encode([1])])
def test_what_is_no_step_has_no_repeat_and_no_seconds(body):
    assert fields.repeat_of(body) == 1
    assert fields.seconds_of(body) == 0.0 or body == codec.encode([1])


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_what_is_no_time_is_none(seconds):
    limit = TimeLimit(None, enough=2)
    limit.saw(fields.seconds_of(codec.encode((1, {}, np.float64(seconds)))))
    assert limit.seconds >= UNKNOWN


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.0123, 3.5e-05, 12345.678])
def test_the_seconds_of_a_result_are_read_without_its_observation(seconds):
    for info in ({}, {"a": [1, (2, 3)], "b": "]},"}):
        body = codec.encode((np.zeros((64, 64, 3), "u1"), 1.0, False, True, info, np.float64(seconds)))
        assert fields.seconds_of(body) == seconds
        assert fields.seconds_of(codec.encode(([1, 2], info, np.float64(seconds)))) == seconds


# Commands that never come back.


def step_for_ever(holder, slot):
    while True:
        holder.step(slot)


@pytest.mark.slow
@pytest.mark.parametrize("how", HANGS)
def test_a_step_that_hangs_is_ended_and_told_and_the_other_slot_never_waits(how):
    with supervised("HangingEnv", kwargs={"how": how, "length": 10**9}, slots=2, step=2.0) as supervisor:
        holder = Holder(supervisor, 2)
        holder.reset(0), holder.reset(1)
        hung = supervisor.status()[0]["pid"]
        holder.give_step(0, 1.0)
        began = time.monotonic()
        with pytest.raises(Lost) as lost:
            step_for_ever(holder, 1)
        took = time.monotonic() - began
        assert 2.0 <= took < 30.0
        assert supervisor.status()[1]["steps"] > 20
        assert lost.value.bucket == "timed out"
        for words in ("slot 0 (pid %d)" % hung, "step 1", "within 2 s", "--step-timeout", "slot-0.log"):
            assert words in lost.value.text
        assert ("stopped" if how == "stopped" else "File") in lost.value.text, "where it was"
        holder.take()  # the other slot's last step
        poll_until(lambda: is_gone(hung), 30, "its end")
        holder.reset(0)
        assert holder.step(0)[0][1] == 1
        row = supervisor.status()[0]
        assert row["ledger"] == {
            "given": 2,
            "done": 1,
            "crashed": 0,
            "timed out": 1,
            "invalid": 0,
            "abandoned": 0,
            "under way": 0,
        }


def test_a_hang_is_told_to_a_holder_that_waits_in_a_long_call():
    with supervised("HangingEnv", step=0.3) as supervisor:
        holder = Holder(supervisor)
        holder.reset()
        began = time.monotonic()
        ((slot, _, _, _, body),) = supervisor.exchange(
            holder.token, [[0, 9, 3, codec.encode({"action": [1.0], "repeat": 1})]], 5.0
        )
        assert 0.3 <= time.monotonic() - began < 4.5, "not only when the call is over"
        assert (slot, codec.decode(body)["bucket"]) == (0, "timed out")


@pytest.mark.slow
def test_a_reset_that_hangs_is_ended_and_told():
    with supervised("HangingEnv", reset=2.0) as supervisor:
        holder = Holder(supervisor)
        with pytest.raises(Lost, match=r"a reset did not end within 2 s") as lost:
            holder.reset(hang=True)
        assert lost.value.bucket == "timed out"
        assert "--reset-timeout" in lost.value.text
        holder.reset()


def in_quarantine(supervisor):
    """The row of slot 0, while it is there."""
    row = supervisor.status()[0]
    return row if row["state"] == "quarantined" else None


@pytest.mark.slow
def test_a_constructor_that_hangs_later_is_a_failed_construction(tmp_path):
    trap = tmp_path / "trap"
    with supervised("HangingEnv", kwargs={"trap": str(trap)}, start=10.0) as supervisor:
        trap.touch()
        os.kill(supervisor.status()[0]["pid"], signal.SIGKILL)
        row = poll_until(lambda: in_quarantine(supervisor), 60, "the limit")
        assert "was not built within 10 s" in row["trouble"]
        assert "--start-timeout" in row["trouble"]
        assert 0 < row["next_try_s"] <= 1.0
        assert supervisor.describe()["free"] == 0
        trap.unlink()
        wait_until_idle(supervisor)
        assert supervisor.describe()["free"] == 1


def test_an_action_that_is_repeated_has_that_many_times_the_limit():
    with supervised("SlowEnv", step=1.0) as supervisor:
        holder = Holder(supervisor)
        holder.reset()
        assert holder.step(action=0.4, repeat=4)[0][1] == 4, "1.6 s of 4 s"
        with pytest.raises(Lost, match="did not end within 1 s"):
            holder.step(action=1.6)


@pytest.mark.slow
def test_a_result_that_its_holder_is_slow_to_take_is_no_late_one():
    with supervised("SlowEnv", step=2.0) as supervisor:
        holder = Holder(supervisor)
        holder.reset()
        holder.give_step(action=0.1)
        time.sleep(2.5)
        assert holder.take()[1][0][1] == 1
        assert supervisor.status()[0]["starts"] == 1


@pytest.mark.slow
def test_the_time_of_a_former_holders_step_is_not_the_next_ones():
    with supervised("SlowEnv", step=20.0, reset=2.0) as supervisor:
        former = Holder(supervisor)
        former.reset()
        former.give_step(action=3.0)
        former.release()
        holder = Holder(supervisor)
        holder.reset()  # waits 3 s for the step, and then takes no time
        assert supervisor.status()[0]["starts"] == 1
        assert supervisor.status()[0]["ledger"]["abandoned"] == 1


@pytest.mark.slow
def test_a_step_that_nobody_waits_for_any_more_is_ended_too():
    with supervised("HangingEnv", step=0.5) as supervisor:
        former = Holder(supervisor)
        former.reset()
        former.give_step(action=1.0)
        former.release()
        poll_until(lambda: supervisor.status()[0]["starts"] == 2, 30, "a new worker")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["hang", "kill"])
def test_nothing_that_a_worker_started_outlives_it(tmp_path, end):
    pids = tmp_path / "pids"
    with supervised("ParentEnv", kwargs={"pids": str(pids)}, step=0.5) as supervisor:
        holder = Holder(supervisor)
        holder.reset()
        started = [int(word) for word in pids.read_text().split()]
        assert len(started) == 2
        assert not any(map(is_gone, started))
        if end == "kill":
            os.kill(supervisor.status()[0]["pid"], signal.SIGKILL)
        with pytest.raises(Lost):
            holder.step(action=1.0)
        poll_until(lambda: all(map(is_gone, started)), 30, "the end of its children")


def test_a_worker_that_answers_what_nobody_asked_is_ended():
    with supervised("AnsweringEnv") as supervisor:
        holder = Holder(supervisor)
        holder.reset()
        with pytest.raises(Lost, match="answered what nobody had asked"):
            holder.step(action=1.0)
        holder.reset()


@pytest.mark.slow
def test_a_farm_with_a_limit_and_its_farmer_go_on_after_a_hang():
    env = "environments:HangingEnv"
    with running_farm(env, slots=2, extra=["--step-timeout", "2"]) as farm:
        with Farmer(env, [(farm.address, 2)]) as farmer:
            farmer.reset([0, 1])
            farmer.recv(min_ready=2)
            farmer.send([[1.0], [0.0]], [0, 1])
            rows = {}
            while len(rows) < 2:
                batch = farmer.recv()
                told = zip(batch.lost, batch.info, strict=True)
                rows.update(zip(batch.slot.tolist(), told, strict=True))
            assert (rows[0][0], rows[1][0]) == (True, False)
            assert "within 2 s" in rows[0][1]["lost"]
            poll_until(lambda: 0 in farmer.vacant(), 30, "slot 0")
            farmer.reset([0])
            assert not farmer.recv().lost.any()
        assert [row["limits"]["step"] for row in farm.status()] == [2.0, 2.0]
