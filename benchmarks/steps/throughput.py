"""Environment steps beside what users would take instead of a farm, and beside the ideal, in the same run.

python -m benchmarks.peers.make vector remote-gym    # once: makes the peers' environments
python -m benchmarks.steps.throughput                 # all cases, about 15 minutes; --cases noop sleep-16 for some

Every library is in a process of its own; ours has its farm on loopback beside it. Rounds go ours, it, ours, it, and a
ratio is the median of the rounds' ratios, so that what else the machine does falls on both. `ideal` is what slots would
do whose next action is there the moment that they are ready. The scaling curve is written to runs/throughput.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.peers.make import Missing, python_of
from benchmarks.shared.farm import ROOT, local_farm
from benchmarks.shared.peer_process import Peer, PeerError
from benchmarks.shared.table import machine, table, verdict

ENV = "benchmarks.shared.vector_env:Steps"
PEER_LIMIT = 240.0  #: s for a peer to stand; Ray takes its time
OURS_LIMIT = 900.0  #: the same for ours: a thousand workers on a few cores
WORKER, FILLED = 17e6, 0.85  #: bytes of its own that a worker needs (memory/slots.py), and how far memory may be filled
BOTH = ("FarmVectorEnv.step", "Farmer.step")
READY = "Farmer.send, recv"


class Library(NamedTuple):
    """A peer: its name in tables, and the environment of peers/make.py that it lives in (None: our own Python)."""

    name: str
    home: str | None


LIBRARIES = {
    "async": Library("AsyncVectorEnv", None),
    "sb3": Library("SB3 SubprocVecEnv", "vector"),
    "ray": Library("a Ray actor each", "vector"),
    "dm_env_rpc": Library("dm_env_rpc, gRPC", "vector"),
    "remote-gym": Library("remote-gym", "remote-gym"),
    "tianshou": Library("Tianshou Subproc", "vector"),
    "tianshou-ray": Library("Tianshou Ray", "vector"),
    "tianshou-half": Library("Tianshou Subproc, wait_num half", "vector"),
}

#: (slots, peer) -> at most so many times its microseconds; issue 5's goals. Other pairs are shown without one.
NOOP_GOALS = {(8, "async"): 1.2, (32, "async"): 1.2, (1, "ray"): 0.25, (1, "dm_env_rpc"): 0.5}
#: peer -> at least so many times its steps, where step times are lognormal
LOGNORMAL_GOALS = {"async": 4.5, "tianshou-half": 1.2}


class Bench:
    """One run of some cases: what it was told, what it found."""

    def __init__(
        self,
        rounds: int,
        seconds: float | None,
        slots: int | None,
        only: list[str],
        out: Path,
        curve: Path | None = None,
    ):
        """Args: as the command line's."""
        self.curve = curve or out / "scaling.png"
        self.rounds, self.seconds, self.most, self.only, self.out = rounds, seconds, slots, only, out
        self.about: dict[str, set[str]] = {}  # versions; remote-gym has some of its own
        self.missing: dict[str, str] = {}
        self.texts: list[str] = []

    def slots(self, wanted: int) -> int:
        """So many, or as many as the command line allows."""
        return min(wanted, self.most or wanted)

    def chosen(self, *names: str) -> list[str]:
        """Those of the peers that the command line wants."""
        return [name for name in names if not self.only or name in self.only]

    def lasting(self, seconds: float) -> float:
        """So long, or as long as the command line says."""
        return seconds if self.seconds is None else self.seconds

    @contextlib.contextmanager
    def farms(self, case: str, *farms: tuple[int, float]) -> Iterator[list[list[Any]]]:
        """The farmlist of local farms, given as (slots, factor of their sleeps)."""
        patient = ["--start-timeout", "%d" % OURS_LIMIT]
        with contextlib.ExitStack() as running:
            found = []
            for number, (slots, factor) in enumerate(farms):
                folder = self.out / ("%s-%d" % (case, number))
                farm = local_farm(ENV, slots, folder, kwargs={"factor": factor}, options=patient)
                found.append([running.enter_context(farm), slots])
            yield found

    @contextlib.contextmanager
    def ours(self, farmlist: list[list[Any]], slots: list[int], vector: bool = False) -> Iterator[Peer]:
        """Ours, with a pool for each number of slots."""
        entries = "[%s]" % ", ".join('["%s", %d]' % tuple(entry) for entry in farmlist)
        command = [
            sys.executable,
            "-m",
            "benchmarks.peers.ours_slots",
            "--farmlist",
            entries,
            "--slots",
            *map(str, slots),
        ]
        with Peer(command + ["--vector"] * vector, OURS_LIMIT) as peer:
            self.tell(peer.about)
            yield peer

    @contextlib.contextmanager
    def peer(self, name: str, slots: int) -> Iterator[Peer | None]:
        """Another library; None, and why in `missing`, where it is not there."""
        library = LIBRARIES[name]
        peer: Peer | None = None
        try:
            python = sys.executable if library.home is None else python_of(library.home)
            command = [python, "-m", "benchmarks.peers.vector", "--library", name, "--slots", str(slots)]
            peer = Peer(command, PEER_LIMIT)
            self.tell(peer.about)
        except (Missing, PeerError) as error:
            self.miss(name, error)
        try:
            yield peer
        except PeerError as error:
            if peer is None or not peer.over:
                raise  # it was ours
            self.miss(name, error)
        finally:
            if peer is not None:
                peer.close()

    def tell(self, about: dict[str, str]) -> None:
        """Notes versions."""
        for name, version in about.items():
            self.about.setdefault(name, set()).add(version)

    def miss(self, name: str, error: Exception) -> None:
        """Notes that a peer gave no figures."""
        self.missing[LIBRARIES[name].name] = str(error)
        print("no figure for %s: %s" % (name, error), file=sys.stderr, flush=True)

    def say(self, case: str, number: int, text: str) -> None:
        """A line of progress."""
        print("%s, round %d of %d: %s" % (case, number + 1, self.rounds, text), file=sys.stderr, flush=True)


