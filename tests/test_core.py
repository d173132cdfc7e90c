"""The loop: counts, callbacks, ends and losses, over one environment and over several."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re

import gymnasium
import numpy as np
import pytest
import rl.callbacks
import rl.core
from agent_parts import Counter, OldCounter, Recorder, linear_agent
from rl.callbacks import FileLogger, ModelIntervalCheckpoint
from rl.memory import SequentialMemory
from rl.random import OrnsteinUhlenbeckProcess

from agents import LocalPool, ReplayMemory, runs
from agents.keras_rl.callbacks import CallbackList
from agents.losses import LossLog
from agents.store import store_of

NEVER = {"nb_steps_warmup_critic": 10**9, "nb_steps_warmup_actor": 10**9}  # no training
SOON = {"nb_steps_warmup_critic": 10, "nb_steps_warmup_actor": 10, "batch_size": 4}
EITHER_SCHEDULE = pytest.mark.parametrize("schedule", ["overlap", "sync"])


def pool_of(number, length=5, **settings):
    return LocalPool([Counter(length + slot, slot, **settings) for slot in range(number)])


def all_of(memory):
    """Every transition that a ReplayMemory holds, the oldest first: `gather`'s columns, observations of one leaf."""
    found = memory.gather(memory.transitions())
    assert len(found.reward) == len(memory)
    return found


def stored(memory):
    """What a ReplayMemory holds, as the tuples of Counter's log."""
    found = all_of(memory)
    columns = (found.state[0][:, -1], found.action, found.reward, found.next_state[0][:, -1], found.terminated)
    return sorted(
        (tuple(obs), float(action[0]), float(reward), tuple(after), bool(over))
        for obs, action, reward, after, over in zip(*columns, strict=True)
    )


def reported(envs):
    """What the environments report."""
    return sorted(
        (tuple(obs), float(action[0]), reward, tuple(after), over)
        for env in envs
        for obs, action, reward, after, over, _ in env.log
    )


class Events(rl.callbacks.Callback):
    """Notes each call and what it was told."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_begin(self, logs=None):
        self.seen.append(("train begins",))

    def on_train_end(self, logs=None):
        self.seen.append(("train ends",))

    def on_episode_begin(self, episode, logs=None):
        self.seen.append(("episode begins", int(episode)))

    def on_episode_end(self, episode, logs=None):
        known = ("episode_reward", "nb_episode_steps", "nb_steps")
        self.seen.append(("episode ends", int(episode), *(float(logs[name]) for name in known if name in logs)))

    def on_step_begin(self, step, logs=None):
        self.seen.append(("step begins", int(step)))

    def on_step_end(self, step, logs=None):
        told = (int(logs["episode"]), float(logs["reward"]), float(logs["action"][0]), float(logs["observation"][2]))
        self.seen.append(("step ends", int(step), *told, float(logs["info"]["total"])))

    def on_action_begin(self, action, logs=None):
        self.seen.append(("action begins", float(action[0])))

    def on_action_end(self, action, logs=None):
        self.seen.append(("action ends", float(action[0])))


class KerasRlAgent(rl.core.Agent):
    """Acts as Recorder does, in keras-rl's own loop."""

    compiled = True
    metrics_names = ("loss",)

    def forward(self, observation):
        return np.full(1, 0.5, np.float32)

    def backward(self, reward, terminal):
        return [0.25]


class Once(gymnasium.Env):
    """Counter without the text in its info, which keras-rl's loop cannot take; four values a step."""

    def __init__(self, length):
        self.inner = OldCounter(length)
        self.action_space, self.observation_space = self.inner.action_space, self.inner.observation_space

    def reset(self):
        return self.inner.reset()

    def step(self, action):
        obs, reward, done, info = self.inner.step(action)
        return obs, reward, done, {"total": info["total"]}


# One environment: keras-rl's loop.


@pytest.fixture
def keras_rls_loop(monkeypatch):
    """keras-rl's own loop, made to run under Keras 3 by the list of callbacks that our loop has."""
    monkeypatch.setattr(rl.core, "CallbackList", CallbackList)
    return KerasRlAgent()


@pytest.mark.parametrize("settings", [{}, {"nb_max_episode_steps": 3}, {"verbose": 1, "log_interval": 4}])
def test_callbacks_of_one_environment_are_called_in_keras_rls_order(settings, keras_rls_loop):
    mine, theirs = Events(), Events()
    Recorder().fit(Once(5), 12, callbacks=[mine], **dict({"verbose": 0}, **settings))
    keras_rls_loop.fit(Once(5), 12, callbacks=[theirs], **dict({"verbose": 0}, **settings))
    assert mine.seen == theirs.seen


