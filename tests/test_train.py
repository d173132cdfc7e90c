"""train.py as its users meet it: IPython in a terminal, an unattended run in a pipe, and what can be typed wrongly.

.venv/bin/python -m pytest tests/test_train.py
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pexpect
import psutil
import pytest
from farms import running_farm
from helpers import poll_until
from test_folder import holder

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = str(ROOT / "train.py")
PROMPT = r"In \[\d+\]: "
PNG = b"\x89PNG\r\n\x1a\n"


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


class Prompt:
    """IPython on train.py, behind a terminal."""

    def __init__(self, folder: pathlib.Path, *arguments: str):
        line = ["-m", "IPython", "--simple-prompt", "--no-banner", "--colors", "NoColor", "-i", TRAIN, "--"]
        surroundings = dict(os.environ, IPYTHONDIR=str(folder / "ipython"), TERM="dumb")
        self.child = pexpect.spawn(
            sys.executable,
            [*line, *arguments],
            cwd=str(folder),
            env=surroundings,
            timeout=40,
            encoding="utf-8",
            dimensions=(50, 160),
            echo=False,
        )
        self.greeting = self.wait()

    def wait(self, limit: float = 40) -> str:
        """What was said until the next prompt."""
        self.child.expect(PROMPT, timeout=limit)
        return self.child.before

    def type(self, line: str, limit: float = 40) -> str:
        self.child.sendline(line)
        return self.wait(limit)

    def quit(self) -> None:
        self.child.sendline("exit")
        self.child.expect(pexpect.EOF, timeout=40)
        self.child.close()

    def kill(self) -> None:
        self.child.close(force=True)


@pytest.fixture
def prompt(tmp_path):
    opened = []

    def start(*arguments: str) -> Prompt:
        opened.append(Prompt(tmp_path, *arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.kill()


def run(folder: pathlib.Path, *arguments: str, limit: float = 60) -> subprocess.CompletedProcess[str]:
    """`python train.py ...` in a folder, to its end."""
    return subprocess.run(
        [sys.executable, TRAIN, *arguments], cwd=folder, capture_output=True, text=True, timeout=limit, check=False
    )


# At the prompt.


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*forkpty:DeprecationWarning"
)  # pexpect's, where other tests left threads of TensorFlow
def test_a_session_in_ipython_from_the_first_r_to_a_restart(prompt, tmp_path):
    options = ["--env", "Pendulum-v1", "--seed", "1", "--slots", "2", "--out", str(tmp_path / "out")]
    first = prompt(*options)
    assert "starting a local farm" in first.greeting
    for name in ("r(n)", "test(n)", "save()", "load()", "status()", "plot()", "refarm()"):
        assert name in first.greeting

    assert "mean return of the last 3 episodes" in first.type("r(3)")
    workers = {process.pid for process in descendants(first.child.pid)}
    assert len(workers) >= 3  # a farm and two workers

    first.child.sendline("r(1000)")
    await_episodes(tmp_path / "out", 4)
    first.child.sendintr()
    said = first.wait()
    stopped = re.search(r"stopped after (\d+) of 1000 episodes; r\((\d+)\) goes on", said)
    assert stopped, said
    assert int(stopped[1]) + int(stopped[2]) == 1000
    assert "Traceback" not in said

    said = first.type("r(2)")
    assert "stopped" not in said
    assert "mean return" in said
    assert {process.pid for process in descendants(first.child.pid)} == workers, "the same farm and workers go on"
    told = first.type("status()")
    assert "2 of 2 slots, 0 busy" in told
    ledger = re.search(r"(\d+) steps sent: (.*)", told)
    assert int(ledger[1]) == sum(int(number) for number in re.findall(r"\d+", ledger[2]))
    assert "saved to" in first.type("save()")
    first.quit()
    poll_until(lambda: not any(psutil.pid_exists(pid) for pid in workers), 30, "the end of farm and workers")

    second = prompt(*options)
    loaded = re.search(r"(\d+) episodes, \d+ steps, \d+ updates, mean return (-?\d+)", second.type("load()"))
    assert loaded
    assert int(loaded[1]) == 5 + int(stopped[1])
    assert "mean return" in second.type("returns = test(1)")
    assert "1 -" in second.type("print(len(returns), returns[0])")
    assert re.search(r"%s episodes, \d{4,} steps" % loaded[1], second.type("status()"))
    assert "learning curve" in second.type("plot()")
    assert (tmp_path / "out" / "returns.png").read_bytes().startswith(PNG)
    second.quit()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_a_mistake_at_the_prompt_is_told_in_a_line_and_the_session_lives_on(prompt):
    here = prompt("--env", "Pendulum-v1", "--slots", "1")
    for wrong in ("r(0)", "r('x')", "r(True)", "test(-1)", "r(1.5)"):
        said = here.type(wrong)
        assert "how many episodes? A whole number from 1, not" in said
        assert "Traceback" not in said
    said = here.type("load('nowhere')")
    assert "FileNotFoundError: no checkpoint at nowhere" in said
    assert "Traceback" not in said
    assert "the farms stay as they were" not in here.type("refarm()")
    here.type("session.save()")
    # A diverged actor: NaN in every weight.
    here.type("agent.actor.set_weights([w * float('nan') for w in agent.actor.get_weights()])")
    said = here.type("r(2)")
    assert "FloatingPointError" in said
    assert "the training has diverged" in said
    assert "Traceback" not in said
    assert "loaded" in here.type("load()")
    said = here.type("r(1)")
    assert "mean return of the last 1 episodes" in said
    assert "stopped" not in said
    here.quit()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_a_session_that_cannot_start_says_why_and_leaves_a_plain_prompt(prompt, tmp_path):
    (tmp_path / "farmlist.py").write_text("farmlist_base = [(\n")
    here = prompt("--env", "Pendulum-v1")
    assert "FarmlistError: farmlist.py, line 1" in here.greeting
    assert "nothing was started; leave with exit, and correct the line" in here.greeting
    assert "Traceback" not in here.greeting
    here.child.sendintr()  # which no longer means that the start is given up
    here.wait(10)
    here.quit()


@pytest.fixture(scope="module")
def farmed(tmp_path_factory):
    """A folder whose farmlist has one running farm, for sessions that start quickly."""
    folder = tmp_path_factory.mktemp("farmed")
    with running_farm("Pendulum-v1", slots=1) as farm:
        (folder / "farmlist.py").write_text(f"farmlist_base = [({farm.address!r}, 1)]\n")
        yield folder


def await_episodes(out: pathlib.Path, count: int) -> None:
    """Until a training that writes to this folder has played so many, all its runs together."""
    file = out / "metrics.jsonl"
    poll_until(lambda: file.exists() and file.read_text().count('"kind": "episode"') >= count, 100, "episodes")


def saves_in(folder: pathlib.Path) -> list[pathlib.Path]:
    return list((folder / "runs/Pendulum-v1/checkpoint").glob("save-*"))


@pytest.fixture
def at_farm(prompt, farmed, tmp_path):
    """`prompt` with that farm."""
    (tmp_path / "farmlist.py").write_bytes((farmed / "farmlist.py").read_bytes())
    return lambda *arguments: prompt("--env", "Pendulum-v1", *arguments)


def end_of(child: pexpect.spawn) -> int:
    """The exit code of a child that ends by itself; what it says is read and dropped."""
    poll_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, 30, "its end")
    child.wait()
    return child.exitstatus


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("training", [True, False], ids=["in r", "idle"])
def test_a_signal_at_the_prompt_saves_and_ends(at_farm, tmp_path, number, training):
    here = at_farm()
    assert "mean return" in here.type("r(1)")
    assert not saves_in(tmp_path)
    if training:
        here.child.sendline("r(1000)")
        await_episodes(tmp_path / "runs/Pendulum-v1", 2)
    if number == signal.SIGHUP:  # as when the terminal is closed: nothing can be printed any more
        here.child.ptyproc.fileobj.close()
    else:
        here.child.kill(number)
        here.child.expect("ended by SIGTERM; what was trained since the last save is saved first")
    assert end_of(here.child) == 128 + number
    assert len(saves_in(tmp_path)) == 1
    (save,) = saves_in(tmp_path)
    assert (save / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_exit_saves_what_was_trained_and_only_that(at_farm, tmp_path):
    here = at_farm()
    here.type("r(1)")
    here.child.sendline("exit")
    here.child.expect("saving what was trained since the last save.*saved to", timeout=40)
    here.child.expect(pexpect.EOF)
    here.child.close()
    assert len(saves_in(tmp_path)) == 1
    again = at_farm("--resume")
    again.type("r(1)")
    again.type("save()")
    again.quit()
    assert "saving what" not in again.child.before
    assert len(saves_in(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_ctrl_c_in_save_and_many_in_r_are_told_in_a_line(at_farm, tmp_path):
    here = at_farm()
    here.type("r(1)")
    here.type("import os, time; os.fsync = lambda fd: (print('writ' + 'ing'), time.sleep(2))")  # a slow disk
    here.child.sendline("save()")
    here.child.expect("writing")
    here.child.sendintr()
    said = here.wait()
    assert "save() was interrupted; the saves before it are as they were" in said
    assert "Traceback" not in said
    here.child.sendline("r(1000)")
    await_episodes(tmp_path / "runs/Pendulum-v1", 2)
    for _ in range(6):
        here.child.sendintr()
        time.sleep(0.01)
    said = here.wait()
    time.sleep(0.5)
    here.child.sendline("print('on', 'again')")
    here.child.expect("on again")  # a late Ctrl-C may have given prompts of its own
    here.wait()
    assert re.search(r"stopped after \d+ of 1000 episodes", said)
    assert "Traceback" not in said
    here.type("import importlib; importlib.reload(os)")
    assert "saved to" in here.type("save()")
    assert "loaded" in here.type("load()")
    here.quit()


# Unattended.


@pytest.mark.slow
def test_an_unattended_run_trains_saves_draws_and_leaves_nothing(tmp_path):
    done = run(tmp_path, "--env", "Pendulum-v1", "--episodes", "4", "--slots", "2")
    assert done.returncode == 0, done.stderr
    assert "no farmlist.py here: starting a local farm" in done.stdout
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("episode 4/4  return")], done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout
    out = tmp_path / "runs" / "Pendulum-v1"
    for name in ("returns.png", "metrics.png"):
        assert (out / name).read_bytes().startswith(PNG)
    save = max((out / "checkpoint").glob("save-*"))
    assert {path.name for path in save.iterdir()} == {"manifest.json", "arrays.npz"}

    again = run(tmp_path, "--env", "Pendulum-v1", "--episodes", "1", "--slots", "1", "--resume")
    assert again.returncode == 0, again.stderr
    assert "4 episodes, 800 steps" in again.stdout


@pytest.mark.slow
def test_a_farmlist_with_two_farms_uses_both(tmp_path):
    with running_farm("Pendulum-v1", slots=1) as one, running_farm("Pendulum-v1", slots=2) as two:
        a, b = one.address, two.address
        (tmp_path / "farmlist.py").write_text(f"farmlist_base = [({a!r}, 1), ({b!r}, 2)]\n")
        done = run(tmp_path, "--env", "Pendulum-v1", "--episodes", "9")
    assert done.returncode == 0, done.stderr
    assert "local farm" not in done.stdout
    out = tmp_path / "runs" / "Pendulum-v1" / "checkpoint"
    text = (max(out.glob("save-*")) / "manifest.json").read_text()
    assert text.count(a) >= 1
    assert text.count(b) >= 2
    assert text.count(a) + text.count(b) == 9


@pytest.mark.slow
def test_after_kill_9_of_train_py_its_local_farm_and_workers_end(tmp_path):
    with open(tmp_path / "said", "w") as log:
        line = [sys.executable, TRAIN, "--env", "Pendulum-v1", "--episodes", "10000", "--slots", "2"]
        process = subprocess.Popen(line, cwd=tmp_path, stdout=log, stderr=log)
    try:
        poll_until(lambda: len(descendants(process.pid)) >= 3, 40, "farm and workers")
        await_episodes(tmp_path / "runs/Pendulum-v1", 2)
        workers = descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    assert len(workers) >= 3
    poll_until(lambda: not any(one.is_running() for one in workers), 30, "the end of farm and workers")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "before", "code"),
    [
        (signal.SIGINT, signal.SIG_DFL, 130),
        (signal.SIGTERM, signal.SIG_IGN, 143),
        (signal.SIGHUP, signal.SIG_DFL, 129),
    ],
    ids=["Ctrl-C", "SIGTERM where a shell has had Ctrl-C ignored", "SIGHUP"],
)
def test_a_signal_that_ends_an_unattended_run_has_it_saved_and_gives_the_exit_code(tmp_path, number, before, code):
    with open(tmp_path / "said", "w") as log:
        line = [sys.executable, TRAIN, "--env", "Pendulum-v1", "--episodes", "10000", "--slots", "2"]
        process = subprocess.Popen(
            line, cwd=tmp_path, stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, before)
        )
    try:
        await_episodes(tmp_path / "runs/Pendulum-v1", 2)
        process.send_signal(number)
        assert process.wait(40) == code
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "said").read_text()
    assert "stopped after" in said
    assert "saved to" in said
    assert "Traceback" not in said
    assert ("stopping, and saving what was learnt; a second Ctrl-C ends at once" in said) == (number == signal.SIGINT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_an_unattended_run_whose_terminal_is_closed_saves(farmed, tmp_path):
    (tmp_path / "farmlist.py").write_bytes((farmed / "farmlist.py").read_bytes())
    line = [TRAIN, "--env", "Pendulum-v1", "--episodes", "10000"]
    child = pexpect.spawn(sys.executable, line, cwd=str(tmp_path), timeout=40, encoding="utf-8")
    try:
        child.expect("steps/s")
        time.sleep(1)
        child.ptyproc.fileobj.close()
        assert end_of(child) == 129
    finally:
        if psutil.pid_exists(child.pid):
            os.kill(child.pid, signal.SIGKILL)
    assert len(saves_in(tmp_path)) == 1


@pytest.mark.slow
def test_a_second_ctrl_c_ends_an_unattended_run_at_once_and_nohup_counts():
    code = """
