"""Every block of README.md is run as it stands there, but for addresses, paths and numbers that a test must choose.

Above each block stands an HTML comment: `run: NAME` has a test here, `dry run` is tried with `make -n`, and
`not run: WHY` is read for its syntax only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import pexpect
import pytest
from farms import running_farm
from interpreters import python_with_numpy

from farmer.farmlist import load_farmlist
from farmhand import slots
from wire import protocol
from wire.auth import load_key

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
OSIM = ROOT / ".venv-osim" / "bin" / "python"


class Block(NamedTuple):
    how: str  # run, dry run, not run
    name: str
    language: str
    text: str


BLOCKS = [
    Block(*found)
    for found in re.findall(
        r"^<!-- (run|dry run|not run): (.+?) -->\n```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
    )
]


def block(name: str) -> str:
    """The text of the block that is marked `run: name`."""
    found = [one.text for one in BLOCKS if one.name == name]
    assert len(found) == 1, f"{len(found)} blocks are named {name!r}"
    return found[0]


def replaced(text: str, **changes: str) -> str:
    """A block with the test's own values; each must stand in the block."""
    for old, new in changes.items():
        assert old in text, f"{old!r} is not in the block:\n{text}"
        text = text.replace(old, new)
    return text


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The working directory: a folder that looks like the project, in which nothing is left in the real one."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("runs", "logs", "farmlist.py", ".venv", "__pycache__", ".git"):
            (folder / path.name).symlink_to(path)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return folder


