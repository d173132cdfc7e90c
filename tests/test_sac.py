"""SAC's face: what its constructor takes, what its actions are, and that any network, optimizer and space works.

What both agents have in common is tried with both.
"""

from __future__ import annotations

import itertools
import math

import gymnasium
import keras
import numpy as np
import pytest
import tensorflow as tf
from learner_parts import AGENTS, Nested, Pictures, Wander, ddpg, hidden, sac, small_actor, small_critic
from rl.callbacks import Callback
from rl.memory import SequentialMemory

from agents import LocalPool, ReplayMemory, SACAgent, make_sac
from agents.offpolicy import OffPolicyAgent


def sac_models(nb_actions=1):
    """(actor, critics, action input), not in an agent yet."""
    (first, action), (second, _) = small_critic(nb_actions), small_critic(nb_actions)
    return small_actor(2 * nb_actions), [first, second], action


def weights_of(models):
    return [weight.copy() for model in models for weight in model.get_weights()]


def moved(before, models):
    return any(not np.array_equal(old, new) for old, new in zip(before, weights_of(models), strict=True))


# The constructor.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"actor": lambda: small_actor(1)},
            r"the actor must give \(None, 2\), a mean and a log deviation.*\(None, 1\)",
        ),
        ({"critics": list}, "critics must be one model or a pair, not 0"),
        ({"critics": lambda: [small_critic(1)[0] for _ in range(3)]}, "critics must be one model or a pair, not 3"),
        ({"temperature": 0.0}, r"temperature must be more than 0, not 0\.0"),
        ({"temperature": math.nan}, "temperature must be more than 0, not nan"),
        ({"target_model_update": -1}, "target_model_update must be 0 or more, not -1"),
        ({"n_step": 0}, "n_step must be a whole number from 1, not 0"),
        ({"n_step": 1.5}, r"n_step must be a whole number from 1, not 1\.5"),
        ({"schedule": "later"}, "schedule must be one of overlap, sync, not 'later'"),
        ({"updates_per_step": -2}, "updates_per_step must be a positive number, not -2"),
        ({"updates_per_step": 2.0, "train_interval": 2}, "train_interval.*or updates_per_step, not both"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_words(change, words):
    actor, critics, action = sac_models()
    arguments = {"actor": actor, "critics": critics, "critic_action_input": action, "memory": ReplayMemory(100)}
    arguments.update({name: value() if callable(value) else value for name, value in change.items()})
    with pytest.raises(ValueError, match=words):
        SACAgent(1, **arguments)


def test_critics_that_do_not_fit_each_other_or_share_weights_are_refused():
    actor, (first, _), action = sac_models()
    with pytest.raises(ValueError, match="must not share weights; give one, and the agent makes its twin"):
        SACAgent(1, actor, [first, first], action, ReplayMemory(100))
    sharing = keras.Model(first.inputs, first.output * 2.0)
    with pytest.raises(ValueError, match="must not share weights"):
        SACAgent(1, actor, [first, sharing], action, ReplayMemory(100))
    other, _ = small_critic(1, obs_dim=4)
    with pytest.raises(ValueError, match="both critics must take and give the same"):
        SACAgent(1, actor, [first, other], action, ReplayMemory(100))
    with pytest.raises(ValueError, match="critic_action_input is none of the critic's inputs"):
        SACAgent(1, actor, [first, small_critic(1)[0]], small_critic(1)[1], ReplayMemory(100))


def test_networks_for_other_observations_or_actions_are_refused_before_anything_is_sent():
    env = Wander(size=4)
    with pytest.raises(ValueError, match=r"the actor takes \(1, 3\), the environment gives \(1, 4\)"):
        sac().fit(env, 10, verbose=0)
    with pytest.raises(ValueError, match=r"the actor gives 2 actions, the environment takes 1"):
        sac(2, obs_dim=4).fit(env, 10, verbose=0)
    env.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    with pytest.raises(ValueError, match="finite bounds"):
        sac(obs_dim=4).fit(env, 10, verbose=0)
    env.action_space = gymnasium.spaces.Discrete(3)
    with pytest.raises(ValueError, match="SACAgent wants a Box of actions"):
        sac(obs_dim=4).fit(env, 10, verbose=0)
    assert not env.shown


@pytest.mark.parametrize("as_list", [False, True])
def test_one_critic_gets_a_twin_with_weights_of_its_own(as_list):
    actor, (critic, _), action = sac_models()
    agent = sac(models=(actor, [critic] if as_list else critic, action))
    first, second = agent.critics
    assert first is critic
    assert [x.shape for x in second.inputs] == [x.shape for x in first.inputs]
    for mine, theirs in zip(first.get_weights(), second.get_weights(), strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_array_equal(np.sort(mine, axis=None), np.sort(theirs, axis=None))  # as large as the user's
        assert mine.ndim == 1 or not np.array_equal(mine, theirs)
    before = weights_of([second])
    first.set_weights([weight + 1 for weight in first.get_weights()])
    assert not moved(before, [second])


def test_target_entropy_is_minus_the_number_of_actions_or_what_was_given():
    assert sac(3).target_entropy == -3.0
    assert sac(3, target_entropy=0.5).target_entropy == 0.5


def test_an_agent_that_is_not_compiled_is_refused():
    with pytest.raises(RuntimeError, match="not compiled"):
        SACAgent(1, *sac_models(), ReplayMemory(100)).fit(Wander(), 5)


# Actions.

BOUNDS = [([0.0], [1.0]), ([-2.0], [2.0]), ([-0.5, 2.0, -7.0], [0.25, 3.0, -1.0])]


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_an_actor_at_its_ends_reaches_exactly_the_bounds_of_each_component(name, low, high):
    agent, count = AGENTS[name](len(low)), len(low)
    env = Wander(low=low, high=high)
    for sign, wanted in ((1.0, high), (-1.0, low)):
        env.actions.clear()
        last = agent.actor.layers[-1]
        kernel, bias = last.get_weights()
        bias[:count] = 50.0 * sign
        last.set_weights([0 * kernel, bias])
        agent.test(env, 1, verbose=0, visualize=False)
        assert len(env.actions) == 5
        np.testing.assert_array_equal(env.actions, np.tile(np.float32(wanted), (5, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_environments_get_actions_within_bounds_and_replay_holds_them_in_minus_one_to_one(low, high, slots):
    envs = [Wander(low=low, high=high) for _ in range(slots)]
    agent = sac(len(low), nb_steps_warmup=60, schedule="sync")
    agent.actor.layers[-1].set_weights([9 * weight for weight in agent.actor.layers[-1].get_weights()])
    agent.fit(LocalPool(envs), 120, verbose=0)
    for env in envs:
        assert all(env.action_space.contains(action) for action in env.actions)
    found = agent.memory.gather(agent.memory.transitions())
    assert found.action.dtype == np.float32
    assert np.abs(found.action).max() <= 1.0
    assert found.action.max() > 0.9
    assert found.action.min() < -0.9
    if slots == 1:
        sent = np.array(envs[0].actions, np.float64)
        back = (2 * sent - np.add(low, high)) / np.subtract(high, low)
        np.testing.assert_allclose(found.action, back, atol=1e-5)


@pytest.mark.slow
def test_actions_before_the_warm_up_are_uniform_and_afterwards_the_policys():
    agent = sac(2, nb_steps_warmup=4000, batch_size=4)
    agent.actor.layers[-1].set_weights([0 * w for w in agent.actor.layers[-1].get_weights()[:1]] + [
        np.float32([3.0, 3.0, -9.0, -9.0])
    ])  # fmt: skip
    env = Wander(low=[0.0, -2.0], high=[1.0, 2.0], length=100)
    agent.fit(env, 4000, verbose=0)
    assert agent.nb_updates == 0
    drawn = (np.array(env.actions) - [0.0, -2.0]) / [1.0, 4.0]  # to [0, 1]
    assert np.abs(drawn.mean(0) - 0.5).max() < 0.03
    assert np.abs(drawn.var(0) - 1 / 12).max() < 0.01
    counts, _, _ = np.histogram2d(*drawn.T, bins=4)
    assert counts.min() > 180  # 250 each, in both components independently
    env.actions.clear()
    agent.fit(env, 1, verbose=0)
    np.testing.assert_allclose(env.actions, [[(1 + math.tanh(3)) / 2, 2 * math.tanh(3)]], atol=2e-3)


def test_training_draws_from_the_policy_with_its_mean_and_deviation():
    agent = sac(1, nb_steps_warmup=0, normalize_observations=False)
    mean, log_std = 0.4, -1.1
    agent.actor.layers[-1].set_weights([0 * agent.actor.layers[-1].get_weights()[0], np.float32([mean, log_std])])
    agent.prepare(LocalPool([Wander()]))
    agent.training = True
    before = np.arctanh(agent.act([[np.zeros(3, np.float32)]] * 4000, [0] * 4000)[:, 0])
    assert abs(before.mean() - mean) < 0.03
    assert abs(before.std() - math.exp(log_std)) < 0.02
    agent.training = False
    np.testing.assert_allclose(agent.act([[np.zeros(3, np.float32)]] * 3, [0] * 3)[:, 0], math.tanh(mean), atol=1e-6)


def test_a_log_deviation_beyond_its_bounds_is_clipped_in_acting():
    agent = sac(1, nb_steps_warmup=0, normalize_observations=False)
    agent.prepare(LocalPool([Wander()]))
    agent.training = True
    zero = 0 * agent.actor.layers[-1].get_weights()[0]
    agent.actor.layers[-1].set_weights([zero, np.float32([0.4, -1e4])])
    drawn = agent.act([[np.zeros(3, np.float32)]] * 20, [0] * 20)
    np.testing.assert_allclose(drawn, math.tanh(0.4), atol=1e-6)
    agent.actor.layers[-1].set_weights([zero, np.float32([0.0, 1e4])])
    drawn = agent.act([[np.zeros(3, np.float32)]] * 2000, [0] * 2000)
    assert np.isfinite(drawn).all()
    assert 0.6 < np.mean(np.abs(drawn) > 0.99) < 0.75  # P(|7.39 n| > 2.65) is 0.72


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_test_is_deterministic_and_changes_nothing(name):
    agent = AGENTS[name]()
    agent.fit(Wander(), 30, verbose=0)
    before, step, held = weights_of(agent.networks.values()), agent.step, len(agent.memory)

    def play():
        env = Wander()
        agent.nb_episodes_begun = 50
        history = agent.test(env, 3, verbose=0, visualize=False)
        return np.array(env.actions), history.history["episode_reward"]

    (actions, rewards), (again, rewards_again) = play(), play()
    np.testing.assert_array_equal(actions, again)
    assert rewards == rewards_again
    assert not moved(before, agent.networks.values())
    assert (agent.step, len(agent.memory)) == (step, held)


# compile.


@pytest.mark.slow
def test_a_temperature_that_shall_not_learn_stays():
    agent = sac(temperature=0.3, learn_temperature=False)
    agent.fit(Wander(), 40, verbose=0)
    assert agent.nb_updates > 20
    assert agent.temperature == pytest.approx(0.3, rel=1e-6)
    other = sac(temperature=0.3)
    other.fit(Wander(), 40, verbose=0)
    assert other.temperature != pytest.approx(0.3, rel=1e-3)


def test_one_optimizer_is_copied_for_all_and_three_go_to_their_own():
    given = keras.optimizers.Adam(0.01, clipnorm=0.5)
    agent = sac(optimizer=given)
    mine = list(agent.optimizers.values())
    assert len({id(one) for one in [given, *mine]}) == 4
    assert all(isinstance(one, keras.optimizers.Adam) and one.clipnorm == 0.5 for one in mine)
    assert all(float(one.learning_rate) == pytest.approx(0.01) for one in mine)
    agent = sac(optimizer=[keras.optimizers.SGD(0.1), "adam", keras.optimizers.SGD(0.3)])
    assert float(agent.actor_optimizer.learning_rate) == pytest.approx(0.1)
    assert isinstance(agent.critic_optimizer, keras.optimizers.Adam)
    assert float(agent.temperature_optimizer.learning_rate) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"one or three \(actor's, critics', temperature's\), not 2"):
        sac(optimizer=["adam", "adam"])


def big_batch(count=8):
    """Rewards so large that every gradient is far beyond any clip."""
    rng = np.random.default_rng(0)
    states, there = rng.normal(size=(2, count, 1, 3)).astype(np.float32)
    action = rng.uniform(-1, 1, (count, 1)).astype(np.float32)
    return [tf.constant(states)], tf.constant(action), tf.fill(count, 1e4), [tf.constant(there)], tf.fill(count, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("how", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_gradients_are_clipped_as_the_optimizer_was_told(name, how):
    agent = AGENTS[name](optimizer=keras.optimizers.SGD(1.0, **{how: 0.01}))
    critics = agent.critics if name == "SAC" else [agent.critic]
    before = weights_of(critics)
    noise = [tf.zeros((8, 1))] if name == "SAC" else []
    agent.update_critic(*big_batch(), *noise)
    steps = [new - old for old, new in zip(before, weights_of(critics), strict=True)]
    if how == "clipvalue":
        sizes = [np.abs(step).max() for step in steps]
    elif how == "clipnorm":
        sizes = [np.linalg.norm(step) for step in steps]
    else:
        sizes = [math.sqrt(sum(float(np.sum(step**2)) for step in steps))]
    assert max(sizes) == pytest.approx(0.01, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"clipnorm": 0.01}, {}])
def test_the_compiled_update_clips_too_the_temperatures_gradient_as_well(how):
    agent = sac(optimizer=keras.optimizers.SGD(1e-3, **how), normalize_observations=False)
    fill(agent, reward=1e4)
    before = weights_of(agent.critics)
    temperature = float(agent.log_temperature)
    agent.update(1)
    size = max(np.abs(new - old).max() for old, new in zip(before, weights_of(agent.critics), strict=True))
    assert (size <= 1.01e-5) == bool(how)
    assert (abs(float(agent.log_temperature) - temperature) <= 1.01e-5) == bool(how)


def fill(agent, steps=60, reward=None, obs_dim=3):
    """Random transitions of one stream, as many as the warm-up wants."""
    rng = np.random.default_rng(5)
    seen = rng.normal(size=(steps + 1, obs_dim)).astype(np.float32)
    for i in range(steps):
        action = rng.uniform(-1, 1, agent.nb_actions).astype(np.float32)
        agent.memory.add(
            0, seen[i], action, float(rng.normal()) if reward is None else reward, seen[i + 1], i % 7 == 6, False
        )
    agent.step = 10**6
    return agent


OPTIMIZERS = {
    "AdamW": lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.01),
    "RMSprop": lambda: keras.optimizers.RMSprop(1e-3, momentum=0.5, centered=True),
    "Nadam": lambda: keras.optimizers.Nadam(1e-3),
    "Adamax": lambda: keras.optimizers.Adamax(1e-3),
    "Adagrad": lambda: keras.optimizers.Adagrad(1e-2),
    "Adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "Adafactor": lambda: keras.optimizers.Adafactor(1e-3),
    "Ftrl": lambda: keras.optimizers.Ftrl(1e-2),
    "Lion": lambda: keras.optimizers.Lion(1e-3),
    "Lamb": lambda: keras.optimizers.Lamb(1e-3),
    "amsgrad": lambda: keras.optimizers.Adam(1e-3, amsgrad=True, use_ema=True, ema_overwrite_frequency=3),
    "nesterov": lambda: keras.optimizers.SGD(1e-3, momentum=0.9, nesterov=True),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(1e-2, 5, 0.5)),
    "accumulating": lambda: keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2),
}


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "name"), list(zip(OPTIMIZERS, itertools.cycle(AGENTS), strict=False)))
def test_any_optimizer_of_keras_learns(name, optimizer):
    agent = fill(AGENTS[name](optimizer=OPTIMIZERS[optimizer]()))
    before = weights_of(agent.networks.values())
    for _ in range(3):
        assert np.isfinite(agent.update(4)).all()
    for old, new in zip(before, weights_of(agent.networks.values()), strict=True):
        assert not np.array_equal(old, new)
    assert agent.program.by_xla


