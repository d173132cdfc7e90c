"""A local farm for a benchmark, and the environments that only benchmarks need.

with local_farm("benchmarks.shared.farm:Sleeper", slots=8, folder=Path("runs/overlap")) as address: ...

Its workers import this file, in whatever Python simulates: numpy, gymnasium and the standard library, nothing else.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT, STOP_LIMIT = 180.0, 8.0  #: s


class Sleeper(gymnasium.Env):
    """Sleeps 50 ms a step; 339 floats out, 22 in, as OpenSim's L2M2019; an episode has 100 steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (339,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 1.0, (22,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._look(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time.sleep(0.05)
        self.steps += 1
        return self._look(), -float(np.square(action).mean()), False, self.steps == 100, {}

    def _look(self) -> np.ndarray:
        return self.np_random.standard_normal(339, np.float32)


class Slow(gymnasium.Wrapper):
    """Any environment, `sleep` seconds slower a step."""

    def __init__(self, env: gymnasium.Env[Any, Any], sleep: float):
        super().__init__(env)
        self.sleep = sleep

    def step(self, action: Any) -> Any:
        time.sleep(self.sleep)
        return self.env.step(action)


def slow_pendulum(sleep: float = 0.05) -> gymnasium.Env[Any, Any]:
    """Pendulum-v1 as a slow simulator."""
    return Slow(gymnasium.make("Pendulum-v1", disable_env_checker=True), sleep)


class Episodes(gymnasium.Env):
    """Sleeps `step` seconds a step and `reset` a reset; episodes of `least` to `most` steps; 339 floats out, 22 in."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (339,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 1.0, (22,), np.float32)

    def __init__(self, step: float, reset: float = 0.0, least: int = 50, most: int = 50):
        self.step_s, self.reset_s, self.least, self.most = step, reset, least, most

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        time.sleep(self.reset_s)
        self.left = int(self.np_random.integers(self.least, self.most + 1))
        return np.zeros(339, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time.sleep(self.step_s)
        self.left -= 1
        return np.zeros(339, np.float32), 0.0, False, self.left <= 0, {}


@contextlib.contextmanager
def local_farm(
    env: str,
    slots: int,
    folder: Path,
    python: str | None = None,
    kwargs: dict[str, Any] | None = None,
    options: Sequence[str] = (),
) -> Iterator[str]:
    """A farm.py of this machine, ended with the block; gives its address.

    Args:
        env: as farm.py takes it; a module is looked for from the project's root.
        slots: how many.
        folder: for the slots' logs and `farm.log`.
        python: the simulator's, this one by default.
        kwargs: of the environment's constructor.
        options: more of farm.py's.

    Raises:
        RuntimeError: it did not start; the text has the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "farm.py"), env, "--slots", str(slots), "--port", "0", "--until-eof"]
    command += ["--log-dir", str(folder.resolve() / "slots"), "--env-kwargs", json.dumps(kwargs or {}), *options]
    command += ["--python", str(Path(python).absolute())] if python else []  # absolute: the farm has another folder
    # Where a module is looked for, and where a simulator leaves what it writes (MUJOCO_LOG.TXT).
    home = ROOT if ":" in env else folder
    log = folder / "farm.log"
    with open(log, "wb") as errors:
        farm = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=home
        )
    assert farm.stdin is not None
    assert farm.stdout is not None
    patience = threading.Timer(START_LIMIT, farm.kill)
    patience.start()
    try:
        found = re.match(r"farm at (\S+?),", farm.stdout.readline())
        patience.cancel()
        if found is None:
            said = log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError("the farm of %s did not start:\n  %s" % (env, "\n  ".join(said[-12:])))
        yield found.group(1)
    finally:
        patience.cancel()
        farm.stdin.close()
        try:
            farm.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            farm.kill()
            farm.wait()
        farm.stdout.close()
