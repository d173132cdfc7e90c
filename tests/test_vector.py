"""`farmer.make_vec`: every promise of gymnasium's VectorEnv, with gymnasium's own ones of the same environments beside
it, and what a farm adds: lost episodes, farms that are away, and results of whoever is ready.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time

import gymnasium
import numpy as np
import psutil
import pytest
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import vector as wrappers
from helpers import poll_until

if "vector_parts" not in sys.modules:
    pytest.register_assert_rewrite("vector_parts")

from farms import ask_farm, closed_port, farm_here, running_farm
from vector_parts import MODES, assert_alike, local, played

import farmer
from wire.errors import BadAction, BadSlot, EnvironmentFault, FarmTimeout, NoFreeSlot, NothingSent, NotOfAFarm

NEXT, SAME, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED
COUNTING, SLOW = "environments:RaisingEnv", "environments:SlowEnv"
MIXED = "vector_parts:Everything"
KNOWN = [
    "CartPole-v1",
    MIXED,
    *(pytest.param(f"{name}-v1", marks=pytest.mark.slow) for name in ("FrozenLake", "Blackjack")),
]


@pytest.fixture
def farm():
    """The address of a farm of three environments that observe [episode, step, last action].

    Episodes are of 5 steps; the action 0.75 raises, 1.0 ends the process.
    """
    with farm_here("RaisingEnv", slots=3) as address:
        yield address


@pytest.fixture(scope="module", params=KNOWN)
def known(request):
    """A farm of an environment that can be made here as well, and its name."""
    with running_farm(request.param, slots=3) as running:
        yield running, request.param


@pytest.fixture(scope="module")
def pendulums():
    with running_farm("Pendulum-v1", slots=3) as running:
        yield running


@contextlib.contextmanager
def opener(address, name):
    """`open_envs(mode)`: three environments of a farm, or as many as said."""
    with contextlib.ExitStack() as opened:

        def open_envs(mode=NEXT, num_envs=3, **more):
            envs = farmer.make_vec(name, num_envs, [(address, 3)], mode, **{"timeout": 30.0, **more})
            return opened.enter_context(envs)

        yield open_envs


@pytest.fixture(scope="module")
def shared():
    """The same for all tests that neither count episodes nor end workers."""
    with farm_here("RaisingEnv", slots=3) as address:
        yield address


@pytest.fixture
def open_shared(shared):
    with opener(shared, COUNTING) as open_envs:
        yield open_envs


@pytest.fixture
def open_envs(farm):
    with opener(farm, COUNTING) as open_envs:
        yield open_envs


@pytest.fixture
def open_known(known):
    with opener(known[0].address, known[1]) as open_envs:
        yield open_envs


@pytest.fixture
def open_slow():
    """Three environments whose action is the seconds to sleep."""
    with farm_here("SlowEnv", slots=3) as address, opener(address, SLOW) as open_envs:
        yield open_envs


def actions(*values):
    return np.array([[value] for value in values], np.float32)


def workers(farm):
    return [row["pid"] for row in ask_farm(farm, "status")]


def still(envs):
    return np.zeros((envs.num_envs, 1), np.float32)


# What a VectorEnv is.


@pytest.mark.slow
def test_the_attributes_are_those_of_gymnasiums_own(known, open_known):
    name = known[1]
    ours, theirs = open_known(), SyncVectorEnv([local(name)] * 3)
    assert isinstance(ours, VectorEnv)
    for attribute in (
        "num_envs",
        "observation_space",
        "action_space",
        "single_observation_space",
        "single_action_space",
        "metadata",
        "render_mode",
        "closed",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.observation_space == batch_space(ours.single_observation_space, 3)
    assert ours.unwrapped is ours
    assert ours.spec.id == "farm/" + name.replace(":", ".")
    assert repr(ours) == "FarmVectorEnv(%s, num_envs=3)" % ours.spec.id
    theirs.close()


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_is_declared_and_may_be_given_by_its_name(open_shared, mode):
    envs = open_shared(mode.value)
    assert envs.metadata["autoreset_mode"] is mode
    assert envs.metadata["render_fps"] == 30
    with pytest.raises(ValueError, match="Sometimes"):
        open_shared("Sometimes")


def test_observations_and_sampled_actions_are_elements_of_the_spaces(open_known):
    envs = open_known()
    observations, _ = envs.reset(seed=1)
    for _ in range(8):
        assert observations in envs.observation_space
        observations, rewards, terminations, truncations, _ = envs.step(envs.action_space.sample())
        assert [(array.dtype, array.shape) for array in (rewards, terminations, truncations)] == [
            (np.dtype(np.float64), (3,)),
            (np.dtype(bool), (3,)),
            (np.dtype(bool), (3,)),
        ]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_value_is_that_of_a_sync_vector_env(known, open_known, mode):
    theirs = SyncVectorEnv([local(known[1])] * 3, autoreset_mode=mode)
    expected = played(theirs)
    theirs.close()
    ours = played(open_known(mode))
    assert sum((given[2] | given[3]).sum() for given in ours if len(given) == 5) > 5, "too few episodes ended"
    assert_alike(expected, ours)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_time_limit_of_this_side_is_that_of_gymnasiums_wrapper(known, open_known, mode):
    make = lambda: gymnasium.wrappers.TimeLimit(local(known[1])(), 3)  # noqa: E731
    theirs = SyncVectorEnv([make] * 3, autoreset_mode=mode)
    expected = played(theirs, 30)
    theirs.close()
    assert_alike(expected, played(open_known(mode, max_episode_steps=3), 30))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_value_is_that_of_an_async_vector_env(known, open_known, mode):
    theirs = AsyncVectorEnv([local(known[1])] * 3, context="spawn", autoreset_mode=mode)
    expected = played(theirs)
    theirs.close()
    assert_alike(expected, played(open_known(mode)))


def test_an_int_seeds_all_a_list_seeds_each_and_none_nobody(open_shared):
    envs = open_shared()
    for seed, expected in ((7, [7, 8, 9]), (np.int64(4), [4, 5, 6]), ([3, 9, 1], [3, 9, 1]), (None, [None] * 3)):
        assert envs.reset(seed=seed)[1]["seed"].tolist() == expected
    envs.reset(seed=5)
    assert envs.np_random_seed == 5
    with pytest.raises(ValueError, match="2 seeds for 3"):
        envs.reset(seed=[1, 2])


def test_options_arrive_and_the_callers_own_dict_stays_as_it_was(open_shared):
    envs = open_shared()
    envs.reset()
    options = {"level": 3, "reset_mask": np.array([True, False, True])}
    _, infos = envs.reset(options=options)
    assert infos["options"]["level"].tolist() == [3, 0, 3]
    assert infos["_options"].tolist() == [True, False, True]
    assert list(options) == ["level", "reset_mask"]


def test_a_mask_resets_those_and_leaves_the_others_where_they_are(open_envs):
    envs = open_envs(DISABLED)
    envs.reset()
    envs.step(actions(0.25, 0.5, 0.125))
    observations, infos = envs.reset(seed=7, options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(observations, [[1, 1, 0.25], [2, 0, 0], [1, 1, 0.125]])
    assert (infos["seed"][1], infos["_seed"].tolist()) == (8, [False, True, False])
    observations = envs.step(still(envs))[0]
    np.testing.assert_array_equal(observations[:, :2], [[1, 2], [2, 1], [1, 2]])


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        ([True, False, True], TypeError),
        (np.array([1, 0, 1]), TypeError),
        (np.array([True, False]), ValueError),
        (np.zeros(3, bool), ValueError),
    ],
)
def test_a_mask_that_is_none_is_refused(open_shared, mask, error):
    envs = open_shared()
    envs.reset()
    with pytest.raises(error, match="reset_mask"):
        envs.reset(options={"reset_mask": mask})


def test_what_is_returned_is_the_callers_to_write_to(open_shared):
    envs = open_shared()
    first, _ = envs.reset()
    first[:] = -1
    second, rewards, *_ = envs.step(still(envs))
    kept = second.copy()
    rewards[:] = 99
    again, later, *_ = envs.step(still(envs))
    np.testing.assert_array_equal(second, kept)
    np.testing.assert_array_equal(again[:, 1], [2, 2, 2])
    np.testing.assert_array_equal(later, [2, 2, 2])
    np.testing.assert_array_equal(first, -np.ones((3, 3)))


def test_the_end_of_an_episode_next_step(open_envs):
    envs = open_envs(NEXT)
    envs.reset()
    given = [envs.step(still(envs)) for _ in range(6)]
    assert given[4][3].all()
    assert given[4][0][0].tolist() == [1, 5, 0], "the step that ends an episode gives its last observation"
    assert given[5][0][0].tolist() == [2, 0, 0], "the next one ignores the action and gives the first of the next"
    assert (given[5][1][0], given[5][3][0]) == (0.0, False)


def test_the_end_of_an_episode_same_step(open_envs):
    envs = open_envs(SAME)
    envs.reset(options={"reset_mask": np.ones(3, bool)})
    envs.step(still(envs))
    envs.reset(options={"reset_mask": np.array([True, False, False])})  # this one is a step behind now
    given = [envs.step(still(envs)) for _ in range(5)]
    observations, rewards, _, truncations, infos = given[3]
    assert truncations.tolist() == [False, True, True]
    assert observations[:, :2].tolist() == [[2, 4], [2, 0], [2, 0]]
    assert rewards.tolist() == [4, 5, 5]
    assert infos["_final_obs"].tolist() == infos["_final_info"].tolist() == [False, True, True]
    assert infos["final_obs"][0] is None
    assert infos["final_obs"][1].tolist() == [1, 5, 0]
    assert infos["final_info"]["step"].tolist() == [0, 5, 5]
    assert infos["step"].tolist() == [4, 0, 0]


def test_the_end_of_an_episode_disabled(open_envs):
    envs = open_envs(DISABLED)
    envs.reset()
    for _ in range(5):
        truncations = envs.step(still(envs))[3]
    assert truncations.all()
    with pytest.raises(BadSlot, match=r"slot 0 is over.*DISABLED"):
        envs.step(still(envs))
    observations, _ = envs.reset(options={"reset_mask": truncations})
    np.testing.assert_array_equal(observations, [[2, 0, 0]] * 3)
    assert envs.step(still(envs))[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (None, "no batch of actions"),
        (0.5, "no batch of actions"),
        (np.zeros((2, 1)), "2 actions for 3 environments"),
        (np.zeros((3, 2)), "shape"),
        (np.zeros(3), "shape"),
        (np.array([[0.0], [np.nan], [0.0]]), "slot 1 is not finite"),
        ([["a"], ["b"], ["c"]], "no array"),
    ],
)
def test_wrong_actions_are_refused_and_nothing_is_sent(open_shared, wrong, text):
    envs = open_shared()
    envs.reset()
    with pytest.raises(BadAction, match=text):
        envs.step(wrong)
    assert envs.step(still(envs))[0][:, 1].tolist() == [1, 1, 1]


def test_wrong_actions_of_other_spaces_are_refused(open_known):
    envs = open_known()
    envs.reset()
    partial = {"force": np.zeros((3, 2), np.float32)}
    for wrong in (np.array([0, 9, 0]), np.zeros(3), np.zeros((3, 1), int), partial):
        with pytest.raises(BadAction):
            envs.step(wrong)
    envs.step(envs.action_space.sample())


@pytest.mark.parametrize("mode", MODES)
def test_a_step_before_the_first_reset_is_refused(open_shared, mode):
    envs = open_shared(mode)
    with pytest.raises(ResetNeeded):
        envs.step(still(envs))
    with pytest.raises(ResetNeeded):
        envs.reset(options={"reset_mask": np.array([True, False, False])})


def test_after_close_every_verb_says_so_and_the_slots_are_free(open_shared):
    envs = open_shared()
    envs.reset()
    envs.close()
    envs.close()
    assert envs.closed
    for verb in (envs.reset, lambda: envs.step(still(envs)), lambda: envs.send(still(envs)), envs.recv):
        with pytest.raises(ClosedEnvironmentError):
            verb()
    assert open_shared().num_envs == 3


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"max_episode_steps": -3}, ValueError, r"max_episode_steps must be 1 or more, or None.* not -3$"),
        ({"max_episode_steps": 0}, ValueError, r"max_episode_steps must be 1 or more, or None.* not 0$"),
        ({"max_episode_steps": 2.5}, TypeError, r"max_episode_steps must be a whole number, or None.* not 2.5$"),
        ({"num_envs": "x"}, TypeError, r"num_envs must be a whole number, or None.* not 'x'$"),
        ({"g": 9.81}, TypeError, r"(?s)make_vec has no argument 'g'.*--env-kwargs '\{\"g\": \.\.\.\}'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_a_farm_is_asked(wrong, error, words):
    with pytest.raises(error, match=words):
        farmer.make_vec(COUNTING, farmlist=[("127.0.0.1:9", 1)], **wrong)


@pytest.mark.parametrize("seed", ["a", "abc", 1.5, [1, 2, "a"]])
def test_seeds_that_are_no_whole_numbers_are_refused(open_shared, seed):
    envs = open_shared()
    with pytest.raises(TypeError, match=r"seed must be a whole number"):
        envs.reset(seed=seed)
    with pytest.raises(TypeError, match=r"min_ready must be a whole number, not 'x'$"):
        envs.recv("x")


def test_who_forgets_to_close_gives_the_slots_back_all_the_same(shared, open_shared):
    envs = farmer.make_vec(COUNTING, 3, [(shared, 3)])
    envs.reset()
    del envs
    gc.collect()
    assert open_shared().num_envs == 3


def test_there_is_nothing_to_render(open_shared):
    envs = open_shared()
    assert envs.render_mode is None
    with pytest.raises(NotImplementedError, match="render_mode is None"):
        envs.render()


def test_attributes_of_the_environments_are_those_that_the_host_knows(open_shared):
    envs = open_shared()
    assert envs.get_attr("action_space") == (envs.single_action_space,) * 3
    assert envs.call("render_mode") == (None, None, None)
    for reach in (lambda: envs.get_attr("length"), lambda: envs.call("close"), lambda: envs.set_attr("length", 3)):
        with pytest.raises(NotOfAFarm, match="runs on a farm"):
            reach()


# Wrappers.


@pytest.mark.slow
@pytest.mark.parametrize("mode", [NEXT, SAME])
def test_episode_statistics_are_those_of_a_sync_vector_env(known, open_known, mode):
    collected = []
    for envs in (SyncVectorEnv([local(known[1])] * 3, autoreset_mode=mode), open_known(mode)):
        wrapped = wrappers.RecordEpisodeStatistics(envs)
        wrapped.reset(seed=8)
        wrapped.action_space.seed(4)
        for _ in range(60):
            wrapped.step(wrapped.action_space.sample())
        collected.append((list(wrapped.return_queue), list(wrapped.length_queue)))
        wrapped.close()
    assert len(collected[0][0]) > 3
    assert collected[0] == collected[1]


def test_episode_statistics_follow_a_mask(open_shared):
    """A SyncVectorEnv takes the mask out of its caller's options, and the wrapper then believes that all were reset."""
    envs = wrappers.RecordEpisodeStatistics(open_shared(DISABLED), stats_key="all")
    envs.reset()
    for step in range(1, 8):
        truncations = envs.step(still(envs))[3]
        if step == 2:
            envs.reset(options={"reset_mask": np.array([False, True, False])})
        if truncations.any():
            envs.reset(options={"reset_mask": truncations})
    assert list(envs.length_queue) == [5, 5, 5]
    assert list(envs.return_queue) == [15, 15, 15]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        wrappers.NormalizeObservation,
        wrappers.NormalizeReward,
        lambda envs: wrappers.RescaleObservation(envs, -1.0, 1.0),
        lambda envs: wrappers.RescaleAction(envs, -1.0, 1.0),
        wrappers.ClipAction,
        lambda envs: wrappers.ClipReward(envs, -1.0, 0.0),
        wrappers.FlattenObservation,
        wrappers.DictInfoToList,
        wrappers.RecordEpisodeStatistics,
    ],
)
def test_wrapped_it_gives_what_a_wrapped_sync_vector_env_gives(pendulums, wrap):
    given = []
    with opener(pendulums.address, "Pendulum-v1") as open_envs:
        for envs in (SyncVectorEnv([local("Pendulum-v1")] * 3), open_envs()):
            wrapped = wrap(envs)
            given.append([wrapped.reset(seed=5)])
            wrapped.action_space.seed(2)
            given[-1] += [wrapped.step(wrapped.action_space.sample())[:4] for _ in range(12)]
            wrapped.close()
            assert envs.closed
    assert_alike(*given)


