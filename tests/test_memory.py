"""Replay: what is drawn is what happened, whatever the streams and wherever the ring wraps."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rl.memory import SequentialMemory

from agents.keras_rl.sequential import SequentialStore
from agents.memory import ReplayMemory
from agents.nest import flatten
from agents.store import store_of
from agents.transitions import TRUNCATED

LENGTHS = pytest.mark.parametrize("window_length", [1, 3])
PLAIN, NESTED = "plain", "nested"


class NaiveMemory:
    """Every episode as a list of rows, forever; which are kept is told by numbers alone.

    A row is one observation: number, leaves, the step taken from it (or None) and the row that came of it.
    """

    def __init__(self, limit, window_length):
        self.limit, self.window_length = limit, window_length
        self.rows = []
        self.running = {}  # stream -> [steps of its episode, row of the newest observation]

    def row(self, obs):
        self.rows.append({"number": len(self.rows), "leaves": flatten(obs), "step": None, "next": None, "past": []})
        return self.rows[-1]

    def add(self, stream, obs, action, reward, next_obs, terminated, truncated):
        past, head = self.running.get(stream, ([], None))
        if head is not None and head["number"] <= len(self.rows) - self.limit:
            past, head = [], None
        if head is None or not all(map(np.array_equal, head["leaves"], flatten(obs))):
            head = self.row(obs)
        head.update(past=list(past), step=[action, reward, terminated, truncated])
        head["next"] = self.row(next_obs)
        head["next"]["past"] = [*past, head]
        self.running[stream] = ([*past, head], head["next"])
        if terminated or truncated:
            del self.running[stream]

    def cut(self, stream):
        past, _ = self.running.pop(stream, ([], None))
        for row in past[-1:]:
            row["step"][3] = True

    def is_kept(self, row):
        return row["number"] >= len(self.rows) - self.limit

    def kept(self):
        return [row for row in self.rows if row["step"] is not None and self.is_kept(row)]

    def state(self, row):
        """The window of every leaf."""
        frames = [r["leaves"] for r in [*row["past"], row] if self.is_kept(r)][-self.window_length :]
        nothing = [np.zeros_like(leaf) for leaf in row["leaves"]]
        frames = [nothing] * (self.window_length - len(frames)) + frames
        return [np.array(leaf) for leaf in zip(*frames, strict=True)]

    def transition(self, row, n_step, gamma):
        action = row["step"][0]
        total, steps = row["step"][1], 1
        while steps < n_step and row["next"]["step"] is not None:
            row = row["next"]
            total += gamma**steps * row["step"][1]
            steps += 1
        _, _, terminated, truncated = row["step"]
        return action, total, terminated, truncated, 0.0 if terminated else gamma**steps, steps, row["next"]


def observation(kind, *values):
    """One that differs from all others, plain or of three leaves."""
    if kind == PLAIN:
        return np.array(values, np.float32)
    return {"b": np.array(values, np.float32), "a": (np.array(values[0] % 251, np.uint8), np.array([values[1:]] * 2))}


def play(rng, memories, steps, streams=4, kind=PLAIN, interval=1):
    """Random interleaved episodes, some streams slow; every `interval`-th step is stored."""
    pace = 0.2 ** np.arange(streams)
    now = {}
    for number in range(steps):
        stream = int(rng.choice(streams, p=pace / pace.sum()))
        obs = now.pop(stream, None)
        if obs is None:
            obs = observation(kind, number, stream, -1)
        next_obs = observation(kind, number, stream, 1)
        terminated, truncated, lost = (bool(x) for x in rng.random(3) < [0.1, 0.1, 0.05])
        transition = (obs, rng.random(2).astype(np.float32), float(rng.integers(9)), next_obs, terminated, truncated)
        stored = terminated or truncated or rng.random() < 1 / interval
        for memory in memories:
            if stored:
                memory.add(stream, *transition)
            if lost:
                memory.cut(stream)
        if not (terminated or truncated or lost):
            now[stream] = next_obs


def assert_same(memory, naive, n_step=1, gamma=1.0):
    """Every transition that the ring holds is the one that the naive memory gives."""
    rows = naive.kept()
    numbers = memory.transitions()
    assert numbers.tolist() == [row["number"] for row in rows]
    assert len(memory) == memory.nb_entries == len(rows)
    assert memory.count == len(naive.rows)
    if not rows:
        return
    found = memory.gather(numbers, n_step, gamma)
    for at, row in enumerate(rows):
        action, reward, terminated, truncated, discount, steps, last = naive.transition(row, n_step, gamma)
        for state, wanted in ((found.state, naive.state(row)), (found.next_state, naive.state(last))):
            assert len(state) == len(wanted)
            for mine, theirs in zip(state, wanted, strict=True):
                assert mine.dtype == theirs.dtype
                np.testing.assert_array_equal(mine[at], theirs)
        np.testing.assert_array_equal(found.action[at], action)
        got = [found.terminated[at], found.truncated[at], found.steps[at]]
        assert got == [terminated, truncated, steps]
        np.testing.assert_allclose([found.reward[at], found.discount[at]], [reward, discount], rtol=1e-6)


def bits(memory):
    """Everything that a memory holds, for comparing two bit by bit."""
    numbers = np.arange(memory.oldest, memory.count)
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in memory.columns(numbers).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "interval"), [(PLAIN, 1), (PLAIN, 3), (NESTED, 1.5)])
@pytest.mark.parametrize("window_length", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [2, 3, 7, 64, 1000])
def test_every_transition_kept_is_the_one_that_a_list_of_episodes_gives(limit, window_length, interval, kind):
    for seed in range(2):
        memory, naive = ReplayMemory(limit, window_length), NaiveMemory(limit, window_length)
        rng = np.random.default_rng(seed)
        for n_step in range(1, 6):
            play(rng, [memory, naive], 40, kind=kind, interval=interval)
            assert_same(memory, naive, n_step, gamma=0.9)
            for one in (memory, naive):  # streams are cut between fits
                for stream in range(4):
                    one.cut(stream)
            assert_same(memory, naive, 6 - n_step, gamma=0.9)


STEP = st.tuples(st.integers(0, 3), st.sampled_from(["step", "step", "step", "skip", "terminated", "truncated", "cut"]))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(1, 5), st.lists(STEP, max_size=40))
def test_no_interleaving_of_streams_shows_in_a_memory_smaller_than_their_episodes(limit, window, n_step, events):
    memory, naive = ReplayMemory(limit, window), NaiveMemory(limit, window)
    now = {}
    for number, (stream, what) in enumerate(events):
        obs, next_obs = now.pop(stream, np.float32([number + 0.5])), np.float32([number])
        for one in (memory, naive):
            if what == "cut":
                one.cut(stream)
            elif what != "skip":
                one.add(stream, obs, np.zeros(1), 2.0**number, next_obs, what == "terminated", what == "truncated")
        if what in ("step", "skip"):
            now[stream] = next_obs
        assert_same(memory, naive, n_step, gamma=0.5)


def add_line(memory, numbers, stream=0, end=(False, False)):
    """Transitions n -> n + 1 with reward n; the last of them ends as given."""
    for number in numbers:
        over = number == numbers[-1]
        memory.add(
            stream,
            np.float32([number]),
            np.zeros(1),
            number,
            np.float32([number + 1]),
            over and end[0],
            over and end[1],
        )


def test_draw_gives_only_transitions_that_are_kept_and_all_of_them_in_time():
    memory = ReplayMemory(11, seed=1)
    add_line(memory, range(25))
    assert len(memory) == 10
    found = memory.draw(500)
    assert set(found.reward) == set(range(15, 25))
    np.testing.assert_array_equal(found.next_state[0], found.state[0] + 1)


@pytest.mark.parametrize("streams", [1, 7, 38])
def test_every_transition_is_drawn_equally_often(streams):
    memory = ReplayMemory(41, seed=2)
    for step in range(60):
        for stream in range(min(step + 1, streams)):
            number = 100 * step + stream
            over = (step + stream) % 4 == 0 and streams < 38
            memory.add(stream, np.float32([number]), np.zeros(1), number, np.float32([number + 100]), over, False)
    wanted = memory.gather(memory.transitions()).reward
    values, counts = np.unique(memory.draw(1000 * len(wanted)).reward, return_counts=True)
    assert sorted(values) == sorted(wanted)
    assert (streams == 38) == (4 * len(wanted) < 41), "with 38 streams nearly all entries are heads"
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_draws_are_told_by_the_seed():
    one, other, third = (ReplayMemory(50, seed=seed) for seed in (1, 1, 2))
    for memory in (one, other, third):
        add_line(memory, range(30), end=(True, False))
    drawn = [memory.draw(64).reward.tolist() for memory in (one, other, third)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("end", "discounts"),
    [
        ((False, False), [0.125, 0.125, 0.25, 0.5]),  # the newest of a running episode
        ((True, False), [0.125, 0.0, 0.0, 0.0]),
        ((False, True), [0.125, 0.125, 0.25, 0.5]),
    ],
)
def test_three_steps_by_hand(end, discounts):
    memory = ReplayMemory(100)
    add_line(memory, [1, 2, 3, 4], end=end)
    add_line(memory, [50, 51, 52])  # what comes next in the ring is another episode
    found = memory.gather([0, 1, 2, 3], n_step=3, gamma=0.5)
    assert found.reward.tolist() == [1 + 2 / 2 + 3 / 4, 2 + 3 / 2 + 4 / 4, 3 + 4 / 2, 4]
    assert found.steps.tolist() == [3, 3, 2, 1]
    assert found.discount.tolist() == discounts
    assert found.next_state[0].ravel().tolist() == [4, 5, 5, 5]
    assert found.state[0].ravel().tolist() == [1, 2, 3, 4]
    assert found.terminated.tolist() == [False, end[0], end[0], end[0]]
    assert found.truncated.tolist() == [False, end[1], end[1], end[1]]
    assert (found.reward.dtype, found.discount.dtype, found.steps.dtype) == (np.float32, np.float32, np.int32)


def test_returns_go_no_further_than_a_step_that_was_not_stored():
    memory = ReplayMemory(100, window_length=3)
    add_line(memory, [1, 2])
    add_line(memory, [5, 6])
    found = memory.gather(memory.transitions(), n_step=4)
    assert found.steps.tolist() == [2, 1, 2, 1]
    assert found.next_state[0][:, -1, 0].tolist() == [3, 3, 7, 7]
    assert found.state[0][2, :, 0].tolist() == [1, 2, 5], "a window looks past the gap"


def test_each_observation_is_stored_once():
    memory, obs = ReplayMemory(1000), np.zeros(339, np.float32)
    add_line(memory, range(600))
    assert memory.count == 601
    memory = ReplayMemory(1000)
    memory.add(0, obs, np.zeros(22, np.float32), 0.0, obs + 1, False, False)
    total = 1000 * sum(column.nbytes for column in memory.columns([0]).values())
    assert total <= 1.1 * 1000 * (339 + 22) * 4


def test_memory_is_used_only_as_it_fills():
    before = psutil.Process().memory_info().rss
    memory, obs = ReplayMemory(300_000), np.ones(339, np.float32)  # 400 MB when full
    for number in range(100):
        memory.add(0, obs, obs[:22], 0.0, obs, number % 9 == 0, False)
    memory.draw(10)
    assert psutil.Process().memory_info().rss - before < 100e6


def test_nan_in_an_observation_does_not_break_its_episode():
    memory = ReplayMemory(20)
    for number in range(5):
        memory.add(0, np.float32([number, np.nan]), np.zeros(1), 1.0, np.float32([number + 1, np.nan]), False, False)
    assert memory.count == 6
    assert memory.gather([0], n_step=9).steps == 5


def test_an_observation_changed_in_place_is_stored_as_it_is_now():
    memory, obs = ReplayMemory(20), np.zeros(1, np.float32)
    memory.add(0, np.float32([5]), np.zeros(1), 1.0, obs, False, False)
    obs += 7
    memory.add(0, obs, np.zeros(1), 2.0, np.float32([9]), True, False)
    found = memory.gather(memory.transitions())
    assert (found.state[0].ravel().tolist(), found.next_state[0].ravel().tolist()) == ([5, 7], [0, 9])


def test_streams_do_not_look_into_each_others_past():
    memory = ReplayMemory(20, window_length=3)
    for step in range(3):
        for stream in (1, 2):
            obs, after = (np.float32([10 * stream + step + k]) for k in (0, 1))
            memory.add(stream, obs, np.zeros(1), 0.0, after, False, False)
    found = memory.gather(memory.transitions())
    windows = {tuple(window[:, 0]) for window in found.state[0]}
    assert windows == {(0, 0, 10), (0, 10, 11), (10, 11, 12), (0, 0, 20), (0, 20, 21), (20, 21, 22)}


def test_a_cut_marks_the_last_transition_truncated_and_leaves_the_other_streams():
    memory = ReplayMemory(10, window_length=2)
    for stream in (1, 2):
        memory.add(stream, np.ones(1), np.zeros(1), float(stream), np.full(1, 2.0), False, False)
    memory.cut(1)
    memory.cut(3)
    for stream in (1, 2):
        memory.add(stream, np.full(1, 2.0), np.zeros(1), stream + 2.0, np.ones(1), False, False)
    found = memory.gather(memory.transitions())
    order = np.argsort(found.reward)
    assert found.truncated[order].tolist() == [True, False, False, False]
    assert found.terminated.tolist() == [False] * 4
    assert found.state[0][order[2:], :, 0].tolist() == [[0, 2], [1, 2]]


def test_a_cut_of_a_transition_that_the_ring_has_overwritten_marks_no_other():
    memory = ReplayMemory(4)
    memory.add("old", np.ones(1), np.zeros(1), 0.0, np.ones(1), False, False)
    add_line(memory, range(3), stream="new")
    memory.cut("old")
    assert not memory.gather(memory.transitions()).truncated.any()
    memory.cut_all()
    assert memory.gather(memory.transitions()).truncated.tolist() == [False, False, True]


def test_dtypes_are_kept_but_doubles_are_stored_as_singles():
    for dtype, kept in ((np.uint8, np.uint8), (np.int64, np.int64), (np.float64, np.float32)):
        memory = ReplayMemory(4)
        memory.add(0, np.array([200], dtype), np.zeros(1, np.float32), 0.0, np.array([3], dtype), False, False)
        found = memory.draw(2)
        assert (found.state[0].dtype, found.next_state[0].dtype, found.state[0][0, 0, 0]) == (kept, kept, 200)


def test_bad_arguments_and_an_empty_memory_are_refused():
    for limit, window_length in ((1, 1), (5, 0), (-1, 1)):
        with pytest.raises(ValueError, match=r"at least 1, not %d and %d" % (limit, window_length)):
            ReplayMemory(limit, window_length)
    for memory in (ReplayMemory(5), ReplayMemory(5)):
        with pytest.raises(ValueError, match=r"empty"):
            memory.draw(1)
        with pytest.raises(ValueError, match=r"processor"):
            memory.add(0, np.array([None]), np.zeros(1), 0.0, np.array([None]), False, False)
        with pytest.raises(ValueError, match=r"actions must be numbers"):
            memory.add(0, np.zeros(1), None, 0.0, np.zeros(1), False, False)
        assert memory.transitions().tolist() == []
    add_line(memory, [1])
    for call in (memory.draw, lambda one, n_step: memory.gather([0], n_step)):
        with pytest.raises(ValueError, match=r"n_step must be at least 1, not 0"):
            call(1, n_step=0)
    with pytest.raises(ValueError, match=r"entry 1 is no transition; `transitions`"):
        memory.gather([0, 1])
    for number in (2, -1):
        for call in (memory.gather, memory.columns):
            with pytest.raises(ValueError, match=r"holds entries 0 to 1, not %d" % number):
                call([number])


def test_what_differs_from_the_first_in_structure_shape_or_kind_is_refused_and_nothing_stored():
    memory = ReplayMemory(10)
    good = (np.zeros(2, np.int32), np.zeros(1, np.float32))
    memory.add(0, good[0], good[1], 0.0, good[0], False, False)
    before = bits(memory)
    for obs, action, next_obs, words in (
        (np.zeros(3, np.int32), good[1], good[0], r"first observation was int32 \(2,\), this one is int32 \(3,\)"),
        (good[0], good[1], np.zeros(2, np.float32), r"this one is float32 \(2,\)"),
        (good[0], np.zeros(2, np.float32), good[0], r"first action was float32 \(1,\)"),
        ({"a": good[0]}, good[1], good[0], r"built like the first, array, not {'dict'"),
    ):
        with pytest.raises(ValueError, match=words):
            memory.add(0, obs, action, 0.0, next_obs, False, False)
        assert (bits(memory), len(memory), memory.count) == (before, 1, 2)


def test_one_thread_adds_while_another_draws_and_every_transition_is_whole():
    memory, stop = ReplayMemory(300, window_length=2, seed=0), threading.Event()

    def collect():
        rng, now = np.random.default_rng(1), np.zeros((5, 3), np.float32)
        now[:, 0] = range(5)
        while not stop.is_set():
            stream = int(rng.integers(5))
            after = now[stream] + [0, 0, 1]
            over = bool(rng.random() < 0.05)
            memory.add(
                stream, np.repeat(now[stream], 400), now[stream], now[stream][2], np.repeat(after, 400), over, False
            )
            now[stream] = after + [0, 1, 0] if over else after

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        begun, drawn = time.monotonic(), 0
        while (took := time.monotonic() - begun) < 2.0 or (took < 60.0 and (drawn <= 10 or memory.count <= 900)):
            if len(memory):
                assert_whole(memory.draw(64, n_step=3))
                drawn += 1
    finally:
        stop.set()
        collector.join(10)
    assert drawn > 10
    assert memory.count > 900, "the ring did not wrap"


def assert_whole(found):
    """Observations tell stream, episode and step, 400 times each; the reward of a step is its number."""
    state, next_state = (x[0].reshape(64, 2, 3, 400) for x in (found.state, found.next_state))
    for window in (state, next_state):
        there = window[:, 0].any(axis=(1, 2)) & (window[:, 1, 2, 0] > 0)
        np.testing.assert_array_equal(window, window[..., :1] + np.zeros(400), "a torn observation")
        np.testing.assert_array_equal(
            window[there, 1] - window[there, 0], np.repeat([[[0.0], [0], [1]]], there.sum(), 0) + np.zeros(400)
        )
    first, last = state[:, 1, :, 0], next_state[:, 1, :, 0]
    np.testing.assert_array_equal(found.action, first)
    np.testing.assert_array_equal(first[:, :2], last[:, :2], "an episode runs into another one")
    np.testing.assert_array_equal(last[:, 2] - first[:, 2], found.steps)
    np.testing.assert_array_equal(found.reward, found.steps * (first[:, 2] + last[:, 2] - 1) / 2)


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
    found = memory.gather(memory.transitions())
    assert found.reward.tolist() == [1.0, 2.0]
    assert (found.state[0].ravel().tolist(), found.next_state[0].ravel().tolist()) == ([1, 10], [2, 11])
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
            np.ravel(x).tolist() for x in (found.state[0], found.next_state[0], found.terminated, found.truncated)
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


def test_keras_rls_memory_gives_leaves_and_single_steps():
    store = SequentialStore(SequentialMemory(100, window_length=2))
    for number in range(12):
        obs, after = ({"b": np.full(2, n, np.float64), "a": np.array([n], np.uint8)} for n in (number, number + 1))
        store.add(0, obs, np.zeros(1), number, after, number % 6 == 5, False)
    found = store.draw(10, gamma=0.5)
    for state, shift in ((found.state, 0), (found.next_state, 1)):
        assert [(leaf.dtype, leaf.shape) for leaf in state] == [(np.uint8, (10, 2, 1)), (np.float32, (10, 2, 2))]
        for leaf in state:
            np.testing.assert_array_equal(leaf[:, 1, 0], found.reward + shift)
    np.testing.assert_array_equal(found.terminated, found.reward % 6 == 5)
    np.testing.assert_array_equal(found.discount, np.where(found.terminated, 0, 0.5))
    assert set(found.steps) == {1}
    with pytest.raises(ValueError, match=r"not n_step=3\n.*ReplayMemory\(limit=100, window_length=2"):
        store.draw(4, n_step=3)


def test_keras_rls_interface_takes_nested_observations_and_gives_them_back():
    memory = ReplayMemory(50, window_length=2)
    keys = [{"b": np.float32([n, n]), "a": (np.array(n), np.float32([n]))} for n in range(4)]
    for number, obs in enumerate(keys[:3]):
        memory.append(obs, np.zeros(1), number, number == 2)
    memory.append(keys[3], np.zeros(1), 0.0, False)
    experience = memory.sample(1, [2])[0]
    assert (experience.reward, experience.terminal1) == (2.0, True)
    for window, wanted in ((experience.state0, (1, 2)), (experience.state1, (2, 3))):
        assert [(obs["b"].tolist(), obs["a"][0], obs["a"][1].tolist()) for obs in window] == [
            ([n, n], n, [n]) for n in wanted
        ]


@pytest.mark.parametrize("window_length", [1, 2, 3, 4])
def test_recent_states_of_nested_observations_are_those_of_plain_ones(window_length):
    plain, nested = (ReplayMemory(100, window_length) for _ in range(2))
    rng = np.random.default_rng(3)
    for number in range(60):
        obs = np.float32([number])
        state = nested.get_recent_state({"a": {"deep": (obs, number)}})
        assert [one["a"]["deep"][0].tolist() for one in state] == [one.tolist() for one in plain.get_recent_state(obs)]
        over = bool(rng.random() < 0.3)
        for last in range(1 + over):
            plain.append(obs, np.zeros(1), 0.0, over and not last)
            nested.append({"a": {"deep": (obs, number)}}, np.zeros(1), 0.0, over and not last)


# Checkpoints.


def save(memory, since, parts):
    """One incremental save as it would be on disk; returns the description and where the next one goes on."""
    with memory.lock:
        numbers = memory.changed(since)
        parts.append((numbers, memory.columns(numbers)))
        meta = json.dumps(memory.meta(), sort_keys=True)
        memory.mark_saved()
        return json.loads(meta), memory.count


@pytest.mark.parametrize("kind", [PLAIN, NESTED])
@pytest.mark.parametrize("limit", [5, 40, 1000])
@pytest.mark.parametrize("saves", [1, 2, 7])
def test_a_memory_restored_from_several_saves_is_the_one_that_was_saved_bit_by_bit(saves, limit, kind):
    first, naive = ReplayMemory(limit, 2, seed=4), NaiveMemory(limit, 2)
    rng, parts, since = np.random.default_rng(saves), [], 0
    for _ in range(saves):
        play(rng, [first, naive], 25, kind=kind, interval=1.5)
        first.draw(3)
        meta, since = save(first, since, parts)
    second = ReplayMemory(limit, 2, seed=99)
    second.restore(meta, iter(parts))
    for stream in range(4):  # what is restored has no running episodes
        first.cut(stream)
        naive.cut(stream)
    for round_ in range(3):
        assert bits(second) == bits(first)
        assert_same(second, naive, 3, 0.9)
        one, other = first.draw(50, 2), second.draw(50, 2)
        np.testing.assert_array_equal(one.state[0], other.state[0])
        np.testing.assert_array_equal(one.reward, other.reward)
        play(np.random.default_rng(round_), [first, second, naive], 30, kind=kind)
    # The saves go on from the restored memory, which knows what ending its episodes has altered.
    meta, _ = save(second, since, parts)
    third = ReplayMemory(limit, 2)
    third.restore(meta, parts)
    second.cut_all()
    assert bits(third) == bits(second)


def test_a_save_holds_only_what_is_new_or_altered():
    memory = ReplayMemory(100)
    add_line(memory, range(10), stream=1)
    add_line(memory, range(10), stream=2)
    assert memory.changed(0).tolist() == list(range(22))
    memory.mark_saved()
    assert memory.changed(22).tolist() == []
    add_line(memory, [10, 11], stream=1)
    assert memory.changed(22).tolist() == [10, 22, 23], "the head of the saved part got its step"
    memory.cut(2)
    assert memory.changed(22).tolist() == [10, 20, 22, 23], "the last step before it was cut"
    memory.mark_saved()
    assert memory.changed(memory.count).tolist() == []
    add_line(memory, range(20, 220), stream=1)
    assert memory.changed(24).tolist() == list(range(memory.count - 100, memory.count)), "what is overwritten is gone"


def test_an_empty_memory_is_restored_empty_and_takes_observations_of_any_kind():
    memory, parts = ReplayMemory(8), []
    meta, _ = save(memory, 0, parts)
    other = ReplayMemory(8)
    add_line(other, range(5))
    other.restore(meta, parts)
    assert (len(other), other.count) == (0, 0)
    other.add(0, {"a": np.zeros(2)}, np.zeros(3), 0.0, {"a": np.zeros(2)}, False, False)
    assert len(other) == 1


def without(columns, name):
    return {key: column for key, column in columns.items() if key != name}


def altered(columns, name, change):
    return dict(columns, **{name: change(columns[name].copy())})


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


DAMAGES = {
    "another limit": (lambda m, n, c: (dict(m, limit=9), n, c), r"holds 9 transitions, this agent's 8"),
    "another window": (lambda m, n, c: (dict(m, window_length=3), n, c), r"stacks 3 observations, this agent's 2"),
    "no limit": (lambda m, n, c: (without(m, "limit"), n, c), r"damaged: KeyError\('limit'\)"),
    "no template": (lambda m, n, c: (dict(m, template=None), n, c), r"None is no template"),
    "no columns": (lambda m, n, c: (without(m, "columns"), n, c), r"damaged: KeyError\('columns'\)"),
    "columns of objects": (
        lambda m, n, c: (dict(m, columns=dict(m["columns"], action=["|O", [1]])), n, c),
        r"actions must be numbers",
    ),
    "a reward of bytes": (
        lambda m, n, c: (dict(m, columns=dict(m["columns"], reward=["|u1", []])), n, c),
        r"columns {",
    ),
    "no random state": (lambda m, n, c: (dict(m, rng={}), n, c), r"in its description"),
    "a head beyond the end": (lambda m, n, c: (dict(m, heads=[99]), n, c), r"running episodes at \[99\]"),
    "more entries": (lambda m, n, c: (dict(m, count=m["count"] + 1), n, c), r"entry 14 is missing"),
    "a missing entry": (lambda m, n, c: (m, n[1:], {k: x[1:] for k, x in c.items()}), r"entry 6 is missing"),
    "a missing column": (lambda m, n, c: (m, n, without(c, "following")), r"no column 'following'"),
    "a column of another shape": (lambda m, n, c: (m, n, altered(c, "obs/0", np.ravel)), r"'obs/0' is float32 \(8,\)"),
    "a column of another dtype": (lambda m, n, c: (m, n, altered(c, "step", np.float32)), r"'step' is float32"),
    "numbers that are none": (lambda m, n, c: (m, n / 2, c), r"entry numbers of float64"),
    "numbers beyond the end": (lambda m, n, c: (m, n + 1, c), r"entries 7 to 14 of 14"),
    "a link into the future": (lambda m, n, c: (m, n, altered(c, "previous", put(3, 10))), r"entry 9 is linked to 10"),
    "a step to nowhere": (
        lambda m, n, c: (m, n, altered(c, "following", put(3, -1))),
        r"entry 9 is linked to 8 and -1",
    ),
    "a step beyond the end": (lambda m, n, c: (m, n, altered(c, "following", put(3, 14))), r"linked to 8 and 14"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_save_that_does_not_fit_or_is_damaged_is_refused_and_nothing_changes(damage):
    change, words = DAMAGES[damage]
    memory, saved, parts = ReplayMemory(8, 2), ReplayMemory(8, 2), []
    add_line(memory, range(5))
    add_line(saved, range(13))
    meta, _ = save(saved, 0, parts)
    meta, numbers, columns = change(meta, *parts[0])
    before = bits(memory), memory.meta(), len(memory)
    with pytest.raises(ValueError, match=words):
        memory.restore(meta, [(numbers, columns)])
    assert (bits(memory), memory.meta(), len(memory)) == before
    add_line(memory, [5])
    assert memory.gather([0], n_step=9).steps == 6, "the running episode went on"


def test_a_save_missing_in_between_is_told_though_older_entries_lay_in_the_same_places():
    memory, parts, since = ReplayMemory(8), [], 0
    for numbers in (range(20), range(30, 32), range(40, 42)):
        add_line(memory, numbers)
        meta, since = save(memory, since, parts)
    with pytest.raises(ValueError, match=r"entry 21 is missing"):
        ReplayMemory(8).restore(meta, [parts[0], parts[2]])


def test_an_error_in_reading_a_later_part_leaves_the_memory_as_it_was():
    memory, saved, parts = ReplayMemory(8), ReplayMemory(8), []
    add_line(memory, range(5))
    add_line(saved, range(13))
    meta, _ = save(saved, 0, parts)

    def read():
        yield parts[0]
        raise OSError("disk gone")

    before = bits(memory), memory.meta()
    with pytest.raises(OSError, match="disk gone"):
        memory.restore(meta, read())
    assert (bits(memory), memory.meta()) == before


@LENGTHS
@pytest.mark.parametrize("steps", [0, 30, 150])
def test_a_whole_state_loaded_elsewhere_draws_and_goes_on_as_the_first(window_length, steps):
    first, naive = ReplayMemory(64, window_length, seed=4), NaiveMemory(64, window_length)
    play(np.random.default_rng(5), [first, naive], steps)
    second = ReplayMemory(64, window_length)
    numbers = first.changed(0)
    second.restore(first.meta(), [(numbers, {name: x.copy() for name, x in first.columns(numbers).items()})])
    first.cut_all()
    for stream in range(4):
        naive.cut(stream)
    play(np.random.default_rng(6), [first, second, naive], 50)
    np.testing.assert_array_equal(first.draw(100).state[0], second.draw(100).state[0])
    assert_same(second, naive)
