"""DDPG: one update is the paper's, whatever the networks; what does not fit is refused."""

from __future__ import annotations

import threading

import gymnasium
import keras
import numpy as np
import pytest
import rl.callbacks
import rl.core
import tensorflow as tf
from agent_parts import Counter, linear_agent
from rl.memory import SequentialMemory
from rl.random import OrnsteinUhlenbeckProcess

from agents import DDPGAgent, LocalPool, ReplayMemory, make_ddpg, make_sac
from agents.models import clipped_error, hard_update, soft_update
from agents.updates import Updates

BATCH = 6
GAMMA, RATE = 0.9, 0.01


def some_batch(obs_dim=3, nb_actions=2, seed=0):
    """states, action, reward, next_states, discount: rows 1 and 4 terminated, row 2 truncated (which is no end)."""
    rng = np.random.default_rng(seed)
    states, next_states = rng.normal(size=(2, BATCH, 1, obs_dim)).astype(np.float32)
    action, reward = rng.normal(size=(BATCH, nb_actions)), rng.normal(size=BATCH)
    discount = np.full(BATCH, GAMMA)
    discount[[1, 4]] = 0
    return [states], action.astype(np.float32), reward.astype(np.float32), [next_states], np.float32(discount)


def tensors(batch):
    return [[tf.constant(x) for x in part] if isinstance(part, list) else tf.constant(part) for part in batch]


def agent_apart(**settings):
    """A linear agent whose targets differ from its networks."""
    agent = linear_agent(3, 2, optimizer=keras.optimizers.SGD(RATE), gamma=GAMMA, **settings)
    rng = np.random.default_rng(9)
    for model in (agent.actor, agent.critic, agent.target_actor, agent.target_critic):
        model.set_weights([rng.normal(size=weight.shape).astype(np.float32) for weight in model.get_weights()])
    return agent


def by_hand(agent, batch, clip=np.inf):
    """The same update in doubles: (loss, mean q, critic's new weights, actor's new weights)."""
    (states,), action, reward, (next_states,), discount = batch
    states, next_states = states[:, 0].astype(float), next_states[:, 0].astype(float)
    (wa, ba), (wc, bc), (ta, tb), (tc, td) = (
        [weight.astype(float) for weight in model.get_weights()]
        for model in (agent.actor, agent.critic, agent.target_actor, agent.target_critic)
    )
    next_q = np.hstack([next_states @ ta + tb, next_states]) @ tc + td
    target = reward + discount * next_q[:, 0]
    both = np.hstack([action, states])
    q = (both @ wc + bc)[:, 0]
    error = q - target
    if np.isinf(clip):
        loss, slope = np.mean(error**2 / 2), error
    else:
        small = np.abs(error) < clip
        loss = np.mean(np.where(small, error**2 / 2, clip * (np.abs(error) - clip / 2)))
        slope = np.where(small, error, clip * np.sign(error))
    new_critic = [wc - RATE * both.T @ slope[:, None] / BATCH, bc - RATE * np.array([slope.mean()])]
    to_action = -wc[: len(ba), 0] / BATCH  # what the loss of each row gains by each action, with the critic before
    slopes = np.tile(to_action, (BATCH, 1))
    new_actor = [wa - RATE * states.T @ slopes, ba - RATE * slopes.sum(0)]
    return loss, q.mean(), target, new_critic, new_actor


def assert_weights(model, wanted, atol=1e-5):
    for mine, right in zip(model.get_weights(), wanted, strict=True):
        np.testing.assert_allclose(mine, right, atol=atol)


def weights_of(*models):
    return [weight.copy() for model in models for weight in model.get_weights()]


def everything(agent):
    return weights_of(agent.actor, agent.critic, agent.target_actor, agent.target_critic)


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def filled(agent, steps=200, obs_dim=3, nb_actions=1, seed=5):
    """Puts random transitions into the agent's replay and lifts its warm-up."""
    rng = np.random.default_rng(seed)
    for number in range(steps):
        obs, after = rng.normal(size=(2, obs_dim)).astype(np.float32)
        action = rng.uniform(-1, 1, nb_actions).astype(np.float32)
        agent.memory.add(0, obs, action, rng.normal(), after, number % 17 == 0, number % 23 == 0)
    agent.step = 10**6
    return agent


