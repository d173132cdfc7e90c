"""What holds for every test of a benchmark."""

from __future__ import annotations

from leftovers import leaves_nothing_behind  # noqa: F401
