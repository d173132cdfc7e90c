"""farmlist.py edited while environments run: followed within seconds, and no running episode is cut."""

import contextlib
import logging
import os
import time

import numpy as np
import pytest
from farms import closed_port, running_farm
from helpers import poll_until

from farmer import Farmer
from wire.errors import FarmlistError

COUNTING = "environments:CountingEnv"
LIMIT = 5.0 + 10.0  # seconds that an edit may take, and patience with a busy machine


@pytest.fixture(scope="module")
def one():
    with running_farm(COUNTING, slots=4, kwargs={"length": 4}) as farm:
        yield farm


@pytest.fixture(scope="module")
def two():
    with running_farm(COUNTING, slots=3, kwargs={"length": 4}) as farm:
        yield farm


@pytest.fixture
def listed(tmp_path):
    """Writes the farmlist as pairs of farm and slots; gives its path."""

    def write(*pairs):
        lines = ", ".join(f"({farm.address!r}, {slots})" for farm, slots in pairs)
        (tmp_path / "farmlist.py").write_text(f"farmlist_base = [{lines}]\n")
        return tmp_path / "farmlist.py"

    return write


def free(farm):
    return farm.describe()["free"]


def begin(farmer, slots):
    farmer.reset(slots)
    assert farmer.recv(min_ready=len(slots)).first.all()


def step(farmer, slots):
    """One step of each; rows by slot."""
    farmer.send(np.zeros((len(slots), 1), "float32"), slots)
    rows = {row.slot: row for row in farmer.collect(min_ready=len(slots))}
    assert sorted(rows) == sorted(slots)
    return rows


def finish(farmer, slots, first=1):
    """The rest of episodes of 4 steps: every step is there, in order, and none is lost."""
    for number in range(first, 5):
        rows = step(farmer, slots)
        for row in rows.values():
            assert not row.lost, row.info
            assert row.obs[1] == number
            assert row.truncated == (number == 4)


def row_of(farmer, farm):
    return next((row for row in farmer.status()["farms"] if row["farm"] == farm.address), None)


def test_a_farm_that_is_added_joins_and_one_that_is_removed_finishes_its_episodes_and_leaves(one, two, listed):
    with Farmer(COUNTING, listed((one, 2))) as farmer:
        begin(farmer, [0, 1])
        listed((one, 2), (two, 3))
        poll_until(lambda: farmer.nb_slots == 5, LIMIT, "the new farm")
        assert farmer.vacant() == [2, 3, 4], "running episodes go on"
        begin(farmer, [2, 3])
        listed((two, 3))
        poll_until(lambda: row_of(farmer, one)["leaving"], LIMIT, "the host to see that it is removed")
        assert free(one) == 2, "nothing is cut"
        finish(farmer, [0, 1, 2, 3])
        assert not {0, 1} & set(farmer.vacant()), "no new episode begins there"
        poll_until(lambda: row_of(farmer, one) is None, LIMIT, "the removed farm's end")
        assert free(one) == 4
        assert farmer.nb_slots == 3
        ledger = farmer.status()["ledger"]
        assert (ledger["sent"], ledger["done"]) == (16, 16), "the steps of a farm that has left still count"


@pytest.mark.slow
def test_a_removed_farm_without_an_episode_leaves_at_once_and_comes_back_under_its_old_slots(one, two, listed):
    with Farmer(COUNTING, listed((one, 2), (two, 1))) as farmer:
        begin(farmer, [0])
        finish(farmer, [0])
        listed((two, 1))
        poll_until(lambda: farmer.nb_slots == 1, LIMIT, "the removed farm's end")
        poll_until(lambda: free(one) == 4, LIMIT, "its slots")
        listed((one, 2), (two, 1))
        poll_until(lambda: farmer.nb_slots == 3, LIMIT, "the farm that is back in the list")
        assert farmer.vacant() == [0, 1, 2]
        assert row_of(farmer, one)["ledger"]["done"] == 4


def test_a_farm_that_is_in_the_list_again_before_its_episode_is_over_stays(one, two, listed):
    with Farmer(COUNTING, listed((one, 1), (two, 1))) as farmer:
        begin(farmer, [0])
        listed((two, 1))
        farmer.refarm()
        assert row_of(farmer, one)["leaving"]
        listed((one, 1), (two, 1))
        farmer.refarm()
        finish(farmer, [0])
        assert 0 in farmer.vacant()
        assert not row_of(farmer, one)["leaving"]


@pytest.mark.slow
def test_fewer_slots_leave_as_their_episodes_end_and_more_are_added_beside_running_ones(one, listed):
    with Farmer(COUNTING, listed((one, 3))) as farmer:
        begin(farmer, [0, 1, 2])
        step(farmer, [1])
        listed((one, 1))
        poll_until(lambda: row_of(farmer, one)["wanted"] == 1, LIMIT, "the smaller share")
        assert farmer.nb_slots == 3, "nothing is cut"
        finish(farmer, [1], first=2)
        poll_until(lambda: free(one) == 2, LIMIT, "the slot whose episode was over first")
        assert farmer.nb_slots == 2
        step(farmer, [0, 2])
        listed((one, 4))
        poll_until(lambda: farmer.nb_slots == 4, LIMIT, "the larger share")
        assert free(one) == 0
        assert farmer.vacant() == [1, 3], "the place that had left is taken again"
        begin(farmer, [1, 3])
        finish(farmer, [0, 2], first=2)
        finish(farmer, [1, 3])
        assert sorted(farmer.vacant()) == [0, 1, 2, 3]


