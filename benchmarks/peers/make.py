"""Makes the peers' environments, which the benchmarks beside this file measure against: python -m benchmarks.peers.make

Each is a virtual environment of its own in `.venv-peers`: SBX with Stable-Baselines3 and MuJoCo on Python 3.11 to
3.13, and keras-rl2 with the last TensorFlow it works with, which wants Python 3.8 to 3.11. Interpreters are looked for
in FARM_PYTHONS (paths, separated like PATH), on PATH, and among pyenv's versions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent / ".venv-peers"
LIMIT = 1800  #: seconds for one step; torch, jax and TensorFlow come from an index

#: name -> (Pythons, the best first; pip's arguments, one installation after the other; modules that must import)
PEERS = {
    "sbx": (
        ("3.11", "3.12", "3.13"),
        # torch comes first and pinned, so that where an index has a build without CUDA, that one stays.
        (
            ["torch==2.13.0"],
            ["sbx-rl==0.28.0", "stable-baselines3==2.9.2", "gymnasium[mujoco]==1.4.0"],
        ),
        ("sbx", "stable_baselines3", "jax", "mujoco"),
    ),
    "keras-rl2": (
        ("3.11", "3.10", "3.9", "3.8"),
        (["tensorflow==2.12.0", "keras-rl2==1.0.5", "gym==0.26.2"],),
        ("tensorflow", "rl.agents"),
    ),
    "vector": (
        ("3.11", "3.12", "3.13"),
        (
            ["torch==2.13.0"],
            ["gymnasium==1.4.0", "stable-baselines3==2.9.2", "tianshou==2.0.1", "ray==2.60.0", "psutil"]
            + ["dm-env-rpc==1.1.7", "grpcio==1.85.1"],
        ),
        ("gymnasium", "stable_baselines3", "tianshou", "ray", "dm_env_rpc", "grpc"),
    ),
    # Apart from the others, because it wants a protobuf from before 5, and so a dm-env-rpc from before 1.1.7.
    "remote-gym": (
        ("3.11", "3.12", "3.10"),
        (["remote-gym==0.7.3", "dm-env-rpc==1.1.6", "gymnasium==1.4.0"],),
        ("remote_gym",),
    ),
    # Muscles and those who step them side by side, in one Python; the pins of OpenSim are the Makefile's.
    "osim": (
        ("3.11", "3.12"),
        (
            ["torch==2.13.0"],
            ["opensim==4.6", "osim-rl==3.0.11", "numpy==2.2.6", "scipy==1.13.1", "gym==0.26.2"]
            + ["gymnasium==1.4.0", "tianshou==2.0.1", "psutil"],
        ),
        ("opensim", "osim.env", "gymnasium", "tianshou"),
    ),
}


class Missing(Exception):
    """A peer's environment is not there, or cannot be made."""


def python_of(name: str) -> str:
    """The interpreter of a peer's environment.

    Raises:
        Missing: it was not made.
    """
    python = HOME / name / "bin" / "python"
    if not (HOME / name / ".made").exists():
        raise Missing("%s is missing\n  now: python -m benchmarks.peers.make %s" % (HOME / name, name))
    return str(python)


def make(name: str) -> str:
    """Makes a peer's environment unless it is there; returns its interpreter.

    Raises:
        Missing: with the reason, and the last lines of what failed.
    """
    try:
        return python_of(name)
    except Missing:
        pass
    versions, installations, modules = PEERS[name]
    folder = HOME / name
    HOME.mkdir(exist_ok=True)
    _run([_find(versions), "-m", "venv", "--clear", str(folder)])
    python = str(folder / "bin" / "python")
    for packages in installations:
        print("%s: pip install %s" % (name, " ".join(packages)), flush=True)
        _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
    _run([python, "-c", "import " + ", ".join(modules)])
    (folder / ".made").touch()  # last: an installation that broke off is tried again
    return python


def _find(versions: tuple[str, ...]) -> str:
    for version in versions:
        for candidate in _candidates(version):
            if os.access(candidate, os.X_OK) and _version_of(candidate) == version:
                return str(candidate)
    raise Missing(
        "none of Python %s is in FARM_PYTHONS, on PATH, or among pyenv's\n  now: FARM_PYTHONS=/path/to/python%s %s"
        % (", ".join(versions), versions[0], "python -m benchmarks.peers.make")
    )


def _candidates(version: str) -> Iterator[Path]:
    yield Path(sys.executable)
    for path in filter(None, os.environ.get("FARM_PYTHONS", "").split(os.pathsep)):
        yield Path(path)
    for name in ("python" + version, "python3"):
        if found := shutil.which(name):
            yield Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
    yield from sorted((pyenv / "versions").glob("%s.*/bin/python%s" % (version, version)), reverse=True)


def _version_of(python: Path) -> str | None:
    command = [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing("%s: %s" % (" ".join(command), error)) from error
    if done.returncode:
        raise Missing("%s failed:\n%s" % (" ".join(command), "\n".join(done.stdout.strip().splitlines()[-8:])))


def main(names: list[str]) -> int:
    """Makes the named environments, or all; the exit code is 1 when one is missing, 2 for an unknown name."""
    if unknown := set(names) - set(PEERS):
        print("no such peer: %s; there are %s" % (", ".join(sorted(unknown)), ", ".join(PEERS)), file=sys.stderr)
        return 2
    missing = 0
    for name in names or PEERS:
        try:
            print("%s: %s" % (name, make(name)), flush=True)
        except Missing as error:
            missing = 1
            print("%s: %s" % (name, error), file=sys.stderr, flush=True)
    return missing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
