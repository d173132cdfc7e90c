"""Measures how many slots of an environment this machine should have, and prints the table that it decided from.

    python -m farmhand.autotune Pendulum-v1
    python -m farmhand.autotune osim:L2M2019 --python .venv-osim/bin/python --seconds 60

It starts one worker, measures its start, its steps, what it computes and what it holds, and then has 2, 4, 8, ... of
them step at the same time, with random actions, as long as more are worth it and memory and time allow. Nothing listens
meanwhile, and at the end nothing is left but the workers' logs.

Exit codes: 0 measured; 2 it could not be measured: the environment, the interpreter, or a worker that failed, with the
reason; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np

import simulators
from farmhand import tree
from farmhand.catalog import Catalog
from farmhand.limits import FLOOR, Limits, in_words
from farmhand.load_test import LoadTest, Window
from farmhand.options import json_object, size
from farmhand.preflight import check_python
from farmhand.sizing import (
    OTHERS,
    Decision,
    Machine,
    Need,
    Row,
    Stop,
    decide,
    fits,
    growth,
    memory_need,
    memory_words,
    next_slots,
)
from wire.errors import StartError

LEAST = 3  #: steps of each worker, however slow they are
SOLO, EACH = 0.15, 0.08  #: of --seconds, for one worker and for each number of them
WAITS, COMPUTES = 0.3, 0.8  #: cores that a worker keeps busy: below it mostly waits, from there on it computes

log = logging.getLogger("autotune")


@dataclass
class Report:
    """What was measured, in the order in which it was."""

    machine: Machine
    python: str
    start: float = 0.0  # s
    start_computed: float = 0.0  # s of processor time
    built: int = 0  # bytes, when its environment was built
    fresh: int = 0  # after its first step
    threads: int = 0
    solo: Window = field(default_factory=Window)
    growth: float = 0.0  # bytes a step
    episode: float = 0.0  # steps of one
    need: Need = field(default_factory=lambda: Need(1.0, 0))
    rows: list[Row] = field(default_factory=list)
    stop: Stop | None = None
    fault: str = ""
    faults: int = 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="python -m farmhand.autotune",
        description="Measures how many slots of an environment this machine should have: farm.py's --slots.",
        epilog="recipes that ship with this farm: " + ", ".join(sorted(simulators.RECIPES)),
    )
    parser.add_argument("env", metavar="ENV", help="a gymnasium id, a recipe, or module:factory, as for farm.py")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the simulator's Python, 2.7 to 3.13")
    parser.add_argument("--env-kwargs", type=json_object, default={}, metavar="JSON", help="for its constructor")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="for all of it (default: %%(default)g); what a simulator needs for its start and %d steps it gets anyway"
        % LEAST,
    )
    parser.add_argument(
        "--memory-free",
        type=size,
        metavar="SIZE",
        help="as 2G: plan with so much (default: what is free here, in this container if it is one)",
    )
    parser.add_argument(
        "--max-slots", type=int, metavar="N", help="look at no more (default: 64, or 8 a core if that is more)"
    )
    parser.add_argument("--check-bounds", choices=["on", "off"], default="on", help="as for farm.py")
    parser.add_argument("--start-timeout", type=float, default=120.0, metavar="S", help="(default: %(default)g)")
    parser.add_argument("--reset-timeout", type=float, default=FLOOR, metavar="S", help="(default: %(default)g)")
    parser.add_argument("--step-timeout", type=float, default=FLOOR, metavar="S", help="(default: %(default)g)")
    parser.add_argument(
        "--log-dir",
        default=os.path.join("logs", "autotune"),
        metavar="DIR",
        help="one log a worker (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    for option in ("seconds", "start_timeout", "reset_timeout", "step_timeout"):
        if not 0 < getattr(args, option) < math.inf:
            name = option.replace("_", "-")
            parser.error(f"--{name} must be more than 0 seconds, not {getattr(args, option):g}")
    if args.max_slots is not None and args.max_slots < 1:
        parser.error(f"--max-slots must be at least 1, not {args.max_slots}")
    return args


def measure(args: argparse.Namespace, report: Report, test: LoadTest, end: float) -> None:
    """Fills in the report.

    Raises:
        StartError: one worker alone failed. What goes wrong with more of them stands in the report.
    """
    machine = report.machine
    _measure_one(args, report, test)
    while (slots := next_slots(machine, report.need, report.rows)) is not None:
        report.stop = _why_not(args, report, slots, end)
        if report.stop is not None:
            return
        log.info("measuring %d slots", slots)
        try:
            test.renew()
            within = test.grow(slots, machine.room)
            window = test.run(slots, EACH * args.seconds, LEAST, machine.room, end) if within else None
        except StartError as error:
            report.stop = Stop("trouble", f"with {slots} slots {error}")
            return
        if window is None or window.full:
            held = test.memory()
            report.stop = Stop(
                "memory", f"memory: {slots} workers held {in_words(held)}; {in_words(machine.room)} may be used"
            )
            return
        if window.least < LEAST:
            report.stop = _too_slow(args, slots, args.seconds)
            return
        report.faults += window.faults
        report.rows.append(_row(slots, window))
        if not report.growth:
            report.need = Need(report.need.cores, max(report.need.memory, window.most))


def _measure_one(args: argparse.Namespace, report: Report, test: LoadTest) -> None:
    log.info("measuring one worker")
    test.grow(1)
    runner = test.runners[0]
    pid = runner.worker.pid
    report.start = runner.worker.ready_at - runner.worker.started_at
    report.start_computed = tree.processor_time(pid)
    report.built = tree.resident(pid)
    # A worker that leaks must not take all there is before that is seen; one alone that is large may go on.
    room = report.machine.room
    window = test.run(1, SOLO * args.seconds, LEAST, max(room, 2 * report.built), math.inf, leak_room=room // 8)
    if window.rate <= 0:
        raise StartError(
            f"{args.env} held {in_words(window.most)} after {runner.steps} steps, too much to go on "
            f"measuring ({in_words(report.built)} when built, {in_words(report.machine.free)} free)\n"
            "  now: end what else runs here, or say with --memory-free what it may have"
        )
    report.solo, report.fresh, report.threads = window, runner.fresh, tree.threads(pid)
    report.faults, report.fault = window.faults, test.fault
    report.growth = growth(window.samples)
    report.episode = window.steps / window.episodes if window.episodes else window.steps
    memory = memory_need(runner.fresh, max(window.most, report.built), report.growth, report.episode)
    report.need = Need(_would_compute(window), memory)
    report.rows.append(_row(1, window))


def _would_compute(window: Window) -> float:
    """Cores that a worker would keep busy if nobody else used any: while it waits for a core, it does not sleep."""
    return max(window.computed, min(1.0, window.computed / max(0.05, 1.0 - window.queued)))


def _row(slots: int, window: Window) -> Row:
    return Row(slots, window.rate, window.computed + window.own, window.own, window.memory, window.others)


def _why_not(args: argparse.Namespace, report: Report, slots: int, end: float) -> Stop | None:
    """Why so many are not to be measured, if they are not."""
    machine, need = report.machine, report.need
    if not fits(machine, need, slots):
        return Stop("memory", memory_words(machine, need))
    crowd = max(1.0, slots * need.cores / machine.cores)
    start = max(report.start, slots * report.start_computed / machine.cores)
    takes = start + max(EACH * args.seconds, (LEAST + 2) * crowd / report.rows[0].rate)
    left = end - time.monotonic()
    return _too_slow(args, slots, args.seconds + takes - left) if takes > left else None


def _too_slow(args: argparse.Namespace, slots: int, seconds: float) -> Stop:
    wanted = 10 * math.ceil(max(1.5 * seconds, 2 * args.seconds) / 10)
    return Stop(
        "time",
        f"time: {slots} slots were not measured within {args.seconds:g} s, and may be worth it (--seconds {wanted})",
    )


# The report.


def say(args: argparse.Namespace, report: Report) -> None:
    """Prints the measurement, the table, and the decision."""
    decision = decide(report.machine, report.need, report.rows, report.stop)
    machine = report.machine
    given = " (--memory-free)" if args.memory_free else ""
    print(
        f"{args.env} here: {machine.cores:g} cores, {in_words(machine.free)} free{given}, "
        f"of which workers may use {in_words(machine.room)}"
    )
    print(f"one worker alone, Python {report.python}:")
    for name, text in _one_worker(report):
        print(f"  {name:<10} {text}")
    print()
    for line in table(report, decision):
        print(line)
    print()
    for remark in _remarks(report):
        print("note: " + remark)
    print(f"recommended: {decision.slots} slot{'' if decision.slots == 1 else 's'}\n  {decision.why}")
    print(command(args, report, decision.slots), flush=True)


def _one_worker(report: Report) -> Iterator[tuple[str, str]]:
    solo, need = report.solo, report.need
    yield "start", f"{report.start:.2f} s, {report.start_computed:.2f} s of it computing"
    if solo.reset_seconds:
        yield "reset", f"{_time(np.median(solo.reset_seconds))} in the median of {len(solo.reset_seconds)}"
    median, p99 = np.percentile(solo.step_seconds, [50, 99])
    longest = max(solo.step_seconds)
    yield (
        "step",
        f"{_time(median)} in the median, {_time(p99)} p99, {_time(longest)} at most, of {solo.steps}",
    )
    if need.cores >= 1.2:
        what = "computes in several threads or processes"
    elif need.cores >= COMPUTES:
        what = "computes nearly all the time"
    elif need.cores <= WAITS:
        what = "sleeps or waits most of the time"
    else:
        what = "computes, and sleeps or waits between"
    threads = report.threads - 1  # one only waits for the farm's end
    yield "processor", f"{need.cores:.2f} cores, {what}; {threads} thread{'' if threads == 1 else 's'}"
    grown = "no growth seen"
    if report.growth:
        grown = f"grows by {in_words(report.growth)} a step"
        if solo.episodes:
            grown += f", {in_words(report.growth * report.episode)} an episode"
    yield (
        "memory",
        f"{in_words(report.built)} when built, {in_words(report.fresh)} after a step, "
        f"{in_words(solo.most)} at most in {solo.steps} steps and {solo.episodes} episodes; {grown}",
    )


def table(report: Report, decision: Decision) -> Iterator[str]:
    """A line for each number of slots."""
    yield f"{'slots':>6} {'steps/s':>10} {'efficiency':>11} {'cores busy':>11} {'memory':>9}  verdict"
    first = report.rows[0].rate
    for row, verdict in zip(report.rows, decision.verdicts, strict=True):
        efficiency = 100 * row.rate / first / row.slots
        star = "* " if row.slots == decision.slots else ""
        yield (
            f"{row.slots:6} {row.rate:10.4g} {efficiency:9.0f} % {row.busy:11.2f} {in_words(row.memory):>9}  "
            f"{star}{verdict}"
        )


def _remarks(report: Report) -> Iterator[str]:
    solo = report.solo
    if report.faults:
        yield f"the environment failed {report.faults} times, the last one was {report.fault}"
    if not solo.episodes:
        yield f"no episode ended in {solo.steps} steps of one worker: what resets cost is not in the figures"
    if solo.full:
        most = in_words(solo.most)
        yield f"one worker alone was stopped early, at {most}; what it holds after more steps is not known"
    if report.growth:
        yield (
            "it leaks: counted are twice what a fresh one holds, and what an episode adds; --recycle-memory below\n"
            "  has each worker replaced at the end of the episode in which it takes more than its share"
        )
    if not fits(report.machine, report.need, 1):
        yield f"even one worker takes {in_words(report.need.memory)}, and {in_words(report.machine.room)} may be used"
    others = max(row.others for row in report.rows)
    if others >= OTHERS * report.machine.cores:
        yield (
            f"other programs kept up to {others:.2f} of {report.machine.cores:g} cores busy meanwhile, "
            "and this is for what they leave: measure again when they have ended"
        )


def command(args: argparse.Namespace, report: Report, slots: int) -> str:
    """The line that starts the farm."""
    words = ["python", "farm.py", args.env, "--slots", str(slots)]
    if args.python != sys.executable:
        words += ["--python", args.python]
    if args.env_kwargs:
        words += ["--env-kwargs", json.dumps(args.env_kwargs)]
    if args.check_bounds != "on":
        words += ["--check-bounds", args.check_bounds]
    if report.growth:
        share = report.machine.room / slots - report.growth * report.episode
        words += ["--recycle-memory", f"{math.ceil(max(share, 2 * report.fresh) / 2**20)}M"]
    return shlex.join(words)


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def run(args: argparse.Namespace) -> None:
    """Measures, and prints what came out.

    Raises:
        StartError: there is nothing to recommend.
    """
    began = time.monotonic()
    catalog = Catalog([args.env], args.env_kwargs, check_bounds=args.check_bounds == "on")
    version = check_python(args.python)
    folder = Path(args.log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(
            f"cannot make the folder for logs, {folder}: {error.strerror or error}\n  now: name another with --log-dir"
        ) from None
    cores = tree.cores()
    free = args.memory_free or tree.free_memory()[1]
    report = Report(Machine(cores, free, args.max_slots or max(64, math.ceil(8 * cores))), version)
    limits = Limits(start=args.start_timeout, reset=args.reset_timeout, step=args.step_timeout)
    test = LoadTest(catalog, args.python, folder, limits)
    try:
        measure(args, report, test, began + args.seconds)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the end is under way and has a limit
        test.close()
    say(args, report)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see the module."""
    args = parse(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stderr)

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        run(args)
    except StartError as error:
        print(f"autotune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("autotune: stopped; every worker has ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
