"""What holds for every test."""

from __future__ import annotations

import pathlib
import sys

from leftovers import leaves_nothing_behind  # noqa: F401

# A worker's modules find those of wire by their bare names, and so they must in tests that import them here.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "wire"))
