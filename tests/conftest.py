"""What holds for every test."""

from __future__ import annotations

import pathlib
import sys

import pytest
from leftovers import leaves_nothing_behind  # noqa: F401

from farmer.pyro.exchange import Exchange

# A worker's modules find those of wire by their bare names, and so they must in tests that import them here.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "wire"))


@pytest.fixture
def exchanges(monkeypatch):
    """Each exchange that is started, in its order."""
    found = []
    start = Exchange.start
    monkeypatch.setattr(Exchange, "start", lambda self: (found.append(self), start(self)))
    return found
