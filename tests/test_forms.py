"""Steps that are like the last one take a shorter way through worker and host: it must give what the long way gives."""

import gymnasium
import interpreters
import numpy as np
import pytest
from environments import ChangingEnv
from faces import Fault, WorkerFace

from farmer.values import MOST_FORMS, Values
from farmhand.worker import check, describe
from wire import codec, protocol
from wire.errors import BadAction

BOX = gymnasium.spaces.Box(-np.inf, np.inf, (5,), np.float32)
ACTIONS = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
SHAPES = [(), (0,), (1,), (5,), (3, 4), (2, 1, 3)]
DTYPES = ["<f4", "<f8", "<f2", "|u1", "<i8", "|b1"]


# The form of a message.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_message_made_by_its_form_is_the_one_that_encode_makes(shape, dtype):
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 2, shape).astype(dtype) for _ in range(3)]
    form = codec.Form(codec.encode((arrays[0], np.float64(0.0), False, True, {}, np.float64(0.0))))
    for array in arrays:
        data = codec.encode((array, np.float64(1.5), False, True, {}, np.float64(2.5)))
        assert form.encode(array.tobytes(), np.array([1.5, 2.5]).tobytes()) == data
        assert form.front == codec.front_of(data)
        start = form.start_in(data)
        assert data[start:] == array.tobytes() + np.array([1.5, 2.5]).tobytes()


def test_another_message_or_a_damaged_one_is_of_no_form():
    form = codec.Form(codec.encode({"action": np.zeros(3, "f4"), "repeat": 1}))
    good = codec.encode({"action": np.ones(3, "f4"), "repeat": 1})
    assert form.start_in(good) is not None
    others = [np.ones(4, "f4"), np.ones(3, "<i4"), np.ones((3, 1), "f4"), [1.0, 1.0, 1.0]]
    others = [codec.encode({"action": other, "repeat": 1}) for other in others]
    others += [codec.encode({"action": np.ones(3, "f4"), "repeat": 2}), b"", good[:11], good[:-1], good + b"\0"]
    for other in others:
        assert form.start_in(other) is None, other
    for position in range(len(good)):
        for bit in (1, 128):
            damaged = bytearray(good)
            damaged[position] ^= bit
            assert form.start_in(bytes(damaged)) is None, "byte %d" % position
    assert codec.front_of(b"") == codec.front_of(b"FRM1") == b""


# The worker.


@pytest.mark.parametrize("version", interpreters.VERSIONS)
@pytest.mark.slow
def test_any_sort_of_result_after_any_other_one_arrives_as_it_was(version):
    env = WorkerFace("ChangingEnv", {}, interpreters.python_with_numpy(version))
    sorts = np.random.default_rng(3).integers(0, len(ChangingEnv.SORTS), 600).tolist()
    alone, over, faults = ChangingEnv(), True, 0
    try:
        for number, sort in enumerate(sorts):
            if over:
                env.reset()
                alone.reset()
            action, repeat = np.array([sort], "float32" if number % 7 else "float64"), 1 + (number % 11 == 0)
            name = ChangingEnv.SORTS[sort]
            rewards = []
            for _ in range(repeat):
                observation, reward, terminated, truncated, info = alone.step(action)
                rewards.append(reward)
                if terminated or truncated:
                    break
            over = bool(terminated or truncated)
            if name in ("NaN", "infinite reward"):
                over, faults = True, faults + 1
                with pytest.raises(Fault, match=r"is nan|reward of inf"):
                    env.step(action, repeat)
                continue
            got = env.step(action, repeat)
            assert type(got[0]) is type(observation)
            np.testing.assert_array_equal(got[0], observation)
            assert getattr(got[0], "dtype", None) == getattr(observation, "dtype", None)
            assert got[1:4] == (float(sum(rewards)), bool(terminated), bool(truncated))
            assert got[4] == (info or {})
        assert faults > 20
    finally:
        env.close()


