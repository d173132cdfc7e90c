"""What a keras-rl user may rely on: keras-rl's order of events, its keywords, and whole scripts written for it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import textwrap

import gymnasium
import keras
import numpy as np
import pytest
import rl.callbacks
import rl.core
from agent_parts import Counter, OldCounter, Recorder, linear_agent
from keras_rl_parts import Script, TapedProcessor, both, plain, same
from rl.callbacks import FileLogger, ModelIntervalCheckpoint
from rl.memory import SequentialMemory
from rl.processors import MultiInputProcessor, WhiteningNormalizerProcessor
from rl.random import GaussianWhiteNoiseProcess, OrnsteinUhlenbeckProcess

from agents import DDPGAgent, LocalPool, ReplayMemory

# One environment: every event in keras-rl's order.


def assert_alike(method, script=None, **keywords):
    """Every event, the History, what is printed and what is warned of."""
    theirs, ours = both(method, script, **keywords)
    same(theirs, ours)
    assert {name: ours.history.get(name) for name in theirs.history} == theirs.history
    assert ours.epochs == theirs.epochs
    assert ours.text == theirs.text
    assert len(ours.warned) == len(theirs.warned)
    return ours


SOME = list(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize("verbose", [0, 1, 2])
@pytest.mark.parametrize("nb_max_episode_steps", [None, 3])
@pytest.mark.parametrize("start", [None, "random", "policy"])
@pytest.mark.parametrize("action_repetition", [1, 3])
def test_fit_of_one_environment_is_keras_rls_event_by_event(action_repetition, start, nb_max_episode_steps, verbose):
    for processor, visualize in SOME:
        run = assert_alike(
            "fit",
            Script(lengths=(9, 5, 7), processor=processor, policy=start == "policy"),
            nb_steps=20,
            action_repetition=action_repetition,
            nb_max_start_steps=4 if start else 0,
            nb_max_episode_steps=nb_max_episode_steps,
            visualize=visualize,
            verbose=verbose,
            log_interval=8,
        )
        assert len(run.tape) > 100


def test_a_limit_of_no_steps_is_none():
    assert_alike("fit", Script(lengths=(9, 5, 7)), nb_steps=20, nb_max_episode_steps=0, verbose=0)
    assert_alike("test", Script(lengths=(9, 5)), nb_episodes=2, nb_max_episode_steps=0, verbose=0)


@pytest.mark.slow
@pytest.mark.parametrize("verbose", [0, 1, 2])
@pytest.mark.parametrize("nb_max_episode_steps", [None, 3])
@pytest.mark.parametrize("start", [None, "random", "policy"])
@pytest.mark.parametrize("action_repetition", [1, 3])
def test_test_of_one_environment_is_keras_rls_event_by_event(action_repetition, start, nb_max_episode_steps, verbose):
    for processor, visualize in SOME:
        run = assert_alike(
            "test",
            Script(lengths=(9, 5, 7), processor=processor, policy=start == "policy"),
            nb_episodes=4,
            action_repetition=action_repetition,
            nb_max_start_steps=4 if start else 0,
            nb_max_episode_steps=nb_max_episode_steps,
            visualize=visualize,
            verbose=verbose,
        )
        assert len(run.tape) > 50


@pytest.mark.parametrize("method", ["fit", "test"])
def test_an_episode_that_start_steps_end_begins_again_under_its_number_with_a_warning(method):
    amount = {"nb_steps": 30} if method == "fit" else {"nb_episodes": 4, "visualize": False}
    run = assert_alike(method, Script(lengths=(2, 7), policy=True), nb_max_start_steps=5, verbose=0, **amount)
    assert all("nb_max_start_steps" in text for text in run.warned)
    assert run.warned


def only_at_the_end(step, done):
    return {"x": step / 8, "solved": 1.0} if done else {"x": step / 8}


def of_all_kinds(step, done):
    return {"flag": step > 2, "narrow": np.float32(2), "whole": np.array(3), "int": 4}


@pytest.mark.parametrize("action_repetition", [1, 3])
@pytest.mark.parametrize("info", [only_at_the_end, of_all_kinds])
def test_infos_are_summed_over_frames_and_reach_callbacks_whenever_they_come(info, action_repetition):
    assert_alike("fit", Script(info=info), nb_steps=12, action_repetition=action_repetition, verbose=0)


class Hurries(TapedProcessor):
    """Ends an episode that the environment would go on with."""

    def process_step(self, observation, reward, done, info):
        observation, reward, done, info = super().process_step(observation, reward, done, info)
        return observation, reward, done or reward >= 1, info


class Lingers(TapedProcessor):
    """Goes on with an episode that the environment ended."""

    def process_step(self, observation, reward, done, info):
        observation, reward, _, info = super().process_step(observation, reward, done, info)
        return observation, reward, False, info


@pytest.mark.parametrize("action_repetition", [1, 3])
@pytest.mark.parametrize("kind", [Hurries, Lingers])
def test_an_episode_is_over_when_the_processor_says_so(kind, action_repetition):
    script = Script(processor=True, processor_type=kind, lengths=(6,))
    assert_alike("fit", script, nb_steps=16, nb_max_episode_steps=8, action_repetition=action_repetition, verbose=0)


@pytest.mark.parametrize("verbose", [0, 1, 2])
@pytest.mark.parametrize(
    "interrupt",
    [
        ("on_step_end", 7),
        ("on_step_begin", 7),
        ("on_action_begin", 7),
        ("on_action_end", 7),
        ("on_episode_end", 1),
        ("on_episode_begin", 2),
    ],
)
def test_ctrl_c_in_a_callback_ends_fit_where_it_ends_keras_rls(interrupt, verbose):
    run = assert_alike("fit", Script(interrupt=interrupt), nb_steps=20, verbose=verbose)
    assert run.tape[-1] == ("on_train_end", {"did_abort": 1.0})


def test_ctrl_c_in_a_test_ends_it_and_returns_what_was_played():
    # keras-rl raises KeyboardInterrupt out of `test`, without on_train_end; ours ends as `fit` does.
    with pytest.raises(KeyboardInterrupt):
        both("test", Script(interrupt=("on_episode_end", 2)), nb_episodes=4, visualize=False, verbose=0)

    class Stops(rl.callbacks.Callback):
        ended = None

        def on_episode_end(self, episode, logs=None):
            if episode == 1:
                raise KeyboardInterrupt

        def on_train_end(self, logs=None):
            self.ended = logs

    stops = Stops()
    history = Recorder().test(OldCounter(5), 4, callbacks=[stops], visualize=False, verbose=0)
    assert stops.ended == {"did_abort": True}
    assert history.history["nb_steps"][:1] == [5]


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_a_fit_of_many_episodes_prints_and_records_what_keras_rls_does(verbose):
    run = assert_alike("fit", Script(lengths=(5, 3, 8, 1)), nb_steps=300, verbose=verbose, log_interval=70)
    assert len(run.history["episode_reward"]) > 60


def test_keras_own_callbacks_are_called_as_keras_rl_calls_them():
    def made():
        begun, ended = [], []
        callback = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: begun.append(int(epoch)),
            on_epoch_end=lambda epoch, logs: ended.append((int(epoch), plain(logs)["episode_reward"])),
            on_train_batch_end=lambda batch, logs: ended.append(int(batch)),
        )
        seen.append((begun, ended))
        return callback

    seen = []
    assert_alike("fit", Script(also=(made,)), nb_steps=13, verbose=0)
    theirs, ours = seen
    assert ours == theirs
    assert theirs[0] == [0, 1, 2]


class Remembers(rl.callbacks.Callback):
    """Keeps what it was given of the run as a whole."""

    def on_train_begin(self, logs=None):
        self.given = self.env, self.model, dict(self.params)


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_callbacks_have_the_agent_the_environment_and_the_parameters(verbose):
    env, agent, callback = OldCounter(5), Recorder(), Remembers()
    agent.fit(env, 7, callbacks=[callback], verbose=verbose)
    assert callback.given == (env, agent, {"nb_steps": 7})
    agent.test(env, 2, callbacks=[callback], visualize=False, verbose=verbose)
    assert callback.given == (env, agent, {"nb_episodes": 2})


@pytest.mark.parametrize("modes", ["required", "default", "none"])
def test_visualize_renders_for_people_in_any_gym(modes):
    rendered = []

    class Required(OldCounter):
        def render(self, mode):
            rendered.append(mode)

    class Default(OldCounter):
        def render(self, mode="human", close=False):
            rendered.append(mode)

    class Gymnasiums(Counter):
        def render(self):
            rendered.append("human")

    env = {"required": Required, "default": Default, "none": Gymnasiums}[modes](5)
    Recorder().fit(env, 7, visualize=True, verbose=0)
    Recorder().test(env, 1, verbose=0)  # keras-rl's `test` renders unless told otherwise
    assert rendered == ["human"] * 12


@pytest.mark.parametrize("method", ["fit", "test"])
def test_arguments_may_be_given_by_position_in_keras_rls_order(method):
    seen = Remembers()
    if method == "fit":
        history = Recorder().fit(OldCounter(9), 12, 1, [seen], 0, False, 0, None, 10000, 4)
        assert history.history["nb_episode_steps"] == [4, 4, 4]
    else:
        history = Recorder().test(OldCounter(9), 3, 1, [seen], False, 4, 0, None, 0)
        assert history.history["nb_steps"] == [4, 4, 4]
    assert seen.given


@pytest.mark.parametrize(
    ("method", "keywords"), [("fit", {"nb_steps": 5}), ("test", {"nb_episodes": 1, "visualize": False})]
)
def test_what_keras_rl_refuses_is_refused(method, keywords):
    with pytest.raises(ValueError, match="action_repetition"):
        getattr(Recorder(), method)(OldCounter(5), action_repetition=0, **keywords)
    agent = Recorder()
    agent.compiled = False
    with pytest.raises(RuntimeError, match="compile"):
        getattr(agent, method)(OldCounter(5), **keywords)


@pytest.mark.parametrize(("method", "name"), [("fit", "nb_steps"), ("test", "nb_episodes")])
def test_nothing_to_do_is_refused_where_keras_rl_returns_an_empty_history(method, name):
    with pytest.raises(ValueError, match=name):
        getattr(Recorder(), method)(OldCounter(5), **{name: 0}, verbose=0)


# Several environments: the same callbacks, episode by episode.


class Notes(rl.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_episode_begin(self, episode, logs=None):
        self.seen.append(("begin", episode, logs["slot"], logs["farm"]))

    def on_step_begin(self, step, logs=None):
        self.seen.append(("step", step))

    def on_action_begin(self, action, logs=None):
        self.seen.append(("action", plain(action)))

    def on_action_end(self, action, logs=None):
        self.seen.append(("acted", plain(action)))

    def on_step_end(self, step, logs=None):
        self.seen.append(("end of step", step, logs["episode"], logs["slot"], logs["farm"], plain(logs["action"])))

    def on_episode_end(self, episode, logs=None):
        self.seen.append(("end", episode, logs["slot"], logs["farm"], logs["nb_episode_steps"]))


def farm_of(number, length=5):
    return LocalPool([Counter(length + slot, slot) for slot in range(number)])


def test_every_event_of_a_farm_names_its_slot_and_farm_and_keeps_an_episodes_order():
    notes = Notes()
    Recorder().fit(farm_of(3), 60, callbacks=[notes], verbose=0)
    at, steps, open_episodes = {}, {}, set()
    for number, event in enumerate(notes.seen):
        if event[0] == "begin":
            assert event[1] not in at, "an episode's number is its own"
            at[event[1]], steps[event[1]] = event[2:4], 0
            open_episodes.add(event[1])
        elif event[0] == "end of step":
            _, step, episode, slot, farm, action = event
            assert at[episode] == (slot, farm)
            assert step == steps[episode]
            assert notes.seen[number - 3 : number] == [("step", step), ("action", action), ("acted", action)]
            steps[episode] += 1
        elif event[0] == "end":
            assert event[2:4] == at[event[1]]
            assert event[4] == steps[event[1]] == 5 + event[2]
            open_episodes.remove(event[1])
    assert len(open_episodes) <= 3
    assert sum(steps.values()) == 60


@pytest.mark.parametrize("slots", [1, 4])
def test_keras_rls_loggers_are_fed_by_a_farm(slots, tmp_path, capsys):
    saved = []

    class Saves(Recorder):
        def save_weights(self, filepath, overwrite=False):
            saved.append((filepath, overwrite))

    path = tmp_path / "log.json"
    callbacks = [FileLogger(str(path), interval=3), ModelIntervalCheckpoint(str(tmp_path / "w_{step}.h5f"), 25)]
    history = Saves().fit(farm_of(slots), 80, callbacks=callbacks, verbose=2)
    data = json.loads(path.read_text())
    assert data["episode"] == sorted(history.epoch)
    assert len(data["episode"]) == len(set(data["episode"])) > 5
    for name in ("episode_reward", "nb_episode_steps", "slot", "farm", "loss", "duration"):
        assert len(data[name]) == len(data["episode"]) == len(history.epoch)
    assert saved == [(str(tmp_path / ("w_%d.h5f" % step)), True) for step in (25, 50, 75)]
    lines = capsys.readouterr().out.splitlines()
    assert sum("episode reward:" in line for line in lines) == len(history.epoch)
    assert all("/80: episode: " in line for line in lines[1:-1])


@pytest.mark.parametrize("slots", [2, 5])
def test_start_steps_visualize_and_limits_hold_for_every_slot(slots):
    asked, rendered = [], []
    pool = farm_of(slots, 30)
    pool.render = lambda: rendered.append(1)

    def policy(observation):
        asked.append(observation)
        return np.float32([-0.25])

    np.random.seed(2)
    history = Recorder().fit(
        pool,
        60,
        nb_max_start_steps=4,
        start_step_policy=policy,
        nb_max_episode_steps=6,
        action_repetition=2,
        visualize=True,
        verbose=0,
    )
    assert set(history.history["nb_episode_steps"]) == {6}
    assert {int(obs[0]) for obs in asked} == set(range(slots))
    assert len(rendered) == 60
    assert sum(env.total for env in pool.envs) == 2 * (60 + len(asked))


# Every keyword of the constructor.


def zeroed(agent, bias=0.0):
    """Networks that give 0, a target critic that gives `bias`: losses can be written down."""
    for model in (agent.actor, agent.critic, agent.target_actor, agent.target_critic):
        model.set_weights([0 * weight for weight in model.get_weights()])
    agent.target_critic.set_weights([*agent.target_critic.get_weights()[:-1], np.float32([bias])])
    return agent


def fed(agent, number=20, reward=2.0):
    """The same unfinished transition many times."""
    for _ in range(number):
        agent.memory.add(0, np.ones(3), np.zeros(agent.nb_actions), reward, np.ones(3), False, False)
    agent.step = 10**6
    return agent


def first_loss(**settings):
    agent = fed(zeroed(linear_agent(**settings), bias=4.0))
    return agent.update()[0]


def test_nb_actions_is_the_length_of_an_action():
    agent = linear_agent(nb_actions=3)
    assert agent.nb_actions == 3
    assert agent.forward(np.zeros(3)).shape == (3,)
    with pytest.raises(ValueError, match="one value an action"):
        DDPGAgent(2, agent.actor, agent.critic, agent.critic_action_input, SequentialMemory(9, window_length=1))


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_actor_critic_and_critic_action_input_are_the_users_in_any_order(place):
    seen, action, state = keras.Input((1, 3)), keras.Input((1,)), keras.Input((1, 3))
    actor = keras.Model(seen, keras.layers.Dense(1)(keras.layers.Flatten()(seen)))
    inputs = [state]
    inputs.insert(place, action)
    value = keras.layers.Dense(1)(keras.layers.Concatenate()([action, keras.layers.Flatten()(state)]))
    critic = keras.Model(inputs, value)
    memory = SequentialMemory(limit=100, window_length=1)
    agent = DDPGAgent(
        nb_actions=1, actor=actor, critic=critic, critic_action_input=action, memory=memory, batch_size=4,
        nb_steps_warmup_critic=8, nb_steps_warmup_actor=8,
    )  # fmt: skip
    assert (agent.actor, agent.critic, agent.memory) == (actor, critic, memory)
    assert agent.critic_action_input is action
    assert agent.critic_action_input_idx == place
    agent.compile("adam")
    agent.fit(OldCounter(7), 20, verbose=0)
    assert agent.nb_updates == 12


def test_memory_keeps_what_happened_and_gives_the_batches():
    memory = SequentialMemory(limit=50, window_length=1)
    agent = linear_agent(memory=memory, nb_steps_warmup_critic=10**9, nb_steps_warmup_actor=10**9)
    agent.fit(OldCounter(100), 30, verbose=0)
    assert [float(obs[2]) for obs in memory.observations][:30] == list(range(30))
    assert list(memory.rewards)[:30] == [float(number) for number in range(1, 31)]
    agent.fit(OldCounter(100), 80, verbose=0)
    assert memory.nb_entries == 50


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_gamma_discounts_what_follows(gamma):
    assert first_loss(gamma=gamma) == pytest.approx(0.5 * (2 + gamma * 4) ** 2, rel=1e-5)


def test_batch_size_is_what_memory_is_asked_for():
    asked = []

    class Asked(SequentialMemory):
        def sample(self, batch_size, batch_idxs=None):
            asked.append(batch_size)
            return super().sample(batch_size, batch_idxs)

    agent = linear_agent(
        memory=Asked(500, window_length=1), batch_size=7, nb_steps_warmup_critic=10, nb_steps_warmup_actor=10
    )
    agent.fit(OldCounter(9), 30, verbose=0)
    assert set(asked) == {7}
    assert len(asked) == agent.nb_updates == 20


@pytest.mark.slow
@pytest.mark.parametrize(("critic", "actor"), [(8, 20), (20, 8), (0, 0)])
def test_warm_ups_hold_each_network_back_for_themselves(critic, actor):
    agent = linear_agent(
        batch_size=2,
        memory=SequentialMemory(500, window_length=1),
        nb_steps_warmup_critic=critic,
        nb_steps_warmup_actor=actor,
    )
    first = {}

    class Watch(rl.callbacks.Callback):
        def on_step_end(self, step, logs=None):
            for name, model in (("actor", agent.actor), ("critic", agent.critic)):
                if any((x != y).any() for x, y in zip(model.get_weights(), begun[name], strict=True)):
                    first.setdefault(name, agent.step)

    begun = {"actor": agent.actor.get_weights(), "critic": agent.critic.get_weights()}
    agent.fit(OldCounter(50), 40, callbacks=[Watch()], verbose=0)
    # Neither before there is a batch.
    assert first == {"critic": max(critic + 1, 5), "actor": max(actor + 1, 5)}


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 3])
def test_train_interval_is_the_steps_of_an_update(interval):
    agent = linear_agent(
        batch_size=4,
        memory=SequentialMemory(500, window_length=1),
        train_interval=interval,
        nb_steps_warmup_critic=10,
        nb_steps_warmup_actor=10,
    )
    agent.fit(OldCounter(50), 40, verbose=0)
    assert agent.nb_updates == 30 // interval


@pytest.mark.parametrize("interval", [1, 4])
def test_memory_interval_is_the_steps_of_a_stored_one(interval):
    agent = linear_agent(memory_interval=interval, nb_steps_warmup_critic=10**9, nb_steps_warmup_actor=10**9)
    agent.fit(OldCounter(100), 40, verbose=0)
    assert len(agent.memory) == 40 // interval


@pytest.mark.slow
def test_delta_clip_makes_the_loss_linear_beyond_it():
    error = 2 + 0.99 * 4
    assert first_loss() == pytest.approx(0.5 * error**2, rel=1e-5)
    assert first_loss(delta_clip=1.0) == pytest.approx(error - 0.5, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*delta_range")
def test_delta_range_is_delta_clips_former_name():
    assert first_loss(delta_range=(-1.0, 1.0)) == first_loss(delta_clip=1.0)


def test_delta_range_warns():
    with pytest.warns(UserWarning, match="delta_range"):
        linear_agent(delta_range=(-1.0, 1.0))


class Told(OrnsteinUhlenbeckProcess):
    """Notes how it is called."""

    calls = None

    def reset_states(self):
        super().reset_states()
        self.calls = [*(self.calls or []), "reset"]

    def sample(self):
        self.calls.append("sample")
        return super().sample()


NEVER = {"nb_steps_warmup_critic": 10**9, "nb_steps_warmup_actor": 10**9}


@pytest.mark.parametrize("kind", [OrnsteinUhlenbeckProcess, GaussianWhiteNoiseProcess])
def test_random_process_is_added_in_training_and_anneals_by_steps(kind):
    settings = {"theta": 0.15} if kind is OrnsteinUhlenbeckProcess else {}
    process = kind(size=2, mu=0.0, sigma=0.8, sigma_min=0.2, n_steps_annealing=40, **settings)
    agent = linear_agent(nb_actions=2, random_process=process, **NEVER)
    assert agent.random_process is process
    env = Counter(8)
    env.action_space = gymnasium.spaces.Box(-100, 100, (2,))
    zeroed(agent).fit(env, 20, verbose=0)
    assert all(np.abs(row[1]).min() > 0 for row in env.log)
    assert process.n_steps == 20
    assert process.current_sigma == pytest.approx(0.5)
    agent.fit(env, 30, verbose=0)
    assert process.current_sigma == 0.2
    env.log.clear()
    agent.test(env, 1, visualize=False, verbose=0)
    assert all(np.abs(row[1]).max() == 0 for row in env.log)
    assert process.n_steps == 50


def test_random_process_of_one_environment_is_the_users_own_and_begins_with_each_episode():
    process = Told(theta=0.15)
    agent = linear_agent(random_process=process, **NEVER)
    agent.fit(OldCounter(5), 12, verbose=0)
    calls = " ".join(process.calls[process.calls.index("sample") - 1 :])
    episode = "reset" + 5 * " sample"
    assert calls == " ".join([episode, episode, "reset sample sample"])


@keras.saving.register_keras_serializable("test")
class Known(keras.layers.Dense):
    pass


class Doubles(keras.layers.Layer):
    def call(self, x):
        return 2 * x


def double(x):
    return 2 * x


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Doubles, Known, "function"])
def test_custom_model_objects_are_in_the_networks_and_their_targets(kind):
    observation = keras.Input((1, 3))
    x = keras.layers.Flatten()(observation)
    made = {Doubles: Doubles, Known: lambda: Known(4), "function": lambda: keras.layers.Dense(4, activation=double)}
    actor = keras.Model(observation, keras.layers.Dense(1)(made[kind]()(x)))
    critic = linear_agent().critic
    objects = {"Doubles": Doubles, "Known": Known, "double": double}
    agent = DDPGAgent(1, actor, critic, critic.inputs[0], ReplayMemory(99), custom_model_objects=objects, batch_size=4)
    agent.compile("sgd")
    assert [type(layer) for layer in agent.target_actor.layers] == [type(layer) for layer in actor.layers]
    seen = np.ones((2, 1, 3), np.float32)
    np.testing.assert_allclose(agent.target_actor(seen), actor(seen))
    assert np.isfinite(fed(agent).update()).all()


def test_target_model_update_below_one_is_a_share_of_each_update():
    agent = fed(linear_agent(target_model_update=0.25))
    for model, target in ((agent.actor, "target_actor"), (agent.critic, "target_critic")):
        model.set_weights([weight + 1 for weight in model.get_weights()])
        assert not np.allclose(model.get_weights()[0], getattr(agent, target).get_weights()[0])
    before = [model.get_weights() for model in (agent.target_actor, agent.target_critic)]
    agent.update()
    for model, target, old in zip(
        (agent.actor, agent.critic), (agent.target_actor, agent.target_critic), before, strict=True
    ):
        for new, mine, was in zip(model.get_weights(), target.get_weights(), old, strict=True):
            np.testing.assert_allclose(mine, was + 0.25 * (new - was), rtol=1e-5)


def test_target_model_update_from_one_is_the_steps_between_copies():
    agent = fed(linear_agent(target_model_update=3))
    alike = []
    for _ in range(7):
        agent.update()
        pairs = zip(agent.critic.get_weights(), agent.target_critic.get_weights(), strict=True)
        alike.append(all(np.array_equal(*pair) for pair in pairs))
    assert alike == [False, False, True, False, False, True, False]
    with pytest.raises(ValueError, match="target_model_update"):
        linear_agent(target_model_update=-1)


class Halves(rl.core.Processor):
    metrics_names = ("halves",)
    metrics = (0.5,)

    def process_reward(self, reward):
        return reward / 2


@pytest.mark.slow
def test_processor_stands_between_agent_and_environment():
    processor = Halves()
    memory = SequentialMemory(99, window_length=1)
    agent = linear_agent(
        memory=memory, processor=processor, batch_size=4, nb_steps_warmup_critic=6, nb_steps_warmup_actor=6
    )
    assert agent.processor is processor
    assert agent.metrics_names == ["loss", "mean_q", "halves"]
    told = []

    class Metrics(rl.callbacks.Callback):
        def on_step_end(self, step, logs=None):
            told.append(logs["metrics"])

    agent.fit(OldCounter(50), 10, callbacks=[Metrics()], verbose=0)
    assert list(memory.rewards)[:10] == [number / 2 for number in range(1, 11)]
    assert all(len(values) == 3 for values in told)
    assert np.isnan(told[:6]).all()
    assert [values[-1] for values in told[6:]] == [0.5] * 4


# Every way to compile.


def rates(agent):
    return [round(float(one.learning_rate.numpy()), 6) for one in (agent.actor_optimizer, agent.critic_optimizer)]


@pytest.mark.parametrize("several", [list, tuple])
def test_compile_takes_one_optimizer_for_both_or_a_pair_or_names(several):
    adam = keras.optimizers.Adam
    agent = linear_agent(optimizer=adam(0.25, clipnorm=1.0))
    assert rates(agent) == [0.25, 0.25]
    assert agent.actor_optimizer is not agent.critic_optimizer
    assert agent.actor_optimizer.clipnorm == agent.critic_optimizer.clipnorm == 1.0
    assert rates(linear_agent(optimizer=several([adam(0.25), adam(0.5)]))) == [0.25, 0.5]
    agent = linear_agent(optimizer=several(["sgd", "adam"]))
    assert [type(one).__name__ for one in (agent.actor_optimizer, agent.critic_optimizer)] == ["SGD", "Adam"]
    agent = linear_agent(optimizer="adam")
    assert type(agent.actor_optimizer) is type(agent.critic_optimizer) is adam
    with pytest.raises(ValueError, match="pair"):
        linear_agent(optimizer=several([adam()] * 3))


def test_compiles_metrics_are_told_between_loss_and_mean_q():
    def largest(y_true, y_pred):
        return keras.ops.max(keras.ops.abs(y_true - y_pred))

    agent = fed(zeroed(linear_agent(metrics=["mae", "mse", largest]), bias=4.0))
    error = 2 + 0.99 * 4
    assert agent.metrics_names == ["loss", "mae", "mse", "largest", "mean_q"]
    np.testing.assert_allclose(agent.update(), [0.5 * error**2, error, error**2, error, 0.0], rtol=1e-5)


@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop", "Adagrad", "Nadam", "Adamax"])
def test_keras_2s_lr_is_taken_as_learning_rate_with_a_warning(name):
    from tensorflow.keras import optimizers

    kind = getattr(optimizers, name)
    with pytest.warns(UserWarning, match=name + r"\(lr=0.25\) is Keras 2's name: taken as learning_rate=0.25") as told:
        optimizer = kind(lr=0.25, clipnorm=1.0)
    assert told[0].filename == __file__
    assert rates(linear_agent(optimizer=optimizer)) == [0.25, 0.25]
    assert kind.from_config(optimizer.get_config()).clipnorm == 1.0
    with pytest.warns(UserWarning, match="`decay` is no longer supported"):
        kind(learning_rate=0.25, decay=1e-6)
    with pytest.raises(ValueError, match="learning_speed"):
        kind(learning_speed=0.25)


def test_keras_2s_way_to_write_the_default_epsilon_is_understood():
    agent = fed(linear_agent(optimizer=keras.optimizers.Adam(0.01, epsilon=None, amsgrad=False)))
    assert np.isfinite(agent.update()).all()


# Whole scripts, as they were written for keras-rl: one import is ours.


FORMER = '''
    import gymnasium as gym

    class Former:
        """Pendulum by gym's former rules."""

        def __init__(self, many=False):
            self.env, self.given = gym.make("Pendulum-v1"), None
            self.action_space, self.observation_space = self.env.action_space, self.env.observation_space

        def seed(self, seed=None):
            self.given = seed
            return [seed]

        def reset(self):
            given, self.given = self.given, None
            return self.env.reset(seed=given)[0]

        def step(self, action):
            observation, reward, terminated, truncated, info = self.env.step(action)
            if truncated:
                info["TimeLimit.truncated"] = True
            return observation, reward, terminated or truncated, info

        def render(self, mode="human"):
            assert mode == "human"

        def close(self):
            self.env.close()