# Networks of every kind.


def branched(inputs_of, name):
    """Models over several inputs: `inputs_of()` gives new ones; the parts are flattened and joined."""

    def body(inputs, extra=()):
        flat = [keras.layers.Flatten()(keras.layers.Rescaling(1.0)(x)) for x in inputs]
        return hidden(keras.layers.Concatenate()([*extra, *flat]) if len(flat) + len(extra) > 1 else flat[0])

    seen, outputs = inputs_of(), 2 if name == "SAC" else 1
    actor = keras.Model(seen, keras.layers.Dense(outputs, "tanh")(body(seen)))
    critics = []
    for _ in range(outputs):
        action, seen = keras.Input((1,), name="action"), inputs_of()
        critics.append((keras.Model([action, *seen], keras.layers.Dense(1)(body(seen, [action]))), action))
    return (actor, [one for one, _ in critics], critics[0][1]) if name == "SAC" else (actor, *critics[0])


def plain_with(layer, name):
    """Models with such a layer among the others."""

    def body(x):
        return layer()(hidden(layer()(x)))

    outputs = 2 if name == "SAC" else 1
    seen = keras.Input((1, 3), name="observation")
    actor = keras.Model(seen, keras.layers.Dense(outputs, "tanh")(body(keras.layers.Flatten()(seen))))
    critics = []
    for _ in range(outputs):
        action, state = keras.Input((1,), name="action"), keras.Input((1, 3), name="seen")
        x = body(keras.layers.Concatenate()([action, keras.layers.Flatten()(state)]))
        critics.append((keras.Model([action, state], keras.layers.Dense(1)(x)), action))
    return (actor, [one for one, _ in critics], critics[0][1]) if name == "SAC" else (actor, *critics[0])


