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
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from agents.agent_state import Saveable
from agents.checkpoint import files, manifests, segments
from agents.keras_rl.callbacks import Callback
from agents.memory import ReplayMemory
from agents.replay_state import NoReplay, SavedReplay

log = logging.getLogger("agents")


#: Where each memory was last saved to or loaded from. `SavedReplay.changed` tells what is new since its last save to
#: anywhere, so a memory that two folders take turns with is written to each as a whole.
_written: weakref.WeakKeyDictionary[SavedReplay, segments.Lineage] = weakref.WeakKeyDictionary()


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
        return manifests.saves(self.folder)

    def due(self) -> bool:
        """Whether `every_s` have passed since the last save, tried or done."""
        return self.every_s is not None and time.monotonic() - self._last >= self.every_s

    def save(self, agent: Saveable, extra: dict[str, Any] | None = None) -> Path:
        """Saves the agent with its replay, of which only what is new or changed is written.

        Args:
            agent: compiled, with a ReplayMemory or none. Its learner is kept out meanwhile.
            extra: plain data of the caller's, for `load`.

        Returns:
            The save's folder.

        Raises:
            TypeError: the agent's memory cannot be saved, or something is no plain data; nothing was written.
            FloatingPointError: the agent has diverged; nothing was written.
            OSError: it could not be written (a full disk, no permission); the saves before it are as they were.
        """
        memory = _replay_of(agent)
        try:
            with agent.paused(), memory.lock:
                arrays, values = agent.state()
                _check_finite(arrays)
                manifest = manifests.describe(agent, values, extra)
                with self._words():
                    files.make_folder(self.folder)
                    with files.locked(self.folder, exclusive=True):
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

    def load(self, agent: Saveable) -> dict[str, Any]:
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
        memory = _replay_of(agent)
        if not self.folder.is_dir():
            raise manifests.no_save(self.folder)
        with agent.paused(), memory.lock, files.locked(self.folder, exclusive=False):
            path, manifest = self._newest_whole()
            _check_agent(path, manifest, agent)
            held = segments.segments_of(manifest)
            arrays = files.read_arrays(path / "arrays.npz")
            try:
                agent.check_state(arrays, manifest["values"])
                memory.restore(manifest["memory"], segments.read_parts(self.folder, held))
            except ValueError as error:
                raise ValueError("the checkpoint %s does not fit this agent: %s" % (path, error)) from error
            lineage = segments.Lineage(segments.new_name(), held, int(manifest["replay"]["count"]))
            _written[memory] = lineage  # under a name of its own: it may go on from a save that is not the newest
            agent.load_state(arrays, manifest["values"])
        self.loaded, self.step, self._last = path, manifest["step"], time.monotonic()
        log.debug("loaded %s, written %s", path, manifest["written"])
        return dict(manifest["extra"])

    # Saving.

    def _write(self, memory: SavedReplay, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> Path:
        """Segments, then arrays, then the manifest, then the name that makes it a save."""
        target = self.folder / ("save-%06d" % (1 + max(files.numbers_in(self.folder, "save"), default=0)))
        beside = files.part_of(target)
        lineage, numbers = self._plan(memory)
        made: list[Path] = []
        try:
            for columns in segments.chunks(memory, numbers):
                segment = self._write_segment(lineage.name, columns, made)
                lineage.segments.append(segment)
            beside.mkdir()
            size, crc32 = files.write_arrays(beside / "arrays.npz", arrays)
            manifest["memory"] = memory.meta()
            manifest["replay"] = {
                "lineage": lineage.name,
                "oldest": memory.oldest,
                "count": memory.count,
                "segments": [asdict(segment) for segment in lineage.segments],
            }
            manifest["files"] = [{"name": "arrays.npz", "size": size, "crc32": crc32}]
            manifests.write(beside / "manifest.json", manifest)
            files.sync_folder(beside)
            os.rename(beside, target)
            files.sync_folder(self.folder)
        except BaseException:
            if not target.exists():
                with contextlib.suppress(OSError):  # what stays is swept by the next save
                    for path in (beside, *made):
                        files.remove(path)
            raise
        memory.mark_saved()
        _written[memory] = lineage
        return target

    def _plan(self, memory: SavedReplay) -> tuple[segments.Lineage, np.ndarray]:
        """The lineage to go on with, and the numbers of the entries to be written to it."""
        oldest, count = memory.oldest, memory.count
        afresh = segments.Lineage(segments.new_name(), [], count), np.arange(oldest, count)
        mine = _written.get(memory)
        if mine is None or mine.count > count:
            return afresh
        kept = [segment for segment in mine.segments if segment.last >= oldest]
        if not all(
            files.has_size(segments.replay_folder(self.folder) / segment.name, segment.size) for segment in kept
        ):
            return afresh  # another folder, or one that was tidied for another agent's saves
        numbers = memory.changed(mine.count)
        small = segments.small_at_the_end(kept)
        if len(small) > segments.SMALL_SEGMENTS:
            kept = kept[: -len(small)]
            first = max(oldest, min(segment.first for segment in small))
            numbers = np.union1d(numbers, np.arange(first, count))
        held = count - oldest
        if len(numbers) == held or sum(segment.rows for segment in kept) + len(numbers) > 2 * held:
            return afresh
        return segments.Lineage(mine.name, kept, count), numbers

    def _write_segment(self, lineage: str, columns: dict[str, np.ndarray], made: list[Path]) -> segments.Segment:
        numbers, replay = columns["numbers"], segments.replay_folder(self.folder)
        files.make_folder(replay)
        index = 1 + max(files.numbers_in(replay, "segment"), default=0)
        first, last = int(numbers[0]), int(numbers[-1])
        path = replay / ("segment-%06d_%d-%d_%s.npz" % (index, first, last, lineage))
        made += [files.part_of(path), path]
        size, crc32 = files.write_arrays(files.part_of(path), columns)
        os.rename(files.part_of(path), path)
        files.sync_folder(replay)
        return segments.Segment(path.name, size, crc32, first, last, len(numbers))

    def _tidy(self) -> None:
        """Removes leftovers, saves older than the last `keep` whole ones, and segments that no save names."""
        replay = segments.replay_folder(self.folder)
        for leftover in (*self.folder.glob("save-*.part"), *replay.glob("*.part")):
            files.remove(leftover)
        found = {path: manifests.read_if_any(path) for path in manifests.saves(self.folder)}
        whole = [
            path
            for path, manifest in found.items()
            if path not in self._damaged and manifests.all_there(path, manifest)
        ]
        if len(whole) >= self.keep:
            saves = list(found)
            for path in saves[saves.index(whole[self.keep - 1]) + 1 :]:
                os.rename(
                    path, files.part_of(path)
                )  # half of it may be gone at a kill: it must not look like a save then
                files.remove(files.part_of(path))
                del found[path]
        if None in found.values():
            return  # which segments it names is not known
        needed = {segment.name for manifest in found.values() for segment in segments.segments_of(manifest or {})}
        for path in replay.glob("segment-*.npz"):
            if path.name not in needed:
                files.remove(path)

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
        for path in manifests.saves(self.folder):
            try:
                manifest = manifests.read(path)
                manifests.check_files(path, manifest)
            except (manifests.Damaged, OSError) as error:
                reasons[path] = str(error)
                continue
            for damaged, reason in reasons.items():
                log.warning("the checkpoint %s is damaged: %s; %s is taken instead", damaged, reason, path.name)
            self._damaged.update(reasons)
            return path, manifest
        if reasons:
            words = "".join("\n  %s: %s" % (path.name, reason) for path, reason in reasons.items())
            raise FileNotFoundError("no checkpoint at %s is whole:%s" % (self.folder, words))
        raise manifests.no_save(self.folder)


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


# What is checked before anything is written or changed.


def _replay_of(agent: Saveable) -> SavedReplay:
    memory = getattr(agent, "memory", None)
    if memory is None:
        return NoReplay()
    if not isinstance(memory, ReplayMemory):
        raise TypeError("a checkpoint holds the replay of agents.ReplayMemory; this agent has %r" % (memory,))
    return memory


def _check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            raise FloatingPointError(
                "%s holds NaN or infinity: the training has diverged, and nothing of it was saved\n"
                "  now: load() the save before it, then try a smaller learning rate or clipnorm" % name
            )


def _check_agent(path: Path, manifest: dict[str, Any], agent: Saveable) -> None:
    if manifest["agent"] != type(agent).__name__:
        raise ValueError(
            "the checkpoint %s is of another agent: a %s, this is a %s"
            % (path, manifest["agent"], type(agent).__name__)
        )