# Losses.


def lost_at(value, mode, open_envs):
    """The step in which slot 1 is lost by that action, and the one after it."""
    envs = open_envs(mode)
    envs.reset()
    envs.step(actions(0.25, 0.25, 0.25))
    lost = envs.step(actions(0.5, value, 0.5))
    if mode is DISABLED:
        envs.reset(options={"reset_mask": lost[2] | lost[3]})
    return envs, lost, envs.step(actions(0.125, 0.125, 0.125))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [NEXT, DISABLED])
@pytest.mark.parametrize(("value", "text"), [(0.75, "asked to raise in step"), (1.0, "exited with code 9")])
def test_a_lost_episode_is_truncated_at_its_last_good_observation(open_envs, mode, value, text):
    envs, lost, after = lost_at(value, mode, open_envs)
    observations, rewards, terminations, truncations, infos = lost
    np.testing.assert_array_equal(observations, [[1, 2, 0.5], [1, 1, 0.25], [1, 2, 0.5]])
    assert rewards.tolist() == [2, 0, 2]
    assert (terminations.tolist(), truncations.tolist()) == ([False] * 3, [False, True, False])
    assert infos["_lost"].tolist() == [False, True, False]
    assert text in infos["lost"][1]
    begun = [1, 0, 0] if mode is NEXT else [1, 1, 0.125]  # a new worker counts its episodes from 1
    np.testing.assert_array_equal(after[0], [[1, 3, 0.125], begun, [1, 3, 0.125]])
    assert "_lost" not in after[4]
    ledger = envs.status()["farms"][0]["ledger"]
    assert ledger["done"] == ledger["sent"] - 1


