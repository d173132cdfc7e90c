"""One farm over Pyro4: the only file of the host's side that knows Pyro4.

A farm is four verbs: describe, acquire, exchange, release. Another engine can stand behind them without a change
elsewhere.
"""

from __future__ import annotations

import time
from typing import Any

import Pyro4
import Pyro4.errors

from farmer.farmlist import FarmAddress
from wire import protocol
from wire.errors import FarmError, FarmLost, FarmTimeout, FarmUnreachable, MessageDamaged, ProtocolMismatch, from_wire

CONNECT_LIMIT = 5.0  #: s for connecting and for the first answer, unless the caller says otherwise
ANSWER_LIMIT = 3.0  #: s without an answer, after which a call fails
EXCHANGE_LIMIT = 8.0  #: the same for an exchange, unless the caller says otherwise: more than the longest wait


def _configure() -> None:
    Pyro4.config.SERIALIZER = "msgpack"
    Pyro4.config.SERIALIZERS_ACCEPTED = {"msgpack"}
    Pyro4.config.MAX_MESSAGE_SIZE = protocol.MAX_BODY
    Pyro4.config.SOCK_NODELAY = True


class Connection:
    """One TCP connection to one farm. For one thread at a time."""

    def __init__(self, address: FarmAddress, limit: float | None = None):
        """Connects and checks that a farm of our protocol answers.

        Args:
            address: where.
            limit: seconds for each of connecting and the first answer; None: CONNECT_LIMIT.

        Raises:
            FarmUnreachable: nothing answers there, or something that is no farm.
            ProtocolMismatch: a farm of another version.
        """
        _configure()
        self.address = address
        self._proxy = Pyro4.Proxy("PYRO:farm@%s" % address)
        self._proxy._pyroTimeout = CONNECT_LIMIT if limit is None else limit
        started = time.monotonic()
        try:
            self.about = self.describe()
        except FarmError as error:
            self.close()
            raise _unreachable(address, error.__cause__ or error, time.monotonic() - started) from None
        if self.about.get("protocol") != protocol.VERSION:
            self.close()
            raise ProtocolMismatch(
                "the farm at %s speaks protocol %s, this host %d\n  now: bring both to the same version of this project"
                % (address, self.about.get("protocol"), protocol.VERSION)
            )
        self._proxy._pyroTimeout = ANSWER_LIMIT

    def another(self, limit: float | None = None) -> Connection:
        """One more connection to the same farm; arguments and errors as of the first."""
        return Connection(self.address, limit)

    def describe(self) -> dict[str, Any]:
        """Protocol, identity, slots, free slots, environments with their spaces."""
        return self._call("describe")

    def acquire(self, env: str, count: int, lease: str | None = None) -> dict[str, Any]:
        """Leases slots, or adds to a lease until it has `count`: {"lease", "slots", "ready"}."""
        return self._call("acquire", env, count, protocol.VERSION, lease)

    def exchange(
        self, lease: str, commands: list[Any], wait: float, together: int = 1, line: int = 0, limit: float | None = None
    ) -> list[Any]:
        """Hands over commands [slot, seq, kind, body]; returns replies [slot, seq, kind, flags, body].

        Args:
            lease: whose slots they are for.
            commands: all of them are done, or none.
            wait: seconds to wait for a first reply.
            together: replies that are waited for a moment longer.
            line: grows with each connection that replaces a broken one; calls on older ones get nothing more.
            limit: seconds for the answer; None: EXCHANGE_LIMIT.

        Raises:
            MessageDamaged: the message or its answer was changed on the way.
            FarmError: no answer, or no such lease.
        """
        check = protocol.checksum([lease, wait, together, line], commands)
        limit = EXCHANGE_LIMIT if limit is None else limit
        if self._proxy._pyroTimeout != limit:  # setting it costs a system call
            self._proxy._pyroTimeout = limit
        answer = self._call("exchange", lease, commands, wait, together, line, check)
        try:
            replies, told = answer
            whole = protocol.checksum([check], replies) == told
        except (TypeError, ValueError, IndexError):
            whole = False
        if not whole:
            self.close()
            raise MessageDamaged("an answer of the farm at %s was changed on its way here" % self.address)
        return list(replies)

    def release(self, lease: str, slots: list[int] | None = None) -> None:
        """Ends a lease, or takes some slots out of it."""
        self._call("release", lease, slots)

    def close(self) -> None:
        """Closes the socket; a lease of it lives on at the farm until it is released or expires."""
        self._proxy._pyroRelease()

    def _call(self, verb: str, *args: Any) -> Any:
        try:
            answer = self._proxy._pyroInvoke(verb, args, {})
        except Pyro4.errors.TimeoutError as error:
            raise FarmTimeout("the farm at %s gave no answer to %s" % (self.address, verb)) from error
        except Exception as error:  # a damaged answer may raise anything in Pyro4, and a farm sends any class
            self.close()  # nobody knows what stands in this stream next
            raise FarmLost("the farm at %s: %s: %s" % (self.address, type(error).__name__, error)) from error
        if isinstance(answer, dict) and "error" in answer:
            name, text = answer["error"]
            raise from_wire(name, "the farm at %s: %s" % (self.address, text))
        return answer


#: What comes from something that listens, but does not speak as a farm does.
_NO_FARM = (Pyro4.errors.ProtocolError, Pyro4.errors.DaemonError, Pyro4.errors.ConnectionClosedError)


def _unreachable(address: FarmAddress, cause: BaseException, waited: float) -> FarmUnreachable:
    if isinstance(cause, _NO_FARM) or "magic" in str(cause):
        likely = "something listens there that is no farm (or a farm of another Pyro version): %s" % cause
    elif isinstance(cause, Pyro4.errors.TimeoutError):
        likely = "the machine is off, a firewall swallows the port, or the farm hangs"
    elif "getaddrinfo" in str(cause) or "Name or service" in str(cause):
        likely = "no machine of that name is known here"
    else:
        likely = "farm.py is not running there, or on another port (%s)" % cause
    return FarmUnreachable("no farm answered at %s within %.1f s\n  likely: %s" % (address, waited, likely))
