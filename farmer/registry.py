"""Gymnasium's ids of the namespace `farm`: any environment of a farm by `gymnasium.make` and `gymnasium.make_vec`.

    gymnasium.make("farm/Pendulum-v1", farmlist=[("127.0.0.1", 1)])       # after `import farmer`
    gymnasium.make("farmer:farm/Pendulum-v1", farmlist=...)               # which gymnasium imports by itself
    gymnasium.make_vec("farm/osim.L2M2019", num_envs=8, farmlist=...)     # osim:L2M2019: a dot for the colon

The host does not know what its farms offer before it asks one, so no list of ids can be registered. Gymnasium's
registry is therefore taken over by one that holds the same entries and adds an id of ours when it is looked up.
"""

from __future__ import annotations

import re
from collections import UserDict
from typing import Any

from gymnasium.envs import registration
from gymnasium.envs.registration import EnvSpec

NAMESPACE = "farm/"


class _Registry(UserDict[str, EnvSpec]):
    """The very entries of gymnasium's registry, and any id of ours as soon as somebody asks for it."""

    def __init__(self, specs: dict[str, EnvSpec]):
        self.data = specs  # not a copy: whoever holds gymnasium's own dict sees the same

    def __missing__(self, key: str) -> EnvSpec:
        if not isinstance(key, str) or not key.startswith(NAMESPACE):
            raise KeyError(key)
        self.data[key] = _spec(key, _name_of(key))
        return self.data[key]

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's; UserDict's own would not ask `__missing__`."""
        try:
            return self[key]
        except KeyError:
            return default


def install() -> None:
    """Makes every id of the namespace known to gymnasium. Done by `import farmer`."""
    if not isinstance(registration.registry, _Registry):
        registration.registry = _Registry(registration.registry)  # type: ignore[assignment]


def spec_of(env: str, **kwargs: Any) -> EnvSpec:
    """What `gymnasium.make_vec` makes the same vector environment from again."""
    spec = _spec(NAMESPACE + re.sub(r"[^\w.-]", ".", env), env)
    spec.kwargs.update(kwargs, vectorization_mode="vector_entry_point")
    return spec


def _spec(key: str, env: str) -> EnvSpec:
    return EnvSpec(
        key,
        entry_point="farmer.env:RemoteEnv",
        vector_entry_point="farmer.vector:make_vec",
        kwargs={"env": env},
        disable_env_checker=True,  # the farm's side has its own
    )


def _name_of(key: str) -> str:
    """The name at a farm: gymnasium takes what stands before a colon for a module to import, so an id has a dot."""
    name = key.removeprefix(NAMESPACE)
    module, dot, rest = name.rpartition(".")
    return "%s:%s" % (module, rest) if dot and ":" not in name else name
