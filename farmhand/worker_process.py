"""One worker process: its command line, its pipes, its log, and how it ended, in words.

A farm reads many workers at once and never blocks (`workers.py`). A program with one worker and nothing else to do
waits for each answer:

    with contextlib.closing(WorkerProcess(python, "Pendulum-v1", None, log)) as worker:
        kind, _, _, body = worker.ask(protocol.pack(protocol.CONSTRUCT, 0, codec.encode(order)), 60.0)
"""

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

from farmhand import tree
from wire import codec, protocol

WORKER = Path(__file__).resolve().parent / "worker"
WIRE = Path(codec.__file__).resolve().parent

FOREVER = float("inf")

PIPE_SIZE = 1 << 20  #: bytes; a frame of pixels then passes in one read
READ_SIZE = 1 << 16

#: A farm runs one simulator per core; math libraries that start a thread per core each would compete for them.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")

Frame = tuple[int, int, int, bytes]  #: kind, flags, ticket, body
Due = tuple[int, float, int]  #: a command without a reply yet: kind, seconds that it may take, repeat


class WorkerProcess:
    """A process started from `farmhand/worker` in the simulator's Python, and both ends of its pipes.

    Not thread-safe: on a farm the farm's lock guards it (see the table in `supervisor.py`).

    Attributes:
        env: the catalog's name of its environment.
        slot: the number of the slot that it works in; None while it is a spare.
        log: the file that it writes to.
        ready: the READY body that it sent when its environment was built; None before.
        ready_at: when that came.
        due: the commands that it has not answered, oldest first.
        deadline: when the oldest of them must be done, or, with a pending kill, when it is killed.
        pending_kill: why it is about to be killed (None: it closed its pipe) and the bucket of its step; its replies
            no longer count.
        rebuilds: whether its next reset builds the environment anew.
        fault: why the environment could not be built, as the worker itself reported it.
        watched: the selector that its replies are read by.
    """

    def __init__(self, python: str, env: str, slot: int | None, log: Path):
        """Starts the process; its first command has to be a CONSTRUCT.

        Raises:
            OSError: the interpreter does not start.
        """
        self.env, self.slot, self.log = env, slot, log
        self.mark = uuid.uuid4().hex
        self.started_at = time.monotonic()
        self.ready: bytes | None = None
        self.ready_at = 0.0
        self.fault: str | None = None
        self.rebuilds = False
        self.due: deque[Due] = deque()
        self.deadline = FOREVER
        self.extended = False  # its deadline was put off because its answer was on its way
        self.pending_kill: tuple[str | None, str] | None = None
        self.leave_by = 0.0  # when it is killed, once it was asked to end
        self.received = 0  # bytes
        self.in_the_middle = False  # a part of a frame has come, but not all of it
        self.watched: selectors.BaseSelector | None = None
        self._descendants: list[int] = []
        self._out = bytearray()
        self._frames = protocol.FrameReader()
        self._start(python)

    def _start(self, python: str) -> None:
        environment = dict(dict.fromkeys(ONE_THREAD, "1"), **os.environ)
        environment[tree.MARK] = self.mark
        with open(self.log, "ab") as stderr:
            self._log_start = stderr.tell()
            self._popen = subprocess.Popen(
                [python, str(WORKER), "--wire", str(WIRE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,  # Ctrl-C at the farm's terminal is the farm's; the group can be killed
            )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self.stdin, self.stdout = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        for pipe in (self.stdin, self.stdout):
            os.set_blocking(pipe, False)
        self._narrow = {self.stdin, self.stdout}
        # A grandchild may keep the pipe open after the worker's death; the pidfd becomes readable in any case.
        self.pidfd = os.pidfd_open(self._popen.pid) if hasattr(os, "pidfd_open") else None

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """As `subprocess` has it: negative for a signal; None until the end was collected."""
        return self._popen.returncode

    # Its pipes.

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
                self._out.clear()  # the worker is dead; whoever reads from it notices
        return True

    def read(self) -> list[Frame] | None:
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

    def _read_long(self, room: memoryview) -> list[Frame] | None:
        """Continues a long frame, which is read directly into its final place."""
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
        """Makes a pipe larger, once it has carried something long.

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

    def ask(self, frame: bytes, limit: float) -> Frame | None:
        """Writes a command and waits for its answer, for callers that have nothing else to wait for.

        Returns:
            The answer; None when the worker closed its pipe.

        Raises:
            TimeoutError: there is no answer within `limit` seconds.
            protocol.FrameError: something that is no frame came.
        """
        deadline = time.monotonic() + limit
        self.write(frame)
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            if not self.flush():
                selector.register(self.stdin, selectors.EVENT_WRITE)
            while True:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    raise TimeoutError(f"{self.name()} did not answer within {limit:g} s")
                for key, _ in events:
                    if key.fd == self.stdin:
                        if self.flush():
                            selector.unregister(self.stdin)
                        continue
                    frames = self.read()
                    if frames is None or frames:
                        return frames[0] if frames else None

    # What it is given to do, and until when. Replies come in the order of the commands.

    def begin(self, kind: int, seconds: float, repeat: int = 1) -> None:
        """A command was written that may take so long, from when the ones before it are done."""
        if not self.due:
            self.deadline = time.monotonic() + seconds
        self.due.append((kind, seconds, repeat))

    def done(self) -> Due:
        """A reply came. Returns what was due."""
        self.extended = False
        due = self.due.popleft()
        self.deadline = time.monotonic() + self.due[0][1] if self.due else FOREVER
        return due

    def rss(self) -> int | None:
        """Resident bytes of it and all that it started, None when the process is gone."""
        return tree.resident(self.pid) or None

    # Its end.

    def ask_to_end(self) -> None:
        """Gives the environment the chance to close by itself."""
        self.write(protocol.pack(protocol.CLOSE, 0))

    def ask_for_trace(self) -> None:
        """Makes Python write to the log where it is, also in C and in endless loops; the process ends by that.

        A stopped process does nothing, and one of Python 2 only ends.
        """
        self._descendants = tree.family(self.pid)[1:]  # while it is there to be asked for them
        _forbid_core(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGABRT)

    def kill(self) -> str:
        """Ends it and all that it started now, without waiting; returns the exit reason in words."""
        by_itself = self.has_ended()  # seen, not collected: its number is nobody else's yet
        others = set(self._descendants if by_itself else tree.family(self.pid)[1:])
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone
            os.killpg(self.pid, signal.SIGKILL)
        tree.kill(list(others))  # those of them that left the group
        return self._exit_reason(by_itself)

    def has_ended(self) -> bool:
        """Whether the process has ended, collected or not."""
        if self._popen.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def is_gone(self) -> bool:
        """Whether the killed process is gone; then its pipes are closed."""
        if self._popen.poll() is None:
            return False
        self.close()
        return True

    def wait(self, limit: float) -> int | None:
        """Waits for its end, at most `limit` seconds, and returns its exit code, None while it lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._popen.wait(limit)
        return None

    def end(self, grace: float = 0.0) -> None:
        """Ends it and waits for that: at most `grace` + 1 s."""
        self.wait(grace)
        self.kill()
        self.wait(1.0)  # longer it takes where it hangs in the kernel
        self.close()

    def close(self) -> None:
        """Closes the pipes."""
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    # What is said about it.

    def name(self) -> str:
        """Its name in messages."""
        place = f"a spare of {self.env}" if self.slot is None else f"slot {self.slot}"
        return f"{place} (pid {self.pid})"

    def _exit_reason(self, by_itself: bool) -> str:
        if self.fault:
            return self.fault
        if not by_itself:
            return f"{self.name()} closed its pipe and was stopped{self.evidence()}"
        code = self._popen.wait()
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}"
        return f"{self.name()} {how}{self.evidence()}"

    def evidence(self, lines: int = 6) -> str:
        """Where its log is, and the last lines of it."""
        tail = self.tail(lines)
        return f"; its log: {self.log}" + ("\n  " + "\n  ".join(tail) if tail else "")

    def tail(self, lines: int) -> list[str]:
        """The last lines that this worker wrote to its log."""
        return self.log_end(4096).decode("utf-8", "replace").splitlines()[-lines:]

    def log_end(self, size: int) -> bytes:
        """The last bytes that this worker, and none before it, wrote to its log.

        Raises:
            OSError: the log cannot be read.
        """
        with open(self.log, "rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - size))
            return log.read(size)


def signal_name(number: int) -> str:
    """`SIGSEGV` for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last
        return f"signal {number}"


def _forbid_core(pid: int) -> None:
    """No core file: writing one can take minutes, and the log says where the process was."""
    import resource

    if hasattr(resource, "prlimit"):  # Linux
        with contextlib.suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, resource.prlimit(pid, resource.RLIMIT_CORE)[1]))
