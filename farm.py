"""A farm: offers environments on this machine to a trainer elsewhere.

python farm.py Pendulum-v1 --slots 4
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

    def _leave(number: int, frame: FrameType | None) -> None:
        """Ctrl-C while the rest is imported: nothing has begun, and a traceback through it tells nobody anything."""
        os.write(2, b"farm.py: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, _leave)

import argparse
import contextlib
import ctypes
import logging
import threading
import time
from pathlib import Path
from typing import Any

import simulators
from farmhand.catalog import Catalog
from farmhand.control import Control, ask
from farmhand.limits import FACTOR, FLOOR, SHARE, Limits, memory_share
from farmhand.options import json_object, size
from farmhand.preflight import check_python
from farmhand.service import FarmDaemon, check_host
from farmhand.supervisor import Supervisor
from farmhand.tree import free_memory
from wire import auth, codec
from wire.errors import BadKey, StartError

PORT = 20099
GLANCE = 0.5  #: s between looks at whether the end is wanted
M_ARENA_MAX = -8  # of glibc's malloc.h


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="farm.py",
        description="Offers environments on this machine to a trainer elsewhere, each in a process of its own.",
        epilog="recipes that ship with this farm: " + ", ".join(sorted(simulators.RECIPES)),
    )
    parser.add_argument(
        "env", nargs="*", metavar="ENV", help="a gymnasium id, a recipe, or module:factory from the working directory"
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="environments (default: cores; `python -m farmhand.autotune ENV` measures how many are worth it)",
    )
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the simulator's Python, 2.7 to 3.13")
    parser.add_argument("--env-kwargs", type=json_object, default={}, metavar="JSON", help="for every constructor")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="address to listen on (default: %(default)s; wider ones need a key)",
    )
    parser.add_argument("--port", type=int, default=PORT, metavar="P", help="(default: %(default)s; 0: any free one)")
    parser.add_argument(
        "--key-file",
        metavar="PATH",
        help="hosts must have the same key (a file of mode 600; default: FARM_KEY, or no key)",
    )
    parser.add_argument("--new-key", metavar="PATH", help="write a new key there, and start no farm; takes no ENV")
    parser.add_argument("--log-dir", metavar="DIR", help="one log a slot (default: logs/farm-PORT)")
    parser.add_argument(
        "--black-box",
        metavar="DIR",
        help="files of episodes that ended badly, to play again (default: inside the logs)",
    )
    parser.add_argument(
        "--check-bounds",
        choices=["on", "off"],
        default="on",
        help="refuse observations and actions outside their declared bounds; NaN, Inf and wrong shapes always are",
    )
    _add_limits(parser)
    parser.add_argument(
        "--release",
        type=int,
        metavar="SLOT",
        help="have a farm that runs here, at --port, end the worker of a slot and start a new one; no farm is started",
    )
    parser.add_argument(
        "--until-eof", action="store_true", help="stop when stdin closes, for a farm that another program starts"
    )
    args = parser.parse_args(argv)
    if not args.env and args.new_key is None and args.release is None:
        parser.error("the following arguments are required: ENV")
    if args.env and args.new_key is not None:
        parser.error("--new-key starts no farm, so it takes no ENV: make the key first, then name it with --key-file")
    if args.env and args.release is not None:
        parser.error("--release starts no farm, so it takes no ENV: the farm that runs is found by its --port")
    if args.slots < 1:
        parser.error(f"--slots must be at least 1, not {args.slots}")
    for option in ("start_timeout", "reset_timeout", "step_timeout"):
        if getattr(args, option) is not None and not getattr(args, option) > 0:
            name = option.replace("_", "-")
            parser.error(f"--{name} must be more than 0 seconds, not {getattr(args, option):g}")
    for option, least in (("recycle_resets", 1), ("recycle_steps", 1), ("spares", 0)):
        if getattr(args, option) is not None and getattr(args, option) < least:
            parser.error(f"--{option.replace('_', '-')} must be at least {least}, not {getattr(args, option)}")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be 0 to 65535, not {args.port}")
    return args


def _add_limits(parser: argparse.ArgumentParser) -> None:
    times = parser.add_argument_group(
        "time limits, in seconds; what takes longer is ended, and its slot gets a new worker"
    )
    times.add_argument(
        "--start-timeout", type=float, default=120.0, metavar="S", help="to build an environment (default: %(default)g)"
    )
    learnt = f"(default: learnt, {FACTOR:g} times its own p99, at least {FLOOR:g})"
    times.add_argument("--reset-timeout", type=float, metavar="S", help=f"for a reset {learnt}")
    times.add_argument(
        "--step-timeout",
        type=float,
        metavar="S",
        help=f"for one step; k times that when an action is repeated {learnt}",
    )
    ageing = parser.add_argument_group("replacing workers; at the end of an episode, but for --memory")
    ageing.add_argument(
        "--memory", type=size, metavar="SIZE", help="as 2G: over it a worker is ended at once (default: none)"
    )
    ageing.add_argument(
        "--recycle-memory",
        type=size,
        metavar="SIZE",
        help=f"over it a worker is replaced (default: its share of {100 * SHARE:.0f} %% of this "
        "machine's, once it has also doubled)",
    )
    ageing.add_argument("--recycle-resets", type=int, metavar="N", help="replace a worker after so many episodes")
    ageing.add_argument("--recycle-steps", type=int, metavar="N", help="replace a worker after so many steps")
    ageing.add_argument(
        "--spares", type=int, metavar="N", help="workers in stock for each environment (default: 1 where memory allows)"
    )


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits of the command line, and those that follow from this machine."""
    share = memory_share(free_memory()[0], args.slots) if args.recycle_memory is None else None
    return Limits(
        start=args.start_timeout,
        reset=args.reset_timeout,
        step=args.step_timeout,
        memory=args.memory,
        recycle_memory=args.recycle_memory,
        memory_share=share,
        recycle_resets=args.recycle_resets,
        recycle_steps=args.recycle_steps,
        spares=args.spares,
    )