def convolutional(name, window=1):
    """Models for pictures: the window's frames become channels."""

    def eyes(x):
        x = keras.layers.Rescaling(1 / 255)(keras.layers.Reshape((6, 6, window))(x))
        return keras.layers.Flatten()(keras.layers.Conv2D(2, 3, activation="relu")(x))

    outputs = 2 if name == "SAC" else 1
    seen = keras.Input((window, 6, 6, 1), name="observation")
    actor = keras.Model(seen, keras.layers.Dense(outputs, "tanh")(eyes(seen)))
    critics = []
    for _ in range(outputs):
        action, state = keras.Input((1,), name="action"), keras.Input((window, 6, 6, 1), name="seen")
        x = keras.layers.Concatenate()([action, eyes(state)])
        critics.append((keras.Model([action, state], keras.layers.Dense(1)(x)), action))
    return (actor, [one for one, _ in critics], critics[0][1]) if name == "SAC" else (actor, *critics[0])


def parts(window=1):
    return [keras.Input((window, 2), name="position"), keras.Input((window, 3), name="speed")]


KINDS = {
    "batch normalisation": lambda name: (plain_with(keras.layers.BatchNormalization, name), Wander, 1),
    "dropout": lambda name: (plain_with(lambda: keras.layers.Dropout(0.4), name), Wander, 1),
    "layer normalisation": lambda name: (plain_with(keras.layers.LayerNormalization, name), Wander, 1),
    "penalties": lambda name: (plain_with(lambda: keras.layers.Dense(3, kernel_regularizer="l2"), name), Wander, 1),
    "dict": lambda name: (branched(parts, name), lambda: Nested("dict"), 1),
    "tuple": lambda name: (branched(parts, name), lambda: Nested("tuple"), 1),
    "dict in a window of two": lambda name: (branched(lambda: parts(2), name), lambda: Nested("dict"), 2),
    "window of two": lambda name: (
        branched(lambda: [keras.Input((2, 3), name="observation")], name),
        Wander,
        2,
    ),
    "pictures": lambda name: (convolutional(name), Pictures, 1),
    "pictures in a window of two": lambda name: (convolutional(name, 2), Pictures, 2),
}