'''

PENDULUM = """
    import numpy as np
    from tensorflow.keras.models import Sequential, Model
    from tensorflow.keras.layers import Dense, Activation, Flatten, Input, Concatenate
    from tensorflow.keras.optimizers import Adam

    from agents import DDPGAgent
    from rl.memory import SequentialMemory
    from rl.random import OrnsteinUhlenbeckProcess

    ENV_NAME = 'Pendulum-v0'

    # Get the environment and extract the number of actions.
    env = make()
    np.random.seed(123)
    assert len(env.action_space.shape) == 1
    nb_actions = env.action_space.shape[0]

    # Next, we build a very simple model.
    actor = Sequential()
    actor.add(Flatten(input_shape=(1,) + env.observation_space.shape))
    actor.add(Dense(16))
    actor.add(Activation('relu'))
    actor.add(Dense(16))
    actor.add(Activation('relu'))
    actor.add(Dense(nb_actions))
    actor.add(Activation('linear'))
    print(actor.summary())

    action_input = Input(shape=(nb_actions,), name='action_input')
    observation_input = Input(shape=(1,) + env.observation_space.shape, name='observation_input')
    flattened_observation = Flatten()(observation_input)
    x = Concatenate()([action_input, flattened_observation])
    x = Dense(32)(x)
    x = Activation('relu')(x)
    x = Dense(1)(x)
    x = Activation('linear')(x)
    critic = Model(inputs=[action_input, observation_input], outputs=x)
    print(critic.summary())

    # Finally, we configure and compile our agent. You can use every built-in tensorflow.keras optimizer and
    # even the metrics!
    memory = SequentialMemory(limit=100000, window_length=1)
    random_process = OrnsteinUhlenbeckProcess(size=nb_actions, theta=.15, mu=0., sigma=.3)
    agent = DDPGAgent(nb_actions=nb_actions, actor=actor, critic=critic, critic_action_input=action_input,
                      memory=memory, nb_steps_warmup_critic=100, nb_steps_warmup_actor=100,
                      random_process=random_process, gamma=.99, target_model_update=1e-3)
    agent.compile(Adam(lr=.001, clipnorm=1.), metrics=['mae'])

    history = agent.fit(env, nb_steps=450, visualize=True, verbose=1, nb_max_episode_steps=200)

    # After training is done, we save the final weights.
    agent.save_weights('ddpg_{}_weights.h5f'.format(ENV_NAME), overwrite=True)

    # Finally, evaluate our algorithm for 5 episodes.
    agent.test(env, nb_episodes=2, visualize=True, nb_max_episode_steps=200)
"""

MUJOCO = """
    import numpy as np
    from tensorflow.keras.models import Sequential, Model
    from tensorflow.keras.layers import Dense, Activation, Flatten, Input, Concatenate
    from tensorflow.keras.optimizers import Adam

    from agents import DDPGAgent
    from rl.processors import WhiteningNormalizerProcessor
    from rl.memory import SequentialMemory
    from rl.random import OrnsteinUhlenbeckProcess


    class MujocoProcessor(WhiteningNormalizerProcessor):
        def process_action(self, action):
            return np.clip(action, -1., 1.)

        def process_reward(self, reward):
            return np.clip(reward, -1., 1.)


    env = Former()
    np.random.seed(123)
    env.seed(123)
    assert len(env.action_space.shape) == 1
    nb_actions = env.action_space.shape[0]

    actor = Sequential()
    actor.add(Flatten(input_shape=(1,) + env.observation_space.shape))
    actor.add(Dense(40))
    actor.add(Activation('relu'))
    actor.add(Dense(nb_actions))
    actor.add(Activation('tanh'))

    action_input = Input(shape=(nb_actions,), name='action_input')
    observation_input = Input(shape=(1,) + env.observation_space.shape, name='observation_input')
    flattened_observation = Flatten()(observation_input)
    x = Dense(40)(flattened_observation)
    x = Activation('relu')(x)
    x = Concatenate()([x, action_input])
    x = Dense(30)(x)
    x = Activation('relu')(x)
    x = Dense(1)(x)
    x = Activation('linear')(x)
    critic = Model(inputs=[action_input, observation_input], outputs=x)

    memory = SequentialMemory(limit=100000, window_length=1)
    random_process = OrnsteinUhlenbeckProcess(size=nb_actions, theta=.15, mu=0., sigma=.1)
    agent = DDPGAgent(nb_actions=nb_actions, actor=actor, critic=critic, critic_action_input=action_input,
                      memory=memory, nb_steps_warmup_critic=100, nb_steps_warmup_actor=100,
                      random_process=random_process, gamma=.99, target_model_update=1e-3,
                      processor=MujocoProcessor())
    agent.compile([Adam(lr=1e-4), Adam(lr=1e-3)], metrics=['mae'])
    history = agent.fit(env, nb_steps=450, visualize=False, verbose=2)
    agent.test(env, nb_episodes=1, visualize=True, nb_max_episode_steps=50)
"""

TWO_INPUTS = '''
    import numpy as np
    from tensorflow.keras.models import Model
    from tensorflow.keras.layers import Dense, Flatten, Input, Concatenate
    from tensorflow.keras.optimizers import Adam

    from agents import DDPGAgent
    from rl.processors import MultiInputProcessor
    from rl.memory import SequentialMemory
    from rl.random import GaussianWhiteNoiseProcess

    class Robot(Former):
        """A camera and a joint encoder."""

        def see(self, observation):
            return WRAP([np.tile(observation, SHAPE), observation[2:]])

        def reset(self):
            return self.see(super().reset())

        def step(self, action):
            observation, *rest = super().step(action)
            return (self.see(observation), *rest)

    env = Robot()
    image_shape, joint_shape = (WINDOW,) + np.tile(np.zeros(3), SHAPE).shape, (WINDOW, 1)

    def inputs():
        return [Input(shape=image_shape), Input(shape=joint_shape)]

    def merged(parts):
        return Dense(16, activation='relu')(Concatenate()([Flatten()(part) for part in parts]))

    state = inputs()
    actor = Model(inputs=state, outputs=Dense(1, activation='tanh')(merged(state)))
    action_input = Input(shape=(1,), name='action_input')
    state = inputs()
    critic = Model(inputs=[action_input] + state, outputs=Dense(1)(merged([action_input] + state)))

    memory = SequentialMemory(limit=1000, window_length=WINDOW)
    random_process = GaussianWhiteNoiseProcess(size=1, sigma=.5, sigma_min=.1, n_steps_annealing=100)
    agent = DDPGAgent(nb_actions=1, actor=actor, critic=critic, critic_action_input=action_input, memory=memory,
                      nb_steps_warmup_critic=50, nb_steps_warmup_actor=50, random_process=random_process,
                      processor=MultiInputProcessor(nb_inputs=2))
    agent.compile(Adam(lr=.001), metrics=['mae'])
    history = agent.fit(env, nb_steps=250, verbose=0)
    agent.test(env, nb_episodes=1, visualize=False, nb_max_episode_steps=20)
    agent.forward(env.reset())
