"""Where the time of a remote step goes: processor time by process, and the parts beside bare pipes and bare TCP.

python -m benchmarks.steps.parts             # 8 slots; --slots 32 for others

The environment is that of `latency.py`, which does nothing; rounds are interleaved and the medians are taken.
Processor time is the kernel's own count for each process (Linux), so it can be compared while other programs run;
wall-clock time cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium
import numpy as np
import psutil

from benchmarks.shared.table import machine
from benchmarks.steps.latency import ENV, ROOT, Noop, start_farm
from farmer import Farmer
from farmhand.catalog import Catalog
from farmhand.supervisor import Supervisor
from wire import codec, protocol

ROUNDS, SECONDS = 5, 1.0
ASKED, ANSWERED = 150, 1450  #: bytes of a step's frames in the pipe

ECHO = "import os\nwhile len(os.read(0, 65536)): os.write(1, b'x' * %d)" % ANSWERED
TCP_ECHO = """
import socket, sys
line = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
asked, answer = int(sys.argv[2]), b"x" * int(sys.argv[3])
while True:
    got = 0
    while got < asked:
        data = line.recv(1 << 20)
        if not data:
            sys.exit()
        got += len(data)
    line.sendall(answer)
"""


def processor_seconds(pid: int) -> float:
    """What all threads of a process have used."""
    tasks = Path("/proc/%d/task" % pid)
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


class Part:
    """Something that is done again and again, and the processes that do it."""

    def __init__(self, name: str, step: Callable[[], object], **processes: list[int]):
        self.name, self.step, self.processes = name, step, processes
        self.rounds: list[list[float]] = []

    def run(self, slots: int) -> None:
        """One round: microseconds of wall-clock and of each process, for an environment step."""
        for _ in range(50):
            self.step()
        began = [sum(map(processor_seconds, pids)) for pids in self.processes.values()]
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            self.step()
            count += 1
        wall = time.perf_counter() - start
        used = [sum(map(processor_seconds, pids)) for pids in self.processes.values()]
        spent = [wall] + [after - before for before, after in zip(began, used, strict=True)]
        self.rounds.append([seconds / count / slots * 1e6 for seconds in spent])

    def row(self) -> str:
        """Of the table."""
        wall, *used = (statistics.median(column) for column in zip(*self.rounds, strict=True))
        shares = ", ".join("%s %.0f" % pair for pair in zip(self.processes, used, strict=True))
        return "| %s | %.0f | %.0f | %s |" % (self.name, wall, sum(used), shares)


def stepper(exchange: Callable[..., list], slots: list[int]) -> Callable[[], None]:
    """Resets the slots; returns a function that steps them all once, by `exchange(commands, wait, together)`."""
    seq = 0

    def all_slots(kind: int, body: bytes) -> None:
        nonlocal seq
        seq += 1
        missing = len(slots)
        commands = [[slot, seq, kind, body] for slot in slots]
        while missing:
            missing -= len(exchange(commands, 5.0, missing))
            commands = []

    all_slots(protocol.RESET, codec.encode({"seed": None, "options": None}))
    action = codec.encode({"action": np.full(22, 0.5, np.float32), "repeat": 1})
    return lambda: all_slots(protocol.STEP, action)


@contextlib.contextmanager
def pipes(slots: int) -> Iterator[Part]:
    """The floor: that many processes that read a pipe and write a pipe, with messages as long as a step's."""
    children = [
        subprocess.Popen([sys.executable, "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        for _ in range(slots)
    ]
    ins, outs = [c.stdin.fileno() for c in children], [c.stdout.fileno() for c in children]

    def step() -> None:
        for pipe in ins:
            os.write(pipe, b"x" * ASKED)
        for pipe in outs:
            os.read(pipe, 65536)

    try:
        yield Part("a bare pipe round trip", step, host=[os.getpid()], children=[c.pid for c in children])
    finally:
        for child in children:
            child.stdin.close()
            child.wait()
            child.stdout.close()


@contextlib.contextmanager
def tcp(slots: int) -> Iterator[Part]:
    """The floor of the way there: one message to and fro over loopback, as long as all slots' together."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sizes = [str(server.getsockname()[1]), str(slots * ASKED), str(slots * ANSWERED)]
        child = subprocess.Popen([sys.executable, "-c", TCP_ECHO, *sizes])
        line = server.accept()[0]
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def step() -> None:
        line.sendall(b"x" * (slots * ASKED))
        got = 0
        while got < slots * ANSWERED:
            got += len(line.recv(1 << 20))

    try:
        yield Part("a bare TCP round trip", step, host=[os.getpid()], child=[child.pid])
    finally:
        line.close()
        child.wait()


@contextlib.contextmanager
def core(slots: int) -> Iterator[Part]:
    """The farm's core without the way there: the supervisor in this process."""
    with tempfile.TemporaryDirectory() as logs:
        here = Supervisor(Catalog([ENV], folder=str(ROOT)), slots, log_dir=logs)
        here.start()
        try:
            lease = here.acquire(ENV, slots, protocol.VERSION, expires=False)
            step = stepper(lambda commands, wait, n: here.exchange(lease.token, commands, wait, n), lease.slots)
            workers = [row["pid"] for row in here.status()]
            yield Part("`Supervisor.exchange` in one process", step, farm=[os.getpid()], workers=workers)
        finally:
            here.stop("the benchmark is over")


@contextlib.contextmanager
def remote(slots: int) -> Iterator[Part]:
    """All of it."""
    farm, address = start_farm(slots)
    try:
        with Farmer(ENV, [(address, slots)]) as pool:
            pool.reset(pool.vacant())
            slot = np.sort(pool.recv(min_ready=slots).slot)
            workers = [child.pid for child in psutil.Process(farm.pid).children()]  # all of them stand by now
            if len(slot) != slots or len(workers) < slots:
                raise RuntimeError("%d slots and %d workers of %d" % (len(slot), len(workers), slots))
            actions = np.full((slots, 22), 0.5, np.float32)
            step = lambda: pool.step(actions, slot)  # noqa: E731
            yield Part("`Farmer.step`", step, host=[os.getpid()], farm=[farm.pid], workers=workers)
    finally:
        farm.terminate()
        farm.wait()
        farm.stdout.close()


@contextlib.contextmanager
def peer(slots: int) -> Iterator[Part]:
    """Gymnasium's AsyncVectorEnv."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    envs = gymnasium.vector.AsyncVectorEnv([Noop] * slots)
    try:
        envs.reset()
        workers = [process.pid for process in envs.processes if process.pid not in before]
        actions = np.full((slots, 22), 0.5, np.float32)
        yield Part("`AsyncVectorEnv.step`", lambda: envs.step(actions), host=[os.getpid()], workers=workers)
    finally:
        envs.close()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slots", type=int, default=8)
    slots = parser.parse_args().slots
    with contextlib.ExitStack() as open_ones:
        parts = [open_ones.enter_context(make(slots)) for make in (peer, pipes, tcp, core, remote)]
        time.sleep(2.0)  # until every process has come to rest
        for _ in range(ROUNDS):
            for part in parts:
                part.run(slots)
    print("| %d slots; us for one environment step | wall | processor | of it |\n|---|---|---|---|" % slots)
    for part in parts:
        print(part.row())
    print("\n%s." % machine())


if __name__ == "__main__":
    main()