# What a round is worth.


def microseconds(found: dict[str, Any]) -> float:
    """For an environment step."""
    return found["seconds"] / found["steps"] * 1e6


def rate(found: dict[str, Any]) -> float:
    """Environment steps a second."""
    return found["steps"] / found["seconds"]


def share(found: dict[str, Any], first: int = 0) -> float:
    """Of the ideal: how much of the slots' time was spent in their environments, from slot `first` on."""
    slept = found["slept"][first:]
    return sum(slept) / (len(slept) * found["seconds"])


def median(values: Any) -> float:
    """The same for any iterable."""
    return statistics.median(list(values))


def spread(values: list[float], form: str) -> str:
    """Least and most."""
    return "%s-%s" % (form % min(values), form % max(values))


# The cases; each adds a text with a table.


def noop(bench: Bench) -> None:
    """Microseconds a step of an environment that does nothing."""
    rows = []
    for slots in sorted({bench.slots(count) for count in (1, 8, 32)}):
        with (
            bench.farms("noop-%d" % slots, (2 * slots, 1.0)) as farmlist,
            bench.ours(farmlist, [slots], vector=True) as ours,
        ):
            for name in bench.chosen("async", "sb3", "ray", "dm_env_rpc", "remote-gym", "tianshou", "tianshou-ray"):
                rows += _noop_beside(bench, ours, slots, name)
    head = ("slots", "beside", "us a step", "ours", "us a step", "ratio", "least-most", "goal")
    bench.texts.append("No-op environment, 339/22.\n\n" + table(head, rows))


def _noop_beside(bench: Bench, ours: Peer, slots: int, name: str) -> list[list[str]]:
    library = LIBRARIES[name].name
    costs: dict[str, list[float]] = {how: [] for how in BOTH}
    its: list[float] = []
    message = {"seconds": bench.lasting(0.5), "slots": slots}
    with bench.peer(name, slots) as peer:
        for number in range(bench.rounds if peer is not None else 0):
            assert peer is not None
            for how, found in costs.items():
                found.append(microseconds(ours.ask(dict(message, how=how))))
            its.append(microseconds(peer.ask(message)))
            said = ", ".join("%s %.0f" % (how, found[-1]) for how, found in costs.items())
            bench.say("no-op, %d slots" % slots, number, "%s, %s %.0f us" % (said, library, its[-1]))
    if len(its) < bench.rounds:
        return [[str(slots), library, "missing"] + [""] * 5]
    rows = []
    goal = NOOP_GOALS.get((slots, name))
    for how, found in costs.items():
        ratios = [a / b for a, b in zip(found, its, strict=True)]
        ratio = median(ratios)
        figures = ["%.0f" % median(its), how, "%.0f" % median(found), "%.2f" % ratio, spread(ratios, "%.2f")]
        rows.append([str(slots), library, *figures, verdict(ratio, goal, most=True) if goal else "none"])
    return rows


