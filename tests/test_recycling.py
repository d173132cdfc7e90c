"""Workers that have served their time, spares that take their place, and slots that cannot start."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from farms import ROOT, is_gone, running_farm, workers_of
from helpers import freeze, poll_until
from supervised import Holder, Lost, supervised, wait_until_idle

from farmer import Farmer
from farmhand import tree
from farmhand.control import Control, ask
from farmhand.limits import (
    BACK_OFF,
    BLOCK_STEPS,
    Limits,
    WorkerPace,
    back_off,
    in_words,
    memory_share,
    parse_size,
    spares_that_fit,
    why_recycle,
)
from farmhand.memory_cap import WEIGH_EVERY
from wire.errors import StartError

MB = 2**20
HANGING = "environments:HangingEnv"

# What is decided.


@pytest.mark.parametrize(
    ("text", "size"),
    [("2G", 2 << 30), ("1.5g", 3 << 29), ("500M", 500 << 20), ("7kb", 7 << 10), ("1GiB", 1 << 30), ("4096", 4096)],
)
def test_a_size_is_read_as_people_write_it(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "2X", "two"])
def test_what_is_no_size_is_refused_with_what_was_given(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_size(text)


def test_sizes_are_said_as_people_say_them():
    assert [in_words(size) for size in (12, 3 << 10, 40 << 20, 5 << 29)] == ["12 bytes", "3 KB", "40 MB", "2.5 GB"]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(), None),
        (Limits(recycle_memory=199 * MB), "memory"),
        (Limits(recycle_memory=200 * MB), None),
        (Limits(memory_share=99 * MB), "memory"),
        (Limits(memory_share=200 * MB), None),
        (Limits(recycle_resets=7), "resets"),
        (Limits(recycle_resets=8), None),
        (Limits(recycle_steps=70), "steps"),
        (Limits(recycle_steps=71), None),
    ],
)
def test_why_a_worker_is_replaced(limits, reason):
    assert why_recycle(limits, 7, 70, 200 * MB, 50 * MB, slow=False) == reason


def test_a_worker_that_needs_much_memory_from_the_beginning_is_no_leaking_one():
    limits = Limits(memory_share=100 * MB)
    assert why_recycle(limits, 7, 70, 200 * MB, 150 * MB, slow=False) is None
    assert why_recycle(limits, 7, 70, 301 * MB, 150 * MB, slow=False) == "memory"
    assert memory_share(1000 * MB, 4) == 200 * MB


def test_a_slow_worker_is_replaced():
    assert why_recycle(Limits(), 1, 1, 0, 0, slow=True) == "slow"


def play(pace, seconds, episodes, steps=100):
    """Whether one of so many episodes was told to be slow."""
    told = []
    for _ in range(episodes):
        for step in range(steps):
            pace.step(seconds(step) if callable(seconds) else seconds)
        told.append(pace.episode_over())
    return any(told)


def test_steps_twice_as_slow_as_when_fresh_are_noticed():
    pace = WorkerPace()
    assert not play(pace, 0.010, 10)
    assert not play(pace, 0.015, 20)
    assert play(pace, 0.023, 10)


@pytest.mark.parametrize("fresh", [0.0001, 0.0003])
def test_a_few_microseconds_more_are_no_reason(fresh):
    pace = WorkerPace()
    assert not play(pace, fresh, 10)
    assert not play(pace, 3 * fresh, 20)


def test_an_episode_whose_end_is_slower_than_its_beginning_is_no_reason():
    assert not play(WorkerPace(), lambda step: 0.002 if step < 80 else 0.1, 50)


def test_one_slow_episode_among_many_is_no_reason():
    pace = WorkerPace()
    assert not play(pace, 0.01, 5)
    assert not play(pace, 0.05, 1)
    assert not play(pace, 0.01, 5)


def test_a_pace_is_not_judged_by_a_few_steps():
    pace = WorkerPace()
    assert not play(pace, 0.01, 3, steps=10)
    assert not play(pace, 0.05, 3, steps=10), "60 of %d steps" % BLOCK_STEPS


def test_the_pause_grows_with_each_failure_to_a_limit():
    assert [back_off(failures) for failures in (0, 1, 2, 6, 99)] == [0.0, *BACK_OFF[:2], BACK_OFF[-1], BACK_OFF[-1]]


def test_a_spare_is_kept_where_it_takes_a_quarter_of_what_will_be_free():
    assert spares_that_fit({"a": 100, "b": 100}, missing=200, available=1000) == 1
    assert spares_that_fit({"a": 100, "b": 100}, missing=201, available=1000) == 0


# At the end of an episode.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "reason", "times"),
    [({"recycle_resets": 2}, "resets", 3), ({"recycle_steps": 11}, "steps", 2)],  # episodes have 5 steps
)
def test_a_worker_is_replaced_between_two_episodes_and_nothing_is_lost(limits, reason, times):
    with supervised("CountingEnv", **limits) as supervisor:
        holder = Holder(supervisor)
        holder.episodes(7)
        row = supervisor.status()[0]
        assert row["recycled"] == {reason: times}
        assert row["starts"] == times + 1
        assert (row["ledger"]["given"], row["ledger"]["done"]) == (35, 35)
        assert row["trouble"] is None


@pytest.mark.slow
def test_a_worker_that_leaks_is_replaced_between_two_episodes_and_nothing_is_lost():
    limit = 200 * MB
    with supervised("LeakingEnv", kwargs={"leak": 10}, recycle_memory=limit) as supervisor:
        assert supervisor.status()[0]["rss"] < limit / 2, "when fresh"
        holder = Holder(supervisor)
        holder.episodes(5)  # 100 MB each
        row = supervisor.status()[0]
        assert row["recycled"]["memory"] >= 2
        assert row["rss"] < limit + 100 * MB
        assert row["ledger"]["done"] == 50


@pytest.mark.slow
def test_a_worker_that_has_become_slow_is_replaced():
    with supervised("SlowingEnv") as supervisor:
        holder = Holder(supervisor)
        holder.episodes(12)
        assert supervisor.status()[0]["recycled"]["slow"] >= 1
        assert supervisor.status()[0]["ledger"]["done"] == 1200


@pytest.mark.slow
def test_a_replaced_worker_closes_its_environment_and_nobody_waits_for_that(tmp_path, monkeypatch):
    monkeypatch.setattr("farmhand.workers.LEAVE_LIMIT", 30.0)
    log = tmp_path / "closed"
    with supervised(
        "CountingEnv", kwargs={"log": str(log), "close_takes": 3.0}, recycle_resets=1, spares=1
    ) as supervisor:
        holder = Holder(supervisor)
        before = supervisor.status()[0]["pid"]
        holder.episodes(1)
        holder.reset()
        assert not log.exists(), "the next episode began before that"
        poll_until(log.exists, 30, "the closing")
        poll_until(lambda: is_gone(before), 30, "its end")


@pytest.mark.slow
def test_a_replaced_worker_that_does_not_close_is_killed():
    with supervised("CountingEnv", kwargs={"close_takes": 600.0}, recycle_resets=1) as supervisor:
        holder = Holder(supervisor)
        before = supervisor.status()[0]["pid"]
        holder.episodes(1)
        poll_until(lambda: is_gone(before), 30, "its end")


# The cap.


@pytest.mark.parametrize("child", [False, True])
def test_a_worker_over_its_cap_is_ended_at_once(child):
    cap = 150 * MB
    with supervised("LeakingEnv", kwargs={"leak": 30, "child": child, "length": 1000}, memory=cap) as supervisor:
        holder = Holder(supervisor)
        holder.reset()
        before = supervisor.status()[0]["pid"]
        with pytest.raises(Lost) as lost:
            leak_slowly(holder)
        assert lost.value.bucket == "crashed"
        assert "--memory 150 MB" in lost.value.text
        poll_until(lambda: is_gone(before), 30, "its end")
        holder.reset()
        assert supervisor.status()[0]["rss"] < cap


def leak_slowly(holder):
    for _ in range(100):
        holder.step()
        time.sleep(2 * WEIGH_EVERY)
    raise AssertionError("it was never ended")


def test_the_memory_of_a_worker_is_that_of_all_its_processes():
    me = psutil.Process()
    whole = tree.resident(me.pid)
    assert whole >= 0.9 * me.memory_info().rss
    with supervised("LeakingEnv", kwargs={"leak": 50, "child": True}) as supervisor:
        holder = Holder(supervisor)
        holder.reset()
        before = supervisor.status()[0]["rss"]
        holder.step()
        poll_until(lambda: supervisor.status()[0]["rss"] > before + 50 * MB, 30, "the child's memory")
        assert set(tree.family(os.getpid())) >= {supervisor.status()[0]["pid"], os.getpid()}


def test_a_cap_below_what_a_worker_needs_is_refused_at_the_start():
    words = r"takes \d+ MB as soon as it is built, and --memory allows 1 MB|held \d+ MB.*more than --memory 1 MB"
    with pytest.raises(StartError, match=words), supervised("CountingEnv", memory=MB):
        pass


# Spares.


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_worker_that_dies_without_a_construction():
    with supervised("HangingEnv", kwargs={"takes": 0.3}, slots=2, spares=1) as supervisor:
        holder = Holder(supervisor, 2)
        (spare,) = supervisor.spares.of(HANGING)
        holder.reset(0)
        assert spare.ready is not None, "it stands already"
        os.kill(supervisor.status()[0]["pid"], signal.SIGKILL)
        poll_until(lambda: supervisor.status()[0]["pid"] == spare.pid, 30, "the spare")
        assert supervisor.status()[0]["state"] == "idle"
        holder.reset(0)
        assert "spare" in spare.log.name
        wait_until_idle(supervisor)
        (following,) = supervisor.spares.of(HANGING)
        assert following.log != spare.log, "which the worker in slot 0 goes on writing"


def test_a_spare_that_dies_is_replaced():
    with supervised("CountingEnv", spares=1) as supervisor:
        (spare,) = supervisor.spares.of("environments:CountingEnv")
        os.kill(spare.pid, signal.SIGKILL)
        poll_until(lambda: supervisor.spares.of("environments:CountingEnv") != [spare], 30, "its end")
        wait_until_idle(supervisor)
        assert supervisor.status()[0]["starts"] == 1


def test_a_spare_that_was_stopped_is_not_given_to_a_slot():
    with supervised("CountingEnv", spares=1) as supervisor:
        (spare,) = supervisor.spares.of("environments:CountingEnv")
        holder = Holder(supervisor)
        freeze(spare.pid)
        os.kill(supervisor.status()[0]["pid"], signal.SIGKILL)
        poll_until(lambda: supervisor.status()[0]["starts"] == 2, 30, "the next worker")
        holder.reset()
        assert supervisor.status()[0]["pid"] != spare.pid
        poll_until(lambda: tree.state(spare.pid) == "gone", 30, "the end of the stopped one")


@pytest.mark.slow
def test_a_worker_that_dies_while_its_spare_is_built_takes_that_one_over():
    with supervised("HangingEnv", kwargs={"takes": 3.0}, spares=1) as supervisor:
        os.kill(supervisor.status()[0]["pid"], signal.SIGKILL)
        poll_until(
            lambda: supervisor.spares.of(HANGING) and not supervisor.spares.of(HANGING)[0].ready, 30, "the next spare"
        )
        (spare,) = supervisor.spares.of(HANGING)
        os.kill(supervisor.status()[0]["pid"], signal.SIGKILL)
        poll_until(lambda: supervisor.status()[0]["pid"] == spare.pid, 30, "the spare")
        assert supervisor.status()[0]["state"] == "starting"
        wait_until_idle(supervisor)
        assert supervisor.status()[0]["pid"] == spare.pid


def test_a_recycled_slot_gets_the_spare():
    with supervised("CountingEnv", kwargs={"length": 2}, spares=1, recycle_resets=1) as supervisor:
        (spare,) = supervisor.spares.of("environments:CountingEnv")
        holder = Holder(supervisor)
        holder.episodes(1)
        holder.reset()
        assert supervisor.status()[0]["pid"] == spare.pid


def test_each_environment_has_its_spare_and_a_slot_that_changes_takes_it():
    with supervised("CountingEnv", "SlowEnv", slots=2, spares=1) as supervisor:
        (spare,) = supervisor.spares.of("environments:SlowEnv")
        holder = Holder(supervisor, 2, "environments:SlowEnv")
        assert [row["env"] for row in supervisor.status()] == ["environments:SlowEnv"] * 2
        assert supervisor.status()[0]["pid"] == spare.pid
        holder.reset(0)
        holder.reset(1)


@pytest.mark.slow
def test_a_farm_says_what_it_decided_about_spares():
    with running_farm(slots=1, extra=["--spares", "1"]) as farm:
        assert "1 spare worker for each environment (as --spares says)" in farm.said()
        poll_until(lambda: len(workers_of(farm.pid)) == 2, 30, "the spare")
        poll_until(lambda: farm.status()[0]["spares"] == 1, 30, "its environment")
    with supervised("CountingEnv", spares=None) as supervisor:
        assert supervisor.spares.wanted in (0, 1)
        assert re.search(r"CountingEnv takes \d+ MB a worker, .* free", supervisor.spares.about)


# Quarantine.


@pytest.mark.slow
def test_a_slot_whose_worker_cannot_be_built_waits_longer_each_time_and_comes_back(tmp_path):
    trap = tmp_path / "trap"
    with supervised("DyingEnv", kwargs={"at": 0, "trap": str(trap)}, slots=2, spares=1) as supervisor:
        holder = Holder(supervisor, 1)
        trap.touch()
        for pid in [supervisor.status()[0]["pid"], supervisor.spares.of("environments:DyingEnv")[0].pid]:
            os.kill(pid, signal.SIGKILL)
        poll_until(lambda: (supervisor.status()[0]["next_try_s"] or 0) > 3.0, 40, "the third failure")
        row = supervisor.status()[0]
        assert row["state"] == "quarantined"
        assert "exited with code 7" in row["trouble"]
        with pytest.raises(Lost, match="exited with code 7"):
            holder.reset()
        assert supervisor.status()[1]["state"] == "idle"
        trap.unlink()
        wait_until_idle(supervisor)
        holder.reset()


@pytest.mark.slow
@pytest.mark.parametrize("at", ["reset", 1])
def test_a_worker_that_dies_at_each_command_is_quarantined_with_spares_at_hand(at):
    with supervised("DyingEnv", kwargs={"at": at}, slots=2, spares=1) as supervisor:
        holder = Holder(supervisor, 1)
        lost = 0
        while supervisor.status()[0]["state"] != "quarantined":
            with pytest.raises(Lost):
                reset_and_step(holder)
            lost += 1
        assert lost == 3
        assert supervisor.describe()["free"] == 1
        wait_until_idle(supervisor)
        with pytest.raises(Lost):
            reset_and_step(holder)
        assert supervisor.status()[0]["next_try_s"] > 1.0, "longer the next time"


def reset_and_step(holder):
    holder.reset()
    holder.step()


@pytest.mark.slow
def test_a_worker_that_did_its_work_before_it_died_is_replaced_at_once():
    with supervised("DyingEnv", kwargs={"at": 12}) as supervisor:
        holder = Holder(supervisor)
        for _ in range(6):
            with pytest.raises(Lost):
                eleven_and_one(holder)
            assert supervisor.status()[0]["state"] != "quarantined"


def eleven_and_one(holder):
    holder.reset()
    for _ in range(11):
        holder.step()
    holder.step()


# By hand.


def release(farm, slot):
    """farm.py --release, as the farm's owner types it: (exit code, what it said)."""
    command = [sys.executable, str(ROOT / "farm.py"), "--release", str(slot), "--log-dir", str(farm.folder / "logs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_slot_of_a_running_farm_is_released_by_hand():
    with running_farm("environments:SlowEnv", slots=2) as farm:
        before = farm.workers()
        with Farmer("environments:SlowEnv", [(farm.address, 2)]) as farmer:
            farmer.reset([0, 1])
            farmer.recv(min_ready=2)
            farmer.send([[60.0], [0.0]], [0, 1])
            assert not farmer.recv().lost.any()
            code, said = release(farm, 0)
            assert (code, said) == (0, "slot 0: the worker (pid %d) was ended, a new one takes its place\n" % before[0])
            (row,) = farmer.collect(1, 30.0)
            assert "was released by hand" in row.info["lost"]
            farmer.reset([0])
            assert not farmer.recv().lost.any(), "its holder has it still"
        assert farm.workers()[1] == before[1]
        assert release(farm, 2) == (2, "farm.py: this farm has no slot 2; it has 0 to 1\n")
        assert os.stat(farm.folder / "logs" / "control").st_mode & 0o777 == 0o600


def test_a_release_without_a_farm_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "farm.py"), "--release", "0", "--log-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 2
    assert "no farm of this user answers at %s" % tmp_path in done.stderr
    assert "--port" in done.stderr


@pytest.mark.slow
def test_a_slot_in_quarantine_is_tried_at_once_when_it_is_released(tmp_path):
    trap = tmp_path / "trap"
    with supervised("DyingEnv", kwargs={"at": 0, "trap": str(trap)}) as supervisor:
        trap.touch()
        os.kill(supervisor.status()[0]["pid"], signal.SIGKILL)
        poll_until(lambda: (supervisor.status()[0]["next_try_s"] or 0) > 7.0, 60, "the fourth failure")
        trap.unlink()
        assert supervisor.release_by_hand(0) == "slot 0 has no worker; one is tried now"
        poll_until(lambda: supervisor.status()[0]["state"] in ("starting", "idle"), 6, "a try before its time")
        wait_until_idle(supervisor)


def test_releases_by_hand_are_no_failures():
    with supervised("CountingEnv") as supervisor:
        for _ in range(4):
            supervisor.release_by_hand(0)
            assert supervisor.status()[0]["state"] != "quarantined"
            wait_until_idle(supervisor)


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_", [b"", b"junk", b"[]", b"{}", b'{"stop": 1}', b'{"release": [1]}', b'{"release": "0"}']
)
def test_what_is_no_request_is_refused_and_the_next_one_is_answered(tmp_path, request_):
    with supervised("CountingEnv") as supervisor:
        control = Control(tmp_path, {"release": supervisor.release_by_hand})
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(tmp_path / "control"))
                connection.sendall(request_)
                connection.shutdown(socket.SHUT_WR)
                assert "error" in json.loads(connection.recv(4096))
            assert "was ended" in ask(tmp_path, "release", 0)
        finally:
            control.close()
        assert list(tmp_path.iterdir()) == []
