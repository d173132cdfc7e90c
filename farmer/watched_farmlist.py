"""A farmlist whose edits are followed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from farmer.farmlist import FarmAddress, load_farmlist


class WatchedFarmlist:
    """A farmlist.py, or entries that stay as they are."""

    def __init__(self, source: str | os.PathLike[str] | Iterable[Any]):
        """Reads nothing yet; `source` is as of `load_farmlist`."""
        self._path = Path(source) if isinstance(source, (str, os.PathLike)) else None
        self._entries = [] if isinstance(source, (str, os.PathLike)) else list(source)
        self._loaded: bytes | None = None  # what the file held when it was last loaded
        self._seen: bytes | None = None  # what it held at the last look

    @property
    def is_file(self) -> bool:
        """Whether there may be edits."""
        return self._path is not None

    def load(self) -> list[FarmAddress]:
        """The farms that stand there now.

        Raises:
            FarmlistError: it is missing or broken.
        """
        self._loaded = self._seen = self._content()
        return load_farmlist(self._entries if self._path is None else self._path)

    def has_changed(self) -> bool:
        """Whether there is an edit since the last `load`, which the last call saw as it is now.

        Editors empty a file, or take it away, before they write it: so an edit counts when two looks have seen it.
        """
        content, before = self._content(), self._seen
        self._seen = content
        return content != self._loaded and content == before

    def _content(self) -> bytes | None:
        """What the file holds, None where it cannot be read."""
        if self._path is None:
            return None
        try:
            return self._path.read_bytes()
        except OSError:
            return None
