"""The environment that fails on command: that it does, in every Python; and what a farm makes of each of its faults."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import interpreters
import numpy as np
import psutil
import pytest
from faces import ROOT, Fault, WorkerGone, WorkerProcess
from farms import farm_here, is_gone, running_farm
from helpers import poll_until

from farmer import Farmer
from simulators import faulty
from wire import protocol

RECIPE = {"kind": "file", "file": str(ROOT / "simulators" / "faulty.py"), "factory": "FaultyEnv"}

PYTHONS = pytest.mark.parametrize("version", interpreters.VERSIONS)

#: Faults that the worker survives, and the type that it reports.
REPORTED = {
    "raise": "RuntimeError",
    "raise_odd": "_Odd",
    "raise_exit": "SystemExit",
    "raise_interrupt": "KeyboardInterrupt",
    "raise_unpicklable": "_Unpicklable",
    "recurse": "RecursionError|RuntimeError",  # Python 2 has the latter only
    "nan": "InvalidObservation",
    "inf": "InvalidObservation",
    "out_of_bounds": "InvalidObservation",
    "wrong_shape": "InvalidObservation",
    "wrong_dtype": "InvalidObservation",
    "no_array": "InvalidObservation",
    "unsendable": "InvalidObservation",
    "nan_reward": "InvalidReward",
    "wrong_reward": "InvalidReward",
    "wrong_answer": "WrongAnswer",
}
#: Faults that end the worker, and its exit code.
DEADLY = {
    "segfault": -signal.SIGSEGV,
    "abort": -signal.SIGABRT,
    "kill": -signal.SIGKILL,
    "exit": 7,
    "close_pipes": 6,
}
#: Faults that only a limit from outside ends.
ENDLESS = ["hang_in_c", "hang_with_gil", "spin", "stop"]
#: What is wrong, and still a transition.
HARMLESS = ["slow", "leak", "print", "grandchild"]


def test_every_fault_stands_in_one_of_these_lists():
    assert sorted([*REPORTED, *DEADLY, *ENDLESS, *HARMLESS]) == faulty.NAMES


def action(value=0.5):
    return np.array([value], "float32")


@pytest.fixture
def start():
    """start(version, **kwargs) -> a worker with a FaultyEnv; its whole group is killed with the test."""
    started = []

    def make(version=None, **kwargs):
        worker = WorkerProcess(interpreters.python_with_numpy(version) if version else sys.executable)
        started.append(worker)
        worker.ask(protocol.CONSTRUCT, {"env": RECIPE, "kwargs": kwargs, "path": []})
        return worker

    yield make
    for worker in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.end()


def reset(worker, **options):
    return worker.ask(protocol.RESET, {"seed": 17, "options": options})


def step(worker, limit=30.0):
    return worker.ask(protocol.STEP, {"action": action(), "repeat": 1}, limit)


# ---- the environment in a worker, in every Python ----


@pytest.mark.slow
@PYTHONS
def test_what_the_worker_survives_is_reported_and_the_next_episode_is_an_honest_one(start, version):
    worker = start(version)
    seen = set()
    for fault, kind in REPORTED.items():
        _, info, _ = reset(worker, fault=fault, at_step=2)
        assert info["episode"] == 1, "a new environment after each fault"
        assert step(worker)[0][2] == 1
        with pytest.raises(Fault) as caught:
            step(worker)
        assert caught.value.body["type"] in kind.split("|"), fault
        assert caught.value.body["where"] == "step"
        seen.add(info["who"])
    assert len(seen) == len(REPORTED)
    observation, info, _ = reset(worker)
    np.testing.assert_array_equal(observation, [info["who"], 1, 0, faulty.tag(17), 0])
    for steps in range(1, 4):
        observation, reward, terminated, truncated, told, _ = step(worker)
        np.testing.assert_array_equal(observation, [info["who"], 1, steps, faulty.tag(17), 0.5])
        assert (reward, terminated, truncated, told["step"], told["seed"]) == (steps, False, False, steps, 17)


@pytest.mark.slow
@PYTHONS
@pytest.mark.parametrize("fault", DEADLY)
def test_what_the_worker_does_not_survive_ends_it(start, version, fault):
    worker = start(version)
    reset(worker, fault=fault, at_step=2)
    step(worker)
    with pytest.raises(WorkerGone, match=f"exit code {int(DEADLY[fault])};") as caught:
        step(worker)
    log = str(caught.value)
    if fault == "close_pipes":
        assert "closed a pipe to the farm" in log
    if fault in ("segfault", "abort") and not version.startswith("2."):
        assert "Fatal Python error" in log
        assert f"in _{fault}" in log, "faulthandler says where"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.7", "3.13"])
@pytest.mark.parametrize("fault", ENDLESS)
def test_a_hang_never_answers_and_nothing_is_left_when_the_farm_is_killed(version, fault, tmp_path):
    """The farm here is a program that is killed with the worker in the middle of the step."""
    script = tmp_path / "farm.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys, time
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            from faces import WorkerProcess
            from wire import protocol
            worker = WorkerProcess({interpreters.python_with_numpy(version)!r})
            worker.ask(protocol.CONSTRUCT, {{"env": {RECIPE!r}, "kwargs": {{"fault": {fault!r}}}, "path": []}})
            worker.ask(protocol.RESET, {{}})
            worker.send(protocol.STEP, {{"action": [0.5], "repeat": 1}})
            print(worker.process.pid, flush=True)
            try:
                print(worker.receive(limit=0.4))
            except TimeoutError:
                print("no answer", flush=True)
            time.sleep(60)
        """)
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as farm:
        pid = int(farm.stdout.readline())
        assert farm.stdout.readline() == "no answer\n"
        assert psutil.pid_exists(pid)
        farm.kill()
    poll_until(lambda: is_gone(pid), 30, "the worker's end with its farm")