@pytest.mark.slow  # each of them compiles networks of its own
# With one environment and with two in turn, so that both agents and every kind meet both.
@pytest.mark.parametrize(
    ("kind", "name", "slots"),
    [(kind, name, 1 + (k + a) % 2) for k, kind in enumerate(KINDS) for a, name in enumerate(AGENTS)],
)
def test_networks_of_every_kind_are_learnt_with(name, kind, slots):
    models, make, window = KINDS[kind](name)
    memory = ReplayMemory(200, window, seed=1)
    agent = AGENTS[name](models=models, memory=memory, window_length=window)
    before = {key: weights_of([model]) for key, model in agent.networks.items()}
    agent.fit(LocalPool([make() for _ in range(slots)]), 24, verbose=0)
    assert agent.program.by_xla
    assert agent.nb_updates >= 8
    for key, old in before.items():
        assert moved(old, [agent.networks[key]]), key
    history = agent.test(LocalPool([make() for _ in range(slots)]), 2, verbose=0, visualize=False)
    assert np.isfinite(history.history["episode_reward"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_batch_statistics_are_gathered_in_learning_and_used_in_acting(name):
    agent = fill(AGENTS[name](models=plain_with(keras.layers.BatchNormalization, name)))
    (layer, *_) = [x for x in agent.actor.layers if isinstance(x, keras.layers.BatchNormalization)]
    before = layer.moving_mean.numpy().copy()
    agent.act([[np.ones(3, np.float32)]] * 4, [0] * 4)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)
    agent.update(2)
    assert not np.array_equal(layer.moving_mean.numpy(), before)
    single = agent.act([[np.ones(3, np.float32)]], [0])
    crowd = agent.act([[np.ones(3, np.float32)]] + [[np.full(3, 9.0, np.float32)]] * 5, [0] * 6)
    np.testing.assert_allclose(single[0], crowd[0], atol=1e-6)  # nobody's action depends on its neighbours


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_dropout_acts_in_learning_only(name):
    agent = fill(AGENTS[name](models=plain_with(lambda: keras.layers.Dropout(0.5), name)))
    states = [[np.ones(3, np.float32)]] * 5
    acted = agent.act(states, [0] * 5)
    np.testing.assert_array_equal(acted, np.tile(acted[0], (5, 1)))
    agent.critic_optimizer.learning_rate.assign(0.0)
    q = {float(agent.update_critic(*big_batch(), *([tf.zeros((8, 1))] if name == "SAC" else []))[-1]) for _ in range(6)}
    assert len(q) > 1


@pytest.mark.slow
def test_keras_rls_own_memory_is_learnt_from():
    agent = sac(memory=SequentialMemory(limit=200, window_length=1))
    agent.fit(Wander(), 40, verbose=0)
    assert agent.nb_updates > 20


@pytest.mark.slow
def test_forward_and_backward_by_hand_learn():
    agent, env = sac(), Wander()
    agent.prepare(LocalPool([env]))
    agent.training = True
    obs, _ = env.reset(seed=1)
    for step in range(30):
        agent.step = step
        action = agent.forward(obs)
        assert env.action_space.contains(action)
        obs, reward, _, over, _ = env.step(action)
        metrics = agent.backward(reward, over)
        if over:
            agent.forward(obs)
            agent.backward(0.0, False)
            obs, _ = env.reset()
            agent.reset_states()
    assert agent.nb_updates > 10
    assert np.isfinite(metrics).all()


def test_make_sac_gives_an_agent_that_learns_in_any_bounds():
    env = Wander(low=[0.0, -2.0], high=[1.0, 5.0])
    agent = make_sac(env.observation_space, env.action_space, seed=1, hidden=(8,), nb_steps_warmup=5, batch_size=4)
    agent.fit(env, 20, verbose=0)
    assert agent.nb_updates == 15
    assert all(env.action_space.contains(action) for action in env.actions)


# Weights on disk.


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_weights_and_statistics_of_observations_come_back(name, tmp_path):
    agent, again = AGENTS[name](), AGENTS[name](seed=8)
    agent.fit(Wander(), 30, verbose=0)
    agent.save_weights(tmp_path / "some.h5f")
    names = {"actor": "actor", "critic": "critic", **({"critic2": "critic2"} if name == "SAC" else {})}
    wanted = {"some_%s.weights.h5" % key for key in names} | {"some_observations.npz"}
    assert {path.name for path in tmp_path.iterdir()} == wanted
    with pytest.raises(FileExistsError, match="overwrite=True"):
        agent.save_weights(tmp_path / "some.h5f")
    agent.save_weights(tmp_path / "some.h5f", overwrite=True)
    again.load_weights(tmp_path / "some.h5f")
    again.prepare(LocalPool([Wander()]))
    assert not moved(weights_of(agent.networks.values()), again.networks.values())
    for key, target in again.targets.items():
        assert not moved(weights_of([agent.networks[key]]), [target])
    states = [[np.random.default_rng(i).normal(size=3).astype(np.float32)] for i in range(4)]
    agent.training = again.training = False
    np.testing.assert_array_equal(again.act(states, range(4)), agent.act(states, range(4)))
    assert again.norm.count == agent.norm.count


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_statistics_that_were_loaded_are_saved_again_before_any_environment_was_seen(name, tmp_path):
    agent = AGENTS[name]()
    agent.fit(Wander(), 10, verbose=0)
    agent.save_weights(tmp_path / "first")
    again = AGENTS[name](seed=8)
    again.load_weights(tmp_path / "first")
    again.save_weights(tmp_path / "second")
    with np.load(tmp_path / "first_observations.npz") as first, np.load(tmp_path / "second_observations.npz") as second:
        assert set(first.files) == set(second.files)
        for key in first.files:
            np.testing.assert_array_equal(first[key], second[key])


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["actor", "critic", "critic2"])
def test_a_missing_file_of_weights_is_told_and_changes_nothing(gone, tmp_path):
    agent = sac()
    agent.save_weights(tmp_path / "some")
    (tmp_path / ("some_%s.weights.h5" % gone)).unlink()
    other = sac(seed=8)
    before = weights_of(other.networks.values())
    with pytest.raises(FileNotFoundError, match="some_%s.weights.h5" % gone):
        other.load_weights(tmp_path / "some")
    assert not moved(before, other.networks.values())