def sleep_16(bench: Bench) -> None:
    """Wall time of 16 ms environments, 8 slots, beside AsyncVectorEnv."""
    slots, rows = bench.slots(8), []
    message = {"seconds": bench.lasting(2.0), "slots": slots, "mean": 0.016}
    walls: dict[str, list[float]] = {how: [] for how in BOTH}
    its: list[float] = []
    with (
        bench.farms("sleep-16", (2 * slots, 1.0)) as farmlist,
        bench.ours(farmlist, [slots], vector=True) as ours,
        bench.peer("async", slots) as peer,
    ):
        for number in range(bench.rounds if peer is not None else 0):
            assert peer is not None
            for how, found in walls.items():
                found.append(microseconds(ours.ask(dict(message, how=how))) * slots / 1000)
            its.append(microseconds(peer.ask(message)) * slots / 1000)
            said = ", ".join("%s %.2f" % (how, found[-1]) for how, found in walls.items())
            bench.say("16 ms", number, "%s, AsyncVectorEnv %.2f ms" % (said, its[-1]))
    for how, found in walls.items():
        if its:
            ratio = median(a / b for a, b in zip(found, its, strict=True))
            goal = verdict(ratio, 1.02, most=True)
            rows.append([how, "%.2f" % median(found), "%.2f" % median(its), "%.3f" % ratio, goal])
        else:
            rows.append([how, "", "missing", "", ""])
    head = ("ours", "ms a batch", "AsyncVectorEnv, ms a batch", "ratio", "goal")
    bench.texts.append("%d slots of 16 ms, all together.\n\n" % slots + table(head, rows))


def many(bench: Bench) -> None:
    """Share of ideal and the host's CPU for 64, 256 and 1,024 slots."""
    rows = []
    for wanted, farms, mean, goal in ((64, 1, 0.05, 0.97), (256, 1, 0.05, 0.97), (1024, 8, 0.05, 0.95)):
        slots = bench.slots(_that_fit(wanted, farms))
        each = slots // farms or 1
        with (
            bench.farms("many-%d" % wanted, *[(each, 1.0)] * farms) as farmlist,
            bench.ours(farmlist, [each * farms]) as ours,
        ):
            rows += _many_rows(bench, ours, (each * farms, farms, wanted), mean, goal)
            if farms == 1:
                # Equal sleeps that begin together stay together: their steps are due at one instant, over and over.
                rows += _many_rows(bench, ours, (each * farms, farms, wanted), mean, goal, sigma=0.1)
            if wanted == 1024:
                # The same with a tenth of the steps, for where so many processes are more than the cores can do.
                rows += _many_rows(bench, ours, (each * farms, farms, wanted), 10 * mean, None)
    head = ("slots", "farms", "step", "steps/s", "share of ideal", "goal", "host CPU a step", "goal", "all cores busy")
    bench.texts.append("Many slots, whoever is ready.\n\n" + table(head, rows))


def _that_fit(wanted: int, farms: int) -> int:
    there = int(psutil.virtual_memory().available * FILLED / WORKER) // farms * farms
    if there < wanted:
        print("memory is there for %d workers, not for %d" % (there, wanted), file=sys.stderr, flush=True)
    return min(wanted, there)


def _many_rows(
    bench: Bench, ours: Peer, sizes: tuple[int, int, int], mean: float, goal: float | None, sigma: float = 0.0
) -> list[list[str]]:
    slots, farms, wanted = sizes
    message = {"how": READY, "seconds": bench.lasting(max(4.0, 10 * mean)), "slots": slots, "mean": mean, "warm": 1.0}
    message["sigma"] = sigma
    shares, rates, cpus, busy = [], [], [], []
    for number in range(bench.rounds):
        psutil.cpu_percent()
        found = ours.ask(message)
        busy.append(psutil.cpu_percent())
        shares.append(share(found))
        rates.append(rate(found))
        cpus.append(found["cpu"] / found["steps"] * 1e6)
        bench.say("%d slots of %g ms" % (slots, mean * 1000), number, "%.1f %% of ideal" % (100 * shares[-1]))
    return [
        [
            str(slots) if slots == wanted else "%d (of %d)" % (slots, wanted),
            str(farms),
            "%g ms" % (mean * 1000) + (", sigma %g" % sigma) * bool(sigma),
            "%.0f" % median(rates),
            "%.1f %%" % (100 * median(shares)),
            percent(median(shares), goal) if goal else "none",
            "%.0f us" % median(cpus),
            verdict(median(cpus), 60.0, most=True),
            "%.0f %%" % median(busy),
        ]
    ]


