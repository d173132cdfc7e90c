"""What a stranger can do to a farm, and what keeping him out costs: one row a promise, with its figure.

python -m benchmarks.security.strangers                # the long form, 10 to 20 minutes
python -m benchmarks.security.strangers --short        # a tenth to a hundredth of it

Farms are processes of their own, attacked over loopback. Rows "beside" compare with and without the attack in turn, in
the same run. Whatever counts as executed is asked of the farm: episodes and steps of its environments.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
from Pyro4 import message

from benchmarks.shared.table import machine, table
from farmer import Farmer, RemoteEnv
from farmer.connection import Connection, open_object
from farmer.farmlist import load_farmlist
from farmhand import messages
from farmhand.catalog import Catalog
from farmhand.service import FarmDaemon
from farmhand.supervisor import Supervisor
from wire import auth, codec, protocol
from wire.errors import FarmError

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

import attacks  # noqa: E402
from farms import FarmProcess, running_farm  # noqa: E402

ENV = "environments:CountingEnv"
Row = tuple[str, str, str, bool]  # what, figure, goal, met


class Field:
    """A farm with a key, one without, and the key."""

    def __init__(self, farm: FarmProcess, open_farm: FarmProcess, key_file: Path):
        self.farm, self.open_farm, self.key_file = farm, open_farm, key_file
        self.key = auth.load_key(key_file)
        self.address = load_farmlist([(farm.address, 1)])[0]

    def connect(self) -> Connection:
        return Connection(self.address, self.key)

    def done(self, farm: FarmProcess) -> int:
        return sum(row["steps"] + row["episodes"] for row in farm.status())


def replayed(field: Field, count: int) -> list[Row]:
    """A recorded session, said again: all at once, and in the order of the exchange."""
    with attacks.Recorder(field.farm.address) as wire:
        with open_object("slot-0", wire.address, field.key_file) as slot:
            slot.reset(7)
            slot.step([0.5])
        before = field.done(field.farm)
        for number in range(count):
            attacks.replay(field.farm.address, wire.heard[0], paced=bool(number % 2))
    executed = field.done(field.farm) - before
    return [("a recorded session replayed %d times: calls executed" % count, str(executed), "0", executed == 0)]


def big_headers(field: Field, count: int) -> list[Row]:
    """Headers that announce 1 GB, before anything is proven."""
    rows: list[Row] = []
    for name, farm in (("with a key", field.farm), ("without", field.open_farm)):
        process = psutil.Process(farm.pid)
        said = [attacks.header(kind, 1 << 30) for kind in (message.MSG_CONNECT, message.MSG_INVOKE)]
        for number in range(20):
            attacks.answer_to(farm.address, said[number % 2])
        before = process.memory_info().rss
        longest = 0.0
        for number in range(count):
            began = time.perf_counter()
            with attacks.connected(farm.address) as sock, contextlib.suppress(ConnectionError):
                sock.sendall(said[number % 2])
                while sock.recv(4096):
                    pass
            longest = max(longest, time.perf_counter() - began)
        grown = (process.memory_info().rss - before) / 2**20
        what = "%d headers announcing 1 GB, farm %s: RSS grows by" % (count, name)
        rows.append((what, "%.2f MiB (each refused within %.0f ms)" % (grown, longest * 1e3), "<= 1 MB", grown <= 1))
    return rows


def fuzz(field: Field, count: int) -> list[Row]:
    """Nonsense, and good frames with mistakes in them, half at each farm; and what the farm's decoder makes of them."""
    rows: list[Row] = []
    farms = (field.farm, field.open_farm)
    before = [(field.done(farm), [row["starts"] for row in farm.status()]) for farm in farms]
    for number, farm in enumerate(farms):
        attacks.fuzz(farm.address, count // 2, seed=number)
    crashes = sum(farm.process.poll() is not None or "Traceback" in farm.log() for farm in farms)
    after = [(field.done(farm), [row["starts"] for row in farm.status()]) for farm in farms]
    rows.append(("%d fuzzed connections: crashes" % count, str(crashes), "0", crashes == 0))
    rows.append(("the same: calls executed or workers replaced", str(int(before != after)), "0", before == after))
    objects = sum(not _is_plain(value) for value in _decoded(count))
    rows.append(("%d fuzzed bodies decoded: objects that are no plain data" % count, str(objects), "0", objects == 0))
    return rows


def _decoded(count: int) -> Iterator[Any]:
    rng = random.Random(3)
    seeds = _good_bodies()
    for _ in range(count):
        body = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        with contextlib.suppress(Exception):  # refused, in whatever words
            yield messages.decoded(bytes(body), 6, 0)


def _good_bodies() -> list[bytes]:
    calls = [["farm", "exchange", ["t" * 32, [[0, 1, protocol.STEP, b"body"]], 2.0, 1], {}]]
    calls += [["slot-0", "step", [value], {"options": value}] for value in attacks.NOT_PLAIN]
    return [msgpack.packb(call) for call in calls]


def _is_plain(value: Any) -> bool:
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return type(value) in (int, float, str, bytes, bool, type(None))


def keys(field: Field, folder: Path) -> list[Row]:
    """Keys that are not the farm's, and files that are no keys; each must be refused with its reason."""
    rows: list[Row] = []
    wrong, open_to_all = folder / "wrong.key", folder / "open.key"
    auth.new_key(wrong)
    auth.new_key(open_to_all)
    open_to_all.chmod(0o644)
    closed, keyless = field.farm.address, field.open_farm.address
    cases = (
        ("wrong key", closed, wrong, "another key"),
        ("no key", closed, None, "wants a key"),
        ("a key for a farm that has none", keyless, field.key_file, "started without a key"),
        ("key file that others can read", closed, open_to_all, "chmod 600"),
        ("key file that is not there", closed, folder / "none.key", "no key file"),
    )
    for what, address, key_file, words in cases:
        try:
            Farmer(ENV, [(address, 1)], key_file=key_file).close()
            said = "let in"
        except FarmError as error:
            said = "%s: %s" % (type(error).__name__, str(error).split("\n")[0])
        said = said.replace(str(folder), "").replace(closed, "HOST:PORT").replace(keyless, "HOST:PORT")
        rows.append(
            ("host with: " + what, said, "refused", words in said or (words == "chmod 600" and "mode 644" in said))
        )
    command = [sys.executable, str(ROOT / "farm.py"), ENV, "--slots", "1", "--port", "0"]
    for what, extra in (
        ("--key-file of mode 644", ["--key-file", str(open_to_all)]),
        ("--host 0.0.0.0", ["--host", "0.0.0.0"]),
    ):
        environment = {name: value for name, value in os.environ.items() if name != auth.VARIABLE}
        run = subprocess.run(
            command + extra,
            capture_output=True,
            text=True,
            cwd=ROOT / "tests",
            timeout=60,
            check=False,
            env=environment,
        )
        rows.append(("farm.py " + what, "exit code %d" % run.returncode, "2", run.returncode == 2))
    return rows


def leases(field: Field, count: int) -> list[Row]:
    """Calls on another host's slots: guessed leases, an own lease with his slots, his slot as an object."""
    owner, thief = field.connect(), field.connect()
    his, mine = owner.acquire(ENV, 1), thief.acquire(ENV, 1)
    owner.exchange(
        his["lease"], [[his["slots"][0], 1, protocol.RESET, codec.encode({"seed": 1, "options": None})]], 5.0
    )
    before = field.done(field.farm)
    body = codec.encode({"action": [0.5], "repeat": 1})
    rng = random.Random(4)
    succeeded = 0
    with open_object("slot-%d" % his["slots"][0], field.farm.address, field.key_file) as slot:
        for number in range(count):
            with contextlib.suppress(FarmError, RuntimeError):
                if number % 3 == 0:
                    thief.exchange(mine["lease"], [[his["slots"][0], number, protocol.STEP, body]], 0.0)
                elif number % 3 == 1:
                    guess = "%032x" % rng.getrandbits(128)
                    thief.release(guess)
                    thief.exchange(guess, [[his["slots"][0], number, protocol.STEP, body]], 0.0)
                else:
                    slot.step([0.5])
                succeeded += 1
            if number % 100 == 0:
                owner.exchange(his["lease"], [], 0.0)
                thief.exchange(mine["lease"], [], 0.0)
    changed = field.done(field.farm) - before
    for line, lease in ((owner, his), (thief, mine)):
        line.release(lease["lease"])
        line.close()
    what = "%d calls on another host's slots: succeeded, and steps made" % count
    return [(what, "%d, %d" % (succeeded, changed), "0, 0", succeeded == changed == 0)]


def silent(field: Field, count: int, clients: int, rounds: int) -> list[Row]:
    """A new connection's time, and the steps of a host that is there, beside the same without silent clients."""
    times: dict[bool, list[float]] = {False: [], True: []}
    rates: dict[bool, list[float]] = {False: [], True: []}
    with Farmer(ENV, [(field.farm.address, 1)], key_file=field.key_file) as pool:
        pool.reset(pool.vacant())
        pool.recv()
        gone = 0
        for number in range(2 * rounds):
            attacked = bool(number % 2)
            with attacks.silent(field.farm.address, clients if attacked else 0) as crowd:
                field.connect().close()  # after it, all of the crowd are in
                rates[attacked].append(rate(pool, 0.5))
                for _ in range(count // rounds):
                    began = time.perf_counter()
                    field.connect().close()
                    times[attacked].append(time.perf_counter() - began)
                gone += any(map(_hung_up, crowd))
    p99 = {which: float(np.percentile(values, 99)) * 1e3 for which, values in times.items()}
    # The upper quartiles: rounds in which nothing else wanted the processor.
    steps = {which: float(np.percentile(values, 75)) for which, values in rates.items()}
    ratio, kept = p99[True] / p99[False], steps[True] / steps[False]
    said = "%.1f ms beside %.1f ms: %.2f times" % (p99[True], p99[False], ratio)
    went = "%.0f/s beside %.0f/s: %.0f %%" % (steps[True], steps[False], kept * 100)
    if gone:
        went += " (in %d rounds some had been sent away before the end)" % gone
    return [
        (
            "%d silent clients: p99 of a new connection (of %d)" % (clients, len(times[True])),
            said,
            "<= 2 times",
            ratio <= 2,
        ),
        ("%d silent clients: steps of a host that is there" % clients, went, ">= 95 %", kept >= 0.95),
    ]


def _hung_up(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def rate(pool: Farmer, seconds: float) -> float:
    """Steps a second of one environment."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        pool.step([[0.5]], [0])
        count += 1
    return count / (time.perf_counter() - began)


def cost(key_file: Path, rounds: int, steps: int) -> list[Row]:
    """Microseconds that a key adds to a step: one farm process hears both, with a key at one port, without at another.

    Two farms would differ by where the system lets their processes run, which is more than what is looked for. So both
    connections step the same slot under the same lease, in turn.
    """
    name = "benchmarks.steps.latency:Noop"
    action = np.full(22, 0.5, np.float32)
    body = codec.encode({"action": action, "repeat": 1})
    command = [sys.executable, "-m", "benchmarks.security.strangers", "--serve", str(key_file)]
    figures: list[list[float]] = [[], [], []]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as farm:
        assert farm.stdout is not None
        assert farm.stdin is not None
        closed, keyless = farm.stdout.readline().split()
        lines = [Connection(load_farmlist([(closed, 1)])[0], auth.load_key(key_file))]
        lines += [Connection(load_farmlist([(keyless, 1)])[0])]
        lease = lines[0].acquire(name, 1)
        env = RemoteEnv(name, [(keyless, 1)])
        env.reset()
        seq = 0

        def ask(line: Connection, kind: int, content: bytes) -> None:
            nonlocal seq
            seq += 1
            replies = line.exchange(lease["lease"], [[lease["slots"][0], seq, kind, content]], 5.0)
            codec.decode(replies[0][4])

        ask(lines[0], protocol.RESET, codec.encode({"seed": 1, "options": None}))
        ways = [lambda: ask(lines[0], protocol.STEP, body), lambda: ask(lines[1], protocol.STEP, body)]
        ways += [lambda: env.step(action)]
        for number in range(rounds):
            for which in (0, 1, 2) if number % 2 else (1, 0, 2):
                began = time.perf_counter()
                for _ in range(steps):
                    ways[which]()
                figures[which].append((time.perf_counter() - began) / steps * 1e6)
        env.close()
        for line in lines:
            line.close()
        farm.stdin.close()
    # The lower quartiles: rounds in which nothing else wanted the processor. The medians stand beside them.
    with_key, without, whole = (float(np.percentile(times, 25)) for times in figures)
    more = with_key - without
    medians = [statistics.median(times) for times in figures]
    said = "%+.0f us to %.0f us: %+.1f %% (of medians %+.1f %%; to a step of 20 ms: %+.2f %%)" % (
        more,
        whole,
        more / whole * 100,
        (medians[0] - medians[1]) / medians[2] * 100,
        more / 200,
    )
    return [("a key adds to a step of 339 floats, environment of 0 us", said, "<= +10 %", more <= 0.10 * whole)]


def serve(key_file: str) -> None:
    """One farm at two ports: with the key, and without."""
    with tempfile.TemporaryDirectory() as folder:
        supervisor = Supervisor(Catalog(["benchmarks.steps.latency:Noop"], {}, str(ROOT)), 2, log_dir=folder)
        daemons = [FarmDaemon("127.0.0.1", 0, auth.load_key(key_file)), FarmDaemon("127.0.0.1", 0)]
        supervisor.start(60.0)
        for daemon in daemons:
            daemon.offer(supervisor)
            threading.Thread(target=daemon.requestLoop, daemon=True).start()
        print(*[daemon.locationStr for daemon in daemons], flush=True)
        sys.stdin.read()
        supervisor.stop("the benchmark is over")
        for daemon in daemons:
            daemon.shutdown()


def main() -> None:
    """Prints the table; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a tenth to a hundredth of everything")
    parser.add_argument("--replays", type=int, help="of a recorded session (1000)")
    parser.add_argument("--headers", type=int, help="that announce 1 GB (1000)")
    parser.add_argument("--frames", type=int, help="fuzzed connections (100000)")
    parser.add_argument("--calls", type=int, help="on another host's slots (10000)")
    parser.add_argument("--connections", type=int, help="new ones beside silent clients (2000)")
    parser.add_argument("--clients", type=int, help="silent at a time (200)")
    parser.add_argument("--rounds", type=int, help="of steps with and without a key, 20 steps each (1000)")
    parser.add_argument("--only", nargs="+", help="rows: replay headers fuzz keys leases silent cost")
    parser.add_argument("--serve", metavar="KEY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    long = {"replays": 1000, "headers": 1000, "frames": 100_000, "calls": 10_000}
    long |= {"connections": 2000, "clients": 200, "rounds": 1000}
    short = {
        "replays": 100,
        "headers": 200,
        "frames": 2000,
        "calls": 500,
        "connections": 200,
        "clients": 200,
        "rounds": 200,
    }
    for name, value in (short if args.short else long).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        auth.new_key(folder / "farm.key")
        forever: dict[str, Any] = {"slots": 2, "kwargs": {"length": 10**9}}
        field = Field(
            stack.enter_context(running_farm(ENV, key_file=folder / "farm.key", **forever)),
            stack.enter_context(running_farm(ENV, **forever)),
            folder / "farm.key",
        )
        parts: dict[str, Callable[[], list[Row]]] = {
            "replay": lambda: replayed(field, args.replays),
            "headers": lambda: big_headers(field, args.headers),
            "fuzz": lambda: fuzz(field, args.frames),
            "keys": lambda: keys(field, folder),
            "leases": lambda: leases(field, args.calls),
            "silent": lambda: silent(field, args.connections, args.clients, 20),
            "cost": lambda: cost(folder / "farm.key", args.rounds, 20),
        }
        for part, measure in parts.items():
            if args.only is None or part in args.only:
                print("%s ..." % part, file=sys.stderr, flush=True)
                rows += measure()
    print(machine())
    print(table(("what", "figure", "goal", ""), [(*row[:3], "met" if row[3] else "MISSED") for row in rows]))
    sys.exit(not all(row[3] for row in rows))


if __name__ == "__main__":
    main()
