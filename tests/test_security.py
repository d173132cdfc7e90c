"""What a stranger can do to a farm: nothing that is executed, and nothing that stops it for others."""

import contextlib
import math
import random
import socket
import struct
import time
import zlib

import attacks
import msgpack
import numpy as np
import psutil
import Pyro4
import pytest
from farms import START_LIMIT, farm_here, running_farm
from helpers import poll_until
from Pyro4 import message

from farmer import Farmer, open_object
from farmer.farmlist import load_farmlist
from farmer.pyro.connection import Connection
from farmhand import admission, messages, server, service
from wire import auth, codec, protocol
from wire.errors import FarmRefused, LeaseLost

COUNTING = "environments:CountingEnv"
KEY = b"k" * 40


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("key") / "farm.key"
    auth.new_key(path)
    return path


@pytest.fixture(scope="module")
def farm(key_file):
    with running_farm(COUNTING, slots=2, kwargs={"length": 10**6}, key_file=key_file) as farm:
        yield farm


@pytest.fixture(scope="module")
def open_farm():
    with running_farm(COUNTING, slots=2, kwargs={"length": 10**6}) as farm:
        yield farm


def connection(address, key=KEY):
    return Connection(load_farmlist([(address, 1)])[0], key)


@contextlib.contextmanager
def opened(*args, **kwargs):
    line = connection(*args, **kwargs)
    try:
        yield line
    finally:
        line.close()


def done_by(farm):
    """What the farm's environments were made to do so far."""
    return [(row["episodes"], row["steps"]) for row in farm.status()]


# Replay.


@pytest.mark.parametrize("paced", [False, True])
def test_a_recorded_session_that_is_replayed_executes_nothing(farm, key_file, paced):
    with attacks.Recorder(farm.address) as wire:
        with open_object("slot-0", wire.address, key_file) as slot:
            slot.reset(7)
            slot.step([0.5])
        before = done_by(farm)
        for _ in range(20):
            answer = attacks.replay(farm.address, wire.heard[0], paced)
            assert len(answer) <= 2 * auth.ANSWER.size
    assert done_by(farm) == before
    farm.wait_until_free()


def test_without_a_key_the_same_replay_does_execute_so_the_test_above_can_fail(open_farm):
    Pyro4.config.SERIALIZER = "msgpack"
    with attacks.Recorder(open_farm.address) as wire:
        with Pyro4.Proxy(f"PYRO:slot-0@{wire.address}") as slot:
            slot.reset(7)
            slot.step([0.5])
        before = done_by(open_farm)
        poll_until(lambda: open_farm.describe()["free"] == 2, 30, "the slot")
        attacks.answer_to(open_farm.address, *attacks_of(wire.heard[0]))
    poll_until(lambda: done_by(open_farm) != before, 30, "the replayed step")


def attacks_of(heard):
    """The messages of a recorded connection, one by one."""
    data, parts = bytes(heard), []
    while data:
        found = message.Message.from_header(data[: message.Message.header_size])
        size = message.Message.header_size + found.annotations_size + found.data_size
        parts.append(data[:size])
        data = data[size:]
    return parts


def test_a_message_of_another_session_is_refused_in_a_proven_one(farm, key_file):
    with attacks.Recorder(farm.address) as wire, open_object("slot-0", wire.address, key_file) as slot:
        slot.reset(7)
        before = done_by(farm)
        slot.step([0.5])
        poll_until(lambda: done_by(farm) != before, 30, "the step itself")
    before = done_by(farm)
    calls = attacks_of(wire.heard[0][auth.HELLO.size + auth.PROOF :])
    with attacks.connected(farm.address) as sock:
        auth.prove(sock, auth.load_key(key_file), 5.0)
        sock.settimeout(5.0)
        sock.sendall(calls[-1])
        assert sock.recv(100) == b"", "it hangs up"
    assert done_by(farm) == before


# Before the proof.

INVOKE = attacks.frame(message.MSG_INVOKE, msgpack.packb(["farm", "describe", [], {}]))


