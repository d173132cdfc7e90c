"""How long each command of a farm's workers may take: given by the farm's owner, or learnt from what they took.

The rules and figures are in `limits.py`; here is one limit for the steps and one for the resets of each environment,
and what is said about a command that took too long.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from farmhand.limits import ENOUGH_RESETS, ENOUGH_STEPS, Limits, TimeLimit
from farmhand.worker_process import WorkerProcess
from wire import protocol
from wire.fields import repeat_of


class Deadlines:
    """The time limits of one farm's environments."""

    def __init__(self, limits: Limits, names: Iterable[str], log_dir: Path):
        self.start = limits.start
        self._log_dir = log_dir
        self._step = {name: TimeLimit(limits.step, ENOUGH_STEPS) for name in names}
        self._reset = {name: TimeLimit(limits.reset, ENOUGH_RESETS) for name in self._step}

    def begin(self, worker: WorkerProcess, kind: int, body: bytes) -> None:
        """Sets the worker's deadline for a command that is about to be written."""
        if kind == protocol.STEP:
            repeat = repeat_of(body)
            worker.begin(kind, self._step[worker.env].seconds * repeat, repeat)
        else:
            rebuild = self.start if worker.rebuilds else 0.0
            worker.begin(kind, self._reset[worker.env].seconds + rebuild)

    def step_took(self, env: str, seconds: float) -> None:
        """Learns from one step."""
        self._step[env].saw(seconds)

    def reset_took(self, env: str, seconds: float) -> None:
        """Learns from one reset."""
        self._reset[env].saw(seconds)

    def typical(self) -> dict[str, float | None]:
        """Each environment's median seconds of a step, None before the first."""
        return {name: limit.typical() for name, limit in self._step.items()}

    def row(self, env: str) -> dict[str, Any]:
        """The limits in force, for `status`."""
        return {"step": self._step[env].seconds, "reset": self._reset[env].seconds, "start": self.start}

    def too_long(self, worker: WorkerProcess, state: str, steps: int) -> str:
        """What a worker with so many steps did not end in time, in words; it counts for what is learnt."""
        kind, seconds, repeat = worker.due[0]
        if kind == protocol.CONSTRUCT:
            return f"{worker.env} {self.not_built(seconds)}"
        is_step = kind == protocol.STEP
        limit = (self._step if is_step else self._reset)[worker.env]
        limit.saw(seconds / repeat)
        command = f"step {steps + 1}" if is_step else "a reset"
        if repeat > 1:
            command += f", {repeat} times the same action,"
        option = "--step-timeout" if is_step else "--reset-timeout"
        return (
            f"{worker.name()}: {command} did not end within {seconds:g} s ({limit.origin()}; {option} gives another "
            f"limit); the process was {state}"
        )

    def not_built(self, seconds: float) -> str:
        """What is said of an environment that was not built in time, without its name."""
        return (
            f"was not built within {seconds:g} s: its constructor hangs, or needs more time\n"
            f"  now: give it more with --start-timeout SECONDS, or see {self._log_dir}"
        )