def test_a_grandchild_ends_with_its_farm(start):
    worker = start(fault="grandchild")
    reset(worker)
    step(worker)
    (child,) = psutil.Process(worker.process.pid).children()
    worker.process.stdin.close()
    poll_until(lambda: is_gone(child.pid), 30, "the grandchild's end")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.7", "3.13"])
def test_leaking_printing_and_slowing_down_go_on_to_the_end_of_the_episode(start, version):
    worker = start(version, megabytes=10.0, seconds=0.5)
    process = psutil.Process(worker.process.pid)
    reset(worker, fault="leak", at_step=3)
    for _ in range(2):
        step(worker)
    before = process.memory_info().rss
    for _ in range(5):
        step(worker)
    assert process.memory_info().rss - before >= 50e6
    reset(worker, fault="print", at_step=1)
    for _ in range(2):
        step(worker)
    assert "rubbish of the simulator's, step 2" in worker.read_log()
    reset(worker, fault="slow", at_step=1)
    took = [step(worker)[5] for _ in range(3)]
    assert min(took) >= 0.499
    reset(worker)
    assert step(worker)[5] < 0.499


@pytest.mark.slow
@PYTHONS
def test_a_fault_in_the_constructor_and_in_reset(start, version, tmp_path):
    with pytest.raises(Fault, match="RuntimeError in construct"):
        start(version, fault="raise", at="construct")
    flag = tmp_path / "now"
    worker = start(version, fault="raise", at="reset", at_episode=2, only_if=str(flag))
    for _ in range(3):
        reset(worker)
    flag.touch()
    reset(worker)  # its fourth episode
    with pytest.raises(Fault, match="InvalidObservation in reset"):
        reset(worker, fault="nan", at="reset")
    reset(worker)  # the first of the new one
    with pytest.raises(Fault, match="RuntimeError in reset"):
        reset(worker)


# ---- the environment alone ----


def faults_of(env, episodes, steps=20):
    """Where it raised: (episode, step) each."""
    found = []
    for episode in range(episodes):
        env.reset(seed=episode)
        for at in range(1, steps + 1):
            try:
                env.step(action())
            except RuntimeError:
                found.append((episode, at))
                break
    return found