def keep_one_heap() -> None:
    """Has all threads of this process share one heap, where the C library would give each its own (glibc).

    Each connection has a thread, and what a thread once needed stays with its heap, so a farm would grow for thousands
    of reconnects. The interpreter lets one thread at a time allocate in any case.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


class End:
    """Whether a signal has asked for it.

    No threading.Event, and no wait without a limit: a signal that comes when the main thread is just about to wait does
    not wake it, and a handler that runs in this moment would want the lock that the thread holds.
    """

    wanted = False


def run(args: argparse.Namespace, end: End) -> None:
    """Starts everything, in an order in which a failure leaves nothing behind, and serves until the end is wanted."""
    keep_one_heap()
    key = auth.find_key(args.key_file)
    os.environ.pop(auth.VARIABLE, None)  # no simulator may see it
    check_host(args.host, key is not None)
    catalog = Catalog(args.env, args.env_kwargs, check_bounds=args.check_bounds == "on")
    version = check_python(args.python)
    if args.black_box is not None:
        make_folder(args.black_box)
    daemon = FarmDaemon(args.host, args.port, key)
    port = int(daemon.locationStr.rpartition(":")[2])
    supervisor = Supervisor(catalog, args.slots, args.python, log_dir(args, port), limits_of(args), args.black_box)
    control: Control | None = None
    serving = threading.Thread(target=daemon.requestLoop, name="pyro", daemon=True)
    try:
        supervisor.start()
        control = Control(supervisor.log_dir, {"release": supervisor.release_by_hand})
        daemon.offer(supervisor)
        serving.start()
        say(supervisor, version, args.host, port, key is not None)
        if args.until_eof:
            sys.stdin.read()
        else:
            while not end.wanted:
                time.sleep(GLANCE)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the end is under way and has a limit
        if control is not None:
            control.close()
        supervisor.stop("the farm stops")
        if serving.ident is not None:
            daemon.shutdown()
            serving.join(1.0)
        daemon.close()


def log_dir(args: argparse.Namespace, port: int) -> Path:
    """Where the farm at this port has its logs."""
    return Path(args.log_dir or os.path.join("logs", f"farm-{port}"))


def make_folder(path: str) -> None:
    """Makes the folder for black boxes now: the first one comes when something else has gone wrong already.

    Raises:
        StartError: it cannot be made.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise StartError(
            f"cannot make the folder for black boxes, {path}: {error.strerror or error}\n"
            "  now: name another with --black-box"
        ) from None


def say(supervisor: Supervisor, version: str, host: str, port: int, has_key: bool) -> None:
    """Prints what is offered, and the line to paste into farmlist.py."""
    slots = len(supervisor.slots)
    plural = "" if slots == 1 else "s"
    print(f"farm at {host}:{port}, {slots} slot{plural}, Python {version}, logs in {supervisor.log_dir}")
    for name, ready in supervisor.ready.items():
        about = codec.decode(ready)
        observation, action = _space(about["observation_space"]), _space(about["action_space"])
        print(f"  {name}: observation {observation}, action {action}")
    print(f"  {supervisor.spares.about}")
    where = host if port == PORT else f"{host}:{port}"
    print(f"in farmlist.py: farmlist_base = [({where!r}, {slots})]")
    if has_key:
        print("hosts need its key: train.py --key-file PATH, or FARM_KEY in their environment")
    print("Ctrl-C stops it.", flush=True)


def _space(space: dict[str, Any] | None) -> str:
    if space is None:
        return "undescribed"
    return f"{space['kind']} {space.get('shape', space.get('n', ''))}" if "kind" in space else str(space)


def make_key(path: str) -> int:
    """Writes a new key, and says what to do with it."""
    try:
        auth.new_key(path)
    except BadKey as error:
        print(f"farm.py: {error}", file=sys.stderr)
        return 2
    print(
        f"a new key is in {path}\n"
        f"  copy it to the other machines (scp -p keeps its mode), and name it on both sides: --key-file {path}"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when stopped, 2 when it could not start."""
    args = parse(argv)
    if args.new_key is not None:
        return make_key(args.new_key)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stderr)
    if args.release is not None:
        try:
            print(ask(log_dir(args, args.port), "release", args.release))
        except StartError as error:
            print(f"farm.py: {error}", file=sys.stderr)
            return 2
        return 0
    end = End()

    def handle(number: int, frame: FrameType | None) -> None:
        if end.wanted:
            return
        end.wanted = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    try:
        run(args, end)
    except KeyboardInterrupt:
        print("farm stopped", file=sys.stderr)
    except (StartError, BadKey) as error:
        print(f"farm.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