def test_callbacks_of_a_test_are_called_in_keras_rls_order(keras_rls_loop):
    mine, theirs = Events(), Events()
    Recorder().test(Once(5), 2, callbacks=[mine], visualize=False, verbose=0)
    keras_rls_loop.test(Once(5), 2, callbacks=[theirs], visualize=False, verbose=0)
    # Theirs does not say nb_episode_steps, and its nb_steps is ours; no metrics in either.
    ends = [event for event in mine.seen if event[0] == "episode ends"]
    assert ends == [("episode ends", 0, 15.0, 5.0, 5.0), ("episode ends", 1, 40.0, 5.0, 5.0)]
    assert [e[:3] for e in mine.seen] == [e[:3] for e in theirs.seen]


def test_interval_logger_prints_what_keras_rls_own_loop_prints(capsys, keras_rls_loop):
    texts = []
    for agent in (Recorder(), keras_rls_loop):
        agent.fit(Once(5), 12, verbose=1, log_interval=5)
        texts.append(
            [line for line in capsys.readouterr().out.splitlines() if "Interval" in line or "episodes -" in line]
        )
    assert texts[0] == texts[1]
    assert sum(line.startswith("Interval 1 (0 steps") for line in texts[0]) == 1


@pytest.mark.parametrize("kind", [Counter, OldCounter])
@pytest.mark.parametrize("terminates", [False, True])
def test_one_environment_of_either_gym_is_stored_as_it_reports(kind, terminates):
    env, agent = kind(4, terminates=terminates), linear_agent(**NEVER)
    history = agent.fit(env, nb_steps=11, verbose=0)
    assert env.total == agent.step == len(agent.memory) == 11
    assert stored(agent.memory) == reported([env])
    found = all_of(agent.memory)
    ends = [False, False, False, True, False, False, False, True, False, False, False]
    assert (found.terminated if terminates else found.truncated)[:10].tolist() == ends[:10]
    assert not (found.truncated if terminates else found.terminated)[:10].any()
    assert history.history["nb_episode_steps"] == [4, 4]


def test_keras_rls_own_memory_takes_one_environment():
    agent = linear_agent(memory=SequentialMemory(500, window_length=1), **NEVER)
    agent.fit(Counter(4), nb_steps=10, verbose=0)
    # Ten steps, an entry to close each of two episodes, and one for the third, which the end of `fit` cut.
    assert agent.memory.nb_entries == 13
    assert [bool(flag) for flag in agent.memory.terminals] == [*[False] * 3, True, False] * 2 + [False, True, False]


def test_an_environment_that_writes_into_one_array_is_copied():
    class Reuses(Counter):
        buffer = np.zeros(3, np.float32)

        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            self.buffer[:] = obs
            return self.buffer, info

        def step(self, action):
            obs, *rest = super().step(action)
            self.buffer[:] = obs
            return self.buffer, *rest

    env, agent = Reuses(4), linear_agent(**NEVER)
    agent.fit(env, 10, verbose=0)
    assert stored(agent.memory) == reported([env])


# Several environments.


@EITHER_SCHEDULE
@pytest.mark.parametrize("slots", [2, 4, 7])
@pytest.mark.parametrize("nb_steps", [1, 3, 50, 101])
def test_nb_steps_is_exact_and_replay_holds_what_the_environments_report(slots, nb_steps, schedule):
    pool, agent = pool_of(slots), linear_agent(schedule=schedule, **NEVER)
    agent.fit(pool, nb_steps=nb_steps, verbose=0)
    assert sum(env.total for env in pool.envs) == len(agent.memory) == agent.step == nb_steps
    assert stored(agent.memory) == reported(pool.envs)


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
@pytest.mark.parametrize("nb_episodes", [1, 5, 20])
def test_nb_episodes_is_exact(slots, nb_episodes):
    pool, agent, events = pool_of(slots), Recorder(), Events()
    history = agent.fit(pool, nb_steps=None, nb_episodes=nb_episodes, verbose=0, callbacks=[events])
    assert sum(env.episode for env in pool.envs) == nb_episodes
    assert sorted(history.epoch) == list(range(nb_episodes))
    for name in ("episode_reward", "nb_episode_steps", "nb_steps", "slot", "farm"):
        assert len(history.history[name]) == nb_episodes
    assert sum(history.history["nb_episode_steps"]) == agent.step == sum(env.total for env in pool.envs)
    for what in ("begins", "ends"):
        assert sorted(e[1] for e in events.seen if e[0] == "episode " + what) == list(range(nb_episodes))


@pytest.mark.slow
def test_forty_thousand_steps_in_one_fit_end_exactly():
    pool, agent = pool_of(16, length=200), linear_agent(**NEVER)
    agent.memory = ReplayMemory(50_000)
    agent.fit(pool, nb_steps=40_500, verbose=0)
    assert sum(env.total for env in pool.envs) == len(agent.memory) == agent.step == 40_500


