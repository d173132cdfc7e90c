"""Environments of this process as a pool: the same loop then runs in a debugger, without a farm."""

from __future__ import annotations

import copy
import inspect
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np


@dataclass
class LocalBatch:
    """See `agents.pool_api.Batch`."""

    slot: np.ndarray
    obs: list[Any]
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    lost: np.ndarray
    first: np.ndarray
    info: list[dict[str, Any]]
    env_s: np.ndarray
    trip_s: np.ndarray


class LocalPool:
    """gym (4-tuple) or gymnasium (5-tuple) environments, stepped one after the other when their action is sent."""

    def __init__(self, envs: Sequence[Any]):
        """Takes environments that stand.

        Raises:
            ValueError: there are none.
            TypeError: one has no `reset` or `step`, or is many at once.
        """
        if not len(envs):
            raise ValueError("a LocalPool wants one environment or more, not %r" % (envs,))
        for env in envs:
            refuse_vector_env(env)
            if not callable(getattr(env, "reset", None)) or not callable(getattr(env, "step", None)):
                raise TypeError(
                    "%r is no environment: wanted a gym or gymnasium environment (reset, step) or a pool (send, recv)"
                    % (env,)
                )
        self.envs = list(envs)
        self.observation_space = getattr(envs[0], "observation_space", None)
        self.action_space = getattr(envs[0], "action_space", None)
        self._rows: deque[tuple[int, Any, float, bool, bool, bool, dict[str, Any], float]] = deque()
        self._episode = [False] * len(self.envs)

    @property
    def nb_slots(self) -> int:
        return len(self.envs)

    def name_of(self, slot: int) -> str:
        return "local"

    def vacant(self, episodes: int | None = None) -> list[int]:
        waiting = {row[0] for row in self._rows}
        return [slot for slot, runs in enumerate(self._episode) if not runs and slot not in waiting][:episodes]

    def reset(self, slots: Sequence[int], seeds: Sequence[int | None] | None = None) -> None:
        for slot, seed in zip(slots, seeds or [None] * len(slots), strict=True):
            began = time.perf_counter()
            result = _reset(self.envs[slot], seed)
            seconds = time.perf_counter() - began
            has_info = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
            obs, info = result if has_info else (result, {})
            self._episode[slot] = True
            # Copied, for it may write into the same array.
            self._rows.append((slot, copy.deepcopy(obs), 0.0, False, False, True, info, seconds))

    def send(self, actions: Any, slots: Sequence[int], repeat: int = 1) -> None:
        for action, slot in zip(actions, slots, strict=True):
            total, seconds, over = 0.0, 0.0, False
            for _ in range(repeat):
                if over:
                    break
                began = time.perf_counter()
                result = self.envs[slot].step(action)
                seconds += time.perf_counter() - began
                obs, reward, terminated, truncated, info = _five(result)
                total += float(reward)
                over = terminated or truncated
            self._episode[slot] = not over
            self._rows.append((slot, copy.deepcopy(obs), total, terminated, truncated, False, info, seconds))

    def recv(self, min_ready: int = 1, timeout: float | None = 60.0) -> LocalBatch:
        if not self._rows:
            raise RuntimeError("recv with no command under way: reset or send first")
        rows = list(self._rows)
        self._rows.clear()
        slot, obs, reward, terminated, truncated, first, info, seconds = zip(*rows, strict=True)
        return LocalBatch(
            np.array(slot, np.int32),
            list(obs),
            np.array(reward, np.float32),
            np.array(terminated, bool),
            np.array(truncated, bool),
            np.zeros(len(rows), bool),
            np.array(first, bool),
            list(info),
            np.array(seconds, np.float32),
            np.array(seconds, np.float32),  # nothing travels
        )

    def abandon(self, slots: Sequence[int] | None = None) -> None:
        gone = range(len(self.envs)) if slots is None else slots
        for slot in gone:
            self._episode[slot] = False
        self._rows = deque(row for row in self._rows if row[0] not in gone)

    def status(self) -> dict[str, Any]:
        return {"slots": len(self.envs), "busy": len(self._rows), "farms": []}


def refuse_vector_env(env: Any) -> None:
    """Raises TypeError for gymnasium's batch of environments, which has the verbs of one."""
    if isinstance(env, gymnasium.vector.VectorEnv):
        raise TypeError(
            "a gymnasium VectorEnv is not taken: %s waits for all its environments, an agent for none\n"
            "  now: for many environments, a farmer.Farmer(name, farmlist) or agents.LocalPool([env, env, ...])"
            % type(env).__name__
        )


def _reset(env: Any, seed: int | None) -> Any:
    """Begins an episode; gym before 0.26 is told a seed by a method of its own, where there is one."""
    if seed is None:
        return env.reset()
    parameters = inspect.signature(env.reset).parameters.values()
    if any(p.name == "seed" or p.kind is p.VAR_KEYWORD for p in parameters):
        return env.reset(seed=seed)
    if callable(getattr(env, "seed", None)):
        env.seed(seed)
    return env.reset()


def _five(result: tuple[Any, ...]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    """gym's 4-tuple as gymnasium's 5-tuple: `done` by gym's TimeLimit is a truncation."""
    if not isinstance(result, (tuple, list)) or len(result) not in (4, 5):
        given = "%d values" % len(result) if isinstance(result, (tuple, list)) else repr(result)
        raise ValueError(
            "the environment's step returned %s\n"
            "  wanted: observation, reward, terminated, truncated, info (gymnasium), or observation, reward, done, info"
            " (gym)" % given
        )
    if len(result) == 5:
        obs, reward, terminated, truncated, info = result
        return obs, reward, bool(terminated), bool(truncated), info
    obs, reward, done, info = result
    truncated = bool(done) and bool(info.get("TimeLimit.truncated", False))
    return obs, reward, bool(done) and not truncated, truncated, info
