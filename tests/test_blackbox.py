"""Black boxes: what a farm keeps of an episode that ended badly, and playing it again."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import zipfile

import interpreters
import numpy as np
import pytest
from farms import START_LIMIT, running_farm
from helpers import poll_until

from farmer import Farmer
from farmhand import blackbox, replay
from farmhand.catalog import Catalog
from farmhand.limits import Limits
from farmhand.supervisor import Supervisor
from wire import codec, protocol
from wire.errors import BlackBoxError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def lose_a_step(pool, steps=3, seed=17, **options):
    """Plays slot 0 until its episode is lost; returns what the host was told."""
    poll_until(lambda: 0 in pool.vacant(), 30.0, "slot 0")
    pool.reset([0], [seed], options)
    batch = pool.recv(timeout=30.0)
    for at in range(steps):
        if batch.lost[0]:
            break
        pool.send(np.full((1, 1), at / 8, "float32"), [0])
        batch = pool.recv(timeout=30.0)
    assert batch.lost[0]
    return batch.info[0]["lost"]


def box_named_in(text):
    """The file that a text of the farm names, once it is written."""
    (line,) = [line for line in text.splitlines() if "black box, on the farm: " in line]
    path = pathlib.Path(line.partition(": ")[2])
    poll_until(path.exists, 30, str(path))
    return path


def play(path, *arguments, limit=100):
    """`python -m farmhand.replay` as a user types it: (exit code, what it printed)."""
    command = [sys.executable, "-m", "farmhand.replay", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def supervised(folder, limits=None, **kwargs):
    """A farm of one slot without its network, over real workers."""
    supervisor = Supervisor(Catalog(["faulty"], kwargs, str(ROOT / "tests")), 1, sys.executable, folder, limits)
    try:
        supervisor.start(START_LIMIT)
        yield supervisor
    finally:
        supervisor.stop("the test is over")


class Holder:
    """Holds all slots of a supervisor, and gives slot 0 its commands."""

    def __init__(self, supervisor):
        self.supervisor = supervisor
        poll_until(lambda: supervisor.describe()["free"], 30, "a free slot")
        self.token = supervisor.acquire("faulty", 1, protocol.VERSION, expires=False).token
        self.seq = 0
        self.came = []

    def send(self, kind, body):
        self.seq += 1
        self.came = self.supervisor.exchange(self.token, [[0, self.seq, kind, codec.encode(body)]], 0.0)

    def receive(self):
        """(kind, value) of the next reply."""
        (reply,) = poll_until(lambda: self.came or self.supervisor.exchange(self.token, [], 2.0), 30, "a reply")
        _, seq, kind, _, body = reply
        assert seq == self.seq
        return kind, codec.decode(body)

    def ask(self, kind, body):
        self.send(kind, body)
        return self.receive()

    def reset(self, seed, **options):
        return self.ask(protocol.RESET, {"seed": seed, "options": options})

    def step(self, value=0.5):
        return self.ask(protocol.STEP, {"action": np.array([value], "float32"), "repeat": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says", "ended"),
    [
        ("segfault", "killed by SIGSEGV", "killed by SIGSEGV in step 3"),
        ("exit", "exited with code 7", "exit code 7 in step 3"),
        ("nan", "observation[2] is nan", "a fault, InvalidObservation in step 3"),
        ("raise", "asked to raise in step 3", "a fault, RuntimeError in step 3"),
    ],
)
def test_a_bad_end_is_told_with_its_black_box_and_comes_again(tmp_path, fault, says, ended):
    with (
        running_farm("faulty", slots=1, log_dir=tmp_path / "logs", kwargs={"who": 7}) as farm,
        Farmer("faulty", [(farm.address, 1)]) as pool,
    ):
        text = lose_a_step(pool, fault=fault, at_step=3)
        path = box_named_in(text)
        assert says in text
    assert path.parent == tmp_path / "logs" / "black-box"
    box = blackbox.load(path)
    about = box.about
    assert about["how"] == ("invalid" if fault in ("nan", "raise") else "crashed")
    assert (about["env"], about["slot"], about["seed"], about["step"]) == ("faulty", 0, 17, 3)
    assert about["options"] == {"fault": fault, "at_step": 3}
    assert about["order"]["kwargs"] == {"who": 7}
    assert (about["worker"]["numpy"], about["worker"]["api"]) == (np.__version__, "plain")
    assert (about["python"], about["under_way"], about["steps_lost"]) == (sys.executable, True, 0)
    actions = [codec.decode(frame[protocol.HEADER.size :])["action"] for frame in box.steps]
    np.testing.assert_array_equal(actions, [[0.0], [0.125], [0.25]])
    if fault == "segfault":
        assert "Fatal Python error" in box.log
        assert "_segfault" in box.log
    code, said = play(path)
    assert (code, f"the same end: {ended}" in said) == (0, True), said
    code, said = play(path, "--to", "2")
    assert (code, "step 2 was reached" in said) == (0, True), said
    assert "'step': 2" in said
    assert play(path, "--to", "4")[0] == 2


def test_what_comes_out_otherwise_is_another_end(tmp_path):
    flag = tmp_path / "flag"
    flag.touch()
    kwargs = {"fault": "exit", "at_step": 2, "only_if": str(flag)}
    with supervised(tmp_path, **kwargs) as supervisor:
        holder = Holder(supervisor)
        holder.reset(1)
        holder.step()
        kind, lost = holder.step()
        assert kind == protocol.LOST
        path = box_named_in(lost["text"])
    flag.unlink()
    code, said = play(path)
    assert (code, "it went well to the last step; in the farm it was exit code 7 in step 2" in said) == (1, True), said


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang_in_c", "hang_with_gil", "spin", "stop"])
def test_a_hang_is_told_with_where_it_hangs_and_comes_again(tmp_path, fault):
    with supervised(tmp_path, Limits(step=2.0), fault=fault, at_step=2) as supervisor:
        holder = Holder(supervisor)
        holder.reset(1)
        holder.step()
        kind, lost = holder.step()
        assert (kind, lost["bucket"]) == (protocol.LOST, "timed out")
        path = box_named_in(lost["text"])
    box = blackbox.load(path)
    assert (box.about["how"], box.about["step"], box.about["under_way"]) == ("timed out", 2, True)
    if fault != "stop":
        assert f"in _{fault}" in box.log, "where it hangs"
    code, said = play(path, "--timeout", "2")
    assert (code, "the same end: no answer in step 2" in said) == (0, True), said
    if fault != "stop":
        assert f"in _{fault}" in said


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.7", "3.13"])
def test_a_box_is_played_in_the_interpreter_it_names_or_in_another(tmp_path, version):
    python = interpreters.python_with_numpy(version)
    with (
        running_farm("faulty", slots=1, log_dir=tmp_path, python=python) as farm,
        Farmer("faulty", [(farm.address, 1)]) as pool,
    ):
        path = box_named_in(lose_a_step(pool, fault="segfault", at_step=2))
    code, said = play(path)
    assert (code, f"Python {version}" in said) == (0, True), said
    assert "in the farm it was" not in said
    code, said = play(path, "--python", sys.executable)
    assert (code, f"in the farm it was Python {version}" in said) == (0, True), said
    code, said = play(path, "--python", str(tmp_path / "none"))
    assert (code, "does not start" in said) == (2, True), said


def test_a_constructor_that_fails_again_and_again_writes_one_box(tmp_path):
    flag = tmp_path / "flag"
    with supervised(tmp_path, fault="raise", at="construct", only_if=str(flag)) as supervisor:
        flag.touch()
        os.kill(supervisor.status()[0]["pid"], signal.SIGKILL)
        poll_until(lambda: supervisor.slots[0].failures >= 2, 30, "two failures")
        boxes = sorted((tmp_path / "black-box").glob("*.zip"))
        assert [blackbox.load(path).about["state"] for path in boxes] == ["idle", "starting"]
    killed, failed = (blackbox.load(path) for path in boxes)
    assert (killed.about["signal"], killed.reset) == (signal.SIGKILL, None)
    assert "asked to raise" in failed.about["why"]
    code, said = play(boxes[1])
    assert (code, "the same end: a fault, RuntimeError in the construction" in said) == (0, True), said
    flag.unlink()
    assert play(boxes[1])[0] == 1


@pytest.mark.slow
def test_what_cannot_be_built_here_cannot_be_played(tmp_path):
    with supervised(tmp_path) as supervisor:
        holder = Holder(supervisor)
        holder.reset(1, fault="exit")
        path = box_named_in(holder.step()[1]["text"])
    box = blackbox.load(path)
    order = dict(box.order, env={"kind": "factory", "module": "gone", "factory": "make"}, name="gone:make")
    rewrite(path, commands=[protocol.pack(protocol.CONSTRUCT, 0, codec.encode(order)), box.reset, *box.steps])
    code, said = play(path)
    assert (code, "the environment cannot be built here: a fault, NoSuchEnvironment" in said) == (2, True), said


def test_a_callers_mistake_writes_no_box(tmp_path):
    with supervised(tmp_path) as supervisor:
        holder = Holder(supervisor)
        holder.reset(1)
        kind, fault = holder.step(9.0)
        assert (kind, fault["type"]) == (protocol.FAULT, "InvalidAction")
        assert "black box" not in fault["text"]
        holder.reset(2)
        assert holder.step()[0] == protocol.TRANSITION
    assert not (tmp_path / "black-box").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["nan", "exit"])
def test_the_box_is_that_of_the_episode_that_failed_though_the_next_holder_has_reset(tmp_path, fault):
    """A holder leaves in the middle of a step; the next one resets, and only then the step ends badly."""
    flag = tmp_path / "flag"
    flag.touch()
    with supervised(tmp_path, takes=1.5, only_if=str(flag)) as supervisor:
        first = Holder(supervisor)
        first.reset(111, fault=fault, at_step=1)
        first.send(protocol.STEP, {"action": np.zeros(1, "float32"), "repeat": 1})
        supervisor.release(first.token)
        second = Holder(supervisor)
        kind, _ = second.reset(222)
        if fault == "exit":
            assert kind == protocol.LOST, "the reset went down with the worker"
            second.reset(222)
        assert second.step()[0] == protocol.TRANSITION
        (path,) = poll_until(lambda: list((tmp_path / "black-box").glob("*.zip")), 30, "the box")
        box = blackbox.load(path)
        assert (box.about["seed"], len(box.steps)) == (111, 1)
        second.reset(333, fault="raise", at_step=1)
        box = blackbox.load(box_named_in(second.step()[1]["text"]))
        assert (box.about["seed"], len(box.steps)) == (333, 1)


def test_a_release_by_hand_writes_no_box_and_leaves_no_trace_in_the_next_one(tmp_path):
    with supervised(tmp_path, takes=5.0) as supervisor:
        holder = Holder(supervisor)
        holder.reset(111)
        holder.send(protocol.STEP, {"action": np.zeros(1, "float32"), "repeat": 1})
        supervisor.release_by_hand(0)
        assert "black box" not in holder.receive()[1]["text"]
        text = holder.reset(222, fault="exit", at="reset")[1]["text"]
        box = blackbox.load(box_named_in(text))
        assert (box.about["seed"], box.about["step"]) == (222, 0)
        assert len(list((tmp_path / "black-box").iterdir())) == 1


def test_a_long_episode_loses_its_head_and_says_so(tmp_path):
    with supervised(tmp_path) as supervisor:
        supervisor.recorder.most_bytes = 3000
        holder = Holder(supervisor)
        holder.reset(1, fault="exit", at_step=60)
        for _ in range(59):
            holder.step()
        path = box_named_in(holder.step()[1]["text"])
    box = blackbox.load(path)
    assert box.about["step"] == 60
    assert 5 < len(box.steps) < 40
    assert box.about["steps_lost"] == 60 - len(box.steps)
    assert sum(len(frame) + blackbox.OVERHEAD for frame in box.steps) <= 3000
    code, said = play(path)
    assert (code, f"lacks the first {box.about['steps_lost']} of its 60 steps" in said) == (2, True), said


def test_only_the_newest_files_stay(tmp_path):
    with supervised(tmp_path) as supervisor:
        supervisor.recorder.keep = 3
        holder = Holder(supervisor)
        boxes = []
        for seed in range(5):
            holder.reset(seed, fault="raise")
            boxes.append(box_named_in(holder.step()[1]["text"]))
        poll_until(lambda: not boxes[1].exists(), 30, "the removal")
        assert sorted((tmp_path / "black-box").iterdir()) == boxes[2:]


def test_a_folder_that_cannot_be_written_costs_a_line_in_the_log_and_nothing_else(tmp_path, caplog):
    (tmp_path / "black-box").write_text("a file is in the way")
    with supervised(tmp_path) as supervisor:
        holder = Holder(supervisor)
        for seed in range(2):
            holder.reset(seed, fault="raise")
            assert holder.step()[0] == protocol.FAULT
        holder.reset(3)
        assert holder.step()[0] == protocol.TRANSITION
        poll_until(lambda: "cannot be written" in caplog.text, 30, "the line")


def test_no_step_waits_for_a_slow_disk(tmp_path, monkeypatch):
    with supervised(tmp_path) as supervisor:
        holder = Holder(supervisor)
        folder = tmp_path / "black-box"
        with slow_disk(monkeypatch):
            holder.reset(1, fault="raise")
            assert holder.step()[0] == protocol.FAULT
            holder.reset(2)
            began = time.monotonic()
            assert holder.step()[0] == protocol.TRANSITION
            assert time.monotonic() - began < 30.0
            assert not list(folder.glob("*.zip"))
        poll_until(lambda: list(folder.glob("*.zip")), 30, "the box")


@contextlib.contextmanager
def slow_disk(monkeypatch):
    """Holds the writer up before its next file, for as long as the block lasts."""
    gate, write = threading.Event(), blackbox.write_zip
    monkeypatch.setattr(blackbox, "write_zip", lambda *item: gate.wait(60.0) and write(*item))
    try:
        yield
    finally:
        gate.set()


@pytest.mark.slow
def test_the_folder_is_the_one_of_the_command_line(tmp_path):
    folder = tmp_path / "boxes"
    with (
        running_farm("faulty", slots=1, extra=["--black-box", str(folder), "--check-bounds", "off"]) as farm,
        Farmer("faulty", [(farm.address, 1)]) as pool,
    ):
        assert box_named_in(lose_a_step(pool, fault="nan")).parent == folder
        poll_until(pool.vacant, 30, "the slot")
        pool.reset([0], options={"fault": "out_of_bounds"})
        pool.recv()
        pool.send(np.full((1, 1), 7.0, "float32"), [0])
        assert not pool.recv().lost[0], "neither the action nor the observation is in bounds, and nobody asks"
    (tmp_path / "file").touch()
    command = [sys.executable, str(ROOT / "farm.py"), "faulty", "--port", "0", "--black-box", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "cannot make the folder for black boxes" in done.stderr


# ---- files that are not whole ----


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a whole box."""
    folder = tmp_path_factory.mktemp("good")
    with supervised(folder) as supervisor:
        holder = Holder(supervisor)
        holder.reset(1, fault="raise", at_step=2)
        holder.step()
        path = box_named_in(holder.step()[1]["text"])
        return path.read_bytes()


