"""What people see: lines on the terminal, in a pipe, or in a notebook."""

from __future__ import annotations

import builtins
from typing import Any

from rich.console import Console

console = Console()


def say(text: str) -> None:
    """A line for people, never wrapped: it may be read by `grep`."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def shell() -> Any:
    """IPython, None outside of it."""
    return getattr(builtins, "get_ipython", lambda: None)()
