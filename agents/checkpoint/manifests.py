"""Manifests: what is saved, and every file that belongs to it with size and CRC-32."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agents.checkpoint import files, segments

FORMAT = 2


class Damaged(Exception):
    """A save is not what was written; the text says why."""


def describe(agent: Any, values: dict[str, Any], extra: dict[str, Any] | None) -> dict[str, Any]:
    """A manifest without the files, as plain data."""
    configuration = agent.get_config() if hasattr(agent, "get_config") else {}
    manifest = {
        "format": FORMAT,
        "agent": type(agent).__name__,
        "step": getattr(agent, "step", None),
        "updates": getattr(agent, "nb_updates", None),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "configuration": json.loads(json.dumps(configuration, default=repr, skipkeys=True)),  # for a reader only
        "values": values,
        "extra": extra or {},
    }
    try:
        return dict(json.loads(json.dumps(manifest, default=_plain)))
    except (TypeError, ValueError) as error:
        raise TypeError("a checkpoint's values and extra must be plain data: %s" % error) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError("%r is a %s" % (value, type(value).__name__))


def write(path: Path, manifest: dict[str, Any]) -> None:
    """JSON whose first line has the CRC-32 of what follows."""
    body = b"\n" + json.dumps(manifest, default=_plain)[1:].encode()
    with open(path, "wb") as file:
        file.write(b'{"crc32": %d,' % zlib.crc32(body) + body)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    """The manifest of a save.

    Raises:
        Damaged: it is not what was written.
        ValueError: it is of another format.
        OSError: it cannot be read.
    """
    try:
        text = (path / "manifest.json").read_bytes()
    except FileNotFoundError:
        raise Damaged("manifest.json is missing") from None
    head = re.match(rb'{"crc32": (\d+),', text)
    if head is not None and int(head[1]) != zlib.crc32(text[head.end() :]):
        raise Damaged("manifest.json is not as it was written (CRC-32)")
    try:
        manifest = json.loads(text)
        found = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged("manifest.json is no manifest: %r" % (error,)) from error
    if found != FORMAT:
        raise ValueError("the checkpoint %s is of format %s, this program reads format %d" % (path, found, FORMAT))
    if head is None:
        raise Damaged("manifest.json has no CRC-32")
    return dict(manifest)


def read_if_any(path: Path) -> dict[str, Any] | None:
    """The manifest; an empty one where it is damaged, None where it is of another format or cannot be read now."""
    try:
        return read(path)
    except Damaged:
        return {}
    except (ValueError, OSError):
        return None


def files_of(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, int, int]]:
    """Path, size and CRC-32 of everything that belongs to a save."""
    for entry in manifest["files"]:
        yield path / entry["name"], entry["size"], entry["crc32"]
    for segment in segments.segments_of(manifest):
        yield segments.replay_folder(path.parent) / segment.name, segment.size, segment.crc32


def all_there(path: Path, manifest: dict[str, Any] | None) -> bool:
    """Whether all files of a save are there in full length; what is in them is not read."""
    return bool(manifest) and all(files.has_size(file, size) for file, size, _ in files_of(path, manifest or {}))


def check_files(path: Path, manifest: dict[str, Any]) -> None:
    """Raises Damaged where a file of a save is not as it was written, OSError where one cannot be read."""
    for file, size, crc32 in files_of(path, manifest):
        found = summed = 0
        try:
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    found, summed = found + len(block), zlib.crc32(block, summed)
        except FileNotFoundError:
            raise Damaged("%s is missing" % file.name) from None
        if found != size:
            raise Damaged("%s has %d bytes instead of %d" % (file.name, found, size))
        if summed != crc32:
            raise Damaged("%s is not as it was written (CRC-32)" % file.name)


def saves(folder: Path) -> list[Path]:
    """The folders of all saves, newest first, whole or not."""
    found = [path for path in folder.glob("save-*") if re.fullmatch(r"save-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def no_save(folder: Path) -> FileNotFoundError:
    """The error where a folder has no save."""
    return FileNotFoundError(
        "no checkpoint at %s; save() writes one\n  now: name the folder that has one, or begin without" % folder
    )