@pytest.mark.slow
def test_a_lost_episode_same_step_has_its_next_one_begun(open_envs):
    _, lost, after = lost_at(1.0, SAME, open_envs)
    observations, rewards, _, truncations, infos = lost
    np.testing.assert_array_equal(observations, [[1, 2, 0.5], [1, 0, 0], [1, 2, 0.5]])
    assert (rewards.tolist(), truncations.tolist()) == ([2, 0, 2], [False, True, False])
    assert infos["_lost"].tolist() == infos["_final_obs"].tolist() == [False, True, False]
    np.testing.assert_array_equal(infos["final_obs"][1], [1, 1, 0.25])
    assert infos["final_info"]["lost"][1] == infos["lost"][1]
    np.testing.assert_array_equal(after[0], [[1, 3, 0.125], [1, 1, 0.125], [1, 3, 0.125]])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_worker_killed_between_two_steps_is_told_at_the_next(farm, open_envs, mode):
    envs = open_envs(mode)
    envs.reset()
    envs.step(still(envs))
    victim = workers(farm)[1]
    psutil.Process(victim).kill()
    poll_until(lambda: victim not in workers(farm), 30, "the worker's replacement")
    _, rewards, _, truncations, infos = envs.step(still(envs))
    assert (rewards.tolist(), truncations.tolist()) == ([2, 0, 2], [False, True, False])
    assert infos["_lost"].tolist() == [False, True, False]


