"""A worker and all that it started: their process ids, their memory, and their end.

On Linux this reads /proc itself: a farm asks several times a second, for each worker. Elsewhere it asks psutil.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil

#: An environment variable of each worker, and so of what it starts. By it `sweep` finds processes that left the process
#: group and whose parents are gone.
MARK = "FARM_WORKER"

GROUPS = Path("/sys/fs/cgroup")  #: Linux's control groups, of version 2, or a folder for each controller of version 1
MY_GROUPS = Path("/proc/self/cgroup")
_OLD_MEMORY = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_HAS_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # Linux, as nearly every kernel is built
_HAS_ENVIRON = os.path.exists("/proc/self/environ")


def family(pid: int) -> list[int]:
    """The process and its descendants; empty when it is gone."""
    if not _HAS_CHILDREN:
        with contextlib.suppress(psutil.Error):
            return [pid] + [child.pid for child in psutil.Process(pid).children(recursive=True)]
        return []
    found = [pid]
    for member in found:  # it grows meanwhile
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{member}/task"):  # a child belongs to the thread that started it
                with open(f"/proc/{member}/task/{thread}/children", "rb") as children:
                    found += map(int, children.read().split())
    return found


def resident(pid: int) -> int:
    """Bytes of memory that the process and its descendants hold; what they share counts for each of them."""
    return sum(map(_resident_of_one, family(pid)))


def _resident_of_one(pid: int) -> int:
    if not _HAS_CHILDREN:
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(pid).memory_info().rss)
        return 0
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except (OSError, IndexError):  # it ended meanwhile
        return 0


def kill(pids: list[int]) -> None:
    """Sends SIGKILL to each that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def sweep(marks: set[str]) -> list[int]:
    """Kills whatever carries the mark of a worker that is gone: its descendants in sessions of their own.

    Returns:
        The pids that were killed.
    """
    wanted = {f"{MARK}={mark}".encode() for mark in marks}
    killed: list[int] = []
    while True:
        found = [pid for pid in psutil.pids() if pid not in killed and _surroundings(pid) & wanted]
        if not found:
            return killed
        kill(found)  # one of them may have started another since it was listed, hence once more
        killed += found


def _surroundings(pid: int) -> set[bytes]:
    if _HAS_ENVIRON:
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ:
                return set(environ.read().split(b"\0"))
        except OSError:  # it ended, or is another user's
            return set()
    try:
        return {f"{name}={value}".encode() for name, value in psutil.Process(pid).environ().items()}
    except (psutil.Error, OSError):
        return set()


def state(pid: int) -> str:
    """What the system says the process is doing, as `running`, `sleeping` or `stopped`."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "gone"


def free_memory(groups: Path = GROUPS, mine: Path = MY_GROUPS) -> tuple[int, int]:
    """(total, available) bytes of this machine, or of the container that the farm runs in when that has less."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for folder in _groups_of("memory", groups, mine):
        for limit_file, used_file in (("memory.max", "memory.current"), _OLD_MEMORY):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
                limit = int((folder / limit_file).read_text())
                used = int((folder / used_file).read_text()) - _cached(folder)
                total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _cached(folder: Path) -> int:
    """Bytes of files that a control group has read and not used lately: counted as used, and given up when needed."""
    with contextlib.suppress(OSError, ValueError):
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    return 0


def _groups_of(controller: str, groups: Path, mine: Path) -> list[Path]:
    """The folders of the control groups of this process, from its own to the root: each may have a limit.

    In a container the root is the container's, and the path to its own may lead nowhere.
    """
    folders = [groups]
    with contextlib.suppress(OSError, ValueError):
        for line in mine.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = groups / controllers  # version 1 has a tree for each controller, version 2 one for all
            here = root / path.strip("/")
            folders += [folder for folder in (here, *here.parents) if folder == root or root in folder.parents]
    return folders


def processor_time(pid: int) -> float:
    """Seconds that the process, and whatever it started, has computed so far."""
    total = 0.0
    for member in family(pid):
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(member).cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def queued(pids: list[int]) -> float:
    """Seconds that a process wanted to compute and had no core, as far as the kernel counts that; else 0.

    Of the first threads of these processes, the one that waited most: they mostly wait for each other.
    """
    most = 0.0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/schedstat", "rb") as file:
            most = max(most, int(file.read().split()[1]) / 1e9)
    return most


def threads(pid: int) -> int:
    """Threads of the process and of what it started."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(member).num_threads()
    return total


def cores(groups: Path = GROUPS, mine: Path = MY_GROUPS) -> float:
    """Processor cores that this process may use: of the machine, or fewer where its affinity or container says so."""
    count: float = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    for folder in _groups_of("cpu", groups, mine):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            quota, period = (folder / "cpu.max").read_text().split()
            count = min(count, int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            share = int((folder / "cpu.cfs_quota_us").read_text())
            if share > 0:  # -1: no limit
                count = min(count, share / int((folder / "cpu.cfs_period_us").read_text()))
    return count
