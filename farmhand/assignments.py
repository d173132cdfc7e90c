"""Which worker is at which slot of a farm, who reads its replies, and when an empty slot gets its next worker."""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Protocol

from farmhand.catalog import Catalog
from farmhand.slots import Slot, State
from farmhand.spares import Spares
from farmhand.worker_process import FOREVER, WorkerProcess
from farmhand.workers import Workers

log = logging.getLogger("farm")


class Policy(Protocol):
    """What follows from an assignment."""

    def assigned(self, slot: Slot, worker: WorkerProcess) -> None:
        """The slot has another worker, which may be ready or at its construction."""

    def not_started(self, slot: Slot, why: str) -> None:
        """No worker could be started for it."""


class Assignments:
    """The workers in the slots of one farm. The farm's lock guards them."""

    def __init__(
        self, slots: list[Slot], workers: Workers, spares: Spares, catalog: Catalog, log_dir: Path, policy: Policy
    ):
        """Every slot is empty at first."""
        self._slots, self._workers, self._spares, self._policy = slots, workers, spares, policy
        self._catalog, self._log_dir = catalog, log_dir
        self._at: dict[int, WorkerProcess] = {}
        self._readers: dict[int, selectors.BaseSelector] = {}  # of leased slots: their holders' calls select on these
        self._not_before = [0.0] * len(slots)
        self._closed = False

    def at(self, number: int) -> WorkerProcess | None:
        """The worker in a slot."""
        return self._at.get(number)

    # Empty slots and their next worker.

    def close(self) -> None:
        """No slot gets another worker from now on."""
        self._closed = True

    def pause(self, number: int, seconds: float) -> None:
        """The slot gets its next worker after so many seconds."""
        self._not_before[number] = time.monotonic() + seconds

    def next_try(self, slot: Slot) -> float | None:
        """Seconds that a slot in quarantine still waits; None for any other."""
        seconds = self._not_before[slot.number] - time.monotonic()
        return seconds if slot.quarantined and seconds > 0 else None

    def fill(self, built: Container[str], now: float, limit: float) -> float:
        """Gives each empty slot a worker whose time has come; returns seconds until the next.

        Args:
            built: environments that were built before. Of any other one worker tries first: a wrong name then fails
                once, not once a slot.
            now: time.monotonic().
            limit: seconds for a construction.
        """
        wait = FOREVER
        first = {slot.env: slot.number for slot in reversed(self._slots)}
        for slot in self._slots:
            if slot.number in self._at or self._closed:
                continue
            if slot.env not in built and slot.number != first[slot.env]:
                continue
            if now < self._not_before[slot.number]:
                wait = min(wait, self._not_before[slot.number] - now)
            elif not self.assign_spare(slot):
                self._start(slot, limit)
        return wait

    def _start(self, slot: Slot, limit: float) -> None:
        path = self._log_dir / f"slot-{slot.number}.log"
        try:
            worker = self._workers.start(slot.env, self._catalog.order(slot.env), slot.number, path, limit)
        except OSError as error:
            slot.state = State.STARTING
            self._policy.not_started(slot, str(error))
            return
        self._assign(slot, worker)

    def assign_spare(self, slot: Slot) -> bool:
        """Gives an empty slot a worker from stock, if there is one and the slot need not wait."""
        if self._closed or time.monotonic() < self._not_before[slot.number]:
            return False
        worker = self._spares.take(slot.env)
        if worker is None:
            return False
        log.info("slot %d takes over %s, whose log is %s", slot.number, worker.name(), worker.log)
        self._assign(slot, worker)
        return True

    def _assign(self, slot: Slot, worker: WorkerProcess) -> None:
        worker.slot = slot.number
        self._at[slot.number] = worker
        slot.started(worker.pid)
        self._policy.assigned(slot, worker)

    # Leaving.

    def exited(self, number: int) -> None:
        """The worker in a slot has ended."""
        del self._at[number]

    def replace(self, slot: Slot, reason: str) -> None:
        """Lets its worker go between two episodes; a spare or a new one comes."""
        self._workers.dismiss(self._at.pop(slot.number))
        slot.recycle(reason)
        if not self.assign_spare(slot):
            self._workers.wake()

    def change(self, slot: Slot, env: str) -> None:
        """The slot is to run another environment."""
        slot.env = env
        worker = self._at.pop(slot.number, None)
        if worker is not None:
            self._workers.dismiss(worker)
            slot.died(f"slot {slot.number} changes to {env}", wanted=True)
            self.assign_spare(slot)

    # Who reads what a worker says.

    def read_by(self, slot: Slot, selector: selectors.BaseSelector | None) -> None:
        """Its holder's calls read the replies, by this selector; None: it has no holder."""
        if selector is None:
            self._readers.pop(slot.number, None)
        else:
            self._readers[slot.number] = selector
        self.watch(slot)

    def watch(self, slot: Slot) -> None:
        """Has the loop read from a worker at its construction, and then its holder's calls if it has a holder."""
        worker = self._at.get(slot.number)
        if worker is not None:
            is_built = slot.state is not State.STARTING
            self._workers.watch(worker, self._readers.get(slot.number) if is_built else None)

    def one_due(self, numbers: Iterable[int], selector: selectors.BaseSelector) -> int | None:
        """The pipe of one worker in these slots whose reply is awaited by this selector."""
        for number in numbers:
            worker = self._at.get(number)
            if worker is not None and worker.due and worker.watched is selector:
                return worker.stdout
        return None
