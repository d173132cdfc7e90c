"""Actions reach exactly their bounds; observations are standardised by what all environments have shown."""

from __future__ import annotations

import gymnasium
import keras
import numpy as np
import pytest
import rl.core
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_parts import AGENTS, Nested, Wander, ddpg

from agents import LocalPool, ReplayMemory
from agents.models import normalized
from agents.scaling import CLIP, ActionScale, RunningNorm, is_wide

Box = gymnasium.spaces.Box


# Actions.


@pytest.mark.parametrize(
    ("low", "high"), [([0.0], [1.0]), ([-2.0], [2.0]), ([-0.1, 3.0, -7.3], [0.7, 3.5, 0.0]), ([0.1, 1e-7], [0.3, 1e7])]
)
def test_actions_of_one_reach_the_bounds_exactly_and_those_beyond_are_clipped(low, high):
    low, high = np.float32(low), np.float32(high)
    scale = ActionScale(low, high)
    ones = np.ones((1, low.size))
    np.testing.assert_array_equal(scale.to_env(ones), high[None], strict=True)
    np.testing.assert_array_equal(scale.to_env(-ones), low[None], strict=True)
    np.testing.assert_array_equal(scale.to_env(1.7 * ones), high[None])
    np.testing.assert_array_equal(scale.to_env(-1.7 * ones), low[None])
    np.testing.assert_allclose(scale.to_env(0 * ones), (np.float64(low) + high)[None] / 2, rtol=1e-6)
    np.testing.assert_allclose(scale.to_env(0.5 * ones), (low + 3 * np.float64(high))[None] / 4, rtol=1e-6)


@pytest.mark.parametrize("bound", [np.inf, -np.inf])
def test_bounds_that_are_not_finite_are_refused_with_their_values(bound):
    low, high = sorted([bound, 0.0])
    with pytest.raises(ValueError, match=r"finite bounds.*inf"):
        ActionScale(np.array([low]), np.array([high]))


# Mean and deviation.

numbers = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=60), data=st.data())
def test_mean_and_variance_are_those_of_all_data_in_any_split(rows, data):
    rows = np.array(rows, np.float32)
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=6).map(sorted))
    norm = RunningNorm([(2,)])
    for part in np.split(rows, cuts):
        if len(part):
            norm.update([part])
    exact = rows.astype(np.float64)
    assert norm.count == len(rows)
    size = 1 + np.abs(exact).max()
    np.testing.assert_allclose(norm.mean[0], exact.mean(0), rtol=1e-9, atol=1e-12 * size)
    np.testing.assert_allclose(norm.square[0] / norm.count, exact.var(0), rtol=1e-9, atol=1e-12 * size**2)
    ((mean, inverse),) = norm.statistics()
    assert mean.dtype == inverse.dtype == np.float32
    np.testing.assert_allclose(inverse, 1 / np.sqrt(exact.var(0) + 1e-8), rtol=1e-3, atol=1e-3)


def test_a_large_mean_does_not_drown_a_small_deviation():
    rows = 1e4 + np.random.default_rng(1).normal(0, 0.1, (1000, 1))
    norm = RunningNorm([(1,)])
    for part in np.split(rows, 100):
        norm.update([part])
    np.testing.assert_allclose(norm.statistics()[0][1], 1 / rows.std(0), rtol=1e-5)


def test_a_constant_component_stays_finite_and_zero():
    norm = RunningNorm([(2,)])
    rows = np.float32([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]])
    for row in rows:
        norm.update([row[None]])
    out = normalized([rows], norm.statistics())[0].numpy()
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[:, 0], 0.0)
    far = normalized([np.float32([[7.0, 1.0]])], norm.statistics())[0].numpy()
    assert far[0, 0] == CLIP  # what has never changed and then does is clipped


