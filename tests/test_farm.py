"""farm.py as its user meets it: the command line, its start, its end, and the workers under it."""

import contextlib
import importlib.util
import os
import signal
import socket
import stat
import subprocess
import sys
import time

import psutil
import pytest
from farms import ROOT, STOP_LIMIT, TESTS, FarmProcess, farm_command, is_gone, running_farm, workers_of
from helpers import poll_until

from farmer import Farmer, load_farmlist

COUNTING = "environments:CountingEnv"
SLOW = "environments:SlowEnv"
STOPS = (signal.SIGINT, signal.SIGTERM)


def refused(tmp_path, *args, limit=60.0):
    """Runs farm.py with arguments that it must refuse; returns what it said, without a trace of Python."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "farm.py"), *args, "--log-dir", str(tmp_path / "logs")],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=limit,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == "", "nothing is offered"
    return done.stderr


def refused_in(folder, env, *args):
    """As `refused`, with the working directory in `folder`."""
    farm = FarmProcess([*farm_command(env), "--log-dir", str(folder / "logs"), *args], folder, cwd=folder)
    assert farm.process.wait(60) == 2, farm.log()
    return farm.log()


def script(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@contextlib.contextmanager
def busy_slot(farm, env, seconds):
    """A host whose slot 0 is in a long step."""
    with Farmer(env, [(farm.address, 1)]) as farmer:
        farmer.reset([0])
        farmer.recv()
        farmer.send([[seconds]], [0])
        poll_until(lambda: farm.status()[0]["state"] == "stepping", 30, "the step")
        yield farmer


# Bad input: exit code 2, what is wrong, what to do, and (by the fixture of conftest) no process left.


@pytest.mark.slow
def test_an_unknown_environment_is_refused_with_close_names(tmp_path):
    text = refused(tmp_path, "Pendulum-v11", "--port", "0")
    assert "Pendulum-v11" in text
    assert "Pendulum-v1" in text.replace("Pendulum-v11", "")
    assert "Traceback" not in text


def test_an_unknown_recipe_is_refused_with_those_there_are(tmp_path):
    text = refused(tmp_path, "osim:L2M2018", "--port", "0")
    assert "osim:L2M2019" in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("opensim") is not None, reason="opensim is in this very Python")
def test_a_recipe_without_its_simulator_is_refused_with_how_to_get_it(tmp_path):
    text = refused(tmp_path, "osim:L2M2019", "--port", "0")
    assert text.rstrip().endswith("`make osim`, then --python .venv-osim/bin/python")


def test_an_import_that_is_missing_in_the_simulators_python_is_refused_with_where_to_install_it(tmp_path):
    (tmp_path / "importing.py").write_text("import nothing_of_this_name\n")
    text = refused_in(tmp_path, "importing:Env")
    assert "No module named 'nothing_of_this_name'" in text
    assert "  now: install it for %s, or name the simulator's Python with --python" % sys.executable in text


@pytest.mark.parametrize("option", ["--new-key", "--release"])
def test_what_starts_no_farm_takes_no_environment(tmp_path, option):
    done = subprocess.run(
        [sys.executable, str(ROOT / "farm.py"), COUNTING, option, "1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "%s starts no farm, so it takes no ENV" % option in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_module_that_is_not_there_is_refused_with_where_it_was_looked_for(tmp_path):
    text = refused(tmp_path, "no_such_module:make", "--port", "0")
    assert "no module 'no_such_module'" in text
    assert str(TESTS) in text
    assert "Traceback" not in text


def test_a_factory_that_is_not_there_is_refused_with_close_names(tmp_path):
    text = refused(tmp_path, "environments:CountingEnvy", "--port", "0")
    assert "CountingEnvy" in text
    assert "close names: CountingEnv" in text
    assert "Traceback" not in text


def test_a_factory_that_raises_is_shown_with_its_traceback(tmp_path):
    text = refused(tmp_path, "environments:RaisingEnv", "--env-kwargs", '{"at": "construct"}', "--port", "0")
    assert "asked to raise in the constructor" in text
    assert "environments.py" in text, "where it was raised"


def test_a_factory_that_leaves_the_process_is_told_in_words(tmp_path):
    (tmp_path / "leaving.py").write_text(
        "import os\ndef make():\n    print('last words', flush=True)\n    os._exit(3)\n"
    )
    text = refused_in(tmp_path, "leaving:make")
    assert "exited with code 3" in text
    assert "last words" in text


@pytest.mark.slow
def test_a_constructor_that_hangs_is_given_up_after_its_limit(tmp_path):
    (tmp_path / "hanging.py").write_text("import time\ndef make():\n    time.sleep(600)\n")
    started = time.monotonic()
    text = refused_in(tmp_path, "hanging:make", "--start-timeout", "2")
    assert "not built within 2 s" in text
    assert "--start-timeout" in text
    assert time.monotonic() - started < 60


def test_a_busy_port_is_refused_with_its_number(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        text = refused(tmp_path, COUNTING, "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in text
    assert "--port" in text


@pytest.mark.slow
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "slave.invalid"])
def test_an_address_that_others_can_reach_is_refused(tmp_path, host):
    text = refused(tmp_path, COUNTING, "--port", "0", "--host", host)
    assert f"--host {host}" in text
    assert "now:" in text


def test_a_python_that_does_not_exist_is_refused(tmp_path):
    text = refused(tmp_path, COUNTING, "--port", "0", "--python", str(tmp_path / "python"))
    assert str(tmp_path / "python") in text
    assert "does not start" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("#!/bin/sh\necho no interpreter >&2\nexit 1\n", "no interpreter"),
        ("#!/bin/sh\nexit 0\n", "is no Python"),
        ("#!/bin/sh\necho hello\n", "is no Python"),
        ("#!/bin/sh\necho hello world of mine\n", "is no Python"),
    ],
)
def test_a_python_that_is_none_is_refused(tmp_path, body, words):
    text = refused(tmp_path, COUNTING, "--port", "0", "--python", script(tmp_path / "fake", body))
    assert words in text
    assert "is no Python" in text


def test_a_python_without_numpy_is_refused_with_the_line_that_installs_it(tmp_path):
    bare = script(tmp_path / "bare", f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    text = refused(tmp_path, COUNTING, "--port", "0", "--python", bare)
    assert "no working numpy" in text
    assert f"{bare} -m pip install numpy" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--env-kwargs", "{length: 3}"], "not JSON"),
        (["--env-kwargs", "[3]"], "a JSON object is wanted"),
        (["--slots", "0"], "at least 1, not 0"),
        (["--slots", "two"], "two"),
        (["--port", "65536"], "0 to 65535"),
        (["--start-timeout", "0"], "more than 0"),
        (["--start-timeout", "nan"], "more than 0"),
    ],
)
def test_a_wrong_flag_is_refused_with_its_value(tmp_path, args, words):
    assert words in refused(tmp_path, COUNTING, *(() if "--port" in args else ("--port", "0")), *args)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Pendulum v1", "environments:", ":CountingEnv", ""])
def test_what_names_no_environment_is_refused(tmp_path, name):
    assert "%r names no environment" % name in refused(tmp_path, name, "--port", "0")


def test_fewer_slots_than_environments_are_refused(tmp_path):
    assert "at least as many slots" in refused(tmp_path, COUNTING, SLOW, "--slots", "1", "--port", "0")


def test_keyword_arguments_that_the_environment_does_not_take_are_refused(tmp_path):
    assert "colour" in refused(tmp_path, COUNTING, "--port", "0", "--env-kwargs", '{"colour": 3}')


def test_a_log_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    farm = FarmProcess([*farm_command(COUNTING), "--log-dir", str(tmp_path / "file" / "logs")], tmp_path)
    assert farm.process.wait(60) == 2, farm.log()
    assert "file/logs" in farm.log()
    assert "Traceback" not in farm.log()


def test_one_environment_that_can_not_be_built_stops_the_farm_that_offers_two(tmp_path):
    assert "Envy" in refused(tmp_path, COUNTING, "environments:Envy", "--slots", "2", "--port", "0")


# What it offers.


@pytest.mark.slow
def test_the_line_for_farmlist_py_is_one_that_loads(tmp_path):
    with running_farm(COUNTING, slots=2) as farm:
        line = next(line for line in farm.said().splitlines() if "farmlist_base" in line)
        path = tmp_path / "farmlist.py"
        path.write_text(line.partition(": ")[2])
        (address,) = load_farmlist(path)
        assert (str(address), address.slots) == (farm.address, 2)
        assert "observation box (3,), action box (1,)" in farm.said()


@pytest.mark.slow
def test_keyword_arguments_and_prints_go_where_they_should(tmp_path):
    env = "environments:PrintingEnv"
    with running_farm(env, slots=1, kwargs={"length": 2}, log_dir=tmp_path / "logs") as farm:
        with Farmer(env, [(farm.address, 1)]) as farmer:
            farmer.reset([0])
            farmer.recv()
            ends = []
            for _ in range(2):
                farmer.send([[0.0]], [0])
                ends += farmer.recv().truncated.tolist()
            assert ends == [False, True], "length=2 arrived"
        text = (tmp_path / "logs" / "slot-0.log").read_text()
        for words in ("a line of the simulator's", "to the first stdout", "bytes from below", "a child"):
            assert text.count(words) >= 3, "constructor, reset and step"
        assert "simulator" not in farm.said()


@pytest.mark.slow
def test_two_environments_share_a_farm_and_a_slot_changes_from_one_to_the_other():
    with running_farm(COUNTING, SLOW, slots=2) as farm:
        assert sorted(farm.describe()["envs"]) == [COUNTING, SLOW]
        with Farmer(SLOW, [(farm.address, 2)]) as farmer:
            farmer.reset([0, 1])
            assert not farmer.recv(min_ready=2).lost.any()
            assert [row["env"] for row in farm.status()] == [SLOW, SLOW]
            assert [row["trouble"] for row in farm.status()] == [None, None]


# Its end.


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.slow
def test_a_signal_ends_the_farm_and_its_workers_though_one_is_in_a_long_step(number):
    with running_farm(SLOW, slots=2) as farm, busy_slot(farm, SLOW, 60.0):
        workers = workers_of(farm.pid)
        assert len(workers) == 2
        started = time.monotonic()
        farm.signal(number)
        assert farm.process.wait(STOP_LIMIT) == 0
        assert all(is_gone(pid) for pid in workers), "none outlives the farm"
        assert time.monotonic() - started < STOP_LIMIT
        assert "Traceback" not in farm.log()


@pytest.mark.slow
def test_a_farm_whose_workers_are_idle_ends_at_once_and_lets_them_close(tmp_path):
    log = tmp_path / "closed.txt"
    patient = tmp_path / "farm.py"  # its workers would have a minute for closing
    patient.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from farmhand import supervisor; supervisor.STOP_LIMIT = 60.0\n"
        "import farm; sys.exit(farm.main())\n"
    )
    with running_farm(COUNTING, slots=2, kwargs={"log": str(log)}, script=patient) as farm:
        farm.signal(signal.SIGTERM)
        assert farm.process.wait(STOP_LIMIT) == 0
    assert log.read_text() == "closed\nclosed\n"


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.slow
def test_a_signal_during_the_start_ends_everything(tmp_path, number):
    (tmp_path / "hanging.py").write_text(
        "import time\ndef make():\n    print('here', flush=True)\n    time.sleep(600)\n"
    )
    logs = tmp_path / "logs"
    farm = FarmProcess([*farm_command("hanging:make"), "--log-dir", str(logs)], tmp_path, cwd=tmp_path)
    poll_until(lambda: (logs / "slot-0.log").exists() and "here" in (logs / "slot-0.log").read_text(), 30, "the start")
    workers = workers_of(farm.pid)
    assert len(workers) == 1
    farm.signal(number)
    assert farm.process.wait(STOP_LIMIT) == 0
    assert all(is_gone(pid) for pid in workers)
    assert "Traceback" not in farm.log()


@pytest.mark.slow
def test_a_second_signal_does_not_break_off_the_end():
    with running_farm(SLOW, slots=1) as farm, busy_slot(farm, SLOW, 60.0):
        (worker,) = workers_of(farm.pid)
        farm.signal(signal.SIGINT)
        time.sleep(0.2)  # into the time that the worker has for closing
        farm.signal(signal.SIGINT)
        assert farm.process.wait(STOP_LIMIT) == 0
        assert is_gone(worker)
        assert "Traceback" not in farm.log()


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_no_worker_outlives_a_farm_that_is_killed(busy):
    with running_farm(SLOW, slots=2) as farm, contextlib.ExitStack() as stack:
        if busy:
            stack.enter_context(busy_slot(farm, SLOW, 60.0))
        workers = workers_of(farm.pid)
        assert len(workers) == 2
        farm.kill()
        poll_until(lambda: all(is_gone(pid) for pid in workers), 30, "the workers' end")


@pytest.mark.slow
def test_a_farm_that_another_program_starts_ends_with_its_standard_input():
    with running_farm(COUNTING, slots=1, extra=["--until-eof"], stdin=subprocess.PIPE) as farm:
        workers = workers_of(farm.pid)
        farm.process.stdin.close()
        assert farm.process.wait(STOP_LIMIT) == 0
        assert all(is_gone(pid) for pid in workers)


@pytest.mark.slow
def test_a_farm_of_another_program_ends_by_a_signal_too():
    with running_farm(COUNTING, slots=1, extra=["--until-eof"], stdin=subprocess.PIPE) as farm:
        farm.signal(signal.SIGTERM)
        assert farm.process.wait(STOP_LIMIT) == 0
        farm.process.stdin.close()


# The workers.


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_death_is_told():
    with running_farm(COUNTING, slots=2) as farm:
        before = farm.workers()
        os.kill(before[0], signal.SIGKILL)
        poll_until(lambda: farm.status()[0]["pid"] not in (None, before[0]), 30, "a new worker")
        farm.wait_until_idle()
        assert farm.workers()[1] == before[1]
        assert f"slot 0 (pid {before[0]}) was killed by SIGKILL" in farm.log()
        assert farm.describe()["free"] == 2


@pytest.mark.slow
def test_a_worker_dies_with_all_that_it_started(tmp_path):
    (tmp_path / "parent.py").write_text(
        "import subprocess\n"
        "class Env:\n"
        "    def __init__(self):\n"
        "        self.child = subprocess.Popen(['sleep', '600'])\n"
        "    def reset(self): return 0.0\n"
        "    def step(self, action): return 0.0, 0.0, False, {}\n"
    )
    farm = FarmProcess([*farm_command("parent:Env", slots=1), "--log-dir", str(tmp_path / "logs")], tmp_path, tmp_path)
    farm.wait_until_offered()
    worker, child = workers_of(farm.pid)
    os.kill(worker, signal.SIGKILL)
    poll_until(lambda: is_gone(child), 30, "the grandchild's end")
    poll_until(lambda: len(workers_of(farm.pid)) == 2, 30, "a new worker and its child")
    left = workers_of(farm.pid)
    farm.end()
    assert all(is_gone(pid) for pid in left)


@pytest.mark.slow
def test_leases_that_come_and_go_leave_no_open_files_at_the_farm():
    with running_farm(COUNTING, slots=1) as farm:
        for _ in range(3):
            Farmer(COUNTING, [(farm.address, 1)]).close()
        before = psutil.Process(farm.pid).num_fds()
        for _ in range(20):
            Farmer(COUNTING, [(farm.address, 1)]).close()
        # Each has two connections, a selector and a pipe there; what Python has not collected yet may be left.
        poll_until(lambda: psutil.Process(farm.pid).num_fds() <= before + 20, 30, "the closing of files")
