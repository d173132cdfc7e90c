"""Breaks everything on purpose and counts what is lost: the rows of the table in docs/reliability.md.

python -m benchmarks.faults.bench kills --count 1000             # kill -9 of random workers
python -m benchmarks.faults.bench kills --count 300 --spares 1
python -m benchmarks.faults.bench hangs --count 200              # SIGSTOP, endless loops, blocked in C
python -m benchmarks.faults.bench leak --steps 10000             # 1 MB a step under a cap
python -m benchmarks.faults.bench crashloop --seconds 60
python -m benchmarks.faults.bench network --faults 10000 --steps 200000
python -m benchmarks.faults.bench partitions --count 20          # real network namespaces: wants root and `ip netns`
python -m benchmarks.faults.bench farms --count 200              # daemons killed, stopped, cut off
python -m benchmarks.faults.bench hosts --count 50
python -m benchmarks.faults.bench drift --faults 9000            # what farm and host hold after thousands of faults
python -m benchmarks.faults.bench soak --minutes 60 --every 5    # training under faults of all kinds, one every 5 s

Farms and workers are real processes. Everything that was sent and came back is kept, and so is what the environments
did; `history.check` then decides whether anything was lost, doubled, swapped or mixed up, and whether the ledgers add
up. Each command prints its row of the table, and exits with code 1 when the history is not a correct one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil

from benchmarks.faults.drift import drift
from benchmarks.faults.history import Got, Lost, Sent, read_journal
from benchmarks.faults.parts import (
    ENV,
    OTHERS,
    ROOT,
    WAIT_LIMIT,
    Bench,
    Driver,
    Farm,
    Highest,
    Pool,
    Proxy,
    Wire,
    first_line,
    is_gone,
    p,
    row,
    start_up,
    times,
)
from benchmarks.faults.soak import soak
from farmhand.memory_cap import WEIGH_EVERY

# The commands.


def kills(args: argparse.Namespace) -> int:
    """kill -9 of random workers, in blocks between which nothing is broken."""
    rng = random.Random(args.seed)
    with Bench() as bench:
        farm = bench.farm(args.slots, "--spares", str(args.spares), takes=args.takes)
        driver = bench.drive([(farm.address, args.slots)])
        recoveries, starts, harmed, calm = [], [], [], []
        for number in range(args.count):
            if number % args.block == 0:
                time.sleep(args.settle)  # spares stand again
                starts += [start_up(bench) for _ in range(2)]
                begin = time.monotonic()
                time.sleep(args.calm)
                calm.append((begin, time.monotonic(), None))
            _wait_for_spares(farm, args.spares)
            slot = rng.randrange(args.slots)
            pid, at = driver.pid[slot], time.monotonic()
            os.kill(pid, signal.SIGKILL)

            def is_back(slot: int = slot, pid: int = pid) -> bool:
                return driver.pid[slot] != pid

            driver.until(is_back, "the recovery of slot %d" % slot)
            recoveries.append(driver.first_at[slot] - at)
            time.sleep(args.pause * rng.uniform(0.5, 1.5))
            harmed.append((at, time.monotonic(), slot))
        verdict = bench.judge(driver)
        share = 100 * driver.rate(harmed) / driver.rate(calm)
    start = statistics.median(starts)
    limit = 150 if args.spares else 1200 * p(starts, 99) + 100
    measured = "%d recovered; %s from the kill to the next first observation (start-up p50 %.0f ms, p99 %.0f ms)" % (
        len(recoveries),
        times(recoveries),
        1e3 * start,
        1e3 * p(starts, 99),
    )
    return row(
        "%d x kill -9 of random workers, %s" % (args.count, "warm spare" if args.spares else "no spare"),
        "all recovered, p99 <= %.0f ms; others >= 98 %%" % limit,
        measured + "; other slots at %.1f %% of fault-free" % share,
        verdict,
    )


def _wait_for_spares(farm: Farm, spares: int) -> None:
    """Until as many stand as the farm keeps."""
    end = time.monotonic() + WAIT_LIMIT
    while farm.ask("status")[0]["spares"] < spares:
        if time.monotonic() > end:
            raise TimeoutError("the farm's spares do not stand: %s" % farm.ask("status"))
        time.sleep(0.05)


OUTSIDE = "SIGSTOP from outside"


def hangs(args: argparse.Namespace) -> int:
    """Workers that stop answering, in every way there is."""
    rng = random.Random(args.seed)
    kinds = [OUTSIDE, "stop", "spin", "hang_in_c", "hang_with_gil"]
    with Bench() as bench:
        farm = bench.farm(args.slots, "--step-timeout", str(args.deadline), "--spares", "1", takes=args.takes)
        driver = bench.drive([(farm.address, args.slots)])
        late, left = [], 0
        for number in range(args.count):
            kind, slot = kinds[number % len(kinds)], rng.randrange(args.slots)
            pid, at = driver.pid[slot], time.monotonic()
            if kind == OUTSIDE:
                os.kill(pid, signal.SIGSTOP)
            else:
                driver.orders[slot] = kind

            def is_told(slot: int = slot, at: float = at) -> bool:
                return driver.lost_at.get(slot, 0.0) > at

            driver.until(is_told, "word of the %s" % kind)
            late.append(driver.lost_at[slot] - driver.sent_at[slot] - args.deadline)
            driver.until(lambda slot=slot, pid=pid: driver.pid[slot] != pid, "the recovery")
            end = driver.lost_at[slot] + 1.0  # with a spare the slot goes on before its former process is buried
            while not is_gone(pid) and time.monotonic() < end:
                time.sleep(0.01)
            left += not is_gone(pid)
            time.sleep(args.pause)
        blocked = driver.longest
        verdict = bench.judge(driver)
    measured = (
        "%d detected, %s over the deadline of %g s; %d processes left after 1 s; the learner's longest wait %.0f ms"
        % (
            len(late),
            times(late),
            args.deadline,
            left,
            1e3 * blocked,
        )
    )
    wanted = "detected <= deadline + 100 ms, 0 processes left, the learner never blocks"
    return row("%d hangs (%s)" % (args.count, ", ".join(kinds)), wanted, measured, verdict)


def leak(args: argparse.Namespace) -> int:
    """Environments that keep a megabyte more with each step."""
    with Bench() as bench:
        cap = args.cap
        soft = () if args.hard else ("--recycle-memory", "%dM" % (cap - 2 * args.length))
        farm = bench.farm(
            args.slots,
            *("--memory", "%dM" % cap, "--spares", "1", *soft),
            **{"fault": "leak", "megabytes": 1.0, "length": args.length, "takes": args.takes},
        )
        driver = bench.drive([(farm.address, args.slots)])
        highest = Highest(farm)
        highest.start()
        began = time.monotonic()
        while driver.history.count(Sent) < args.steps:
            time.sleep(0.5)
            if driver.trouble or time.monotonic() - began > args.limit:
                break
        seconds = time.monotonic() - began
        verdict = bench.judge(driver)
        workers = len({did.who for did in read_journal(bench.journal)})
        highest.stop()
        fastest = max(_most_within(driver, slot, WEIGH_EVERY) for slot in driver.pid)
    measured = (
        "highest RSS %.0f MB under a cap of %d MB, where up to %d MB leaked from one look at it to the next (%g s); "
        "%d workers used up in %.0f s; %d transitions lost"
    ) % (highest.highest / 2**20, cap, fastest, WEIGH_EVERY, workers, seconds, verdict.told)
    wanted = "never above cap + one poll" + ("" if args.hard else ", 0 transitions lost")
    how = "ended at the cap" if args.hard else "recycled between episodes"
    return row("a leak of 1 MB a step, %d steps, %s" % (verdict.sent, how), wanted, measured, verdict)


def _most_within(driver: Driver, slot: int, seconds: float) -> int:
    """The most transitions of a slot within so many seconds."""
    at = np.array([event.at for event in driver.history.events if isinstance(event, Got) and event.slot == slot])
    return int((np.searchsorted(at, at + seconds) - np.arange(len(at))).max()) if len(at) else 0


def crashloop(args: argparse.Namespace) -> int:
    """A slot whose environment cannot be built any more, beside slots that work."""
    with Bench() as bench:
        broken = bench.folder / "broken"
        farm = bench.farm(
            args.slots,
            *("--spares", "0"),
            **{"fault": "exit", "at": "construct", "only_if": str(broken), "takes": args.takes, "length": 1000},
        )
        driver = bench.drive([(farm.address, args.slots)])
        process = psutil.Process(farm.pid)

        def interval() -> tuple[float, float, float]:
            begin, used = time.monotonic(), sum(process.cpu_times()[:2])
            time.sleep(args.seconds)
            return begin, time.monotonic(), sum(process.cpu_times()[:2]) - used

        before = interval()
        broken.touch()
        os.kill(driver.pid[0], signal.SIGKILL)
        harmed = interval()
        starts = farm.ask("status")[0]["starts"]
        broken.unlink()
        pid = driver.pid[0]
        driver.until(lambda: driver.pid[0] != pid, "the slot's return once it can be built again", 120)
        back = time.monotonic() - harmed[1]
        after = interval()
        verdict = bench.judge(driver)
        calm = driver.rate([(*before[:2], 0), (*after[:2], 0)])
        share = 100 * driver.rate([(*harmed[:2], 0)]) / calm
    usual = (before[2] + after[2]) / 2
    measured = (
        "the farm's process %.2f %% CPU with the crash loop, %.2f %% without; %d starts in %.0f s; "
        "others at %.1f %% of fault-free; built again %.0f s after it could be"
    ) % (100 * harmed[2] / args.seconds, 100 * usual / args.seconds, starts, args.seconds, share, back)
    return row("a crash loop beside %d slots" % (args.slots - 1), "<= 2 % CPU more, others >= 98 %", measured, verdict)


def network(args: argparse.Namespace) -> int:
    """A host and farms with proxies between them that harm what goes through."""
    with Bench() as bench:
        farms, proxies, addresses = [], [], []
        for number in range(args.farms):
            # More slots than the host wants: those of a lease that nobody calls for any more are held a while.
            farms.append(bench.farm(3 * args.proxies * args.slots // 2, "--spares", "0"))
            seed = args.seed + number
            proxies.append(bench.proxy(farms[-1], ports=args.proxies, every=args.every, seed=seed))
            proxies[-1].say("calm")
            addresses += [(address, args.slots) for address in proxies[-1].addresses]
        driver = bench.drive(addresses)
        began = time.monotonic()
        for proxy in proxies:
            proxy.say("harm")
        said = began
        while True:
            time.sleep(0.5)
            counts = [proxy.counts() for proxy in proxies]
            faults, steps = sum(sum(count.values()) for count in counts), driver.history.count(Sent)
            now = time.monotonic()
            if driver.trouble or now - began > args.limit or (faults >= args.faults and steps >= args.steps):
                break
            if now - said > 20:
                said = now
                print("%.0f s: %d faults, %d steps" % (now - began, faults, steps), file=sys.stderr, flush=True)
            if faults >= args.faults:
                for proxy in proxies:
                    proxy.say("calm")
        seconds = time.monotonic() - began
        for proxy in proxies:
            proxy.say("calm")
        time.sleep(1.0)
        longest = driver.longest
        verdict = bench.judge(driver)
        kinds = {kind: sum(count[kind] for count in counts) for kind in counts[0]}
        alive = sum(not is_gone(farm.pid) for farm in farms)
    measured = "%d faults (%s) over %d steps in %.0f s; %d told as lost; longest wait of the learner %.1f s; %s" % (
        faults,
        ", ".join("%d %s" % (n, kind) for kind, n in kinds.items()),
        verdict.sent,
        seconds,
        verdict.told,
        longest,
        "every farm still runs" if alive == len(farms) else "**a farm died**",
    )
    wanted = "0 lost, 0 doubled, 0 swapped, 0 cross-slot; ledger sums"
    return row("network faults through %d proxies" % len(addresses), wanted, measured, verdict)


def farms(args: argparse.Namespace) -> int:
    """Daemons that are killed, stopped and cut off, several at a time, beside one that nobody touches."""
    with Bench() as bench:
        steady = bench.farm(args.slots, takes=args.takes)
        victims = [bench.farm(args.slots, takes=args.takes) for _ in range(args.at_a_time)]
        proxies = [bench.proxy(victim) for victim in victims]
        for proxy in proxies:
            proxy.say("calm")
        lists = [(steady.address, args.slots)] + [(proxy.addresses[0], args.slots) for proxy in proxies]
        driver = bench.drive(lists)
        time.sleep(3.0)  # what starts beside them has started
        calm = [_pause(args.calm)]
        by_farm = {
            name: [slot for slot in driver.pid if driver.pool.name_of(slot) == name]
            for name in (address for address, _ in lists)
        }
        tallies = [Tally(number) for number in range(args.at_a_time)]
        todo = iter(range(args.count))
        lock, over = threading.Lock(), threading.Event()

        def work(number: int) -> None:
            slots = by_farm[proxies[number].addresses[0]]
            rng = random.Random(args.seed + number)
            try:
                while not over.is_set():
                    with lock:
                        turn = next(todo, None)
                    if turn is None:
                        return
                    kind = ("killed", "stopped", "cut off")[turn % 3]
                    _vanish(kind, victims[number], proxies[number], driver, slots, tallies[number])
                    time.sleep(rng.uniform(0.2, 1.0))
            except BaseException as error:
                tallies[number].trouble = error
                over.set()

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(args.at_a_time)]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.2)
        finally:
            over.set()
        harmed = (begin, time.monotonic())
        for tally in tallies:
            if tally.trouble is not None:
                raise tally.trouble
        mine = set(by_farm[steady.address])
        time.sleep(3.0)
        calm.append(_pause(args.calm))
        got = np.array([e.at for e in driver.history.events if isinstance(e, Got) and e.slot in mine])
        rates = [
            sum(((got >= low) & (got < high)).sum() for low, high in spans) / sum(high - low for low, high in spans)
            for spans in (calm, [harmed])
        ]
        touched = sum(isinstance(e, Lost) and e.slot in mine for e in driver.history.events)
        verdict = bench.judge(driver)
    parts = []
    for kind in ("killed", "stopped", "cut off"):
        left = [x for tally in tallies for x in tally.left[kind]]
        back = [x for tally in tallies for x in tally.back[kind]]
        parts.append(
            "%d %s: left after %.1f s (longest %.1f), back %.2f s (p99 %.2f, longest %.2f) after its return"
            % (len(back), kind, p(left, 50), max(left, default=0), p(back, 50), p(back, 99), max(back, default=0))
        )
    orphans = sum(tally.orphans for tally in tallies)
    measured = "%s; %d orphans after 1 s; the untouched farm at %.1f %% of its pace, %d of its slots lost" % (
        "; ".join(parts),
        orphans,
        100 * rates[1] / rates[0],
        touched,
    )
    wanted = "0 orphans after 1 s, left within 4 s, host goes on, rejoin <= 2 s after it is back"
    return row("farm daemons killed, stopped and cut off, %d times" % args.count, wanted, measured, verdict)


def _pause(seconds: float) -> tuple[float, float]:
    begin = time.monotonic()
    time.sleep(seconds)
    return begin, time.monotonic()


class Tally:
    """What one thread of `farms` measured."""

    def __init__(self, number: int):
        self.number, self.orphans = number, 0
        self.trouble: BaseException | None = None
        self.left: dict[str, list[float]] = {"killed": [], "stopped": [], "cut off": []}
        self.back: dict[str, list[float]] = {"killed": [], "stopped": [], "cut off": []}


def _vanish(kind: str, farm: Farm, proxy: Proxy, driver: Driver, slots: list[int], tally: Tally) -> None:
    """One farm goes, is left by the host, and comes back."""
    at = time.monotonic()
    workers = farm.workers()
    if kind == "killed":
        farm.kill()
    elif kind == "stopped":
        os.kill(farm.pid, signal.SIGSTOP)
    else:
        proxy.say("hold")
    driver.until(
        lambda: any(driver.lost_at.get(slot, 0.0) > at for slot in slots), "the host to leave a %s farm" % kind
    )
    tally.left[kind].append(min(driver.lost_at[slot] for slot in slots if driver.lost_at.get(slot, 0.0) > at) - at)
    if kind == "killed":
        time.sleep(max(0.0, at + 1.0 - time.monotonic()))
        tally.orphans += sum(not is_gone(pid) for pid in workers)
        farm.start()
    else:
        driver.until(lambda: all(driver.lost_at.get(slot, 0.0) > at for slot in slots), "all its slots to be left")
        time.sleep(1.0)
        if kind == "stopped":
            os.kill(farm.pid, signal.SIGCONT)
        else:
            proxy.say("go")
    back = time.monotonic()
    driver.until(lambda: all(driver.first_at[slot] > at for slot in slots), "the return of a %s farm" % kind)
    tally.back[kind].append(max(0.0, min(driver.first_at[slot] for slot in slots) - back))


def hosts(args: argparse.Namespace) -> int:
    """Hosts that are killed, several at a time, beside one that goes on."""
    with Bench() as bench:
        farm = bench.farm(args.slots * (1 + args.at_a_time), takes=args.takes)
        driver = bench.drive([(farm.address, args.slots)])
        before, freed, doomed = dict(driver.pid), [], []
        try:
            while len(freed) < args.count:
                count = min(args.at_a_time, args.count - len(freed))
                free = farm.ask("describe")["free"]
                for _ in range(count):
                    command = [sys.executable, "-m", "benchmarks.faults.bench", "host", farm.address, str(args.slots)]
                    doomed.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
                for host in doomed:
                    if not first_line(host):
                        raise RuntimeError("a host did not start")
                at = time.monotonic()
                for host in doomed:
                    host.kill()
                for number in range(1, count + 1):
                    while farm.ask("describe")["free"] < free - args.slots * (count - number):
                        if time.monotonic() - at > WAIT_LIMIT:
                            raise TimeoutError("a dead host's slots were not freed")
                        time.sleep(0.05)
                    freed.append(time.monotonic() - at)
                _end(doomed)
        finally:
            _end(doomed)
        touched = sum(driver.pid[slot] != before[slot] for slot in before) + driver.history.count(Lost)
        verdict = bench.judge(driver)
    measured = "slots free after p50 %.1f s, p99 %.1f s, longest %.1f s; the other host: %d of its slots touched" % (
        p(freed, 50),
        p(freed, 99),
        max(freed),
        touched,
    )
    wanted = "free <= 10 s, another host's environments untouched"
    return row("%d hosts killed (%d at a time)" % (args.count, args.at_a_time), wanted, measured, verdict)


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
    processes.clear()


def host(args: argparse.Namespace) -> int:
    """A host that steps until it is killed; `hosts` starts it."""
    with Pool(ENV, [(args.farm, args.slots)]) as pool, Driver(pool, OTHERS) as driver:
        driver.until(lambda: len(driver.sent_at) == args.slots, "its first steps")
        print("steps", flush=True)
        driver.until(lambda: False, "its end", 600.0)
    return 0


def partitions(args: argparse.Namespace) -> int:
    """A farm in a network namespace of its own, cut off for longer or shorter than two heartbeats."""
    rng = random.Random(args.seed)
    with Bench() as bench, contextlib.closing(Wire()) as wire:
        key = bench.folder / "farm.key"
        subprocess.run([sys.executable, str(ROOT / "farm.py"), "--new-key", str(key)], check=True, capture_output=True)
        near = bench.farm(args.slots, "--key-file", str(key), takes=args.takes)
        far = Farm(
            *(bench.folder, args.slots, ["--key-file", str(key)], ENV, bench.kwargs(takes=args.takes)),
            host=Wire.FAR,
            before=["ip", "netns", "exec", wire.space],
        )
        try:
            driver = bench.drive([(near.address, args.slots), (far.address, args.slots)], key_file=key)
            beyond = [slot for slot in driver.pid if driver.pool.name_of(slot) == far.address]
            short, back = 0, []
            for number in range(args.count):
                end, seconds = ("near", "far")[number % 2], rng.uniform(0.1, 8.0)
                at = time.monotonic()
                wire.turn(end, "down")
                time.sleep(seconds)
                wire.turn(end, "up")
                plugged = time.monotonic()

                def is_back(plugged: float = plugged) -> bool:
                    return all(driver.sent_at[slot] > plugged for slot in beyond)

                driver.until(is_back, "the farm beyond the wire")
                back.append(min(driver.sent_at[slot] for slot in beyond) - plugged)
                short += not any(driver.lost_at.get(slot, 0.0) > at for slot in beyond)
                time.sleep(0.5)
            touched = sum(isinstance(e, Lost) and e.slot not in beyond for e in driver.history.events)
            verdict = bench.judge(driver)
        finally:
            far.stop()
    measured = "%s from the wire's return to the next step; %d cuts cost nothing; %d slots of the near farm lost" % (
        times(back),
        short,
        touched,
    )
    wanted = "0 lost, 0 doubled, 0 swapped, 0 cross-slot; back <= 2 s"
    return row("%d partitions of network namespaces, 0.1 to 8 s" % args.count, wanted, measured, verdict)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run: Callable[[argparse.Namespace], int], **numbers: float) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=(run.__doc__ or "").splitlines()[0])
        sub.set_defaults(run=run)
        for name, default in dict(numbers, seed=0).items():
            sub.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
        return sub

    command(kills, count=1000, slots=4, spares=0, takes=0.02, block=20, settle=1.0, calm=4.0, pause=0.1)
    command(hangs, count=200, slots=4, takes=0.02, deadline=0.5, pause=0.1)
    leaking = command(leak, steps=10_000, slots=2, cap=200, length=25, takes=0.0, limit=600.0)
    leaking.add_argument("--hard", action="store_true", help="without recycling: the cap ends workers in mid-episode")
    command(crashloop, slots=4, takes=0.02, seconds=60.0)
    command(network, faults=10_000, steps=200_000, farms=2, proxies=8, slots=4, every=30, limit=1500.0)
    command(farms, count=200, slots=2, at_a_time=4, takes=0.02, calm=10.0)
    command(hosts, count=50, slots=2, at_a_time=5, takes=0.02)
    command(partitions, count=20, slots=2, takes=0.02)
    command(drift, faults=9000, looks=9, slots=4)
    training = command(
        *(soak,),
        **{"minutes": 60.0, "every": 5.0, "blocks": 6, "calm": 60.0, "warm_up": 180.0, "first_faults": 300.0},
        **{"slots": 4, "spares": 1, "takes": 0.05, "slow": 0.1, "updates": 0.5, "memory": 20_000},
    )
    training.epilog = "every: mean seconds between two faults; blocks: pieces of the minutes, a calm one before each"
    one = command(host)
    one.add_argument("farm")
    one.add_argument("slots", type=int)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 when the history is no correct one."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = parse(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
