"""Losses, targets and steps of both agents against numpy in doubles, which knows nothing of theirs.

The networks have two hidden layers, tanh and relu; transitions are written down one by one and n-step returns summed
along that list; gradients are differences of the loss.
"""

from __future__ import annotations

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from learner_parts import AGENTS, ddpg, sac

from agents import ReplayMemory
from agents.models import hard_update, soft_update
from agents.sac import LOG_STD, squashed_gaussian

BATCH, ACTIONS, OBS, GAMMA = 6, 2, 3, 0.9

SHAPES = {
    None: lambda x: x,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0.0),
}


def mlp(weights, x, last=None):
    """tanh, relu and a last layer."""
    kernels, biases = weights[::2], weights[1::2]
    for kernel, bias, shape in zip(kernels, biases, ("tanh", "relu", last), strict=True):
        x = SHAPES[shape](x @ kernel + bias)
    return x


def doubles(model):
    return [weight.astype(np.float64) for weight in model.get_weights()]


def q_of(weights, action, states):
    return mlp(weights, np.concatenate([action, states], 1))[:, 0]


def policy_of(weights, states, noise):
    """Actions of the squashed Gaussian and their log densities, by the change of variables as it stands in books."""
    mean, log_std = np.split(mlp(weights, states), 2, axis=1)
    deviation = np.exp(np.clip(log_std, *LOG_STD))
    before = mean + deviation * noise
    gaussian = np.exp(-0.5 * ((before - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
    slope = 1 / np.cosh(before) ** 2  # of the tanh
    return np.tanh(before), np.log(gaussian / slope).sum(1)


def shaken(agent, seed=4):
    """Random weights everywhere, biases and targets too, so that nothing is equal by chance."""
    rng = np.random.default_rng(seed)
    for model in (*agent.networks.values(), *agent.targets.values()):
        model.set_weights([rng.normal(scale=0.6, size=w.shape).astype(np.float32) for w in model.get_weights()])
    return agent


def some_batch(seed=0):
    """states, action, reward, next_states, discount; rows 1 and 4 terminated, the others not."""
    rng = np.random.default_rng(seed)
    states, next_states = rng.normal(size=(2, BATCH, 1, OBS))
    action, reward = rng.uniform(-1, 1, (BATCH, ACTIONS)), rng.normal(size=BATCH)
    discount = np.full(BATCH, GAMMA)
    discount[[1, 4]] = 0.0
    return tuple(x.astype(np.float32) for x in (states, action, reward, next_states, discount))


def as_doubles(batch):
    """The same in doubles, states without their window."""
    states, action, reward, next_states, discount = (x.astype(np.float64) for x in batch)
    return states[:, 0], action, reward, next_states[:, 0], discount


def tensors(batch):
    states, action, reward, next_states, discount = map(tf.constant, batch)
    return [states], action, reward, [next_states], discount


def some_noise(seed=3):
    return np.random.default_rng(seed).normal(size=(BATCH, ACTIONS)).astype(np.float32)


def difference_gradient(loss, weights, step=1e-6):
    """The slope of loss(weights) by each weight, from central differences."""
    slopes = []
    for weight in weights:
        slope = np.zeros_like(weight)
        for index in np.ndindex(weight.shape):
            value = weight[index]
            weight[index] = value + step
            above = loss(weights)
            weight[index] = value - step
            slope[index] = (above - loss(weights)) / (2 * step)
            weight[index] = value
        slopes.append(slope)
    return slopes


def assert_stepped(before, model, slopes, rate=1.0):
    """Plain gradient descent by these slopes took place."""
    for old, new, slope in zip(before, model.get_weights(), slopes, strict=True):
        np.testing.assert_allclose((old - new) / rate, slope, atol=2e-5, rtol=1e-4)
    assert max(np.abs(slope).max() for slope in slopes) > 0.01  # or nothing was checked


def plain():
    return keras.optimizers.SGD(1.0)


# DDPG.


def ddpg_target(agent, batch):
    _, _, reward, next_states, discount = as_doubles(batch)
    next_action = mlp(doubles(agent.target_actor), next_states, "tanh")
    return reward + discount * q_of(doubles(agent.target_critic), next_action, next_states)


def huber(error, clip):
    size = np.abs(error)
    within = np.minimum(size, clip)
    return within**2 / 2 + within * (size - within)


def test_ddpgs_target_stops_at_termination_and_bootstraps_elsewhere():
    agent, batch = shaken(ddpg(ACTIONS)), some_batch()
    _, _, reward, next_states, discount = tensors(batch)
    target = agent.critic_target(reward, next_states, discount).numpy()
    np.testing.assert_allclose(target, ddpg_target(agent, batch), atol=1e-5)
    np.testing.assert_array_equal(target[[1, 4]], batch[2][[1, 4]])
    assert (np.abs(target - batch[2])[[0, 2, 3, 5]] > 0.01).all()


@pytest.mark.parametrize("clip", [np.inf, 0.9])
def test_ddpgs_critic_loss_metrics_and_step_are_those_of_numpy(clip):
    agent = shaken(ddpg(ACTIONS, optimizer=plain(), metrics=["mae"], delta_clip=clip))
    batch, before = some_batch(), doubles(agent.critic)
    states, action, *_ = as_doubles(batch)
    target = ddpg_target(agent, batch)

    def loss(weights):
        return huber(target - q_of(weights, action, states), clip).mean()

    q = q_of(before, action, states)
    assert np.isinf(clip) or 0 < np.mean(np.abs(target - q) > clip) < 1  # errors on both sides of the clip
    wanted = [loss(before), np.abs(target - q).mean(), q.mean()]
    slopes = difference_gradient(loss, doubles(agent.critic))
    np.testing.assert_allclose(agent.update_critic(*tensors(batch)), wanted, atol=1e-5)
    assert_stepped(before, agent.critic, slopes)


def test_ddpgs_actor_climbs_the_critics_value_and_leaves_the_critic():
    agent, batch = shaken(ddpg(ACTIONS, optimizer=plain())), some_batch()
    states, before, critic = as_doubles(batch)[0], doubles(agent.actor), doubles(agent.critic)

    def loss(weights):
        return -q_of(critic, mlp(weights, states, "tanh"), states).mean()

    slopes = difference_gradient(loss, doubles(agent.actor))
    agent.update_actor(tensors(batch)[0])
    assert_stepped(before, agent.actor, slopes)
    for old, new in zip(critic, agent.critic.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# SAC.


def sac_target(agent, batch, noise):
    _, _, reward, next_states, discount = as_doubles(batch)
    next_action, log_prob = policy_of(doubles(agent.actor), next_states, noise)
    qs = [q_of(doubles(critic), next_action, next_states) for critic in agent.target_critics]
    return reward + discount * (np.minimum(*qs) - math.exp(float(agent.log_temperature)) * log_prob)


def test_sacs_target_is_the_soft_value_of_the_smaller_critic_and_stops_at_termination():
    agent, batch, noise = shaken(sac(ACTIONS, temperature=0.3)), some_batch(), some_noise()
    _, _, reward, next_states, discount = tensors(batch)
    target = agent.critic_target(reward, next_states, discount, tf.constant(noise)).numpy()
    np.testing.assert_allclose(target, sac_target(agent, batch, noise), atol=1e-5)
    np.testing.assert_array_equal(target[[1, 4]], batch[2][[1, 4]])
    next_action, _ = policy_of(doubles(agent.actor), as_doubles(batch)[3], noise)
    qs = [q_of(doubles(critic), next_action, as_doubles(batch)[3]) for critic in agent.target_critics]
    assert np.ptp(np.argmin(qs, 0)) == 1  # each critic is the smaller one somewhere


def test_sacs_critics_loss_metrics_and_step_are_those_of_numpy():
    agent = shaken(sac(ACTIONS, optimizer=plain(), metrics=["mae"], temperature=0.3))
    batch, noise = some_batch(), some_noise()
    states, action, *_ = as_doubles(batch)
    target = sac_target(agent, batch, noise)
    before = [doubles(critic) for critic in agent.critics]

    def loss(weights):
        return np.mean((target - q_of(weights, action, states)) ** 2) / 2

    q = q_of(before[0], action, states)
    wanted = [(loss(before[0]) + loss(before[1])) / 2, np.abs(target - q).mean(), q.mean()]
    slopes = [difference_gradient(loss, doubles(critic)) for critic in agent.critics]
    np.testing.assert_allclose(agent.update_critic(*tensors(batch), tf.constant(noise)), wanted, atol=1e-5)
    for critic, old, slope in zip(agent.critics, before, slopes, strict=True):
        assert_stepped(old, critic, slope)


def test_sacs_actor_loss_entropy_and_step_are_those_of_numpy():
    agent = shaken(sac(ACTIONS, optimizer=plain(), temperature=0.3))
    batch, noise = some_batch(), some_noise()
    states, before = as_doubles(batch)[0], doubles(agent.actor)
    critics = [doubles(critic) for critic in agent.critics]

    def loss(weights):
        action, log_prob = policy_of(weights, states, noise)
        return np.mean(0.3 * log_prob - np.minimum(*(q_of(critic, action, states) for critic in critics)))

    slopes = difference_gradient(loss, doubles(agent.actor))
    value, entropy = agent.update_actor(tensors(batch)[0], tf.constant(noise))
    np.testing.assert_allclose(value, loss(before), atol=1e-5)
    np.testing.assert_allclose(entropy, -policy_of(before, states, noise)[1].mean(), atol=1e-5)
    assert_stepped(before, agent.actor, slopes)
    for old, critic in zip(critics, agent.critics, strict=True):
        for weight, new in zip(old, critic.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, new)


@pytest.mark.parametrize("entropy", [-3.0, 1.5])
def test_temperature_falls_where_entropy_is_above_its_target_and_rises_below(entropy):
    agent = sac(ACTIONS, optimizer=keras.optimizers.SGD(0.1), temperature=0.3, target_entropy=-1.0)
    after = agent.update_temperature(tf.constant(entropy))
    np.testing.assert_allclose(after, 0.3 * math.exp(-0.1 * (entropy + 1.0)), atol=1e-6)
    assert (after > 0.3) == (entropy < -1.0)
    np.testing.assert_allclose(agent.temperature, after, rtol=1e-6)


@pytest.mark.parametrize("mean", [-0.8, 0.0, 2.5])
@pytest.mark.parametrize("log_std", [-2.0, -0.3, 0.7])
def test_density_of_one_squashed_action_integrates_to_one(mean, log_std):
    # Over u before the tanh, where nothing is singular: the integral of pi(tanh u) (1 - tanh(u)^2) du.
    noise = np.linspace(-8.0, 8.0, 4001)
    action, log_prob = squashed_gaussian(
        tf.fill((noise.size, 1), mean), tf.fill((noise.size, 1), log_std), tf.constant(noise[:, None], tf.float32)
    )
    before = mean + math.exp(log_std) * noise
    np.testing.assert_allclose(action[:, 0], np.tanh(before), atol=2e-6)
    inner = np.abs(before) < 8.0  # further out 1 - tanh(u)^2 has no digits left
    density = np.exp(np.float64(log_prob)) / np.cosh(before) ** 2
    np.testing.assert_allclose(np.trapezoid(density, before), 1.0, atol=1e-4)
    # The same by differences of the distribution function, which knows no density at all.
    below = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in noise])
    squashed = np.tanh(before)
    middle, slope = inner[1:-1], (below[2:] - below[:-2])[inner[1:-1]] / (squashed[2:] - squashed[:-2])[inner[1:-1]]
    np.testing.assert_allclose(np.exp(np.float64(log_prob))[1:-1][middle], slope, rtol=2e-3, atol=1e-5)


def test_density_of_two_squashed_actions_integrates_to_one_over_the_square():
    mean, log_std = np.array([0.3, -0.6]), np.array([-0.7, -1.2])
    grid = np.linspace(-0.9999, 0.9999, 601)
    first, second = np.meshgrid(grid, grid, indexing="ij")
    action = np.stack([first.ravel(), second.ravel()], 1)
    noise = (np.arctanh(action) - mean) / np.exp(log_std)
    shape = (len(action), 1)
    found, log_prob = squashed_gaussian(
        tf.constant(np.tile(mean, shape), tf.float32),
        tf.constant(np.tile(log_std, shape), tf.float32),
        tf.constant(noise, tf.float32),
    )
    np.testing.assert_allclose(found, action, atol=1e-5)
    density = np.exp(np.float64(log_prob)).reshape(first.shape)
    np.testing.assert_allclose(np.trapezoid(np.trapezoid(density, grid), grid), 1.0, atol=2e-3)


def test_log_density_stays_finite_where_the_tanh_has_no_digits_left():
    u = np.array([[-40.0], [-12.0], [12.0], [40.0]], np.float32)
    action, log_prob = squashed_gaussian(tf.constant(u), tf.zeros((4, 1)), tf.zeros((4, 1)))
    assert np.isfinite(log_prob).all()
    exact = -0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - np.abs(np.float64(u[:, 0])))  # -log(1 - tanh^2)
    np.testing.assert_allclose(log_prob, exact, rtol=1e-5)
    np.testing.assert_array_equal(np.abs(action), 1.0)


# Targets.


@pytest.mark.parametrize("tau", [0.005, 0.995, 1e-3])
def test_a_soft_update_is_exact_in_single_precision(tau):
    rng = np.random.default_rng(1)
    models = [keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)]) for _ in range(2)]
    for model in models:
        model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
    target, online = models
    before = target.get_weights()
    soft_update(target, online, tau)
    for old, mine, theirs in zip(before, target.get_weights(), online.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, old + np.float32(tau) * (theirs - old), strict=True)
        exact = (1 - tau) * old.astype(np.float64) + tau * theirs
        np.testing.assert_allclose(mine, exact, atol=2e-7)
    hard_update(target, online)
    for mine, theirs in zip(target.get_weights(), online.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", AGENTS)
def test_targets_are_copied_at_every_third_update_and_at_no_other(name):
    agent = shaken(AGENTS[name](ACTIONS, target_model_update=3))
    before = {key: target.get_weights() for key, target in agent.targets.items()}
    for number in range(1, 8):
        agent.update_targets(number)
        for key, target in agent.targets.items():
            wanted = agent.networks[key].get_weights() if number % 3 == 0 else before[key]
            for mine, right in zip(target.get_weights(), wanted, strict=True):
                np.testing.assert_array_equal(mine, right)
        shaken_again = np.random.default_rng(number)
        for key in agent.targets:
            model = agent.networks[key]
            before[key] = agent.targets[key].get_weights()
            model.set_weights([shaken_again.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])


@pytest.mark.parametrize("name", AGENTS)
def test_a_share_of_each_update_goes_to_every_target(name):
    agent = shaken(AGENTS[name](ACTIONS, target_model_update=0.005))
    before = {key: target.get_weights() for key, target in agent.targets.items()}
    agent.update_targets(1)
    for key, target in agent.targets.items():
        for mine, old, theirs in zip(target.get_weights(), before[key], agent.networks[key].get_weights(), strict=True):
            np.testing.assert_array_equal(mine, old + np.float32(0.005) * (theirs - old))


# From replay to loss: terminal, truncated and n-step returns, normalised observations.

EPISODES = ((6, "terminated"), (5, "truncated"), (4, "running"), (1, "terminated"), (1, "truncated"))


def written_down(seed=4):
    """Episodes as lists of (observation, action, reward, next observation, terminated, truncated)."""
    rng = np.random.default_rng(seed)
    episodes = []
    for length, end in EPISODES:
        seen = rng.normal(2.0, [1.0, 5.0, 0.2], (length + 1, OBS)).astype(np.float32)
        rows = []
        for i in range(length):
            last = i == length - 1
            action, reward = rng.uniform(-1, 1, ACTIONS).astype(np.float32), float(np.float32(rng.normal()))
            rows.append(
                (seen[i], action, reward, seen[i + 1], last and end == "terminated", last and end == "truncated")
            )
        episodes.append(rows)
    return episodes


def replay_of(episodes, memory):
    """The same in a memory, the episodes interleaved as environments beside each other give them."""
    for column in itertools.zip_longest(*episodes):
        for stream, row in enumerate(column):
            if row is not None:
                memory.add(stream, *row)
    return memory


def n_step_row(episode, i, n_step):
    """reward, last observation and discount from step i on, along the list."""
    steps = episode[i : i + n_step]
    reward = sum(GAMMA**k * row[2] for k, row in enumerate(steps))
    return reward, steps[-1][3], 0.0 if steps[-1][4] else GAMMA ** len(steps)


def as_written(found, episodes, n_step):
    """What the drawn rows should hold, by looking their observations up in the list; and whose they are."""
    table = {row[0].tobytes(): (e, i) for e, episode in enumerate(episodes) for i, row in enumerate(episode)}
    places = [table[state.tobytes()] for state in found.state[0][:, 0]]
    rows = [(*episodes[e][i][:2], *n_step_row(episodes[e], i, n_step)) for e, i in places]
    states, action, reward, next_states, discount = (np.array(x, np.float64) for x in zip(*rows, strict=True))
    return places, (states[:, None], action, reward, next_states[:, None], discount)


@pytest.mark.parametrize("n_step", [1, 3])
def test_draws_sum_rewards_to_the_end_of_an_episode_and_bootstrap_where_it_did_not_terminate(n_step):
    episodes = written_down()
    found = replay_of(episodes, ReplayMemory(100, seed=2)).draw(200, n_step, GAMMA)
    places, (states, action, reward, next_states, discount) = as_written(found, episodes, n_step)
    np.testing.assert_array_equal(found.state[0], states)
    np.testing.assert_array_equal(found.action, action)
    np.testing.assert_allclose(found.reward, reward, atol=1e-6)
    np.testing.assert_array_equal(found.next_state[0], next_states)
    np.testing.assert_allclose(found.discount, discount, atol=1e-7)
    assert len(set(places)) == sum(length for length, _ in EPISODES)  # every transition was drawn


@pytest.fixture(scope="module", params=[(name, n) for name in AGENTS for n in (1, 3)], ids=lambda p: "%s-%d" % p)
def learning(request):
    """An agent that normalises observations and learns from the written episodes, before its first update."""
    name, n_step = request.param
    memory, episodes = ReplayMemory(100, seed=2), written_down()
    agent = AGENTS[name](
        ACTIONS, memory=memory, gamma=GAMMA, n_step=n_step, batch_size=64, optimizer=keras.optimizers.SGD(0.01)
    )
    agent.seed = 11
    agent.normalize_observations = True
    agent.observations.prepare(None)
    replay_of(episodes, memory)
    agent.observe([row[0] for episode in episodes for row in episode])
    return name, agent, episodes


def standardised(x, episodes):
    """Observations in deviations from the mean of all that were observed."""
    seen = np.array([row[0] for episode in episodes for row in episode], np.float64)
    return np.clip((x - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8), -10, 10)


@pytest.mark.slow
def test_a_compiled_update_from_replay_has_numpys_loss(learning):
    name, agent, episodes = learning
    shaken(agent)
    state = agent.memory.rng.bit_generator.state
    found = agent.memory.draw(agent.batch_size, agent.n_step, GAMMA)
    agent.memory.rng.bit_generator.state = state
    places, (states, action, reward, next_states, discount) = as_written(found, episodes, agent.n_step)
    ends = {EPISODES[e][1] for e, i in places if i + agent.n_step >= EPISODES[e][0]}
    assert ends == {"terminated", "truncated", "running"}
    states, next_states = standardised(states, episodes), standardised(next_states, episodes)
    batch = (states, action, reward, next_states, discount)
    if name == "DDPG":
        agent.step = 100  # past the warm-up
        target = ddpg_target(agent, batch)
        q = q_of(doubles(agent.critic), action, states[:, 0])
        wanted = [np.mean((target - q) ** 2) / 2, q.mean()]
    else:
        noise = noise_of(agent, 1)[0]
        target = sac_target(agent, batch, noise[0].astype(np.float64))
        qs = [q_of(doubles(critic), action, states[:, 0]) for critic in agent.critics]
        wanted = [sum(np.mean((target - q) ** 2) / 2 for q in qs) / 2, qs[0].mean()]
    values = agent.update(1)
    np.testing.assert_allclose(values[:2], wanted, atol=1e-5, rtol=1e-5)


def noise_of(agent, count):
    """The standard normal numbers of an agent's next call, (count, 2, batch, actions)."""
    rng = np.random.default_rng([agent.state()[1]["noise_seed"], agent.nb_updates])
    return rng.standard_normal((count, 2, agent.batch_size, agent.nb_actions), np.float32)


@pytest.mark.slow
def test_fused_updates_are_single_ones_by_the_named_functions(learning):
    """The compiled loop of K updates is K times update_critic, update_actor, update_temperature, update_targets."""
    name, agent, _ = learning
    shaken(agent)
    agent.step, agent.nb_updates, count = 100, 5, 3
    state = agent.memory.rng.bit_generator.state
    before = {key: variable.numpy().copy() for key, variable in agent.variables()}
    fused = agent.update(count)
    after = {key: variable.numpy().copy() for key, variable in agent.variables()}
    for key, variable in agent.variables():
        variable.assign(before[key])
    agent.nb_updates = 5
    agent.memory.rng.bit_generator.state = state
    found = agent.memory.draw(count * agent.batch_size, agent.n_step, GAMMA)
    noise = noise_of(agent, count) if name == "SAC" else None
    ((mean, inverse),) = agent.norm.statistics()
    singles = []
    for k in range(count):
        rows = slice(k * agent.batch_size, (k + 1) * agent.batch_size)
        here, there = (
            [tf.constant(np.clip((x[rows] - mean) * inverse, -10, 10))]
            for x in (
                found.state[0],
                found.next_state[0],
            )
        )
        columns = [tf.constant(x[rows]) for x in (found.action, found.reward)]
        discount = tf.constant(found.discount[rows])
        if name == "DDPG":
            row = list(agent.update_critic(here, *columns, there, discount))
            agent.update_actor(here)
        else:
            row = list(agent.update_critic(here, *columns, there, discount, noise[k, 0]))
            loss, entropy = agent.update_actor(here, noise[k, 1])
            row += [loss, agent.update_temperature(entropy), entropy]
        agent.update_targets(6 + k)
        singles.append(np.array(row))
    np.testing.assert_allclose(fused, np.mean(singles, 0), rtol=1e-3, atol=1e-4)
    moved = 0
    for key, variable in agent.variables():
        np.testing.assert_allclose(after[key], variable.numpy().copy(), rtol=1e-3, atol=2e-4, err_msg=key)
        moved += not np.array_equal(before[key], after[key])
    assert moved == len(before) - len(agent.optimizers)  # all but the learning rates
