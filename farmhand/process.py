"""One worker process: its command line, its pipes, its log, and its end told in words."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

from farmhand import tree
from wire import codec, protocol

WORKER = Path(__file__).resolve().parent / "worker"
WIRE = Path(codec.__file__).resolve().parent

FOREVER = float("inf")

PIPE_SIZE = 1 << 20  #: bytes; a frame of pixels then passes in one read
READ_SIZE = 1 << 16

#: A farm runs one simulator per core; math libraries that start a thread per core each would fight over them.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class WorkerProcess:
    """A process started from `farmhand/worker` in the simulator's Python, and both ends of its pipes.

    Not thread-safe: the supervisor's lock guards it.

    Attributes:
        env: the catalog's name of its environment.
        slot: where it works; None while it is a spare.
        ready: what it said when its environment stood; None before.
        due: what it was given and has not answered: (kind, seconds that it may take, repeat) each.
        deadline: when the command that it is at must be done, or, once it is doomed, when it is killed.
        doom: why it is being ended (None: it closed its pipe) and the bucket of its step; its replies count no more.
    """

    def __init__(self, python: str, env: str, order: dict[str, Any], slot: int | None, log: Path):
        """Starts the process and gives it its first command, the order to build the environment.

        Raises:
            OSError: the interpreter does not start.
        """
        self.env = env
        self.slot = slot
        self.log = log
        self.mark = uuid.uuid4().hex
        self.ready: bytes | None = None
        self.began = time.monotonic()
        self.stood = 0.0  # when its environment was built
        self.received = 0  # bytes
        self.in_the_middle = False  # a part of a frame has come, and not all of it
        self.memory = self.memory_when_fresh = 0
        self.deadline = FOREVER
        self.doom: tuple[str | None, str] | None = None
        self.leave_by = 0.0
        self.weigh_at = 0.0
        self.extended = False  # its deadline was put off because its answer was on its way
        self.rebuilds = False  # its next reset builds the environment anew
        self._descendants: list[int] = []
        self.due: deque[tuple[int, float, int]] = deque()
        self.watched: selectors.BaseSelector | None = None  # which selector has its replies read
        self.fault: str | None = None  # why the environment could not be built, said by the worker itself
        self._out = bytearray()
        self._frames = protocol.FrameReader()
        environment = dict(dict.fromkeys(ONE_THREAD, "1"), **os.environ)
        environment[tree.MARK] = self.mark
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
        self._narrow = {self.stdin, self.stdout}
        # A grandchild may keep the pipe open after the worker's death; the process itself tells it in any case.
        self.pidfd = os.pidfd_open(self.popen.pid) if hasattr(os, "pidfd_open") else None
        self.write(protocol.pack(protocol.CONSTRUCT, 0, codec.encode(order)))

    @property
    def pid(self) -> int:
        return self.popen.pid

    def write(self, frame: bytes) -> bool:
        """Writes without ever blocking; True when all of it is in the pipe, False when a rest waits for `flush`."""
        if not self._out:
            try:
                written = os.write(self.stdin, frame)
            except BlockingIOError:
                written = 0
            except BrokenPipeError:
                return True  # as in `flush`
            if written == len(frame):
                return True
            frame = frame[written:]
            if len(frame) > READ_SIZE:
                self._widen(self.stdin)
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
        room = self._frames.room()
        if room is not None:
            return self._read_long(room)
        try:
            data = os.read(self.stdout, READ_SIZE)
        except BlockingIOError:
            return []
        if not data:
            return None
        self.received += len(data)
        frames = self._frames.feed(data)
        self.in_the_middle = not frames
        room = self._frames.room()
        if room is None:
            return frames
        self._widen(self.stdout)
        return frames + (self._read_long(room) or [])  # the rest of it is mostly there as well

    def _read_long(self, room: memoryview) -> list[tuple[int, int, int, bytes]] | None:
        """Goes on with a long frame, which is read to where it stays."""
        try:
            count = os.readv(self.stdout, [room])
        except BlockingIOError:
            return []
        if not count:
            return None
        self.received += count
        frames = self._frames.filled(count)
        self.in_the_middle = not frames
        return frames

    def _widen(self, pipe: int) -> None:
        """Has a pipe take more at a time, once it has carried something long.

        Not each from the start: beyond 64 MB in all pipes of one user Linux gives that user's programs only the
        smallest ones, and refuses this, unless the farm is root's.
        """
        if pipe in self._narrow:
            import fcntl

            self._narrow.remove(pipe)
            command = getattr(fcntl, "F_SETPIPE_SZ", None)  # Linux, Python >= 3.10
            if command is not None:
                with contextlib.suppress(OSError):  # the default size only costs more reads
                    fcntl.fcntl(pipe, command, PIPE_SIZE)

    # What it is given to do, and until when. Replies come in the order of the commands.

    def begin(self, kind: int, seconds: float, repeat: int = 1) -> None:
        """A command was written that may take so long, from when the ones before it are done."""
        if not self.due:
            self.deadline = time.monotonic() + seconds
        self.due.append((kind, seconds, repeat))

    def done(self) -> tuple[int, float, int]:
        """A reply came. Returns what was due: (kind, the seconds it might have taken, repeat)."""
        self.extended = False
        due = self.due.popleft()
        self.deadline = time.monotonic() + self.due[0][1] if self.due else FOREVER
        return due

    @property
    def is_asked(self) -> bool:
        """Whether a reply is due."""
        return bool(self.due)

    @property
    def at(self) -> tuple[int, float, int]:
        """What it is at, as `done` returns it."""
        return self.due[0]

    def rss(self) -> int | None:
        """Resident bytes of it and all that it started, None when the process is gone."""
        return tree.resident(self.pid) or None

    # Its end.

    def ask_to_end(self) -> None:
        """Gives the environment the chance to close by itself."""
        self.write(protocol.pack(protocol.CLOSE, 0))

    def ask_for_trace(self) -> None:
        """Has Python write to the log where it is, also out of C and endless loops; the process ends by that.

        A stopped process does nothing, and one of Python 2 only ends.
        """
        self._descendants = tree.family(self.pid)[1:]  # while it is there to be asked for them
        _forbid_core(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGABRT)

    def kill(self) -> str:
        """Ends it and all that it started now, without waiting for that; says in words how the worker ended."""
        by_itself = self.has_ended()  # seen, not collected: its number is nobody else's yet
        others = set(self._descendants if by_itself else tree.family(self.pid)[1:])
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone
            os.killpg(self.pid, signal.SIGKILL)
        tree.kill(list(others))  # those of them that left the group
        return self._obituary(by_itself)

    def has_ended(self) -> bool:
        if self.popen.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def is_gone(self) -> bool:
        """Whether the killed process is gone; then its pipes are closed."""
        if self.popen.poll() is None:
            return False
        self.close()
        return True

    def end(self, grace: float = 0.0) -> None:
        """Ends it and waits for that: at most `grace` + 1 s."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(grace)
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
            self.popen.wait(1.0)
        self.close()

    def close(self) -> None:
        """Closes the pipes."""
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def name(self) -> str:
        """As texts call it."""
        place = "a spare of %s" % self.env if self.slot is None else "slot %d" % self.slot
        return "%s (pid %d)" % (place, self.pid)

    def _obituary(self, by_itself: bool) -> str:
        if self.fault:
            return self.fault
        if not by_itself:
            return "%s closed its pipe and was stopped%s" % (self.name(), self.evidence())
        code = self.popen.wait()
        how = "was killed by %s" % _signal(-code) if code < 0 else "exited with code %d" % code
        return "%s %s%s" % (self.name(), how, self.evidence())

    def evidence(self, lines: int = 6) -> str:
        """Where its log is, and what stands last in it."""
        tail = self.tail(lines)
        return "; its log: %s%s" % (self.log, "\n  " + "\n  ".join(tail) if tail else "")

    def tail(self, lines: int) -> list[str]:
        """The last lines that this worker wrote to its log."""
        with open(self.log, "rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 4096))
            return log.read().decode("utf-8", "replace").splitlines()[-lines:]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last
        return "signal %d" % number


def _forbid_core(pid: int) -> None:
    """No core file: writing one can take minutes, and its log says where it was."""
    import resource

    if hasattr(resource, "prlimit"):  # Linux
        with contextlib.suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, resource.prlimit(pid, resource.RLIMIT_CORE)[1]))
