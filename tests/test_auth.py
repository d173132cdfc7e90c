"""Keys: their files, the proof of a connection, and what a host and a farm say when they do not fit."""

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading

import Pyro4
import pytest
from farms import ROOT, TESTS, farm_here, running_farm

from farmer import Farmer, RemoteEnv, open_object
from farmer.farmlist import load_farmlist
from farmer.pyro.connection import Connection
from farmhand.service import FarmDaemon
from wire import auth
from wire.errors import BadKey, FarmRefused, FarmUnreachable, KeyRefused, StartError

COUNTING = "environments:CountingEnv"
KEY, OTHER = b"k" * 40, b"o" * 40


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "farm.key"
    path.write_bytes(KEY + b"\n")
    path.chmod(0o600)
    return path


def run_farm(*args, env=None):
    return subprocess.run(
        [sys.executable, str(ROOT / "farm.py"), *map(str, args)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=dict(os.environ, **env or {}),
    )


# Files.


def test_a_new_key_is_random_text_that_only_its_owner_can_read(tmp_path):
    umask = os.umask(0o277)
    try:
        auth.new_key(tmp_path / "one")
    finally:
        os.umask(umask)
    auth.new_key(tmp_path / "two")
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600
    keys = {auth.load_key(tmp_path / name) for name in ("one", "two")}
    assert len(keys) == 2
    assert all(len(bytes.fromhex(key.decode())) == 32 for key in keys)


def test_a_new_key_never_takes_the_place_of_anything(key_file, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (key_file, tmp_path / "link", tmp_path):
        with pytest.raises(BadKey, match="is left as it is"):
            auth.new_key(path)
    assert auth.load_key(key_file) == KEY
    with pytest.raises(BadKey, match="cannot write"):
        auth.new_key(tmp_path / "no" / "folder")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o666, 0o601])
def test_a_key_file_that_others_can_touch_is_refused_with_the_line_that_helps(key_file, mode):
    key_file.chmod(mode)
    with pytest.raises(BadKey, match=f"mode {mode:o}.*\n  now: chmod 600 {key_file}"):
        auth.load_key(key_file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_key_file_of_another_user_is_refused(key_file):
    os.chown(key_file, 12345, 12345)
    with pytest.raises(BadKey, match="belongs to user 12345"):
        auth.load_key(key_file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds nothing"),
        (b"\n \n", "holds nothing"),
        (b"secret", "holds 6 characters: a key has at least 32"),
        (b"two words of " + KEY, "one word is wanted"),
        ("schlüssel".encode() * 8, "one word is wanted"),
        (b"x" * 5000, "one word is wanted"),
    ],
)
def test_a_file_that_holds_no_key_is_refused(key_file, content, words):
    key_file.write_bytes(content)
    with pytest.raises(BadKey, match=words):
        auth.load_key(key_file)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, words in (
        (tmp_path / "pipe", "is no file"),
        (tmp_path, "is no file|cannot read"),
        ("/none", "no key file"),
    ):
        with pytest.raises(BadKey, match=words):
            auth.load_key(path)


def test_the_key_comes_from_the_file_or_else_the_environment(key_file, monkeypatch):
    monkeypatch.delenv("FARM_KEY", raising=False)
    assert auth.find_key(None) is None
    monkeypatch.setenv("FARM_KEY", OTHER.decode())
    assert auth.find_key(None) == OTHER
    assert auth.find_key(key_file) == KEY
    monkeypatch.setenv("FARM_KEY", "")
    with pytest.raises(BadKey, match="FARM_KEY holds nothing"):
        auth.find_key(None)


# The exchange.


def proven(challenge, key, nonce=b"n" * 32):
    farm_nonce = auth.ANSWER.unpack(challenge.feed(auth.HELLO.pack(auth.MAGIC, nonce)))[2]
    return challenge.feed(auth.mac(key, b"host", nonce, farm_nonce))


def test_the_right_proof_is_welcomed_however_it_is_dealt_out():
    nonce = b"n" * 32
    challenge = auth.Challenge(KEY)
    answers = [challenge.feed(bytes([byte])) for byte in auth.HELLO.pack(auth.MAGIC, nonce)]
    assert answers[:-1] == [b""] * 39
    farm_nonce = auth.ANSWER.unpack(answers[-1])[2]
    answers = [challenge.feed(bytes([byte])) for byte in auth.mac(KEY, b"host", nonce, farm_nonce)]
    assert auth.ANSWER.unpack(answers[-1])[1] == auth.WELCOME
    assert challenge.session
    assert challenge.refused is None