import time
from session.ending import Unattended
with Unattended() as ended:
    ended.saving = True
    print("here", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    with process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGHUP)
        for pause in (0.05, 1.5):  # the first two are one
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=40)[1]
    assert process.returncode == 130
    assert said.count("a second Ctrl-C ends at once") == 1
    assert said.endswith("train.py: ended without a save\n")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "module"), [("train.py", "tensorflow"), ("farm.py", "Pyro4")])
def test_ctrl_c_during_the_imports_is_one_line_and_code_130(tmp_path, script, module):
    (tmp_path / (module + ".py")).write_text(
        "import time\nopen('here', 'w').close()\ntime.sleep(60)\n"
    )  # takes its time
    arguments = ["--env", "Pendulum-v1"] if script == "train.py" else ["Pendulum-v1", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        poll_until((tmp_path / "here").exists, 30, "the import")
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=40)[1]
    assert (process.returncode, said) == (130, script + ": interrupted\n")


# What can be wrong before it starts. Real processes where the exit code is the point, `main` itself for the others.


@pytest.mark.slow
def test_a_wrong_farmlist_ends_the_process_with_code_2_and_names_file_and_line(tmp_path):
    (tmp_path / "farmlist.py").write_text("farmlist_base = [\n    ('127.0.0.1' 4),\n]\n")
    done = run(tmp_path, "--env", "Pendulum-v1", "--episodes", "1")
    assert done.returncode == 2
    assert "FarmlistError: farmlist.py, line 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "runs/Pendulum-v1").iterdir()] == ["lock"]  # no farm was started


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """`main(*arguments)` in an empty folder: (exit code, what was said on stderr); stdout is in `main.shown`."""
    import train

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        code = train.main(list(arguments))
        call.shown, said = capsys.readouterr()
        return code, said

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("farmlist", "arguments", "told"),
    [
        ("farmlist_base = [('127.0.0.1:1', 1)]", [], "now: start one there: python farm.py Pendulum-v1 --port 1\n"),
        ("farms = []", [], "farmlist.py does not define farmlist_base"),
        ("", ["--key-file", "none"], "there is no key file none"),
        ("", ["--resume"], "no checkpoint at runs/Pendulum-v1/checkpoint, so there is nothing for --resume"),
    ],
    ids=["dead address", "farmlist", "key", "resume"],
)
def test_what_is_wrong_is_told_before_tensorflow_is_imported(tmp_path, farmlist, arguments, told):
    (tmp_path / "farmlist.py").write_text(farmlist)
    (tmp_path / "tensorflow.py").write_text("open('imported', 'w').close()\n")
    (tmp_path / "runs/Pendulum-v1/checkpoint").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, TRAIN, "--env", "Pendulum-v1", *arguments],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "imported").exists()