def percent(figure: float, goal: float) -> str:
    """A verdict in per cent."""
    return verdict(100 * figure, 100 * goal).replace(":", " %:")


def lognormal(bench: Bench) -> None:
    """Uneven steps: whoever is ready, beside a barrier and beside Tianshou's."""
    slots = bench.slots(64)
    message = {"how": READY, "seconds": bench.lasting(4.0), "slots": slots, "mean": 0.05, "sigma": 0.8, "warm": 1.0}
    mine: list[float] = []
    rows = []
    with bench.farms("lognormal", (slots, 1.0)) as farmlist, bench.ours(farmlist, [slots]) as ours:
        for name in bench.chosen(*LOGNORMAL_GOALS):
            goal = LOGNORMAL_GOALS[name]
            ratios: list[float] = []
            its: list[float] = []
            with bench.peer(name, slots) as peer:
                for number in range(bench.rounds if peer is not None else 0):
                    assert peer is not None
                    drawn = dict(message, seed=number)
                    mine.append(share(ours.ask(drawn)))
                    its.append(share(peer.ask(drawn)))
                    ratios.append(mine[-1] / its[-1])
                    bench.say("lognormal", number, "%.3f of ideal, %s %.3f" % (mine[-1], name, its[-1]))
            if ratios:
                figures = ["%.1f %%" % (100 * median(its)), "%.2f" % median(ratios), verdict(median(ratios), goal)]
            else:
                figures = ["missing", "", ""]
            rows.append([LIBRARIES[name].name, *figures])
        while len(mine) < bench.rounds:
            mine.append(share(ours.ask(dict(message, seed=len(mine)))))
    rows.insert(0, ["ours", "%.1f %%" % (100 * median(mine)), "", percent(median(mine), 0.95)])
    text = "%d slots, lognormal step times, sigma 0.8, mean 50 ms.\n\n" % slots
    bench.texts.append(text + table(("library", "share of ideal", "ours / it", "goal"), rows))


def straggler(bench: Bench) -> None:
    """One slot of 16 is fifty times slower."""
    slots = max(2, bench.slots(16))
    message = {"how": READY, "seconds": bench.lasting(5.0), "slots": slots, "mean": 0.02, "slow": 50.0, "warm": 1.0}
    shares, discarded = [], 0
    with bench.farms("straggler", (slots, 1.0)) as farmlist, bench.ours(farmlist, [slots]) as ours:
        for number in range(bench.rounds):
            found = ours.ask(message)
            shares.append(share(found, first=1))
            discarded = found["discarded"]
            bench.say("straggler", number, "%.3f of the others' ideal, %d discarded" % (shares[-1], discarded))
    rows = [
        ["share of the others' ideal", "%.1f %%" % (100 * median(shares)), percent(median(shares), 0.93)],
        ["results discarded", str(discarded), verdict(discarded, 0, most=True)],
    ]
    text = "%d slots of 20 ms, the first of them fifty times slower.\n\n" % slots
    bench.texts.append(text + table(("what", "figure", "goal"), rows))


