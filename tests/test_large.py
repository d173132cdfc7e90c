"""Large observations and actions arrive bit for bit, whatever carries them, and are not copied without need."""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import sys
import threading
import zlib

import interpreters
import msgpack
import numpy as np
import pytest
from environments import LargeEnv
from faces import WorkerFace
from farms import TESTS, farm_here
from gymnasium.vector import AutoresetMode
from helpers import poll_until

from farmer import Farmer, RemoteEnv, make_vec
from farmer.pyro.proxy import LONG as LONG_MESSAGE
from farmer.pyro.proxy import _Socket
from farmer.values import Values
from farmhand import leases, messages
from farmhand.catalog import Catalog
from farmhand.supervisor import Supervisor
from farmhand.worker_process import PIPE_SIZE
from wire import auth, codec, protocol, sealed

ENV = "environments:LargeEnv"
FRAME = {"shape": [84, 84, 4], "dtype": "uint8"}
MEGABYTE = {"shape": [512, 512], "dtype": "float32"}
KINDS = [pytest.param(FRAME, id="84x84x4 uint8"), pytest.param(MEGABYTE, id="1 MB float32")]


def alone(kind, seed, steps):
    """What an environment of that seed observes after so many steps."""
    env = LargeEnv(**kind)
    env.reset(seed)
    env.steps = steps
    return env.look()


def assert_same(found, wanted):
    np.testing.assert_array_equal(found, wanted, strict=True)  # shape and dtype as well
    assert found.flags.writeable


def whole_batch(pool, count):
    """All slots' rows, by slot."""
    rows = {}
    while len(rows) < count:
        batch = pool.recv(1, 30.0)
        assert not batch.lost.any(), batch.info
        rows.update((int(slot), (batch.obs[row], batch)) for row, slot in enumerate(batch.slot))
    return rows


# What arrives.


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_gets_every_bit_of_each_slots_own_observation(kind, slots):
    with farm_here("LargeEnv", kind, slots) as address, Farmer(ENV, [(address, slots)]) as pool:
        for seed in (0, 100):
            pool.reset(range(slots), range(seed, seed + slots))
            for slot, (obs, batch) in whole_batch(pool, slots).items():
                assert_same(obs, alone(kind, seed + slot, 0))
                assert batch.first.all()
            for step in (1, 2, 3):
                pool.send(np.zeros((slots, 1), np.float32), range(slots))
                for slot, (obs, batch) in whole_batch(pool, slots).items():
                    assert batch.obs.dtype == kind["dtype"]
                    assert batch.obs.shape[1:] == tuple(kind["shape"])
                    assert_same(obs, alone(kind, seed + slot, step))
                    assert (batch.reward == 0.5 * step).all()
                    assert (batch.terminated == (step == 3)).all()
        pool.reset(range(slots), range(slots))
        whole_batch(pool, slots)
        together = pool.step(np.zeros((slots, 1), np.float32), range(slots))
        for slot, obs in zip(together.slot, together.obs, strict=True):
            assert_same(obs, alone(kind, int(slot), 1))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_env_stacks_them_and_hands_out_the_last_one_of_an_episode(kind, mode):
    slots, seeds = 3, [5, 6, 7]
    with farm_here("LargeEnv", kind, slots) as address, make_vec(ENV, slots, [(address, slots)], mode) as envs:
        still = np.zeros((slots, 1), np.float32)
        obs, _ = envs.reset(seed=seeds)
        assert_same(obs, np.stack([alone(kind, seed, 0) for seed in seeds]))
        for step in (1, 2):
            assert_same(envs.step(still)[0], np.stack([alone(kind, seed, step) for seed in seeds]))
        obs, rewards, terminated, _, infos = envs.step(still)
        assert terminated.all()
        assert (rewards == 1.5).all()
        last = np.stack([alone(kind, seed, 3) for seed in seeds])
        if mode is AutoresetMode.SAME_STEP:
            assert_same(np.stack(list(infos["final_obs"])), last)
        else:
            assert_same(obs, last)
            obs = envs.step(still)[0]
        assert_same(obs, np.stack([alone(kind, 0, 0)] * slots))  # the next episode has no seed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_remote_environment_gives_arrays_of_its_callers_own(kind):
    with farm_here("LargeEnv", kind) as address:
        env = RemoteEnv(ENV, [(address, 1)])
        try:
            seen = [env.reset(seed=9)[0]] + [env.step(np.zeros(1, np.float32))[0] for _ in range(3)]
        finally:
            env.close()
    for step, obs in enumerate(seen):
        assert_same(obs, alone(kind, 9, step))
        obs[:] = 0  # nobody else's


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_large_actions_arrive_as_they_were_sent(kind):
    slots, rng = 2, np.random.default_rng(1)
    with (
        farm_here("LargeEnv", dict(kind, echo=True, length=99), slots) as address,
        Farmer(ENV, [(address, slots)]) as pool,
    ):
        pool.reset(range(slots))
        whole_batch(pool, slots)
        for _ in range(3):
            actions = rng.integers(0, 256, (slots, *kind["shape"])).astype(kind["dtype"])
            pool.send(actions, range(slots))
            for slot, (obs, _) in whole_batch(pool, slots).items():
                assert_same(obs, actions[slot])


