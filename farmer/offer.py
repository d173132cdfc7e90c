"""What all farms of a pool must offer alike: the environment, with the spaces of the first farm."""

from __future__ import annotations

import math
from typing import Any

import gymnasium

from farmer.farmlist import FarmAddress
from farmer.spaces import build_space
from wire import codec
from wire.errors import FarmLost, FarmRefused, NoSuchEnvironment
from wire.names import not_offered


class Offer:
    """The environment that a pool is made of; the first farm that is checked settles its spaces.

    Attributes:
        ready: the first farm's READY body, decoded; None before.
        spaces: (observations, actions) of it.
    """

    def __init__(self, env: str):
        self.env = env
        self.ready: dict[str, Any] | None = None
        self.spaces: tuple[gymnasium.Space[Any] | None, gymnasium.Space[Any] | None] = (None, None)

    def check(self, address: FarmAddress, about: dict[str, Any]) -> None:
        """What a farm says it has is what this pool is for; asked before anything is leased.

        Raises:
            NoSuchEnvironment: it has no environment of that name.
            FarmLost: its description cannot be read.
            FarmRefused: its spaces differ from those of the first farm.
        """
        if self.env not in about["envs"]:
            raise NoSuchEnvironment(f"the farm at {address}: {not_offered(self.env, list(about['envs']))}")
        try:
            ready = codec.decode(about["envs"][self.env])
            spaces = build_space(ready["observation_space"]), build_space(ready["action_space"])
        except (codec.CodecError, KeyError, TypeError) as error:
            raise FarmLost(f"the farm at {address} described its environment badly: {error!r}") from None
        if self.ready is None:
            self.ready, self.spaces = ready, spaces
        elif spaces != self.spaces:
            raise FarmRefused(
                f"{self.env} at {address} has other spaces than on the first farm: {spaces} instead of {self.spaces}\n"
                "  now: give both the same version of the environment, and the same arguments"
            )

    def step_s(self, about: dict[str, Any]) -> float | None:
        """Seconds a step as a farm reports them; None where it has not seen any."""
        try:
            seconds = float(about["paces"][self.env])
        except (KeyError, TypeError, ValueError):
            return None
        return seconds if 0 < seconds < math.inf else None
