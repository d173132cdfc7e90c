"""Farms for tests: `farm.py` as a process of its own, or a farm inside this process where starting one often is dear.

with running_farm("environments:CountingEnv", slots=2) as farm:
    Farmer("environments:CountingEnv", [(farm.address, 2)])
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import Pyro4
from helpers import freeze, poll_until

from farmer import Farmer, RemoteEnv, open_object
from farmhand.catalog import Catalog
from farmhand.service import FarmDaemon
from farmhand.supervisor import Supervisor
from simulators import RECIPES

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent

START_LIMIT = 40.0  # seconds; the machine may be busy with other tests
STOP_LIMIT = 5.0 + 15.0  # what a farm promises, and patience with a busy machine


def farm_command(*env: str, slots: int = 2, port: int = 0, script: pathlib.Path = ROOT / "farm.py") -> list[str]:
    """The command line of a farm; without spares, which tests that count workers would have to know of."""
    return [sys.executable, str(script), *env, "--slots", str(slots), "--port", str(port), "--spares", "0"]


class FarmProcess:
    """A farm.py that runs beside this process; its output goes to files, so that no pipe can fill."""

    def __init__(
        self,
        command: Sequence[str],
        folder: pathlib.Path,
        cwd: pathlib.Path = TESTS,
        stdin: Any = None,
        key_file: pathlib.Path | None = None,
    ):
        self.folder = folder
        self.key_file = key_file
        self.port = 0
        self._out, self._err = folder / "stdout.txt", folder / "stderr.txt"
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                list(command), cwd=cwd, stdout=out, stderr=err, stdin=stdin or subprocess.DEVNULL
            )

    def wait_until_offered(self) -> None:
        """Until the farm says what it offers, and every slot's environment stands."""
        ended = "it ended with exit code %s"
        poll_until(
            lambda: "Ctrl-C stops it." in self.said() or self.process.poll() is not None,
            START_LIMIT,
            "the farm's start",
        )
        assert self.process.poll() is None, ended % self.process.returncode + ": " + self.said() + self.log()
        match = re.match(r"farm at (\S+):(\d+), ", self.said())
        assert match, self.said()
        self.port = int(match[2])
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Until every slot has a worker whose environment stands."""
        poll_until(
            lambda: all(row["state"] not in ("empty", "starting", "quarantined") for row in self.status()),
            START_LIMIT,
            "all slots",
        )

    def wait_until_free(self) -> None:
        """Until no host has a slot: the one of the last test may not have reached the farm when it ended its lease."""

        def are_free() -> bool:
            about = self.describe()
            return bool(about["free"] == about["slots"])

        poll_until(are_free, START_LIMIT, "free slots")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        """What it printed."""
        return self._out.read_text()

    def log(self) -> str:
        """What it wrote to stderr."""
        return self._err.read_text()

    def status(self) -> list[dict[str, Any]]:
        """A row for each slot, asked of the farm."""
        return ask_farm(self.address, "status", key_file=self.key_file)

    def describe(self) -> dict[str, Any]:
        """What it offers, asked of the farm."""
        return ask_farm(self.address, "describe", key_file=self.key_file)

    def workers(self) -> list[int]:
        """The process ids of its workers, by slot."""
        return [row["pid"] for row in self.status()]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        """As a machine that hangs: after this it does nothing more, and its workers go on. SIGCONT thaws it."""
        freeze(self.pid)

    def kill(self) -> None:
        """As a power cut: SIGKILL, and its port is free after that."""
        self.process.kill()
        self.process.wait(STOP_LIMIT)

    def end(self) -> None:
        """SIGTERM, and it must be gone in time with exit code 0; nothing when it is gone already."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            code = self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_LIMIT)
            raise AssertionError(f"the farm did not end within {STOP_LIMIT} s: {self.log()}") from None
        assert code == 0, f"exit code {code}: {self.log()}"