class InOrder(ReplayMemory):
    """Draws its transitions in one random order, whatever the sizes of the draws: eight draws are one of eight."""

    taken = 0

    def draw(self, n, n_step=1, gamma=1.0):
        order = np.random.default_rng(3).choice(self.transitions(), 10_000)
        self.taken += n
        return self.gather(order[self.taken - n : self.taken], n_step, gamma)


# One update.


@pytest.mark.parametrize("clip", [np.inf, 0.7])
def test_the_critics_update_is_the_one_computed_by_hand(clip):
    agent, batch = agent_apart(delta_clip=clip), some_batch()
    loss, mean_q, _, critic, _ = by_hand(agent, batch, clip)
    actor, targets = weights_of(agent.actor), weights_of(agent.target_actor, agent.target_critic)
    values = np.array(agent.update_critic(*tensors(batch)))
    np.testing.assert_allclose(values, [loss, mean_q], atol=1e-5)
    assert_weights(agent.critic, critic)
    assert_equal(actor, weights_of(agent.actor))
    assert_equal(targets, weights_of(agent.target_actor, agent.target_critic))


def test_the_actors_update_is_the_one_computed_by_hand_and_leaves_the_critic():
    agent, batch = agent_apart(), some_batch()
    *_, actor = by_hand(agent, batch)
    critic = weights_of(agent.critic)
    agent.update_actor(tensors(batch)[0])
    assert_weights(agent.actor, actor)
    assert_equal(critic, weights_of(agent.critic))


def test_metrics_compare_the_critics_prediction_with_its_target():
    agent, batch = agent_apart(metrics=["mae"]), some_batch()
    (states,), action, *_ = batch
    _, _, target, _, _ = by_hand(agent, batch)
    q = np.array(agent.critic([action, states]))[:, 0]
    np.testing.assert_allclose(np.array(agent.update_critic(*tensors(batch)))[1], np.abs(q - target).mean(), atol=1e-5)
    assert agent.metrics_names == ["loss", "mae", "mean_q"], "in keras-rl's order"


def test_replay_ends_the_return_at_termination_only():
    agent = linear_agent(3, 2, batch_size=BATCH, gamma=GAMMA)
    ends = [(False, False), (True, False), (False, True), (False, False), (True, False), (False, False)]
    (states,), action, reward, (next_states,), discount = some_batch()
    for row, (terminated, truncated) in enumerate(ends):
        agent.memory.add(0, states[row, 0], action[row], reward[row], next_states[row, 0], terminated, truncated)
    seen = []

    class Told(Updates):
        def __call__(self, *batches):
            seen.append(batches)
            return tf.zeros((3, 2))

    agent.program = Told(agent.update_critic)
    agent.update(3)
    (state,), actions, rewards, (after,), discounts = seen[0][:5]
    assert rewards.shape == (3, BATCH)
    drawn = set()
    for k, b in np.ndindex(3, BATCH):  # every column is of the same transition
        row = reward.tolist().index(rewards[k, b])
        drawn.add(row)
        assert discounts[k, b] == discount[row]
        for mine, right in ((state, states), (actions, action), (after, next_states)):
            np.testing.assert_array_equal(mine[k, b], right[row])
    assert {discount[row] for row in drawn} == {np.float32(0), np.float32(GAMMA)}


def test_clipped_error_is_half_a_square_within_and_a_line_beyond():
    errors = np.float32([-3, -1, -0.5, 0, 0.5, 1, 3])
    np.testing.assert_allclose(clipped_error(errors, 1.0), [2.5, 0.5, 0.125, 0, 0.125, 0.5, 2.5])
    np.testing.assert_allclose(clipped_error(errors, np.inf), errors**2 / 2)
    with pytest.warns(UserWarning, match=r"former name: taken as delta_clip=2"):
        assert linear_agent(delta_range=(-2.0, 2.0)).delta_clip == 2.0


# Targets.


def test_a_soft_update_moves_every_target_weight_by_its_share():
    agent = agent_apart()
    before, online = weights_of(agent.target_critic), weights_of(agent.critic)
    soft_update(agent.target_critic, agent.critic, 0.125)
    assert_weights(agent.target_critic, [b + 0.125 * (o - b) for b, o in zip(before, online, strict=True)], 1e-7)
    hard_update(agent.target_critic, agent.critic)
    assert_equal(online, weights_of(agent.target_critic))