@contextlib.contextmanager
def farm_of(line: str):
    """Runs a `python farm.py ...` line on a free port; gives its address."""
    line = line.strip() + " --port 0 --log-dir logs"
    process = subprocess.Popen(
        ["bash", "-c", "exec " + line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said = process.stdout.readline()
        if not said.startswith("farm at "):
            process.kill()
            pytest.fail(process.stderr.read(), pytrace=False)
        yield said.split()[2].rstrip(",")
    finally:
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err


def shell(text: str, limit: float = 100) -> str:
    """Runs a block in bash; returns what it said. It must succeed."""
    done = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def at_the_prompt(command: str, lines: list[str]) -> str:
    """Starts the session of a block in a terminal, types lines, leaves; returns all that was said."""
    command = replaced(
        command.strip(), **{"ipython ": f"{sys.executable} -m IPython --simple-prompt --colors NoColor "}
    )
    surroundings = dict(os.environ, TERM="dumb")
    child = pexpect.spawn(
        shlex.split(command)[0], shlex.split(command)[1:], env=surroundings, timeout=60, encoding="utf-8"
    )
    said = []
    try:
        for line in [*lines, "exit"]:
            child.expect(r"In \[\d+\]: ")
            said.append(child.before)
            child.sendline(line)
        child.expect(pexpect.EOF)
        said.append(child.before)
    finally:
        child.close(force=True)
    return "".join(said)


# Which blocks there are.


def test_every_block_is_marked():
    assert len(BLOCKS) == README.count("\n```") / 2
    assert len(BLOCKS) > 10


def test_every_block_that_is_to_be_run_has_a_test():
    source = pathlib.Path(__file__).read_text()
    named = [one.name for one in BLOCKS if one.how != "not run"]
    assert len(named) == len(set(named))
    assert [name for name in named if f'block("{name}")' not in source] == []


@pytest.mark.parametrize("one", [one for one in BLOCKS if one.how == "not run"], ids=lambda one: one.name)
def test_a_block_for_another_machine_is_at_least_well_formed(one):
    assert one.language == "bash"
    done = subprocess.run(["bash", "-n", "-c", one.text], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0, done.stderr


# The session of the first screen.


@pytest.mark.slow
def test_the_installation_makes_both_commands(tmp_path, monkeypatch):
    """The packages themselves are left out: `make` installs them for every other test."""
    folder = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "logs", "*.egg-info", "build")
    shutil.copytree(ROOT, folder, ignore=ignored)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PIP_NO_DEPS", "1")
    monkeypatch.setenv("PIP_QUIET", "1")
    shell(replaced(block("install"), python3=sys.executable))
    assert (folder / ".venv" / "bin" / "farm").exists()
    assert (folder / ".venv" / "bin" / "farm-train").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_the_session_of_the_first_screen(checkout):
    with farm_of(block("farm")) as address:
        (checkout / "farmlist.py").write_text(replaced(block("farmlist"), **{"127.0.0.1": address}))
        lines = replaced(block("prompt"), **{"100)": "2)", "5)": "1)"}).splitlines()
        said = at_the_prompt(block("session"), lines)
        assert "local farm" not in said
    assert "ddpg on Pendulum-v1, 4 slots" in said
    assert "mean return of the last 2 episodes" in said
    assert "test: mean return" in said
    assert (checkout / "runs/Pendulum-v1/returns.png").exists()
    assert list((checkout / "runs/Pendulum-v1/checkpoint").glob("save-*/manifest.json"))
    assert "4 of 4 slots" in said
    assert "Error" not in said


@pytest.mark.slow
def test_the_same_without_a_prompt(checkout):
    said = shell(replaced(block("unattended"), **{"--episodes 100": "--episodes 2 --slots 2"}))
    assert "starting a local farm" in said
    assert "mean return of the last 2 episodes" in said


def test_the_names_at_the_prompt_are_those_of_the_table():
    from session import ending
    from session.options import Options

    table = README.partition("## At the prompt")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)(?:\(n?\))?`", table.partition("`python train.py")[0]))
    verbs = set(
        re.findall(r"one\.(\w+)", re.search(r"verbs = \((.*?)\)", pathlib.Path(ending.__file__).read_text())[1])
    )
    assert verbs | {"agent", "farmer", "session"} == named
    options = set(re.findall(r"`--(\w+)`", table))
    assert options <= set(Options.__dataclass_fields__)


def test_the_farmlist_with_a_tunnel_loads(tmp_path):
    path = tmp_path / "farmlist.py"
    path.write_text(block("two farms"))
    assert [str(farm) for farm in load_farmlist(path)] == ["127.0.0.1:20099", "ssh://user@192.168.1.33"]
    assert [farm.slots for farm in load_farmlist(path)] == [4, 8]
    path.write_text(block("farmlist"))
    assert [farm.slots for farm in load_farmlist(path)] == [4]


def test_a_key_is_made_as_the_readme_says(tmp_path):
    (line,) = block("key").splitlines()
    python, script, *rest = shlex.split(line)
    assert (python, script) == ("python", "farm.py")
    subprocess.run(
        [sys.executable, str(ROOT / script), *rest], cwd=tmp_path, check=True, timeout=100, capture_output=True
    )
    assert len(load_key(tmp_path / "farm.key")) == 64


# Simulators in other Pythons.


@pytest.mark.slow
@pytest.mark.osim
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_opensim_is_only_a_path(checkout):
    if not OSIM.exists():
        pytest.fail(f"no OpenSim environment at {OSIM}: run `make osim` (or leave these out: -m 'not osim')")
    make, farm = block("osim").strip().splitlines()
    shell(replaced(make, make="make -n"))  # it was run to get here
    with farm_of(farm) as address:
        (checkout / "farmlist.py").write_text(f"farmlist_base = [({address!r}, 2)]\n")
        said = at_the_prompt(
            block("osim train"),
            [
                "r(2)",
                "print(farmer.observation_space.shape, farmer.action_space.shape)",
                "print(agent.n_step, agent.budget.ratio, any('normalization' in layer.name for layer in agent.layers))",
            ],
        )
    assert "mean return of the last 2 episodes" in said
    assert "(339,) (22,)" in said
    assert "3 2.0 True" in said  # the options have come to the agent


@pytest.mark.slow
def test_python_2_7_is_only_a_path(checkout):
    (checkout / "old_sim.py").write_text(block("old_sim.py"))
    old = python_with_numpy("2.7")
    with farm_of(replaced(block("old python"), **{"/path/to/python2.7": old})) as address:
        (checkout / "farmlist.py").write_text(f"farmlist_base = [({address!r}, 2)]\n")
        said = shell(replaced(block("old python train"), **{"100": "4"}))
    assert "mean return of the last 4 episodes" in said


def test_the_simulator_for_python_2_7_stops_at_its_time_limit(tmp_path):
    path = tmp_path / "old_sim.py"
    path.write_text(block("old_sim.py"))
    spec = importlib.util.spec_from_file_location("old_sim_of_the_readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    env = module.Track()
    env.reset()
    ends = [env.step([0.1])[2] for _ in range(50)]
    assert ends == [False] * 49 + [True]


# The other ways in.


@pytest.mark.slow
def test_keras_rls_example(checkout, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # as `pip install -e .` does
    said = shell(replaced(block("keras-rl"), **{"20000": "400"}))
    assert "Testing for 3 episodes" in said


@pytest.mark.slow
def test_the_pool_and_one_slot_in_a_few_lines(checkout):
    with running_farm("Pendulum-v1", slots=4) as farm:
        pool = replaced(block("pool"), **{"127.0.0.1": farm.address})
        assert len([line for line in pool.splitlines() if line.strip()]) <= 8
        exec(compile(pool, "README.md: pool", "exec"), {})
        vector = replaced(block("vector"), **{"127.0.0.1": farm.address, "1000": "40"})
        found: dict[str, object] = {}
        exec(compile(vector, "README.md: vector", "exec"), found)
        assert found["observations"].shape == (4, 3)
        assert found["envs"].closed
        slot = replaced(block("one slot"), **{"127.0.0.1:20099": farm.address})
        names: dict[str, object] = {}
        exec(compile(slot, "README.md: one slot", "exec"), names)
        assert len(names["observation"]) == 3
        assert names["reward"] < 0


def test_the_make_targets_exist():
    for line in block("development").strip().splitlines():
        command = line.partition("#")[0].split()
        done = subprocess.run(
            ["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr


# docs/architecture.md and docs/protocol.md


def test_the_map_names_every_file_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = text.partition("## Map")[2].partition("\nThe locks")[0]
    named = set(re.findall(r"\b(\w+\.py)\b", drawn))
    folders = ["agents", "farmer", "farmhand", "session", "wire"]
    ours = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")} - {"__init__.py"}
    assert named == ours | {"farm.py", "train.py"}


def test_the_protocol_page_has_the_commands_and_states_that_there_are():
    text = (ROOT / "docs" / "protocol.md").read_text()
    table = text.partition("## Commands and replies")[2].partition("\n- ")[0]
    assert set(re.findall(r"\b[A-Z]{3,}\b", table)) == {name.upper() for name in protocol.NAMES.values()}

    diagram = re.search(r"    EMPTY -.*?\n\n", text, re.DOTALL)[0]
    assert diagram in slots.__doc__
    assert {state.name for state in slots.State} == set(re.findall(r"\b[A-Z]{4,}\b", diagram))
