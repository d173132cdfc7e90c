"""The worker process, driven over its two pipes."""

import os
import platform
import signal
import subprocess
import sys
import textwrap
import time

import interpreters
import numpy as np
import psutil
import pytest
from faces import ROOT, TESTS, Fault, WorkerFace, WorkerGone, WorkerProcess

from wire import codec, protocol

pytestmark = pytest.mark.timeout(120)


def poll_until(condition, limit=30.0):
    """Waits until `condition()` is true; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def action(value):
    return np.array([value], "float32")


@pytest.fixture
def start():
    """start(...) -> WorkerProcess; ended with the test, and found dead."""
    started = []

    def make(*args, **kwargs):
        started.append(WorkerProcess(*args, **kwargs))
        return started[-1]

    yield make
    for worker in started:
        worker.end()


@pytest.fixture
def face():
    opened = []

    def make(factory="CountingEnv", python=sys.executable, **kwargs):
        opened.append(WorkerFace(factory, kwargs, python))
        return opened[-1]

    yield make
    for each in opened:
        each.worker.end()


def construct(worker, spec, kwargs=None, path=(str(TESTS),)):
    return worker.ask(protocol.CONSTRUCT, {"env": spec, "kwargs": kwargs or {}, "path": list(path), "name": "it"})


COUNTING = {"kind": "factory", "module": "environments", "factory": "CountingEnv"}

# ---- what it says of itself ----


def test_ready_says_what_the_environment_is(face):
    worker = face(length=7)
    ready = worker.ready
    assert ready["observation_space"]["kind"] == "box"
    assert ready["action_space"]["shape"] == (1,)
    assert ready["metadata"] == {"render_modes": ["rgb_array"], "render_fps": 30}
    assert ready["python"] == platform.python_version()
    assert ready["numpy"] == np.__version__
    assert ready["api"] == "plain"
    assert ready["spec"] == {"id": "Counting", "max_episode_steps": 7, "reward_threshold": None}
    assert ready["pid"] == worker.worker.process.pid


def test_a_look_alike_of_old_gym_is_known_by_its_behaviour(face):
    assert face("OldGymEnv").ready["api"] == "gym21"


# ---- repetition, actions, the end of an episode ----


def test_repetition_adds_rewards_up_and_ends_with_the_episode(face):
    worker = face(length=5)
    worker.reset()
    observation, reward, _, truncated, info = worker.step(action(0.5), repeat=3)
    assert (observation[1], reward, truncated, info["step"]) == (3, 1 + 2 + 3, False, 3)
    observation, reward, _, truncated, info = worker.step(action(0.5), repeat=3)
    assert (observation[1], reward, truncated, info["step"]) == (5, 4 + 5, True, 5)


def test_a_list_becomes_an_array_where_the_space_is_a_box(face):
    worker = face()
    worker.reset()
    observation, _, _, _, info = worker.step([0.25])
    assert observation[2] == 0.25
    assert info["action_type"] == "ndarray"


def test_a_discrete_action_arrives_as_a_numpy_int(face):
    worker = face("NestedEnv")
    worker.reset()
    for sent in (np.array(2), np.int64(2)):
        assert type(worker.step(sent)[4]["action"]) is np.int64


def test_a_step_before_the_reset_or_after_the_end_is_a_fault_and_harms_nothing(face):
    worker = face(length=1)
    with pytest.raises(Fault, match="NoEpisode in step: step without an episode"):
        worker.step(action(0))
    worker.reset()
    worker.step(action(0))
    with pytest.raises(Fault, match="step without an episode"):
        worker.step(action(0))
    assert worker.reset()[0][0] == 2, "the environment is still the same one"


# ---- faults ----


@pytest.mark.parametrize(
    ("at", "text"),
    [
        ("step", "ValueError in step: asked to raise in step"),
        ("exit", "SystemExit in step: asked to leave in step"),
        ("observation", r"InvalidObservation in step: observation is no array: dict {'fine': 1, 'handle': <object obj"),
    ],
)
def test_a_fault_in_a_step_is_told_and_the_environment_made_anew(face, tmp_path, at, text):
    log = tmp_path / "log"
    worker = face("RaisingEnv", at=at, log=str(log))
    worker.reset()
    with pytest.raises(Fault, match=text) as caught:
        worker.step(action(0.75))
    assert caught.value.body["where"] == "step"
    assert ("Traceback" in caught.value.body["traceback"]) == (at != "observation")
    poll_until(log.exists)
    assert log.read_text() == "closed\n"
    with pytest.raises(Fault, match="step without an episode"):
        worker.step(action(0))
    assert worker.reset()[0][0] == 1, "a new environment counts from one"


def test_a_fault_in_reset_is_told_and_the_environment_made_anew(face):
    worker = face("RaisingEnv", at="reset")
    worker.reset()
    with pytest.raises(Fault, match="ValueError in reset: asked to raise"):
        worker.reset(options={"raise": True})
    assert worker.reset()[0][0] == 1


def test_a_constructor_that_raises_ends_the_worker_with_code_3(start):
    worker = start()
    with pytest.raises(Fault, match="ValueError in construct: asked to raise in the constructor") as caught:
        construct(worker, dict(COUNTING, factory="RaisingEnv"), {"at": "construct"})
    assert "environments.py" in caught.value.body["traceback"]
    assert worker.process.wait(30) == 3


def test_what_cannot_be_sent_in_an_info_is_named_in_its_place(face):
    worker = face("OddInfoEnv")
    worker.reset()
    info = worker.step(action(0))[4]
    assert info["handle"] == {"deep": [1, "<not sent: Handle: <a handle of the simulator>>"]}
    assert info["step"] == 1
    assert 0.0 <= worker.env_s < 10.0, "the seconds behind the info are still there"


# ---- how long it took ----


@pytest.mark.slow
@pytest.mark.parametrize("version", interpreters.VERSIONS)
def test_the_seconds_of_a_step_are_those_of_the_environment_and_of_all_its_repeats(face, version):
    worker = face("SlowEnv", interpreters.python_with_numpy(version), reset_takes=0.125)
    worker.reset()
    assert type(worker.env_s) is float
    assert_took(worker.env_s, 0.125)
    worker.step(action(0.0625))
    assert_took(worker.env_s, 0.0625)
    worker.step(action(0.0625), repeat=4)
    assert_took(worker.env_s, 4 * 0.0625)
    worker.step(action(0.0))
    assert_took(worker.env_s, 0.0)


def test_the_end_of_an_episode_ends_its_seconds_too(face):
    worker = face("SlowEnv", length=2)
    worker.reset()
    worker.step(action(0.0625), repeat=50)
    assert_took(worker.env_s, 2 * 0.0625)


def assert_took(seconds, slept):
    """No less than the sleep (by another clock, so within a millisecond), and not much more on a busy machine."""
    assert slept - 0.001 <= seconds < 2 * slept + 2.0


# ---- making the environment ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "gym", "id": "Pendulm-v1"}, ["'Pendulm-v1'", "close names: ", "Pendulum-v1"]),
        ({"kind": "gym", "id": "no_such_module:A-v0"}, ["no module 'no_such_module'", sys.executable, str(TESTS)]),
        (dict(COUNTING, module="enviroments"), ["no module 'enviroments'", "Python 3", sys.executable, str(TESTS)]),
        (dict(COUNTING, module="environments.sub"), ["no module 'environments.sub'"]),
        (dict(COUNTING, factory="CountinEnv"), ["nothing callable named 'CountinEnv'", "close names: CountingEnv"]),
        ({"kind": "file", "file": "/no/such/file.py", "factory": "make"}, ["no file /no/such/file.py"]),
        ({"kind": "magic"}, ["'magic'", "known are gym, factory and file"]),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(start, spec, words):
    worker = start()
    with pytest.raises(Fault) as caught:
        construct(worker, spec)
    assert caught.value.body["type"] == "NoSuchEnvironment"
    for word in words:
        assert word in caught.value.body["text"]
    assert worker.process.wait(30) == 3


def test_a_module_that_imports_a_missing_one_shows_its_own_error(start, tmp_path):
    (tmp_path / "needy.py").write_text("import not_there_at_all\n")
    with pytest.raises(Fault, match="ModuleNotFoundError in construct: No module named 'not_there_at_all'"):
        construct(start(), {"kind": "factory", "module": "needy", "factory": "make"}, path=[str(tmp_path)])


def write_gym_module(folder):
    (folder / "my_gym_module.py").write_text(
        textwrap.dedent("""
            import gymnasium

            class Mine(gymnasium.Env):
                observation_space = gymnasium.spaces.Discrete(9)
                action_space = gymnasium.spaces.Discrete(2)

                def __init__(self, at=0):
                    self.at = at

                def reset(self, seed=None, options=None):
                    return self.at, {}

                def step(self, action):
                    self.at += int(action)
                    return self.at, 1.0, False, False, {}

            gymnasium.register("Mine-v0", Mine, max_episode_steps=2)
        """)
    )


def test_a_gym_id_may_name_the_module_that_registers_it(start, tmp_path):
    write_gym_module(tmp_path)
    worker = start()
    ready = construct(worker, {"kind": "gym", "id": "my_gym_module:Mine-v0"}, {"at": 4}, path=[str(tmp_path)])
    assert ready["api"] == "gymnasium"
    assert ready["spec"] == {"id": "Mine-v0", "max_episode_steps": 2, "reward_threshold": None}
    assert worker.ask(protocol.RESET, {"seed": 1, "options": None})[0] == 4
    step = {"action": np.int64(1), "repeat": 5}
    assert worker.ask(protocol.STEP, step)[:-1] == (6, 2.0, False, True, {})


def test_a_file_is_loaded_without_standing_in_the_way_of_a_package_of_its_name(start, tmp_path):
    package = tmp_path / "site" / "sim"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("length = 11\n")
    recipe = tmp_path / "sim.py"
    recipe.write_text("import sim, environments\ndef make(): return environments.CountingEnv(sim.length)\n")
    spec = {"kind": "file", "file": str(recipe), "factory": "make"}
    ready = construct(start(), spec, path=[str(TESTS), str(package.parent)])
    assert ready["spec"]["max_episode_steps"] == 11


@pytest.mark.parametrize("version", ["2.7", "3.13"])
def test_modules_of_the_user_named_like_ours_are_the_users(start, tmp_path, version):
    names = ["adapt", "build", "describe", "codec", "protocol", "errors", "auth"]
    for name in names:
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "users.py").write_text(
        f"import environments\nimport {', '.join(names)}\n"
        f"assert all(module.MINE for module in ({', '.join(names)}))\nmake = environments.CountingEnv\n"
    )
    worker = start(interpreters.python_with_numpy(version))
    construct(worker, {"kind": "factory", "module": "users", "factory": "make"}, path=[str(tmp_path), str(TESTS)])
    worker.ask(protocol.RESET, {"seed": None, "options": None})


# ---- pipes, signals, the end ----

PYTHONS = pytest.mark.parametrize("version", ["2.7", "3.6", "3.13"])


@pytest.mark.slow
@PYTHONS
def test_the_worker_ends_with_its_pipe_even_in_the_middle_of_a_step(version):
    worker = WorkerFace("SlowEnv", {}, interpreters.python_with_numpy(version)).worker
    worker.ask(protocol.RESET, {"seed": None, "options": None})
    worker.send(protocol.STEP, {"action": action(50.0), "repeat": 1})
    time.sleep(1.0)  # into the step
    assert worker.process.poll() is None
    assert worker.end(30.0) == -signal.SIGKILL, "it ends its whole group, itself included"


@PYTHONS
def test_close_closes_the_environment_even_if_the_pipe_closes_at_once(version, tmp_path):
    log = tmp_path / "log"
    face = WorkerFace("CountingEnv", {"log": str(log), "close_takes": 0.3}, interpreters.python_with_numpy(version))
    face.close()
    assert log.read_text() == "closed\n"


def test_ctrl_c_is_not_the_workers(face):
    worker = face()
    worker.reset()
    os.kill(worker.worker.process.pid, signal.SIGINT)
    assert worker.step(action(0.5))[0][1] == 1


@pytest.mark.slow
@PYTHONS
def test_prints_go_to_the_log_and_a_child_inherits_no_pipe(start, tmp_path, version):
    (tmp_path / "spy.py").write_text(
        textwrap.dedent("""
            import environments, os, subprocess, sys

            class Spy(environments.PrintingEnv):
                def reset(self, seed=None, options=None):
                    code = "import os; fds = ['/proc/self/fd/%d' % fd for fd in range(3, 64)];" \\
                        "print([os.readlink(fd) for fd in fds if os.path.lexists(fd)])"
                    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, close_fds=False)
                    fds = child.communicate()[0].decode()
                    return environments.PrintingEnv.reset(self)[0], {"fds": fds}
        """)
    )
    worker = start(interpreters.python_with_numpy(version))
    construct(worker, {"kind": "factory", "module": "spy", "factory": "Spy"}, path=[str(tmp_path), str(TESTS)])
    _, info, _ = worker.ask(protocol.RESET, {"seed": None, "options": None})
    assert "pipe" not in info["fds"]
    log = worker.read_log()
    for line in ("a line of the simulator's", "to the first stdout", "bytes from below", "a child"):
        assert line in log


@pytest.mark.slow
def test_a_worker_that_is_idle_uses_no_time(face):
    worker = face()
    worker.reset()

    process = psutil.Process(worker.ready["pid"])
    before = process.cpu_times()
    time.sleep(1.0)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.1, "the watch must sleep"


def test_what_is_no_frame_ends_the_worker_with_a_line(start):
    worker = start()
    worker.process.stdin.write(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(WorkerGone, match=r"exit code 5; log: worker: the farm sent something that is not a frame"):
        worker.receive()


def test_commands_may_come_in_pieces_or_together(face):
    worker = face().worker
    frames = b"".join(
        protocol.pack(kind, seq, codec.encode(body))
        for seq, (kind, body) in enumerate(
            [(protocol.RESET, {}), (protocol.STEP, {"action": [0.5]}), (protocol.STEP, {"action": [0.25]})], 70
        )
    )
    for position in range(0, len(frames), 7):
        worker.process.stdin.write(frames[position : position + 7])
    reader, got = protocol.FrameReader(), []
    while len(got) < 3:
        got += reader.feed(os.read(worker.process.stdout.fileno(), 100))
    assert [frame[2] for frame in got] == [70, 71, 72]
    assert codec.decode(got[2][3])[0][2] == 0.25


def test_a_python_without_numpy_says_so_and_exits_with_4(start, tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy here')\n")
    worker = start(environ={"PYTHONPATH": str(tmp_path)})
    with pytest.raises(WorkerGone, match="exit code 4") as caught:
        worker.receive()
    assert "cannot import numpy: no numpy here" in str(caught.value)
    assert f"{sys.executable} -m pip install numpy" in str(caught.value)


def test_a_wrong_command_line_says_what_it_is_for():
    done = subprocess.run(
        [sys.executable, str(ROOT / "farmhand" / "worker")], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "the farm starts it" in done.stderr


# ---- the real libraries ----


def test_gymnasiums_pendulum_steps_as_it_does_here(start):
    import gymnasium

    from farmer.spaces import build_space

    here = gymnasium.make("Pendulum-v1", g=9.0)
    worker = start()
    ready = construct(worker, {"kind": "gym", "id": "Pendulum-v1"}, {"g": 9.0})
    assert ready["api"] == "gymnasium"
    assert build_space(ready["observation_space"]) == here.observation_space
    assert build_space(ready["action_space"]) == here.action_space
    np.testing.assert_array_equal(worker.ask(protocol.RESET, {"seed": 3, "options": None})[0], here.reset(seed=3)[0])
    for step in range(200):
        there = worker.ask(protocol.STEP, {"action": action(0.5), "repeat": 1})
        expected = here.step(action(0.5))
        np.testing.assert_array_equal(there[0], expected[0])
        assert there[1:4] == (float(expected[1]), False, step == 199)


@pytest.mark.parametrize(("name", "api"), [("gym==0.21.0", "gym21"), ("gym==0.26.2", "gym26")])
@pytest.mark.slow
def test_real_gym_of_another_age_balances_its_pole(start, name, api):
    worker = start(interpreters.python_with_gym(name))
    ready = construct(worker, {"kind": "gym", "id": "CartPole-v1"})
    assert ready["api"] == api
    assert ready["spec"]["max_episode_steps"] == 500
    first, info, _ = worker.ask(protocol.RESET, {"seed": 5, "options": None})
    again, _, _ = worker.ask(protocol.RESET, {"seed": 5, "options": None})
    assert (first.shape, first.dtype, info) == ((4,), np.float32, {})
    np.testing.assert_array_equal(first, again)
    steps = [worker.ask(protocol.STEP, {"action": np.int64(1), "repeat": 1}) for _ in range(4)]
    assert [step[1:4] for step in steps] == [(1.0, False, False)] * 4
    fallen = worker.ask(protocol.STEP, {"action": np.int64(1), "repeat": 50})
    assert fallen[2:4] == (True, False)

    worker.ask(protocol.RESET, {"seed": 5, "options": None})
    for _ in range(500):
        # Push towards where the pole falls: it stays up until the time limit cuts.
        lean = first[2] + 0.5 * first[3]
        first, _, terminated, truncated, _, _ = worker.ask(protocol.STEP, {"action": np.int64(lean > 0), "repeat": 1})
        if terminated or truncated:
            break
    assert (terminated, truncated) == (False, True)


@pytest.mark.slow
def test_an_old_environment_under_gym_026_is_stepped_as_an_old_one(start, tmp_path):
    (tmp_path / "old.py").write_text(
        textwrap.dedent("""
            import gym, numpy

            class Old(gym.Env):
                observation_space = gym.spaces.Box(-1, 1, (2,))
                action_space = gym.spaces.Discrete(2)

                def reset(self, project=True, seed=None):
                    self.seed_given = seed
                    return [0.0, 1.0]

                def step(self, action):
                    return [0.5, 0.5], 2, True, {"seed": self.seed_given}
        """)
    )
    worker = start(interpreters.python_with_gym("gym==0.26.2"))
    ready = construct(worker, {"kind": "factory", "module": "old", "factory": "Old"}, path=[str(tmp_path)])
    assert ready["api"] == "gym21"
    assert worker.ask(protocol.RESET, {"seed": 8, "options": None})[:-1] == ([0.0, 1.0], {})
    step = {"action": np.int64(0), "repeat": 1}
    assert worker.ask(protocol.STEP, step)[:-1] == ([0.5, 0.5], 2.0, True, False, {"seed": 8})


@PYTHONS
def test_an_error_that_is_not_ascii_arrives_as_text(start, tmp_path, version):
    (tmp_path / "foreign.py").write_text(
        "# -*- coding: utf-8 -*-\ndef make():\n    raise ValueError(u'Schl\u00fcssel')\n", encoding="utf-8"
    )
    spec = {"kind": "factory", "module": "foreign", "factory": "make"}
    with pytest.raises(Fault) as caught:
        construct(start(interpreters.python_with_numpy(version)), spec, path=[str(tmp_path)])
    text = caught.value.body["text"]
    assert isinstance(text, str)
    assert "Schl" in text