def test_a_missing_farmlist_is_named(main):
    code, said = main("--env", "Pendulum-v1", "--farmlist", "mine.py")
    assert code == 2
    assert "no farmlist at mine.py" in said
    assert "copy farmlist.example.py" in said


def test_an_unreachable_farm_is_named_with_what_to_start(main, tmp_path):
    (tmp_path / "farmlist.py").write_text("farmlist_base = [('127.0.0.1:9', 1)]\n")
    code, said = main("--env", "Pendulum-v1")
    assert code == 2
    assert "FarmUnreachable: no farm answered at 127.0.0.1:9" in said
    assert "python farm.py Pendulum-v1" in said


def test_an_unknown_agent_is_refused_before_a_farm_is_started(main, tmp_path):
    code, said = main("--env", "Pendulum-v1", "--agent", "dqn")
    assert code == 2
    assert "no agent 'dqn'" in said
    assert "there are: ddpg" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_environment_that_no_farm_offers_is_refused_with_what_there_is(main, tmp_path):
    with running_farm("Pendulum-v1", slots=1) as farm:
        (tmp_path / "farmlist.py").write_text(f"farmlist_base = [({farm.address!r}, 1)]\n")
        code, said = main("--env", "Pendulum-v0")
    assert code == 2
    assert "does not offer 'Pendulum-v0', but Pendulum-v1" in said


