"""Which farm gives how many slots, by speed and by what each has; and which slots begin the next episodes."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farmer import balance

capacities = st.lists(st.integers(0, 64), min_size=1, max_size=8)


@given(capacities, st.integers(0, 600))
def test_as_many_as_wanted_are_dealt_and_no_farm_gives_more_than_it_has(has, wanted):
    taken = balance.share(has, wanted)
    assert sum(taken) == min(wanted, sum(has))
    assert all(0 <= took <= capacity for took, capacity in zip(taken, has, strict=True))


@given(capacities.filter(any), st.integers(1, 600))
def test_every_farm_gets_its_proportion_to_within_a_few_slots(has, wanted):
    taken = balance.share(has, wanted)
    load = min(1.0, wanted / sum(has))
    for took, capacity in zip(taken, has, strict=True):
        # Dealt one by one to the least loaded farm: nobody's load is more than one slot of its own ahead or behind.
        assert abs(took - load * capacity) <= 1 + capacity / min(c for c in has if c)


@given(capacities.filter(any), st.integers(1, 600))
def test_no_farm_could_take_a_slot_of_another_and_still_be_less_loaded(has, wanted):
    taken = balance.share(has, wanted)
    for one, capacity in enumerate(has):
        for other, others in enumerate(has):
            if one != other and taken[one] < capacity and taken[other]:
                assert taken[one] / capacity >= (taken[other] - 1) / others


def test_farms_of_two_and_six_share_four_slots_as_one_and_three():
    assert balance.share([2, 6], 4) == [1, 3]


def test_of_equally_loaded_farms_the_larger_is_taken_first_and_then_the_first():
    assert balance.share([2, 6], 1) == [0, 1]
    assert balance.share([4, 4], 1) == [1, 0]


def test_no_farm_is_named_when_all_are_full():
    assert balance.least_loaded([2, 3], [2, 3]) is None
    assert balance.least_loaded([], []) is None
    assert balance.least_loaded([2, 2], [2, 3]) == 1


# By speed.


def test_the_fastest_farm_gives_its_slots_first_and_a_slow_one_what_is_left():
    assert balance.share([8, 8], 4, [0.02, 0.06]) == [4, 0]
    assert balance.share([8, 8], 4, [0.06, 0.02]) == [0, 4]
    assert balance.share([8, 2, 4], 7, [0.06, 0.02, 0.04]) == [1, 2, 4]


def test_farms_that_are_nearly_as_fast_share_by_what_they_have():
    assert balance.share([4, 4], 4, [0.020, 0.024]) == [2, 2]
    assert balance.share([2, 6], 4, [0.024, 0.020]) == [1, 3]


def test_a_farm_that_nobody_has_seen_step_counts_as_fast():
    assert balance.share([4, 4, 4], 4, [0.02, None, 0.06]) == [2, 2, 0]
    assert balance.share([2, 6], 4, [None, None]) == balance.share([2, 6], 4)


@given(capacities, st.integers(0, 600), st.data())
def test_no_farm_gives_a_slot_while_a_clearly_faster_one_has_some_left(has, wanted, data):
    paces = data.draw(st.lists(st.floats(0.001, 10.0), min_size=len(has), max_size=len(has)))
    taken = balance.share(has, wanted, paces)
    assert sum(taken) == min(wanted, sum(has))
    for one, other in ((one, other) for one in range(len(has)) for other in range(len(has))):
        if paces[one] * balance.ALIKE < paces[other] and taken[other]:
            assert taken[one] == has[one]


def test_a_pace_follows_a_slower_machine_and_hardly_a_straggler():
    pace = balance.RecentMean()
    assert pace.mean is None
    pace.add(0.01)
    assert pace.mean == pytest.approx(0.01)
    for _ in range(200):
        pace.add(0.01)
    pace.add(10.0)
    assert pace.mean == pytest.approx(0.01, rel=0.25)
    for _ in range(200):
        pace.add(0.03)
    assert pace.mean == pytest.approx(0.03, rel=0.01)
    pace.add(0.0)
    assert pace.mean > 0


# Which slots begin.


def test_three_episodes_go_to_the_fast_ones_of_many_slots():
    costs = [3.0] * 4 + [1.0] * 4 + [3.0] * 4
    assert balance.to_begin(costs, [], 3) == [4, 5, 6]


def test_a_slow_slot_begins_nothing_that_the_others_will_have_ended_by_then():
    assert balance.to_begin([1.0, 3.0], [], 2) == [0], "the fast one plays both, and ends first"
    assert balance.to_begin([1.0, 3.0], [], 3) == [0, 1]
    assert balance.to_begin([3.0], [(0.5, 1.0)], 1) == []
    assert balance.to_begin([3.0], [(0.5, 1.0)], 2) == [0]
    assert balance.to_begin([3.0], [(2.5, 1.0)], 1) == [0]


def test_slots_that_are_nearly_as_fast_wait_for_nobody():
    assert balance.to_begin([1.2], [(0.0, 1.0)], 1) == [0]
    assert balance.to_begin([1.0, 1.1, 1.2], [], 3) == [0, 1, 2]
    assert balance.to_begin([1.0, 1.0], [], 0) == []


seconds = st.floats(0.01, 100.0)


@given(st.lists(seconds, max_size=12), st.lists(st.tuples(seconds, seconds), max_size=12), st.integers(1, 40))
def test_who_begins_is_a_fastest_part_of_the_vacant_ones(vacant, busy, episodes):
    chosen = balance.to_begin(vacant, busy, episodes)
    assert len(chosen) == len(set(chosen)) <= episodes
    assert [vacant[number] for number in chosen] == sorted(vacant)[: len(chosen)]
    assert chosen or not vacant or busy, "nobody waits for nobody"
    assert len(balance.to_begin(vacant, busy, 10**9)) == len(vacant), "with enough to play all do"


def played(costs, episodes, choose):
    """When the last of so many episodes ends, if `choose(vacant, busy, left)` says who begins."""
    now, ends, vacant = 0.0, [], list(range(len(costs)))
    while True:
        begin = choose([costs[slot] for slot in vacant], [(end - now, costs[slot]) for end, slot in ends], episodes)
        for slot in [vacant[number] for number in begin]:
            heapq.heappush(ends, (now + costs[slot], slot))
            vacant.remove(slot)
            episodes -= 1
        if not ends:
            assert not episodes
            return now
        now, slot = heapq.heappop(ends)
        vacant.append(slot)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=8), st.integers(1, 30))
def test_the_last_episode_ends_no_later_than_if_every_vacant_slot_began_one(costs, episodes):
    greedy = played(costs, episodes, lambda vacant, busy, left: list(range(len(vacant)))[:left])
    fastest = played(costs, episodes, balance.to_begin)
    assert fastest <= greedy * (1 + 1e-9)


def test_many_episodes_on_one_fast_and_one_slow_slot_are_shared_by_speed_and_end_together():
    begun = {1.0: 0, 3.0: 0}

    def choose(vacant, busy, left):
        chosen = balance.to_begin(vacant, busy, left)
        for number in chosen:
            begun[vacant[number]] += 1
        return chosen

    assert played([3.0, 1.0], 40, choose) == pytest.approx(30.0, abs=1.0)
    assert begun == {1.0: 30, 3.0: 10}
