"""The cap on a worker's memory (`--memory`): a worker that holds more is ended at once."""

from __future__ import annotations

import time
from typing import Any

from farmhand import tree
from farmhand.limits import in_words
from farmhand.worker_process import FOREVER, WorkerProcess
from farmhand.workers import Workers
from wire.errors import StartError

WEIGH_EVERY = 0.15  #: s between two looks at the memory of all workers


class MemoryCap:
    """Ends workers over the cap."""

    def __init__(self, cap: int | None, workers: Workers, lock: Any):
        """Bytes, or None for no cap; the lock guards the workers."""
        self._cap = cap
        self._workers = workers
        self._lock = lock
        self._next = 0.0

    def check(self, env: str, memory: int) -> None:
        """A cap that a new worker breaks would end every worker.

        Raises:
            StartError: it does.
        """
        if self._cap is not None and memory > self._cap:
            raise StartError(
                f"{env} takes {in_words(memory)} as soon as it is built, and --memory allows {in_words(self._cap)}\n"
                "  now: give it more with --memory SIZE"
            )

    def enforce(self) -> float:
        """Ends workers over the cap; without the lock while it looks. Returns seconds until the next look."""
        now = time.monotonic()
        if self._cap is None:
            return FOREVER
        if now >= self._next:
            self._next = now + WEIGH_EVERY
            with self._lock:
                workers = self._workers.living()
            for worker in workers:
                memory = tree.resident(worker.pid)
                if memory > self._cap:
                    with self._lock:
                        self._end(worker, memory, self._cap)
        return self._next - now

    def _end(self, worker: WorkerProcess, memory: int, cap: int) -> None:
        if self._workers.is_living(worker):
            why = f"{worker.name()} held {in_words(memory)} of memory, more than --memory {in_words(cap)}"
            self._workers.end(worker, why + worker.evidence(), "crashed")