@pytest.mark.slow
def test_more_slots_than_a_farm_offers_are_refused(main, tmp_path):
    with running_farm("Pendulum-v1", slots=1) as farm:
        (tmp_path / "farmlist.py").write_text(f"farmlist_base = [({farm.address!r}, 3)]\n")
        code, said = main("--env", "Pendulum-v1")
    assert code == 2
    assert "wants 3 slots" in said
    assert "offers 1" in said


@pytest.mark.slow
def test_discrete_actions_are_refused_in_words_and_the_local_farm_ends(main):
    code, said = main("--env", "CartPole-v1", "--slots", "1")
    assert code == 2
    assert "DDPG wants a bounded Box of actions, and this environment has Discrete(2)" in said


@pytest.mark.slow
def test_an_environment_that_does_not_exist_is_told_in_the_farms_words(main):
    code, said = main("--env", "Pendulumm-v1", "--slots", "1")
    assert code == 2
    assert "the local farm did not start" in said
    assert "Pendulum" in said.partition("did not start")[2]


def test_a_python_that_does_not_start_is_told(main):
    code, said = main("--env", "Pendulum-v1", "--slots", "1", "--python", "/nowhere/python")
    assert code == 2
    assert "/nowhere/python does not start" in said


def test_resume_without_a_checkpoint_is_refused(main):
    code, said = main("--env", "Pendulum-v1", "--slots", "1", "--resume")
    assert code == 2
    assert "no checkpoint at" in said


