"""A farm on this machine, for a user who has no farmlist yet."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from session.options import Options
from session.screen import say
from wire.errors import FarmError

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT = 150.0  #: s for a local farm to come up
RESTARTS = 3  #: times an hour that a local farm which has ended is started again


class LocalFarm:
    """A farm on this machine as a child, for a user who has no farmlist yet. It ends with this process.

    Attributes:
        address: of it, and how many slots it has.
        trouble: why it ended for good, None while it runs.
        on_end: called, by a thread, when it has ended for good.
    """

    def __init__(self, options: Options, folder: Path):
        """Starts it and waits until it offers the environment.

        Args:
            options: what it shall offer.
            folder: for its logs.

        Raises:
            FarmError: it did not start; what it said is in the text.
        """
        self.slots = options.slots or os.cpu_count() or 1
        command = [sys.executable, str(ROOT / "farm.py"), options.env, "--slots", str(self.slots), "--until-eof"]
        command += ["--log-dir", str(folder / "logs")]
        command += ["--python", str(options.python)] if options.python else []
        command += ["--key-file", str(options.key_file)] if options.key_file else []
        self._command = command
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "farm.log"
        self.log.write_bytes(b"")
        self.trouble: str | None = None
        self.on_end: Callable[[], None] = lambda: None
        self._restarted: list[float] = []
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # of the process, against a stop while it is started again
        self._process = self._start(0)
        self.address = self._wait()
        threading.Thread(target=self._look_after, name="local farm", daemon=True).start()

    def _start(self, port: int) -> subprocess.Popen[str]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [*self._command, "--port", str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def _look_after(self) -> None:
        """Starts it again at its address when it ends, so that the farmer finds it there; not over and over."""
        while not self._stopping.wait(0.5):
            code = self._process.poll()
            if code is None:
                continue
            now = time.monotonic()
            self._restarted = [before for before in self._restarted if now - before < 3600]
            told = "the local farm ended (code %d), see %s" % (code, self.log)
            if len(self._restarted) >= RESTARTS:
                self._give_up(told)
                return
            self._restarted.append(now)
            say("%s; it is started again" % told)
            try:
                with self._lock:
                    if self._stopping.is_set():
                        return
                    self._end()
                    self._process = self._start(int(self.address[0].rpartition(":")[2]))
                self._wait()
            except (FarmError, OSError) as error:
                self._give_up("%s; %s" % (told, error))
                return

    def _give_up(self, why: str) -> None:
        if not self._stopping.is_set():
            self.trouble = why
            self.on_end()

    def _wait(self) -> tuple[str, int]:
        assert self._process.stdout is not None
        patience = threading.Timer(START_LIMIT, self._process.kill)
        patience.start()
        try:
            line = self._process.stdout.readline()
        except BaseException:
            self.stop()
            raise
        finally:
            patience.cancel()
        found = re.match(r"farm at (\S+?),", line)
        if found is None:
            self.stop()
            said = [text for text in self.log.read_text(errors="replace").splitlines() if text]
            raise FarmError("the local farm did not start:\n  " + "\n  ".join(said[-12:]))
        return found.group(1), self.slots

    def stop(self) -> None:
        """Ends it and its workers, within about 6 s."""
        self._stopping.set()
        with self._lock:
            self._end()

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(6.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
