"""ssh:// addresses: a real farm on loopback behind a real sshd on loopback, with keys and config of this test alone."""

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import stat
import subprocess
import sys

import psutil
import pytest
from farms import ROOT, TESTS, closed_port, farm_here
from helpers import poll_until

from farmer import Farmer
from farmer.farmlist import load_farmlist
from farmer.pyro.tunnel import Tunnel
from wire.errors import BadSlot, FarmUnreachable

COUNTING = "environments:CountingEnv"
KEY = b"k" * 40
SSH = shutil.which("ssh")
SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(SSH is None, reason="no ssh here (Debian: apt-get install openssh-client)")


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    """An sshd of this user's own; gives the folder with the key that it lets in, and its port."""
    if SSHD is None:
        pytest.skip("no sshd here (Debian: apt-get install openssh-server)")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = closed_port()
    config = write(
        folder / "sshd_config",
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host'}",
        f"AuthorizedKeysFile {folder / 'id.pub'}",
        "PidFile none",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
    )
    tried = subprocess.run([SSHD, "-t", "-f", str(config)], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"sshd does not run here as {getpass.getuser()}: {tried.stderr.strip()}")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log, stdin=subprocess.DEVNULL)
    try:
        poll_until(lambda: listens(port), 30, "sshd")
        yield folder, port
    finally:
        process.terminate()
        process.wait(30)


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def use_config(monkeypatch, folder, *lines):
    """Has `ssh` read this config, as it would read the user's own."""
    config = write(folder / "ssh_config", *lines)
    script = write(folder / "ssh", "#!/bin/sh", f'exec {SSH} -F {config} "$@"')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def machine(sshd, monkeypatch, tmp_path):
    """The name of a machine, as it stands in a user's ssh config, that is reached through a jump host."""
    folder, port = sshd
    common = [
        f"  IdentityFile {folder / 'id'}",
        "  IdentitiesOnly yes",
        "  StrictHostKeyChecking no",
        f"  UserKnownHostsFile {tmp_path / 'known'}",
        "  LogLevel ERROR",
    ]
    # The jump is made by an ssh of its own, which reads the config as well.
    use_config(
        monkeypatch,
        tmp_path,
        "Host slave jump",
        "  HostName 127.0.0.1",
        f"  Port {port}",
        f"  User {getpass.getuser()}",
        *common,
        "Host slave",
        f"  ProxyCommand {SSH} -F {tmp_path / 'ssh_config'} -W %h:%p jump",
    )
    return "slave"


def far(machine, address):
    """The farmlist's line for a farm of this machine's loopback."""
    return ("ssh://%s/%s" % (machine, address.rpartition(":")[2]), 1)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_farm_on_loopback_is_stepped_through_a_tunnel(machine, key, monkeypatch):
    if key is not None:
        monkeypatch.setenv("FARM_KEY", key.decode())
    with farm_here("CountingEnv", {"length": 10**6}, key=key) as address:
        with Farmer(COUNTING, [far(machine, address)]) as pool:
            assert pool.name_of(0) == far(machine, address)[0]
            pool.reset([0])
            pool.recv()
            for step in range(1, 50):
                assert pool.step([[0.5]], [0]).obs[0, 1] == step
            assert ssh_processes()
        assert not ssh_processes(), "closed with the farmer"


def ssh_processes():
    return [child for child in psutil.Process().children(recursive=True) if child.name() == "ssh"]


def test_a_tunnel_that_dies_comes_back_and_the_farm_with_it(machine):
    with farm_here("CountingEnv", {"length": 10**6}) as address, Farmer(COUNTING, [far(machine, address)]) as pool:
        for _ in range(2):
            poll_until(lambda: steps(pool), 30, "a step")
            for process in ssh_processes():
                process.kill()
        poll_until(lambda: steps(pool), 30, "a step")


def steps(pool):
    """Whether a step was made; what is lost on the way is begun anew."""
    if pool.vacant():
        pool.reset(pool.vacant())
    if not pool.busy:
        with contextlib.suppress(BadSlot):  # the farm has been left, and is not back yet
            pool.send([[0.5]], [0])
    try:
        batch = pool.recv(1, timeout=10.0)
    except TimeoutError:
        return False
    return len(batch) and not batch.lost[0] and not batch.first[0]


