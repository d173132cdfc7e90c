"""The way to a farm that listens on its own machine only: `ssh -N -L`, kept as long as the farmer needs it.

tunnel = Tunnel(address)        # of an ('ssh://user@host', 8) in farmlist.py
path = tunnel.open()            # a socket here that is the farm's port there
tunnel.close()

The system's `ssh` does it, with the user's config, keys, agent, jump hosts and known hosts; nothing is asked at a
terminal (BatchMode), so a login that works by `ssh -o BatchMode=yes user@host true` works here. At this end there is no
port but a socket in a folder that only this user can enter: a port on 127.0.0.1 would lead every user of this machine
to the farm.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from farmer.farmlist import FarmAddress
from wire.errors import FarmUnreachable

OPEN_LIMIT = 10.0  #: s until the tunnel stands; ssh itself gives up connecting after CONNECT_LIMIT
CONNECT_LIMIT = 5
ALIVE = (2, 2)  #: s between questions whether the other end is there, and how many stay unanswered before ssh ends
STOP_LIMIT = 2.0  #: s for ssh to end when asked

OPTIONS = {
    "BatchMode": "yes",
    "ClearAllForwardings": "no",  # or a user's config with "yes" would take ours away
    "ConnectTimeout": str(CONNECT_LIMIT),
    "ControlMaster": "no",  # a process of its own: it ends when we end it, and its end is this tunnel's
    "ControlPath": "none",
    "ExitOnForwardFailure": "yes",
    "PermitLocalCommand": "no",
    "ServerAliveCountMax": str(ALIVE[1]),
    "ServerAliveInterval": str(ALIVE[0]),
    "StreamLocalBindMask": "0177",
    "StreamLocalBindUnlink": "yes",  # of an ssh that was killed
}

# An ssh shall end with this process, however that ends: beside it a shell waits for the end of a pipe that only we
# have. `exec` keeps the shell's pid, so what we start is what we wait for.
WITH_US = 'exec 3<&0; (read _ <&3; kill $$ 2>/dev/null) & exec "$@" 3<&- </dev/null'


class Tunnel:
    """One ssh process to one machine, started again when it has ended. For any thread."""

    def __init__(self, address: FarmAddress):
        """Starts nothing yet; `address` is one with `ssh`."""
        assert address.ssh is not None
        self.address = address
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._closed = False

    def open(self) -> str:
        """The path of the socket that is the farm's port; the tunnel stands when this returns.

        Raises:
            FarmUnreachable: there is none within OPEN_LIMIT seconds; with what ssh said.
        """
        with self._lock:
            if self._closed:
                raise FarmUnreachable("the tunnel to %s is closed" % self.address)
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._start()
            return str(self._socket())

    def close(self) -> None:
        """Ends ssh, within STOP_LIMIT seconds or so."""
        with self._lock:
            self._closed = True
            self._end()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None

    @property
    def pid(self) -> int | None:
        """Of ssh, when it was started."""
        return None if self._process is None else self._process.pid

    # Inside; the lock is held.

    def _socket(self) -> Path:
        assert self._folder is not None
        return self._folder / "farm"

    def _start(self) -> None:
        if self._folder is None:
            self._folder = Path(
                tempfile.mkdtemp(prefix="farm-")
            )  # mode 700; short, a socket's path has 107 bytes at most
        began = time.monotonic()
        with open(self._folder / "stderr", "wb") as stderr:
            try:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", WITH_US, "sh", *self._command()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,  # Ctrl-C at the prompt is not for it
                )
            except OSError as error:
                raise FarmUnreachable("no tunnel to %s: %s" % (self.address, error)) from None
        try:
            while not self._stands():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = self._process.wait(0.02)  # its end is news at once, its socket is looked for now and then
                    raise self._failed("ssh ended with exit code %d" % code)
                if time.monotonic() - began > OPEN_LIMIT:
                    raise self._failed("ssh was not through after %g s" % OPEN_LIMIT)
        except BaseException:
            self._end()
            raise

    def _stands(self) -> bool:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as trial:
            try:
                trial.connect(str(self._socket()))
            except OSError:
                return False
        return True

    def _command(self) -> list[str]:
        assert self.address.ssh is not None
        there, colon, port = self.address.ssh.rpartition(":")
        if not colon or port.endswith("]"):  # no port; the last colon was one of an IPv6 address
            there, port = self.address.ssh, ""
        user, at, host = there.rpartition("@")
        options = [part for name, value in OPTIONS.items() for part in ("-o", "%s=%s" % (name, value))]
        options += ["-l", user] if at else []
        options += ["-p", port] if port else []
        forward = "%s:127.0.0.1:%d" % (self._socket(), self.address.port)
        return ["ssh", "-N", "-T", *options, "-L", forward, "--", host.strip("[]")]

    def _failed(self, why: str) -> FarmUnreachable:
        assert self._folder is not None
        said = (self._folder / "stderr").read_text(errors="replace").strip()
        return FarmUnreachable(
            "no tunnel to %s: %s\n  ssh said: %s\n  now: try the same by hand: ssh -o BatchMode=yes %s true"
            % (self.address, why, said.replace("\n", "\n    ") or "nothing", _by_hand(self.address.ssh or ""))
        )

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdin.close()  # and the shell beside it ends


def _by_hand(destination: str) -> str:
    return "ssh://" + destination if ":" in destination else destination
