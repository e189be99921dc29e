"""The machine: its cores, the CPU and the memory of processes, and its description."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
from collections.abc import Collection, Iterator
from pathlib import Path

_PROC = Path("/proc")


def children(pid: int) -> list[int]:
    """Return the running child processes of a process."""
    found = []
    for stat in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def cpu(pids: Collection[int]) -> dict[int, float]:
    """Return the seconds of CPU of each process, in the kernel too; leave out processes that have ended.

    From schedstat, which counts in nanoseconds, and not from stat, which counts in ticks of 10 ms.
    """
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            threads = (_PROC / str(pid) / "task").glob("*/schedstat")
            found[pid] = sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
    return found


def resident(pids: Collection[int]) -> int:
    """Return the resident memory of some processes together, in bytes."""
    lines = [line for pid in pids for line in (_PROC / str(pid) / "status").read_text().splitlines()]
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def measures_cpu() -> bool:
    """Tell whether this system reports the CPU of a process."""
    return (_PROC / "self" / "schedstat").exists()


@contextlib.contextmanager
def on(these: Collection[int]) -> Iterator[None]:
    """Run on these cores only, and start processes there; on all cores if `these` is empty."""
    if not these:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, these)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores() -> list[int]:
    """Return the cores on which this process may run."""
    return sorted(os.sched_getaffinity(0))


def divide() -> tuple[set[int], set[int]]:
    """Return the core for the server and the cores for everything else; two empty sets if there is only one core."""
    all_of_them = cores()
    return (set(all_of_them[:1]), set(all_of_them[1:])) if len(all_of_them) > 1 else (set(), set())


@contextlib.contextmanager
def many_descriptors() -> Iterator[int]:
    """Let this process and its children open as many files and sockets as the system allows; give that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else max(soft, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def describe() -> str:
    """Return a description of the machine and of the versions on it."""
    models = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    model = models[0] if models else platform.machine()
    packages = ("flask", "gunicorn", "gevent", "psycopg2-binary")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