@pytest.mark.parametrize(
    "said",
    [
        attacks.GREETING,
        attacks.GREETING + INVOKE,
        INVOKE,
        attacks.frame(message.MSG_PING, b"ping"),
        attacks.frame(message.MSG_INVOKE, msgpack.packb(["farm", "describe", [], {}]), key=KEY),
        auth.HELLO.pack(auth.MAGIC, b"n" * 32) + b"p" * 32 + INVOKE,
        auth.HELLO.pack(auth.MAGIC, b"n" * 32) + b"p" * 31,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_nobody_is_answered_before_the_proof(farm, said):
    answer = attacks.answer_to(farm.address, said)
    assert b"protocol" not in answer
    assert b"pong" not in answer
    if answer.startswith(b"PYRO"):
        assert message.Message.from_header(answer[:24]).type == message.MSG_CONNECTFAIL
        assert auth.WANTS_KEY.encode() in answer
    else:
        assert len(answer) <= auth.ANSWER.size


@pytest.mark.parametrize("size", [(1 << 30), (200 << 20), (1 << 16) + 1, -1])
def test_a_header_that_announces_too_much_is_refused_at_once_without_memory(farm, open_farm, size):
    kinds = (message.MSG_CONNECT, message.MSG_INVOKE)
    for target in (farm, open_farm):
        attacks.answer_to(target.address, attacks.header(kinds[0], 1 << 30))
        process = psutil.Process(target.pid)
        before = process.memory_info().rss
        for number in range(100):
            with attacks.connected(target.address) as sock:
                head = attacks.header(kinds[number % 2], 0)
                # Pyro4 does not make headers with a negative size.
                head = head[:12] + struct.pack("!i", size) + head[16:22]
                fields = struct.unpack("!HHHHiHHH", head[4:22])
                sock.sendall(head + struct.pack("!H", (sum(fields) + message.Message.checksum_magic) & 0xFFFF))
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(4096):  # it hangs up by itself: the limit of 10 s would raise here
                        pass
        assert process.memory_info().rss - before < 64 << 20
    assert farm.describe()["free"] == 2


@pytest.mark.slow
def test_silent_and_slow_ones_stop_nobody_and_are_sent_away(monkeypatch):
    monkeypatch.setattr(admission, "PROOF_LIMIT", 3.0)
    with farm_here("CountingEnv", {"length": 10**6}, key=KEY) as address, opened(address) as line:
        lease = line.acquire(COUNTING, 1)
        with attacks.silent(address, 230) as socks, attacks.connected(address) as slow:
            for seq in range(1, 4):
                body = {"seed": 1, "options": None} if seq == 1 else {"action": [0.5], "repeat": 1}
                kind = protocol.RESET if seq == 1 else protocol.STEP
                assert exchanged(line, lease, seq, kind, body) in (protocol.OBSERVATION, protocol.TRANSITION)
                with opened(address) as another:
                    assert another.about["free"] == 0
                with contextlib.suppress(ConnectionError):  # on a busy machine its time is over already
                    slow.sendall(auth.MAGIC[seq - 1 : seq])
            for sock in [*socks, slow]:
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(100) == b""
        line.release(lease["lease"])


def exchanged(line, lease, seq, kind, body):
    replies = line.exchange(lease["lease"], [[lease["slots"][0], seq, kind, codec.encode(body)]], 5.0)
    return replies[0][2]


@pytest.mark.slow
def test_one_who_sends_a_byte_now_and_then_has_no_more_time_than_others(monkeypatch):
    monkeypatch.setattr(admission, "PROOF_LIMIT", 0.5)
    with (
        farm_here("CountingEnv", key=KEY) as address,
        attacks.connected(address) as sock,
        contextlib.suppress(ConnectionError),  # a broken pipe or a reset, as the system likes
    ):
        for byte in auth.HELLO.pack(auth.MAGIC, b"n" * 32):
            sock.sendall(bytes([byte]))
            time.sleep(0.1)
        pytest.fail("its 4 s were let pass")


def test_a_crowd_at_admission_pushes_out_its_oldest_and_not_who_comes_next(monkeypatch):
    monkeypatch.setattr(admission, "NEWCOMERS", 5)
    monkeypatch.setattr(admission, "PROOF_LIMIT", 60.0)
    with farm_here("CountingEnv", key=KEY) as address, attacks.silent(address, 8) as socks:
        with opened(address) as line:
            assert line.about["slots"] == 1
        for sock in socks[:3]:
            assert sock.recv(100) == b""
        socks[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            socks[-1].recv(100)


@pytest.mark.slow
@pytest.mark.parametrize("key", [KEY, None])
def test_a_full_farm_refuses_at_once_and_goes_on_with_those_it_has(monkeypatch, key):
    monkeypatch.setattr(service, "THREADS", 4)
    with farm_here("CountingEnv", key=key) as address, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(opened(address, key)) for _ in range(4)]
        for _ in range(3):
            with pytest.raises(FarmRefused if key else Exception, match="no room"):
                connection(address, key)
        with attacks.silent(address, 5):
            assert [line.describe()["slots"] for line in lines] == [1] * 4
        lines[0].close()
        poll_until(lambda: joins(address, key), 30, "room for the next")


def joins(address, key):
    try:
        connection(address, key).close()
    except Exception:
        return False
    return True


# Afterwards.


@pytest.mark.slow
def test_a_host_may_be_silent_between_messages_and_wait_long_but_not_stop_within_one(monkeypatch):
    monkeypatch.setattr(server, "MESSAGE_LIMIT", 1.0)
    monkeypatch.setattr(server, "FIRST_CALL_LIMIT", 1.0)
    with farm_here("SlowEnv", {}, key=KEY) as address, opened(address) as line:
        lease = line.acquire("environments:SlowEnv", 1)
        time.sleep(2.0)  # a heart that beats slower than MESSAGE_LIMIT
        assert exchanged(line, lease, 1, protocol.RESET, {"seed": None, "options": None}) == protocol.OBSERVATION
        began = time.monotonic()
        assert exchanged(line, lease, 2, protocol.STEP, {"action": [2.0], "repeat": 1}) == protocol.TRANSITION
        assert time.monotonic() - began > 1.9, "the call waited twice MESSAGE_LIMIT"
        with attacks.connected(address) as half:
            session = auth.prove(half, KEY, 5.0)
            call = attacks.frame(message.MSG_INVOKE, msgpack.packb(["farm", "describe", [], {}]), key=session)
            half.settimeout(30.0)
            half.sendall(call)
            assert half.recv(1 << 16).startswith(b"PYRO")
            half.sendall(call[:-1])
            assert half.recv(100) == b""
        with attacks.connected(address) as dribbling, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            auth.prove(dribbling, KEY, 5.0)
            for byte in call:
                dribbling.sendall(bytes([byte]))
                time.sleep(0.1)
            pytest.fail("a message may take as long as its sender likes")
        with attacks.connected(address) as idle:
            auth.prove(idle, KEY, 5.0)
            idle.settimeout(30.0)
            assert idle.recv(100) == b"", "who never calls gets no thread for long"


@pytest.mark.parametrize("value", attacks.NOT_PLAIN, ids=[str(n) for n in range(len(attacks.NOT_PLAIN))])
def test_what_is_decoded_is_plain_data_or_refused(value):
    try:
        found = messages.decoded(msgpack.packb(["farm", "describe", [value], {}]), 6, 0)
    except (Pyro4.errors.SerializeError, ValueError):
        return
    assert_plain(found)


def assert_plain(value):
    assert type(value) in (int, float, str, bytes, bool, type(None), list, dict), type(value)
    for part in value if isinstance(value, list) else value.items() if isinstance(value, dict) else ():
        assert_plain(list(part) if isinstance(part, tuple) else part)


def test_numpy_integers_of_a_plain_script_still_arrive():
    packed = Pyro4.util.MsgpackSerializer().dumps([np.int64(-5), 1 << 70])
    assert messages.decoded(packed, 6, 0) == [-5, 1 << 70]


@pytest.mark.parametrize(
    ("flags", "serializer"),
    [
        (message.FLAGS_KEEPSERIALIZED, 6),
        (message.FLAGS_COMPRESSED, 6),
        (message.FLAGS_BATCH, 6),
        (message.FLAGS_ONEWAY, 6),
        (0, 1),
        (0, 4),
    ],
)
def test_batches_zlib_marshal_and_pickle_are_refused(open_farm, flags, serializer):
    call = msgpack.packb(["slot-0", "reset", [], {}])
    call = zlib.compress(call) if flags == message.FLAGS_COMPRESSED else call
    before = done_by(open_farm)
    said = attacks.frame(message.MSG_INVOKE, call, flags, serializer)
    answer = attacks.answer_to(open_farm.address, attacks.GREETING, said)
    assert b"a farm takes plain calls only" in answer or b"a farm speaks msgpack only" in answer
    assert done_by(open_farm) == before


@pytest.mark.parametrize("method", ["__init__", "_supervisor", "__getattr__", "__setattr__", "exec", "offer"])
def test_only_the_verbs_can_be_called(open_farm, method):
    with Pyro4.Proxy(f"PYRO:farm@{open_farm.address}") as proxy:
        proxy._pyroTimeout = 30.0
        with pytest.raises((AttributeError, Pyro4.errors.PyroError)):
            proxy._pyroInvoke(method, ("x",), {})


@pytest.mark.slow
@pytest.mark.parametrize("which", ["farm", "open_farm"])
def test_fuzzed_frames_crash_nothing_and_do_nothing(which, farm, open_farm):
    target = {"farm": farm, "open_farm": open_farm}[which]
    before, starts = done_by(target), [row["starts"] for row in target.status()]
    attacks.fuzz(target.address, 1000, seed=random.randrange(1 << 30))
    assert target.process.poll() is None
    assert done_by(target) == before
    assert [row["starts"] for row in target.status()] == starts
    assert "Traceback" not in target.log()
    assert target.describe()["free"] == 2


# Leases.


def test_another_hosts_slots_cannot_be_stepped_reset_or_freed(farm, key_file):
    key = auth.load_key(key_file)
    with opened(farm.address, key) as owner, opened(farm.address, key) as thief:
        mine, his = owner.acquire(COUNTING, 1), thief.acquire(COUNTING, 1)
        assert exchanged(owner, mine, 1, protocol.RESET, {"seed": 1, "options": None}) == protocol.OBSERVATION
        before = done_by(farm)
        body = codec.encode({"action": [0.5], "repeat": 1})
        for slot in (mine["slots"][0], -1, 99):
            with pytest.raises(FarmRefused):
                thief.exchange(his["lease"], [[slot, 1, protocol.STEP, body]], 0.0)
        rng = random.Random(1)
        for _ in range(200):
            guess = rng.choice(
                ["", "0" * 32, "%032x" % rng.getrandbits(128), mine["lease"][:-1], mine["lease"].upper()]
            )
            if guess == mine["lease"]:
                continue  # all digits
            with pytest.raises(LeaseLost):
                thief.exchange(guess, [[mine["slots"][0], 2, protocol.STEP, body]], 0.0)
            thief.release(guess)
        assert done_by(farm) == before
        assert exchanged(owner, mine, 2, protocol.STEP, {"action": [0.5], "repeat": 1}) == protocol.TRANSITION
        for line, lease in ((owner, mine), (thief, his)):
            line.release(lease["lease"])


@pytest.mark.parametrize(
    "change",
    [
        {"wait": math.nan},
        {"wait": "1"},
        {"together": 1.5},
        {"commands": "reset"},
        {"commands": [[0, 1, 2]]},
        {"commands": [["0", 1, protocol.STEP, b""]]},
        {"commands": [[0, 1 << 70, protocol.STEP, b""]]},
        {"commands": [[0, 1, protocol.STEP, "body"]]},
        {"commands": [[True, 1, protocol.STEP, b""]]},
        {"lease": ["a list"]},
    ],
    ids=str,
)
def test_a_call_of_wrong_types_is_refused_before_anything_of_it_is_done(farm, key_file, change):
    with opened(farm.address, auth.load_key(key_file)) as line:
        lease = line.acquire(COUNTING, 1)
        good = {"lease": lease["lease"], "commands": [], "wait": 0.0, "together": 1, "line": 0, "check": 0}
        try:
            with pytest.raises(FarmRefused, match="exchange takes"):
                line._call("exchange", *dict(good, **change).values())
            assert line.exchange(lease["lease"], [], 0.0) == []
        finally:
            line.release(lease["lease"])


# The farm as a whole.


def test_a_farmer_trains_on_a_farm_with_a_key(farm, key_file):
    with Farmer(COUNTING, [(farm.address, 2)], key_file=key_file) as pool:
        pool.reset(pool.vacant())
        assert len(pool.recv(2)) == 2
        for step in range(1, 20):
            batch = pool.step([[0.5], [0.5]], [0, 1])
            assert batch.obs[:, 1].tolist() == [step, step]
    poll_until(lambda: farm.describe()["free"] == 2, 30, "free slots")


@pytest.mark.slow
def test_a_worker_does_not_get_the_key(tmp_path, monkeypatch):
    auth.new_key(tmp_path / "k")
    monkeypatch.setenv("FARM_KEY", (tmp_path / "k").read_text())
    with running_farm(COUNTING, slots=1, key_file=tmp_path / "k") as farm:
        assert "FARM_KEY" not in psutil.Process(farm.workers()[0]).environ()


def test_the_end_of_a_farm_does_not_wait_for_hosts_that_are_silent(key_file):
    with running_farm(COUNTING, slots=1, key_file=key_file) as farm, contextlib.ExitStack() as stack:
        for _ in range(80):  # to wait a tenth of a second for each would be too long
            stack.enter_context(opened(farm.address, auth.load_key(key_file)))
        for _ in range(40):
            stack.enter_context(socket.create_connection(attacks.endpoint(farm.address), START_LIMIT))
        began = time.monotonic()
        farm.end()
        assert time.monotonic() - began < 9.0
