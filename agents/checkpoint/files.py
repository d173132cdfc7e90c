"""Files that are whole or not there: arrays with their CRC-32, folders that are synced, a lock between processes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_LIMIT = 60.0  #: s to wait for another process that saves to the folder

log = logging.getLogger("agents")


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


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
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


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def part_of(path: Path) -> Path:
    """Where a file or folder is written before it has its name."""
    return path.with_name(path.name + ".part")


def numbers_in(folder: Path, kind: str) -> list[int]:
    """The numbers that saves or segments in a folder bear, leftovers among them."""
    found = (re.match(r"%s-(\d+)" % kind, path.name) for path in folder.glob(kind + "-*"))
    return [int(match[1]) for match in found if match]


def make_folder(folder: Path) -> None:
    """Makes a folder that a crash does not take away."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def remove(path: Path) -> None:
    """A file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Renames in it are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def has_size(path: Path, size: int) -> bool:
    """Whether the file is there in full length."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


@contextlib.contextmanager
def locked(folder: Path, exclusive: bool) -> Iterator[None]:
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