def test_a_connection_with_a_key_carries_them_signed(tmp_path, monkeypatch):
    path = tmp_path / "farm.key"
    auth.new_key(path)
    slots, signed = 3, []
    of = sealed.Seal.of
    monkeypatch.setattr(sealed.Seal, "of", lambda self, *parts: signed.append(sum(map(len, parts))) or of(self, *parts))
    with (
        farm_here("LargeEnv", MEGABYTE, slots, key=auth.load_key(path)) as address,
        Farmer(ENV, [(address, slots)], key_file=path) as pool,
    ):
        pool.reset(range(slots), range(slots))
        whole_batch(pool, slots)
        batch = pool.step(np.zeros((slots, 1), np.float32), range(slots))
        for slot, obs in zip(batch.slot, batch.obs, strict=True):
            assert_same(obs, alone(MEGABYTE, int(slot), 1))
    assert max(signed) > 1 << 20


@pytest.mark.slow
def test_what_32_slots_of_a_megabyte_say_at_once_is_within_every_limit():
    kind = {"shape": [4 * 512, 512], "dtype": "float32"}  # of 8 workers, to spare the others' start
    with farm_here("LargeEnv", kind, 8) as address, Farmer(ENV, [(address, 8)]) as pool:
        pool.reset(range(8), range(8))
        whole_batch(pool, 8)
        batch = pool.step(np.zeros((8, 1), np.float32), range(8))
        assert batch.obs.nbytes == 32 << 20
        for slot, obs in zip(batch.slot, batch.obs, strict=True):
            assert_same(obs, alone(kind, int(slot), 1))


@pytest.mark.slow
def test_more_than_one_message_may_carry_comes_in_several(monkeypatch):
    monkeypatch.setattr(leases, "MOST_BYTES", 5 << 19)  # two of them, and not three
    messages = []
    taken = leases.Lease.take_replies
    monkeypatch.setattr(
        leases.Lease, "take_replies", lambda self: messages.append(taken(self)) or messages[-1], raising=True
    )
    with farm_here("LargeEnv", MEGABYTE, 5) as address, Farmer(ENV, [(address, 5)]) as pool:
        pool.reset(range(5), range(5))
        for slot, (obs, _) in whole_batch(pool, 5).items():
            assert_same(obs, alone(MEGABYTE, slot, 0))
        batch = pool.step(np.zeros((5, 1), np.float32), range(5))
        assert sorted(batch.slot) == [0, 1, 2, 3, 4]
    sizes = [sum(len(reply.body) for _, reply in each) for each in messages]
    assert max(sizes) <= 5 << 19
    assert sum(sizes) > 10 << 20


def test_one_reply_goes_out_however_large_it_is(monkeypatch):
    monkeypatch.setattr(leases, "MOST_BYTES", 1000)
    with farm_here("LargeEnv", MEGABYTE, 2) as address, Farmer(ENV, [(address, 2)]) as pool:
        pool.reset([0, 1], [0, 1])
        assert sorted(whole_batch(pool, 2)) == [0, 1]


