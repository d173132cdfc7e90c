"""Which implementation of a link leads to an address: by its scheme."""

from __future__ import annotations

from collections.abc import Callable

from farmer.farmlist import FarmAddress
from farmer.link import Route
from farmer.local import LocalRoute
from farmer.pyro.route import PyroRoute

#: Makes the route to a farm of an environment: (address, environment, key).
RouteFactory = Callable[[FarmAddress, str, "bytes | None"], Route]

#: By `FarmAddress.scheme`. A new transport is a module with a Route and a Link, and a line here.
ROUTES: dict[str, RouteFactory] = {
    "pyro": lambda address, env, key: PyroRoute(address, key),
    "ssh": lambda address, env, key: PyroRoute(address, key),
    "local": lambda address, env, key: LocalRoute(address, env),
}


def route_to(address: FarmAddress, env: str, key: bytes | None) -> Route:
    """The route to a farm; touches nothing yet."""
    return ROUTES[address.scheme](address, env, key)