@pytest.mark.parametrize(
    ("option", "wrong", "told"),
    [
        ("--slots", "0", "--slots must be 1 or more, not 0"),
        ("--slots", "-1", "--slots must be 1 or more, not -1"),
        ("--episodes", "-5", "--episodes must be 0 or more, not -5"),
        ("--seed", "-1", "--seed must be 0 or more, not -1"),
        ("--keep", "0", "--keep must be 1 or more, not 0"),
        ("--action-repetition", "0", "--action-repetition must be 1 or more, not 0"),
        ("--autosave", "nan", "--autosave must be 0 (never) or minutes"),
    ],
)
def test_a_number_out_of_its_range_is_refused_before_anything_is_done(main, tmp_path, option, wrong, told):
    code, said = main("--env", "Pendulum-v1", option, wrong)
    assert code == 2
    assert told in said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_a_farm_is_started(main, tmp_path):
    (tmp_path / "file").write_text("of somebody")
    for out in ("file", "/proc/nowhere"):
        code, said = main("--env", "Pendulum-v1", "--out", out)
        assert code == 2
        assert "cannot write to the folder of this training, %s: " % out in said
        assert "now: name another with --out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not main.shown


def test_a_folder_that_another_training_has_is_refused(main, tmp_path):
    with holder(tmp_path / "runs/Pendulum-v1") as other:
        code, said = main("--env", "Pendulum-v1")
        assert code == 2
        assert "another training (process %d) has the folder runs/Pendulum-v1" % other.pid in said
        assert not main.shown
        other.kill()
        other.wait()
        assert "no farmlist at" in main("--env", "Pendulum-v1", "--farmlist", "mine.py")[1]
    assert "no farmlist at" in main("--env", "Pendulum-v1", "--farmlist", "mine.py")[1], "a failed start frees it"


