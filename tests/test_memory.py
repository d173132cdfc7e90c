"""Replay: what is drawn is what happened, whatever the streams and wherever the ring wraps."""

from __future__ import annotations

import numpy as np
import pytest
from rl.memory import SequentialMemory

from agents.memory import TRUNCATED, ReplayMemory, SequentialStore, store_of

LENGTHS = pytest.mark.parametrize("window_length", [1, 3])


class NaiveMemory:
    """All transitions ever, as a list; a state is looked up by walking back through its episode."""

    def __init__(self, limit, window_length):
        self.limit, self.window_length = limit, window_length
        self.all = []
        self.running = {}  # stream -> numbers of its running episode

    def add(self, stream, *transition):
        self.all.append([*transition, list(self.running.get(stream, []))])
        self.running.setdefault(stream, []).append(len(self.all) - 1)
        if transition[4] or transition[5]:
            del self.running[stream]

    def cut(self, stream):
        for number in self.running.pop(stream, [])[-1:]:
            self.all[number][5] = True

    def kept(self):
        return range(max(0, len(self.all) - self.limit), len(self.all))

    def transition(self, number):
        obs, action, reward, next_obs, terminated, truncated, before = self.all[number]
        before = [self.all[n][0] for n in before if n in self.kept()]
        state = ([np.zeros_like(obs)] * self.window_length + before + [obs])[-self.window_length :]
        return np.array(state), action, reward, np.array([*state[1:], next_obs]), terminated, truncated


def play(rng, memories, steps, streams=4):
    """Random interleaved episodes; every observation differs from all others."""
    now = {}
    for number in range(steps):
        stream = int(rng.integers(streams))
        obs = now.pop(stream, None)
        if obs is None:
            obs = np.array([number, stream, -1], np.float32)
        next_obs = np.array([number, stream, 1], np.float32)
        terminated, truncated, lost = rng.random(3) < [0.1, 0.1, 0.05]
        transition = (obs, rng.random(2).astype(np.float32), float(number), next_obs, bool(terminated), bool(truncated))
        for memory in memories:
            memory.add(stream, *transition)
            if lost:
                memory.cut(stream)
        if not (terminated or truncated or lost):
            now[stream] = next_obs


def assert_same(memory, naive, numbers):
    found = memory.gather(np.array(numbers))
    columns = (found.state, found.action, found.reward, found.next_state, found.terminated, found.truncated)
    for row, number in enumerate(numbers):
        for mine, wanted in zip(columns, naive.transition(number), strict=True):
            np.testing.assert_array_equal(mine[row], wanted)