def test_statistics_of_other_observations_are_refused_and_change_nothing(tmp_path):
    agent, other = sac(), sac(seed=8)
    for one in (agent, other):
        one.fit(Wander(), 5, verbose=0)
    agent.save_weights(tmp_path / "some")
    np.savez(tmp_path / "some_observations.npz", count=3, **{"mean/0": np.zeros(9), "square/0": np.ones(9)})
    before = weights_of(other.networks.values())
    with pytest.raises(ValueError, match="other observations"):
        other.load_weights(tmp_path / "some")
    assert not moved(before, other.networks.values())


# What callbacks are told.


class Told(Callback):
    """Keeps the metrics of every step."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    def on_step_end(self, step, logs=None):
        self.metrics.append(logs["metrics"])


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("name", AGENTS)
def test_metrics_have_the_names_that_callbacks_are_told_them_under(name, slots):
    told = Told()
    agent = AGENTS[name](metrics=["mae"], schedule="sync")
    learnt, update = [], agent.update

    def noted(count=1):
        learnt.append(update(count))
        return learnt[-1]

    agent.update = noted
    agent.fit(LocalPool([Wander() for _ in range(slots)]), 40, callbacks=[told], verbose=0)
    names = ["loss", "mae", "mean_q"] + (["actor_loss", "temperature", "entropy_nats"] if name == "SAC" else [])
    assert agent.metrics_names == names
    finite = [metrics for metrics in told.metrics if np.isfinite(metrics).all()]
    assert all(len(metrics) == len(names) for metrics in told.metrics)
    assert np.isnan(told.metrics[0]).all()
    assert finite[-1] == learnt[-1]
    if name == "SAC":
        named = dict(zip(names, finite[-1], strict=True))
        if slots == 1:
            assert named["temperature"] == pytest.approx(agent.temperature, rel=1e-5)
        assert named["temperature"] > 0


# Divergence.


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one environment", "sync", "overlap"])
@pytest.mark.parametrize("name", AGENTS)
def test_a_reward_that_is_no_number_ends_training_with_its_batch_saved_and_named(name, how, tmp_path):
    agent = AGENTS[name](schedule="sync" if how == "sync" else "overlap", batch_size=16)
    agent.fault_folder = tmp_path / "faults"
    slots = 1 if how == "one environment" else 2
    envs = [Wander(nan_at=35 if slot == 0 else None) for slot in range(slots)]
    with pytest.raises(FloatingPointError, match=r"update \d+ has diverged \(loss nan") as caught:
        agent.fit(LocalPool(envs), 10_000, verbose=0)
    (path,) = (tmp_path / "faults").iterdir()
    assert str(path) in str(caught.value)
    assert "load() the last save" in str(caught.value)
    with np.load(path) as file:
        batch = {key: file[key] for key in file.files}
    assert set(batch) == {"action", "reward", "discount", "state/0", "next_state/0"}
    assert batch["state/0"].shape == (16, 1, 3)
    assert np.isnan(batch["reward"]).any()
    assert np.isfinite(batch["state/0"]).all()
    replay = agent.memory.columns(agent.memory.transitions())
    rows = {obs.tobytes(): reward for obs, reward in zip(replay["obs/0"], replay["reward"], strict=True)}
    np.testing.assert_array_equal([rows[obs.tobytes()] for obs in batch["state/0"][:, 0]], batch["reward"])
    assert path.name == "diverged-update-%07d.npz" % (int(path.stem[-7:]))
    assert agent.nb_updates < int(path.stem[-7:]) <= agent.nb_updates + 8


@pytest.mark.parametrize("name", AGENTS)
def test_an_actor_that_gives_no_number_sends_nothing(name):
    agent, env = AGENTS[name](), Wander()
    agent.actor.set_weights([np.full_like(weight, np.nan) for weight in agent.actor.get_weights()])
    with pytest.raises(FloatingPointError, match="diverged"):
        agent.fit(env, 10, verbose=0)
    assert not env.actions


def test_every_setting_is_in_the_configuration():
    agent = sac(n_step=3, gamma=0.9, updates_per_step=2.0, schedule="sync")
    config = agent.get_config()
    wanted = {"agent": "SACAgent", "n_step": 3, "gamma": 0.9, "updates_per_step": 2.0, "schedule": "sync", "seed": 7}
    assert {key: config[key] for key in wanted} == wanted
    assert isinstance(agent, OffPolicyAgent)
    assert isinstance(ddpg(), OffPolicyAgent)


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_a_large_seed_works(name):
    agent = AGENTS[name]()
    agent.seed = 2**32 + 5
    agent.fit(Wander(), 10, verbose=0)
    assert agent.nb_updates > 0
