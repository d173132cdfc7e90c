"""An episode that is lost with its worker: its good transitions stay in replay, or are taken out of it."""

from __future__ import annotations

import logging
import os
import re
import signal

import numpy as np
import pytest
from agent_parts import linear_agent
from farms import ask_farm, farm_here, running_farm
from hypothesis import given, settings
from hypothesis import strategies as st
from rl.memory import SequentialMemory
from test_memory import NaiveMemory, assert_same, bits, play, save

from agents import ReplayMemory
from agents.checkpoint import Checkpointer
from agents.keras_rl.callbacks import Callback
from farmer import Farmer


class Naive(NaiveMemory):
    """The list of episodes, which can also forget one."""

    def drop(self, stream):
        past, _ = self.running.pop(stream, ([], None))
        for row in past:
            row["step"] = None


@settings(max_examples=60, deadline=None)
@given(
    limit=st.sampled_from([5, 13, 1000]),
    window=st.sampled_from([1, 3]),
    n_step=st.sampled_from([1, 4]),
    drops=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), max_size=6),
)
def test_what_is_left_after_drops_is_what_a_list_of_the_other_episodes_gives(limit, window, n_step, drops):
    memory, naive, rng = ReplayMemory(limit, window), Naive(limit, window), np.random.default_rng(3)
    for steps, stream in drops:
        play(rng, [memory, naive], steps)
        removed = memory.drop(stream)
        before = len(naive.kept())
        naive.drop(stream)
        assert removed == before - len(naive.kept())
    play(rng, [memory, naive], 7)
    assert len(memory) == len(naive.kept())
    assert_same(memory, naive, n_step)


def line(memory, stream, rewards, over=False):
    """An episode whose observations are its rewards; transitions follow each other."""
    for index, reward in enumerate(rewards):
        obs = np.array([ord(stream), reward], np.float32)
        after = np.array([ord(stream), rewards[index + 1] if index + 1 < len(rewards) else -1], np.float32)
        memory.add(stream, obs, np.zeros(1), reward, after, False, over and index + 1 == len(rewards))


def drawn(memory):
    return sorted(memory.gather(memory.transitions()).reward.tolist())


def test_a_dropped_episode_is_drawn_no_more_and_the_one_before_it_in_the_same_slot_stays():
    memory = ReplayMemory(100, seed=1)
    line(memory, "a", [1, 2, 3], over=True)
    line(memory, "a", [4, 5])
    line(memory, "b", [7, 8])
    assert memory.drop("a") == 2
    assert drawn(memory) == [1, 2, 3, 7, 8]
    assert len(memory) == 5
    assert set(memory.draw(500).reward.tolist()) == {1, 2, 3, 7, 8}
    line(memory, "a", [9])
    line(memory, "b", [10])
    assert drawn(memory) == [1, 2, 3, 7, 8, 9, 10]
    assert memory.drop("nobody") == 0


@pytest.mark.parametrize("dropped", [90, 990])
def test_a_ring_that_is_nearly_all_dropped_draws_the_rest_equally_often(dropped):
    memory = ReplayMemory(2000, seed=2)
    line(memory, "a", [float(number) for number in range(10)], over=True)
    line(memory, "b", [-1.0] * dropped)
    memory.drop("b")
    counts = np.bincount(memory.draw(20_000).reward.astype(int), minlength=10)
    assert counts.sum() == 20_000
    assert (abs(counts - 2000) < 250).all()


@pytest.mark.parametrize("saved_before", [False, True])
def test_what_was_dropped_stays_so_in_a_save_that_holds_only_what_changed(saved_before):
    memory, parts = ReplayMemory(50, seed=1), []
    line(memory, "a", [1, 2, 3])
    line(memory, "b", [7, 8], over=True)
    since = 0
    if saved_before:  # the transitions lie in an older segment, as whole ones
        save(memory, 0, parts)
        since = memory.count
    memory.drop("a")
    assert len(memory.changed(since)) == (3 if saved_before else memory.count)
    save(memory, since, parts)
    other = ReplayMemory(50)
    other.restore(memory.meta(), parts)
    assert bits(other) == bits(memory)
    assert drawn(other) == [7, 8]
    assert set(other.draw(50).reward.tolist()) == {7, 8}


