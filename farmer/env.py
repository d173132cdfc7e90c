"""One remote environment as a `gymnasium.Env`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import Any, NoReturn

import gymnasium
from gymnasium.error import ClosedEnvironmentError

from farmer.arguments import refuse_unknown
from farmer.batch import Row
from farmer.pool import Farmer
from wire.errors import BadSlot, EnvironmentFault, NothingSent


class RemoteEnv(gymnasium.Env[Any, Any]):
    """An environment that runs on a farm: the fastest one of the list, of equally fast ones the largest.

    Observations, rewards and infos arrive just as the environment gave them.
    """

    def __init__(
        self,
        env: str,
        farmlist: str | os.PathLike[str] | Iterable[Any] = "farmlist.py",
        timeout: float = 600.0,
        key_file: str | os.PathLike[str] | None = None,
        render_mode: None = None,
        **unknown: NoReturn,
    ):
        """Leases one slot; raises as `Farmer` does.

        Args:
            env: a name from the farms' catalogs.
            farmlist: path of a farmlist.py, or pairs of (address, slots).
            timeout: seconds that one reset or step may take.
            key_file: the farms' key, as for `Farmer`.
            render_mode: a farm sends no pictures, so there is none but None.
        """
        refuse_unknown("RemoteEnv", unknown)
        if render_mode is not None:
            raise TypeError("render_mode=%r: a farm sends no pictures" % render_mode)
        self._farmer = Farmer(env, farmlist, slots=1, key_file=key_file)
        self._closing = weakref.finalize(
            self, self._farmer.close
        )  # who forgets `close` gives the slot back all the same
        self._timeout = timeout
        self.observation_space = self._farmer.observation_space  # type: ignore[assignment]
        self.action_space = self._farmer.action_space  # type: ignore[assignment]
        self.metadata = self._farmer.metadata

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode.

        Raises:
            ClosedEnvironmentError: after `close`.
            EnvironmentFault: it raised, or its worker died; reset again to go on.
            FarmTimeout: it did not answer within the limit.
        """
        self._check_open()
        super().reset(seed=seed)  # gymnasium's own generator, for wrappers; the environment gets the seed on its farm
        self._farmer.abandon()
        while not self._farmer.vacant():
            try:
                self._farmer.collect(1, self._timeout)
            except NothingSent:  # what was under way came back just now
                if not self._farmer.vacant():
                    raise
        self._farmer.reset([0], [seed], options)
        row = self._one(self._farmer.collect(1, self._timeout))
        return row.obs, row.info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step.

        Raises:
            ClosedEnvironmentError: after `close`.
            BadAction: a wrong shape or NaN; nothing was sent.
            EnvironmentFault: it raised, or its worker died; the step is no transition, reset to go on.
            FarmTimeout: it did not answer within the limit; its late answer is nobody's.
        """
        self._check_open()
        row = self._one(self._farmer.call(action, 0, self._timeout))
        return row.obs, row.reward, row.terminated, row.truncated, row.info

    def render(self) -> None:
        """A farm sends no pictures."""
        raise NotImplementedError("a farm's environment is not rendered here: render_mode is None")

    def _check_open(self) -> None:
        if not self._closing.alive:
            raise ClosedEnvironmentError("the environment %s is closed: make a new one" % self._farmer.env)

    def _one(self, rows: list[Row]) -> Row:
        if not rows:
            raise BadSlot("the slot came back without an answer; reset to go on")
        if rows[0].lost:
            raise EnvironmentFault(rows[0].info["lost"])
        return rows[0]

    def close(self) -> None:
        """Frees the slot."""
        self._closing()