def test_a_number_of_steps_may_be_a_float_of_a_whole_number():
    pool = pool_of(3)
    Recorder().fit(pool, nb_steps=2e1, verbose=0)
    assert sum(env.total for env in pool.envs) == 20


def test_a_second_fit_goes_on_counting_and_begins_new_episodes():
    pool, agent = pool_of(2, length=50), linear_agent(**NEVER)
    for steps in (30, 70):
        agent.fit(pool, nb_steps=steps, verbose=0)
    assert agent.step == len(agent.memory) == 100
    assert stored(agent.memory) == reported(pool.envs)


def test_a_time_limit_of_the_environment_bootstraps_from_its_real_last_observation():
    pool, agent = pool_of(3), linear_agent(**NEVER)
    agent.fit(pool, nb_steps=60, verbose=0)
    found = all_of(agent.memory)
    ends = np.array([after[2] == 5 + after[0] for after in found.next_state[0][:, -1]])
    assert ends.sum() >= 6
    assert found.truncated[ends].all()
    assert not found.terminated.any()
    for state, after in zip(found.state[0][ends, -1], found.next_state[0][ends, -1], strict=True):
        assert after.tolist() == [state[0], state[1], state[2] + 1]


def test_nb_max_episode_steps_truncates_longer_episodes_and_no_others():
    pool, agent = LocalPool([Counter(4, 0, terminates=True), Counter(1000, 1)]), linear_agent(**NEVER)
    history = agent.fit(pool, nb_steps=None, nb_episodes=12, nb_max_episode_steps=6, verbose=0)
    found = all_of(agent.memory)
    over = found.terminated | found.truncated
    assert set(history.history["nb_episode_steps"]) == {4, 6}
    assert {tuple(after[[0, 2]]) for after in found.next_state[0][over, -1]} == {(0, 4), (1, 6)}
    assert found.terminated[over].tolist() == [after[0] == 0 for after in found.next_state[0][over, -1]]


def test_states_are_windows_of_the_running_episode_only():
    pool, agent = pool_of(3), linear_agent(window_length=3, **NEVER)
    asked = []

    class Watch(type(agent)):
        def act(self, states, slots):
            asked.extend(states)
            return super().act(states, slots)

    agent.__class__ = Watch
    agent.fit(pool, nb_steps=60, verbose=0)
    for state in asked:
        slot, episode, step = state[-1]
        past = [[slot, episode, step - back] if step >= back else [0, 0, 0] for back in (2, 1, 0)]
        np.testing.assert_array_equal(state, past)
    found = all_of(agent.memory)
    for state in found.state[0]:
        slot, episode, step = state[-1]
        past = [[slot, episode, step - back] if step >= back else [0, 0, 0] for back in (2, 1, 0)]
        np.testing.assert_array_equal(state, past)


def test_action_repetition_sums_rewards_and_counts_once():
    pool, agent = pool_of(2, length=7), Recorder()
    agent.fit(pool, nb_steps=20, action_repetition=3, verbose=0)
    assert agent.step == len(agent.remembered) == 20
    firsts = [row for row in agent.remembered if row[1][1] == 1 and row[0] == 0]
    # Seven frames an episode: 3, 3 and then the one that is left.
    assert [row[3] for row in firsts] == [1 + 2 + 3, 4 + 5 + 6, 7]
    assert [row[4][2] for row in firsts] == [3, 6, 7]
    assert [row[6] for row in firsts] == [False, False, True]


def test_start_steps_follow_their_policy_and_are_not_learnt_from():
    pool, agent, asked = pool_of(2, length=9), Recorder(), []

    def policy(observation):
        asked.append(observation)
        return np.float32([-0.25])

    np.random.seed(3)
    agent.fit(pool, nb_steps=50, nb_max_start_steps=4, start_step_policy=policy, verbose=0)
    taken = [float(row[1][0]) for env in pool.envs for row in env.log]
    assert agent.step == len(agent.remembered) == taken.count(0.5) == 50
    assert taken.count(-0.25) == len(asked) > 0
    assert max(obs[2] for obs in asked) <= 2
    assert all(row[2] == 0.5 for row in agent.remembered)


def test_start_steps_without_a_policy_are_random_actions():
    env, agent = Counter(9), Recorder()
    np.random.seed(0)
    agent.fit(env, nb_steps=40, nb_max_start_steps=5, verbose=0)
    others = [float(row[1][0]) for row in env.log if row[1][0] != 0.5]
    assert len(set(others)) == len(others) == env.total - 40 > 3