def test_nobody_else_on_this_machine_can_use_the_tunnel(machine):
    with farm_here("CountingEnv") as address:
        tunnel = Tunnel(load_farmlist([far(machine, address)])[0])
        path = pathlib.Path(tunnel.open())
        try:
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert path.is_socket()
            assert tunnel.open() == str(path), "it is opened once"
            listening = {
                c.laddr.port for p in ssh_processes() for c in p.net_connections("inet") if c.status == "LISTEN"
            }
            assert not listening
        finally:
            tunnel.close()
        assert not path.parent.exists()
        with pytest.raises(FarmUnreachable, match="closed"):
            tunnel.open()


def test_where_no_farm_listens_behind_the_tunnel_the_text_says_so(machine):
    with pytest.raises(FarmUnreachable, match=r"(?s)ssh://slave/\d+ .*the tunnel stands, but farm.py is not running"):
        Farmer(COUNTING, [far(machine, "127.0.0.1:%d" % closed_port())])


def test_a_login_that_is_refused_tells_what_ssh_said(machine):
    with pytest.raises(
        FarmUnreachable, match=r"(?s)no tunnel to ssh://nobody-here@slave.*ssh said: .*Permission denied"
    ):
        Farmer(COUNTING, [("ssh://nobody-here@slave", 1)])


def test_a_machine_that_is_not_there_tells_what_ssh_said(monkeypatch, tmp_path):
    use_config(monkeypatch, tmp_path, "LogLevel ERROR")
    where = "ssh://me@127.0.0.1:%d" % closed_port()
    with pytest.raises(FarmUnreachable, match=f"(?s)no tunnel to {where}: .*Connection refused.*BatchMode=yes {where}"):
        Farmer(COUNTING, [(where, 1)])


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ssh://gpu7", ["20099", "--", "gpu7"]),
        ("ssh://me@gpu7:2222/20100", ["-l", "me", "-p", "2222", "20100", "--", "gpu7"]),
        ("ssh://first.last@[fe80::1]", ["-l", "first.last", "20099", "--", "fe80::1"]),
        ("ssh://[fe80::1]:22", ["-p", "22", "20099", "--", "fe80::1"]),
        ("ssh://me@there@gpu7", ["-l", "me@there", "20099", "--", "gpu7"]),
    ],
)
def test_an_address_becomes_the_words_that_ssh_takes(address, words, tmp_path):
    tunnel = Tunnel(load_farmlist([(address, 1)])[0])
    tunnel._folder = tmp_path
    line = tunnel._command()
    end = line.index("-L")
    options = [word for word in line[3:end] if word != "-o" and "=" not in word]
    assert line[:3] == ["ssh", "-N", "-T"]
    assert [*options, line[end + 1].rpartition(":127.0.0.1:")[2], *line[end + 2 :]] == words


def test_without_ssh_the_text_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FarmUnreachable, match=r"(?s)no tunnel to ssh://slave.*ssh.*not found"):
        Farmer(COUNTING, [("ssh://slave", 1)])


def test_ssh_ends_with_a_host_that_is_killed(machine):
    code = (
        "import sys, time; from farmer import Farmer\n"
        "pool = Farmer(sys.argv[1], [(sys.argv[2], 1)]); print('joined', flush=True); time.sleep(60)"
    )
    with farm_here("CountingEnv") as address:
        host = subprocess.Popen(
            [sys.executable, "-c", code, COUNTING, far(machine, address)[0]],
            stdout=subprocess.PIPE,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(TESTS)])),
        )
        try:
            assert host.stdout.readline() == b"joined\n"
            helpers = psutil.Process(host.pid).children(recursive=True)
            assert "ssh" in [process.name() for process in helpers]
        finally:
            host.send_signal(signal.SIGKILL)
            host.wait()
            host.stdout.close()
        _, left = psutil.wait_procs(helpers, 30)
        assert not left