def rewrite(path, about=None, commands=None, without=None):
    """Changes parts of a box."""
    with zipfile.ZipFile(path) as box:
        parts = {name: box.read(name) for name in box.namelist()}
    if about is not None:
        parts["about.json"] = json.dumps(dict(json.loads(parts["about.json"]), **about)).encode()
    if commands is not None:
        parts["commands.bin"] = b"".join(commands)
    parts.pop(without, None)
    with zipfile.ZipFile(path, "w") as box:
        for name, data in parts.items():
            box.writestr(name, data)


RESET = protocol.pack(protocol.RESET, 1, codec.encode({}))
DAMAGES = {
    "no file": (lambda path: path.unlink(), "cannot be read: No such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
    "no zip": (lambda path: path.write_bytes(b"hello"), "no black box, or a damaged one: File is not a zip file"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:600]), "no black box, or a damaged one"),
    "a part is missing": (lambda path: rewrite(path, without="log.txt"), "There is no item named 'log.txt'"),
    "another format": (lambda path: rewrite(path, about={"format": 2}), "format 2, and this program knows up to 1"),
    "no format": (lambda path: rewrite(path, about={"format": None}), "does not say which format"),
    "a wrong entry": (lambda path: rewrite(path, about={"step": "two"}), "its about.json lacks or garbles step"),
    "no commands": (lambda path: rewrite(path, commands=[]), "is damaged: its commands are"),
    "a half command": (lambda path: rewrite(path, commands=[RESET[:-2]]), "is damaged: its commands are"),
    "another order": (lambda path: rewrite(path, commands=[RESET]), "its commands are reset, and not construct, reset"),
    "no frames": (lambda path: rewrite(path, commands=[b"x" * 99]), "its commands are not a frame"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_whole_is_refused_with_the_reason(good, tmp_path, capsys, damage):
    path = tmp_path / "box.zip"
    path.write_bytes(good)
    assert len(blackbox.load(path).steps) == 2
    spoil, words = DAMAGES[damage]
    spoil(path)
    with pytest.raises(BlackBoxError) as caught:
        blackbox.load(path)
    assert words in str(caught.value)
    assert replay.main([str(path)]) == 2
    assert words in capsys.readouterr().err


def test_a_flipped_byte_anywhere_is_found_or_harmless(good, tmp_path):
    path = tmp_path / "box.zip"
    whole = tmp_path / "whole.zip"
    whole.write_bytes(good)
    steps = blackbox.load(whole).steps
    refused = 0
    for at in range(0, len(good), 5):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            assert blackbox.load(path).steps == steps
        except BlackBoxError:
            refused += 1
    assert refused > 0.5 * len(good) / 5
