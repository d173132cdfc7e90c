"""The black box: the commands of a worker's last episode, kept by the farm, written to a file when it ends badly.

    recorder = Recorder(folder, python)
    recorder.command(slot.number, frame)              # each frame that goes to a worker: an append, nothing more
    text += recorder.ended(slot, worker, why, order)  # the worker is gone
    body = recorder.faulted(slot, worker, body)       # it answered with a FAULT
    python -m farmhand.replay FILE                    # plays it again

The farm keeps it and not the worker, so that it survives whatever happens to the worker. A file is a zip that any
program opens, now and in ten years:

    about.json      what happened in words, where, when, with which seed, arguments and versions
    log.txt         the end of what the worker wrote to its log: prints, and the native trace of a crash
    commands.bin    the very bytes the worker was given, frames of `wire/protocol.py`: CONSTRUCT, RESET, STEP, STEP, ...
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
import platform
import queue
import socket
import struct
import threading
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from farmhand.slots import Slot, State
from farmhand.worker_process import WorkerProcess
from wire import codec, protocol
from wire.errors import BlackBoxError

#: What a reader needs of about.json.
ABOUT = {
    "how": str,
    "why": str,
    "env": str,
    "slot": int,
    "pid": int,
    "step": int,
    "steps_lost": int,
    "under_way": bool,
    "episodes_of_worker": int,
    "python": str,
    "ended_at": str,
    "farm": dict,
    "worker": dict,
}
FORMAT = 1  #: of the files; a reader refuses a higher one
KEEP = 100  #: files in the folder; older ones are removed
LOG_SIZE = 1 << 16  #: bytes of the worker's log that go into a file
MOST_BYTES = 8 << 20  #: of one episode's commands; beyond that the oldest steps are dropped
OVERHEAD = 64  #: bytes that a kept command costs beside its own
CLOSE_LIMIT = 2.0  #: s for what is still to be written when the farm ends
WAITING = 64  #: files that may wait for a slow disk

#: Faults of the caller, not of the environment.
MISUSE = ("NoEpisode", "InvalidAction")

WHAT = (
    "A black box of a simulation farm: the last episode of one worker. commands.bin has the bytes it was given, frames "
    "of kind (u8), flags (u8), number (u64), length (u32), all big-endian, and a body (wire/codec.py has its layout); "
    "kind 1 builds the environment, 2 resets it, 3 is a step. `python -m farmhand.replay FILE` plays it again."
)

log = logging.getLogger("farm")


@dataclass
class _Recording:
    """The commands of one worker since its last reset."""

    reset: bytes
    steps: deque[bytes] = field(default_factory=deque)
    sent: int = 0  # steps, those that were dropped included
    size: int = 0
    began: float = field(default_factory=time.time)
    last: float = field(default_factory=time.monotonic)  # the last command
    #: The one before, until this one has its first step: a holder may leave a step unanswered, and the next one resets.
    before: _Recording | None = None

    def latest(self) -> int:
        """The ticket of its last command."""
        return _ticket(self.steps[-1] if self.steps else self.reset)


def _ticket(frame: bytes) -> int:
    return int(protocol.HEADER.unpack_from(frame)[2])


class Recorder:
    """The black boxes of one farm's slots. The farm's lock guards all but the writing, which has a thread.

    Attributes:
        keep: how many files stay in the folder.
        most_bytes: of the commands of one episode.
        answered: the ticket of each worker's last reply, by slot.
    """

    def __init__(
        self,
        folder: Path,
        python: str,
        ready: Mapping[str, bytes] | None = None,
        keep: int = KEEP,
        most_bytes: int = MOST_BYTES,
    ):
        """Touches nothing yet; the folder is made for the first file.

        Args:
            folder: where the files go.
            python: the workers' interpreter, for the replay.
            ready: the READY body of each environment, which has the versions; it may fill later.
            keep: how many files stay.
            most_bytes: of an episode's commands.
        """
        self.folder = folder
        self._python = python
        self._ready = {} if ready is None else ready  # the very one: it is empty at first
        self.keep, self.most_bytes = keep, most_bytes
        self._episodes: dict[int, _Recording] = {}
        self.answered: dict[int, int] = {}  # the ticket of each worker's last reply
        # Paths as texts: pathlib interns each name, and the interpreter's table of those grows for ever new ones.
        self._waiting: queue.Queue[tuple[str, dict[str, Any], bytes, list[bytes]] | None] = queue.Queue(WAITING)
        self._writer: threading.Thread | None = None

    def start(self) -> None:
        """Starts the writer, so that a farm's first fault needs nothing new; else the first file does."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="black box", daemon=True)
            self._writer.start()

    def started(self, number: int) -> None:
        """Slot `number` has another worker: it is not charged with what the one before left unanswered."""
        self._episodes.pop(number, None)

    def command(self, number: int, frame: bytes) -> None:
        """Keeps a frame that goes to the worker in slot `number`."""
        kind = frame[0]
        if kind == protocol.STEP:
            episode = self._episodes.get(number)
            if episode is None:
                return  # a step is done also when nothing records it
            episode.before = None
            episode.steps.append(frame)
            episode.sent += 1
            episode.size += len(frame) + OVERHEAD
            episode.last = time.monotonic()
            while episode.size > self.most_bytes:
                episode.size -= len(episode.steps.popleft()) + OVERHEAD
        elif kind == protocol.RESET:
            before = self._episodes.get(number)
            if before is not None:
                before.before = None
            self._episodes[number] = _Recording(frame, before=before)

    def ended(
        self,
        slot: Slot,
        worker: WorkerProcess,
        why: str,
        order: dict[str, Any],
        how: str = "crashed",
        by_farm: bool = False,
    ) -> str:
        """Writes the box of a worker that is gone.

        Args:
            slot: as it was at the end.
            worker: its process, ended.
            why: its end in words.
            order: what it was told to build.
            how: "crashed" or "timed out".
            by_farm: the farm ended it, so its exit code says nothing.

        Returns:
            A line for `why` that names the file; empty when there is none.
        """
        episode = self._episodes.pop(slot.number, None)
        if (
            episode is not None
            and episode.before is not None
            and self.answered.get(slot.number, 0) < episode.before.latest()
        ):
            episode = episode.before
        building = slot.state is State.STARTING
        if building and slot.failures:
            return ""  # the same failure again: one file is enough
        about: dict[str, Any] = {"how": how, "why": why, "by_farm": by_farm}
        code = worker.exit_code
        if not by_farm and code is not None:
            about.update({"signal": -code} if code < 0 else {"exit_code": code})
        if worker.fault is not None:
            about["fault"] = {"type": worker.fault.partition(":")[0], "text": worker.fault}
        return self._line(self._put(slot, worker, order, None if building else episode, about))

    def faulted(self, slot: Slot, worker: WorkerProcess, ticket: int, body: bytes, order: dict[str, Any]) -> bytes:
        """Writes the box of a worker that answered with a FAULT and lives on; returns the body with the file's name."""
        fault = codec.decode(body)
        episode = self._episodes.get(slot.number)
        if episode is not None and ticket < _ticket(episode.reset):
            episode = episode.before
        else:
            self._episodes.pop(slot.number, None)
        if fault["type"] in MISUSE or episode is None:
            return body
        about = {
            "how": "invalid",
            "why": f"{fault['type']} in {fault['where']}: {fault['text']}",
            "by_farm": False,
            "fault": fault,
        }
        line = self._line(self._put(slot, worker, order, episode, about))
        return codec.encode(dict(fault, text=fault["text"] + line)) if line else body

    def close(self) -> None:
        """Writes what still waits, for at most CLOSE_LIMIT."""
        if self._writer is not None:
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=CLOSE_LIMIT)
            self._writer.join(CLOSE_LIMIT)

    # Inside.

    def _put(
        self,
        slot: Slot,
        worker: WorkerProcess,
        order: dict[str, Any],
        episode: _Recording | None,
        about: dict[str, Any],
    ) -> str | None:
        """Notes what may change from now on, and leaves the rest to the writer."""
        now = datetime.now(timezone.utc)
        name = f"{now.strftime('%Y%m%dT%H%M%S.%f')}-slot-{slot.number}-pid-{worker.pid}.zip"
        path = os.path.join(os.path.abspath(self.folder), name)
        frames = [protocol.pack(protocol.CONSTRUCT, 0, codec.encode(order))]
        about = dict({"format": FORMAT, "what": WHAT}, **about)
        about.update(
            slot=slot.number,
            pid=worker.pid,
            env=slot.env,
            state=slot.state.value,
            ended_at=now.isoformat(),
            steps_of_worker=slot.steps,
            episodes_of_worker=slot.episodes,
            order=order,
            python=self._python,
        )
        about.update(step=0, steps_lost=0)
        if episode is not None:
            frames += [episode.reset, *episode.steps]
            about.update(
                step=episode.sent,
                steps_lost=episode.sent - len(episode.steps),
                episode_began_at=datetime.fromtimestamp(episode.began, timezone.utc).isoformat(),
                seconds_since_last_command=round(time.monotonic() - episode.last, 3),
            )
        about["under_way"] = slot.state in (State.STARTING, State.RESETTING, State.STEPPING)
        self.start()
        try:
            self._waiting.put_nowait((path, about, _log_of(worker), frames))
        except queue.Full:
            log.warning("no black box of slot %d: %d of them wait for a slow disk already", slot.number, WAITING)
            return None
        return path

    def _line(self, path: str | None) -> str:
        return "" if path is None else f"\n  black box, on the farm: {path}"

    def _write_all(self) -> None:
        while True:
            item = self._waiting.get()
            if item is None:
                return
            try:
                self._write(*item)
            except OSError as error:
                log.warning("the black box %s cannot be written: %s", item[0], error.strerror or error)

    def _write(self, path: str, about: dict[str, Any], said: bytes, frames: list[bytes]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if len(frames) > 1:
            about.update(_seed_and_options(frames[1]))
        about["worker"] = _versions(self._ready.get(about["env"]))
        about["farm"] = {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "protocol": protocol.VERSION,
        }
        words = json.dumps(about, indent=1, default=repr).encode()
        write_zip(path, {"about.json": words, "log.txt": said, "commands.bin": b"".join(frames)})
        for old in sorted(fnmatch.filter(os.listdir(self.folder), "*-slot-*.zip"))[: -self.keep]:
            _remove(os.path.join(self.folder, old))


def write_zip(path: str, parts: dict[str, bytes]) -> None:
    """Writes a zip with these files in it, whole or not at all."""
    beside = path + ".writing"
    try:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as box:
            for name, data in parts.items():
                box.writestr(name, data)
        os.replace(beside, path)
    except BaseException:
        _remove(beside)
        raise


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _log_of(worker: WorkerProcess) -> bytes:
    try:
        return worker.log_end(LOG_SIZE)
    except OSError as error:
        return f"its log {worker.log} cannot be read: {error}".encode()


def _versions(ready: bytes | None) -> dict[str, Any]:
    """The versions of what runs in the worker, as it reported them."""
    said = codec.decode(ready) if ready is not None else {}
    return {key: said.get(key) for key in ("python", "numpy", "api")}


def _seed_and_options(reset: bytes) -> dict[str, Any]:
    try:
        body = codec.decode(reset[protocol.HEADER.size :])
    except codec.CodecError as error:
        return {"seed": None, "options": f"not readable: {error}"}
    if not isinstance(body, dict):
        return {"seed": None, "options": f"not readable: {body!r}"}
    return {"seed": body.get("seed"), "options": body.get("options")}


@dataclass
class BlackBox:
    """A file, read.

    Attributes:
        about: what about.json says.
        log: the end of the worker's log.
        order: what it was told to build.
        reset: the RESET frame; None when it ended before one.
        steps: the STEP frames.
    """

    about: dict[str, Any]
    log: str
    order: dict[str, Any]
    reset: bytes | None
    steps: list[bytes]


def load(path: str | Path) -> BlackBox:
    """Reads a file.

    Raises:
        BlackBoxError: it is missing, damaged, of a newer format, or no black box.
    """
    try:
        with zipfile.ZipFile(path) as box:
            about = json.loads(box.read("about.json"))
            said, commands = box.read("log.txt"), box.read("commands.bin")
    except OSError as error:
        raise BlackBoxError(f"{path} cannot be read: {error.strerror or error}") from None
    except KeyError as error:
        raise BlackBoxError(f"{path} is no black box: {error.args[0]}") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError) as error:
        raise BlackBoxError(f"{path} is no black box, or a damaged one: {error}") from None
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise BlackBoxError(f"{path} is no black box: its about.json does not say which format it has")
    if about["format"] > FORMAT:
        raise BlackBoxError(
            f"{path} has format {about['format']}, and this program knows up to {FORMAT}: replay it with "
            "the version that wrote it"
        )
    missing = [key for key, kind in ABOUT.items() if not isinstance(about.get(key), kind)]
    if missing:
        raise BlackBoxError(f"{path} is damaged: its about.json lacks or garbles {', '.join(missing)}")
    try:
        frames = protocol.FrameReader().feed(commands)
        order = codec.decode(frames[0][3]) if frames else None
    except (protocol.FrameError, codec.CodecError) as error:
        raise BlackBoxError(f"{path} is damaged: its commands are {error}") from None
    kinds = [frame[0] for frame in frames]
    wanted = [protocol.CONSTRUCT, protocol.RESET] + [protocol.STEP] * (len(frames) - 2)
    whole = sum(protocol.HEADER.size + len(frame[3]) for frame in frames) == len(commands)
    if not isinstance(order, dict) or kinds != wanted[: len(kinds)] or not whole:
        names = ", ".join(protocol.NAMES[kind] for kind in kinds[:5])
        raise BlackBoxError(f"{path} is damaged: its commands are {names}, and not construct, reset, step, ...")
    packed = [protocol.pack(kind, number, body, flags) for kind, flags, number, body in frames]
    return BlackBox(about, said.decode("utf-8", "replace"), order, packed[1] if len(packed) > 1 else None, packed[2:])