@LENGTHS
@pytest.mark.parametrize("limit", [7, 64, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_every_transition_kept_is_the_one_that_a_list_of_all_would_give(window_length, limit, seed):
    memory, naive = ReplayMemory(limit, window_length), NaiveMemory(limit, window_length)
    rng = np.random.default_rng(seed)
    for _ in range(6):
        play(rng, [memory, naive], 40)
        assert len(memory) == memory.nb_entries == min(limit, len(naive.all))
        assert_same(memory, naive, list(naive.kept()))
        for one in (memory, naive):  # streams are cut between fits
            for stream in range(4):
                one.cut(stream)


def test_draw_gives_only_transitions_that_are_kept_and_all_of_them_in_time():
    memory = ReplayMemory(10, seed=1)
    for number in range(25):
        memory.add(0, np.float32([number]), np.zeros(1), number, np.float32([number + 1]), False, False)
    found = memory.draw(500)
    assert set(found.reward) == set(range(15, 25))
    np.testing.assert_array_equal(found.next_state, found.state + 1)


def test_streams_do_not_look_into_each_others_past():
    memory = ReplayMemory(10, window_length=3)
    for step in range(3):
        for stream in (1, 2):
            memory.add(stream, np.float32([10 * stream + step]), np.zeros(1), 0.0, np.float32([0]), False, False)
    np.testing.assert_array_equal(memory.gather([4, 5]).state[..., 0], [[10, 11, 12], [20, 21, 22]])


def test_a_cut_marks_the_last_transition_truncated_and_leaves_the_other_streams():
    memory = ReplayMemory(10, window_length=2)
    for stream in (1, 2):
        memory.add(stream, np.ones(1), np.zeros(1), 0.0, np.ones(1), False, False)
    memory.cut(1)
    memory.cut(3)
    for stream in (1, 2):
        memory.add(stream, np.full(1, 2.0), np.zeros(1), 0.0, np.ones(1), False, False)
    found = memory.gather(range(4))
    assert found.truncated.tolist() == [True, False, False, False]
    assert found.terminated.tolist() == [False] * 4
    assert found.state[2:, :, 0].tolist() == [[0, 2], [1, 2]]


def test_a_cut_of_a_transition_that_the_ring_has_overwritten_marks_no_other():
    memory = ReplayMemory(3)
    memory.add("old", np.ones(1), np.zeros(1), 0.0, np.ones(1), False, False)
    for _ in range(3):
        memory.add("new", np.ones(1), np.zeros(1), 0.0, np.ones(1), False, False)
    memory.cut("old")
    assert not memory.gather([1, 2, 3]).truncated.any()
    memory.cut_all()
    assert memory.gather([1, 2, 3]).truncated.tolist() == [False, False, True]


def test_dtypes_are_kept_but_doubles_are_stored_as_singles():
    for given, kept in ((np.uint8, np.uint8), (np.int64, np.int64), (np.float64, np.float32)):
        memory = ReplayMemory(4)
        memory.add(0, np.array([200], given), np.zeros(1, np.float32), 0.0, np.array([3], given), False, False)
        found = memory.draw(2)
        assert (found.state.dtype, found.next_state.dtype, found.state[0, 0, 0]) == (kept, kept, 200)


def test_bad_arguments_and_an_empty_memory_are_refused():
    for limit, window_length in ((0, 1), (5, 0), (-1, 1)):
        with pytest.raises(ValueError, match=r"at least 1, not %d and %d" % (limit, window_length)):
            ReplayMemory(limit, window_length)
    with pytest.raises(ValueError, match=r"empty"):
        ReplayMemory(5).draw(1)
    with pytest.raises(ValueError, match=r"processor"):
        ReplayMemory(5).add(0, {"a": 1}, np.zeros(1), 0.0, {"a": 2}, False, False)


def keras_rl_episodes(memory, lengths, terminal=True):
    """Appends episodes the way keras-rl's loop does: after each, its last observation once more."""
    number = 0
    for length in lengths:
        for step in range(length):
            memory.append(np.float32([number]), np.float32([-number]), number / 2, step == length - 1 and terminal)
            number += 1
        memory.append(np.float32([number]), np.float32([0]), 0.0, False)
        number += 1


@LENGTHS
def test_append_and_sample_give_what_keras_rls_own_memory_gives(window_length):
    mine, theirs = ReplayMemory(100, window_length), SequentialMemory(100, window_length=window_length)
    for memory in (mine, theirs):
        keras_rl_episodes(memory, [6, 4, 8])
    # Theirs counts entries, mine transitions: the three that close an episode are none.
    entries = [5, 8, 9, 12, 13, 14, 15]
    transitions = [5, 7, 8, 10, 11, 12, 13]
    for one, other in zip(mine.sample(7, transitions), theirs.sample(7, entries), strict=True):
        np.testing.assert_array_equal(one.state0, other.state0)
        np.testing.assert_array_equal(one.state1, other.state1)
        assert (one.action, one.reward, one.terminal1) == (other.action, other.reward, bool(other.terminal1))
    assert len(mine) == 18
    assert len(mine.sample(5)) == 5


def test_append_knows_a_time_limit_and_the_observation_after_it():
    memory = ReplayMemory(10)
    memory.append(np.float32([1]), np.float32([0]), 1.0, TRUNCATED)
    memory.append(np.float32([2]), np.float32([0]), 0.0, False)
    memory.append(np.float32([10]), np.float32([0]), 2.0, True)
    memory.append(np.float32([11]), np.float32([0]), 0.0, False)
    found = memory.gather(range(len(memory)))
    assert found.reward.tolist() == [1.0, 2.0]
    assert (found.state.ravel().tolist(), found.next_state.ravel().tolist()) == ([1, 10], [2, 11])
    assert (found.terminated.tolist(), found.truncated.tolist()) == ([False, True], [True, False])


def test_append_without_training_stores_nothing_and_is_looked_back_at():
    memory = ReplayMemory(10, window_length=3)
    for number in range(4):
        memory.append(np.float32([number]), np.zeros(1), 0.0, False, training=False)
    assert len(memory) == 0
    np.testing.assert_array_equal(memory.get_recent_state(np.float32([9])), [[2], [3], [9]])


@pytest.mark.parametrize("window_length", [1, 2, 3, 4])
def test_recent_states_are_those_of_keras_rls_own_memory(window_length):
    memories = [ReplayMemory(100, window_length), SequentialMemory(100, window_length=window_length)]
    rng = np.random.default_rng(3)
    for number in range(60):
        obs = np.float32([number])
        states = [np.array(memory.get_recent_state(obs)) for memory in memories]
        np.testing.assert_array_equal(*states)
        over = bool(rng.random() < 0.3)
        for memory in memories:
            memory.append(obs, np.zeros(1), 0.0, over)
            if over:
                memory.append(obs + 0.5, np.zeros(1), 0.0, False)


def test_keras_rls_config_is_kept():
    assert ReplayMemory(9, window_length=2).get_config() == {
        "window_length": 2,
        "ignore_episode_boundaries": False,
        "limit": 9,
    }


def sampled(store):
    """What 300 draws of a SequentialStore give, by reward."""
    rows = {}
    for _ in range(300):
        found = store.draw(1)
        rows[float(found.reward[0])] = tuple(
            np.ravel(x).tolist() for x in (found.state, found.next_state, found.terminated, found.truncated)
        )
    return rows


def test_keras_rls_memory_bootstraps_at_a_time_limit_and_not_at_termination():
    memory = SequentialMemory(100, window_length=1)
    store = SequentialStore(memory)
    number = 0
    for terminated, truncated in ((False, False), (True, False), (False, True), (False, False)):
        for step in range(3):
            last = step == 2
            obs, after = np.float32([number]), np.float32([number + 1])
            store.add(0, obs, np.zeros(1), number, after, terminated and last, truncated and last)
            number += 1
        if not (terminated or truncated):
            store.cut(0)
        number += 10
    rows = sampled(store)
    # keras-rl never samples entries 0 and 1. 15 ends a terminated episode, 28 a truncated one; 2 and 41 were cut.
    for reward, (state, next_state, terminated, truncated) in rows.items():
        assert (state, next_state) == ([reward], [reward + 1]), "a next state of another episode"
        assert terminated == [reward == 15]
        assert truncated == [reward in (2, 28, 41)]
    assert {2.0, 13.0, 15.0, 26.0, 28.0, 41.0} <= set(rows)


def test_a_cut_without_a_running_episode_changes_nothing_in_keras_rls_memory():
    memory = SequentialMemory(100, window_length=1)
    store = SequentialStore(memory)
    store.cut(0)
    store.add(0, np.zeros(1), np.zeros(1), 0.0, np.zeros(1), True, False)
    before = list(memory.terminals)
    store.cut(0)
    store.cut_all()
    assert list(memory.terminals) == before


def test_keras_rls_memory_for_several_environments_is_refused_with_what_to_do():
    memory = SequentialMemory(500, window_length=2)
    with pytest.raises(
        ValueError, match=r"4 environments would be mixed up\n.*ReplayMemory\(limit=500, window_length=2"
    ):
        store_of(memory, 4)
    assert isinstance(store_of(memory, 1), SequentialStore)
    with pytest.raises(TypeError, match=r"not \[\]"):
        store_of([], 1)


def test_a_second_environment_that_joins_keras_rls_memory_is_refused():
    store = SequentialStore(SequentialMemory(100, window_length=1))
    store.add(0, np.zeros(1), np.zeros(1), 0.0, np.zeros(1), False, False)
    with pytest.raises(ValueError, match=r"ReplayMemory"):
        store.add(1, np.zeros(1), np.zeros(1), 0.0, np.zeros(1), False, False)


@LENGTHS
@pytest.mark.parametrize("steps", [0, 30, 150])
def test_a_saved_memory_loaded_elsewhere_draws_and_goes_on_as_the_first(window_length, steps):
    first, naive = ReplayMemory(64, window_length, seed=4), NaiveMemory(64, window_length)
    play(np.random.default_rng(5), [first, naive], steps)
    second = ReplayMemory(64, window_length, seed=4)
    second.load_state_dict({name: value.copy() for name, value in first.state_dict().items()})
    first.cut_all()  # what is loaded has no running episodes
    for stream in range(4):
        naive.cut(stream)
    play(np.random.default_rng(6), [first, second, naive], 50)
    np.testing.assert_array_equal(first.draw(100).state, second.draw(100).state)
    assert len(second) == len(first)
    assert_same(first, naive, list(naive.kept()))


def test_a_saved_memory_of_another_limit_is_refused_and_nothing_changes():
    memory, other = ReplayMemory(8), ReplayMemory(9)
    for one in (memory, other):
        one.add(0, np.ones(1), np.zeros(1), float(one.limit), np.ones(1), False, False)
    with pytest.raises(ValueError, match=r"holds 9 transitions, this agent's 8"):
        memory.load_state_dict(other.state_dict())
    assert memory.gather([0]).reward == 8.0