@pytest.mark.parametrize("size", [10, protocol.LARGE, 5 * protocol.LARGE])
def test_no_changed_byte_of_an_exchange_gets_by(size):
    body = codec.encode((np.arange(size, dtype="u1"), np.float64(1.0)))
    told = protocol.checksum([1], [[2, 3, body]], protocol.sums([[2, 3, body]]))
    for position in [*range(16), len(body) // 2, len(body) - 1]:
        damaged = bytearray(body)
        damaged[position] ^= 1
        rows = [[2, 3, bytes(damaged)]]
        assert protocol.checksum([1], rows, protocol.sums(rows)) != told, position
    for rows in ([[2, 4, body]], [[2, 3, body + b"x"]], [[2, 3, body], [2, 3, body]], []):
        assert protocol.checksum([1], rows, protocol.sums(rows)) != told


def test_what_a_body_says_of_itself_is_held_against_the_sum_that_a_host_has():
    body = codec.encode((np.zeros(20000, "f4"), np.float64(1.0), False, False, {}, np.float64(2.0)))
    (crc,) = protocol.sums([[body]])
    values = Values("x", None, None)
    values.remember(body, codec.decode(body, crc))
    assert values.transition(body, crc) is not None
    damaged = body[:-1] + bytes([body[-1] ^ 1])
    for other, its in ((body, crc ^ 1), (damaged, *protocol.sums([[damaged]]))):
        assert values.transition(other, its) is None
        with pytest.raises(codec.CodecError, match="a damaged message"):
            codec.decode(other, its)


def test_a_host_goes_over_a_large_result_once_to_check_it(monkeypatch):
    gone_over = {"exchange": 0, "codec": 0}

    class Counting:
        def __init__(self, name):
            self.name = name

        def crc32(self, data, *start):
            gone_over[self.name] += len(data) if threading.current_thread() is threading.main_thread() else 0
            return zlib.crc32(data, *start)

    with farm_here("LargeEnv", dict(MEGABYTE, length=99), 2) as address, Farmer(ENV, [(address, 2)]) as pool:
        pool.reset([0, 1], [0, 1])
        whole_batch(pool, 2)
        action = np.zeros((2, 1), np.float32)
        for _ in range(2):  # the first one goes the general way
            pool.step(action, [0, 1])
        monkeypatch.setattr(protocol, "zlib", Counting("exchange"))
        monkeypatch.setattr(codec, "_crc32", Counting("codec").crc32)
        assert pool.step(action, [0, 1]).obs.nbytes == 2 << 20  # fetched in this thread
        monkeypatch.undo()
    assert 2 << 20 < gone_over["exchange"] < 5 << 19
    assert gone_over["codec"] < 10000


@pytest.mark.parametrize("version", interpreters.VERSIONS)
@pytest.mark.slow
def test_a_worker_in_any_python_writes_and_reads_them_whole(version):
    for kind in (FRAME, MEGABYTE):
        for echo in (False, True):
            face = WorkerFace("LargeEnv", dict(kind, echo=echo), interpreters.python_with_numpy(version))
            try:
                np.testing.assert_array_equal(face.reset(3)[0], alone(kind, 3, 0), strict=True)
                for step in (1, 2, 3):
                    action = alone(kind, 8, step) if echo else np.zeros(1, "float32")
                    wanted = action if echo else alone(kind, 3, step)
                    np.testing.assert_array_equal(face.step(action)[0], wanted, strict=True)
            finally:
                face.close()


# What carries them: whole, and without a copy.


def frames_of(rng, count=30):
    """Frames of all lengths, and the stream of them."""
    lengths = [0, 1, 100, protocol.LONG, protocol.LONG + 1, 3 * protocol.LONG]
    frames = []
    for seq in range(count):
        body = rng.integers(0, 256, lengths[rng.integers(len(lengths))]).astype("u1").tobytes()
        frames.append((protocol.TRANSITION, int(rng.integers(4)), seq, body))
    return frames, b"".join(protocol.pack(kind, seq, body, flags) for kind, flags, seq, body in frames)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [30, 5000, 200000, 1 << 20])
def test_frames_are_cut_alike_however_they_are_dealt_out_and_read(most, seed):
    if most == 30 and seed:
        pytest.skip("slow, and once is enough")
    rng = np.random.default_rng(seed)
    frames, stream = frames_of(rng, 5 if most == 30 else 30)
    reader, got, at = protocol.FrameReader(), [], 0
    while at < len(stream):
        part = stream[at : at + int(rng.integers(1, most))]
        room = reader.room()
        if room is not None and rng.integers(4):  # else by feed, as a reader without room would
            part = part[: len(room)]
            room[: len(part)] = part
            got += reader.filled(len(part))
        else:
            got += reader.feed(part)
        at += len(part)
    assert [(*frame[:3], bytes(frame[3])) for frame in got] == frames


def test_a_long_body_stays_where_it_was_read_to():
    body = os.urandom(2 * protocol.LONG)
    reader = protocol.FrameReader()
    assert reader.feed(protocol.pack(protocol.TRANSITION, 7, body)[:1000]) == []
    room = reader.room()
    room[:] = body[-len(room) :]
    ((_, _, seq, found),) = reader.filled(len(room))
    assert (seq, found) == (7, body)
    assert np.shares_memory(np.frombuffer(found, "u1"), np.frombuffer(room, "u1"))
    assert reader.room() is None


