"""The ledger: at every instant, of every slot, farm and pool, sent == sum of all buckets + under way."""

import contextlib
import os
import random
import re
import signal
import threading
import time

import gymnasium
import numpy as np
import pytest
from farms import farm_here, running_farm
from helpers import poll_until

from farmer import Farmer
from farmer.ledger import BUCKETS, total
from farmer.replies import ReplyReader
from farmer.spaces import why_unsound
from farmer.values import Values
from wire import codec, protocol
from wire.errors import BadSlot

RAISING = "environments:RaisingEnv"
SLOW = "environments:SlowEnv"
NAMES = {"sent", *BUCKETS, "under way"}


def assert_sums(status):
    """Each ledger sums up, and those of slots make those of farms."""
    for farm in status["farms"]:
        for ledger in [farm["ledger"], *(place["ledger"] for place in farm["places"])]:
            assert ledger.keys() == NAMES
            assert ledger["sent"] == sum(count for name, count in ledger.items() if name != "sent"), ledger
        assert farm["ledger"] == total(place["ledger"] for place in farm["places"])
    return status["ledger"]


class Auditor:
    """Asks for the status as often as it can, and keeps the first ledger that does not sum up."""

    def __init__(self, farmer):
        self.looks, self.error, self._farmer, self._over = 0, None, farmer, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._over.is_set() and self.error is None:
            try:
                assert_sums(self._farmer.status())
            except AssertionError as error:
                self.error = error
            self.looks += 1
            time.sleep(0.001)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()
        assert self.error is None, self.error
        assert self.looks > 20


def hammer(farmer, rng, seconds, between, buckets=()):
    """Steps whoever is ready with an action drawn by `rng`, and does `between` every now and then.

    It goes on, on a slow machine, until each of `buckets` holds a step.
    """
    start = time.monotonic()
    end, limit = start + seconds, start + 40
    while time.monotonic() < end or (
        time.monotonic() < limit and not all(farmer.status()["ledger"][bucket] for bucket in buckets)
    ):
        fresh = farmer.vacant()
        if fresh:
            farmer.reset(fresh)
        for row in farmer.collect(timeout=40):
            if row.lost or row.terminated or row.truncated:
                continue
            with contextlib.suppress(BadSlot):  # its farm has left since
                farmer.send([[rng.choice([0.0, 0.1, 0.2, 0.6, 0.95] if rng.random() < 0.2 else [0.0])]], [row.slot])
        if rng.random() < 0.02:
            between()


@pytest.mark.slow
def test_it_sums_at_every_instant_while_everything_goes_wrong():
    rng = random.Random(4)
    with running_farm(RAISING, slots=3) as one, running_farm(RAISING, slots=2) as other:
        pool = [(one.address, 3), (other.address, 2)]
        with Farmer(RAISING, pool) as farmer, Auditor(farmer):

            def trouble():
                if rng.random() < 0.5:
                    pids = [pid for pid in one.workers() if pid]
                    if pids:
                        os.kill(rng.choice(pids), signal.SIGKILL)
                else:
                    farmer.abandon([rng.randrange(5)])

            buckets = ("done", "crashed", "invalid", "abandoned")
            hammer(farmer, rng, 3.0, trouble, buckets)
            other.freeze()  # with steps under way, most likely
            for slot in (3, 4):
                with contextlib.suppress(BadSlot):  # it is busy, or has no episode
                    farmer.send([[0.0]], [slot])
            other.kill()
            poll_until(lambda: not farmer.status()["farms"][1]["connected"], 30, "the host to leave the dead farm")
            hammer(farmer, rng, 0.5, trouble)
        ledger = assert_sums(farmer.status())
        assert ledger["under way"] == 0, "nothing is after the end"
        for bucket in buckets:
            assert ledger[bucket] > 0, ledger


@pytest.mark.slow
def test_steps_that_are_under_way_when_the_farmer_closes_are_abandoned():
    with farm_here("SlowEnv", slots=2) as address:
        farmer = Farmer(SLOW, [(address, 2)])
        farmer.reset([0, 1])
        farmer.recv(min_ready=2)
        farmer.send([[3.0], [3.0]], [0, 1])
        assert assert_sums(farmer.status())["under way"] == 2
        farmer.close()
        ledger = assert_sums(farmer.status())
        assert (ledger["sent"], ledger["abandoned"], ledger["under way"]) == (2, 2, 0)


# What a worker of another version, or a broken one, might say.

BOX = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
GOOD = np.zeros(3, np.float32)


def transition(obs=GOOD, reward=1.0, info=None, seconds=0.0):
    return (obs, reward, False, False, {} if info is None else info, seconds)


