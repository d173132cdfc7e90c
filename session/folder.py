"""The folder of a training, which one process has at a time."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from wire.errors import BadFolder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("train")


class Folder:
    """A folder that is there, can be written, and is this process's until `free` or its end, however it ends.

    The lock is the system's (flock), on the file `lock` in it. That file stays, and holds the owner's process id for
    whoever is refused; whether it is there says nothing.
    """

    def __init__(self, path: Path):
        """Makes it where it is not there, and takes it.

        Raises:
            BadFolder: it cannot be made or written, or another training has it.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise BadFolder(
                "cannot write to the folder of this training, %s: %s\n  now: name another with --out"
                % (path, error.strerror or error)
            ) from None
        try:
            self._take()
        except BaseException:
            os.close(self._handle)
            raise

    def _take(self) -> None:
        if fcntl is None:
            log.warning("no locks on this system: see to it that no other training writes to %s", self.path)
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._refusal() from None
            log.warning("no locks on %s (%s): see to it that no other training writes to it", self.path, error.strerror)
            return
        try:
            os.ftruncate(self._handle, 0)
            os.write(self._handle, b"%d\n" % os.getpid())
        except OSError as error:  # a full disk, for example
            raise BadFolder(
                "cannot write to %s: %s\n  now: make room, or name another folder with --out"
                % (self.path / "lock", error.strerror or error)
            ) from None

    def _refusal(self) -> BadFolder:
        owner = os.pread(self._handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        if owner == str(os.getpid()):
            return BadFolder(
                "an earlier session of this Python has the folder %s\n  now: session.close() frees it" % self.path
            )
        return BadFolder(
            "another training (process %s) has the folder %s; two would destroy each other's saves\n"
            "  now: end that one, or name another folder with --out" % (owner, self.path)
        )

    def free(self) -> None:
        """Gives it back; also twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