@pytest.mark.slow
def test_a_worker_that_dies_in_an_episode_begun_ahead_of_time_is_lost_in_its_first_step(farm, open_envs):
    envs = open_envs(NEXT)
    envs.reset()
    for _ in range(5):
        truncations = envs.step(still(envs))[3]
    assert truncations.all()
    begun = lambda: [row["state"] for row in ask_farm(farm, "status")] == ["ready"] * 3  # noqa: E731
    poll_until(begun, 30, "resets that nobody asked for yet")
    victim = workers(farm)[1]
    psutil.Process(victim).kill()
    poll_until(lambda: victim not in workers(farm), 30, "the worker's replacement")
    observations, _, _, truncations, infos = envs.step(still(envs))
    np.testing.assert_array_equal(observations, [[2, 0, 0]] * 3)
    assert not truncations.any()
    assert "lost" not in infos
    observations, _, _, truncations, infos = envs.step(still(envs))
    np.testing.assert_array_equal(observations, [[2, 1, 0], [2, 0, 0], [2, 1, 0]])
    assert truncations.tolist() == infos["_lost"].tolist() == [False, True, False]


@pytest.mark.slow
def test_an_episode_begun_ahead_of_time_that_is_lost_with_its_farm_is_begun_anew_unseen():
    with contextlib.ExitStack() as farms:
        first = farms.enter_context(running_farm(COUNTING, slots=2, port=closed_port()))
        with farmer.make_vec(COUNTING, 2, [(first.address, 2)], timeout=60.0) as envs:
            envs.reset()
            for _ in range(5):
                envs.step(still(envs))
            poll_until(lambda: [row["state"] for row in first.status()] == ["ready"] * 2, 30, "the next episodes")
            first.kill()
            poll_until(lambda: not envs.status()["farms"][0]["connected"], 30, "the loss of the farm")
            with running_farm(COUNTING, slots=2, port=first.port):
                observations, _, _, truncations, infos = envs.step(still(envs))
                np.testing.assert_array_equal(observations, [[1, 0, 0]] * 2)
                assert not truncations.any()
                assert "lost" not in infos
                envs.close()