@pytest.mark.parametrize("seal", [None, sealed.Seal(b"k" * 32)])
def test_an_answer_in_pieces_is_the_one_that_msgpack_makes(seal):
    bodies = [b"x" * size for size in (0, 5, 300, 70000)] + [bytearray(b"y" * (messages.LONG + 1)), bytearray(3)]
    answer = [[[slot, 2**40 + slot, 13, 0, body] for slot, body in enumerate(bodies)], 2**32 - 1]
    pieces = messages.pieces(answer, msgpack.packb)
    assert [piece for piece in pieces if len(piece) > messages.LONG] == [bodies[3], bodies[4]]
    assert any(piece is bodies[3] for piece in pieces)
    assert any(piece is bodies[4] for piece in pieces)
    whole = msgpack.packb(answer)
    assert b"".join(pieces) == whole
    message = sealed.in_pieces(sealed.RESULT, 9, pieces, seal)
    assert b"".join(message) == sealed.packed(sealed.RESULT, 9, whole, seal)
    rest = bytearray(b"".join(message))

    def recv(size):
        part = bytes(rest[:size])
        del rest[:size]
        return part

    assert sealed.read(recv, seal, protocol.MAX_BODY)[-1] == whole


@pytest.mark.slow
def test_an_answer_is_freed_with_its_last_use_and_not_by_the_collector():
    gc.collect()
    gc.disable()
    try:
        messages.pieces([[[0, 1, 13, 0, bytes(1 << 20)]], 1], msgpack.packb)
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("pieces", [1, 3, 2 * sealed.MOST_PIECES + 5])
def test_pieces_arrive_whole_and_in_order_where_the_other_end_is_slow(pieces):
    data = [os.urandom((1 << 21) // pieces + number % 3) for number in range(pieces)] + ([b""] if pieces > 1 else [])
    one, other = socket.socketpair()
    with one, other:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        one.settimeout(10.0)
        got = bytearray()

        def read():
            while part := other.recv(3001):
                got.extend(part)

        reading = threading.Thread(target=read)
        reading.start()
        sealed.send(one, *data)
        one.shutdown(socket.SHUT_WR)
        reading.join(10.0)
    assert got == b"".join(data)


def test_a_host_reads_messages_of_any_length_one_after_the_other():
    sizes = [24, 5, 3 * LONG_MESSAGE, 24, LONG_MESSAGE, 7, LONG_MESSAGE + 1, 2 * LONG_MESSAGE, 1]
    data = [os.urandom(size) for size in sizes]
    one, other = socket.socketpair()
    with one, other:
        sending = threading.Thread(target=one.sendall, args=(b"".join(data),))
        sending.start()
        line = _Socket(other, "farm")
        for each in data:
            assert bytes(line.recv(len(each))) == each
        sending.join(10.0)


@pytest.mark.skipif(not hasattr(fcntl, "F_GETPIPE_SZ"), reason="Linux and Python 3.10 or newer")
def test_only_pipes_that_carry_something_large_are_made_wide(tmp_path):
    """Linux counts all pipes of a user together, so a thousand small slots must not take what others need."""

    def sizes(kind):
        farm = Supervisor(Catalog([ENV], kind, str(TESTS)), 1, sys.executable, tmp_path)
        farm.start(40.0)
        try:
            lease = farm.acquire(ENV, 1, protocol.VERSION, expires=False)
            worker = farm.assignments.at(0)
            before = [fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) for fd in (worker.stdin, worker.stdout)]
            replies = farm.exchange(lease.token, [[0, 1, protocol.RESET, codec.encode({"seed": 1})]], 5.0)
            poll_until(lambda: replies or replies.extend(farm.exchange(lease.token, [], 5.0)), 20, "the first reply")
            action = np.zeros(kind["shape"] if kind.get("echo") else 1, kind["dtype"] if kind.get("echo") else "f4")
            body = codec.encode({"action": action, "repeat": 1})
            replies = farm.exchange(lease.token, [[0, 2, protocol.STEP, body]], 5.0)
            poll_until(lambda: replies or replies.extend(farm.exchange(lease.token, [], 5.0)), 20, "the step's reply")
            assert replies[0][2] == protocol.TRANSITION
            return before, [fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) for fd in (worker.stdin, worker.stdout)]
        finally:
            farm.stop("the test is over")

    before, after = sizes(FRAME)
    assert before == after
    assert max(before) < PIPE_SIZE
    before, after = sizes(MEGABYTE)
    assert after == [before[0], PIPE_SIZE]
    before, after = sizes(dict(MEGABYTE, echo=True))
    assert after == [PIPE_SIZE, PIPE_SIZE]
