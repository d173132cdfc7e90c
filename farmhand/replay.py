"""Plays a black box again: the same environment, seed and actions in a new worker, to see whether it ends the same way.

    python -m farmhand.replay logs/farm-20099/black-box/20261121T104512.338100-slot-3-pid-8123.zip
    python -m farmhand.replay FILE --python .venv-osim/bin/python --to 56

It imports and runs what the file names, as a farm does: play only files of farms that you trust.

Exit codes: 0 it ended as the file says, at the same step (with --to: that step was reached); 1 it ended otherwise, or
not at all; 2 it cannot be played: the file, the interpreter or the environment is not there or not whole; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simulators
from farmhand.blackbox import BlackBox, load
from farmhand.catalog import Catalog
from farmhand.preflight import check_python
from farmhand.worker_process import WorkerProcess, signal_name
from wire import codec, protocol
from wire.errors import BlackBoxError, FarmError

SHORTEST_LIMIT = 60.0  #: s for one command, where --timeout does not say it


@dataclass
class End:
    """How an episode ended, and in which command: the construction, the reset, or a step from 1 on."""

    at: str
    what: str

    def __str__(self) -> str:
        return f"{self.what} in {self.at}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="python -m farmhand.replay",
        description="Plays a black box of a farm again, in a worker of its own.",
        epilog="exit code: 0 the same end at the same step, 1 another one or none, 2 it cannot be played",
    )
    parser.add_argument("file", metavar="FILE", help="a zip from a farm's black-box folder")
    parser.add_argument("--python", metavar="PATH", help="the simulator's Python (default: the one in the file)")
    parser.add_argument("--to", type=int, metavar="STEP", help="stop after this step, and print what it returned")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="for the command in which it ended (default: twice what that had in the farm, at least "
        f"{SHORTEST_LIMIT:g})",
    )
    args = parser.parse_args(argv)
    if args.to is not None and args.to < 0:
        parser.error(f"--to must be a step from 0 on (0: the reset), not {args.to}")
    if args.timeout is not None and not args.timeout > 0:
        parser.error(f"--timeout must be more than 0 seconds, not {args.timeout:g}")
    return args


def recorded(box: BlackBox) -> End:
    """The end that the file tells of."""
    about = box.about
    fault = about.get("fault")
    if fault:
        what = f"a fault, {fault.get('type')}"
    elif about["how"] == "timed out":
        what = "no answer"
    elif "signal" in about:
        what = f"killed by {signal_name(about['signal'])}"
    elif "exit_code" in about:
        what = f"exit code {about['exit_code']}"
    else:
        what = "ended by the farm"
    if box.reset is None:
        return End("the construction", what)
    at = f"step {about['step']}" if about["step"] else "the reset"
    return End(at if about["under_way"] else "the pause after " + at, what)


def play(box: BlackBox, python: str, limit: float, to: int | None, log: Path) -> tuple[End | None, Any]:
    """Plays it.

    Args:
        box: what to play.
        python: the interpreter.
        limit: seconds for the command in which it ended.
        to: the last step to play; None plays all.
        log: where the worker writes.

    Returns:
        (its end, or None where it goes well to the last step; what the last command returned).
    """
    frames = [("the construction", protocol.pack(protocol.CONSTRUCT, 0, codec.encode(_order_here(box.order))))]
    frames += [("the reset", box.reset)] if box.reset is not None else []
    frames += [(f"step {number}", frame) for number, frame in enumerate(box.steps, 1)]
    end = value = None
    worker = WorkerProcess(python, str(box.about["env"]), None, log)
    try:
        for at, frame in frames if to is None else frames[: to + 2]:
            # All but the last answered in the farm, so they are given time.
            what, value = _ask(worker, frame, limit if frame is frames[-1][1] else max(limit, SHORTEST_LIMIT))
            if what is not None:
                end = End(at, what)
                break
    finally:
        worker.end()
    return end, value


def _ask(worker: WorkerProcess, frame: bytes, limit: float) -> tuple[str | None, Any]:
    """Gives it a command: (how it ended, or None where it lives on, and its answer, if it gave one)."""
    try:
        answer = worker.ask(frame, limit)
    except TimeoutError:
        worker.ask_for_trace()
        worker.wait(1.0)
        return "no answer", None
    except protocol.FrameError:
        return "something else came through its pipe", None
    if answer is None:
        return _how_it_ended(worker), None
    value = codec.decode(answer[3])
    return f"a fault, {value['type']}" if answer[0] == protocol.FAULT else None, value


def _how_it_ended(worker: WorkerProcess) -> str:
    code = worker.wait(2.0)
    if code is None:
        return "it closed its pipe"
    return f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"


def _order_here(order: dict[str, Any]) -> dict[str, Any]:
    """The order; a recipe of ours is looked up in this installation."""
    name = order.get("name")
    if name in simulators.RECIPES:
        return dict(order, env=Catalog([name]).order(name)["env"])
    return order


def _check(box: BlackBox, args: argparse.Namespace) -> str:
    """The interpreter to use.

    Raises:
        BlackBoxError: it cannot be played.
    """
    lost = box.about["steps_lost"]
    if lost:
        raise BlackBoxError(
            f"{args.file} lacks the first {lost} of its {lost + len(box.steps)} steps: the episode was "
            "longer than a farm keeps\n"
            "  what it has: how it ended and the log, see about.json and log.txt inside it"
        )
    if args.to is not None and args.to > len(box.steps):
        raise BlackBoxError(f"--to {args.to}: the episode has {len(box.steps)} steps")
    python = args.python or box.about["python"]
    try:
        here, there = check_python(python), "{python}, numpy {numpy}".format(**box.about["worker"])
        other = "" if here == there else f"; in the farm it was Python {there}"
        print(f"playing it with {python}: Python {here}{other}", flush=True)
    except FarmError as error:
        hint = "" if args.python else "\n  the file names this interpreter; name another with --python PATH"
        raise BlackBoxError(f"{error}{hint}") from None
    return str(python)


def _describe(box: BlackBox, was: End) -> None:
    about = box.about
    print(f"{about['env']}, slot {about['slot']} (pid {about['pid']}) on {about['farm'].get('host')}")
    print(f"  ended: {about['ended_at']}, {was}")
    print("  why: " + str(about["why"]).strip().replace("\n", "\n  "))
    if box.reset is not None:
        episode = about["episodes_of_worker"] + 1
        print(f"  episode {episode} of its worker, seed {about.get('seed')}, options {about.get('options')}")
        print(f"  steps: {about['step']}")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    box = load(args.file)
    was = recorded(box)
    _describe(box, was)
    python = _check(box, args)
    limit = args.timeout or max(SHORTEST_LIMIT, 2 * float(box.about.get("seconds_since_last_command") or 0))
    with tempfile.TemporaryDirectory(prefix="replay") as folder:
        log = Path(folder) / "log.txt"
        end, value = play(box, python, limit, args.to, log)
        said = log.read_text("utf-8", "replace").splitlines()
    if end is not None and said:
        print("the end of the worker's log:\n  " + "\n  ".join(said[-40:]))
    if end is not None and value is not None:  # the fault
        print(value["traceback"].rstrip() or f"{value['type']}: {value['text']}")
    if end is not None and end.at != was.at and end.at == "the construction":
        raise BlackBoxError(f"the environment cannot be built here: {end}")
    if end is None and args.to is not None:
        print(f"step {args.to} was reached; it returned\n  {value!r}")
        return 0
    if end is None:
        print(f"another end: it went well to the last step; in the farm it was {was}")
        return 1
    if end == was:
        print(f"the same end: {end}")
        return 0
    print(f"another end: {end}; in the farm it was {was}")
    return 1


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see the module."""
    args = parse(argv)
    try:
        return run(args)
    except BlackBoxError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
