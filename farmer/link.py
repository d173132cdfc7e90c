"""The contract of a link: the farmer's way to one farm.

A farm may be reached by Pyro4 (`farmer/pyro/`), be in this process (`farmer/local.py`), or be reached by something that
another implementation brings. The farmer knows this file alone; `farmer/routes.py` chooses the implementation by the
address. `tests/test_link_conformance.py` holds every implementation to what stands here.

    route = routes.route_to(address, env, key)      one for each farm of the farmlist, as long as it is listed
    link = route.connect(limit)                     one for each time that the farm is joined
    link.acquire("Pendulum-v1", 4)                  the lease is the link's own
    link.start(on_replies, on_lost)
    link.put(commands); link.begin()                replies arrive by on_replies
    link.close()                                    the lease ends with the link

What every link promises:

- **Order.** Commands of one slot arrive in the order in which they were put. Nothing is promised between slots.
- **Nothing twice.** A command that was put is handed to the farm once, or never. When a connection breaks, the link
  asks the farm what became of each command (`protocol.ASK`); it never sends a command again.
- **One answer.** `on_replies` brings one reply for each command: what the farm answered, or a LOST with the reason.
  After `on_lost` no more replies come, and every command without one is lost.
- **No barrier.** A command reaches the farm at once, also while a slower slot of the same farm computes.
- **Heartbeat.** The farm frees a lease without a sign of its link. The link calls `on_lost` when the farm gives none.
- **Ctrl-C.** KeyboardInterrupt may be raised in `put`, `begin` and `fetch` at any instant. The link survives it, and
  what was under way is answered.

Callbacks come from any thread, one at a time for one slot, and may call `put`. They do not block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from farmer.farmlist import FarmAddress
from wire.errors import FarmError

Command = list[Any]  #: [slot, seq, kind, body]; slot is the farm's number
Reply = list[Any]  #: [slot, seq, kind, flags, body, crc]; crc is for `codec.decode`, of a large body
OnReplies = Callable[[list[Reply]], None]
OnLost = Callable[[FarmError], None]


class Link(Protocol):
    """The way to one farm, with one lease."""

    @property
    def address(self) -> FarmAddress:
        """The farm's."""

    @property
    def lease(self) -> str:
        """Names the lease to the farm; empty before the first `acquire`."""

    def describe(self) -> dict[str, Any]:
        """What the farm offers now: "slots", "free", "envs" (name: READY body), "paces" (name: seconds a step).

        Raises:
            FarmError: the farm gives no answer.
        """

    def acquire(self, env: str, count: int) -> list[int]:
        """Leases slots that run `env`; a second call adds to the lease until it has `count`. All numbers it has.

        Raises:
            NoSuchEnvironment: the farm does not offer it.
            NoFreeSlot: it has not so many.
            FarmError: no answer, or the lease is gone.
        """

    def release(self, slots: Sequence[int]) -> None:
        """Takes slots out of the lease.

        Raises:
            FarmError: no answer.
        """

    def end_lease(self, lease: str) -> None:
        """Ends an earlier link's lease on the same farm, if the farm still has it.

        Raises:
            FarmError: no answer.
        """

    def start(self, on_replies: OnReplies, on_lost: OnLost) -> None:
        """From now on commands may be put. `on_lost` is called once at most."""

    def put(self, commands: list[Command]) -> None:
        """Queues commands; waits for nothing. `begin` or `fetch` is called next."""

    def begin(self) -> None:
        """Has what is queued sent at once; waits for nothing."""

    def want(self, everything: bool) -> None:
        """A hint: whether the caller waits for all replies under way, or for the first ones."""

    @staticmethod
    def fetch(links: Sequence[Any], wait: float) -> bool:
        """Takes replies in the caller's thread, of links of this class, until some came or `wait` seconds are over.

        Returns:
            False at once when this class (or each of these links just now) brings replies by threads of its own.
        """

    def close(self) -> None:
        """Ends the lease and all threads, within a few seconds; `on_lost` is not called."""


class Route(Protocol):
    """What stays of the way to one farm while links come and go."""

    def connect(self, limit: float | None = None) -> Link:
        """A link to the farm, which answered.

        Args:
            limit: seconds for each step of it; None: the implementation's own.

        Raises:
            FarmUnreachable: no farm answered.
            FarmRefused, ProtocolMismatch: a farm that does not take this host.
        """

    def close(self) -> None:
        """Ends what it holds."""


def fetch(links: Sequence[Link], wait: float) -> bool:
    """`Link.fetch` over links of any classes; with more than one class, replies come by the links' own threads."""
    classes = {type(link) for link in links}
    return len(classes) == 1 and classes.pop().fetch(links, wait)