def closed_port() -> int:
    """A port where nothing listens, for a farm that comes later, or comes again after its end.

    It lies below those that the system gives to whoever asks for any, so that no other test gets it meanwhile.
    """
    while True:
        port = random.randrange(21_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def ask_farm(address: str, verb: str, *args: Any, key_file: pathlib.Path | None = None) -> Any:
    """One call to a farm, with Pyro4 alone where it has no key."""
    Pyro4.config.SERIALIZER = "msgpack"
    with open_object("farm", address, key_file) if key_file else Pyro4.Proxy(f"PYRO:farm@{address}") as proxy:
        proxy._pyroTimeout = 30.0
        return proxy._pyroInvoke(verb, args, {})


def workers_of(farm: int) -> list[int]:
    """The processes under a farm, as the system sees them."""
    try:
        return [child.pid for child in psutil.Process(farm).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def running_farm(
    *env: str,
    slots: int = 2,
    python: str | None = None,
    kwargs: dict[str, Any] | None = None,
    port: int = 0,
    script: pathlib.Path = ROOT / "farm.py",
    log_dir: pathlib.Path | None = None,
    extra: Sequence[str] = (),
    stdin: Any = None,
    key_file: pathlib.Path | None = None,
) -> Iterator[FarmProcess]:
    """A farm whose slots all stand; ended by SIGTERM, which must give exit code 0 within 5 s."""
    with tempfile.TemporaryDirectory(prefix="farm") as folder:
        command = farm_command(*(env or ("environments:CountingEnv",)), slots=slots, port=port, script=script)
        command += ["--log-dir", str(log_dir or pathlib.Path(folder) / "logs"), *extra]
        if python is not None:
            command += ["--python", python]
        if kwargs is not None:
            command += ["--env-kwargs", json.dumps(kwargs)]
        if key_file is not None:
            command += ["--key-file", str(key_file)]
        farm = FarmProcess(command, pathlib.Path(folder), stdin=stdin, key_file=key_file)
        try:
            farm.wait_until_offered()
            yield farm
        except BaseException:
            if farm.process.poll() is None:
                farm.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    farm.process.wait(STOP_LIMIT)
                farm.kill()
            raise
        farm.end()


@contextlib.contextmanager
def farm_here(
    factory: str, kwargs: dict[str, Any] | None = None, slots: int = 1, key: bytes | None = None
) -> Iterator[str]:
    """A farm inside this process, over a real daemon and real workers; gives its address.

    It starts in a third of the time of a farm.py, so that each test can have its own.
    """
    name = factory if factory.endswith("-v1") or factory in RECIPES else f"environments:{factory}"
    with tempfile.TemporaryDirectory(prefix="farm") as folder:
        daemon = FarmDaemon("127.0.0.1", 0, key)
        supervisor = Supervisor(Catalog([name], kwargs or {}, str(TESTS)), slots, sys.executable, folder)
        serving = threading.Thread(target=daemon.requestLoop, name="test daemon", daemon=True)
        try:
            supervisor.start(START_LIMIT)
            daemon.offer(supervisor)
            serving.start()
            yield daemon.locationStr
        finally:
            supervisor.stop("the test is over")
            if serving.ident is not None:
                daemon.shutdown()
                serving.join(5.0)
            daemon.close()


class RemoteFace:
    """The environment on a farm, as a `gymnasium.Env`."""

    def __init__(self, factory: str, kwargs: dict[str, Any]):
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            address = opening.enter_context(farm_here(factory, kwargs))
            self.env = RemoteEnv(f"environments:{factory}", [(address, 1)], timeout=30.0)
            opening.callback(self.env.close)
            self._closing = opening.pop_all()

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        return self.env.step(action)

    def close(self) -> None:
        self._closing.close()


class PoolFace:
    """One slot of a pool of two; the other one works all the time and must never be mistaken for it."""

    def __init__(self, factory: str, kwargs: dict[str, Any]):
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            address = opening.enter_context(farm_here(factory, kwargs, slots=2))
            self.pool = opening.enter_context(Farmer(f"environments:{factory}", [(address, 2)]))
            self._closing = opening.pop_all()
        self._running = False

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.pool.abandon([1])
        poll_until(lambda: 1 in self.pool.vacant(), 10, "slot 1")
        self.pool.reset([1], [seed], options)
        if 0 in self.pool.vacant():
            self.pool.reset([0], [99])
        row = self._mine()
        assert row.first
        return row.obs, row.info

    def step(self, action: Any) -> Any:
        self.pool.send([action], [1])
        if 0 in self.pool.vacant():
            self.pool.reset([0], [99])
        row = self._mine()
        return row.obs, row.reward, row.terminated, row.truncated, row.info

    def _mine(self) -> Any:
        while True:
            for row in self.pool.collect(1, 30.0):
                if row.slot != 1:
                    self.pool.abandon([0])
                    continue
                if row.lost:
                    raise RuntimeError(row.info["lost"])
                return row

    def close(self) -> None:
        self._closing.close()
