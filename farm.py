"""A farm: offers environments on this machine to a trainer elsewhere.

python farm.py Pendulum-v1 --slots 4
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import simulators
from farmhand.catalog import Catalog
from farmhand.service import FarmDaemon
from farmhand.supervisor import Supervisor, check_python
from wire import codec
from wire.errors import StartError

PORT = 20099


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="farm.py",
        description="Offers environments on this machine to a trainer elsewhere, each in a process of its own.",
        epilog="recipes that ship with this farm: " + ", ".join(sorted(simulators.RECIPES)),
    )
    parser.add_argument(
        "env", nargs="+", metavar="ENV", help="a gymnasium id, a recipe, or module:factory from the working directory"
    )
    parser.add_argument(
        "--slots", type=int, default=os.cpu_count() or 1, metavar="N", help="environments (default: cores)"
    )
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the simulator's Python, 2.7 to 3.13")
    parser.add_argument("--env-kwargs", type=_json_object, default={}, metavar="JSON", help="for every constructor")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, metavar="P", help="(default: %(default)s; 0: any free one)")
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
    parser.add_argument(
        "--start-timeout", type=float, default=120.0, metavar="S", help="for the first build of an environment"
    )
    parser.add_argument(
        "--until-eof", action="store_true", help="stop when stdin closes, for a farm that another program starts"
    )
    args = parser.parse_args(argv)
    if args.slots < 1:
        parser.error("--slots must be at least 1, not %d" % args.slots)
    if not args.start_timeout > 0:
        parser.error("--start-timeout must be more than 0 seconds, not %g" % args.start_timeout)
    if not 0 <= args.port <= 65535:
        parser.error("--port must be 0 to 65535, not %d" % args.port)
    return args


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("not JSON (%s): %s" % (error, text)) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('a JSON object is wanted, as {"difficulty": 1}, not %s' % text)
    return value


def check_host(host: str) -> None:
    """A farm runs what a caller sends it, so it stays on this machine unless callers prove themselves.

    Raises:
        StartError: the address is wider than loopback.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise StartError(
            "--host %s would let anyone on that network run this farm, and keys are not built yet\n"
            "  now: leave it on 127.0.0.1 and, on the host, open a tunnel: ssh -N -L 20099:127.0.0.1:20099 user@slave"
            % host
        )


def run(args: argparse.Namespace, stop: threading.Event) -> None:
    """Starts everything, in an order in which a failure leaves nothing behind, and serves until `stop` is set."""
    check_host(args.host)
    catalog = Catalog(args.env, args.env_kwargs, check_bounds=args.check_bounds == "on")
    version = check_python(args.python)
    daemon = FarmDaemon(args.host, args.port)
    port = int(daemon.locationStr.rpartition(":")[2])
    log_dir = args.log_dir or os.path.join("logs", "farm-%d" % port)
    supervisor = Supervisor(catalog, args.slots, args.python, log_dir, args.black_box)
    serving = threading.Thread(target=daemon.requestLoop, name="pyro", daemon=True)
    try:
        supervisor.start(args.start_timeout)
        daemon.offer(supervisor)
        serving.start()
        say(supervisor, version, args.host, port)
        if args.until_eof:
            sys.stdin.read()
        else:
            stop.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the end is under way and has a limit
        supervisor.stop("the farm stops")
        if serving.ident is not None:
            daemon.shutdown()
            serving.join(1.0)
        daemon.close()


def say(supervisor: Supervisor, version: str, host: str, port: int) -> None:
    """What is offered, and the line to paste into farmlist.py."""
    print(
        "farm at %s:%d, %d slots, Python %s, logs in %s"
        % (host, port, len(supervisor.slots), version, supervisor.log_dir)
    )
    for name, ready in supervisor.ready.items():
        about = codec.decode(ready)
        print(
            "  %s: observation %s, action %s"
            % (name, _space(about["observation_space"]), _space(about["action_space"]))
        )
    where = host if port == PORT else "%s:%d" % (host, port)
    print("in farmlist.py: farmlist_base = [(%r, %d)]" % (where, len(supervisor.slots)))
    print("Ctrl-C stops it.", flush=True)


def _space(space: dict[str, Any] | None) -> str:
    if space is None:
        return "undescribed"
    return "%s %s" % (space["kind"], space.get("shape", space.get("n", ""))) if "kind" in space else str(space)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when stopped, 2 when it could not start."""
    args = parse(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stderr)
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            return
        stop.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        run(args, stop)
    except KeyboardInterrupt:
        print("farm stopped", file=sys.stderr)
    except StartError as error:
        print("farm.py: %s" % error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