def test_a_probability_draws_by_its_own_seed():
    first = faults_of(faulty.FaultyEnv("raise", at_step=3, probability=0.1, seed=5), 30)
    assert first == faults_of(faulty.FaultyEnv("raise", at_step=3, probability=0.1, seed=5), 30)
    assert first != faults_of(faulty.FaultyEnv("raise", at_step=3, probability=0.1, seed=6), 30)
    assert 10 < len(first) < 30
    assert min(at for _, at in first) >= 3
    assert faults_of(faulty.FaultyEnv("raise", at_step=3), 3) == [(0, 3), (1, 3), (2, 3)]


def test_an_environment_that_is_built_anew_or_in_another_slot_does_not_repeat_the_draws_of_the_first():
    def first_fault(reset_seed):
        env = faulty.FaultyEnv("raise", probability=0.05, seed=1, length=1000)
        env.reset(seed=reset_seed)
        for at in range(1, 1000):
            try:
                env.step(action())
            except RuntimeError:
                return at
        return None

    drawn = [first_fault(seed) for seed in range(20)]
    assert len(set(drawn)) > 5, "each episode has draws of its own"
    assert drawn == [first_fault(seed) for seed in range(20)], "which come again with its seed"
    assert len({first_fault(None) for _ in range(20)}) > 5, "without a reset's seed they are drawn anew"


def test_an_action_may_name_the_fault():
    env = faulty.FaultyEnv(commands=True)
    env.reset()
    assert env.action_space.shape == (2,)
    assert env.step(np.array([0.5, 0.0]))[0][4] == 0.5
    with pytest.raises(RuntimeError, match="asked to raise in step 2"):
        env.step(np.array([0.5, faulty.NUMBERS["raise"]]))


def test_neighbouring_seeds_have_tags_of_their_own():
    tags = [faulty.tag(seed) for seed in range(10000)]
    assert len(set(tags)) == 10000
    assert max(tags) < faulty.MOST


@pytest.mark.parametrize("wrong", [{"fault": "hangs"}, {"fault": ["nan", "nam"]}, {"at": "close"}])
def test_a_wrong_name_is_refused_with_the_right_ones(wrong):
    with pytest.raises(ValueError, match=r"there are: abort, close_pipes|a fault is at a step"):
        faulty.FaultyEnv(**wrong)


# ---- on a farm: an interrupted step is no transition ----


@pytest.fixture(scope="module")
def lasting():
    """The address of a farm of two slots, whose workers no test may end."""
    with running_farm("faulty", slots=2) as farm:
        yield farm.address


@pytest.fixture
def own():
    """The address of a farm of two slots for one test alone."""
    with farm_here("faulty", slots=2) as address:
        yield address


class Reader:
    """Reads every row of a pool of two, and proves each against the environment's own counters."""

    def __init__(self, pool):
        self.pool = pool
        self.last = {}  # slot -> the last good observation of its episode
        self.actions = {}
        self.transitions = {0: 0, 1: 0}
        self.lost = {}

    def begin(self, slot, seed, **options):
        poll_until(lambda: slot in self.pool.vacant(), 30.0, f"slot {slot}")
        self.last.pop(slot, None)
        self.lost.pop(slot, None)
        self.seed = seed
        self.pool.reset([slot], [seed], options)
        while slot not in self.last and slot not in self.lost:
            self.read()

    def send(self, slot, value):
        self.actions[slot] = np.float32(value)
        self.pool.send([action(value)], [slot])

    def read(self):
        batch = self.pool.recv(timeout=30.0)
        for at, slot in enumerate(batch.slot):
            obs = batch.obs[at]
            if batch.lost[at]:
                assert batch.truncated[at]
                assert not batch.terminated[at]
                if slot in self.last:
                    np.testing.assert_array_equal(obs, self.last[slot])
                self.lost[slot] = batch.info[at]["lost"]
                continue
            if batch.first[at]:
                assert obs[2] == 0
                assert obs[3] == faulty.tag(batch.info[at]["seed"])
            else:
                who, episode, steps, tag, _ = self.last[slot]
                np.testing.assert_array_equal(obs, [who, episode, steps + 1, tag, self.actions[slot]])
                assert batch.reward[at] == steps + 1
                self.transitions[slot] += 1
            self.last[slot] = obs