def test_a_checkpoint_of_an_agent_forgets_them_too(tmp_path):
    agent, other = linear_agent(obs_dim=2), linear_agent(obs_dim=2)
    line(agent.memory, "a", [1, 2, 3])
    line(agent.memory, "b", [7, 8])
    saves = Checkpointer(tmp_path)
    saves.save(agent)
    agent.memory.drop("a")
    saves.save(agent)
    Checkpointer(tmp_path).load(other)
    assert drawn(other.memory) == [7, 8]
    assert len(list((tmp_path / "replay").glob("segment-*"))) == 2, "the second save was an addition to the first"


class Kill(Callback):
    """Kills the worker of the only slot once, in the middle of its first episode."""

    def __init__(self, worker):
        super().__init__()
        self.worker, self.lengths = worker, []

    def on_step_end(self, step, logs=None):
        if step == 4 and not self.lengths:
            os.kill(self.worker, signal.SIGKILL)

    def on_episode_end(self, episode, logs=None):
        self.lengths.append(logs["nb_episode_steps"])


@pytest.mark.parametrize("schedule", ["overlap", "sync"])
@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_a_killed_worker_leaves_its_good_transitions_or_none(policy, schedule):
    agent = linear_agent(
        on_lost_episode=policy, schedule=schedule, seed=3, nb_steps_warmup_actor=10**6, nb_steps_warmup_critic=10**6
    )
    with (
        farm_here("CountingEnv", {"length": 20}) as address,
        Farmer("environments:CountingEnv", [(address, 1)]) as pool,
    ):
        kill = Kill(ask_farm(address, "status")[0]["pid"])
        agent.fit(pool, None, callbacks=[kill], nb_episodes=3, verbose=0)
        ledger = pool.status()["ledger"]
    lost, *whole = kill.lengths
    assert 5 <= lost < 20, "it was cut in the middle"
    assert whole == [20, 20]
    memory = agent.memory
    kept = memory.gather(memory.transitions())
    assert len(memory) == 40 + (lost if policy == "keep" else 0)
    assert kept.reward.tolist() == [*range(1, lost + 1 if policy == "keep" else 1), *range(1, 21), *range(1, 21)]
    assert kept.truncated.sum() == (3 if policy == "keep" else 2)
    assert not kept.terminated.any()
    assert agent.step == lost + 40, "steps that were made count as made"
    assert (ledger["sent"], ledger["done"], ledger["crashed"]) == (lost + 41, lost + 40, 1)


@pytest.mark.slow
def test_a_dead_farm_is_told_once_and_not_again_for_each_slot(caplog):
    class KillFarm(Callback):
        def on_step_end(self, step, logs=None):
            dying.kill()  # its workers end with it

    with (
        running_farm("environments:CountingEnv", slots=1) as staying,
        running_farm("environments:CountingEnv", slots=6) as dying,
        Farmer("environments:CountingEnv", [(staying.address, 1), (dying.address, 6)]) as pool,
        caplog.at_level(logging.WARNING),
    ):
        linear_agent(nb_steps_warmup_actor=10**6, nb_steps_warmup_critic=10**6).fit(
            pool, nb_steps=300, callbacks=[KillFarm()], verbose=0
        )
    said = [record.message for record in caplog.records if dying.address in record.message]
    assert len([text for text in said if "going on with 1 slots" in text]) == 1
    [of_the_agent] = [text for text in said if "going on with" not in text]
    assert re.fullmatch(r"%s: \d running episodes? ended with it" % dying.address, of_the_agent)


def test_an_interrupted_episode_is_kept_under_either_policy():
    agent = linear_agent(on_lost_episode="drop", seed=3)
    with (
        farm_here("CountingEnv", {"length": 20}) as address,
        Farmer("environments:CountingEnv", [(address, 1)]) as pool,
    ):
        agent.fit(pool, 7, verbose=0)
    assert len(agent.memory) == 7


def test_keras_rls_memory_cannot_drop_and_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"cannot take an episode back.*\n.*ReplayMemory\(limit=100\)"):
        linear_agent(memory=SequentialMemory(100, window_length=1), on_lost_episode="drop")
    linear_agent(memory=SequentialMemory(100, window_length=1))
    with pytest.raises(ValueError, match="on_lost_episode must be one of keep, drop, not 'remove'"):
        linear_agent(on_lost_episode="remove")
    assert linear_agent(on_lost_episode="drop").get_config()["on_lost_episode"] == "drop"
