"""The conformance suite over the local object and over workers in many Pythons."""

import contextlib
import sys

import pytest

if "conformance" not in sys.modules:
    pytest.register_assert_rewrite("conformance")

import interpreters
from conformance import Conformance
from faces import LocalFace, WorkerFace


def opener(make):
    """An `open_face` over `make`, and the closing of all that it opened, as a generator for a fixture."""
    opened = []

    def open_face(factory, **kwargs):
        opened.append(make(factory, kwargs))
        return opened[-1]

    with contextlib.ExitStack() as closing:
        yield open_face
        for face in opened:
            closing.callback(face.close)


class TestLocal(Conformance):
    @pytest.fixture
    def open_face(self, monkeypatch):
        monkeypatch.setattr("os.read", lambda fd, count: b"")  # PrintingEnv looks at standard input: pytest's here
        yield from opener(LocalFace)


class TestWorker(Conformance):
    @pytest.fixture
    def open_face(self):
        yield from opener(lambda factory, kwargs: WorkerFace(factory, kwargs, sys.executable))


@pytest.mark.parametrize("version", interpreters.VERSIONS)
class TestWorkerInOtherPython(Conformance):
    @pytest.fixture
    def open_face(self, version):
        python = interpreters.python_with_numpy(version)
        yield from opener(lambda factory, kwargs: WorkerFace(factory, kwargs, python))
