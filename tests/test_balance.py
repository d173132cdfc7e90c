"""Which farm next: slots are dealt in proportion to what each farm has."""

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
