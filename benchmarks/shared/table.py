"""Tables for docs/benchmarks.md, and the machine that the figures were taken on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from typing import Any

import psutil

LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")  #: of the minute before the benchmark


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0])]
    lines += [[str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(figure: float, goal: float, most: bool = False) -> str:
    """The goal and whether it is met: at least `goal`, or with `most` at most."""
    met = figure <= goal if most else figure >= goal
    return "%s %g: %s" % ("<=" if most else ">=", goal, "met" if met else "MISSED")


def machine() -> str:
    """Processor, cores, memory, Python, and how busy others kept it, in one line: figures want a load near 0."""
    gib = psutil.virtual_memory().total / 2**30
    return "%s, %d cores, %.0f GiB, load %.1f before the start, Python %s" % (
        _processor(),
        os.cpu_count() or 1,
        gib,
        LOAD,
        platform.python_version(),
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
