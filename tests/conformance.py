"""What every face of an environment must do alike: the local object, a worker, a remote environment, a pool.

A test module makes a class for each face:

    class TestLocal(Conformance):
        @pytest.fixture
        def open_face(self):
            ...  # yields open_face(factory, **kwargs) -> face, and closes what it opened

A face has `reset(seed, options) -> (observation, info)`, `step(action) -> 5-tuple` and `close()`.
"""

import numpy as np
import pytest


def action(value):
    return np.array([value], "float32")


def assert_same(left, right):
    """The same value, of the same types and dtypes, all the way down; any dict is as good as another."""
    if isinstance(left, dict) and isinstance(right, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
        return
    assert type(left) is type(right), (left, right)
    if isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        np.testing.assert_array_equal(left, right)
    else:
        assert left == right


class Conformance:
    """The suite; a subclass brings the fixture `open_face`."""

    def test_every_step_arrives_once_and_in_order(self, open_face):
        face = open_face("CountingEnv", length=6)
        for episode in (1, 2, 3):
            observation, info = face.reset()
            np.testing.assert_array_equal(observation, [episode, 0, 0])
            for step in range(1, 7):
                value = np.float32(step / 8)
                observation, reward, terminated, truncated, info = face.step(action(value))
                np.testing.assert_array_equal(observation, [episode, step, value])
                assert (reward, terminated, truncated) == (step, False, step == 6)
                assert (info["step"], info["episode"]) == (step, episode)

    def test_a_result_has_the_types_of_gymnasium(self, open_face):
        face = open_face("CountingEnv")
        observation, info = face.reset()
        assert type(observation) is np.ndarray
        assert observation.dtype == np.float32
        assert type(info) is dict
        _, reward, terminated, truncated, info = face.step(action(0.0))
        assert (type(reward), type(terminated), type(truncated), type(info)) == (float, bool, bool, dict)

    def test_an_observation_may_be_written_to_and_kept(self, open_face):
        face = open_face("CountingEnv")
        first, _ = face.reset()
        first += 100
        second = face.step(action(0.25))[0]
        np.testing.assert_array_equal(first, [101, 100, 100])
        np.testing.assert_array_equal(second, [1, 1, 0.25])

    @pytest.mark.parametrize("seed", [None, 0, 7, 2**31 - 1])
    def test_a_seed_arrives_unchanged(self, open_face, seed):
        _, info = open_face("CountingEnv").reset(seed=seed)
        assert info["seed"] == seed

    @pytest.mark.parametrize(
        "options", [None, {}, {"level": 3, "where": [1.5, None, "a\u00e9"], "deep": {"x": (1, 2)}}]
    )
    def test_options_arrive_unchanged(self, open_face, options):
        _, info = open_face("CountingEnv").reset(options=options)
        assert info["options"] == options

    def test_an_episode_can_be_left_in_the_middle(self, open_face):
        face = open_face("CountingEnv", length=9)
        face.reset()
        face.step(action(0.5))
        observation, _ = face.reset()
        np.testing.assert_array_equal(observation, [2, 0, 0])

    def test_nested_observations_keep_structure_dtype_and_order(self, open_face):
        face = open_face("NestedEnv", length=2)
        observation, _ = face.reset()
        assert_same(observation, nested(0, 0))
        observation, reward, terminated, truncated, _ = face.step(np.int64(3))
        assert_same(observation, nested(1, 3))
        assert (reward, terminated, truncated) == (0.5, False, False)
        assert face.step(np.int64(0))[2:4] == (True, False)

    def test_the_time_limit_of_old_gym_is_truncation(self, open_face):
        face = open_face("OldGymEnv", length=2)
        observation, _ = face.reset(seed=5)
        np.testing.assert_array_equal(observation, [0, 5])
        assert face.step(np.int64(0))[2:4] == (False, False)
        observation, reward, terminated, truncated, info = face.step(np.int64(0))
        assert (reward, terminated, truncated) == (1.0, False, True)
        assert info["TimeLimit.truncated"] is True
        assert info["seeds"] == [5]

    def test_done_of_old_gym_is_termination(self, open_face):
        face = open_face("OldGymEnv", length=2)
        face.reset()
        assert face.step(np.int64(1))[2:4] == (True, False)
        face.reset()
        face.step(np.int64(0))
        assert face.step(np.int64(1))[2:4] == (True, False), "the end at the limit's own step is the task's"

    def test_what_an_environment_prints_does_no_harm(self, open_face):
        face = open_face("PrintingEnv", length=3)
        face.reset()
        for step in (1, 2, 3):
            observation = face.step(action(0.125))[0]
            np.testing.assert_array_equal(observation, [1, step, 0.125])

    def test_an_environment_that_raises_goes_on_after_a_reset(self, open_face):
        face = open_face("RaisingEnv")
        face.reset()
        face.step(action(0.0))
        with pytest.raises(Exception, match="asked to raise in step"):
            face.step(action(0.75))
        observation, _ = face.reset()
        assert observation[1] == 0
        assert face.step(action(0.25))[0][1] == 1

    def test_a_slow_step_is_waited_for(self, open_face):
        face = open_face("SlowEnv")
        face.reset()
        observation = face.step(action(0.25))[0]
        np.testing.assert_array_equal(observation, [1, 1, 0.25])


def nested(steps, last):
    return {
        "image": np.arange(60, dtype="uint8").reshape(4, 5, 3) + np.uint8(steps),
        "pair": (np.array([-steps], "int64"), np.array([0.1, last / 4.0])),
        "deep": {"mode": np.int64(steps % 3)},
    }