def test_a_reset_that_was_begun_ahead_of_time_is_the_one_that_is_asked_for(open_envs):
    envs = open_envs(NEXT)
    envs.reset()
    for _ in range(5):
        envs.step(still(envs))
    assert envs.reset()[0][:, 0].tolist() == [2, 2, 2], "each environment was reset twice, not three times"


def test_a_reset_that_fails_three_times_in_a_row_is_an_error_with_its_reason():
    with farm_here("RaisingEnv", {"at": "reset"}, 3) as address, opener(address, COUNTING) as open_envs:
        envs = open_envs(num_envs=2)
        envs.reset()
        with pytest.raises(EnvironmentFault, match=r"3 times in a row(.|\n)*asked to raise in reset"):
            envs.reset(options={"raise": True})
        with pytest.raises(ResetNeeded):
            envs.step(still(envs))
        envs.reset()
        assert envs.step(still(envs))[1].tolist() == [1, 1]


@pytest.mark.slow
def test_the_barrier_waits_for_a_farm_that_is_away_and_goes_on_when_it_is_back():
    with running_farm(COUNTING, slots=1) as stays, contextlib.ExitStack() as second:
        goes = second.enter_context(running_farm(COUNTING, slots=1, port=closed_port()))
        farms = [(stays.address, 1), (goes.address, 1)]
        with farmer.make_vec(COUNTING, 2, farms, timeout=60.0) as envs:
            envs.reset()
            envs.step(still(envs))
            goes.kill()
            _, rewards, _, truncations, infos = envs.step(still(envs))
            assert (rewards.tolist(), truncations.tolist()) == ([2, 0], [False, True])
            assert goes.address in infos["lost"][1]
            envs.timeout = 1.5  # in which the other one answers
            with pytest.raises(FarmTimeout, match=rf"slots \[1\](.|\n)*{goes.address}"):
                envs.step(still(envs))
            with pytest.raises(BadSlot, match="under way"):
                envs.step(still(envs))
            ready = envs.recv()
            assert (ready.slots.tolist(), ready.rewards.tolist()) == ([0], [3]), "what the other one did is not lost"
            envs.send(still(envs)[:1], [0])
            envs.timeout = 60.0
            with running_farm(COUNTING, slots=1, port=goes.port):
                ready = envs.recv(2)
                assert ready.slots.tolist() == [0, 1]
                np.testing.assert_array_equal(ready.observations, [[1, 4, 0], [1, 0, 0]])
                np.testing.assert_array_equal(envs.step(still(envs))[0], [[1, 5, 0], [1, 1, 0]])
                envs.close()