def test_each_slot_has_noise_of_its_own():
    class Marks(OrnsteinUhlenbeckProcess):
        """Counts its own samples since the episode began."""

        def reset_states(self):
            self.count = 0

        def sample(self):
            self.count += 1
            return np.array([self.count / 100])

    pool, agent = pool_of(3), linear_agent(random_process=Marks(theta=0.15), **NEVER)
    for model in (agent.actor, agent.target_actor):
        model.set_weights([0 * weight for weight in model.get_weights()])
    agent.fit(pool, nb_steps=60, verbose=0)
    found = all_of(agent.memory)
    np.testing.assert_allclose(found.action[:, 0], (found.state[0][:, -1, 2] + 1) / 100, atol=1e-6)


def test_noise_of_all_slots_anneals_together():
    process = OrnsteinUhlenbeckProcess(theta=0.15, sigma=1.0, sigma_min=0.1, n_steps_annealing=100)
    agent = linear_agent(random_process=process, **NEVER)
    agent.fit(pool_of(4), nb_steps=80, verbose=0)
    assert process.n_steps == 80
    assert process.current_sigma == pytest.approx(1 - 0.9 * 0.8)


# Losses and interruptions.


class LosingPool:
    """Every `each`-th answer to an action is lost with its worker. No LocalPool: those lose nothing, not even alone."""

    def __init__(self, envs, each, gone_for_good=False):
        self.inner, self.each, self.gone_for_good = LocalPool(envs), each, gone_for_good
        self.answers = itertools.count(1)
        self.losses, self.gone = [], set()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def vacant(self):
        return [slot for slot in self.inner.vacant() if slot not in self.gone]

    def recv(self, min_ready=1, timeout=60.0):
        batch = self.inner.recv(min_ready, timeout)
        for i, slot in enumerate(batch.slot.tolist()):
            if batch.first[i] or next(self.answers) % self.each:
                continue
            batch.lost[i] = batch.truncated[i] = True
            batch.terminated[i] = False
            self.losses.append(self.envs[slot].log.pop())
            self.abandon([slot])
            if self.gone_for_good:
                self.gone.add(slot)
        return batch


def told_losses(caplog):
    """How many losses the log has told of, one by one or as more of the same."""
    told = [record.message for record in caplog.records]
    again = [int(more) for text in told for more in re.findall(r"the same (\d+) times more", text)]
    return sum(again) + sum(text.startswith("slot ") for text in told)


@pytest.mark.slow
@EITHER_SCHEDULE
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("each", [3, 7])
def test_a_lost_step_is_no_transition_and_does_not_count(slots, each, schedule, caplog):
    pool = LosingPool([Counter(6, slot) for slot in range(slots)], each)
    agent = linear_agent(schedule=schedule, **NEVER)
    with caplog.at_level(logging.WARNING, "agents"):
        agent.fit(pool, nb_steps=60, verbose=0)
    assert agent.step == len(agent.memory) == 60
    assert sum(env.total for env in pool.envs) == 60 + len(pool.losses)
    assert stored(agent.memory) == reported(pool.envs)
    assert not all_of(agent.memory).terminated.any()
    assert told_losses(caplog) == len(pool.losses) > 0


class LeavingPool(LosingPool):
    """A slot that is lost after its answer and before the next action, every `each`-th time: both in one batch."""

    def recv(self, min_ready=1, timeout=60.0):
        batch = self.inner.recv(min_ready, timeout)
        rows = list(range(len(batch.slot)))
        over = batch.terminated | batch.truncated
        lost = [i for i in rows if not batch.first[i] and not over[i] and next(self.answers) % self.each == 0]
        if not lost:
            return batch
        self.losses += lost
        self.abandon(batch.slot[lost].tolist())
        columns = {name: getattr(batch, name) for name in ("slot", "reward", "terminated", "first", "env_s", "trip_s")}
        doubled = {name: column[rows + lost] for name, column in columns.items()}
        for name in ("truncated", "lost"):
            doubled[name] = np.append(getattr(batch, name), [True] * len(lost))
        doubled.update({name: [getattr(batch, name)[i] for i in rows + lost] for name in ("obs", "info")})
        return dataclasses.replace(batch, **doubled)


@pytest.mark.slow
@EITHER_SCHEDULE
@pytest.mark.parametrize("slots", [1, 3])
def test_a_slot_that_is_lost_right_after_its_answer_keeps_that_transition_and_gets_no_action(slots, schedule):
    pool = LeavingPool([Counter(6, slot) for slot in range(slots)], 4)
    agent = linear_agent(schedule=schedule, **NEVER)
    agent.fit(pool, nb_steps=60, verbose=0)
    assert len(pool.losses) > 5
    assert agent.step == len(agent.memory) == sum(env.total for env in pool.envs) == 60
    assert stored(agent.memory) == reported(pool.envs)


