"""farmlist.py, the user's list of farms: load it, check it, explain what is wrong with it.

farmlist_base = [('127.0.0.1', 4), ('192.168.1.33:20100', 8), ('ssh://user@gpu7', 8)]

An ssh:// address is a farm that listens on its own machine's 127.0.0.1 only; the system's ssh leads to it:

    ssh://[user@]host[:ssh's port][/farm's port]        'ssh://me@gpu7:2222/20100'

A local: address is a farm inside the farmer's own process, for debugging and for tests (`farmer/local.py`); with a name
behind the colon there can be several:

    local:        local:second

What is left out of an ssh:// address, ssh takes from the user's ssh config (host may be a name from there, with its
jump hosts and keys); the farm's port is 20099.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wire.errors import FarmlistError

PORT = 20099  #: where a farm listens unless told otherwise
NAME = "farmlist_base"
SSH = "ssh://"
LOCAL = "local:"
EXAMPLE = "%s = [('127.0.0.1', 4), ('192.168.1.33:20100', 8)]" % NAME


@dataclass(frozen=True)
class FarmAddress:
    """One farm: where it is and how many of its slots are wanted."""

    host: str
    port: int
    slots: int
    ssh: str | None = None  #: [user@]host[:port] of the machine, when the way to the farm is a tunnel to it

    @property
    def scheme(self) -> str:
        """How the farm is reached: "pyro", "ssh" or "local"."""
        if self.ssh is not None:
            return "ssh"
        return "local" if self.host.startswith(LOCAL) else "pyro"

    def __str__(self) -> str:
        if self.scheme == "local":
            return self.host
        if self.ssh is not None:
            return SSH + self.ssh + ("" if self.port == PORT else "/%d" % self.port)
        return "[%s]:%d" % (self.host, self.port) if ":" in self.host else "%s:%d" % (self.host, self.port)


def load_farmlist(source: str | os.PathLike[str] | Iterable[Any]) -> list[FarmAddress]:
    """The farms of a farmlist.py, or of a list of the same form.

    Args:
        source: a path, or pairs of (address, slots).

    Raises:
        FarmlistError: missing, not Python, or of the wrong shape; with file and line.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source))
    return _check(list(source) if isinstance(source, Iterable) else source, "farmlist", {})


def _from_file(path: Path) -> list[FarmAddress]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FarmlistError(
            "no farmlist at %s\n  now: copy farmlist.example.py there, with lines like: %s" % (path, EXAMPLE)
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FarmlistError("cannot read %s: %s" % (path, error)) from None
    try:
        tree = ast.parse(text, str(path))
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise FarmlistError("%s, line %s: %s\n  %s" % (path, error.lineno, error.msg, line)) from None
    except ValueError as error:  # a zero byte, before Python 3.11.4
        raise FarmlistError("%s is no Python: %s" % (path, error)) from None
    names: dict[str, Any] = {}
    try:
        exec(compile(tree, str(path), "exec"), names)
    except (Exception, SystemExit) as error:
        raise FarmlistError(
            "%s, line %s: %s: %s" % (path, _line_of(error, str(path)), type(error).__name__, error)
        ) from None
    if NAME not in names:
        raise FarmlistError("%s does not define %s\n  wanted: %s" % (path, NAME, EXAMPLE))
    return _check(names[NAME], str(path), _lines(tree))


def _check(entries: Any, where: str, lines: dict[int, int]) -> list[FarmAddress]:
    if not isinstance(entries, (list, tuple)) or not entries:
        raise FarmlistError(
            "%s: %s must be a list with at least one farm, not %r\n  wanted: %s"
            % (_at(where, lines, -1), NAME, entries, EXAMPLE)
        )
    farms: list[FarmAddress] = []
    for index, entry in enumerate(entries):
        at = _at(where, lines, index)
        farm = _entry(entry, at)
        if any((farm.host, farm.port, farm.ssh) == (other.host, other.port, other.ssh) for other in farms):
            raise FarmlistError("%s: %s is there twice; give it one entry with all its slots" % (at, farm))
        farms.append(farm)
    return farms


def _entry(entry: Any, at: str) -> FarmAddress:
    wanted = "wanted: ('192.168.1.33', 8) or ('192.168.1.33:20100', 8)"
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise FarmlistError("%s: %r is no pair of address and slots\n  %s" % (at, entry, wanted))
    address, slots = entry
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
        raise FarmlistError("%s: the number of slots must be 1 or more, not %r\n  %s" % (at, slots, wanted))
    if not isinstance(address, str) or not address.strip():
        raise FarmlistError("%s: the address must be a text, not %r\n  %s" % (at, address, wanted))
    if address.strip().startswith(SSH):
        return _ssh_entry(address.strip(), slots, at)
    if re.fullmatch(LOCAL + r"[\w-]*", address.strip()):
        return FarmAddress(address.strip(), 0, slots)
    host, port = _split(address.strip())
    if not host or any(c.isspace() or c in "/@" for c in host) or not _is_port(port):
        raise FarmlistError("%s: %r is no address\n  %s" % (at, address, wanted))
    return FarmAddress(host, int(port), slots)


#: user, host and port for ssh: nothing that it could take for an option, and nothing that a shell would read.
_DESTINATION = re.compile(r"(?:[\w.+][\w.+@-]*@)?(?:\w[\w.-]*|\[[0-9A-Fa-f:.]+\])(?::(\d+))?", re.ASCII)


def _ssh_entry(address: str, slots: int, at: str) -> FarmAddress:
    destination, slash, port = address[len(SSH) :].partition("/")
    found = _DESTINATION.fullmatch(destination)
    if not found or not _is_port(port if slash else str(PORT)) or not _is_port(found[1] or "22"):
        raise FarmlistError(
            "%s: %r is no address\n  wanted: 'ssh://user@host', or with ports of ssh and of the farm: 'ssh://user@host:22/%d'"
            % (at, address, PORT)
        )
    return FarmAddress("127.0.0.1", int(port or PORT), slots, destination)


def _split(address: str) -> tuple[str, str]:
    if address.startswith("["):  # [::1]:20099
        host, _, rest = address[1:].partition("]")
        return host, rest[1:] if rest.startswith(":") else str(PORT) if address.endswith("]") else ""
    if address.count(":") > 1:
        return address, str(PORT)  # a bare IPv6 address
    host, colon, port = address.partition(":")
    return host, port if colon else str(PORT)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536


def _lines(tree: ast.Module) -> dict[int, int]:
    """The line of each entry, and of the list itself under -1, where the file spells them out."""
    lines: dict[int, int] = {}
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == NAME for target in targets):
            lines = {-1: node.lineno}
            if isinstance(node.value, (ast.List, ast.Tuple)):
                lines.update({index: entry.lineno for index, entry in enumerate(node.value.elts)})
    return lines


def _at(where: str, lines: dict[int, int], index: int) -> str:
    if index in lines:
        return "%s, line %d" % (where, lines[index])
    return where if index < 0 else "%s, entry %d" % (where, index + 1)


def _line_of(error: BaseException, path: str) -> int | str:
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line or "?"
