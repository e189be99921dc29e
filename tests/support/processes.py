"""What Linux tells of a process: https://docs.kernel.org/filesystems/proc.html"""

from __future__ import annotations

from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the child processes of a process, without those that a thread of it has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def parent_of(pid: int) -> int:
    """Return the process that has started a process."""
    return int(_stat(pid)[1])


def cpu(pid: int) -> int:
    """Return the ticks of CPU that a process has used."""
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12])


def resident(pid: int) -> int:
    """Return the bytes of memory that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def state_of(pid: int) -> str:
    """Return the letter of a process' state, as "T" for a stopped one; "" if there is none."""
    try:
        return _stat(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _stat(pid: int) -> list[str]:
    # From the third field on: the second is the process' name, which may have blanks.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