def test_the_episode_of_a_lost_step_ends_as_truncated_at_its_last_good_observation():
    pool, agent = LosingPool([Counter(100)], 5), linear_agent(**NEVER)
    history = agent.fit(pool, nb_steps=12, verbose=0)
    found = all_of(agent.memory)
    assert history.history["nb_episode_steps"] == [4, 4]  # the third loss is not seen any more
    assert found.truncated.tolist() == [False, False, False, True] * 3


def test_episodes_are_exact_though_steps_are_lost():
    pool = LosingPool([Counter(6, slot) for slot in range(3)], 4)
    history = Recorder().fit(pool, nb_steps=None, nb_episodes=20, verbose=0)
    assert len(history.epoch) == 20
    assert all(steps > 0 for steps in history.history["nb_episode_steps"])


def test_losses_for_one_reason_are_told_once_in_two_lines_and_then_counted(caplog):
    why = "ValueError: %d is bad\n  black box, on the farm: /boxes/%d.npz\nTraceback (most recent call last):\n  File"
    losses = LossLog()
    with caplog.at_level(logging.WARNING, "agents"):
        for number in range(5):
            losses.lost(number, "farm:1", why % (number, number))
        losses.lost(0, "farm:2", why % (0, 0))
        losses.tell()
        losses.tell(all_of_them=True)
        losses.tell(all_of_them=True)
    first, other, more = [record.message for record in caplog.records]
    assert first == "slot 0 on farm:1: ValueError: 0 is bad\n  black box, on the farm: /boxes/0.npz"
    assert other.startswith("slot 0 on farm:2: ")
    assert more == "farm:1: the same 4 times more in 0 s, last in slot 4: ValueError: 0 is bad"
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "agents"):
        losses.lost(0, "farm:1", why % (0, 0))
    assert "Traceback" in caplog.records[0].message


def test_a_long_wait_is_told_in_few_words(monkeypatch, caplog):
    class Slow(LocalPool):
        waits = 3

        def recv(self, min_ready=1, timeout=60.0):
            self.waits -= 1
            if self.waits >= 0:
                raise TimeoutError
            return super().recv(min_ready, timeout)

        def status(self):
            farm = {"slots": 2, "busy": 1, "ledger": {"sent": 9}, "places": [{"slot": n} for n in range(64)]}
            away = dict(farm, farm="away:1", trouble="no sign for 4 s\n  now: look there")
            farms = [dict(farm, farm="a:%d" % n, trouble=None) for n in range(9)]
            return {"slots": 22, "busy": 1, "farms": [*farms, away]}

    monkeypatch.setattr(runs, "WAIT", 0.0)
    with caplog.at_level(logging.WARNING, "agents"):
        Recorder().fit(Slow([Counter(5), Counter(5)]), nb_steps=5, verbose=0)
    lines = caplog.records[0].message.splitlines()
    assert lines[0] == "nothing came for 0 s; waiting for 1 of 22 slots"
    assert lines[1] == "  away:1: 2 slots, 1 busy; no sign for 4 s"
    assert lines[2:] == ["  a:%d: 2 slots, 1 busy" % n for n in range(7)] + ["  and 2 more farms"]


def test_the_rest_of_the_budget_goes_to_other_slots_when_one_is_lost_for_good(caplog):
    # 4 slots and 5 steps: three slots wait without an action while the last step is under way, and that one is lost.
    for each in range(1, 6):
        pool, agent = LosingPool([Counter(100, slot) for slot in range(4)], 10**9, True), Recorder()
        pool.answers = itertools.count(10**9 - each)
        agent.fit(pool, nb_steps=5, verbose=0)
        assert agent.step == len(agent.remembered) == 5
        assert len(pool.losses) == (each < 5)


def running(memory):
    """Episodes that the replay still takes for running."""
    return memory.meta()["heads"]


def assert_only_the_last_of_each_episode_is_over(found):
    """What `gather` gave, in the order of its steps."""
    over = found.terminated | found.truncated
    last = {tuple(after[:2]): row for row, after in enumerate(found.next_state[0][:, -1])}
    assert np.flatnonzero(over).tolist() == sorted(last.values())