def test_an_abandoned_episode_ends_what_is_too_much(one, listed):
    with Farmer(COUNTING, listed((one, 2))) as farmer:
        begin(farmer, [0, 1])
        listed((one, 1))
        farmer.refarm()
        assert farmer.nb_slots == 2
        farmer.abandon()
        assert farmer.nb_slots == 1
        poll_until(lambda: free(one) == 3, LIMIT, "the slot at the farm")


@pytest.mark.slow
def test_more_slots_than_the_farm_offers_take_what_there_is_and_say_so(one, listed):
    with Farmer(COUNTING, listed((one, 2))) as farmer:
        listed((one, 9))
        poll_until(lambda: farmer.nb_slots == 4, LIMIT, "what there is")
        poll_until(lambda: row_of(farmer, one)["trouble"], LIMIT, "the trouble")
        assert f"wants 9 slots of {one.address}, which offers 4" in row_of(farmer, one)["trouble"]
        listed((one, 4))
        poll_until(lambda: row_of(farmer, one)["wanted"] == 4, LIMIT, "the list")
        assert row_of(farmer, one)["trouble"] is None, "nothing is missing any more"


@pytest.mark.slow
def test_what_an_edit_cannot_have_is_logged_once(one, listed, caplog):
    nobody = "127.0.0.1:%d" % closed_port()
    path = listed((one, 2))
    with Farmer(COUNTING, path) as farmer, caplog.at_level(logging.WARNING, "farmer"):
        path.write_text(f"farmlist_base = [({one.address!r}, 9), ({nobody!r}, 1)]\n")
        farmer.refarm()
        poll_until(lambda: len(caplog.records) >= 2, LIMIT, "two lines in the log")
        time.sleep(1.5)  # tries more
        few, away = sorted((record.getMessage() for record in caplog.records), key=lambda text: "no farm" in text)
        assert "wants 9 slots" in few
        assert "which offers 4" in few
        assert f"no farm answered at {nobody}" in away
        assert "retried" in away


@pytest.mark.slow
def test_a_broken_edit_keeps_the_last_good_list_and_is_told_once_with_its_line(one, two, listed, caplog):
    path = listed((one, 2))
    with Farmer(COUNTING, path) as farmer, caplog.at_level(logging.ERROR, "farmer"):
        begin(farmer, [0, 1])
        path.write_text(f"farmlist_base = [\n    ({one.address!r}, 2),\n    ({two.address!r}, 'three'),\n]\n")
        poll_until(lambda: farmer.status()["farmlist"], LIMIT, "the trouble in the status")
        assert f"{path}, line 3: the number of slots" in farmer.status()["farmlist"]
        time.sleep(1.5)  # three looks more
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 1, "once an edit, not once a look"
        assert f"{path}, line 3" in told[0]
        with pytest.raises(FarmlistError, match="line 3"):
            farmer.refarm()
        finish(farmer, [0, 1])
        path.unlink()
        poll_until(lambda: "no farmlist at" in farmer.status()["farmlist"], LIMIT, "a list that is gone")
        assert farmer.nb_slots == 2
        listed((one, 2), (two, 1))
        poll_until(lambda: farmer.nb_slots == 3, LIMIT, "the repaired list")
        assert farmer.status()["farmlist"] is None


@pytest.mark.slow
def test_a_farm_that_is_removed_and_dead_just_goes(one, listed):
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(running_farm(COUNTING, slots=1, kwargs={"length": 4}))
        farmer = stack.enter_context(Farmer(COUNTING, listed((one, 1), (other, 1))))
        begin(farmer, [0, 1])
        other.kill()
        listed((one, 1))
        poll_until(lambda: row_of(farmer, other) is None, LIMIT + 1, "the dead farm's end")
        rows = farmer.collect(timeout=1)
        assert [(row.slot, row.lost) for row in rows] == [(1, True)]
        finish(farmer, [0])


@pytest.mark.slow
def test_the_number_of_slots_asked_for_holds_after_an_edit(one, two, listed):
    with Farmer(COUNTING, listed((one, 4)), slots=3) as farmer:
        begin(farmer, [0, 1, 2])
        listed((one, 4), (two, 2))
        poll_until(lambda: row_of(farmer, two) is not None, LIMIT, "the new farm")
        poll_until(lambda: row_of(farmer, two)["slots"] == 1, LIMIT, "its share of three")
        finish(farmer, [0, 1, 2])
        poll_until(lambda: farmer.nb_slots == 3, LIMIT, "the slot that is too much")


@pytest.mark.slow
def test_an_edit_to_the_same_words_leases_nothing_anew(one, listed):
    path = listed((one, 2))
    with Farmer(COUNTING, path) as farmer:
        begin(farmer, [0, 1])
        os.utime(path)
        path.write_text("# the same farms\n" + path.read_text())
        time.sleep(1.5)
        finish(farmer, [0, 1])