@pytest.mark.slow
def test_a_result_that_was_in_before_its_farm_was_lost_is_given_first():
    with contextlib.ExitStack() as farms:
        stays = farms.enter_context(running_farm(SLOW, slots=1))
        goes = farms.enter_context(running_farm(SLOW, slots=1))
        with farmer.make_vec(SLOW, 2, [(stays.address, 1), (goes.address, 1)], timeout=60.0) as envs:
            envs.reset()
            envs.send(actions(9.0, 0.0))
            poll_until(lambda: goes.status()[0]["steps"] == 1, 30, "the step of the quick one")
            goes.kill()
            ready = envs.recv(2)
            assert (ready.rewards.tolist(), ready.truncations.tolist()) == ([1, 1], [False, False])
            assert "lost" not in ready.infos
            observations, rewards, _, truncations, infos = envs.step(still(envs))
            assert (rewards.tolist(), truncations.tolist()) == ([2, 0], [False, True])
            assert observations[:, 1].tolist() == [2, 1]
            assert infos["_lost"].tolist() == [False, True]


# Whoever is ready.


@pytest.mark.slow
def test_a_straggler_holds_nobody_up(open_slow):
    envs = open_slow()
    envs.reset()
    envs.send(actions(0.0, 4.0, 0.0))
    for step in range(1, 6):
        seen = set()
        while seen != {0, 2}:
            ready = envs.recv()
            assert set(ready.slots.tolist()) <= {0, 2} - seen
            assert ready.observations[:, 1].tolist() == [step] * len(ready.slots)
            seen |= set(ready.slots.tolist())
        envs.send(actions(0.0, 0.0), [0, 2])
    assert envs.recv(3).slots.tolist() == [0, 1, 2]


