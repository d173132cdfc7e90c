"""Updates follow the steps by the asked ratio, at once or in a second thread; `sync` gives the same each time."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
from farms import farm_here
from learner_parts import AGENTS, Wander, annealed_noise, assert_same, ddpg, everything_of, sac
from rl.callbacks import Callback

from agents import LocalPool, ReplayMemory
from agents.learner import FUSED, FUSED_LONG, LONGEST, Learner, UpdateBudget, in_calls, whole_calls
from farmer import Farmer

WARM_UP = 6


class AtStep(Callback):
    """Calls a function after every step, with the number of steps seen so far."""

    def __init__(self, what):
        super().__init__()
        self.what, self.seen = what, 0

    def on_step_end(self, step, logs=None):
        self.seen += 1
        self.what(self.seen, logs or {})


class Slowly:
    """A model whose variables are handed out one by one, so that copying them takes a while."""

    def __init__(self, model):
        self.model = model

    @property
    def variables(self):
        for variable in self.model.variables:
            time.sleep(0.001)
            yield variable

    def __getattr__(self, name):
        return getattr(self.model, name)


def pool(slots=4, length=5):
    return LocalPool([Wander(length) for _ in range(slots)])


def learners():
    return [thread for thread in threading.enumerate() if thread.name == "learner"]


@pytest.fixture(scope="module")
def compiled():
    """A DDPG agent whose compiled calls stand, for tests that need no other one: compiling takes seconds."""
    agent = ddpg(nb_steps_warmup_critic=WARM_UP, nb_steps_warmup_actor=WARM_UP)
    agent.fit(pool(), 60, verbose=0)
    return agent


@pytest.fixture
def agent(compiled):
    """The same as if it had never learnt."""
    compiled.memory = ReplayMemory(500, seed=1)
    compiled.step = compiled.nb_updates = 0
    compiled.budget = UpdateBudget(1.0)
    compiled.schedule = "overlap"
    return compiled


# What is owed.


@pytest.mark.parametrize("ratio", [0, -1, float("inf"), float("nan")])
def test_a_ratio_that_is_no_positive_number_is_refused(ratio):
    with pytest.raises(ValueError, match=r"updates_per_step must be a positive number, not"):
        UpdateBudget(ratio)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1 / 3, 0.7, 1, 4, 20])
def test_the_debt_of_any_number_of_steps_is_exact(ratio):
    budget = UpdateBudget(ratio)
    rng = np.random.default_rng(1)
    for _ in range(3000):
        budget.steps += int(rng.integers(1, 5))
        assert abs(budget.steps * ratio - budget.paid - budget.owed) < 1
        budget.paid += int(rng.integers(0, budget.owed + 1))
    budget.steps = 30_000_000
    budget.paid += budget.owed
    assert budget.paid == round(30_000_000 * ratio)


@pytest.mark.parametrize("owed", [0, 1, FUSED - 1, FUSED, FUSED + 1, FUSED_LONG, LONGEST - 1, LONGEST, 1000])
def test_whole_calls_never_make_more_than_is_owed_nor_leave_a_call_unmade(owed):
    count = whole_calls(owed)
    assert count <= min(owed, LONGEST)
    assert count % FUSED == 0
    assert count == LONGEST or owed - count < FUSED


@pytest.mark.parametrize("count", [1, 3, FUSED, 2 * FUSED, FUSED_LONG, FUSED_LONG + FUSED + 3, 128])
def test_the_calls_make_all_updates_with_at_most_one_odd_length(count):
    sizes = in_calls(count)
    assert sum(sizes) == count
    assert all(size in (FUSED, FUSED_LONG) for size in sizes[:-1])


# The ratio.


@pytest.mark.parametrize("schedule", ["overlap", "sync"])
@pytest.mark.parametrize("ratio", [0.25, 1, 4, 20])
@pytest.mark.slow
def test_updates_stay_within_a_band_around_the_ratio_at_every_step_and_meet_it_at_the_end(agent, ratio, schedule):
    agent.budget, agent.schedule = UpdateBudget(ratio), schedule
    band = Learner(agent, 4).band if schedule == "overlap" else FUSED - 1
    assert band <= max(2 * FUSED, 8 * ratio + FUSED)
    earned, behind = [], []

    def look(seen, logs):
        earned.append(agent.budget.steps)
        behind.append(ratio * agent.budget.steps - agent.budget.paid)

    steps = 200 if ratio < 4 else 60
    agent.fit(pool(), steps, callbacks=[AtStep(look)], verbose=0)
    assert min(behind) > -1e-6  # updates are never made in advance
    assert max(behind) < band + 1
    assert abs(agent.nb_updates - ratio * agent.budget.steps) < FUSED
    assert agent.nb_updates == agent.budget.paid
    warm = max(WARM_UP + 1, agent.batch_size + agent.window_length)
    assert steps - warm - 3 <= agent.budget.steps <= steps - warm + 4  # from the turn on in which it was warm
    assert earned == sorted(earned)


@pytest.mark.parametrize("schedule", ["overlap", "sync"])
@pytest.mark.slow
def test_several_fits_neither_drift_nor_lose_a_step(agent, schedule):
    agent.budget, agent.schedule = UpdateBudget(0.7), schedule
    agent.fit(pool(), 20, verbose=0)
    begun = agent.budget.steps
    for number in (7, 13, 1, 29, 3, 3, 40):
        agent.fit(pool(), number, verbose=0)
        assert 0 <= agent.budget.owed < FUSED
        assert agent.nb_updates == agent.budget.paid
    assert agent.budget.steps == begun + 96
    agent.fit(Wander(), 4, verbose=0)  # one environment leaves nothing owed
    assert agent.nb_updates == int(0.7 * (begun + 100) + 1e-9)


@pytest.mark.slow
def test_one_environment_is_learnt_from_after_every_step(agent):
    agent.budget = UpdateBudget(2.0)
    updates = []
    agent.fit(Wander(), 30, callbacks=[AtStep(lambda seen, logs: updates.append(agent.nb_updates))], verbose=0)
    assert updates == [2 * max(0, step - WARM_UP) for step in range(1, 31)]


def test_callbacks_get_the_metrics_of_the_newest_updates_under_their_names(agent):
    got = []
    agent.fit(pool(), 60, callbacks=[AtStep(lambda seen, logs: got.append(logs["metrics"]))], verbose=0)
    assert all(len(metrics) == len(agent.metrics_names) for metrics in got)
    assert np.isnan(got[0]).all()
    assert any(np.isfinite(metrics).all() for metrics in got)


# sync.


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_two_trainings_of_one_seed_are_the_same_to_the_bit(name):
    def train():
        more = {"random_process": annealed_noise()} if name == "DDPG" else {}
        agent = AGENTS[name](schedule="sync", updates_per_step=2.0, **more)
        agent.fit(LocalPool([Wander(length) for length in (3, 5, 7)]), 64, verbose=0)
        return everything_of(agent)

    first, second = train(), train()
    assert_same(first, second)
    assert first[1]["nb_updates"] > 50


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", AGENTS)
def test_two_trainings_of_one_seed_over_a_farm_are_the_same_to_the_bit(name):
    def train():
        agent = AGENTS[name](schedule="sync")
        with farm_here("Pendulum-v1", slots=2) as address, Farmer("Pendulum-v1", [(address, 2)]) as farmer:
            agent.fit(farmer, 101, nb_max_episode_steps=20, verbose=0)
        return everything_of(agent)

    first, second = train(), train()
    assert_same(first, second)
    assert first[1]["nb_updates"] > 50


def test_episodes_of_one_seed_have_seeds_of_their_own_which_never_come_again(agent):
    env = pool(2)
    agent.nb_episodes_begun = 0
    agent.fit(env, 40, verbose=0)
    agent.fit(env, 40, verbose=0)
    seeds = [seed for one in env.envs for seed in one.seeds]
    assert None not in seeds
    assert len(set(seeds)) == len(seeds) == 16


# overlap.


def test_overlap_learns_in_a_thread_of_its_own_that_ends_with_fit(agent):
    threads, running = set(), []
    update = agent.update

    def noted(count=1):
        threads.add(threading.current_thread())
        return update(count)

    agent.update = noted
    try:
        agent.fit(pool(), 60, callbacks=[AtStep(lambda seen, logs: running.append(len(learners())))], verbose=0)
    finally:
        del agent.update
    (thread,) = threads
    assert thread is not threading.main_thread()
    assert not thread.is_alive()
    assert set(running) == {1}
    assert not agent.acting.overlapped


def test_environments_step_on_while_an_update_is_under_way(agent):
    going, go_on, update = threading.Event(), threading.Event(), agent.update
    made = []

    def held(count=1):
        going.set()
        assert go_on.wait(100)
        return update(count)

    def look(seen, logs):
        if agent.budget.owed >= FUSED:
            assert going.wait(20)  # a busy machine may leave the learner aside until the band is full
        made.append((going.is_set(), seen))
        if going.is_set() and sum(held for held, _ in made) == 4:
            go_on.set()

    agent.update = held
    try:
        agent.fit(pool(), 60, callbacks=[AtStep(look)], verbose=0)
    finally:
        del agent.update
    assert sum(held for held, _ in made) > 4  # four came in before the first update could end


def test_the_collector_waits_for_a_learner_that_is_behind_by_more_than_the_band(agent):
    """An update that does not end lets in as many steps as the band allows, and not one turn more."""
    going, go_on, update = threading.Event(), threading.Event(), agent.update
    agent.fit(pool(), 20, verbose=0)
    begun, band, seen_steps = agent.budget.steps, Learner(agent, 4).band, []

    def held(count=1):
        going.set()
        assert go_on.wait(100)
        return update(count)

    def release():
        assert going.wait(60)
        last, still = -1, 0
        while still < 4:  # half seconds in a row
            time.sleep(0.5)
            still = still + 1 if agent.budget.steps == last else 0
            last = agent.budget.steps
        seen_steps.append(last)
        go_on.set()

    agent.update = held
    releasing = threading.Thread(target=release)
    releasing.start()
    try:
        agent.fit(pool(), 200, verbose=0)
    finally:
        del agent.update
        releasing.join()
    owed = seen_steps[0] - begun
    assert band - FUSED < owed <= band + FUSED + 4


def test_acting_sees_only_whole_published_versions_of_the_weights(agent):
    """Every weight that acts is of one version: all of them are set to the number of the update by a false one."""
    torn, versions = [], set()

    def numbered(count=1):
        for variable in agent.actor.variables:
            variable.assign(np.full(variable.shape, agent.nb_updates + count, np.float32))
        agent.nb_updates += count
        return [0.0] * len(agent.own_metrics)

    by_copy = agent.acting.by_copy

    def looked(inputs, norm):
        values = {float(value) for weight in agent.acting.copy.get_weights() for value in weight.ravel()}
        torn.append(values if values != {float(agent.policy_updates)} else None)
        versions.update(values)
        return by_copy(inputs, norm)

    before = agent.actor.get_weights()
    agent.actor.set_weights([np.zeros_like(weight) for weight in before])
    agent.update, agent.acting.by_copy = numbered, looked
    agent.networks["actor"] = Slowly(agent.actor)
    try:
        agent.fit(pool(), 300, verbose=0)
    finally:
        del agent.update
        agent.acting.by_copy, agent.networks["actor"] = by_copy, agent.actor
        agent.actor.set_weights(before)
    assert not any(torn)
    assert len(versions) > 5  # and new ones came through


def test_steps_know_the_version_of_the_weights_that_chose_them(agent):
    ages = []
    stepped = agent.meters.stepped
    agent.meters.stepped = lambda env_s, trip_s, age: ages.extend(age) or stepped(env_s, trip_s, age)
    try:
        agent.fit(pool(), 80, verbose=0)
    finally:
        del agent.meters.stepped
    assert min(ages) >= 0
    assert max(ages) <= Learner(agent, 4).band + 2 * FUSED


# Ends.


@pytest.mark.parametrize("how", ["signal", "exception"])
def test_ctrl_c_in_overlap_returns_the_history_and_a_further_fit_works(agent, how):
    def press(seen, logs):
        if seen == 25:
            if how == "exception":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    history = agent.fit(pool(), 10_000, callbacks=[AtStep(press)], verbose=0)
    assert 1 <= len(history.history["episode_reward"]) <= 8
    assert not learners()
    assert not agent.acting.overlapped
    assert agent.step < 60
    before = agent.step
    agent.fit(pool(), 30, verbose=0)
    assert agent.step == before + 30
    assert 0 <= agent.budget.owed < FUSED


@pytest.mark.slow
def test_ctrl_c_during_a_long_update_returns_soon_and_the_next_fit_waits_for_it(agent):
    going, go_on, update = threading.Event(), threading.Event(), agent.update

    def held(count=1):
        going.set()
        assert go_on.wait(30)
        return update(count)

    def press():
        if going.wait(30):
            time.sleep(0.2)  # the collector waits for the learner by now, or steps: both must end
            os.kill(os.getpid(), signal.SIGINT)

    agent.update = held
    user = threading.Thread(target=press)
    user.start()
    try:
        agent.fit(pool(), 10_000, verbose=0)
        user.join()
        assert len(learners()) == 1  # it ends by itself, behind the prompt
        before = agent.nb_updates
    finally:
        del agent.update
        go_on.set()
    agent.fit(pool(), 20, verbose=0)
    assert not learners()
    assert not agent.acting.overlapped
    assert agent.nb_updates > before
    assert agent.nb_updates == agent.budget.paid


def test_an_exception_in_a_callback_stops_the_learner_and_comes_through(agent):
    def fail(seen, logs):
        if seen == 30:
            raise RuntimeError("a callback of the user's")

    with pytest.raises(RuntimeError, match="a callback of the user's"):
        agent.fit(pool(), 10_000, callbacks=[AtStep(fail)], verbose=0)
    assert not learners()
    assert not agent.acting.overlapped
    agent.fit(pool(), 10, verbose=0)


def test_an_exception_in_an_update_reaches_fit_as_it_is(agent):
    class Odd(Exception):
        pass

    def fail(count=1):
        raise Odd("in the learner")

    agent.update = fail
    try:
        with pytest.raises(Odd, match="in the learner"):
            agent.fit(pool(), 10_000, verbose=0)
    finally:
        del agent.update
    assert not learners()
    agent.fit(pool(), 30, verbose=0)
    assert 0 <= agent.budget.owed < FUSED  # what was owed then was paid now


@pytest.mark.slow
def test_nothing_learns_inside_paused(agent):
    seen = []

    def look(number, logs):
        if number % 10 == 0:
            with agent.paused():
                before = agent.nb_updates, [w.copy() for w in agent.actor.get_weights()]
                time.sleep(0.05)
                seen.append(before[0] == agent.nb_updates)
                for old, new in zip(before[1], agent.actor.get_weights(), strict=True):
                    np.testing.assert_array_equal(old, new)

    agent.budget = UpdateBudget(4.0)
    agent.fit(pool(), 60, callbacks=[AtStep(look)], verbose=0)
    assert len(seen) == 6
    assert all(seen)


@pytest.mark.slow
def test_sac_learns_in_overlap_too():
    agent = sac()
    agent.fit(pool(), 60, verbose=0)
    assert abs(agent.nb_updates - agent.budget.steps) < FUSED
    assert agent.nb_updates > 30