def test_nonces_and_session_keys_are_new_for_each_connection():
    challenges = [auth.Challenge(KEY) for _ in range(50)]
    for challenge in challenges:
        proven(challenge, KEY)
    assert len({challenge.session for challenge in challenges}) == 50
    assert len({challenge.nonce for challenge in challenges}) == 50


def test_a_wrong_key_a_reflected_proof_and_more_than_a_proof_are_refused():
    challenge = auth.Challenge(KEY)
    assert auth.ANSWER.unpack(proven(challenge, OTHER))[1] == auth.REFUSED
    assert (challenge.session, challenge.refused) == (None, "its key is another one")
    reflected = auth.Challenge(KEY)
    nonce = auth.ANSWER.unpack(reflected.feed(auth.HELLO.pack(auth.MAGIC, b"n" * 32)))[2]
    reflected.feed(auth.mac(KEY, b"farm", b"n" * 32, nonce))
    assert reflected.session is None
    greedy = auth.Challenge(KEY)
    assert greedy.feed(auth.HELLO.pack(auth.MAGIC, b"n" * 32) + b"more") == b""
    assert greedy.refused == "it sent more than a proof"


@contextlib.contextmanager
def speaker(*said):
    """Something that listens, says these things one after the other, each when it has heard something, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak():
            sock, _ = listening.accept()
            with sock:
                for part in said:
                    sock.recv(1 << 16)
                    sock.sendall(part)

        thread = threading.Thread(target=speak)
        thread.start()
        yield load_farmlist([("127.0.0.1:%d" % listening.getsockname()[1], 1)])[0]
        thread.join(5.0)


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ([auth.answer(auth.CHALLENGE), auth.answer(auth.WELCOME)], KeyRefused, "has none of its own"),
        ([auth.answer(auth.WELCOME)], FarmUnreachable, "not as a farm does"),
        ([b"HTTP/1.1 400 Bad Request\r\n" + b" " * 40], FarmUnreachable, "not as a farm does"),
        ([b"HTTP"], FarmUnreachable, "closed the connection"),
        ([], FarmUnreachable, "no farm answered"),
    ],
)
def test_what_only_pretends_to_be_a_farm_is_not_used(said, error, words):
    with speaker(*said) as address, pytest.raises(error, match=words):
        Connection(address, KEY)


def test_a_farm_that_says_nothing_is_left_in_time(monkeypatch):
    monkeypatch.setattr("farmer.pyro.proxy.CONNECT_LIMIT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = load_farmlist([("127.0.0.1:%d" % listening.getsockname()[1], 1)])[0]
        with pytest.raises(FarmUnreachable, match="the farm hangs"):
            Connection(address, KEY)


def test_a_farm_of_an_older_version_is_named_as_one():
    Pyro4.config.SERIALIZER = "msgpack"
    with Pyro4.Daemon(host="127.0.0.1") as old:
        thread = threading.Thread(target=old.requestLoop, daemon=True)
        thread.start()
        with pytest.raises(FarmUnreachable, match="older version, which knows no keys"):
            Connection(load_farmlist([(old.locationStr, 1)])[0], KEY)
        old.shutdown()
        thread.join(5.0)


# Host and farm.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("farms_key", "hosts_key", "words"),
    [
        (KEY, OTHER, "has another key than this host\n  now: copy"),
        (KEY, None, "wants a key, and this host has none\n  now: copy"),
        (None, KEY, "started without a key.*\n  now: start it with --key-file"),
    ],
)
def test_keys_that_do_not_fit_are_refused_with_the_reason(monkeypatch, farms_key, hosts_key, words):
    monkeypatch.delenv("FARM_KEY", raising=False)
    if hosts_key is not None:
        monkeypatch.setenv("FARM_KEY", hosts_key.decode())
    with farm_here("CountingEnv", key=farms_key) as address:
        with pytest.raises(KeyRefused, match="(?s)the farm at " + address + ".*" + words) as caught:
            Farmer(COUNTING, [(address, 1)])
        assert isinstance(caught.value, FarmRefused)
        if farms_key is None:
            return
        monkeypatch.setenv("FARM_KEY", farms_key.decode())
        with contextlib.closing(RemoteEnv(COUNTING, [(address, 1)])) as env:
            env.reset()


def test_a_plain_script_without_the_key_is_told_so():
    with farm_here("CountingEnv", key=KEY) as address:
        Pyro4.config.SERIALIZER = "msgpack"
        with Pyro4.Proxy(f"PYRO:slot-0@{address}") as slot:
            slot._pyroTimeout = 5.0
            with pytest.raises(Pyro4.errors.CommunicationError, match="this farm wants a key"):
                slot.reset()


def test_a_script_with_the_key_drives_one_slot(key_file):
    with farm_here("CountingEnv", key=KEY) as address, open_object("slot-0", address, key_file) as slot:
        observation, _info = slot.reset(7)
        assert observation[1:] == [0.0, 0.0]
        assert slot.step([0.5])[0][1:] == [1.0, 0.5]
        with pytest.raises(RuntimeError, match="is of dtype"):
            slot.step("no number")
        with pytest.raises(AttributeError):
            slot.exec("x")


def test_the_same_call_serves_a_farm_without_a_key(monkeypatch):
    monkeypatch.delenv("FARM_KEY", raising=False)
    with farm_here("CountingEnv") as address, open_object("slot-0", address) as slot:
        assert slot.reset(7)[0][1:] == [0.0, 0.0]


# farm.py.


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.33", "::", "example.org"])
def test_a_wide_address_is_refused_without_a_key(host):
    with pytest.raises(StartError, match=f"(?s)--host {host} .* now: farm.py --new-key .*ssh://"):
        FarmDaemon(host, 0)


@pytest.mark.slow
def test_farm_py_refuses_a_wide_address_and_bad_keys_with_exit_code_2(key_file, monkeypatch):
    monkeypatch.delenv("FARM_KEY", raising=False)
    key_file.chmod(0o644)
    for args, env, words in (
        (["--host", "0.0.0.0"], {}, "--key-file"),
        (["--key-file", key_file], {}, f"chmod 600 {key_file}"),
        (["--key-file", "/none"], {}, "no key file /none"),
        (["--host", "0.0.0.0"], {"FARM_KEY": "short"}, "FARM_KEY holds 5 characters"),
    ):
        done = run_farm(COUNTING, "--slots", 1, "--port", 0, *args, env=env)
        assert done.returncode == 2
        assert done.stderr.startswith("farm.py: ")
        assert words in done.stderr
        assert done.stdout == ""


def test_farm_py_makes_a_key_and_both_sides_use_it(tmp_path):
    path = tmp_path / "new.key"
    made = run_farm("--new-key", path)
    assert (made.returncode, made.stderr) == (0, "")
    assert f"--key-file {path}" in made.stdout
    assert path.read_text().strip() not in made.stdout
    again = run_farm("--new-key", path)
    assert again.returncode == 2
    assert "left as it is" in again.stderr
    with running_farm(COUNTING, slots=1, key_file=path, extra=["--host", "0.0.0.0"]) as farm:
        assert "hosts need its key" in farm.said()
        with Farmer(COUNTING, [(farm.address, 1)], key_file=path) as pool:
            pool.reset([0])
            assert pool.recv().first.all()


def test_farm_py_without_an_environment_says_so():
    done = run_farm("--slots", 1)
    assert done.returncode == 2
    assert "required: ENV" in done.stderr


@pytest.mark.slow
def test_train_py_gives_its_key_to_the_farm_that_it_starts(key_file, tmp_path):
    code = (
        "import pathlib\n"
        "from session.local_farm import LocalFarm\n"
        "from session.options import Options\n"
        "from farmer import Farmer\n"
        f"options = Options({COUNTING!r}, slots=1, key_file=pathlib.Path({str(key_file)!r}))\n"
        f"farm = LocalFarm(options, pathlib.Path({str(tmp_path)!r}))\n"
        "pool = Farmer(options.env, [farm.address], key_file=options.key_file)\n"
        "print('slots', pool.nb_slots); pool.close(); farm.stop()"
    )
    path = os.pathsep.join([str(ROOT), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=dict(os.environ, PYTHONPATH=path),
    )
    assert done.stdout.strip() == "slots 1", done.stderr
