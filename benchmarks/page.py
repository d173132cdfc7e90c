"""Runs the benchmarks of this machine's speed and writes their tables into docs/benchmarks.md.

python -m benchmarks.page                      # all of them, about 50 minutes; wants a machine that does nothing else
python -m benchmarks.page --only many memory   # some

The page has a pair of comments for each, `<!-- many -->` and `<!-- end of many -->`; what stands between them is
replaced, with the command and the day. One that fails leaves its table as it was, and says so.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
INCOMPLETE = 1  #: exit code of a benchmark whose table says what is missing in it

#: name on the page -> the command's arguments, in the order in which they are run
COMMANDS = {
    "step_latency": "steps.latency",
    "step_parts-8": "steps.parts --slots 8",
    "step_parts-32": "steps.parts --slots 32",
    "noop": "steps.throughput --cases noop",
    "sleep-16": "steps.throughput --cases sleep-16",
    "straggler": "steps.throughput --cases straggler",
    "two-farms": "steps.throughput --cases two-farms",
    "lognormal": "steps.throughput --cases lognormal",
    "scaling": "steps.throughput --cases scaling --curve docs/curves/scaling.png",
    "large": "steps.large",
    "placement": "steps.placement --rounds 3 --seconds 3",
    "wallclock": "steps.wallclock",
    "memory": "memory.slots",
    "many": "steps.throughput --cases many",
    "osim_steps": "steps.osim --seconds 15",
}


class NoPlace(Exception):
    """The page has no place for a benchmark."""


def replaced(page: str, name: str, text: str) -> str:
    """The page with another text between the comments of `name`.

    Raises:
        NoPlace: they are not there, or more than once.
    """
    first, last = "<!-- %s -->\n" % name, "<!-- end of %s -->" % name
    if page.count(first) != 1 or page.count(last) != 1 or page.index(first) > page.index(last):
        raise NoPlace("docs/benchmarks.md has no pair of lines %s and %s" % (first.strip(), last))
    pattern = re.escape(first) + r".*?" + re.escape(last)
    return re.sub(pattern, lambda _: first + "\n" + text.strip() + "\n\n" + last, page, flags=re.DOTALL)


def printed_by(arguments: str) -> str:
    """What the benchmark prints, which is also shown here as it comes.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks." + arguments.split()[0], *shlex.split(arguments)[1:]]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode not in (0, INCOMPLETE):
        raise subprocess.CalledProcessError(process.returncode, command)
    if not any(line.startswith("|") for line in lines):
        raise subprocess.CalledProcessError(process.returncode or INCOMPLETE, command, "no table")
    return "".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs them one after the other; the exit code is 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="NAME")
    args = parser.parse_args(argv)
    failed = []
    for name in args.only:
        replaced(PAGE.read_text(), name, "")  # before it takes minutes
        print("\n== %s: python -m benchmarks.%s" % (name, COMMANDS[name]), flush=True)
        try:
            found = printed_by(COMMANDS[name])
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print("%s failed, its table stays as it was: %s" % (name, error), file=sys.stderr, flush=True)
            continue
        head = "`python -m benchmarks.%s`, %s:" % (COMMANDS[name], datetime.date.today().isoformat())
        PAGE.write_text(replaced(PAGE.read_text(), name, head + "\n\n" + found))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
