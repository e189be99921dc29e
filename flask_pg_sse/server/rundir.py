"""The private directory of one app's workers on this host: a socket for each, and counters that outlive them.

Only the user that the workers run as can look into it (and root). It is in /dev/shm where there is one: that is memory,
so no write waits for a disk, and systemd's PrivateTmp gives no service another one. Its name says nothing of the app.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..concurrency.greenlets import sleep
from ..stats import Totals, added, from_json, read_totals, to_json

_NAME = "flask-pg-sse-"
_MEMORY = "/dev/shm"
_ENDED = "ended.json"  # the sum of the counters of workers that have ended
_QUESTIONS = "questions.json"  # the last questions from other hosts
_COUNTERS = ".counters"
_SOCKET = ".socket"
# A worker's name: its process id, and letters that no other process with that id has.
_WORKER = re.compile(r"(\d+)-[0-9a-f]{8}\Z")
# How many questions are remembered. A worker itself knows an older one that comes again.
_MOST_QUESTIONS = 100
# Seconds that another process may take to add the counters of workers that have ended.
_PATIENCE = 0.2
# Seconds after which the directory of an app is removed if no worker of it was there meanwhile.
_FORGET_AFTER = 86400.0
# How often the counters are read again because another process has moved some meanwhile.
_TRIES = 10
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _base() -> str:
    return _MEMORY if os.access(_MEMORY, os.W_OK | os.X_OK) else tempfile.gettempdir()


def _open_private(name: str, parent: int, uid: int) -> int:
    """Open a directory that belongs to `uid` and that nobody else can enter. A symbolic link is refused."""
    directory = os.open(name, _DIRECTORY, dir_fd=parent)
    found = os.fstat(directory)
    if found.st_uid != uid or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(directory)
        raise PermissionError(
            f"{_base()}/{name} must be a directory of user {uid} with mode 0700; it belongs to user {found.st_uid} and "
            f"has mode {stat.S_IMODE(found.st_mode):04o}. Remove it"
        )
    return directory


class RunDirectory:
    """The open directory of one app (its `app_id`) and one user. Call `close()`.

    What is in it is reached through the open directory, so no link in a path can lead elsewhere, and the length of the
    path does not matter. Raises OSError.
    """

    def __init__(self, app_id: str, uid: int, *, create: bool) -> None:
        base = os.open(_base(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        users = f"{_NAME}{uid}"
        self._uid = uid
        try:
            outer = _enter(users, base, uid, create)
        finally:
            os.close(base)
        try:
            self._fd = _enter(app_id, outer, uid, create)
        finally:
            os.close(outer)
        self._path = os.path.join(_base(), users, app_id)

    def close(self) -> None:
        os.close(self._fd)

    def keep(self) -> None:
        """Have systemd-tmpfiles leave the directory alone while it is open: it skips what is locked."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def still_there(self, worker: str) -> bool:
        """Tell whether others can find a worker. A program that tidies up may have removed it."""
        try:
            here, there = os.fstat(self._fd), os.stat(self._path, follow_symlinks=False)
            os.stat(worker + _SOCKET, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def address(self, name: str) -> str:
        """Return the address of a Unix socket, which has at most 107 bytes."""
        if sys.platform == "linux":
            return f"/proc/self/fd/{self._fd}/{name}"
        return os.path.join(self._path, name)

    def socket_of(self, worker: str) -> str:
        return self.address(worker + _SOCKET)

    def workers(self) -> list[str]:
        """Return the names of the workers that have a socket."""
        names = (name.removesuffix(_SOCKET) for name in os.listdir(self._fd) if name.endswith(_SOCKET))
        return sorted(name for name in names if _WORKER.match(name))

    def new_file(self, worker: str) -> int:
        """Make a worker's file of counters, and return it open for reading and writing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(worker + _COUNTERS, flags, 0o600, dir_fd=self._fd)

    def show(self, unfinished: str, worker: str) -> None:
        """Give a socket its final name. It listens already: one that refuses is taken for that of an ended process."""
        os.rename(unfinished, worker + _SOCKET, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, worker: str) -> None:
        """Remove a worker, and add its counters to those of all that have ended. Root leaves that to the user."""
        if self._uid != os.geteuid():
            return
        with self._locked() as locked:
            if locked:  # otherwise a later look does it; the counters are not lost meanwhile
                self._remove(worker)

    def _remove(self, worker: str) -> None:
        last, ended = self._ended()
        with contextlib.suppress(FileNotFoundError, ValueError):
            if last != worker:  # a process that did this before may have been killed before the next lines
                totals = added([ended, read_totals(self._read(worker + _COUNTERS))])
                self._write(_ENDED, json.dumps({"last": worker, "totals": to_json(totals)}).encode())
        for name in (worker + _COUNTERS, worker + _SOCKET):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)

    def claim(self, nonce: str) -> bool:
        """Tell whether the caller is the first here who claims the question with this nonce, and must answer it."""
        with self._locked() as locked:
            if not locked:  # the process that holds the lock claims it, or does what takes longer than an answer may
                return False
            known: list[str] = []
            with contextlib.suppress(FileNotFoundError, ValueError):
                known = json.loads(self._read(_QUESTIONS))
            if nonce not in known:
                self._write(_QUESTIONS, json.dumps([*known[1 - _MOST_QUESTIONS :], nonce]).encode())
            return nonce not in known

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open("lock", flags, 0o600, dir_fd=self._fd)
        try:
            yield self._lock(lock)
        finally:
            os.close(lock)

    @staticmethod
    def _lock(lock: int) -> bool:
        # Not for as long as it takes: the process that holds it may have been stopped.
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                if time.monotonic() >= deadline:
                    return False
                sleep(0.01)

    def totals(self) -> Totals:
        """Return the counters of all workers, those that have ended too. They never fall: no worker is left out.

        A counter is moved, not copied, to those of the ended workers. So if any were moved meanwhile, read again.
        """
        found: Totals = {}
        for _ in range(_TRIES):
            last, ended = before = self._ended()
            parts = [ended]
            missed = False
            for name in os.listdir(self._fd):
                if name.endswith(_COUNTERS) and name != (last or "") + _COUNTERS:
                    try:
                        parts.append(read_totals(self._read(name)))
                    except FileNotFoundError:
                        missed = True
                    except ValueError:  # it is being made
                        pass
            found = added(parts)
            if not missed and self._ended() == before:
                break
        return found

    def _ended(self) -> tuple[str | None, Totals]:
        try:
            said = json.loads(self._read(_ENDED))
            return said["last"], from_json(said["totals"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None, {}

    def _read(self, name: str) -> bytes:
        with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd), "rb") as file:
            return file.read()

    def _write(self, name: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name + ".new", flags, 0o600, dir_fd=self._fd), "wb") as file:
            file.write(data)
        os.rename(name + ".new", name, src_dir_fd=self._fd, dst_dir_fd=self._fd)


def _enter(name: str, parent: int, uid: int, create: bool) -> int:
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
    return _open_private(name, parent, uid)


def exists(pid: int) -> bool:
    """Tell whether there is a process with this id; 0 is none."""
    try:
        os.kill(pid or 2**30, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True


def pid_of(worker: str) -> int:
    """Return the process id in a worker's name; 0 if it is none."""
    found = _WORKER.match(worker)
    return int(found[1]) if found else 0


def forget_apps(unused_for: float = _FORGET_AFTER) -> None:
    """Remove this user's directories of apps that have had no worker for so many seconds."""
    with contextlib.suppress(FileNotFoundError):
        base = os.open(_base(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            users = _open_private(f"{_NAME}{os.geteuid()}", base, os.geteuid())
        finally:
            os.close(base)
        try:
            for app in os.listdir(users):
                with contextlib.suppress(OSError):  # another process forgets it at this moment, or it is in use again
                    if time.time() - os.stat(app, dir_fd=users, follow_symlinks=False).st_mtime >= unused_for:
                        _forget(app, users)
        finally:
            os.close(users)


def _forget(app: str, users: int) -> None:
    directory = _open_private(app, users, os.geteuid())
    try:
        names = os.listdir(directory)
        # Those of a container with process ids of its own may seem to be gone. They come back (`still_there()`).
        if not any(exists(pid_of(name.partition(".")[0])) for name in names):
            for name in names:
                os.unlink(name, dir_fd=directory)
            os.rmdir(app, dir_fd=users)
    finally:
        os.close(directory)


def users() -> list[int]:
    """Return whose workers this process may look at: this user's, and for root everybody's."""
    if os.geteuid() != 0:
        return [os.geteuid()]
    names = (path.name.removeprefix(_NAME) for path in Path(_base()).glob(_NAME + "*"))
    return sorted({0, *(int(name) for name in names if name.isdecimal())})
