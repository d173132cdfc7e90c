"""The process in a slot: a command comes in, the environment does it, the result goes out.

    PYTHON /path/to/farmhand/worker --wire /path/to/wire

Commands come on standard input and replies go to standard output, as frames of `wire/protocol.py`, which has the table
of both. Exit codes: 0 told to end, or the farm is gone; 3 the environment could not be made; 4 this Python lacks numpy;
5 what came is no frame; 6 the environment closed a pipe of ours. When the farm is gone and this process leads a group,
it ends the group by SIGKILL: the programs that the environment started go with it.

Nothing needs to be installed for it but numpy. It runs unchanged on Python 2.7 to 3.13.
"""

import errno
import os
import platform
import select
import signal
import sys
import threading
import time

EXIT_CONSTRUCT = 3
EXIT_NUMPY = 4
EXIT_FRAME = 5
EXIT_PIPE = 6
CLOSE_LIMIT = 5.0  #: seconds an environment may take to close once the farm is gone
OWN_MODULES = ("adapt", "build", "check", "describe", "host", "codec", "protocol")


def import_own(wire):
    """Imports our modules, and then hides them: a user's module named `adapt` or `codec` must be found."""
    global codec, host, protocol
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    try:
        import numpy  # noqa: F401  (before our folders are in its way)
    except ImportError as error:
        sys.stderr.write(
            "worker: Python %s (%s) cannot import numpy: %s\n"
            "  now: install it there (%s -m pip install numpy), or name another Python with --python\n"
            % (platform.python_version(), sys.executable, error, sys.executable)
        )
        sys.stderr.flush()
        os._exit(EXIT_NUMPY)
    path = list(sys.path)
    writes_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # many workers of many Pythons start from this one folder, maybe a read-only one
    sys.path[:0] = [here, wire]
    try:
        import codec
        import host
        import protocol
    finally:
        sys.path[:] = path
        sys.dont_write_bytecode = writes_bytecode
        for name in OWN_MODULES:
            sys.modules.pop(name, None)


def take_pipes():
    """Moves the two pipes to where the environment does not find them.

    Simulators print, and read, and start programs that do. They find an empty standard input, and what they
    print goes to standard error, which is the slot's log.

    Returns:
        (fd of the commands, fd of the replies); programs that the environment starts do not inherit them.
    """
    commands, replies = os.dup(0), os.dup(1)
    if sys.version_info < (3, 4):
        import fcntl

        for fd in (commands, replies):
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.fcntl(fd, fcntl.F_GETFD) | fcntl.FD_CLOEXEC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdin = sys.__stdin__ = os.fdopen(0, "r")
    # Line by line: what was printed before a crash is the evidence.
    # What cannot be written in this locale must not raise in the middle of a step.
    form = {} if sys.version_info[0] == 2 else {"errors": "backslashreplace"}
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", 1, **form)
    return commands, replies


def watch(commands, state):
    """Ends this process when the farm closes the command pipe, even in the middle of a step.

    A thread of its own, asleep in `poll` until the pipe hangs up, so that it costs a step nothing: the main
    thread reads the commands itself. A simulator that holds the interpreter's lock for ever cannot be ended
    from in here; the farm kills its process group.
    """
    poll = select.poll()
    poll.register(commands, 0)  # no events: a hang-up is reported all the same
    while True:
        try:
            events = poll.poll()
        except select.error:  # Python 2 lets a signal end the call
            continue
        if any(event & select.POLLNVAL for _, event in events):
            lost_pipe()
        if events:
            break
    # A CLOSE may be in the pipe's last bytes: the main thread gets the time to see it, and to do it.
    time.sleep(0.2)
    if state["closing"]:
        time.sleep(CLOSE_LIMIT)
    end_of_farm()


def end_of_farm():
    """The farm is gone: ends this process, and with it what the environment has started."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def lost_pipe():
    """Ends the process when the environment has closed one of our pipes: no reply can reach the farm any more."""
    sys.stderr.write("worker: the environment closed a pipe to the farm, which is not its own\n")
    sys.stderr.flush()
    os._exit(EXIT_PIPE)


def die_with_farm(parent):
    """Has the kernel end this process with the farm, where it can (Linux).

    `watch` does that everywhere, but not while a simulator holds the interpreter's lock for ever. The kernel takes the
    end of the very thread that started us for the end of the farm, so a farm starts workers in a thread that stays.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        import ctypes  # numpy has imported it already, where it is there

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (ImportError, OSError, AttributeError):  # a Python without ctypes, a C library without prctl
        return
    if os.getppid() != parent:  # it died before we asked
        end_of_farm()


