"""The way to a farm's port, with a tunnel where the address asks for one."""

from __future__ import annotations

from farmer.farmlist import FarmAddress
from farmer.pyro.connection import Connection
from farmer.pyro.link import PyroLink
from farmer.pyro.tunnel import Tunnel


class PyroRoute:
    """A `farmer.link.Route` over Pyro4; the tunnel of an ssh:// address lives as long as it."""

    def __init__(self, address: FarmAddress, key: bytes | None = None):
        """Opens nothing yet.

        Args:
            address: of the farmlist.
            key: the farm's; None for a farm without one.
        """
        self._address, self._key = address, key
        self._tunnel: Tunnel | None = None

    def connect(self, limit: float | None = None) -> PyroLink:
        """As `Route.connect`; `limit` is for each of connecting and the first answer."""
        if self._address.ssh is not None and self._tunnel is None:
            self._tunnel = Tunnel(self._address)
        return PyroLink(Connection(self._address, self._key, self._tunnel, limit))

    def close(self) -> None:
        """Ends the tunnel, if any."""
        tunnel, self._tunnel = self._tunnel, None
        if tunnel is not None:
            tunnel.close()
