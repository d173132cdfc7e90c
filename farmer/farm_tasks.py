"""What may block is done by a thread of its own for each farm, outside the pool's lock.

So a dead address delays neither the pool nor another farm.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from farmer.remote_farm import RemoteFarm
from wire.errors import FarmError

RETRY = 0.5  #: s between tries to reach a farm that is away
MORE = 5.0  #: s between tries to get slots that other hosts hold, and at a farm that says no

Task = Callable[[RemoteFarm], None]

log = logging.getLogger("farmer")


class FarmTasks:
    """At most one task a farm; `RemoteFarm.task` is its thread."""

    def __init__(
        self,
        lock: threading.Condition,
        next_task: Callable[[RemoteFarm], Task | None],
        on_failed: Callable[[RemoteFarm, FarmError], None],
    ):
        """Starts nothing yet.

        Args:
            lock: the pool's.
            next_task: what is to be done about a farm now, None for nothing; called with the lock held.
            on_failed: gets what a task raised; called without the lock.
        """
        self._lock = lock
        self._next_task, self._on_failed = next_task, on_failed

    def start(self, farm: RemoteFarm) -> None:
        """Starts what is to be done about a farm, if there is anything. The lock is held."""
        if farm.task is None and self._next_task(farm) is not None:
            farm.task = threading.Thread(target=self._run, args=(farm,), name=f"task for {farm.address}", daemon=True)
            farm.task.start()

    def _run(self, farm: RemoteFarm) -> None:
        while True:
            with self._lock:
                task = self._next_task(farm)
                if task is None:
                    farm.task = None
                    return
                farm.next_try = time.monotonic() + RETRY
            try:
                task(farm)
            except FarmError as error:
                self._on_failed(farm, error)
            except Exception as error:  # a farm must be tried again, whatever it is
                log.exception("%s: an unforeseen error", farm.address)
                with self._lock:
                    farm.trouble = f"{type(error).__name__}: {error}"
                    farm.next_try = time.monotonic() + MORE