def test_what_is_ready_is_a_batch_of_that_many(open_envs):
    envs = open_envs(SAME)
    envs.reset()
    for _ in range(4):
        envs.send(actions(0.5, 0.25), [2, 0])
        ready = envs.recv(2)
    assert ready.slots.tolist() == [0, 2]
    np.testing.assert_array_equal(ready.observations, [[1, 4, 0.25], [1, 4, 0.5]])
    assert ready.infos["step"].tolist() == [4, 4]
    envs.send(actions(0.5), [2])
    ready = envs.recv()
    assert (ready.slots.tolist(), ready.truncations.tolist(), ready.rewards.tolist()) == ([2], [True], [5.0])
    np.testing.assert_array_equal(ready.observations, [[2, 0, 0]])
    assert ready.infos["final_obs"][0].tolist() == [1, 5, 0.5]
    assert envs.step(still(envs))[0][:, :2].tolist() == [[2, 0], [1, 1], [2, 1]]


@pytest.mark.slow
def test_send_and_recv_say_what_is_wrong(open_slow):
    envs = open_slow()
    envs.reset()
    with pytest.raises(NothingSent):
        envs.recv()
    envs.send(actions(3.0), [1])
    with pytest.raises(BadSlot, match="slot 1 has an action under way"):
        envs.step(still(envs))
    with pytest.raises(BadSlot, match="slot 7"):
        envs.send(actions(0.0), [7])
    with pytest.raises(BadSlot, match="twice"):
        envs.send(actions(0.0, 0.0), [0, 0])
    with pytest.raises(BadAction, match="1 actions for 2"):
        envs.send(actions(0.0), [0, 2])
    with pytest.raises(FarmTimeout, match=r"slots \[1\]"):
        envs.recv(timeout=0.1)
    assert envs.recv().slots.tolist() == [1]


@pytest.mark.slow
def test_a_late_result_stays_with_its_own_step(open_slow):
    envs = open_slow()
    envs.reset()
    envs.timeout = 1.5  # in which the quick ones answer
    with pytest.raises(FarmTimeout, match="recv goes on waiting"):
        envs.step(actions(0.0, 4.0, 0.0))
    envs.timeout = 30.0
    observations, _ = envs.reset(seed=4)
    np.testing.assert_array_equal(observations, [[2, 0, 0]] * 3)
    np.testing.assert_array_equal(envs.step(still(envs))[0], [[2, 1, 0]] * 3)
    ledger = envs.status()["farms"][0]["ledger"]
    assert ledger["abandoned"] == 1
    assert ledger["sent"] == 6


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_step_leaves_it_usable(open_slow):
    envs = open_slow()
    envs.reset()

    def press():
        poll_until(lambda: envs.status()["farms"][0]["busy"], 30, "the step")
        time.sleep(0.3)  # into the wait for it
        psutil.Process().send_signal(2)

    interrupt = threading.Thread(target=press)
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        envs.step(actions(0.0, 30.0, 0.0))
    interrupt.join()
    envs.close()


# Where it is leased.


def test_more_than_are_free_are_refused_and_none_is_taken(open_shared):
    first = open_shared(num_envs=2)
    with pytest.raises(NoFreeSlot, match="3 slots were asked for, and 1 are free"):
        open_shared(num_envs=3)
    first.close()
    assert open_shared(num_envs=None).num_envs == 3
    with pytest.raises(ValueError, match="num_envs"):
        open_shared(num_envs=0)


@pytest.mark.slow
def test_it_works_over_two_farms(farm):
    with running_farm(COUNTING, slots=2) as other:
        farms = [(farm, 3), (other.address, 2)]
        with farmer.make_vec(COUNTING, 5, farms, timeout=30.0) as envs:
            envs.reset()
            for step in range(1, 12):
                observations = envs.step(still(envs))[0]
                np.testing.assert_array_equal(observations[:, 1], [step % 6] * 5)


@pytest.mark.slow
def test_gymnasiums_own_vector_envs_work_over_remote_environments(shared):
    make = lambda: gymnasium.make("farm/environments.RaisingEnv", farmlist=[(shared, 1)])  # noqa: E731
    envs = SyncVectorEnv([make, make])
    try:
        envs.reset()
        assert envs.step(still(envs))[1].tolist() == [1, 1]
    finally:
        envs.close()