def test_a_training_that_begins_anew_where_saves_are_says_so_at_its_start(main, tmp_path):
    for number in (4, 5):
        (tmp_path / ("runs/Pendulum-v1/checkpoint/save-%06d" % number)).mkdir(parents=True)
    assert main("--env", "Pendulum-v1", "--farmlist", "mine.py")[0] == 2
    assert not main.shown, "nothing was started, so nothing begins anew"
    assert main("--env", "Pendulum-v1", "--slots", "1", "--episodes", "1")[0] == 0
    assert "runs/Pendulum-v1 holds an earlier training: 2 saves, the newest save-000005\n" in main.shown
    assert "its saves replace those, 3 stay; metrics.jsonl goes on" in main.shown
    assert "now: --resume (or load() at the prompt) goes on with it, another --out leaves it alone" in main.shown
    assert main("--env", "Pendulum-v1", "--slots", "1", "--episodes", "1", "--resume")[0] == 0
    assert "holds an earlier" not in main.shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "saved"), [("checkpoint", False), ("returns.png", True), ("metrics.jsonl", True)], ids=lambda x: str(x)
)
def test_what_cannot_be_written_is_told_in_words_with_code_1(main, tmp_path, name, saved):
    out = tmp_path / "runs/Pendulum-v1"
    if name == "checkpoint":
        out.mkdir(parents=True)
        (out / name).write_text("a file where the saves should go")
    else:
        (out / name).mkdir(parents=True)
    code, said = main("--env", "Pendulum-v1", "--slots", "1", "--episodes", "1")
    assert code == 1
    assert re.search(r"train.py: \w+Error: .*%s" % name, said)
    assert saved == bool(list(out.glob("checkpoint/save-*")))


def kill_local_farm(folder: pathlib.Path) -> threading.Thread:
    """Kills the local farm of this process once it has played an episode of the training in `folder`."""

    def kill():
        await_episodes(folder / "runs/Pendulum-v1", 1)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # one that has ended
                if "--until-eof" in child.cmdline():
                    child.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_local_farm_that_dies_is_started_again_and_the_training_goes_on(main, tmp_path):
    thread = kill_local_farm(tmp_path)
    assert main("--env", "Pendulum-v1", "--slots", "1", "--episodes", "20")[0] == 0
    thread.join(30)
    assert not thread.is_alive(), "it was not killed"
    assert "the local farm ended (code -9)" in main.shown


@pytest.mark.slow
def test_a_local_farm_that_dies_over_and_over_ends_the_training_with_words_and_code_1(main, tmp_path, monkeypatch):
    monkeypatch.setattr("session.local_farm.RESTARTS", 0)
    kill_local_farm(tmp_path)
    code, said = main("--env", "Pendulum-v1", "--slots", "1", "--episodes", "10000")
    assert code == 1
    assert "the local farm ended (code -9), see runs/Pendulum-v1/farm.log" in said
    assert list((tmp_path / "runs/Pendulum-v1/checkpoint").glob("save-*")), "what was learnt is saved"


def test_a_wrong_option_ends_with_code_2(capsys):
    import train

    with pytest.raises(SystemExit) as ended:
        train.main(["--env", "Pendulum-v1", "--slotz", "2"])
    assert ended.value.code == 2
    assert "--slotz" in "".join(capsys.readouterr())
