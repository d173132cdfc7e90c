"""Words about environments' names, the same on both sides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def close_names(name: str, known: Sequence[str]) -> str:
    """`; close: a, b` for an error text, or nothing."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return "\n  close: " + ", ".join(close) if close else ""


def not_offered(env: str, offered: Sequence[str]) -> str:
    """What a farm says to a host that asks for an environment it does not have."""
    return f"this farm does not offer {env!r}, but {', '.join(offered)}{close_names(env, offered)}"
