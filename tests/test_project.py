"""The shape of the project: names that others rely on, and imports that point one way.

Each direction is proven twice: by reading every import statement, and by importing in a fresh interpreter.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

LEARNER = {"tensorflow", "keras", "rl"}
OURS = {"agents", "session", "farm", "farmer", "farmhand", "simulators", "train", "wire"}
# Imports what is in no environment but its own; tests/test_sb3.py runs it there.
ELSEWHERE = {ROOT / "farmer" / "sb3.py"}
# What a module imports that talks to another process or machine.
OUTSIDE = {"Pyro4", "asyncio", "ctypes", "multiprocessing", "psutil", "select", "selectors", "signal", "socket"} | {
    "socketserver",
    "ssl",
    "subprocess",
    "threading",
}


class Rule(NamedTuple):
    files: list[str]  # patterns from the root
    never: set[str]  # top-level modules, or dotted ones of ours
    but: tuple[str, ...] = ()  # patterns that are not meant


RULES = {
    "farmhand knows no learner and no host": Rule(
        ["farmhand/**/*.py", "farm.py"], LEARNER | {"farmer", "agents", "session", "train"}
    ),
    "farmer knows no farm machine and no learner": Rule(
        ["farmer/**/*.py"],
        LEARNER | {"farmhand", "agents", "session", "train", "farm"},
        but=("farmer/local.py",),  # a farm in the farmer's own process, imported when one is made
    ),
    "the farmer knows Pyro4 in one folder": Rule(["farmer/**/*.py"], {"Pyro4", "msgpack"}, but=("farmer/pyro/*.py",)),
    "a local farm knows no learner": Rule(["farmer/local.py"], LEARNER | {"agents", "session", "train", "farm"}),
    "wire knows neither side": Rule(["wire/**/*.py"], LEARNER | (OURS - {"wire"})),
    "agents know no wire": Rule(
        ["agents/**/*.py"], {"Pyro4", "wire", "farmhand", "farm", "farmer", "session", "train"}
    ),
    "recipes are data, and read nothing of ours": Rule(["simulators/**/*.py"], OURS | LEARNER | {"Pyro4"}),
    "slots, balance and codec know no network and no process": Rule(
        ["farmhand/slots.py", "farmer/balance.py", "farmer/ledger.py", "wire/codec.py"], OUTSIDE
    ),
}


def files_of(rule: Rule) -> list[pathlib.Path]:
    found = {path for pattern in rule.files for path in ROOT.glob(pattern)}
    return sorted(found - {path for pattern in rule.but for path in ROOT.glob(pattern)})


def imported_by(source: str) -> set[str]:
    """Every module that a source names in an import, wherever it stands; `a.b` counts as `a` and as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names | {name.partition(".")[0] for name in names}


def loaded_with(modules: list[str], *, isolated: list[pathlib.Path] | None = None) -> set[str]:
    """The top-level modules that a fresh interpreter holds after these imports.

    Args:
        isolated: these folders alone, and site-packages, are searched; None is the project's root.
    """
    paths = [str(path) for path in isolated or [ROOT]]
    code = (
        f"import sys, importlib; sys.path[:0] = {paths!r}; before = set(sys.modules)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def dotted(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize(
    "name", ["farm.py", "farmer", "agents", "farmlist.example.py", "tests", "environment.yml", "README.md"]
)
def test_a_promised_name_is_there(name):
    assert (ROOT / name).exists()


def test_no_package_takes_a_name_of_osim_rl_or_keras_rl():
    assert not [name for name in ("envs", "rl", "osim") if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()]


@pytest.mark.parametrize("name", RULES)
def test_no_import_statement_points_the_wrong_way(name):
    rule = RULES[name]
    files = files_of(rule)
    assert files, f"no file matches {rule.files}: was it renamed?"
    wrong = {str(path.relative_to(ROOT)): imported_by(path.read_text()) & rule.never for path in files}
    assert not {path: found for path, found in wrong.items() if found}


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("farmhand", LEARNER | {"farmer", "agents"}),
        ("farmer", LEARNER | {"farmhand", "agents"}),
        ("wire", LEARNER | {"farmer", "farmhand", "agents"}),
        ("simulators", OURS - {"simulators"}),
        pytest.param("agents", {"Pyro4", "wire", "farmhand", "farmer"}, marks=pytest.mark.slow),
    ],
)
def test_a_package_imports_nothing_forbidden_when_run(package, never):
    # The worker's modules and the recipes are written for another interpreter's path; they have tests of their own.
    files = [
        path
        for path in sorted((ROOT / package).glob("*.py"))
        if path.stem != "__main__" and (package != "simulators" or path.stem == "__init__") and path not in ELSEWHERE
    ]
    assert files
    loaded = loaded_with([dotted(path) for path in files])
    assert package in loaded
    assert not loaded & never


def test_farm_py_starts_without_a_learner():
    loaded = loaded_with(["farm"])
    assert "farm" in loaded
    assert not loaded & (LEARNER | {"farmer", "agents"})


def test_train_py_reads_its_options_before_it_waits_for_a_learner():
    loaded = loaded_with(["train"])
    assert "train" in loaded
    assert not loaded & (LEARNER | {"farmer", "agents"})


def test_the_worker_and_the_codec_need_numpy_alone():
    folders = [ROOT / "farmhand" / "worker", ROOT / "wire"]
    own = {path.stem for folder in folders for path in folder.glob("*.py")}
    allowed = set(sys.stdlib_module_names) | {"numpy", "imp"} | own  # imp: of Python 2
    files = [*(ROOT / "farmhand" / "worker").glob("*.py"), ROOT / "wire" / "codec.py", ROOT / "wire" / "protocol.py"]
    named = {str(path.relative_to(ROOT)): {n for n in imported_by(path.read_text()) if "." not in n} for path in files}
    assert not {path: names - allowed for path, names in named.items() if names - allowed}
    modules = [path.stem for path in files if not path.stem.startswith("__")]
    loaded = loaded_with(modules, isolated=folders)
    assert set(modules) <= loaded
    assert not {name for name in loaded - allowed if not name.startswith("_")}


@pytest.mark.parametrize(
    "source",
    [
        "import rl.core",
        "from tensorflow import keras",
        "def f():\n    import keras.layers as k",
        "if TYPE_CHECKING:\n    from rl import x",
        "try:\n    import a, rl\nexcept ImportError:\n    pass",
    ],
)
def test_the_reading_of_imports_sees_each_form(source):
    assert imported_by(source) & LEARNER


def test_packages_in_pyproject_are_those_in_the_tree():
    try:
        import tomllib
    except ImportError:  # Python 3.10
        pytest.skip("needs tomllib, of Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        ".".join(path.parent.relative_to(ROOT).parts) for name in OURS for path in ROOT.glob(f"{name}/**/__init__.py")
    }
    assert set(listed["packages"]) == there
    for module in listed["py-modules"]:
        assert (ROOT / f"{module}.py").exists()


def test_the_osim_pins_are_the_same_in_every_file():
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("OSIM_PINS :="))
    conda = (ROOT / "environment.osim.yml").read_text()
    pins = line.split(":=")[1].split()
    assert len(pins) == 5
    assert [pin for pin in pins if f"- {pin}\n" not in conda] == []