def test_an_update_with_a_small_share_moves_targets_towards_the_new_weights():
    agent = filled(linear_agent(target_model_update=0.25, batch_size=8))
    before = weights_of(agent.target_actor, agent.target_critic)
    agent.update()
    online = weights_of(agent.actor, agent.critic)
    for model, old, new in (
        (agent.target_actor, before[:2], online[:2]),
        (agent.target_critic, before[2:], online[2:]),
    ):
        assert_weights(model, [0.75 * b + 0.25 * o for b, o in zip(old, new, strict=True)], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_hard_update_copies_at_every_nth_update_and_at_no_other(count):
    agent, single = (filled(linear_agent(target_model_update=3, batch_size=8, memory=InOrder(999))) for _ in "ab")
    for _ in range(8 // count):
        agent.update(count)
    copied = []
    for number in range(1, 9):
        single.update()
        same = all(
            (a == b).all() for a, b in zip(weights_of(single.actor), weights_of(single.target_actor), strict=True)
        )
        copied.append(number) if same else None
    assert copied == [3, 6]
    for one, other in zip(everything(agent), everything(single), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("count", [8, 32 + 8 + 3])
def test_fused_updates_are_as_many_single_ones_on_the_same_batches(count):
    settings = {"batch_size": 16, "metrics": ["mae"], "optimizer": keras.optimizers.Adam(0.01)}
    agents = [filled(linear_agent(memory=InOrder(999), **settings)) for _ in "ab"]
    fused = agents[0].update(count)
    single = np.mean([agents[1].update(1) for _ in range(count)], 0)
    np.testing.assert_allclose(fused, single, atol=1e-5)
    for one, other in zip(everything(agents[0]), everything(agents[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert agents[0].nb_updates == agents[1].nb_updates == count


def test_a_pair_of_optimizers_goes_to_actor_and_critic_and_both_are_copies():
    mine = keras.optimizers.SGD(0.5)
    agent = linear_agent(optimizer=[mine, "adam"])
    assert isinstance(agent.actor_optimizer, keras.optimizers.SGD)
    assert isinstance(agent.critic_optimizer, keras.optimizers.Adam)
    assert agent.actor_optimizer is not mine
    with pytest.raises(ValueError, match=r"not 3"):
        agent.compile(["adam"] * 3)


# When it learns.


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["overlap", "sync"])
def test_updates_keep_step_with_transitions_after_the_warm_up(schedule):
    for pool, exact in ((Counter(5), 1), (LocalPool([Counter(5, slot) for slot in range(3)]), 8)):
        agent = linear_agent(batch_size=4, nb_steps_warmup_critic=20, nb_steps_warmup_actor=20, schedule=schedule)
        agent.fit(pool, nb_steps=100, verbose=0)
        assert 80 - exact < agent.nb_updates <= 80
        assert agent.budget.owed == agent.budget.steps - agent.nb_updates < exact
        agent.fit(pool, nb_steps=60, verbose=0)  # what was owed is not lost in between
        assert 140 - exact < agent.nb_updates <= 140


def test_the_end_of_fit_waits_for_every_call_of_updates_that_the_learner_still_owes():
    last_step = threading.Event()

    class Waits(DDPGAgent):
        def update(self, count=1):
            assert last_step.wait(30)
            return super().update(count)

    class Tells(rl.callbacks.Callback):
        def on_step_end(self, step, logs=None):
            if self.model.step == 36:
                seen.append(self.model.nb_updates)
                last_step.set()

    seen, agent = [], linear_agent(batch_size=4, nb_steps_warmup_critic=20, nb_steps_warmup_actor=20)
    agent.__class__ = Waits
    agent.fit(LocalPool([Counter(5), Counter(5, 1)]), nb_steps=36, verbose=0, callbacks=[Tells()])
    assert (seen[0], agent.nb_updates) == (0, 16)


def test_train_interval_is_steps_an_update():
    agent = linear_agent(batch_size=4, nb_steps_warmup_critic=20, nb_steps_warmup_actor=20, train_interval=4)
    agent.fit(Counter(5), nb_steps=100, verbose=0)
    assert agent.nb_updates == 20


def test_each_network_waits_for_its_own_warm_up():
    agent = linear_agent(batch_size=4, nb_steps_warmup_critic=10, nb_steps_warmup_actor=10**6)
    actor, critic = weights_of(agent.actor), weights_of(agent.critic)
    agent.fit(Counter(5), nb_steps=40, verbose=0)
    assert_equal(actor, weights_of(agent.actor))
    assert not np.array_equal(critic[0], weights_of(agent.critic)[0])


def test_memory_interval_stores_every_nth_step_and_the_ends():
    agent = linear_agent(memory_interval=3)
    agent.fit(Counter(4), nb_steps=12, verbose=0)
    # Steps 3, 6, 9 and 12, and the ends of the episodes 4, 8 and 12.
    assert agent.memory.gather(agent.memory.transitions()).reward.tolist() == [3, 4, 6, 8, 9, 12]


def test_forward_and_backward_by_hand_learn_as_keras_rls_do():
    agent = linear_agent(3, 1, batch_size=4, window_length=3, nb_steps_warmup_critic=0, nb_steps_warmup_actor=0)
    env = Counter(10, truncates=True)
    agent.training = True
    for _ in range(3):
        obs, over = env.reset()[0], False
        while not over:
            action = agent.forward(obs)
            assert action.shape == (1,)
            obs, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            metrics = agent.backward(reward, terminal=over)
            agent.step += 1
        agent.forward(obs)
        agent.backward(0.0, terminal=False)
    assert len(metrics) == 2
    assert agent.nb_updates > 10
    assert len(agent.memory) == 30
    assert agent.memory.gather(agent.memory.transitions()[-1:]).next_state[0][0, :, 2].tolist() == [8, 9, 10]
    agent.training = False
    before = len(agent.memory)
    agent.forward(env.reset()[0])
    assert np.isnan(agent.backward(0.0)).all()
    assert len(agent.memory) == before


def test_noise_is_added_while_training_only_and_actions_stay_within_bounds():
    agent = linear_agent(random_process=OrnsteinUhlenbeckProcess(theta=0.15, sigma=50.0))
    agent.prepare(LocalPool([Counter()]))
    states = [[np.zeros(3, np.float32)]] * 20
    assert_equal(*[agent.act(states, range(20)) for _ in range(2)])
    agent.training = True
    noisy = agent.act(states, range(20))
    assert len(np.unique(noisy)) >= 2
    assert np.abs(noisy).max() <= 1
    assert noisy.dtype == np.float32


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("scales", [False, True])
def test_actions_are_the_actors_own_unless_it_is_told_to_scale_them(scales, slots):
    envs = [Counter(5, slot) for slot in range(slots)]
    for env in envs:
        env.action_space = gymnasium.spaces.Box(0, 10, (1,))
    agent = linear_agent(scale_actions=scales, nb_steps_warmup_critic=10**9, nb_steps_warmup_actor=10**9)
    agent.actor.set_weights([np.zeros((3, 1)), np.float32([0.5])])
    agent.fit(LocalPool(envs), nb_steps=12, verbose=0)
    assert {float(row[1][0]) for env in envs for row in env.log} == {7.5 if scales else 0.5}
    found = agent.memory.gather(agent.memory.transitions())
    assert set(found.action.ravel().tolist()) == {0.5}, "the critic learns of the actor's own units"
    agent.actor.set_weights([np.zeros((3, 1)), np.float32([-3])])  # beyond what the actor may give, either way
    agent.fit(LocalPool(envs), nb_steps=12, verbose=0)
    assert {float(env.log[-1][1][0]) for env in envs} == {0.0}
    found = agent.memory.gather(agent.memory.transitions()[-1:])
    assert found.action.tolist() == [[-1.0 if scales else 0.0]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_actor_that_gives_no_number_is_refused_and_nothing_is_sent(value):
    agent, env = linear_agent(), Counter()
    agent.actor.set_weights([np.full_like(weight, value) for weight in agent.actor.get_weights()])
    with pytest.raises(FloatingPointError, match=r"after 0 updates: the training has diverged\n  now: load\(\)"):
        agent.fit(env, nb_steps=5, verbose=0)
    assert env.total == 0


# Networks of other kinds.


def some_actor(window_length, obs_dim, *layers):
    seen = keras.Input((window_length, obs_dim))
    x = keras.layers.Dense(8)(keras.layers.Flatten()(seen))
    for layer in layers:
        x = layer(x)
    return keras.Model(seen, keras.layers.Dense(1, "tanh")(x))


def some_critic(window_length, obs_dim, *layers):
    action, seen = keras.Input((1,)), keras.Input((window_length, obs_dim))
    x = keras.layers.Dense(8)(keras.layers.Concatenate()([action, keras.layers.Flatten()(seen)]))
    for layer in layers:
        x = layer(x)
    return keras.Model([seen, action], keras.layers.Dense(1)(x)), action  # the action is the second input here


def assert_learns(agent, count=1):
    before = everything(agent)
    values = agent.update(count)
    assert np.isfinite(values).all()
    after = everything(agent)
    assert sum(not np.array_equal(one, other) for one, other in zip(before, after, strict=True)) >= 8
    assert all(np.isfinite(weight).all() for weight in after)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8])
def test_batch_norm_dropout_and_weight_penalties_are_learnt_with(count):
    keras.utils.set_random_seed(2)
    layers = [
        lambda: keras.layers.BatchNormalization(),
        lambda: keras.layers.Dropout(0.3),
        lambda: keras.layers.Dense(4, kernel_regularizer="l2"),
    ]
    actor = some_actor(1, 3, *(make() for make in layers))
    critic, action = some_critic(1, 3, *(make() for make in layers))
    agent = DDPGAgent(1, actor, critic, action, ReplayMemory(500, seed=0), batch_size=16, target_model_update=0.1)
    agent.compile(keras.optimizers.Adam(0.01))
    assert agent.critic_action_input_idx == 1
    filled(agent)
    assert_learns(agent, count)
    norm = next(layer for layer in agent.critic.layers if isinstance(layer, keras.layers.BatchNormalization))
    assert np.abs(norm.moving_mean.numpy()).max() > 0
    state = [[np.ones(3, np.float32)]]
    assert_equal(agent.act(state, [0]), agent.act(state, [0]))  # no dropout while acting


@pytest.mark.slow
def test_a_window_of_three_observations_is_learnt_from():
    agent = linear_agent(window_length=3, batch_size=8)
    assert_learns(filled(agent), 2)
    agent.fit(LocalPool([Counter(5), Counter(6)]), nb_steps=30, verbose=0)
    assert agent.nb_updates > 20


class Split(rl.core.Processor):
    """One observation as two inputs: where, and how fast."""

    metrics_names = ("seen",)
    metrics = (1.5,)

    def process_state_batch(self, batch):
        return [batch[..., :1], batch[..., 1:]]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_two_observation_inputs_fed_by_a_processor_are_learnt_from(slots):
    def inputs():
        return [keras.Input((1, 1)), keras.Input((1, 2))]

    def joined(parts):
        return keras.layers.Dense(4)(keras.layers.Concatenate()([keras.layers.Flatten()(part) for part in parts]))

    mine, theirs, action = inputs(), inputs(), keras.Input((1,))
    actor = keras.Model(mine, keras.layers.Dense(1)(joined(mine)))
    critic = keras.Model([theirs[0], action, theirs[1]], keras.layers.Dense(1)(joined([theirs[0], action, theirs[1]])))
    agent = DDPGAgent(1, actor, critic, action, ReplayMemory(500, seed=0), batch_size=8, processor=Split())
    agent.compile(keras.optimizers.Adam(0.01))
    assert agent.metrics_names == ["loss", "mean_q", "seen"]
    assert_learns(filled(agent))
    agent.fit(LocalPool([Counter(5, slot) for slot in range(slots)]), nb_steps=40, verbose=0)
    assert agent.nb_updates > 24


def test_keras_rls_own_memory_is_learnt_from():
    agent = linear_agent(
        memory=SequentialMemory(200, window_length=1), batch_size=8, nb_steps_warmup_critic=30, nb_steps_warmup_actor=30
    )
    agent.fit(Counter(7), nb_steps=80, verbose=0)
    assert agent.nb_updates == 50


# What does not fit.


def networks(actor_out=1, critic_out=1, action_dim=1, critic_inputs=2):
    seen = keras.Input((1, 3))
    actor = keras.Model(seen, keras.layers.Dense(actor_out)(keras.layers.Flatten()(seen)))
    action, others = keras.Input((action_dim,)), [keras.Input((1, 3)) for _ in range(critic_inputs - 1)]
    x = keras.layers.Concatenate()([action, *(keras.layers.Flatten()(other) for other in others)])
    return {"actor": actor, "critic": keras.Model([action, *others], keras.layers.Dense(critic_out)(x))}, action


@pytest.mark.parametrize(
    ("misfit", "words"),
    [
        ({"actor_out": 2}, r"actor must give \(None, 1\).*gives \[\(None, 2\)\]"),
        ({"critic_out": 3}, r"critic must give \(None, 1\); it gives \[\(None, 3\)\]"),
        ({"action_dim": 4}, r"critic_action_input must take \(None, 1\), not \(None, 4\)"),
        ({"critic_inputs": 3}, r"the actor's 1 inputs; it takes 3 in all"),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused(misfit, words):
    models, action = networks(**misfit)
    with pytest.raises(ValueError, match=words):
        DDPGAgent(1, **models, critic_action_input=action, memory=ReplayMemory(10))


def test_an_action_input_of_another_network_is_refused():
    models, _ = networks()
    with pytest.raises(ValueError, match=r"none of the critic's inputs"):
        DDPGAgent(1, **models, critic_action_input=keras.Input((1,)), memory=ReplayMemory(10))


def test_a_memory_of_another_kind_and_a_negative_target_update_are_refused():
    models, action = networks()

    class Own:
        window_length = 1

    with pytest.raises(TypeError, match=r"memory must be agents.ReplayMemory"):
        DDPGAgent(1, **models, critic_action_input=action, memory=Own())
    with pytest.raises(TypeError, match=r"memory must be agents.ReplayMemory or rl.memory.SequentialMemory, not None"):
        DDPGAgent(1, **models, critic_action_input=action, memory=None)
    with pytest.raises(ValueError, match=r"0 or more, not -1"):
        DDPGAgent(1, **models, critic_action_input=action, memory=ReplayMemory(10), target_model_update=-1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_ddpg, make_sac])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"gamma": 1.5}, r"gamma, the discount a step, must be a number from 0 to 1, not 1.5"),
        ({"gamma": -0.1}, r"gamma, .* from 0 to 1, not -0.1"),
        ({"gamma": float("nan")}, r"gamma, .* from 0 to 1, not nan"),
        ({"gamma": "x"}, r"gamma, .* from 0 to 1, not 'x'"),
        ({"batch_size": 0}, r"batch_size must be a whole number from 1, not 0"),
        ({"batch_size": 2.5}, r"batch_size must be a whole number from 1, not 2.5"),
        ({"batch_size": None}, r"batch_size must be a whole number from 1, not None"),
        ({"memory_interval": 0}, r"memory_interval must be a whole number from 1, not 0"),
        ({"train_interval": 0}, r"train_interval must be more than 0, not 0"),
        ({"seed": 1.5}, r"seed must be a whole number from 0, or None, not 1.5"),
        ({"seed": "a"}, r"seed must be a whole number from 0, or None, not 'a'"),
        ({"seed": -1}, r"seed must be a whole number from 0, or None, not -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(make, setting, words):
    with pytest.raises(ValueError, match=words):
        make(Counter().observation_space, Counter().action_space, hidden=(4,), **setting)


def test_an_agents_own_constructor_refuses_a_seed_that_is_none_too():
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0, or None, not 1.5"):
        linear_agent(seed=1.5)
    assert (linear_agent(gamma=0, batch_size=8.0).batch_size, linear_agent(gamma=1).gamma) == (8, 1)


@pytest.mark.parametrize(
    ("agent_of", "words"),
    [
        ({"nb_actions": 2}, r"gives 2 actions, the environment takes 1"),
        ({"obs_dim": 4}, r"takes \(1, 4\), the environment gives \(1, 3\)"),
        ({"window_length": 2, "memory_window": 1}, r"takes \(2, 3\), the environment gives \(1, 3\)"),
    ],
)
def test_networks_that_do_not_fit_the_environment_are_refused_before_anything_is_sent(agent_of, words):
    window = agent_of.pop("memory_window", None)
    agent, env = linear_agent(**agent_of, **({"memory": ReplayMemory(10, window)} if window else {})), Counter()
    with pytest.raises(ValueError, match=words):
        agent.fit(env, nb_steps=5)
    assert env.episode == 0


def test_actions_that_are_no_box_are_refused():
    # An environment that names no space is taken, as keras-rl takes it, unless its bounds are needed to scale.
    for scales, space in ((False, gymnasium.spaces.Discrete(2)), (True, gymnasium.spaces.Discrete(2)), (True, None)):
        env, agent = Counter(), linear_agent(scale_actions=scales)
        env.action_space = space
        with pytest.raises(ValueError, match=r"wants a Box of actions; this environment has (None|Discrete\(2\))"):
            agent.fit(env, nb_steps=5)
        assert env.episode == 0


def test_an_actor_for_observations_of_any_size_with_a_lambda_layer_fits():
    seen = keras.Input((1, None))
    mean = keras.layers.Lambda(lambda x: keras.ops.mean(x, -1), output_shape=(1,))
    actor = keras.Model(seen, keras.layers.Dense(1)(mean(seen)))
    models, action = networks()
    agent = DDPGAgent(1, actor, models["critic"], action, ReplayMemory(100))
    agent.compile("sgd")
    agent.fit(Counter(), nb_steps=5, verbose=0)
    assert agent.step == 5


def test_make_ddpg_gives_an_agent_whose_actions_lie_within_the_bounds():
    space = gymnasium.spaces.Box(np.float32([0, -2]), np.float32([1, 6]))
    agent = make_ddpg(gymnasium.spaces.Box(-9, 9, (3,)), space, seed=3, hidden=(8,))
    chosen = agent.act([[np.float32([a, 0, 9])] for a in range(-9, 9)], range(18))
    assert np.abs(chosen).max() <= 1
    # The agent knows the bounds from the start: it acts, as with loaded weights, before it has seen an environment.
    actions = agent.to_env(chosen)
    assert all(space.contains(action) for action in actions)
    np.testing.assert_allclose(actions.mean(0), [0.5, 2.0], atol=0.2)
    assert space.contains(agent.forward(np.float32([1, 2, 3])))
    with pytest.raises(ValueError, match=r"bounded Box of actions"):
        make_ddpg(space, gymnasium.spaces.Box(-np.inf, np.inf, (2,)))
    for observations in (gymnasium.spaces.Discrete(3), gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(3)})):
        with pytest.raises(ValueError, match=r"Box of observations, or a Dict of Boxes.*Discrete\(3\)"):
            make_ddpg(observations, space)
    parts = make_ddpg(gymnasium.spaces.Dict({"a": space, "b": gymnasium.spaces.Box(-1, 1, (3,))}), space, hidden=(8,))
    assert {x.name: tuple(x.shape[1:]) for x in parts.actor.inputs} == {"a": (1, 2), "b": (1, 3)}


# Weights on disk.


def test_saved_weights_come_back_and_the_targets_follow(tmp_path):
    first, second = agent_apart(), linear_agent(3, 2)
    first.save_weights(tmp_path / "w.h5f")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w_actor.weights.h5", "w_critic.weights.h5"]
    second.load_weights(str(tmp_path / "w.h5f"))
    online = weights_of(first.actor, first.critic)
    assert_equal(online, weights_of(second.actor, second.critic))
    assert_equal(online, weights_of(second.target_actor, second.target_critic))


def test_statistics_of_observations_are_saved_with_the_weights_and_serve_before_there_is_an_environment(tmp_path):
    first, second = (linear_agent(nb_steps_warmup_critic=10**9, nb_steps_warmup_actor=10**9) for _ in "ab")
    first.actor.set_weights([np.full((3, 1), 0.1), np.zeros(1)])  # within the bounds, which only an environment tells
    first.fit(Counter(9, number=3), nb_steps=30, verbose=0)
    first.save_weights(tmp_path / "w.h5f")
    made = ["w_actor.weights.h5", "w_critic.weights.h5", "w_observations.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    with pytest.raises(FileExistsError, match=r"overwrite=True"):
        first.save_weights(tmp_path / "w.h5f")
    second.load_weights(tmp_path / "w.h5f")
    for observation in np.float32([[3, 1, 0], [3, 4, 2]]):
        np.testing.assert_array_equal(first.forward(observation), second.forward(observation))


def test_weights_that_are_there_are_replaced_only_when_told(tmp_path):
    first, second = agent_apart(), linear_agent(3, 2)
    first.save_weights(tmp_path / "w")
    with pytest.raises(FileExistsError, match=r"overwrite=True"):
        second.save_weights(tmp_path / "w")
    first.load_weights(tmp_path / "w")
    assert not np.array_equal(weights_of(first.actor)[0], weights_of(second.actor)[0])
    second.save_weights(tmp_path / "w", overwrite=True)
    first.load_weights(tmp_path / "w")
    assert_equal(weights_of(first.actor), weights_of(second.actor))


@pytest.mark.parametrize("gone", ["actor", "critic"])
def test_a_missing_file_of_weights_is_told_and_changes_nothing(tmp_path, gone):
    linear_agent(3, 2).save_weights(tmp_path / "w")
    (tmp_path / ("w_%s.weights.h5" % gone)).unlink()
    agent = agent_apart()
    before = everything(agent)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*w_%s" % gone):
        agent.load_weights(tmp_path / "w")
    assert_equal(before, everything(agent))


@pytest.mark.parametrize("what", ["other critic", "other layers", "cut file", "no weights at all"])
def test_weights_of_other_networks_are_refused_and_change_nothing(tmp_path, what):
    agent = agent_apart()
    agent.save_weights(tmp_path / "w")
    path = tmp_path / "w_critic.weights.h5"
    if what == "other critic":
        linear_agent(3, 5).critic.save_weights(path)
    elif what == "other layers":
        some_critic(1, 3, keras.layers.Dense(3))[0].save_weights(path)
    elif what == "cut file":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.write_text("hello")
    rng = np.random.default_rng(1)
    agent.actor.set_weights([rng.normal(size=weight.shape) for weight in agent.actor.get_weights()])
    before = everything(agent)
    with pytest.raises(ValueError, match=r"do not fit this agent's networks"):
        agent.load_weights(tmp_path / "w")
    assert_equal(before, everything(agent))


@pytest.mark.slow
def test_a_model_that_xla_cannot_compile_learns_without_it_and_says_so():
    class Outside(keras.layers.Layer):
        """Calls Python in the middle of the graph, which XLA cannot."""

        def call(self, x):
            total = tf.numpy_function(np.float32, [tf.reduce_sum(tf.stop_gradient(x))], tf.float32)
            total.set_shape([])
            return x + 0.0 * total

    observation, action = keras.Input((1, 3)), keras.Input((1,))
    actor = keras.Model(observation, keras.layers.Dense(1)(Outside()(keras.layers.Flatten()(observation))))
    both = keras.layers.Concatenate()([action, keras.layers.Flatten()(observation)])
    critic = keras.Model([action, observation], keras.layers.Dense(1)(both))
    agent = DDPGAgent(1, actor, critic, action, ReplayMemory(300), batch_size=4)
    agent.compile("adam")
    filled(agent)
    before = agent.actor.get_weights()
    with pytest.warns(UserWarning, match="XLA cannot compile these networks"):
        agent.update()
    agent.update()
    assert agent.nb_updates == 2
    assert any((a != b).any() for a, b in zip(before, agent.actor.get_weights(), strict=True))


def test_keras_rls_own_clone_model_works_over_the_bridge():
    import rl.util

    model = linear_agent().actor
    clone = rl.util.clone_model(model)
    assert_equal(weights_of(model), weights_of(clone))


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "updates"), [(1, 40), (10, 4), (0.5, 80)])
def test_updates_are_exactly_steps_over_the_train_interval(interval, updates):
    agent = filled(agent_apart(train_interval=interval), nb_actions=2)
    for _ in range(40):
        agent.learn(1, 1)
    assert agent.nb_updates == updates