@pytest.mark.parametrize(
    ("kind", "value", "words", "bucket"),
    [
        (protocol.LOST, {"text": "gone"}, "gone", "crashed"),
        (protocol.LOST, {"text": "gone", "bucket": "crashed"}, "gone", "crashed"),
        (protocol.LOST, {"text": "hung", "bucket": "timed out"}, "hung", "timed out"),
        (protocol.LOST, {"text": "NaN", "bucket": "invalid"}, "NaN", "invalid"),
        (protocol.LOST, {"text": "no", "bucket": "lost with its farm"}, "no", "lost with its farm"),
        (protocol.LOST, {"text": "odd", "bucket": "done"}, "odd", "invalid"),
        (protocol.LOST, {}, "text", "invalid"),
        (protocol.FAULT, {"type": "ValueError", "text": "no", "traceback": "far"}, "ValueError: no\nfar", "invalid"),
        (protocol.FAULT, 7, "invalid", "invalid"),
        (protocol.TRANSITION, transition(np.zeros(2, np.float32)), r"shape \(2,\) instead of \(3,\)", "invalid"),
        (protocol.TRANSITION, transition(np.full(3, np.nan, np.float32)), "NaN or infinity", "invalid"),
        (protocol.TRANSITION, transition(np.array(["a", "b", "c"])), "<U1", "invalid"),
        (protocol.TRANSITION, transition(None), "shape", "invalid"),
        (protocol.TRANSITION, transition(reward=float("nan")), "reward is nan", "invalid"),
        (protocol.TRANSITION, transition(reward=float("inf")), "reward is inf", "invalid"),
        (protocol.TRANSITION, transition(reward="much"), "real number|must be", "invalid"),
        (protocol.TRANSITION, transition(reward=None), "real number|must be", "invalid"),
        (protocol.TRANSITION, transition(info=[1]), "info", "invalid"),
        (protocol.TRANSITION, transition()[:5], "unpack", "invalid"),
        (protocol.TRANSITION, {"reward": 1.0}, "unpack", "invalid"),
        (protocol.OBSERVATION, (GOOD, {}, 0.0), "observation in answer to step", "invalid"),
        (protocol.READY, {}, "ready in answer to step", "invalid"),
    ],
)
def test_what_is_no_sound_result_is_a_lost_step_in_its_bucket(reader, kind, value, words, bucket):
    found, why, into = reader.read(protocol.STEP, kind, codec.encode(value))
    assert (found, into) == (None, bucket)
    assert re.search(words, why), why


@pytest.fixture
def reader():
    """Of CountingEnv's replies."""
    space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    values = Values("environments:CountingEnv", space, gymnasium.spaces.Box(-1, 1, (1,), np.float32))
    return ReplyReader(values, space)


def test_bytes_that_are_no_message_are_a_lost_step_and_a_good_one_passes(reader):
    body = codec.encode(transition())
    assert reader.read(protocol.STEP, protocol.TRANSITION, body)[1:] == (None, "done")
    damaged = bytearray(body)
    damaged[-1] ^= 4
    for wrong in (bytes(damaged), b"", body[:-3], b"x" * 40):
        found, why, bucket = reader.read(protocol.STEP, protocol.TRANSITION, wrong)
        assert (found, bucket) == (None, "invalid")
        assert why.startswith("an invalid result: ")


def test_nested_observations_are_looked_into():
    space = gymnasium.spaces.Dict({"pair": gymnasium.spaces.Tuple([BOX, gymnasium.spaces.Discrete(3)])})
    assert why_unsound(space, {"pair": (GOOD, 1)}) is None
    assert "NaN" in why_unsound(space, {"pair": (np.full(3, np.inf, np.float32), 1)})
    assert "no dict of ['pair']" in why_unsound(space, {"pairs": 1})
    assert "no tuple of 2" in why_unsound(space, {"pair": (GOOD,)})
    assert why_unsound(None, object()) is None
    assert why_unsound(BOX, [0.0, 1.0, 2.0]) is None
    assert why_unsound(gymnasium.spaces.Box(0, 255, (2,), np.uint8), np.zeros(2, np.uint8)) is None


def test_an_unsound_result_ends_its_episode_and_the_slot_goes_on():
    with farm_here("UnsoundEnv") as address, Farmer("environments:UnsoundEnv", [(address, 1)]) as farmer:
        for action, words in ((0.3, "shape"), (0.5, "NaN"), (0.7, "reward")):
            poll_until(farmer.vacant, 30, "the slot")
            farmer.reset([0])
            assert farmer.recv().first.all()
            farmer.send([[0.0]], [0])
            assert not farmer.recv().lost.any()
            farmer.send([[action]], [0])
            batch = farmer.recv()
            assert batch.lost.tolist() == [True]
            assert batch.obs[0, 1] == 1, "the last good observation"
            assert np.isfinite(batch.reward).all()
            assert words in batch.info[0]["lost"] or "nan" in batch.info[0]["lost"]
        assert assert_sums(farmer.status())["invalid"] == 3
