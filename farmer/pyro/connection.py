"""One connection to one farm: the farm's verbs as Pyro4 calls."""

from __future__ import annotations

import select
import time
from typing import Any

import Pyro4.errors

from farmer.farmlist import FarmAddress
from farmer.pyro import proxy
from farmer.pyro.tunnel import Tunnel
from wire import auth, protocol
from wire.errors import FarmError, FarmLost, FarmTimeout, MessageDamaged, ProtocolMismatch, from_wire

ANSWER_LIMIT = 3.0  #: s without an answer, after which a call fails
EXCHANGE_LIMIT = 8.0  #: the same for an exchange, unless the caller says otherwise: more than the longest wait


class Connection:
    """One TCP connection to one farm. For one thread at a time."""

    def __init__(
        self,
        address: FarmAddress,
        key: bytes | None = None,
        tunnel: Tunnel | None = None,
        limit: float | None = None,
    ):
        """Connects, proves the key, and checks that a farm of our protocol answers.

        Args:
            address: of the farmlist.
            key: the farm's, proven by both ends before anything else; None for a farm without one.
            tunnel: the way to an ssh:// address; opened here when it is not open.
            limit: seconds for each of connecting and the first answer; None: `proxy.CONNECT_LIMIT`.

        Raises:
            FarmUnreachable: nothing answers there, or something that is no farm.
            KeyRefused: the farm has another key, or one side has none.
            ProtocolMismatch: a farm of another version.
        """
        self.address = address
        self._key, self._tunnel = key, tunnel
        limit = proxy.CONNECT_LIMIT if limit is None else limit
        self._check = 0  # the checksum of what `begin` has sent
        self._watch, self._watched = select.poll(), -1  # for `is_answered`, and the descriptor that it looks at
        started = time.monotonic()
        self._proxy = proxy.open_proxy("farm", address, key, tunnel, limit)
        try:
            self.about = self.describe()
        except FarmError as error:
            self.close()
            cause = error.__cause__ or error
            if auth.WANTS_KEY in str(cause):
                raise proxy.wants_key(address) from None
            raise proxy.unreachable(address, cause, time.monotonic() - started) from None
        if self.about.get("protocol") != protocol.VERSION:
            self.close()
            raise ProtocolMismatch(
                "the farm at %s speaks protocol %s, this host %d\n  now: bring both to the same version of this project"
                % (address, self.about.get("protocol"), protocol.VERSION)
            )
        self._proxy._pyroTimeout = ANSWER_LIMIT

    def another(self, limit: float | None = None) -> Connection:
        """One more connection to the same farm; errors as of the first."""
        return Connection(self.address, self._key, self._tunnel, limit)

    def describe(self) -> dict[str, Any]:
        """Protocol, identity, slots, free slots, environments with their spaces, their seconds a step."""
        return self._call("describe")

    def acquire(self, env: str, count: int, lease: str | None = None) -> dict[str, Any]:
        """Leases slots, or adds to a lease until it has `count`: {"lease", "slots", "ready"}."""
        return self._call("acquire", env, count, protocol.VERSION, lease)

    def exchange(
        self,
        lease: str,
        commands: list[Any],
        wait: float,
        together: int = 1,
        generation: int = 0,
        limit: float | None = None,
    ) -> list[Any]:
        """Hands over commands [slot, seq, kind, body]; returns replies [slot, seq, kind, flags, body, crc].

        A reply's `crc` is what `codec.decode` takes with its body, of a large one.

        Args:
            lease: whose slots they are for.
            commands: all of them are done, or none.
            wait: seconds to wait for a first reply.
            together: replies that are waited for a moment longer.
            generation: grows with each connection that replaces a broken one; calls on older ones get nothing more.
            limit: seconds for the answer; None: EXCHANGE_LIMIT.

        Raises:
            MessageDamaged: the message or its answer was changed on the way.
            FarmError: no answer, or no such lease.
        """
        self.begin(lease, commands, wait, together, generation, limit)
        return self.finish()

    def begin(
        self,
        lease: str,
        commands: list[Any],
        wait: float,
        together: int = 1,
        generation: int = 0,
        limit: float | None = None,
    ) -> None:
        """The first half of `exchange`, which waits for nothing; `finish` must be the next call.

        Args:
            lease, commands, wait, together, generation: as of `exchange`.
            limit: seconds for each of taking the message and giving the answer.
        """
        self._check = protocol.checksum([lease, wait, together, generation], commands, protocol.sums(commands))
        limit = EXCHANGE_LIMIT if limit is None else limit
        if self._proxy._pyroTimeout != limit:  # setting it costs a system call
            self._proxy._pyroTimeout = limit
        try:
            self._proxy._post("exchange", (lease, commands, wait, together, generation, self._check))
        except Exception as error:
            raise self._in_words(error, "exchange") from error

    def fileno(self) -> int:
        """Of the socket, which becomes readable with the answer to `begin`; -1 when it is closed."""
        return self._proxy._fileno()

    def is_answered(self, wait: float) -> bool:
        """Whether the answer to `begin`, or the connection's end, is there; after `wait` seconds at most."""
        fd = self.fileno()
        if fd < 0:
            return True  # `finish` says so
        if self._watched != fd:
            self._watch, self._watched = select.poll(), fd
            self._watch.register(fd, select.POLLIN)
        return bool(self._watch.poll(wait * 1000))

    def finish(self) -> list[Any]:
        """The second half of `exchange`: waits for the answer. Errors as its."""
        try:
            answer = self._proxy._fetch()
        except Exception as error:
            raise self._in_words(error, "exchange") from error
        try:
            replies, told = self._without_error(answer)
            sums = protocol.sums(replies)
            whole = protocol.checksum([self._check], replies, sums) == told
        except (TypeError, ValueError, IndexError):
            whole = False
        if not whole:
            self.close()
            raise MessageDamaged("an answer of the farm at %s was changed on its way here" % self.address)
        return [[*reply, crc] for reply, crc in zip(replies, sums, strict=True)]

    def release(self, lease: str, slots: list[int] | None = None) -> None:
        """Ends a lease, or takes some slots out of it."""
        self._call("release", lease, slots)

    def close(self) -> None:
        """Closes the socket; a lease of it lives on at the farm until it is released or expires."""
        self._proxy._pyroRelease()

    def _call(self, verb: str, *args: Any) -> Any:
        try:
            answer = self._proxy._pyroInvoke(verb, args, {})
        except Exception as error:
            raise self._in_words(error, verb) from error
        return self._without_error(answer)

    def _in_words(self, error: Exception, verb: str) -> FarmError:
        if isinstance(error, Pyro4.errors.TimeoutError):
            return FarmTimeout("the farm at %s gave no answer to %s" % (self.address, verb))
        # A damaged answer may raise anything in Pyro4, and a farm sends any class.
        self.close()  # nobody knows what stands in this stream next
        return FarmLost("the farm at %s: %s: %s" % (self.address, type(error).__name__, error))

    def _without_error(self, answer: Any) -> Any:
        if isinstance(answer, dict) and "error" in answer:
            name, text = answer["error"]
            raise from_wire(name, "the farm at %s: %s" % (self.address, text))
        return answer
