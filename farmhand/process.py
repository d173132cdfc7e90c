"""One worker process: its command line, its pipes, its log, and its end told in words."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil

from wire import codec, protocol

WORKER = Path(__file__).resolve().parent / "worker"
WIRE = Path(codec.__file__).resolve().parent

PIPE_SIZE = 1 << 20  #: bytes; a frame of pixels then passes in one read
READ_SIZE = 1 << 16

#: A farm runs one simulator per core; math libraries that start a thread per core each would fight over them.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class WorkerProcess:
    """A process started from `farmhand/worker` in the simulator's Python, and both ends of its pipes.

    Not thread-safe: the supervisor's lock guards it.
    """

    def __init__(self, python: str, order: dict[str, Any], slot: int, log: Path):
        """Starts the process and gives it its first command, the order to build the environment.

        Raises:
            OSError: the interpreter does not start.
        """
        self.slot = slot
        self.log = log
        self.watched: selectors.BaseSelector | None = None  # which selector has its replies read
        self.fault: str | None = None  # why the environment could not be built, said by the worker itself
        self._out = bytearray()
        self._frames = protocol.FrameReader()
        environment = dict(dict.fromkeys(ONE_THREAD, "1"), **os.environ)
        with open(log, "ab") as stderr:
            self._log_start = stderr.tell()
            self.popen = subprocess.Popen(
                [python, str(WORKER), "--wire", str(WIRE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,  # Ctrl-C at the farm's terminal is the farm's; the group can be killed
            )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.stdin, self.stdout = self.popen.stdin.fileno(), self.popen.stdout.fileno()
        for pipe in (self.stdin, self.stdout):
            os.set_blocking(pipe, False)
            _widen(pipe)
        # A grandchild may keep the pipe open after the worker's death; the process itself tells it in any case.
        self.pidfd = os.pidfd_open(self.popen.pid) if hasattr(os, "pidfd_open") else None
        self.write(protocol.pack(protocol.CONSTRUCT, 0, codec.encode(order)))

    @property
    def pid(self) -> int:
        return self.popen.pid

    def write(self, frame: bytes) -> bool:
        """Writes without ever blocking; True when all of it is in the pipe, False when a rest waits for `flush`."""
        self._out += frame
        return self.flush()

    def flush(self) -> bool:
        """Writes what is left over, as far as the pipe takes it."""
        while self._out:
            try:
                del self._out[: os.write(self.stdin, self._out)]
            except BlockingIOError:
                return False
            except BrokenPipeError:
                self._out.clear()  # the worker is dead; its end is noticed by the loop
        return True

    def read(self) -> list[tuple[int, int, int, bytes]] | None:
        """The frames that are in; None when the worker closed its pipe.

        Raises:
            protocol.FrameError: something that is no frame came.
        """
        try:
            data = os.read(self.stdout, READ_SIZE)
        except BlockingIOError:
            return []
        return self._frames.feed(data) if data else None

    def rss(self) -> int | None:
        """Resident memory in bytes, None when the process is gone."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return None

    def ask_to_end(self) -> None:
        """Gives the environment the chance to close by itself."""
        self.write(protocol.pack(protocol.CLOSE, 0))

    def end(self, grace: float = 0.0) -> str:
        """Ends the whole process group and says how the worker ended: at most `grace` + 1 s."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(grace)
        by_itself = self.popen.poll() is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone
            os.killpg(self.pid, signal.SIGKILL)
        try:
            self.popen.wait(1.0)
        except subprocess.TimeoutExpired:
            return "slot %d (pid %d) does not end on SIGKILL; it hangs in the kernel" % (self.slot, self.pid)
        finally:
            self._close()
        return self._obituary(by_itself)

    def _close(self) -> None:
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def _obituary(self, by_itself: bool) -> str:
        if self.fault:
            return self.fault
        who = "slot %d (pid %d)" % (self.slot, self.pid)
        code = self.popen.returncode
        if not by_itself:
            said = "%s was stopped by the farm" % who
        elif code < 0:
            said = "%s was killed by %s" % (who, signal.Signals(-code).name)
        else:
            said = "%s exited with code %d" % (who, code)
        tail = self.tail()
        return "%s; its log: %s%s" % (said, self.log, "\n  " + "\n  ".join(tail) if tail else "")

    def tail(self, lines: int = 6) -> list[str]:
        """The last lines that this worker wrote to its log."""
        with open(self.log, "rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 4096))
            return log.read().decode("utf-8", "replace").splitlines()[-lines:]


def _widen(pipe: int) -> None:
    import fcntl

    command = getattr(fcntl, "F_SETPIPE_SZ", None)  # Linux, Python >= 3.10
    if command is not None:
        with contextlib.suppress(OSError):  # over the user's limit: the default size only costs more reads
            fcntl.fcntl(pipe, command, PIPE_SIZE)
