"""What a step pays for being checked by the worker and written down by the farm, in microseconds.

python benchmarks/steps/honest.py     # or by a simulator's Python: .interpreters/2.7/bin/python, then the same

The least of five rounds each. The recorder is part of the farm, so an old Python leaves it out.
"""

from __future__ import print_function

import os
import sys
import timeit

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [os.path.join(ROOT, "farmhand", "worker"), os.path.join(ROOT, "wire"), ROOT]

import check  # noqa: E402
import codec  # noqa: E402
import protocol  # noqa: E402

ROUND = 20000


def box(low, high, shape, dtype):
    """A Box in `describe`'s words."""
    low, high = np.full(shape, low, dtype), np.full(shape, high, dtype)
    return {"kind": "box", "dtype": np.dtype(dtype).str, "shape": low.shape, "low": low, "high": high}


def say(name, call, number=ROUND):
    """Prints the time of one call."""
    print("%-66s %6.2f" % (name, min(timeit.repeat(call, number=number, repeat=5)) / number * 1e6))


def main():
    """Prints the table."""
    print("Python %s, numpy %s; us" % (sys.version.split()[0], np.__version__))
    values = np.random.RandomState(1).uniform(0.1, 0.9, 339)
    muscles = values[:22].astype("float32")
    for name, space, value in (
        ("observation, 339 float32, no bounds", box(-np.inf, np.inf, (339,), "float32"), values.astype("float32")),
        ("observation, 339 float32, bounds", box(0, 1, (339,), "float32"), values.astype("float32")),
        ("observation, 339 float64 where float32 is declared, no bounds", box(-np.inf, np.inf, (339,), "f4"), values),
        ("observation, 84 x 84 x 4 uint8", box(0, 255, (84, 84, 4), "uint8"), np.zeros((84, 84, 4), "uint8")),
    ):
        find = check.finder(space)
        assert find(value) is None
        say(name, lambda find=find, value=value: check.observation(find, value))
    find = check.finder(box(0, 1, (22,), "float32"), slack=check.ROUNDING)
    say("action, 22 float32, bounds", lambda: check.action(find, muscles))
    say("reward, a float", lambda: check.reward(1.5))
    say("reward, a float32 of numpy", lambda: check.reward(np.float32(1.5)))
    if sys.version_info >= (3, 10):
        from pathlib import Path

        from farmhand.blackbox import Recorder

        recorder = Recorder(Path("never made"), sys.executable)
        recorder.command(0, protocol.pack(protocol.RESET, 1, codec.encode({"seed": 1, "options": None})))
        frame = protocol.pack(protocol.STEP, 2, codec.encode({"action": muscles, "repeat": 1}))
        say("black box, a command of %d bytes" % len(frame), lambda: recorder.command(0, frame))
        say("black box, the same when its limit is reached", lambda: recorder.command(0, frame), 200000)


if __name__ == "__main__":
    main()