'''

WINDOW = """
    import os
    import numpy as np
    from tensorflow.keras.models import Sequential, Model
    from tensorflow.keras.layers import Dense, Activation, Flatten, Input, Concatenate
    from tensorflow.keras.optimizers import Adam
    from tensorflow.keras.callbacks import LambdaCallback

    from agents import DDPGAgent
    from rl.memory import SequentialMemory
    from rl.random import OrnsteinUhlenbeckProcess
    from rl.callbacks import FileLogger, ModelIntervalCheckpoint, TrainEpisodeLogger, TrainIntervalLogger, Callback

    class EpisodeRewards(Callback):
        def on_train_begin(self, logs):
            self.rewards = []

        def on_episode_end(self, episode, logs):
            self.rewards.append(logs['episode_reward'])

    def build(shape, nb_actions):
        actor = Sequential([Flatten(input_shape=shape), Dense(16, activation='relu'), Dense(nb_actions)])
        action_input, observation_input = Input(shape=(nb_actions,)), Input(shape=shape)
        x = Concatenate()([action_input, Flatten()(observation_input)])
        x = Dense(1)(Dense(16, activation='relu')(x))
        critic = Model(inputs=[action_input, observation_input], outputs=x)
        process = OrnsteinUhlenbeckProcess(size=nb_actions, theta=.15, mu=0., sigma=.3, sigma_min=.05,
                                           n_steps_annealing=200)
        agent = DDPGAgent(nb_actions, actor, critic, action_input, SequentialMemory(limit=5000, window_length=2),
                          gamma=.95, batch_size=16, nb_steps_warmup_critic=40, nb_steps_warmup_actor=60,
                          train_interval=2, memory_interval=1, delta_clip=1., random_process=process,
                          custom_model_objects={}, target_model_update=10)
        agent.compile(Adam(lr=.001, clipnorm=1., decay=1e-6), metrics=['mae'])
        return agent

    env = make()
    shape = (2,) + env.observation_space.shape
    agent = build(shape, env.action_space.shape[0])
    rewards, epochs = EpisodeRewards(), []
    callbacks = [
        rewards,
        FileLogger('ddpg_log.json', interval=1),
        ModelIntervalCheckpoint('ddpg_weights_{step}.h5f', interval=150),
        TrainEpisodeLogger(),
        TrainIntervalLogger(interval=100),
        LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch)),
    ]
    history = agent.fit(env, nb_steps=450, callbacks=callbacks, verbose=0, action_repetition=2,
                        nb_max_start_steps=5, start_step_policy=lambda observation: env.action_space.sample(),
                        nb_max_episode_steps=60, log_interval=100)
    assert history.history['episode_reward'] == rewards.rewards
    assert len(epochs) == len(rewards.rewards) >= 7

    agent.save_weights('ddpg_x_weights.h5f', overwrite=True)
    other = build(shape, 1)
    other.load_weights('ddpg_x_weights.h5f')
    other.load_weights('ddpg_weights_300.h5f')
    other.load_weights('ddpg_x_weights.h5f')
    for mine, theirs in zip(agent.actor.get_weights() + agent.critic.get_weights(),
                            other.actor.get_weights() + other.critic.get_weights()):
        assert (mine == theirs).all()
    observation = np.zeros(env.observation_space.shape)
    assert np.allclose(agent.actor.predict(np.zeros((1,) + shape)), other.forward(observation))
    assert isinstance(agent.get_config(), dict)
    assert agent.layers == agent.actor.layers + agent.critic.layers
    assert agent.metrics_names == ['loss', 'mae', 'mean_q']
    assert agent.random_process.current_sigma == .05
    try:
        agent.save_weights('ddpg_x_weights.h5f')
    except Exception as error:
        print('refused', error)
    else:
        raise AssertionError('overwrote')
"""

of_a_script = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is Keras 2's name"),
    pytest.mark.filterwarnings("ignore:.*`decay` is no longer supported"),
    pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`"),  # Keras 3 takes it, and says so
    pytest.mark.filterwarnings("ignore:.*render method without specifying any render mode"),
]


def a_script(test):
    for mark in of_a_script:
        test = mark(test)
    return test


def run_script(text, folder, monkeypatch, **names):
    """Runs it as `__main__` in a folder; returns what it left in its names."""
    monkeypatch.chdir(folder)
    left = {"__name__": "__main__", **names}
    exec(compile(textwrap.dedent(FORMER), "former.py", "exec"), left)
    left["make"] = left["Former"] if names.get("former") else lambda: gymnasium.make("Pendulum-v1")
    exec(compile(textwrap.dedent(text), "script.py", "exec"), left)
    return left


EITHER = pytest.mark.parametrize("former", [True, False], ids=["gym", "gymnasium"])


@a_script
@EITHER
def test_the_pendulum_script_of_keras_rls_documentation_runs(former, tmp_path, monkeypatch, capsys):
    left = run_script(PENDULUM, tmp_path, monkeypatch, former=former)
    assert left["history"].history["nb_episode_steps"] == [200, 200]
    assert left["agent"].nb_updates == 350
    assert left["memory"].nb_entries >= 450
    assert list(tmp_path.glob("ddpg_Pendulum-v0_weights_actor*"))
    text = capsys.readouterr().out
    assert "Training for 450 steps ..." in text
    assert "Interval 1 (0 steps performed)" in text
    assert "Testing for 2 episodes ..." in text
    assert text.count("steps: 200") == 2


@a_script
def test_the_mujoco_script_with_a_whitening_processor_runs(tmp_path, monkeypatch, capsys):
    left = run_script(MUJOCO, tmp_path, monkeypatch)
    agent, memory = left["agent"], left["memory"]
    assert rates(agent) == [1e-4, 1e-3]
    assert agent.nb_updates == 350
    assert min(memory.rewards) == -1
    assert isinstance(agent.processor, WhiteningNormalizerProcessor)
    assert agent.processor.normalizer.mean.shape == (1, 3)
    assert agent.processor.normalizer._count > 450
    assert left["history"].history["nb_episode_steps"] == [200, 200]
    assert "450: episode: 2" in capsys.readouterr().out


@a_script
@pytest.mark.parametrize("wrap", [list, tuple])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("shape", [1, (4, 1)], ids=["vectors", "an image"])
def test_a_script_with_two_inputs_of_different_shapes_runs(shape, window, wrap, tmp_path, monkeypatch):
    left = run_script(TWO_INPUTS, tmp_path, monkeypatch, SHAPE=shape, WINDOW=window, WRAP=wrap)
    assert isinstance(left["agent"].processor, MultiInputProcessor)
    assert left["agent"].nb_updates == 200
    assert left["random_process"].current_sigma == 0.1
    assert left["history"].history["nb_episode_steps"] == [200]


@a_script
@EITHER
def test_a_script_with_windows_callbacks_and_every_keyword_runs(former, tmp_path, monkeypatch, capsys):
    left = run_script(WINDOW, tmp_path, monkeypatch, former=former)
    data = json.loads((tmp_path / "ddpg_log.json").read_text())
    assert data["episode_reward"] == left["rewards"].rewards
    assert data["nb_episode_steps"] == [60] * 7
    assert {"loss", "mae", "mean_q", "nb_steps", "episode", "duration"} <= set(data)
    for step in (150, 300, 450):
        assert len(list(tmp_path.glob("ddpg_weights_%d_*" % step))) == 2
    text = capsys.readouterr().out
    assert text.count("episode reward:") == 7
    assert "Interval 4 (300 steps performed)" in text
    assert "refused" in text


@a_script
def test_the_example_of_this_project_is_a_keras_rl_script(tmp_path, monkeypatch, capsys):
    from pathlib import Path

    text = Path(__file__).parents[1].joinpath("examples", "ddpg_pendulum.py").read_text()
    monkeypatch.setattr(sys, "argv", ["ddpg_pendulum.py", "--steps", "300"])
    assert text.count("from agents import") == text.count("import agents") + 1 == 1
    left = run_script(text, tmp_path, monkeypatch)
    assert left["agent"].step == 300
    assert list(tmp_path.glob("ddpg_pendulum_actor*"))


class Listed(OldCounter):
    """Observes a plain list of numbers, as many simulators do."""

    def reset(self):
        return super().reset().tolist()

    def step(self, action):
        obs, *rest = super().step(action)
        return obs.tolist(), *rest


@pytest.mark.slow
@pytest.mark.parametrize("spaces", [True, False])
def test_observations_may_be_plain_lists(spaces):
    memory = SequentialMemory(99, window_length=2)
    agent = linear_agent(
        window_length=2, memory=memory, batch_size=4, nb_steps_warmup_critic=8, nb_steps_warmup_actor=8
    )
    env = Listed(5)
    if not spaces:
        env.observation_space = None
    agent.fit(env, 20, verbose=0)
    assert agent.nb_updates == 12


class TwoParts(Counter):
    def reset(self, **keywords):
        obs, info = super().reset(**keywords)
        return self._both(obs), info

    def step(self, action):
        obs, *rest = super().step(action)
        return self._both(obs), *rest

    @staticmethod
    def _both(obs):
        return obs, obs[:2].reshape(2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2])
def test_two_inputs_of_different_shapes_are_fed_by_a_farm(window):
    def inputs():
        return [keras.Input((window, 3)), keras.Input((window, 2, 1))]

    def joined(parts):
        return keras.layers.Dense(1)(keras.layers.Concatenate()([keras.layers.Flatten()(part) for part in parts]))

    mine, theirs, action = inputs(), inputs(), keras.Input((1,))
    critic = keras.Model([theirs[0], action, theirs[1]], joined([theirs[0], action, theirs[1]]))
    agent = DDPGAgent(
        1,
        keras.Model(mine, joined(mine)),
        critic,
        action,
        ReplayMemory(500, window_length=window),
        batch_size=4,
        nb_steps_warmup_critic=8,
        nb_steps_warmup_actor=8,
        processor=MultiInputProcessor(2),
    )
    agent.compile("adam")
    agent.fit(LocalPool([TwoParts(5, slot) for slot in range(3)]), 60, verbose=0)
    assert len(agent.memory) == 60
    assert agent.nb_updates > 40


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_a_whitening_processor_learns_its_statistics_from_all_environments(slots):
    processor = WhiteningNormalizerProcessor()
    agent = linear_agent(processor=processor, batch_size=4, nb_steps_warmup_critic=8, nb_steps_warmup_actor=8)
    agent.fit(farm_of(slots), 60, verbose=0)
    assert processor.normalizer.mean[0, 0] == pytest.approx((slots - 1) / 2, abs=0.3)  # the number of the environment
    assert agent.nb_updates > 40


def test_an_agent_with_loaded_weights_acts_as_the_one_that_saved_them(tmp_path):
    env = OldCounter(50)
    env.action_space = gymnasium.spaces.Box(-1000, 1000, (1,))
    agent, other = linear_agent(**NEVER), linear_agent(**NEVER)
    agent.fit(env, 60, verbose=0)
    agent.save_weights(str(tmp_path / "w.h5f"))
    other.load_weights(str(tmp_path / "w.h5f"))
    seen = np.float32([0, 1, 40])
    np.testing.assert_allclose(other.forward(seen), agent.forward(seen), rtol=1e-5)


class Spaceless(OldCounter):
    """An environment of one's own, as keras-rl's `Env` describes it: it need not say its spaces."""

    def __init__(self, length):
        super().__init__(length)
        self.action_space = self.observation_space = None


def test_an_environment_that_names_no_spaces_is_trained_on():
    agent = linear_agent(memory=SequentialMemory(99, window_length=1))
    history = agent.fit(Spaceless(5), 12, verbose=0)
    assert history.history["nb_episode_steps"] == [5, 5]


class Chooses(rl.core.Processor):
    """A choice out of two, made by the sign of the action."""

    def process_action(self, action):
        return int(action[0] > 0)


class Choice(OldCounter):
    def __init__(self, length):
        super().__init__(length)
        self.action_space = gymnasium.spaces.Discrete(2)

    def step(self, action):
        assert isinstance(action, int)
        assert action in (0, 1)
        return super().step([action])


def test_a_processor_may_make_choices_of_actions():
    agent = linear_agent(memory=SequentialMemory(99, window_length=1), processor=Chooses())
    history = agent.fit(Choice(5), 12, nb_max_start_steps=3, verbose=0, start_step_policy=lambda seen: [0.5])
    assert len(history.epoch) >= 1


IMPORTS = [
    "from rl.core import Agent, Processor, Env, Space",
    "from rl.memory import SequentialMemory, Memory",
    "from rl.random import OrnsteinUhlenbeckProcess, GaussianWhiteNoiseProcess",
    "from rl.callbacks import FileLogger, ModelIntervalCheckpoint, Callback",
    "from rl.processors import MultiInputProcessor, WhiteningNormalizerProcessor",
    "from rl.util import WhiteningNormalizer, clone_model",
    "from rl.policy import EpsGreedyQPolicy, LinearAnnealedPolicy",
]
OURS = "from agents import DDPGAgent"


@pytest.mark.slow
@pytest.mark.parametrize("lines", [[OURS, *IMPORTS], [*IMPORTS, OURS], [IMPORTS[-2], OURS]])
def test_keras_rls_modules_are_imported_in_any_order(lines):
    text = "import warnings; warnings.simplefilter('ignore')\n" + "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