WORDS = dict(
    REPORTED,
    segfault="killed by SIGSEGV",
    abort="killed by SIGABRT",
    kill="killed by SIGKILL",
    exit="exited with code 7",
    close_pipes="exited with code 6",
)


@pytest.mark.slow
@pytest.mark.parametrize("fault", REPORTED)
def test_an_invalid_step_is_no_transition_and_disturbs_no_other_slot(lasting, fault):
    one_step_is_lost(lasting, fault, "invalid")


@pytest.mark.slow
@pytest.mark.parametrize("fault", DEADLY)
def test_a_step_that_ended_its_worker_is_no_transition_and_disturbs_no_other_slot(own, fault):
    one_step_is_lost(own, fault, "crashed")


def one_step_is_lost(address, fault, bucket):
    with Farmer("faulty", [(address, 2)]) as pool:
        reader = Reader(pool)
        reader.begin(1, seed=99)
        reader.begin(0, seed=5, fault=fault, at_step=3)
        for value in (0.25, 0.5, 0.75):
            reader.send(0, value)
            reader.send(1, -value)
            while reader.pool.busy:
                reader.read()
        assert any(word in reader.lost[0] for word in WORDS[fault].split("|")), reader.lost[0]
        assert reader.transitions == {0: 2, 1: 3}
        reader.begin(0, seed=6)
        reader.send(0, 1.0)
        reader.read()
        assert reader.transitions == {0: 3, 1: 3}
        (row,) = pool.status()["farms"]
        ledger = row["ledger"]
        assert (ledger["sent"], ledger["done"], ledger[bucket]) == (7, 6, 1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "nan", "exit"])
def test_a_fault_in_reset_is_told_and_the_slot_comes_back(own, fault):
    with Farmer("faulty", [(own, 2)]) as pool:
        reader = Reader(pool)
        reader.begin(0, seed=5, fault=fault, at="reset")
        assert reader.lost
        reader.begin(0, seed=6)
        reader.send(0, 0.5)
        reader.read()
        assert reader.transitions[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["print", "leak", "grandchild"])
def test_what_is_wrong_beside_the_data_is_still_a_transition(own, fault):
    with Farmer("faulty", [(own, 2)]) as pool:
        reader = Reader(pool)
        reader.begin(0, seed=5, fault=fault, at_step=2)
        for value in (0.25, 0.5, 0.75):
            reader.send(0, value)
            reader.read()
        assert reader.transitions[0] == 3


def test_a_constructor_that_begins_to_fail_is_told_and_comes_back(tmp_path):
    flag = tmp_path / "now"
    kwargs = {"fault": "raise", "at": "construct", "only_if": str(flag)}
    with running_farm("faulty", slots=1, kwargs=kwargs) as farm, Farmer("faulty", [(farm.address, 1)]) as pool:
        reader = Reader(pool)
        reader.begin(0, seed=1)
        flag.touch()
        os.kill(farm.workers()[0], signal.SIGKILL)
        reader.send(0, 0.5)
        reader.read()
        assert "SIGKILL" in reader.lost[0]
        reader.begin(0, seed=2)
        assert "asked to raise" in reader.lost[0]
        flag.unlink()
        began = time.monotonic()
        while 0 in reader.lost and time.monotonic() < began + 60:
            reader.begin(0, seed=3)
        reader.send(0, 0.5)
        reader.read()
        assert reader.transitions[0] == 1


def test_the_lines_that_ask_a_farm_for_its_status_are_run_as_they_stand_in_the_documentation(lasting, capsys):
    text = (ROOT / "docs" / "reliability.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code.replace("127.0.0.1:20099", lasting), "reliability.md", "exec"), {})
    rows = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["slot"] for row in rows] == [0, 1]
    for name in ("recycled", "limits", "ledger"):
        assert name in rows[0]