def two_farms(bench: Bench) -> None:
    """Two farms, one three times slower: who gets how many steps."""
    each = max(1, bench.slots(16) // 2)
    message = {"how": READY, "seconds": bench.lasting(4.0), "slots": 2 * each, "mean": 0.02, "warm": 0.5}
    ratios = []
    with (
        bench.farms("two-farms", (each, 1.0), (each, 3.0)) as farmlist,
        bench.ours(farmlist, [2 * each]) as ours,
    ):
        fast = farmlist[0][0]
        for number in range(bench.rounds):
            found = ours.ask(message)
            there = list(zip(found["farms"], found["counts"], strict=True))
            ratios.append(_mean(n for at, n in there if at == fast) / _mean(n for at, n in there if at != fast))
            bench.say("two farms", number, "%.3f steps of a fast slot for one of a slow slot" % ratios[-1])
    off = 100 * max(abs(ratio / 3 - 1) for ratio in ratios)
    rows = [["%.3f" % median(ratios), "3", "%.1f %%" % off, verdict(off, 5, most=True)]]
    text = "Two farms of %d slots, 20 ms and 60 ms.\n\n" % each
    bench.texts.append(text + table(("steps per slot, fast / slow", "speed", "worst round off by", "goal, %"), rows))


def _mean(values: Iterator[int]) -> float:
    return statistics.fmean(list(values))


def scaling(bench: Bench) -> None:
    """1 to 64 slots of 50 ms: the curve, and what of it is serial."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= bench.slots(64)]
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    # Of all slots a pool holds those that it was given, so the farm has enough for all pools at once.
    with (
        bench.farms("scaling", (sum(sizes), 1.0)) as farmlist,
        bench.ours(farmlist, sizes) as ours,
    ):
        for number in range(bench.rounds):
            for size in sizes:
                message = {"how": READY, "seconds": bench.lasting(1.5), "slots": size, "mean": 0.05, "warm": 0.1}
                rates[size].append(share(ours.ask(message)) * size)
            said = ", ".join("%d: %.3f" % (size, found[-1] / size) for size, found in rates.items())
            bench.say("scaling", number, said)
    efficiency = {size: median(found) / size for size, found in rates.items()}
    one = efficiency[sizes[0]]
    relative = {size: found / one for size, found in efficiency.items()}
    serial = serial_fraction(relative)
    picture = bench.curve
    draw(relative, serial, picture)
    rows = [[size, "%.3f" % efficiency[size], "%.3f" % relative[size]] for size in sizes]
    text = "50 ms a step; Amdahl's serial fraction, fitted: %.4f %% (goal %s). Curve: %s\n\n" % (
        100 * serial,
        verdict(100 * serial, 0.1, most=True),
        picture,
    )
    bench.texts.append(text + table(("slots", "share of ideal", "efficiency beside 1 slot"), rows))


def serial_fraction(efficiency: dict[int, float]) -> float:
    """Amdahl's s, where n slots have the efficiency 1 / (1 + s (n - 1)): least squares of 1 / efficiency - 1."""
    points = [(size - 1, 1 / found - 1) for size, found in efficiency.items()]
    below = sum(more * more for more, _ in points)
    return sum(more * lost for more, lost in points) / below if below else 0.0


def draw(efficiency: dict[int, float], serial: float, path: Path) -> None:
    """The curve as a PNG, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install -e '.[train]')", file=sys.stderr, flush=True)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    sizes = list(efficiency)
    axes.plot(sizes, [efficiency[size] for size in sizes], "o", label="measured")
    axes.plot(sizes, [1 / (1 + serial * (size - 1)) for size in sizes], "-", label="serial %.4f %%" % (100 * serial))
    axes.set_xscale("log", base=2)
    axes.set_ylim(0.9 * min([*efficiency.values(), 1.0]), 1.02 * max([*efficiency.values(), 1.0]))
    axes.set(xlabel="slots of 50 ms", ylabel="efficiency beside 1 slot")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


CASES: dict[str, Callable[[Bench], None]] = {
    "noop": noop,
    "sleep-16": sleep_16,
    "many": many,
    "lognormal": lognormal,
    "straggler": straggler,
    "two-farms": two_farms,
    "scaling": scaling,
}


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; the exit code is 1 when a peer is missing from them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="of a round, in place of what is each case's own")
    parser.add_argument("--slots", type=int, help="no more than these, for a look")
    parser.add_argument("--peers", nargs="+", choices=LIBRARIES, default=[], help="these alone")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "throughput", help="for logs and the curve")
    parser.add_argument("--curve", type=Path, help="of scaling, in place of scaling.png in that folder")
    args = parser.parse_args(argv)
    bench = Bench(args.rounds, args.seconds, args.slots, args.peers, args.out, args.curve)
    for name in args.cases:
        CASES[name](bench)
        print(bench.texts[-1] + "\n", flush=True)
    versions = ["%s %s" % (name, " and ".join(sorted(found))) for name, found in bench.about.items()]
    print("%s.\n%s." % (machine(), ", ".join(versions)))
    for name, why in bench.missing.items():
        print("%s is missing: %s" % (name, why.splitlines()[0]))
    return int(bool(bench.missing))


if __name__ == "__main__":
    sys.exit(main())
