"""The faces of an environment: the ways to get at one, all with the same verbs.

    face = WorkerFace("CountingEnv", {"length": 3}, python="/path/to/python")
    observation, info = face.reset(seed=1, options=None)
    observation, reward, terminated, truncated, info = face.step(action)
    face.close()

`conformance.py` is run over each of them.
"""

import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time

import environments

from farmhand.worker import adapt
from wire import codec, protocol

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent


class Fault(Exception):
    """What a worker reported instead of a result.

    Attributes:
        body: the dict of the FAULT.
    """

    def __init__(self, body):
        super().__init__(f"{body['type']} in {body['where']}: {body['text']}")
        self.body = body


class WorkerGone(Exception):
    """The worker's pipe closed; the text has its exit code and its log."""


class LocalFace:
    """The environment in this process, behind the same adapter that a worker uses."""

    def __init__(self, factory, kwargs):
        self.adapted = adapt.adapt(getattr(environments, factory)(**kwargs))

    def reset(self, seed=None, options=None):
        return self.adapted.reset(seed, options)

    def step(self, action, repeat=1):
        assert repeat == 1, "repetition is the worker's"
        observation, reward, terminated, truncated, info = self.adapted.step(action)
        return observation, float(reward), terminated, truncated, info

    def close(self):
        self.adapted.close()


class WorkerProcess:
    """A worker over its two pipes, one frame at a time; every wait has a limit."""

    def __init__(self, python=sys.executable, environ=None, worker=ROOT / "farmhand" / "worker"):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self.process = subprocess.Popen(
            [str(python), str(worker), "--wire", str(ROOT / "wire")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
            env=dict(os.environ, **(environ or {})),
            start_new_session=True,
        )
        self.seq = 0
        self.reader = protocol.FrameReader()

    def send(self, kind, value=None):
        self.seq += 1
        body = b"" if kind == protocol.CLOSE else codec.encode(value)
        self.process.stdin.write(protocol.pack(kind, self.seq, body))

    def receive(self, limit=30.0):
        """The next reply as (kind, flags, seq, value)."""
        end = time.monotonic() + limit
        while True:
            left = end - time.monotonic()
            if left < 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError(f"no reply in {limit} s; log: {self.read_log()}")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                code = self.process.wait(10)
                raise WorkerGone(f"exit code {code}; log: {self.read_log()}")
            frames = self.reader.feed(data)
            if frames:
                assert len(frames) == 1, "one command, one reply"
                kind, flags, seq, body = frames[0]
                return kind, flags, seq, codec.decode(body)

    def ask(self, kind, value, limit=30.0):
        """Sends a command and waits for its reply.

        Raises:
            Fault: the reply is one.
        """
        self.send(kind, value)
        reply, flags, seq, result = self.receive(limit)
        assert seq == self.seq, "a reply carries the number of its command"
        if reply == protocol.FAULT:
            raise Fault(result)
        self.flags = flags
        return result

    def read_log(self):
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace")

    def end(self, limit=30.0):
        """Closes the pipes and waits; returns the exit code."""
        self.process.stdin.close()
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(limit)
            raise
        finally:
            self.process.stdout.close()
            self.log.close()


class WorkerFace:
    """The environment in a worker process of its own, driven over its pipes.

    Attributes:
        env_s: seconds that the last reset or step spent in the environment, as the worker says.
    """

    def __init__(self, factory, kwargs, python=sys.executable):
        self.worker = WorkerProcess(python)
        spec = {"kind": "factory", "module": "environments", "factory": factory}
        body = {"env": spec, "kwargs": kwargs, "path": [str(TESTS)], "name": factory}
        try:
            self.ready = self.worker.ask(protocol.CONSTRUCT, body)
        except BaseException:
            self.worker.end()
            raise

    def reset(self, seed=None, options=None):
        observation, info, seconds = self.worker.ask(protocol.RESET, {"seed": seed, "options": options})
        self.env_s = float(seconds)
        return observation, info

    def step(self, action, repeat=1):
        result = self.worker.ask(protocol.STEP, {"action": action, "repeat": repeat})
        flags = (protocol.TERMINATED if result[2] else 0) | (protocol.TRUNCATED if result[3] else 0)
        assert self.worker.flags == flags, "the frame tells the end as the body does"
        observation, reward, terminated, truncated, info, seconds = result
        self.env_s = float(seconds)  # numpy's on the wire, as the reward: a host makes them Python's
        return observation, float(reward), terminated, truncated, info

    def close(self):
        try:
            self.worker.send(protocol.CLOSE)
        finally:
            code = self.worker.end()
        assert code == 0, f"the worker ended with exit code {code}"