@pytest.mark.parametrize("shape", [(1,), (3,), (64,), (65,), (339,), (4096,), (4097,), (5, 7), ()])
@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (-2.0, 2.0), (0.0, np.inf)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_no_bad_number_gets_by_wherever_it_stands(shape, bounds, dtype):
    find = check.finder(describe.describe(gymnasium.spaces.Box(*bounds, shape, dtype)))
    good = np.ones(shape, dtype)
    assert find(good) is None
    size = max(1, good.size)
    for at in {0, size // 2, size - 1}:
        for bad in (np.nan, np.inf, -np.inf):
            value = good.copy()
            value.reshape(-1)[at] = bad
            assert "nan" in find(value)[1] or "inf" in find(value)[1]
        for number in (3.0, -1.0, 60000.0, 2e38, -3e38, 1.7e308):
            if abs(number) > float(np.finfo(dtype).max):
                continue
            value = good.copy()
            value.reshape(-1)[at] = number
            room = 0.1 * (bounds[1] - bounds[0] if np.isfinite(bounds[1]) else 1.0)
            fine = bounds[0] - room <= number <= bounds[1] + room and abs(number) < 3.4e38
            assert (find(value) is None) == fine, (at, number)


# The host.


def transition(obs, reward=1.0, terminated=False, truncated=False, info=None, seconds=0.25):
    numbers = np.float64(reward), np.float64(seconds)
    return obs, numbers[0], terminated, truncated, {} if info is None else info, numbers[1]


def test_a_known_result_is_read_as_decode_reads_it():
    values, rng = Values("x", BOX, ACTIONS), np.random.default_rng(2)
    assert values.transition(codec.encode(transition(np.zeros(5, "f4")))) is None, "none was seen before"
    for ended in ((False, False), (True, False), (False, True)):
        body = codec.encode(transition(np.zeros(5, "f4"), 1.0, *ended))
        values.remember(body, codec.decode(body))
        for _ in range(20):
            value = transition(rng.standard_normal(5).astype("f4"), rng.standard_normal(), *ended, seconds=rng.random())
            obs, *rest = values.transition(codec.encode(value))
            np.testing.assert_array_equal(obs, value[0])
            assert (obs.dtype, obs.flags.owndata, obs.flags.writeable) == (np.float32, True, True)
            assert rest == list(value[1:])
            assert [type(part) for part in rest] == [float, bool, bool, dict, float]
        assert values.transition(codec.encode(transition(np.full(5, 3e38, "f4"), 1.0, *ended))) is not None


def test_what_is_not_sound_or_not_alike_goes_the_long_way():
    values = Values("x", BOX, ACTIONS)
    body = codec.encode(transition(np.zeros(5, "f4")))
    values.remember(body, codec.decode(body))
    assert values.transition(body) is not None
    for at in range(5):
        for bad in (np.nan, np.inf, -np.inf):
            obs = np.zeros(5, "f4")
            obs[at] = bad
            assert values.transition(codec.encode(transition(obs))) is None
    bad_ones = [transition(np.zeros(5, "f4"), reward=np.nan), transition(np.zeros(5, "f4"), seconds=np.inf)]
    bad_ones += [transition(np.zeros(5, "f8")), transition(np.zeros(5, "f4"), info={"a": 1}), transition([0.0] * 5)]
    for value in bad_ones:
        assert values.transition(codec.encode(value)) is None
    damaged = bytearray(body)
    damaged[-20] ^= 1
    assert values.transition(bytes(damaged)) is None


def test_a_farm_that_goes_on_inventing_headers_fills_no_memory():
    values = Values("x", None, None)
    for length in range(1, 5 * MOST_FORMS):
        body = codec.encode(transition(np.zeros(length, "f4")))
        values.remember(body, codec.decode(body))
    assert len(values._result_forms) == MOST_FORMS


@pytest.mark.parametrize("repeat", [1, 4])
def test_a_batch_of_actions_is_written_as_one_by_one(repeat):
    values, batch = Values("x", BOX, ACTIONS), np.random.default_rng(4).uniform(-1, 1, (6, 2))
    each = [codec.encode({"action": row.astype("f4"), "repeat": repeat}) for row in batch]
    for form in (batch, batch.astype("f4"), batch.tolist(), list(batch), np.asfortranarray(batch)):
        assert values.actions(form, range(6), repeat) == each


@pytest.mark.parametrize("bad", [[0.0, np.nan], [0.0, np.inf], [0.0], [0.0, 0.0, 0.0], ["a", "b"], None, [None, 1.0]])
def test_one_bad_action_of_a_batch_is_named(bad):
    with pytest.raises(BadAction, match="the action for slot 5 "):
        Values("x", BOX, ACTIONS).actions([[0.0, 0.0], [0.5, 0.5], bad], [3, 4, 5], 1)


def test_a_header_takes_no_part_in_the_frame_of_a_long_body():
    body = bytes(200)
    assert protocol.head(protocol.TRANSITION, 7, len(body), 2) + body == protocol.pack(protocol.TRANSITION, 7, body, 2)
    with pytest.raises(protocol.FrameError, match="over the limit"):
        protocol.head(protocol.TRANSITION, 7, protocol.MAX_BODY + 1)
