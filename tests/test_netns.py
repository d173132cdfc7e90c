"""A farm in a network namespace of its own, and a wire to it that is really cut. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from farms import ROOT, FarmProcess, running_farm
from helpers import poll_until

from farmer import Farmer
from wire import auth

SLOW = "environments:SlowEnv"
NEAR, FAR = "198.18.231.1", "198.18.231.2"  # a range that is set apart for tests of networks (RFC 2544)
LEFT = 4.0 + 8.0  # seconds: two heartbeats, and patience with a busy machine
BACK = 2.0 + 10.0


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None:
        return "needs the command ip of iproute2"
    name = "farm-try-%d" % os.getpid()
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return "no network namespaces here: " + tried.stderr.strip()
    ends = ["farm%s%d" % (end, os.getpid() % 100_000) for end in "ab"]
    made = subprocess.run(
        ["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], capture_output=True, text=True
    )
    subprocess.run(["ip", "link", "del", ends[0]], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], check=True)
    return "no virtual wires here: " + made.stderr.strip() if made.returncode else None


_WHY = _why_not()
pytestmark = pytest.mark.skipif(_WHY is not None, reason=_WHY or "")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Wire:
    """A wire from here to a namespace, which can be pulled out at either end."""

    def __init__(self) -> None:
        self.space, self.near, self.far = ("farm%s%d" % (part, os.getpid() % 100_000) for part in ("s", "n", "f"))
        ip("netns", "add", self.space)
        try:
            ip("link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self.space)
            self.plug("near")
            self.plug("far")
            ip("-n", self.space, "addr", "add", FAR + "/30", "dev", self.far)
            ip("addr", "add", NEAR + "/30", "dev", self.near)
            ip("-n", self.space, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def pull(self, end: str) -> None:
        """near: this machine sees at once that its network is gone. far: what it sends is swallowed in silence."""
        ip(*(["link"] if end == "near" else ["-n", self.space, "link"]), "set", getattr(self, end), "down")

    def plug(self, end: str) -> None:
        ip(*(["link"] if end == "near" else ["-n", self.space, "link"]), "set", getattr(self, end), "up")

    def close(self) -> None:
        ip("netns", "del", self.space)  # the wire goes with it
        poll_until(lambda: not os.path.exists("/sys/class/net/" + self.near), 30, "the end of the wire")


@pytest.fixture(scope="module")
def wire():
    wire = Wire()
    yield wire
    wire.close()


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("key") / "farm.key"
    auth.new_key(path)
    return path


@pytest.fixture(scope="module")
def far_farm(wire, key_file, tmp_path_factory):
    """A farm in the namespace, with a key, for it listens beyond loopback."""
    folder = tmp_path_factory.mktemp("far")
    command = ["ip", "netns", "exec", wire.space, sys.executable, str(ROOT / "farm.py"), SLOW, "--slots", "2"]
    command += [
        "--host",
        FAR,
        "--port",
        "20099",
        "--log-dir",
        str(folder / "logs"),
        "--key-file",
        str(key_file),
        "--spares",
        "0",
    ]
    farm = FarmProcess(command, folder)
    try:
        poll_until(lambda: "Ctrl-C stops it." in farm.said() or farm.process.poll() is not None, 40, "the farm")
        assert farm.process.poll() is None, farm.log()
        yield farm
    finally:
        farm.end()


class Play(threading.Thread):
    """Steps all slots all the time; every transition must be the next of its episode."""

    def __init__(self, farmer):
        super().__init__()
        self.farmer, self.over, self.error = farmer, threading.Event(), None
        self.steps, self.lost = {}, {}

    def run(self):
        try:
            self._play()
        except BaseException as error:
            self.error = error

    def _play(self):
        running = {}
        while not self.over.is_set():
            fresh = self.farmer.vacant()
            if fresh:
                self.farmer.reset(fresh)
            for row in self.farmer.collect(timeout=40):
                name = self.farmer.name_of(row.slot)
                if row.lost:
                    self.lost[name] = self.lost.get(name, 0) + 1
                    running.pop(row.slot, None)
                    continue
                if row.first:
                    running[row.slot] = (row.obs[0], 0)
                else:
                    episode, number = running[row.slot]
                    assert row.obs[:2].tolist() == [episode, number + 1], "a step was lost, doubled or swapped"
                    running[row.slot] = (episode, number + 1)
                    self.steps[name] = self.steps.get(name, 0) + 1
                with contextlib.suppress(ValueError):  # it was lost since
                    self.farmer.send(np.full((1, 1), 0.01, "float32"), [row.slot])


@contextlib.contextmanager
def playing(farmer):
    play = Play(farmer)
    play.start()
    try:
        yield play
    finally:
        play.over.set()
        play.join(60)
    if play.error is not None:
        raise play.error
    ledger = farmer.status()["ledger"]
    assert ledger["sent"] == sum(count for name, count in ledger.items() if name != "sent")


@pytest.fixture(scope="module")
def near_farm(key_file):
    with running_farm(SLOW, slots=1, key_file=key_file) as farm:
        yield farm


@pytest.mark.parametrize("end", ["near", "far"])
@pytest.mark.slow
def test_a_farm_that_is_cut_off_is_left_and_taken_back_and_no_step_is_lost_doubled_or_swapped(
    wire, far_farm, near_farm, key_file, end
):
    farms = [(near_farm.address, 1), (FAR, 2)]
    with Farmer(SLOW, farms, key_file=key_file) as farmer, playing(farmer) as play:
        poll_until(lambda: play.steps.get(FAR + ":20099", 0) > 20, 30, "steps beyond the wire")
        began = time.monotonic()
        wire.pull(end)
        try:
            poll_until(lambda: farmer.nb_slots == 1, LEFT, "the host to leave the farm")
            left = time.monotonic() - began
            here = play.steps[near_farm.address]
            assert play.lost.get(near_farm.address, 0) == 0
            poll_until(lambda: play.steps[near_farm.address] > here + 20, 30, "the other farm, which goes on")
        finally:
            wire.plug(end)
        began = time.monotonic()
        poll_until(lambda: farmer.nb_slots == 3, BACK, "the farm that is there again")
        print("left after %.2f s, back after %.2f s" % (left, time.monotonic() - began))
        before = play.steps[FAR + ":20099"]
        poll_until(lambda: play.steps[FAR + ":20099"] > before + 20, 30, "steps beyond the wire")
        assert play.lost == {FAR + ":20099": 2}


def test_a_cut_that_is_shorter_than_two_heartbeats_costs_nothing(wire, far_farm, key_file):
    with Farmer(SLOW, [(FAR, 2)], key_file=key_file) as farmer, playing(farmer) as play:
        poll_until(lambda: play.steps.get(FAR + ":20099", 0) > 20, 30, "steps beyond the wire")
        wire.pull("far")
        time.sleep(1.2)
        wire.plug("far")
        before = play.steps[FAR + ":20099"]
        poll_until(lambda: play.steps[FAR + ":20099"] > before + 20, 30, "steps beyond the wire")
        assert not play.lost