@pytest.mark.slow
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("where", ["on_step_end", "on_episode_end", "on_action_begin", "on_step_begin"])
def test_ctrl_c_returns_the_history_and_a_further_fit_works(slots, where, learns):
    class Interrupts(rl.callbacks.Callback):
        calls = 0
        aborted = None

        def interrupt(self, *args, **kwargs):
            self.calls += 1
            if self.calls == (8 if learns else 3):
                raise KeyboardInterrupt

        def on_train_end(self, logs=None):
            self.aborted = logs["did_abort"]

    watch = Interrupts()
    setattr(watch, where, watch.interrupt)
    pool, agent = pool_of(slots), linear_agent(**SOON if learns else NEVER)
    history = agent.fit(pool, nb_steps=1000, callbacks=[watch], verbose=0)
    assert watch.aborted is True
    assert agent.step < 1000
    assert agent.training is False
    assert len(history.epoch) <= (9 if learns else 4)
    made = agent.step
    assert len(agent.memory) == made
    assert running(agent.memory) == []
    assert_only_the_last_of_each_episode_is_over(all_of(agent.memory))
    again = agent.fit(pool, nb_steps=40, callbacks=[], verbose=0)
    assert (agent.step, len(agent.memory)) == (made + 40, made + 40)
    assert len(again.epoch) > 0
    assert_only_the_last_of_each_episode_is_over(all_of(agent.memory))
    assert (agent.nb_updates > 0) == learns


@pytest.mark.slow
@EITHER_SCHEDULE
def test_an_error_in_the_environment_comes_through_and_closes_the_streams(schedule):
    class Breaks(Counter):
        def step(self, action):
            if self.total == 27:
                raise OSError("the simulator broke")
            return super().step(action)

    pool, agent = LocalPool([Counter(5), Breaks(50, 1)]), linear_agent(schedule=schedule, **SOON)
    with pytest.raises(OSError, match="the simulator broke"):
        agent.fit(pool, nb_steps=100, verbose=0)
    assert running(agent.memory) == []
    assert_only_the_last_of_each_episode_is_over(all_of(agent.memory))
    assert agent.training is False


# keras-rl's own callbacks over environments whose steps interleave.


