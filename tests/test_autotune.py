"""How many slots a machine deserves: what is decided from figures, and what real workers are measured to be."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
from farms import ROOT, START_LIMIT, TESTS, is_gone
from gymnasium import spaces
from helpers import poll_until

import farm
from farmer.spaces import build_space
from farmhand import tree
from farmhand.actions import sampler
from farmhand.sizing import WORTH, Machine, Need, Row, Stop, decide, fits, growth, memory_need, next_slots
from farmhand.worker.describe import describe
from wire import codec
from wire.errors import StartError

MB = 2**20
GB = 2**30

# What is decided.


def play(machine, need, rate=None, busy=None, others=0.0, own=0.0):
    """Decides as `autotune` does, about workers of which as many step as there are cores for, or as `rate` says."""
    rows, stop = [], None
    slots = 1
    while slots is not None:
        if not fits(machine, need, slots) and rows:
            stop = Stop("memory", "memory")
            break
        ideal = min(slots, machine.cores / need.cores)
        made = rate(slots) if rate else ideal
        rows.append(Row(slots, 100.0 * made, busy or made * need.cores, own, slots * need.memory, others))
        slots = next_slots(machine, need, rows)
    return decide(machine, need, rows, stop), rows


def machine_of(cores, free=64 * GB, most=256):
    return Machine(cores, free, most)


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 6, 8, 12, 16, 48, 64])
def test_workers_that_compute_get_a_core_each(cores):
    decision, rows = play(machine_of(cores), Need(1.0, 50 * MB))
    assert (decision.slots, decision.reason) == (cores, "cores")
    assert rows[-1].slots > cores  # it was tried, not only calculated
    assert f"{cores:.2f} of {cores} cores are busy" in decision.why


@pytest.mark.parametrize(("cores", "need", "least", "most"), [(2, 0.4, 5, 5), (8, 0.5, 16, 16), (4, 0.1, 32, 48)])
def test_workers_that_wait_get_what_keeps_the_cores_busy(cores, need, least, most):
    decision, _ = play(machine_of(cores), Need(need, 50 * MB))
    assert least <= decision.slots <= most
    assert decision.reason == "cores"


def test_a_worker_of_several_threads_gets_several_cores():
    decision, _ = play(machine_of(8), Need(3.9, 50 * MB))
    assert 2 <= decision.slots <= 3


def test_a_share_of_a_core_is_a_whole_slot():
    decision, _ = play(machine_of(1.5), Need(1.0, 50 * MB))
    assert decision.slots == 2  # the second brings half of the first


def test_workers_that_sleep_are_limited_by_what_was_asked_for():
    decision, rows = play(machine_of(2, most=48), Need(0.001, 50 * MB))
    assert (decision.slots, decision.reason) == (48, "most")
    assert [row.slots for row in rows] == [1, 2, 4, 8, 16, 32, 48]
    assert "--max-slots 48" in decision.why


def test_memory_limits_them_and_the_number_that_fits_is_measured():
    decision, rows = play(machine_of(16, free=2 * GB), Need(0.1, 300 * MB))
    assert (decision.slots, decision.reason) == (5, "memory")  # 80 % of 2 GB
    assert [row.slots for row in rows] == [1, 2, 4, 5]


def test_a_row_that_took_more_memory_than_it_may_is_not_chosen():
    rows = [Row(1, 100, 0.1, 0, 300 * MB), Row(2, 200, 0.2, 0, 600 * MB), Row(4, 400, 0.4, 0, 2 * GB)]
    decision = decide(machine_of(8, free=2 * GB), Need(0.1, 512 * MB), rows, None)
    assert (decision.slots, decision.reason) == (2, "memory")
    assert "too much memory" in decision.verdicts[2]


def test_what_brings_nothing_is_not_chosen_though_cores_are_idle():
    decision, _ = play(machine_of(32), Need(0.5, 50 * MB), rate=lambda slots: min(slots, 4.2), busy=4.0)
    assert (decision.slots, decision.reason) == (4, "gain")
    assert "4.00 of 32 cores" in decision.why


def test_handing_out_short_steps_can_be_the_limit():
    decision, _ = play(machine_of(32), Need(0.5, 50 * MB), rate=lambda slots: min(slots, 2.0), busy=2.0, own=0.97)
    assert (decision.slots, decision.reason) == (2, "hands")


def test_a_figure_a_tenth_too_high_decides_nothing():
    for wrong in (0.9, 1.1):
        decision, _ = play(
            machine_of(4), Need(1.0, 50 * MB), rate=lambda n, wrong=wrong: min(n, 4) * (wrong if n > 4 else 1)
        )
        assert decision.slots == 4


def test_hyper_threads_that_bring_a_third_are_taken():
    decision, _ = play(machine_of(8), Need(1.0, 50 * MB), rate=lambda n: min(n, 4) + 0.33 * max(0, min(n, 8) - 4))
    assert decision.slots == 8
    decision, _ = play(
        machine_of(8), Need(1.0, 50 * MB), rate=lambda n: min(n, 4) + 0.5 * WORTH * max(0, min(n, 8) - 4)
    )
    assert decision.slots == 4


def test_cores_that_are_taken_from_other_programs_are_no_gain():
    decision, rows = play(machine_of(2), Need(1.0, MB), rate=lambda slots: slots, busy=1.0, others=1.0)
    assert decision.slots == 2
    assert rows[-1].slots == 4
    assert "takes from other programs" in decision.verdicts[-1]
    assert play(machine_of(2), Need(1.0, MB), rate=lambda slots: slots, busy=1.0)[0].slots == 4


def test_when_time_runs_out_the_last_that_was_worth_it_is_taken_and_the_reason_told():
    rows = [Row(1, 10, 0.1, 0, MB), Row(2, 20, 0.2, 0, 2 * MB)]
    decision = decide(machine_of(8), Need(0.1, MB), rows, Stop("time", "time: 4 slots were not measured"))
    assert (decision.slots, decision.reason, decision.why) == (2, "time", "time: 4 slots were not measured")


def test_growth_is_what_a_worker_keeps_adding_after_its_first_steps():
    full = [(step, 50 * MB + min(step, 20) * MB) for step in range(100)]
    leaks = [(step, 50 * MB + step * MB // 4) for step in range(100)]
    assert growth(full) == 0.0
    assert growth(leaks) == pytest.approx(MB / 4, rel=0.01)
    assert growth([]) == growth(leaks[:2]) == growth([(3, MB)] * 9) == 0.0


def test_a_worker_that_grows_is_counted_as_one_that_doubled_and_ends_its_episode():
    assert memory_need(100 * MB, 130 * MB, 0.0, 50) == 130 * MB
    assert memory_need(100 * MB, 900 * MB, 2.0 * MB, 50) == 300 * MB


# What the machine, or the container, has.


def groups(tmp_path, mine, files):
    """A tree of control groups as the kernel shows it: (its root, /proc/self/cgroup)."""
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    (tmp_path / "mine").write_text(mine)
    return tmp_path / "cgroup", tmp_path / "mine"


def test_without_a_container_the_machine_counts(tmp_path):
    there = groups(tmp_path, "0::/\n", {"cgroup.procs": "1\n"})
    assert tree.free_memory(*there)[0] == psutil.virtual_memory().total
    assert tree.cores(*there) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("mine", "folder"),
    [
        ("0::/\n", ""),  # a container of its own
        ("0::/docker/1f\n", ""),  # one that shows the machine's path
        ("0::/slurm/job\n", "slurm/job/"),
        ("0::/slurm/job/step\n", "slurm/job/"),  # the limit is the parent's
    ],
)
def test_memory_and_cores_are_those_of_the_container(mine, folder, tmp_path):
    files = {"memory.max": "67108864\n", "memory.current": "50331648\n", "cpu.max": "50000 100000\n"}
    files["memory.stat"] = "anon 9\ninactive_file 16777216\nactive_file 5\n"
    there = groups(tmp_path, mine, {folder + name: text for name, text in files.items()})
    assert tree.free_memory(*there) == (64 * MB, 32 * MB)  # 48 used, 16 of them files that were read
    assert tree.cores(*there) == 0.5


def test_a_container_without_limits_counts_as_the_machine(tmp_path):
    files = {"memory.max": "max\n", "memory.current": "50331648\n", "cpu.max": "max 100000\n"}
    there = groups(tmp_path, "0::/\n", files)
    assert tree.free_memory(*there)[0] == psutil.virtual_memory().total
    assert tree.cores(*there) == len(os.sched_getaffinity(0))


def test_control_groups_of_version_1_are_known(tmp_path):
    files = {"memory/box/memory.limit_in_bytes": "67108864\n", "memory/box/memory.usage_in_bytes": "16777216\n"}
    files |= {"cpu,cpuacct/box/cpu.cfs_quota_us": "25000\n", "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"}
    files |= {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "99\n"}
    there = groups(tmp_path, "4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/box\n", files)
    assert tree.free_memory(*there) == (64 * MB, 48 * MB)
    assert tree.cores(*there) == 0.25


# Random actions.


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1.0, 1.0, (3,), np.float32),
        spaces.Box(-0.1, 0.1, (), np.float16),
        spaces.Box(np.array([-np.inf, 0.0, -np.inf, -3.0]), np.array([np.inf, np.inf, 1.0, -2.0]), dtype=np.float64),
        spaces.Box(np.finfo("f4").min, np.finfo("f4").max, (2,), np.float32),
        spaces.Box(0, 255, (4, 5), np.uint8),
        spaces.Box(-(2**62), 2**62, (2,), np.int64),
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[1, 0], [-1, 2]]), dtype=np.int32),
        spaces.MultiBinary([2, 3]),
        spaces.Dict(a=spaces.Tuple([spaces.Discrete(2), spaces.Box(0.0, 1.0, (2,))]), b=spaces.MultiBinary(4)),
    ],
    ids=str,
)
def test_random_actions_are_in_the_space_and_not_all_the_same(space):
    words = codec.decode(codec.encode(describe(space)))
    draw = sampler(words, np.random.default_rng(1))
    drawn = [codec.decode(codec.encode(draw())) for _ in range(200)]
    known = build_space(words)
    assert [action for action in drawn if not known.contains(action)] == []
    assert len({str(action) for action in drawn}) > 2


def test_bounded_actions_reach_over_the_whole_range():
    draw = sampler(describe(spaces.Box(-2.0, 6.0, (1000,))), np.random.default_rng(1))
    assert draw().min() < -1.9
    assert draw().max() > 5.9
    assert draw().mean() == pytest.approx(2.0, abs=0.5)


@pytest.mark.parametrize("space", [None, {"kind": "other", "text": "Graph(3)"}])
def test_actions_that_cannot_be_drawn_are_told(space):
    with pytest.raises(StartError, match=r"no action can be drawn.*(none|Graph\(3\))"):
        sampler(space, np.random.default_rng(1))


# Real workers.


def command(env, tmp_path, *arguments):
    return [
        sys.executable,
        "-m",
        "farmhand.autotune",
        env,
        "--seconds",
        "8",
        "--log-dir",
        str(tmp_path / "logs"),
        *arguments,
    ]


SURROUNDINGS = dict(os.environ, PYTHONPATH=str(ROOT))


def tune(env, tmp_path, *arguments):
    """`python -m farmhand.autotune` as a user types it."""
    return subprocess.run(
        command(env, tmp_path, *arguments),
        cwd=TESTS,
        env=SURROUNDINGS,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def tuned(env, tmp_path, *arguments):
    """(what farm.py makes of the last line, all that was printed)."""
    done = tune(env, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    line = shlex.split(done.stdout.splitlines()[-1])
    assert line[:2] == ["python", "farm.py"]
    args = farm.parse(line[2:])
    assert args.env == [env]
    assert f"recommended: {args.slots} slot" in done.stdout
    return args, done.stdout


def rows_of(said):
    """The table: (slots, steps a second) of each row."""
    rows = re.findall(r"^ +(\d+) +([\d.e+]+) +\d+ % ", said, re.MULTILINE)
    return [(int(slots), float(rate)) for slots, rate in rows]


def test_an_environment_that_sleeps_gets_more_slots_than_there_are_cores(tmp_path):
    most = 2 * max(2, int(tree.cores()))
    limit = '{"limit": 0.1}'
    args, said = tuned(
        "environments:SlowEnv", tmp_path, "--env-kwargs", limit, "--seconds", "6", "--max-slots", str(most)
    )
    assert args.slots > tree.cores()
    assert args.env_kwargs == {"limit": 0.1}
    assert "sleeps or waits most of the time" in said
    rows = rows_of(said)
    assert [slots for slots, _ in rows][:3] == [1, 2, 4]
    assert 5 < rows[0][1] < 100  # 50 ms a step: what was measured are steps of the environment


@pytest.mark.slow
def test_an_environment_that_computes_gets_about_a_slot_for_each_core(tmp_path):
    args, said = tuned("environments:BusyEnv", tmp_path)
    assert args.slots <= 2 * tree.cores()
    assert "sleeps or waits most of the time" not in said


@pytest.mark.slow
def test_memory_limits_the_slots_of_an_environment_that_takes_much(tmp_path):
    args, said = tuned("environments:HungryEnv", tmp_path, "--memory-free", "600M")
    assert args.slots == 3  # 480 MB may be used, 130 to 140 MB are needed
    assert "memory: a worker takes" in said
    assert "600 MB free (--memory-free)" in said
    assert [slots for slots, _ in rows_of(said)] == [1, 2, 3]


@pytest.mark.slow
def test_a_leak_is_seen_and_the_line_has_such_workers_replaced(tmp_path):
    kwargs = '{"length": 50, "leak": 0.2}'
    args, said = tuned(
        "environments:LeakingEnv", tmp_path, "--env-kwargs", kwargs, "--seconds", "5", "--memory-free", "1G"
    )
    grows = re.search(r"grows by (\d+) KB a step, (\d+) MB an episode", said)
    assert 150 < int(grows[1]) < 300
    assert args.recycle_memory > 40 * MB


@pytest.mark.slow
def test_an_environment_of_which_not_even_one_fits_is_told(tmp_path):
    args, said = tuned("environments:CountingEnv", tmp_path, "--seconds", "2", "--memory-free", "10M")
    assert args.slots == 1
    assert "even one worker takes" in said


@pytest.mark.slow
def test_what_time_does_not_allow_is_told(tmp_path):
    kwargs = ["--env-kwargs", '{"takes": 1.5, "at": -1}']
    args, said = tuned("environments:DyingEnv", tmp_path, *kwargs, "--seconds", "0.5")
    assert args.slots == 1
    assert "time: 2 slots were not measured within 0.5 s, and may be worth it (--seconds 10)" in said


@pytest.mark.slow
def test_slots_that_more_workers_do_not_stand_are_not_recommended(tmp_path):
    kwargs = ["--env-kwargs", '{"file": "%s"}' % (tmp_path / "taken")]
    args, said = tuned("environments:LicenceEnv", tmp_path, *kwargs, "--seconds", "5")
    assert args.slots == 2
    assert "with 4 slots environments:LicenceEnv cannot be built" in said
    assert "no licence is left" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Nothing-v0"], "no environment 'Nothing-v0'"),
        (["osim:No"], "no recipe 'osim:No' ships with this farm"),
        (["environments:Nope"], "nothing callable named 'Nope'"),
        (["environments:CountingEnv", "--python", "/no/python"], "--python /no/python does not start"),
        (["environments:RaisingEnv", "--env-kwargs", '{"at": "construct"}'], "asked to raise in the constructor"),
        (["environments:DyingEnv", "--env-kwargs", '{"at": 3}'], "exited with code 9"),
        (["environments:DyingEnv", "--env-kwargs", '{"at": "reset"}'], "exited with code 8"),
        (["environments:UnsoundEnv"], "fails with random actions"),
        (["environments:HangingEnv", "--step-timeout", "0.5"], "did not end a step within 0.5 s"),
        (
            ["environments:HangingEnv", "--env-kwargs", '{"takes": 60}', "--start-timeout", "1"],
            "was not built within 1 s",
        ),
        (["environments:CountingEnv", "--seconds", "0"], "--seconds must be more than 0"),
        (["environments:CountingEnv", "--max-slots", "0"], "--max-slots must be at least 1"),
        (["environments:CountingEnv", "--env-kwargs", "[1]"], "a JSON object is wanted"),
        (["environments:CountingEnv", "--memory-free", "much"], "a size is wanted"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_measured_is_told_and_exits_with_2(arguments, words, tmp_path):
    done = tune(arguments[0], tmp_path, *arguments[1:])
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr.partition("autotune: ")[0]
    assert done.stdout == ""


@pytest.mark.slow
def test_what_workers_have_started_ends_with_them(tmp_path):
    pids = tmp_path / "pids"
    kwargs = ["--env-kwargs", '{"pids": "%s"}' % pids]
    done = tune("environments:ParentEnv", tmp_path, *kwargs, "--step-timeout", "0.5")
    assert done.returncode == 2, done.stdout
    assert "did not end a step" in done.stderr
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) >= 2
    assert [pid for pid in started if not is_gone(pid)] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ctrl_c_in_the_middle_ends_every_worker(number, tmp_path):
    stop_in_the_middle(
        ["environments:SlowEnv", "--env-kwargs", '{"limit": 0.1}'], "measuring 2 slots", number, tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in C", "stopped"])
def test_ctrl_c_ends_a_worker_that_hangs(how, tmp_path):
    kwargs = '{"how": "%s"}' % how
    stop_in_the_middle(["environments:HangingEnv", "--env-kwargs", kwargs], "measuring one", signal.SIGINT, tmp_path)


def stop_in_the_middle(arguments, at, number, tmp_path):
    """The fixture of all tests sees what is left over; here it is the exit code and the time."""
    with subprocess.Popen(
        command(arguments[0], tmp_path, *arguments[1:]),
        cwd=TESTS,
        env=SURROUNDINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            for line in process.stderr:
                if at in line:
                    break
            poll_until(lambda: psutil.Process(process.pid).children(), START_LIMIT, "a worker")
            process.send_signal(number)
            said, complained = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    assert process.returncode == 130, complained
    assert said == ""
    assert "every worker has ended" in complained
    assert "Traceback" not in complained
