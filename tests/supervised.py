"""A supervisor with real workers in this process, and a holder of its slots, without a network between them.

with supervised("CountingEnv", slots=2, step=1.0) as supervisor:
    holder = Holder(supervisor, 2)
    holder.reset(0)
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from farms import START_LIMIT, TESTS
from helpers import poll_until

from farmhand.catalog import Catalog
from farmhand.limits import Limits
from farmhand.supervisor import Supervisor
from wire import codec, protocol


@contextlib.contextmanager
def supervised(
    *factories: str, kwargs: dict[str, Any] | None = None, slots: int = 1, **limits: Any
) -> Iterator[Supervisor]:
    """Supervises environments of `environments.py`; every slot's environment stands. At the end the ledgers are
    compared, and its workers are gone."""
    with tempfile.TemporaryDirectory(prefix="farm") as folder:
        catalog = Catalog(["environments:" + name for name in factories], kwargs, str(TESTS))
        supervisor = Supervisor(catalog, slots, sys.executable, folder, Limits(**limits))
        try:
            supervisor.start(START_LIMIT)
            wait_until_idle(supervisor)
            yield supervisor
            for row in supervisor.status():
                counted = dict(row["ledger"])
                assert counted.pop("given") == sum(counted.values()), row
        finally:
            supervisor.stop("the test is over")


def wait_until_idle(supervisor: Supervisor) -> None:
    """Until every slot has a worker whose environment stands, and as many spares are in stock as are wanted."""
    poll_until(
        lambda: all(
            row["state"] in ("idle", "ready") and row["spares"] == supervisor.spares.wanted
            for row in supervisor.status()
        ),
        START_LIMIT,
        "all slots and spares",
    )


class Lost(AssertionError):
    """A command was lost: text and bucket as they came."""

    def __init__(self, body: dict[str, Any]):
        super().__init__(body["text"])
        self.text, self.bucket = body["text"], body.get("bucket", "invalid")


class Holder:
    """A host's lease on `count` slots, driven by hand."""

    def __init__(self, supervisor: Supervisor, count: int = 1, env: str | None = None):
        self.supervisor = supervisor
        env = env or supervisor.catalog.names[0]
        lease = supervisor.acquire(env, count, protocol.VERSION, expires=False)  # however slow this machine
        self.token, self.slots = lease.token, lease.slots
        self._seq = 0
        self._came: list[list[Any]] = []

    def give(self, slot: int, kind: int, body: dict[str, Any]) -> None:
        """A command, without waiting for what becomes of it."""
        self._seq += 1
        self._came += self.supervisor.exchange(self.token, [[slot, self._seq, kind, codec.encode(body)]], 0.0)

    def take(self, limit: float = START_LIMIT) -> tuple[int, Any]:
        """The next reply: (slot, decoded body). A fault or a loss is raised."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            self._came += self.supervisor.exchange(self.token, [], 0.0 if self._came else 5.0)
            if self._came:
                slot, _, kind, _, body = self._came.pop(0)
                if kind in (protocol.LOST, protocol.FAULT):
                    raise Lost(codec.decode(body))
                return slot, codec.decode(body)
        raise AssertionError("no reply within %g s" % limit)

    def give_reset(self, slot: int = 0, **options: Any) -> None:
        self.give(slot, protocol.RESET, {"seed": 1, "options": options or None})

    def give_step(self, slot: int = 0, action: float = 0.0, repeat: int = 1) -> None:
        self.give(slot, protocol.STEP, {"action": [action], "repeat": repeat})

    def reset(self, slot: int = 0, **options: Any) -> Any:
        self.give_reset(slot, **options)
        return self.take()[1]

    def step(self, slot: int = 0, action: float = 0.0, repeat: int = 1) -> Any:
        self.give_step(slot, action, repeat)
        return self.take()[1]

    def episodes(self, count: int, slot: int = 0) -> None:
        """Plays so many to their ends; every step must be a transition, and the counters those of a whole episode."""
        for _ in range(count):
            self.reset(slot)
            over, made = False, 0
            while not over:
                observation, _, terminated, truncated, _, _ = self.step(slot)
                made += 1
                assert observation[1] == made
                over = terminated or truncated

    def release(self) -> None:
        self.supervisor.release(self.token)
