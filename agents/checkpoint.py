"""Everything of an agent on disk; a kill at any instant leaves the saves before it whole.

    saves = Checkpointer("runs/Pendulum-v1/checkpoint", keep=3, every_s=600)
    saves.save(agent, {"episodes": 12})
    extra = saves.load(agent)

FOLDER/save-000007/    manifest.json: what is saved, and every file that belongs to it with size and CRC-32
                       arrays.npz: what `agent.state()` gave
FOLDER/replay/         segment-000012_5000-5999_LINEAGE.npz: these entries of the replay, written once, shared by saves

Files are written beside (*.part), synced and renamed; the rename of a save's folder, manifest inside, comes last. A
lineage is one full set of segments and what was appended to it. Which one a memory's entries lie in is known of the
memory itself (`_written`), so that an agent which did not come from a folder never appends to what lies there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import time
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.callbacks import Callback
from agents.memory import ReplayMemory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 2
SEGMENT_BYTES = 256 << 20  #: about what a segment holds at most: as much is copied from the replay at a time
SMALL_SEGMENTS = 64  #: more of them in a row are written as one again: saves of a few entries would leave thousands
LOCK_LIMIT = 60.0  #: s to wait for another process that saves to the folder

log = logging.getLogger("agents")


@dataclass(frozen=True)
class _Segment:
    """A file of replay entries, as a manifest names it."""

    name: str
    size: int
    crc32: int
    first: int  # of the numbers in it
    last: int
    rows: int


@dataclass(frozen=True)
class _Lineage:
    """Where a memory's entries lie: the segments of its last save, and the memory's count then.

    The name is drawn at random and is part of the names of the segments written under it, so a name stands for the
    same entries in every folder.
    """

    name: str
    segments: list[_Segment]
    count: int


class _Damaged(Exception):
    """A save is not what was written; the text says why."""


#: Where each memory was last saved to or loaded from. `ReplayMemory.changed` tells what is new since its last save to
#: anywhere, so a memory that two folders take turns with is written to each as a whole.
_written: weakref.WeakKeyDictionary[ReplayMemory, _Lineage] = weakref.WeakKeyDictionary()


class Checkpointer:
    """Saves to a folder and loads from it.

    Attributes:
        loaded: the save that `load` took, None before.
        step: the agent's when it was last saved or loaded here, None before.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3, every_s: float | None = None):
        """Touches nothing yet.

        Args:
            folder: holds the saves; made where it is not there.
            keep: whole saves that stay, the newest ones.
            every_s: seconds after a save (or load) until `due` says that it is time for one; None: never.

        Raises:
            ValueError: keep below 1, or a negative time.
        """
        if keep < 1 or (every_s is not None and not every_s >= 0):
            raise ValueError("keep must be at least 1 and every_s not negative, not %r and %r" % (keep, every_s))
        self.folder = Path(folder)
        self.keep, self.every_s = keep, every_s
        self.loaded: Path | None = None
        self.step: int | None = None
        self._damaged: set[Path] = set()  # saves that `load` found so: they do not count among those kept
        self._last = time.monotonic()

    def found(self) -> list[Path]:
        """The saves in the folder, newest first, whole or not."""
        return _saves(self.folder)

    def due(self) -> bool:
        """Whether `every_s` have passed since the last save, tried or done."""
        return self.every_s is not None and time.monotonic() - self._last >= self.every_s

    def save(self, agent: Any, extra: dict[str, Any] | None = None) -> Path:
        """Saves the agent with its replay, of which only what is new or changed is written.

        Args:
            agent: compiled, with `state()` and a ReplayMemory. Its learner is kept out meanwhile.
            extra: plain data of the caller's, for `load`.

        Returns:
            The save's folder.

        Raises:
            TypeError: the agent's memory cannot be saved, or something is no plain data; nothing was written.
            FloatingPointError: the agent has diverged; nothing was written.
            OSError: it could not be written (a full disk, no permission); the saves before it are as they were.
        """
        memory = _memory_of(agent)
        try:
            with _paused(agent), memory.lock:
                arrays, values = agent.state()
                _check_finite(arrays)
                manifest = _describe(agent, values, extra)
                with self._words():
                    _make_folder(self.folder)
                    with _locked(self.folder, exclusive=True):
                        self._tidy()
                        path = self._write(memory, arrays, manifest)
                        try:
                            self._tidy()
                        except OSError as error:  # the save itself is whole
                            log.warning("%s is saved, but what it replaces cannot be removed: %s", path, error)
        finally:
            self._last = time.monotonic()
        self.step = manifest["step"]
        return path

    def load(self, agent: Any) -> dict[str, Any]:
        """Puts the newest whole save into a compiled agent of the same form; `loaded` says which one it was.

        A damaged save is passed over with a warning. One that does not fit is not: an older one would hardly be meant.

        Returns:
            `extra` as it was saved.

        Raises:
            FileNotFoundError: there is no save, or no whole one.
            ValueError: it is of another format or of an agent of another form; nothing was changed.
            TypeError: the agent's memory cannot take it.
            OSError: another process saves to the folder and does not end.
        """
        memory = _memory_of(agent)
        if not self.folder.is_dir():
            raise _no_save(self.folder)
        with _paused(agent), memory.lock, _locked(self.folder, exclusive=False):
            path, manifest = self._newest_whole()
            _check_agent(path, manifest, agent)
            segments = _segments_of(manifest)
            arrays = _read_arrays(path / "arrays.npz")
            try:
                agent.check_state(arrays, manifest["values"])
                memory.restore(manifest["memory"], _parts(self.folder, segments))
            except ValueError as error:
                raise ValueError("the checkpoint %s does not fit this agent: %s" % (path, error)) from error
            lineage = _Lineage(_new_name(), segments, int(manifest["replay"]["count"]))
            _written[memory] = lineage  # under a name of its own: it may go on from a save that is not the newest
            agent.load_state(arrays, manifest["values"])
        self.loaded, self.step, self._last = path, manifest["step"], time.monotonic()
        log.debug("loaded %s, written %s", path, manifest["written"])
        return dict(manifest["extra"])

    # Saving.

    def _write(self, memory: ReplayMemory, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> Path:
        """Segments, then arrays, then the manifest, then the name that makes it a save."""
        target = self.folder / ("save-%06d" % (1 + max(_numbers(self.folder, "save"), default=0)))
        beside = _part(target)
        lineage, numbers = self._plan(memory)
        made: list[Path] = []
        try:
            for columns in _chunks(memory, numbers):
                segment = self._write_segment(lineage.name, columns, made)
                lineage.segments.append(segment)
            beside.mkdir()
            size, crc32 = _write_arrays(beside / "arrays.npz", arrays)
            manifest["memory"] = memory.meta()
            manifest["replay"] = {
                "lineage": lineage.name,
                "oldest": memory.oldest,
                "count": memory.count,
                "segments": [asdict(segment) for segment in lineage.segments],
            }
            manifest["files"] = [{"name": "arrays.npz", "size": size, "crc32": crc32}]
            _write_manifest(beside / "manifest.json", manifest)
            _sync_folder(beside)
            os.rename(beside, target)
            _sync_folder(self.folder)
        except BaseException:
            if not target.exists():
                with contextlib.suppress(OSError):  # what stays is swept by the next save
                    for path in (beside, *made):
                        _remove(path)
            raise
        memory.mark_saved()
        _written[memory] = lineage
        return target

    def _plan(self, memory: ReplayMemory) -> tuple[_Lineage, np.ndarray]:
        """The lineage to go on with, and the numbers of the entries to be written to it."""
        oldest, count = memory.oldest, memory.count
        afresh = _Lineage(_new_name(), [], count), np.arange(oldest, count)
        mine = _written.get(memory)
        if mine is None or mine.count > count:
            return afresh
        kept = [segment for segment in mine.segments if segment.last >= oldest]
        if not all(_has_size(_replay(self.folder) / segment.name, segment.size) for segment in kept):
            return afresh  # another folder, or one that was tidied for another agent's saves
        numbers = memory.changed(mine.count)
        small = _small_at_the_end(kept)
        if len(small) > SMALL_SEGMENTS:
            kept = kept[: -len(small)]
            first = max(oldest, min(segment.first for segment in small))
            numbers = np.union1d(numbers, np.arange(first, count))
        held = count - oldest
        if len(numbers) == held or sum(segment.rows for segment in kept) + len(numbers) > 2 * held:
            return afresh
        return _Lineage(mine.name, kept, count), numbers

    def _write_segment(self, lineage: str, columns: dict[str, np.ndarray], made: list[Path]) -> _Segment:
        numbers, replay = columns["numbers"], _replay(self.folder)
        _make_folder(replay)
        index = 1 + max(_numbers(replay, "segment"), default=0)
        first, last = int(numbers[0]), int(numbers[-1])
        path = replay / ("segment-%06d_%d-%d_%s.npz" % (index, first, last, lineage))
        made += [_part(path), path]
        size, crc32 = _write_arrays(_part(path), columns)
        os.rename(_part(path), path)
        _sync_folder(replay)
        return _Segment(path.name, size, crc32, first, last, len(numbers))

    def _tidy(self) -> None:
        """Removes leftovers, saves older than the last `keep` whole ones, and segments that no save names."""
        replay = _replay(self.folder)
        for leftover in (*self.folder.glob("save-*.part"), *replay.glob("*.part")):
            _remove(leftover)
        manifests = {path: _manifest_if_any(path) for path in _saves(self.folder)}
        whole = [
            path for path, manifest in manifests.items() if path not in self._damaged and _all_there(path, manifest)
        ]
        if len(whole) >= self.keep:
            saves = list(manifests)
            for path in saves[saves.index(whole[self.keep - 1]) + 1 :]:
                os.rename(path, _part(path))  # half of it may be gone at a kill: it must not look like a save then
                _remove(_part(path))
                del manifests[path]
        if None in manifests.values():
            return  # which segments it names is not known
        needed = {segment.name for manifest in manifests.values() for segment in _segments_of(manifest or {})}
        for path in replay.glob("segment-*.npz"):
            if path.name not in needed:
                _remove(path)

    @contextlib.contextmanager
    def _words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            words = "%s: the checkpoint could not be written; the saves before it are as they were"
            words %= error.strerror or error
            raise OSError(error.errno or errno.EIO, words, str(error.filename or self.folder)) from error

    # Loading.

    def _newest_whole(self) -> tuple[Path, dict[str, Any]]:
        """The newest save that is as it was written.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the newest one is of another format.
        """
        reasons: dict[Path, str] = {}
        for path in _saves(self.folder):
            try:
                manifest = _read_manifest(path)
                _check_files(path, manifest)
            except (_Damaged, OSError) as error:
                reasons[path] = str(error)
                continue
            for damaged, reason in reasons.items():
                log.warning("the checkpoint %s is damaged: %s; %s is taken instead", damaged, reason, path.name)
            self._damaged.update(reasons)
            return path, manifest
        if reasons:
            words = "".join("\n  %s: %s" % (path.name, reason) for path, reason in reasons.items())
            raise FileNotFoundError("no checkpoint at %s is whole:%s" % (self.folder, words))
        raise _no_save(self.folder)


class Autosave(Callback):
    """Saves whenever it is time, for `fit(callbacks=[...])`.

        agent.fit(farmer, 10**6, callbacks=[Autosave(Checkpointer(folder, every_s=600))])

    A save that cannot be written is logged and tried again when the time has passed once more: a full disk ends no
    training. A diverged agent does, with FloatingPointError.
    """

    def __init__(self, checkpointer: Checkpointer, extra: Callable[[], dict[str, Any]] = dict):
        """Nothing is saved before the checkpointer's time has passed once.

        Args:
            checkpointer: says when it is time.
            extra: gives what `Checkpointer.load` shall return.
        """
        super().__init__()
        self.checkpointer, self.extra = checkpointer, extra

    def on_step_end(self, step: int, logs: Any = None) -> None:
        if not self.checkpointer.due():
            return
        try:
            self.checkpointer.save(self.model, self.extra())
        except OSError as error:
            log.error("%s", error)


def save_checkpoint(
    agent: Any, folder: str | os.PathLike[str], extra: dict[str, Any] | None = None, keep: int = 3
) -> Path:
    """`Checkpointer.save` of a folder."""
    return Checkpointer(folder, keep).save(agent, extra)


def load_checkpoint(agent: Any, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`Checkpointer.load` of a folder."""
    return Checkpointer(folder).load(agent)


# What is checked before anything is written or changed.


def _memory_of(agent: Any) -> ReplayMemory:
    if not isinstance(agent.memory, ReplayMemory):
        raise TypeError("a checkpoint holds the replay of agents.ReplayMemory; this agent has %r" % (agent.memory,))
    return agent.memory


def _paused(agent: Any) -> Any:
    return getattr(agent, "paused", contextlib.nullcontext)()


def _check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            raise FloatingPointError(
                "%s holds NaN or infinity: the training has diverged, and nothing of it was saved\n"
                "  now: load() the save before it, then try a smaller learning rate or clipnorm" % name
            )


def _check_agent(path: Path, manifest: dict[str, Any], agent: Any) -> None:
    if manifest["agent"] != type(agent).__name__:
        raise ValueError(
            "the checkpoint %s is of another agent: a %s, this is a %s"
            % (path, manifest["agent"], type(agent).__name__)
        )


def _describe(agent: Any, values: dict[str, Any], extra: dict[str, Any] | None) -> dict[str, Any]:
    """A manifest without the files, as plain data."""
    configuration = agent.get_config() if hasattr(agent, "get_config") else {}
    manifest = {
        "format": FORMAT,
        "agent": type(agent).__name__,
        "step": getattr(agent, "step", None),
        "updates": getattr(agent, "nb_updates", None),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "configuration": json.loads(json.dumps(configuration, default=repr, skipkeys=True)),  # for a reader only
        "values": values,
        "extra": extra or {},
    }
    try:
        return dict(json.loads(json.dumps(manifest, default=_plain)))
    except (TypeError, ValueError) as error:
        raise TypeError("a checkpoint's values and extra must be plain data: %s" % error) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError("%r is a %s" % (value, type(value).__name__))


# Manifests.


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """JSON whose first line has the CRC-32 of what follows."""
    body = b"\n" + json.dumps(manifest, default=_plain)[1:].encode()
    with open(path, "wb") as file:
        file.write(b'{"crc32": %d,' % zlib.crc32(body) + body)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a save.

    Raises:
        _Damaged: it is not what was written.
        ValueError: it is of another format.
        OSError: it cannot be read.
    """
    try:
        text = (path / "manifest.json").read_bytes()
    except FileNotFoundError:
        raise _Damaged("manifest.json is missing") from None
    head = re.match(rb'{"crc32": (\d+),', text)
    if head is not None and int(head[1]) != zlib.crc32(text[head.end() :]):
        raise _Damaged("manifest.json is not as it was written (CRC-32)")
    try:
        manifest = json.loads(text)
        found = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise _Damaged("manifest.json is no manifest: %r" % (error,)) from error
    if found != FORMAT:
        raise ValueError("the checkpoint %s is of format %s, this program reads format %d" % (path, found, FORMAT))
    if head is None:
        raise _Damaged("manifest.json has no CRC-32")
    return dict(manifest)


def _manifest_if_any(path: Path) -> dict[str, Any] | None:
    """The manifest; an empty one where it is damaged, None where it is of another format or cannot be read now."""
    try:
        return _read_manifest(path)
    except _Damaged:
        return {}
    except (ValueError, OSError):
        return None


def _segments_of(manifest: dict[str, Any]) -> list[_Segment]:
    return [_Segment(**entry) for entry in manifest["replay"]["segments"]] if manifest else []


def _files_of(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, int, int]]:
    """Path, size and CRC-32 of everything that belongs to a save."""
    for entry in manifest["files"]:
        yield path / entry["name"], entry["size"], entry["crc32"]
    for segment in _segments_of(manifest):
        yield _replay(path.parent) / segment.name, segment.size, segment.crc32


def _all_there(path: Path, manifest: dict[str, Any] | None) -> bool:
    """Whether all files of a save are there in full length; what is in them is not read."""
    return bool(manifest) and all(_has_size(file, size) for file, size, _ in _files_of(path, manifest or {}))


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    for file, size, crc32 in _files_of(path, manifest):
        found = summed = 0
        try:
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    found, summed = found + len(block), zlib.crc32(block, summed)
        except FileNotFoundError:
            raise _Damaged("%s is missing" % file.name) from None
        if found != size:
            raise _Damaged("%s has %d bytes instead of %d" % (file.name, found, size))
        if summed != crc32:
            raise _Damaged("%s is not as it was written (CRC-32)" % file.name)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


# Replay.


def _chunks(memory: ReplayMemory, numbers: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Columns of these entries with their numbers, as many at a time as a segment holds."""
    if not len(numbers):
        return
    row = sum(column.nbytes for column in memory.columns(numbers[:1]).values())
    for chunk in np.array_split(numbers, -(-len(numbers) * row // SEGMENT_BYTES)):
        yield dict(memory.columns(chunk), numbers=chunk)


def _parts(folder: Path, segments: list[_Segment]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    for segment in segments:
        columns = _read_arrays(_replay(folder) / segment.name)
        yield columns.pop("numbers"), columns


def _small_at_the_end(segments: list[_Segment]) -> list[_Segment]:
    """The last segments in a row of which each is less than half full."""
    big = [index for index, segment in enumerate(segments) if segment.size >= SEGMENT_BYTES // 2]
    return segments[big[-1] + 1 :] if big else segments


# Files.


class _Summing:
    """A file for writing that counts and sums what it is given; it cannot go back, and zipfile does without."""

    def __init__(self, file: Any):
        self.file, self.size, self.crc32 = file, 0, 0

    def write(self, data: bytes) -> int:
        written = self.file.write(data)
        self.size, self.crc32 = self.size + len(data), zlib.crc32(data, self.crc32)
        return int(written)

    def flush(self) -> None:
        self.file.flush()


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """A synced .npz; returns size and CRC-32. Unlike numpy's own, it takes any name for an array."""
    with open(path, "wb") as file:
        summing: Any = _Summing(file)
        with zipfile.ZipFile(summing, "w") as bundle:
            for name, array in arrays.items():
                with bundle.open(name + ".npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return summing.size, summing.crc32


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _replay(folder: Path) -> Path:
    return folder / "replay"


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _new_name() -> str:
    return secrets.token_hex(4)


def _numbers(folder: Path, kind: str) -> list[int]:
    """The numbers that saves or segments in a folder bear, leftovers among them."""
    found = (re.match(r"%s-(\d+)" % kind, path.name) for path in folder.glob(kind + "-*"))
    return [int(match[1]) for match in found if match]


def _saves(folder: Path) -> list[Path]:
    """The folders of all saves, newest first, whole or not."""
    found = [path for path in folder.glob("save-*") if re.fullmatch(r"save-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _no_save(folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        "no checkpoint at %s; save() writes one\n  now: name the folder that has one, or begin without" % folder
    )


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path, exclusive: bool) -> Iterator[None]:
    """One process saves at a time: it removes what looks like a leftover. A kill frees the lock.

    Raises:
        TimeoutError: another one did not end within LOCK_LIMIT.
    """
    if fcntl is None:
        log.debug("no locks on this system: one saver must do")
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + LOCK_LIMIT
        while not _lock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
            if time.monotonic() > end:
                words = "another process has been saving to it for %g s" % LOCK_LIMIT
                raise TimeoutError(errno.ETIMEDOUT, words, str(folder))
            time.sleep(0.02)  # flock knows no limit of its own
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("no locks on this file system: %s", error)  # some network file systems: one saver must do
    return True