class Loop(object):
    """The pipes on one side, the environment on the other."""

    def __init__(self, commands, replies, state):
        self._commands = commands
        self._replies = replies
        self._state = state
        self._host = host.Host()
        self._reader = protocol.FrameReader()
        self._does = {
            protocol.CONSTRUCT: (self._host.construct, "construct"),
            protocol.RESET: (self._host.reset, "reset"),
            protocol.STEP: (self._host.step, "step"),
        }

    def run(self):
        """Serves commands until the process ends."""
        read, commands, feed = os.read, self._commands, self._reader.feed
        while True:
            try:
                data = read(commands, 65536)
            except OSError:
                data = self._read()
            if not data:
                end_of_farm()
            try:
                frames = feed(data)
            except protocol.FrameError as error:
                sys.stderr.write("worker: the farm sent something that is %s\n" % error)
                sys.stderr.flush()
                os._exit(EXIT_FRAME)
            for kind, _, seq, body in frames:
                self._serve(kind, seq, body)

    def _serve(self, kind, seq, body):
        if kind == protocol.CLOSE:
            self._state["closing"] = True
            self._host.close()
            self._end(0)
        does, where = self._does.get(kind) or (self._unknown, protocol.NAMES[kind])
        try:
            reply, result, flags = does(body)
            size = sum(map(len, result)) if type(result) is tuple else len(result)
            head = protocol.head(reply, seq, size, flags)
        except:  # noqa: E722  (an environment may raise SystemExit, and in Python 2 what is no Exception at all)
            misuse = isinstance(sys.exc_info()[1], host.MISUSE)
            frame = protocol.pack(protocol.FAULT, seq, codec.encode(host.fault(where)))
            if not misuse:
                self._host.close()
            self._write(frame)
            if where == "construct":
                self._end(EXIT_CONSTRUCT)
            return
        if size > host.LARGE:
            self._write_pieces((head,) + (result if type(result) is tuple else (result,)))
        else:
            self._write(head + result)

    def _unknown(self, body):
        raise ValueError("a worker knows construct, reset, step and close only")

    def _end(self, code):
        """Ends the process at once.

        Not by `sys.exit`: a thread that the simulator left behind would keep the process alive, and the clean-up
        of C++ libraries is where they crash.
        """
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, IOError, ValueError, AttributeError):
                pass
        os._exit(code)

    def _read(self):
        while True:
            try:
                return os.read(self._commands, 65536)
            except OSError as error:
                if error.errno == errno.EBADF:
                    lost_pipe()
                if error.errno != errno.EINTR:  # Python 2 lets a signal of the simulator's end the call
                    raise

    def _write_pieces(self, pieces):
        """Writes pieces in order; in one call where the system can, so that the farm wakes only once."""
        written = 0
        if hasattr(os, "writev"):
            try:
                written = os.writev(self._replies, pieces)
            except OSError:
                pass  # the next line but one meets it again
        for piece in pieces:
            if written < len(piece):
                self._write(memoryview(piece)[written:])
            written = max(0, written - len(piece))

    def _write(self, data):
        rest = data
        while len(rest):
            try:
                written = os.write(self._replies, rest)
                if written == len(rest):
                    return
                rest = memoryview(rest)[written:]
            except OSError as error:
                if error.errno == errno.EBADF:
                    lost_pipe()
                if error.errno == errno.EPIPE:
                    end_of_farm()
                if error.errno != errno.EINTR:
                    raise


def main(arguments):
    """Starts the worker; does not return."""
    if len(arguments) != 2 or arguments[0] != "--wire":
        sys.exit("usage: python FOLDER_OF_THE_WORKER --wire FOLDER_OF_THE_CODEC (the farm starts it)")
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the farm's
    commands, replies = take_pipes()
    try:
        import faulthandler

        faulthandler.enable()
    except ImportError:  # Python 2
        pass
    import_own(os.path.abspath(arguments[1]))
    die_with_farm(parent)
    del sys.argv[1:]  # a simulator that reads its command line must not find ours
    state = {"closing": False}
    if hasattr(select, "poll"):
        watcher = threading.Thread(target=watch, args=(commands, state), name="farm watch")
        watcher.daemon = True
        watcher.start()
    Loop(commands, replies, state).run()


if __name__ == "__main__":
    main(sys.argv[1:])
