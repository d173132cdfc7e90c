"""Segments: the files of a replay's entries, written once and shared by saves.

A lineage is one full set of segments and what was appended to it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.checkpoint import files
from agents.replay_state import SavedReplay

SEGMENT_BYTES = 256 << 20  #: about what a segment holds at most: as much is copied from the replay at a time
SMALL_SEGMENTS = 64  #: more of them in a row are written as one again: saves of a few entries would leave thousands


@dataclass(frozen=True)
class Segment:
    """A file of replay entries, as a manifest names it."""

    name: str
    size: int
    crc32: int
    first: int  # of the numbers in it
    last: int
    rows: int


@dataclass(frozen=True)
class Lineage:
    """Where a memory's entries lie: the segments of its last save, and the memory's count then.

    The name is drawn at random and is part of the names of the segments written under it, so a name stands for the
    same entries in every folder.
    """

    name: str
    segments: list[Segment]
    count: int


def segments_of(manifest: dict[str, Any]) -> list[Segment]:
    """Those that a manifest names."""
    return [Segment(**entry) for entry in manifest["replay"]["segments"]] if manifest else []


def chunks(memory: SavedReplay, numbers: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Columns of these entries with their numbers, as many at a time as a segment holds."""
    if not len(numbers):
        return
    row = sum(column.nbytes for column in memory.columns(numbers[:1]).values())
    for chunk in np.array_split(numbers, -(-len(numbers) * row // SEGMENT_BYTES)):
        yield dict(memory.columns(chunk), numbers=chunk)


def read_parts(folder: Path, segments: list[Segment]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(numbers, columns) of each segment, read one by one."""
    for segment in segments:
        columns = files.read_arrays(replay_folder(folder) / segment.name)
        yield columns.pop("numbers"), columns


def small_at_the_end(segments: list[Segment]) -> list[Segment]:
    """The last segments in a row of which each is less than half full."""
    big = [index for index, segment in enumerate(segments) if segment.size >= SEGMENT_BYTES // 2]
    return segments[big[-1] + 1 :] if big else segments


def replay_folder(folder: Path) -> Path:
    """Where the segments of a folder of saves are."""
    return folder / "replay"


def new_name() -> str:
    """Of a lineage."""
    return secrets.token_hex(4)
