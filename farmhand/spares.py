"""Spare workers in stock: built ahead, so that a slot that loses its worker need not wait for a construction."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection
from pathlib import Path

import psutil

from farmhand import tree
from farmhand.catalog import Catalog
from farmhand.limits import Limits, back_off, in_words, spares_that_fit
from farmhand.worker_process import FOREVER, WorkerProcess
from farmhand.workers import Workers

log = logging.getLogger("farm")


class Spares:
    """The spares of one farm. The farm's lock guards them.

    Attributes:
        wanted: workers in stock for each environment.
        about: why so many, in words.
    """

    def __init__(self, workers: Workers, catalog: Catalog, python: str, limits: Limits, log_dir: Path):
        """Starts none yet; how many there are to be is known after `decide`, or when `limits` says it."""
        self.wanted = limits.spares or 0
        self.about = ""
        self._workers, self._catalog, self._python, self._limits = workers, catalog, python, limits
        self._log_dir = log_dir
        self._stock: dict[str, list[WorkerProcess]] = {name: [] for name in catalog.names}
        self._failures = dict.fromkeys(catalog.names, 0)
        self._not_before = dict.fromkeys(catalog.names, 0.0)

    def decide(self, needs: dict[str, int], missing: int) -> None:
        """Decides how many there are to be.

        Args:
            needs: bytes of a worker of each environment.
            missing: bytes that slots without a worker will still take.
        """
        available = tree.free_memory()[1]
        if self._limits.spares is None:
            self.wanted = spares_that_fit(needs, missing, available)
            takes = ", ".join(f"{env} takes {in_words(size)}" for env, size in needs.items())
            why = f"{takes} a worker, {in_words(available)} free"
        else:
            why = "as --spares says"
        plural = "" if self.wanted == 1 else "s"
        self.about = f"{self.wanted} spare worker{plural} for each environment ({why})"

    def of(self, env: str) -> list[WorkerProcess]:
        """Those of one environment, oldest first, also while they are being built."""
        return list(self._stock.get(env, ()))

    def ready(self, env: str) -> int:
        """How many of them are ready."""
        return sum(spare.ready is not None for spare in self._stock.get(env, ()))

    def fill(self, envs: Collection[str], now: float) -> float:
        """Starts a spare for each of these environments that lacks one; returns seconds until the next."""
        wait = FOREVER
        for env in envs:
            if len(self._stock.get(env, ())) >= self.wanted:
                continue
            if now < self._not_before[env]:
                wait = min(wait, self._not_before[env] - now)
                continue
            try:
                order, limit = self._catalog.order(env), self._limits.start
                self._stock[env].append(self._workers.start(env, order, None, self._free_log(), limit))
            except OSError as error:
                self._failed(env, f"{self._python} does not start: {error}")
        return wait

    def _free_log(self) -> Path:
        """A log that no living worker writes to; a spare keeps it when a slot takes it over."""
        used = self._workers.logs
        names = (self._log_dir / f"spare-{number}.log" for number in itertools.count())
        return next(name for name in names if name not in used)

    def is_ready(self, worker: WorkerProcess) -> None:
        """One was built."""
        self._failures[worker.env] = 0
        log.info("%s is in stock", worker.name())

    def take(self, env: str) -> WorkerProcess | None:
        """Gives one away, if there is one; it may be still at its construction."""
        self._end_stopped(env)
        stock = self._stock.get(env)
        if not stock:
            return None
        self._workers.wake()  # for a new one in stock
        return stock.pop(0)

    def _end_stopped(self, env: str) -> None:
        """Ends spares that somebody has stopped: in a slot each would cost the whole time limit of a reset.

        A spare has no other way to hang unseen: until a slot takes it, it waits for a command, or is being built.
        """
        for worker in self.of(env):
            if tree.state(worker.pid) == psutil.STATUS_STOPPED:
                self._workers.end(worker, f"{worker.name()} was stopped (SIGSTOP) while it was in stock", "crashed")

    def exited(self, worker: WorkerProcess, why: str) -> None:
        """One has ended."""
        self._stock[worker.env].remove(worker)
        if worker.ready is None:
            self._failed(worker.env, why)
        else:
            log.warning("%s; a new one is started", why)
            self._workers.wake()

    def _failed(self, env: str, why: str) -> None:
        self._failures[env] += 1
        pause = back_off(self._failures[env])
        self._not_before[env] = time.monotonic() + pause
        log.warning("%s; next try for a spare in %g s", why, pause)
        self._workers.wake()