@pytest.mark.parametrize("interval", [7, 10, 25])
def test_interval_logger_meets_its_boundaries_exactly_with_four_environments(interval, capsys):
    Recorder().fit(pool_of(4), nb_steps=100, verbose=1, log_interval=interval)  # it asserts the shape of each interval
    lines = capsys.readouterr().out.splitlines()
    begun = [line for line in lines if line.startswith("Interval")]
    assert begun == ["Interval %d (%d steps performed)" % (n // interval + 1, n) for n in range(0, 100, interval)]
    assert "loss: 0.250" in "".join(lines)


def test_episode_logger_keeps_four_environments_apart(capsys):
    Recorder().fit(pool_of(4), nb_steps=100, verbose=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "episode:" in line]
    lengths = sorted(int(line.split("episode steps:")[1].split(",")[0]) for line in lines)
    assert len(lines) >= 12
    assert set(lengths) == {5, 6, 7, 8}


def test_file_logger_writes_every_episode_with_its_number(tmp_path):
    path = tmp_path / "log.json"
    history = Recorder().fit(pool_of(4), nb_steps=100, verbose=0, callbacks=[FileLogger(str(path), interval=3)])
    data = json.loads(path.read_text())
    assert data["episode"] == sorted(history.epoch)
    assert data["loss"] == [0.25] * len(history.epoch)
    by_number = dict(zip(history.epoch, history.history["episode_reward"], strict=True))
    assert data["episode_reward"] == [by_number[number] for number in data["episode"]]
    assert set(data["farm"]) == {"local"}


def test_interval_checkpoint_saves_weights_at_its_steps(tmp_path):
    agent = linear_agent(**NEVER)
    saver = ModelIntervalCheckpoint(str(tmp_path / "weights_{step}.h5f"), interval=30)
    agent.fit(pool_of(4), nb_steps=100, verbose=0, callbacks=[saver])
    made = sorted(path.name for path in tmp_path.iterdir())
    # Counter's observations have no bounds: they are normalised, and the networks mean nothing without the statistics.
    parts = ("actor.weights.h5", "critic.weights.h5", "observations.npz")
    assert made == sorted("weights_%d_%s" % (n, part) for n in (30, 60, 90) for part in parts)


def test_test_logger_prints_every_episode_once(capsys):
    Recorder().test(pool_of(4), nb_episodes=6, visualize=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Testing for 6 episodes ..."
    assert sorted(line.split(":")[0] for line in lines[1:]) == ["Episode %d" % n for n in range(1, 7)]


def test_episodes_are_printed_when_a_training_is_measured_in_them(capsys):
    Recorder().fit(pool_of(3), nb_steps=None, nb_episodes=5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["episode %d/5" % n for n in range(1, 6)]


def test_history_has_the_number_and_the_slot_of_every_episode():
    pool = pool_of(4)
    history = Recorder().fit(pool, nb_steps=120, verbose=0)
    for number, slot, steps in zip(
        history.epoch, history.history["slot"], history.history["nb_episode_steps"], strict=True
    ):
        assert steps == 5 + slot
        assert 0 <= number < sum(env.episode for env in pool.envs)
    assert len(set(history.epoch)) == len(history.epoch)


def test_a_callback_learns_of_every_step_in_a_whole_sequence_of_its_own():
    events = Events()
    Recorder().fit(pool_of(3), nb_steps=40, verbose=0, callbacks=[events])
    steps = [event for event in events.seen if event[0].split()[0] in ("step", "action")]
    assert [event[0] for event in steps] == ["step begins", "action begins", "action ends", "step ends"] * 40
    assert all(begin[1] == end[1] for begin, end in zip(steps[::4], steps[3::4], strict=True))
    running, counts = set(), {}
    for event in events.seen:
        if event[0] == "episode begins":
            running.add(event[1])
        elif event[0] == "episode ends":
            running.remove(event[1])
        elif event[0] == "step ends":
            assert event[2] in running
            assert event[1] == counts.get(event[2], 0)
            counts[event[2]] = event[1] + 1


# Processors.


class Doubles(rl.core.Processor):
    """The agent thinks in [-2, 2] and in thousandths, the environment in [-1, 1] and ones."""

    def process_observation(self, observation):
        return observation / 1000

    def process_reward(self, reward):
        return -reward

    def process_action(self, action):
        return action / 2


def test_a_processor_stands_between_the_agent_and_every_environment():
    pool, agent = pool_of(3), linear_agent(processor=Doubles(), **NEVER)
    for model in (agent.actor, agent.target_actor):
        model.set_weights([0 * weight if weight.ndim == 2 else 0 * weight + 1.5 for weight in model.get_weights()])
    agent.fit(pool, nb_steps=40, verbose=0)
    found = all_of(agent.memory)
    assert (found.action == 1.5).all(), "the replay must hold what the agent chose"
    assert all(row[1] == 0.75 for env in pool.envs for row in env.log)
    assert (found.reward < 0).all()
    assert found.next_state[0].max() < 1


def test_a_processor_that_ends_an_episode_begins_another():
    class Stops(rl.core.Processor):
        def process_step(self, observation, reward, done, info):
            return observation, reward, done or observation[2] >= 3, info

    pool, agent = pool_of(2, length=50), Recorder(Stops())
    history = agent.fit(pool, nb_steps=None, nb_episodes=6, verbose=0)
    assert history.history["nb_episode_steps"] == [3] * 6
    assert sum(row[5] for row in agent.remembered) == 6


# test()


def test_test_plays_exactly_its_episodes_without_noise_and_stores_nothing():
    noise = OrnsteinUhlenbeckProcess(theta=0.15, sigma=5.0)
    pool, agent = pool_of(4), linear_agent(random_process=noise, **NEVER)
    agent.fit(pool, nb_steps=20, verbose=0)
    before = [*stored(agent.memory)]
    drawn, seen = noise.n_steps, agent.norm.state()
    for env in pool.envs:
        env.log.clear()
    history = agent.test(pool, nb_episodes=9, visualize=False, verbose=0)
    assert len(history.epoch) == 9
    assert sum(steps for steps in history.history["nb_steps"]) == sum(len(env.log) for env in pool.envs)
    assert stored(agent.memory) == before
    assert (agent.step, noise.n_steps) == (20, drawn)
    assert agent.norm.count == seen["count"] > 20, "and the mean of the observations stays as it was learnt from"
    states = np.array([row[0] for env in pool.envs for row in env.log])[:, None]
    actions = np.array([row[1] for env in pool.envs for row in env.log])
    spread = np.sqrt(seen["square/0"] / seen["count"] + 1e-8)
    normal = np.clip((states - seen["mean/0"]) / spread, -10, 10).astype(np.float32)
    np.testing.assert_allclose(actions, np.clip(agent.actor(normal), -1, 1), atol=1e-5)


def test_test_takes_a_limit_of_steps_and_a_single_environment():
    env = Counter(100)
    history = Recorder().test(env, nb_episodes=2, nb_max_episode_steps=7, visualize=False, verbose=0)
    assert history.history["nb_steps"] == [7, 7]
    assert env.total == 14


def test_visualize_renders_after_each_action():
    class Shows(Counter):
        shown = 0

        def render(self):
            self.shown += 1

    env = Shows(5)
    Recorder().fit(env, nb_steps=8, visualize=True, verbose=0)
    assert env.shown == env.total == 8


# A caller's mistakes.


def test_something_that_is_neither_environment_nor_pool_is_refused():
    for wrong in (object(), None, 3, [Counter()]):
        with pytest.raises(TypeError, match=r"is no environment"):
            Recorder().fit(wrong, nb_steps=5)
    with pytest.raises(ValueError, match=r"not \[\]"):
        LocalPool([])


def test_an_agent_that_is_not_compiled_is_refused():
    agent = Recorder()
    agent.compiled = False
    with pytest.raises(RuntimeError, match=r"compile\(\) before fit"):
        agent.fit(Counter(), nb_steps=5)
    with pytest.raises(RuntimeError, match=r"compile\(\) before test"):
        agent.test(Counter())


@pytest.mark.parametrize(
    "wrong",
    [
        {"nb_steps": 0},
        {"nb_steps": -5},
        {"nb_steps": 2.5},
        {"nb_steps": True},
        {"nb_steps": None},
        {"nb_steps": 5, "nb_episodes": 5},
        {"nb_steps": None, "nb_episodes": 0},
        {"nb_steps": 5, "action_repetition": 0},
        {"nb_steps": "x"},
        {"nb_steps": float("inf")},
        {"nb_steps": 5, "nb_max_episode_steps": -3},
        {"nb_steps": 5, "nb_max_start_steps": -1},
    ],
)
def test_counts_that_make_no_sense_are_refused_before_anything_is_sent(wrong):
    env = Counter()
    with pytest.raises(ValueError, match=r"not "):
        Recorder().fit(env, **wrong)
    assert env.episode == 0


def test_keras_rls_memory_is_refused_for_several_environments_before_anything_is_sent():
    pool, agent = pool_of(2), linear_agent(memory=SequentialMemory(100, window_length=1))
    with pytest.raises(ValueError, match=r"2 environments would be mixed up"):
        agent.fit(pool, nb_steps=5)
    assert pool.envs[0].episode == 0


@pytest.mark.parametrize("wrap", [lambda envs: envs, lambda envs: LocalPool([envs])])
def test_a_gymnasium_vector_env_is_refused_with_what_to_give_instead(wrap):
    envs = gymnasium.vector.SyncVectorEnv([Counter, Counter])
    with pytest.raises(TypeError, match=r"(?s)VectorEnv is not taken: SyncVectorEnv.*farmer.Farmer.*agents.LocalPool"):
        linear_agent().fit(wrap(envs), nb_steps=5)
    envs.close()


class Odd(Counter):
    """Gives other observations than it says, from its reset or its first step on."""

    at = "reset"

    def _observation(self):
        return np.zeros(7, np.float32) if self.at == "reset" or self.made else super()._observation()


@pytest.mark.parametrize("at", ["reset", "step"])
@pytest.mark.parametrize("slots", [1, 2])
def test_observations_of_another_shape_are_refused_with_both_shapes(at, slots):
    pool = LocalPool([Odd() for _ in range(slots)])
    for env in pool.envs:
        env.at = at
    words = (
        r"shape \(7,\) \(\(1, 7\) with window_length 1 first\) .* takes \(1, 3\)\n.* observation_space is Box\(0.0, inf"
    )
    with pytest.raises(ValueError, match=words):
        linear_agent().fit(pool, nb_steps=5, verbose=0)


def test_forward_refuses_an_observation_of_another_shape():
    with pytest.raises(ValueError, match=r"observation of shape \(7,\) .* takes \(1, 3\)$"):
        linear_agent().forward(np.zeros(7))


def test_a_step_of_three_values_is_refused_with_what_it_must_return():
    class Three(Counter):
        def step(self, action):
            return super().step(action)[:3]

    with pytest.raises(
        ValueError, match=r"step returned 3 values\n  wanted: observation, reward, terminated, truncated"
    ):
        Recorder().fit(Three(), nb_steps=5, verbose=0)


@pytest.mark.parametrize(
    ("memory", "most"),
    [(SequentialMemory(limit=5, window_length=1), 3), (ReplayMemory(9), 8), (SequentialMemory(10, window_length=1), 8)],
)
def test_a_memory_that_can_never_hold_a_batch_is_told_before_training(memory, most):
    agent = linear_agent(memory=memory, batch_size=8)
    with pytest.warns(UserWarning, match=rf"nothing will be learnt: .* 9 transitions .* more than {most}\n"):
        agent.fit(Counter(40), nb_steps=30, verbose=0)
    assert len(store_of(memory, 1)) == most


@pytest.mark.slow
@pytest.mark.parametrize("memory", [SequentialMemory(11, window_length=1), ReplayMemory(10)])
def test_a_memory_that_just_holds_a_batch_is_learnt_from_without_a_warning(memory):
    agent = linear_agent(memory=memory, **dict(SOON, batch_size=8))
    agent.fit(Counter(40), nb_steps=30, verbose=0)
    assert agent.nb_updates > 0