def test_statistics_before_the_first_observation_change_nothing_into_something_infinite():
    assert np.isfinite(normalized([np.ones((1, 2), np.float32)], RunningNorm([(2,)]).statistics())[0]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_observation_that_is_not_finite_counts_for_nothing_in_any_part(bad):
    rows = np.random.default_rng(2).normal(size=(6, 2))
    other = np.random.default_rng(3).normal(size=(6, 3))
    other[2, 1] = bad
    norm = RunningNorm([(2,), (3,)])
    norm.update([rows, other])
    norm.update([rows[2:3], other[2:3]])
    kept = [0, 1, 3, 4, 5]
    assert norm.count == 5
    np.testing.assert_allclose(norm.mean[0], rows[kept].mean(0), atol=1e-12)
    np.testing.assert_allclose(norm.square[1] / 5, other[kept].var(0), atol=1e-12)


def test_statistics_come_back_and_those_of_other_observations_are_refused():
    norm, again = RunningNorm([(2,), (3,)]), RunningNorm([(2,), (3,)])
    norm.update([np.ones((4, 2)), np.arange(12.0).reshape(4, 3)])
    again.load_state(norm.state())
    norm.update([np.zeros((4, 2)), np.zeros((4, 3))])  # what was saved is a copy
    assert again.count == 4
    np.testing.assert_array_equal(again.mean[1], [4.5, 5.5, 6.5])
    other = RunningNorm([(2,), (4,)])
    with pytest.raises(ValueError, match=r"other observations.*\(4,\)"):
        other.load_state(norm.state())
    assert other.count == 0
    assert not other.mean[0].any()


# Where it is on.


@pytest.mark.parametrize(
    ("space", "wide"),
    [
        (Box(-np.inf, np.inf, (3,)), True),
        (Box(0, np.inf, (3,)), True),
        (Box(np.float32([-1, -1]), np.float32([1, np.inf])), True),
        (Box(-1000, 1000, (3,)), True),
        (Box(-100, 100, (3,)), False),
        (Box(-1, 1, (3,)), False),
        (Box(0, 255, (6, 6, 1), np.uint8), False),
        (gymnasium.spaces.Discrete(300), False),
        (gymnasium.spaces.Dict({"a": Box(-1, 1, (2,)), "b": Box(-np.inf, np.inf, (2,))}), True),
        (gymnasium.spaces.Dict({"a": Box(-1, 1, (2,))}), False),
        (gymnasium.spaces.Tuple((Box(-1, 1, (2,)), Box(-np.inf, np.inf, (2,)))), True),
        (gymnasium.spaces.Tuple((Box(-1, 1, (2,)),)), False),
        (None, False),
    ],
)
def test_real_numbers_without_narrow_bounds_are_wide(space, wide):
    assert is_wide(space) is wide


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize(
    ("bound", "asked", "processor", "on"),
    [
        (np.inf, None, None, True),
        (1.0, None, None, False),
        (np.inf, False, None, False),
        (1.0, True, None, True),
        (np.inf, None, rl.core.Processor(), False),  # it may scale by itself
        (np.inf, True, rl.core.Processor(), True),
    ],
)
def test_normalisation_is_on_by_default_where_the_space_is_wide_and_no_processor_stands_before_it(
    name, bound, asked, processor, on
):
    agent = AGENTS[name](normalize_observations=asked, processor=processor)
    agent.fit(Wander(bound=bound), 2, verbose=0)
    assert (agent.norm is not None) == on
    assert bool(agent.observations.statistics) == on


def test_an_agent_that_is_moved_to_a_narrow_space_normalises_no_more():
    agent = ddpg()
    agent.fit(Wander(), 2, verbose=0)
    agent.fit(Wander(bound=1.0), 2, verbose=0)
    assert agent.norm is None
    assert agent.observations.statistics == []


# In the loop.


@pytest.mark.parametrize("slots", [1, 3])
def test_statistics_are_those_of_every_observation_of_all_slots(slots):
    envs = [Wander(length=3 + i) for i in range(slots)]
    agent = ddpg(nb_steps_warmup_critic=10**6, nb_steps_warmup_actor=10**6, schedule="sync")
    agent.fit(LocalPool(envs), 12 * slots, verbose=0)
    shown = np.array([obs for env in envs for obs in env.shown], np.float64)
    assert agent.norm.count == len(shown)
    np.testing.assert_allclose(agent.norm.mean[0], shown.mean(0), rtol=1e-9)
    np.testing.assert_allclose(agent.norm.square[0] / len(shown), shown.var(0), rtol=1e-9)


def test_parts_of_a_dict_have_statistics_of_their_own_in_the_order_of_the_networks_inputs():
    keras.utils.set_random_seed(3)
    inputs = [keras.Input((1, 3), name="speed"), keras.Input((1, 2), name="position")]  # not the dict's order
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(x) for x in inputs])
    actor = keras.Model(inputs, keras.layers.Dense(1, "tanh")(flat))
    action = keras.Input((1,), name="action")
    again = [keras.Input((1, 3), name="speed"), keras.Input((1, 2), name="position")]
    flat = keras.layers.Concatenate()([action, *(keras.layers.Flatten()(x) for x in again)])
    critic = keras.Model([again[0], action, again[1]], keras.layers.Dense(1)(flat))
    env = Nested("dict")
    agent = ddpg(models=(actor, critic, action), nb_steps_warmup_critic=99, nb_steps_warmup_actor=99)
    agent.fit(env, 15, verbose=0)
    shown = np.array(env.walk.shown, np.float64)
    np.testing.assert_allclose(agent.norm.mean[0], shown[:, 2:].mean(0), rtol=1e-9)
    np.testing.assert_allclose(agent.norm.mean[1], shown[:, :2].mean(0), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
def test_statistics_are_frozen_in_a_test(slots):
    agent = ddpg()
    agent.fit(LocalPool([Wander() for _ in range(slots)]), 10, verbose=0)
    before = agent.norm.state()
    agent.test(LocalPool([Wander() for _ in range(slots)]), 3, verbose=0, visualize=False)
    for name, array in agent.norm.state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@pytest.mark.slow
def test_replay_holds_observations_raw():
    env = Wander()
    agent = ddpg()
    agent.fit(env, 10, verbose=0)
    memory = agent.memory
    np.testing.assert_array_equal(memory.columns(np.arange(memory.count))["obs/0"], env.shown)


def transparent_models(name):
    """Networks that show their input z: the actor's first output is 0.05 z, the critics' value is z."""
    seen = keras.Input((1, 1), name="observation")
    outputs = 2 if name == "SAC" else 1
    actor = keras.Model(seen, keras.layers.Dense(outputs)(keras.layers.Flatten()(seen)))
    actor.set_weights([np.full((1, outputs), 0.05, np.float32), np.zeros(outputs, np.float32)])
    critics, inputs = [], []
    for _ in range(outputs):
        action, state = keras.Input((1,), name="action"), keras.Input((1, 1), name="seen")
        both = keras.layers.Concatenate()([action, keras.layers.Flatten()(state)])
        critics.append(keras.Model([action, state], keras.layers.Dense(1)(both)))
        critics[-1].set_weights([np.float32([[0.0], [1.0]]), np.zeros(1, np.float32)])
        inputs.append(action)
    return (actor, critics, inputs[0]) if name == "SAC" else (actor, critics[0], inputs[0])


@pytest.mark.parametrize("name", AGENTS)
def test_acting_and_learning_give_the_networks_the_same_normalised_values(name):
    agent = AGENTS[name](models=transparent_models(name), memory=ReplayMemory(100, seed=2), batch_size=64)
    agent.normalize_observations, agent.step = True, 100
    agent.observations.prepare(None)
    shown = np.random.default_rng(0).normal(50.0, 20.0, (30, 1)).astype(np.float32)
    agent.observe(list(shown))
    seen = shown.copy()
    seen[7] = 1e5  # it shall be clipped
    for i in range(29):
        agent.memory.add(0, seen[i], np.zeros(1, np.float32), 0.0, seen[i + 1], False, False)
    state = agent.memory.rng.bit_generator.state
    drawn = agent.memory.draw(64).state[0][:, 0]
    agent.memory.rng.bit_generator.state = state
    assert np.any(drawn > 1e4)
    acted = agent.act([[obs] for obs in drawn], [0] * 64)[:, 0]
    acted = np.arctanh(acted) if name == "SAC" else acted
    exact = np.float64(shown)
    wanted = np.clip((drawn - exact.mean()) / np.sqrt(exact.var() + 1e-8), -CLIP, CLIP)[:, 0]
    np.testing.assert_allclose(acted / 0.05, wanted, atol=1e-4)
    learnt = dict(zip(agent.own_metrics, agent.update(1), strict=True))["mean_q"]
    np.testing.assert_allclose(learnt, wanted.mean(), atol=1e-5)
