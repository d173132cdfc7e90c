"""What reaches a learner and a simulator: values of the declared form, finite, and within their bounds."""

import sys
import textwrap

import gymnasium
import interpreters
import numpy as np
import pytest
from faces import TESTS, Fault, WorkerProcess
from gymnasium import spaces

from farmhand.worker import check, describe
from wire import protocol

F32 = "float32"
INF = np.inf


def trouble(space, value, **kwargs):
    """What the worker would say of this value; None when it is fine."""
    found = check.finder(describe.describe(space), **kwargs)(value)
    return None if found is None else "value%s %s" % found


def box(low=-1.0, high=1.0, shape=(3,), dtype=F32):
    return spaces.Box(low, high, shape, dtype)


NESTED = spaces.Dict(
    {
        "image": box(0, 255, (2, 2), "uint8"),
        "pair": spaces.Tuple([spaces.Discrete(3, start=5), box()]),
        "deep": spaces.Dict({"buttons": spaces.MultiBinary(2), "gears": spaces.MultiDiscrete([2, 1])}),
    }
)
GOOD = {
    "image": np.zeros((2, 2), "uint8"),
    "pair": (np.int64(5), np.zeros(3, F32)),
    "deep": {"buttons": np.array([0, 1], "int8"), "gears": np.array([1, 0])},
}


def with_change(value, path, new):
    """A copy of a nested value with one part replaced."""
    if not path:
        return new
    if isinstance(value, tuple):
        return tuple(with_change(part, path[1:], new) if at == path[0] else part for at, part in enumerate(value))
    return {key: with_change(part, path[1:], new) if key == path[0] else part for key, part in value.items()}


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (box(), np.zeros(3)),  # float64 for float32
        (box(), np.zeros(3, "int64")),
        (box(), [0.0, 0.5, 1.0]),
        (box(shape=()), 0.5),
        (box(), np.array([1.1, -1.1, 0.0])),  # a simulator that leaves its bounds a little
        (box(-INF, INF), np.array([1e30, -1e30, 3e38], F32)),
        (box(-INF, INF), np.full(3, 1e38)),
        (box(0.0, INF), np.array([-0.05, 1e9, 0.0])),
        (box(0.0, 0.0), np.array([-7.0, 7.0, 0.0])),  # low == high bounds nothing: osim-rl declares its arm so
        (box(0, 255, (2, 2), "uint8"), np.full((2, 2), 255)),
        (box(0, 1, (2,), bool), np.array([True, False])),
        (box(-1, 1, (3,), "float16"), np.zeros(3)),
        (spaces.Discrete(3), 2),
        (spaces.Discrete(3), np.int32(0)),
        (spaces.Discrete(2), True),
        (spaces.Discrete(3), np.array(1)),
        (NESTED, GOOD),
        (spaces.Text(9), "anything"),
        (None, {"nothing": ["is", None, 1.5, np.ones(3)]}),
    ],
)
def test_what_is_fine_passes(space, value):
    assert trouble(space, value) is None


