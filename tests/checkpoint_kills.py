"""Kills a process that saves, again and again, and loads what it left.

    python checkpoint_kills.py FOLDER ROUNDS

Prints JSON. Each round forks (an interpreter that imports TensorFlow takes seconds to start), loads, goes on, and is
killed at a random instant after its first save.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

from checkpoint_agent import Teller, check_one_moment

from agents.checkpoint import Checkpointer, segments

KEEP = 2
segments.SEGMENT_BYTES, segments.SMALL_SEGMENTS = 4000, 6  # full sets of several segments, and merges


def saving(folder, seed, said):
    """The child: saves until it is killed, and says the step of each save once `save` has returned."""
    agent, saves, chance = Teller(limit=300, size=20_000), Checkpointer(folder, KEEP), random.Random(seed)
    if seed:
        saves.load(agent)
    parent = os.getppid()
    while os.getppid() == parent:
        agent.play(chance.randint(1, 40))
        saves.save(agent, {"step": agent.step})
        os.write(said, struct.pack("q", agent.step))


def last_said(said, buffered=b""):
    while block := os.read(said, 1 << 16):
        buffered += block
    whole = len(buffered) // 8 * 8
    return struct.unpack("q", buffered[whole - 8 : whole])[0]


def one_round(folder, number, span):
    """Kills one child between 0 and `span` seconds after its first save; the step that it said last."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            saving(folder, number, writing)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        first = os.read(reading, 8) if select.select([reading], [], [], 30)[0] else b""
        time.sleep(random.uniform(0, span))
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child of round %d ended by itself" % number
    said = last_said(reading, first)
    os.close(reading)
    return said


def main():
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    random.seed(1)
    trial, agent = folder.with_name("trial"), Teller(limit=300, size=20_000)
    saves, began = Checkpointer(trial, KEEP), time.monotonic()
    for _ in range(10):
        agent.play(20)
        saves.save(agent, {})
    span = 3 * (time.monotonic() - began) / 10  # three saves: those that are killed come at any of their instants
    shutil.rmtree(trial)
    halves, most = 0, 0
    for number in range(rounds):
        said = one_round(folder, number, span)
        left = [path.name for path in (*folder.iterdir(), *folder.joinpath("replay").iterdir())]
        halves += any(name.endswith(".part") for name in left)
        most = max(most, len(left))
        loaded, saves = Teller(limit=300, size=20_000), Checkpointer(folder, KEEP)
        check_one_moment(loaded, saves.load(loaded))
        assert loaded.step >= said, "round %d: step %d was saved, %d was loaded" % (number, said, loaded.step)
        newest = max(path.name for path in folder.glob("save-*") if not path.name.endswith(".part"))
        assert saves.loaded.name == newest, "round %d: %s is damaged" % (number, newest)
    print(json.dumps({"loaded": rounds, "halves": halves, "most": most, "step": loaded.step, "span": span}))


if __name__ == "__main__":
    main()
