"""Other Pythons, each with numpy, for workers to run in.

    python tests/interpreters.py            # make all of them beforehand
    python_with_numpy("2.7")                # in a test: the path, or a skip that says why

An interpreter is looked for in FARM_PYTHONS (paths, separated like PATH), on PATH (python2.7, python3.6, ...), and
among pyenv's versions. Its virtual environment is kept in `.interpreters/X.Y` in the project's root.
"""

import os
import pathlib
import shutil
import subprocess
import sys

VERSIONS = ("2.7", "3.6", "3.8", "3.11", "3.13")
#: Real gyms to test the adapters against, each in a Python of its age.
GYMS = {"gym==0.21.0": "3.8", "gym==0.26.2": "3.8"}
HOME = pathlib.Path(__file__).resolve().parent.parent / ".interpreters"
LIMIT = 600  #: seconds for one step of making an environment; numpy comes from an index

_failures = {}  # version -> why, so that one run tries only once


class Missing(Exception):
    """No interpreter of a version, or no way to make an environment of it."""


def find(version):
    """The path of an interpreter of this version, without numpy.

    Raises:
        Missing: there is none; the text says where it was looked for.
    """
    for candidate in _candidates(version):
        if os.access(candidate, os.X_OK) and _version_of(candidate) == version:
            return str(candidate)
    raise Missing(
        f"no Python {version} in FARM_PYTHONS, on PATH, or under {_pyenv()}: set FARM_PYTHONS=/path/to/python{version}"
    )


def python_with_numpy(version):
    """The path of a Python of this version that has numpy; skips the test when there is no way to one."""
    import pytest

    try:
        return make(version)
    except Missing as missing:
        pytest.skip(str(missing))


def python_with_gym(requirement):
    """The path of a Python that has this gym of `GYMS`; skips the test when there is no way to one."""
    import pytest

    try:
        return make(GYMS[requirement], requirement)
    except Missing as missing:
        pytest.skip(str(missing))


def make(version, gym=""):
    """Makes the virtual environment, unless it is there; returns its Python.

    Args:
        version: of Python, like "3.8".
        gym: a key of `GYMS` to install as well, into an environment apart.

    Raises:
        Missing: with the reason, and the last lines of what failed.
    """
    name = gym.replace("==", "-") or version
    if name in _failures:
        raise _failures[name]
    try:
        return _make(version, name, gym)
    except Missing as missing:
        _failures[name] = missing
        raise


def _make(version, name, gym):
    folder = HOME / name
    python = folder / "bin" / "python"
    if _imports(python, "gym" if gym else "numpy"):
        return str(python)
    source = find(version)
    HOME.mkdir(exist_ok=True)
    if version.startswith("2."):
        _run([sys.executable, "-m", "virtualenv", "--quiet", "-p", source, str(folder)])  # Python 2 has no venv
    else:
        _run([source, "-m", "venv", "--clear", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--only-binary", "numpy", "numpy"])
    if gym:
        _run([*pip, gym])
    return str(python)


def _candidates(version):
    for path in os.environ.get("FARM_PYTHONS", "").split(os.pathsep):
        if path:
            yield pathlib.Path(path)
    for name in (f"python{version}", f"python{version[0]}", "python"):
        found = shutil.which(name)
        if found:
            yield pathlib.Path(found)
    yield from sorted((_pyenv() / "versions").glob(f"{version}.*/bin/python{version}"), reverse=True)


def _pyenv():
    return pathlib.Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()


def _version_of(python):
    return _output([str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])


def _imports(python, module):
    return python.exists() and _output([str(python), "-c", f"import {module}; print('yes')"]) == "yes"


def _output(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _run(command):
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise Missing(f"{' '.join(command)} failed: {' | '.join(done.stdout.strip().splitlines()[-3:])}")


def main():
    """Makes all environments; the exit code is 1 when one is missing."""
    missing = 0
    for version, gym in [(version, "") for version in VERSIONS] + [(version, gym) for gym, version in GYMS.items()]:
        try:
            print(f"{version} {gym}: {make(version, gym)}")
        except Missing as error:
            missing = 1
            print(f"{version} {gym}: {error}")
    return missing


if __name__ == "__main__":
    sys.exit(main())