@pytest.mark.parametrize(
    ("space", "value", "words"),
    [
        (box(), np.array([0.0, np.nan, np.nan], F32), "value[1] is nan; 2 of its 3 values are not finite"),
        (box(-INF, INF), np.array([0.0, 0.0, -INF], F32), "value[2] is -inf"),
        (box(-INF, INF), np.array([0.0, np.nan, 0.0]), "value[1] is nan"),
        (box(-INF, INF), np.array([0.0, 1e39, 0.0]), "value[1] is 1e+39"),  # infinite in the network's float32
        (box(0.0, INF), np.array([0.0, INF, 0.0]), "value[1] is inf"),
        (box(), np.array([0.0, 0.0, 1.3], F32), "value[2] is 1.3, out of bounds, its space says [-1.0, 1.0]"),
        (box(0.0, INF), np.array([0.0, -0.2, 5.0]), "value[1] is -0.2, out of bounds, its space says [0.0, inf]"),
        (box(), np.zeros(4, F32), "value has shape (4,); its space is Box float32 (3,)"),
        (box(), np.zeros((3, 1), F32), "value has shape (3, 1)"),
        (box(), np.array(["1"] * 3), "value is of dtype <U1; its space is Box float32 (3,)"),
        (box(), np.array([1j] * 3), "value is of dtype complex128"),
        (box(), np.array([None] * 3), "value is of dtype object"),
        (box(), None, "value is no array: NoneType None"),
        (box(), [[1.0], [1.0, 2.0]], "value is no array"),
        (box(0, 255, (2, 2), "uint8"), np.zeros((2, 2)), "value is of dtype float64; its space is Box uint8 (2, 2)"),
        (box(0, 255, (2, 2), "uint8"), np.array([[0, 0], [0, 256]]), "value[1, 1] is 256, out of bounds"),
        (box(0, 10, (2,), "int32"), np.array([0, 11]), "value[1] is 11, out of bounds, its space says [0, 10]"),
        (box(0, 1, (2,), bool), np.array([0, 1]), "value is of dtype int64"),
        (spaces.Discrete(3), 3, "value is 3; its space is Discrete from 0 to 2"),
        (spaces.Discrete(3, start=5), 4, "value is 4; its space is Discrete from 5 to 7"),
        (spaces.Discrete(3), 1.0, "value is no whole number: float 1.0"),
        (spaces.Discrete(3), np.float32(1.0), "value is no whole number"),
        (NESTED, with_change(GOOD, ["pair", 1], np.array([0, 0, np.nan], F32)), "value['pair'][1][2] is nan"),
        (NESTED, with_change(GOOD, ["pair", 0], 9), "value['pair'][0] is 9"),
        (NESTED, with_change(GOOD, ["pair"], (5,)), "value['pair'] is a tuple of 1; its space is a Tuple of 2"),
        (NESTED, with_change(GOOD, ["pair"], 5), "value['pair'] is no tuple"),
        (NESTED, with_change(GOOD, ["deep", "gears"], np.array([1, 1])), "value['deep']['gears'][1] is 1, out of"),
        (NESTED, with_change(GOOD, ["deep", "gears"], np.zeros(3, int)), "its space is MultiDiscrete int64 (2,)"),
        (NESTED, with_change(GOOD, ["deep", "buttons"], np.array([0, 2])), "value['deep']['buttons'][1] is 2"),
        (NESTED, with_change(GOOD, ["deep"], {"gears": [0, 0]}), "value['deep'] lacks 'buttons'"),
        (NESTED, dict(GOOD, more=1), "value has 'more', which its space lacks"),
        (NESTED, [1], "value is no dict"),
        (None, {"a": [1.0, {"b": np.array([0, np.nan])}]}, "value['a'][1]['b'][1] is nan"),
        (None, (1, float("inf")), "value[1] is inf"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(space, value, words):
    assert words in trouble(space, value)


def test_without_bounds_form_and_finiteness_still_count():
    assert trouble(box(), np.array([9.0, 0, 0]), bounds=False) is None
    assert trouble(spaces.Discrete(3), 7, bounds=False) is None
    assert trouble(spaces.MultiDiscrete([2, 2]), np.array([5, 5]), bounds=False) is None
    assert "is nan" in trouble(box(), np.array([np.nan, 0, 0]), bounds=False)
    assert "is 256" in trouble(box(0, 9, (2,), "uint8"), np.array([256, 0]), bounds=False), "uint8 cannot hold it"
    assert trouble(box(0, 9, (2,), "uint8"), np.array([255, 0]), bounds=False) is None


def test_an_action_may_leave_its_bounds_by_rounding_only():
    assert trouble(box(), np.array([1 + 1e-6, 0, -1 - 1e-6]), slack=check.ROUNDING) is None
    assert "out of bounds" in trouble(box(), np.array([1.001, 0, 0]), slack=check.ROUNDING)


@pytest.mark.parametrize("seed", range(30))
def test_samples_pass_and_one_nan_anywhere_is_found(seed):
    rng = np.random.default_rng(seed)
    lows = rng.choice([-INF, -3.0, 0.0], size=4).astype(F32)
    highs = np.where(rng.random(4) < 0.5, INF, 5.0).astype(F32)
    space = spaces.Dict({"a": spaces.Tuple([spaces.Box(lows, highs), spaces.Discrete(4)]), "b": box(dtype="float64")})
    space.seed(seed)
    sample = space.sample()
    assert trouble(space, sample) is None
    at = int(rng.integers(4))
    sample["a"][0][at] = np.nan
    assert trouble(space, sample) == f"value['a'][0][{at}] is nan"


@pytest.mark.parametrize(
    "reward", [0, True, 1.5, np.float32(1.5), np.float64(-2), np.int8(3), np.array([1.5]), np.array(2), [4.0]]
)
def test_a_reward_is_any_one_number(reward):
    number = check.reward(reward)
    assert type(number) is float
    assert number == np.asarray(reward, float).reshape(-1)[0]


@pytest.mark.parametrize(
    "reward",
    [float("nan"), INF, -INF, 1e39, np.float32("nan"), None, "3", [1.0, 2.0], [], 1j, {"r": 1}, np.array([np.nan])],
)
def test_a_reward_that_is_no_finite_number_is_refused(reward):
    with pytest.raises(check.InvalidReward, match="step returned a reward"):
        check.reward(reward)


# ---- in the worker ----

FORMS = """
    import numpy as np

    class Box(object):
        def __init__(self, low, high, shape):
            self.dtype, self.shape = np.dtype("float32"), shape
            self.low, self.high = np.full(shape, low, "float32"), np.full(shape, high, "float32")

    class Env(object):
        observation_space, action_space = Box(-1, 1, (2,)), Box(-2, 2, (1,))
        made = 0

        def __init__(self, strict=False):
            Env.made += 1
            self.steps = 0
            if strict:  # as a simulator that wants no number to go wrong in it
                import warnings
                np.seterr(all="raise")
                warnings.simplefilter("error")

        def reset(self, seed=None, options=None):
            self.answer = options or {}
            return self.answer.get("first", np.zeros(2, "float32")), {"made": Env.made, "steps": self.steps}

        def step(self, action):
            self.steps += 1
            obs = self.answer.get("obs", np.zeros(2, "float32"))
            return obs, self.answer.get("reward", 1.0), False, False, {}
"""


@pytest.fixture
def start(tmp_path):
    """start(version, **kwargs) -> a worker with the environment above."""
    (tmp_path / "forms.py").write_text(textwrap.dedent(FORMS))
    started = []

    def make(version=None, check_bounds=True, **kwargs):
        worker = WorkerProcess(interpreters.python_with_numpy(version) if version else sys.executable)
        started.append(worker)
        spec = {"kind": "factory", "module": "forms", "factory": "Env"}
        order = {"env": spec, "kwargs": kwargs, "path": [str(tmp_path)], "check_bounds": check_bounds}
        worker.ask(protocol.CONSTRUCT, order)
        return worker

    yield make
    for worker in started:
        worker.end()


def reset(worker, **options):
    return worker.ask(protocol.RESET, {"seed": None, "options": options})


def step(worker, action=(0.0,)):
    return worker.ask(protocol.STEP, {"action": np.array(action, "float32"), "repeat": 2})


BAD_RESULTS = [
    ({"obs": np.array([0, np.nan], F32)}, r"InvalidObservation in step: observation\[1\] is nan"),
    ({"obs": np.array([-INF, 0])}, r"InvalidObservation in step: observation\[0\] is -inf"),
    ({"obs": np.array([0, 9], F32)}, r"InvalidObservation in step: observation\[1\] is 9.0, out of bounds"),
    ({"obs": np.zeros(3, F32)}, "InvalidObservation in step: observation has shape"),
    ({"obs": None}, "InvalidObservation in step: observation is no array"),
    ({"reward": float("nan")}, "InvalidReward in step: step returned a reward of nan"),
    ({"reward": None}, "InvalidReward in step: step returned a reward that is not one number"),
]


@pytest.mark.parametrize("version", interpreters.VERSIONS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.slow
def test_a_bad_result_is_a_fault_and_the_environment_is_made_anew(start, version, strict):
    worker = start(version, strict=strict)
    for made, (options, text) in enumerate(BAD_RESULTS, 1):
        assert reset(worker, **options)[1]["made"] == made
        with pytest.raises(Fault, match=text):
            step(worker)
        with pytest.raises(Fault, match="NoEpisode"):
            step(worker)
    with pytest.raises(Fault, match=r"InvalidObservation in reset: observation\[0\] is nan"):
        reset(worker, first=np.full(2, np.nan, F32))
    assert reset(worker)[1]["made"] == len(BAD_RESULTS) + 2
    assert step(worker)[1] == 2.0


@pytest.mark.parametrize("version", ["2.7", "3.13"])
@pytest.mark.parametrize(
    ("action", "text"),
    [
        ((np.nan,), r"InvalidAction in step: action\[0\] is nan"),
        ((2.5,), r"action\[0\] is 2.5, out of bounds, its space says \[-2.0, 2.0\]"),
        ((0.0, 0.0), r"action has shape \(2,?\)"),
    ],
)
def test_a_bad_action_never_reaches_the_environment(start, version, action, text):
    worker = start(version)
    reset(worker)
    step(worker)
    with pytest.raises(Fault, match=text):
        step(worker, action)
    with pytest.raises(Fault, match="NoEpisode"):
        step(worker)
    assert reset(worker)[1] == {"made": 1, "steps": 2}, "the same environment, and it had the good steps only"


def test_bounds_can_be_left_out(start):
    worker = start(check_bounds=False)
    reset(worker, obs=np.array([0, 9], F32))
    assert step(worker, (7.0,))[0][1] == 9.0
    with pytest.raises(Fault, match="is nan"):
        step(worker, (np.nan,))


#: Real environments whose observations must raise no alarm: with bounds, without, whole numbers, tuples.
REAL = [
    "CartPole-v1",
    "MountainCarContinuous-v0",
    "Acrobot-v1",
    "Pendulum-v1",
    "FrozenLake-v1",
    "Blackjack-v1",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_environment_raises_no_alarm(name):
    actions = gymnasium.make(name).action_space
    actions.seed(1)
    worker = WorkerProcess()
    try:
        worker.ask(protocol.CONSTRUCT, {"env": {"kind": "gym", "id": name}, "path": [str(TESTS)]})
        over = True
        for _ in range(300):
            if over:
                worker.ask(protocol.RESET, {"seed": 3, "options": None})
            over = any(worker.ask(protocol.STEP, {"action": actions.sample(), "repeat": 1})[2:4])
    finally:
        worker.end()
