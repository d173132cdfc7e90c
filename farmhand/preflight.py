"""Checks before anything is started: is the simulator's interpreter one that a worker can run in?"""

from __future__ import annotations

import re
import subprocess

from wire.errors import StartError

_CODE = "import sys; v = sys.version_info; print('%d.%d.%d' % v[:3]); import numpy; print(numpy.__version__)"


def check_python(python: str, limit: float = 30.0) -> str:
    """Tries the simulator's interpreter.

    Returns:
        Its version and numpy's, as `3.8.18, numpy 1.24.4`.

    Raises:
        StartError: it does not start, is too old, or lacks numpy.
    """
    run = _run(python, limit)
    printed = run.stdout.split()
    if not printed or not re.fullmatch(r"\d+\.\d+\.\d+", printed[0]):
        words = run.stderr or run.stdout or "it printed nothing"
        raise StartError(
            f"--python {python} is no Python: {words.strip()[-300:]}\n"
            "  now: give the path of the simulator's interpreter"
        )
    if run.returncode != 0 or len(printed) < 2:
        last = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else ""
        raise StartError(
            f"Python {printed[0]} at {python} has no working numpy, the one package a worker needs\n"
            f"  now: {python} -m pip install numpy\n  {last}"
        )
    return f"{printed[0]}, numpy {printed[1]}"


def _run(python: str, limit: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [python, "-c", _CODE], capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise StartError(
            f"--python {python} said nothing within {limit:g} s\n  now: give the path of the simulator's interpreter"
        ) from None
    except OSError as error:
        raise StartError(
            f"--python {python} does not start: {error.strerror or error}\n"
            "  now: give the path of the simulator's interpreter, as `which python` prints it in its environment"
        ) from None
