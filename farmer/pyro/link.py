"""A farm over Pyro4, as `farmer.link.Link` wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from farmer.farmlist import FarmAddress
from farmer.link import Command, OnLost, OnReplies
from farmer.pyro import exchange
from farmer.pyro.connection import Connection
from wire.errors import FarmError

SIDE_LIMIT = 1.0  #: s for each step of a further connection


class PyroLink:
    """One farm, one lease. Its first connection becomes the exchange's; what else is asked later has one of its own."""

    def __init__(self, connection: Connection):
        self.address: FarmAddress = connection.address
        self.lease = ""
        self._first = connection
        self._about: dict[str, Any] | None = connection.about  # what connecting brought, for the first `describe`
        self._exchange: exchange.Exchange | None = None

    def describe(self) -> dict[str, Any]:
        """As `Link.describe`."""
        about, self._about = self._about, None
        if about is not None:
            return about
        with self._connection() as connection:
            return connection.describe() if connection is self._first else connection.about

    def acquire(self, env: str, count: int) -> list[int]:
        """As `Link.acquire`."""
        with self._connection() as connection:
            leased = connection.acquire(env, count, self.lease or None)
        self.lease = leased["lease"]
        return list(leased["slots"])

    def release(self, slots: Sequence[int]) -> None:
        """As `Link.release`."""
        with self._connection() as connection:
            connection.release(self.lease, list(slots))

    def end_lease(self, lease: str) -> None:
        """As `Link.end_lease`."""
        with self._connection() as connection:
            connection.release(lease)

    def start(self, on_replies: OnReplies, on_lost: OnLost) -> None:
        """As `Link.start`."""
        self._exchange = exchange.Exchange(self._first, self.lease, on_replies, on_lost)
        self._exchange.start()

    def put(self, commands: list[Command]) -> None:
        """As `Link.put`."""
        self._started.put(commands)

    def begin(self) -> None:
        """As `Link.begin`."""
        self._started.begin()

    def want(self, everything: bool) -> None:
        """As `Link.want`."""
        self._started.want(everything)

    @staticmethod
    def fetch(links: Sequence[PyroLink], wait: float) -> bool:
        """As `Link.fetch`."""
        return exchange.fetch([link._started for link in links], wait)

    def close(self) -> None:
        """As `Link.close`."""
        if self._exchange is not None:
            self._exchange.close()
            return
        if self.lease:
            with contextlib.suppress(FarmError):  # the farm frees a lease that nobody uses by itself
                self._first.release(self.lease)
        self._first.close()

    @property
    def _started(self) -> exchange.Exchange:
        assert self._exchange is not None, "the link was not started"
        return self._exchange

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        """The first connection until the exchange has it, then one for this call alone."""
        if self._exchange is None:
            yield self._first
            return
        with contextlib.closing(self._first.another(SIDE_LIMIT)) as connection:
            yield connection
