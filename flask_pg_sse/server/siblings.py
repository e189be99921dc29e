"""The workers of one app on this host answer each other over Unix sockets, also while PostgreSQL is away.

A worker's socket and its counters are in a private directory (`rundir.py`). A question is one line of JSON, and so is
its answer.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import hashlib
import hmac
import json
import logging
import mmap
import os
import secrets
import select
import socket
import struct
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..concurrency.background import BackgroundThread
from ..concurrency.forks import close_in_children
from ..concurrency.greenlets import poll
from ..stats import SIZE, Stats, Totals, added
from .rundir import RunDirectory, exists, forget_apps, pid_of, users

logger = logging.getLogger(__name__)

# Seconds that workers have to answer, all together. One that does not is busy, or stopped.
ANSWER_WITHIN = 0.7
# Seconds that somebody who asks may take to ask, and to read the answer.
_ASK_WITHIN = 1.0
# Seconds between two looks whether others can still find this worker.
_LOOK_EVERY = 5.0
_MOST_BYTES = 4 * 1024 * 1024
_BACKLOG = 128

Question = dict[str, Any]
Answer = dict[str, Any]


def app_id(bus: str, key: str | bytes) -> str:
    """Return the name under which the workers of an app find each other: one for each bus and key.

    Neither can be told from it.
    """
    secret = hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
    return hmac.digest(secret, f"flask_pg_sse: the workers of an app\n{bus}".encode(), "sha256").hex()[:32]


class Presence(BackgroundThread):
    """Lets others on this host find this worker and ask it, from `start()` to `stop()`.

    `app_id` names the app. `answer()` answers a question; it is a method of an object that this one does not keep
    alive. `stats` are kept where they outlive this process, so the app's counters never fall when it is killed.
    """

    def __init__(self, app_id: str, stats: Stats, answer: Callable[[Question], Answer]) -> None:
        super().__init__("pg-sse-presence")
        self._app_id = app_id
        self._stats = stats
        self._answer = weakref.WeakMethod(answer)
        self._pid = os.getpid()
        self.name = ""  # of this worker in the directory
        self._socket: _socket.socket | None = None
        self._memory: mmap.mmap | None = None
        self._directory: RunDirectory | None = None

    def start(self) -> None:
        """Begin. If there can be no socket, this is logged, and the worker goes on without one."""
        self._appear()
        close_in_children(self)  # otherwise this worker would seem to live as long as a job that it has started
        try:
            super().start()
        except RuntimeError as error:  # no thread can be started
            logger.warning("flask sse status and the metrics do not know this worker: %s.", error)
            self._close()

    @property
    def is_listed(self) -> bool:
        """Whether others can find this worker."""
        return self._directory is not None

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    def _appear(self) -> None:
        self.name = f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self._directory = RunDirectory(self._app_id, os.geteuid(), create=True)
            self._directory.keep()
            self._socket = self._listen(self._directory)
            self._keep_counters(self._directory)
        except OSError as error:
            logger.warning("flask sse status and the metrics do not know this worker: %s.", error)
            self._disappear()
        else:
            with contextlib.suppress(OSError):
                _tidy(self._directory)
                forget_apps()

    def _listen(self, directory: RunDirectory) -> _socket.socket:
        # The base class: its methods do not wait, under gevent either.
        listening = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unfinished = f"new-{self.name}"
        listening.setblocking(False)
        listening.bind(directory.address(unfinished))
        listening.listen(_BACKLOG)
        directory.show(unfinished, self.name)
        return listening

    def _keep_counters(self, directory: RunDirectory) -> None:
        file = directory.new_file(self.name)
        try:
            os.write(file, bytes(SIZE))  # takes the memory now: none to be had later would end the process
            self._memory = mmap.mmap(file, SIZE)
        finally:
            os.close(file)
        self._stats.keep_in(self._memory)

    def _disappear(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._memory is not None:
            self._stats.leave()
            self._memory = None
        if self._directory is not None:
            with contextlib.suppress(OSError):
                self._directory.remove(self.name)
            self._directory.close()
            self._directory = None

    def _close(self) -> None:
        super()._close()
        if os.getpid() == self._pid:
            self._disappear()

    def _work(self) -> None:
        while not self._stopping:
            self._wakeup.watch(self.fileno())
            look_at = time.monotonic() + _LOOK_EVERY
            while not self._stopping and time.monotonic() < look_at:
                self._wakeup.wait(max(0.0, look_at - time.monotonic()))
                self._accept()
            if self._directory is not None and not self._directory.still_there(self.name):
                self._wakeup.watch(-1)
                self._disappear()
                self._appear()

    def _accept(self) -> None:
        while self._socket is not None and not self._stopping:
            try:
                number, _ = self._socket._accept()  # type: ignore[attr-defined]
            except OSError:  # nobody asks any more
                return
            with contextlib.closing(_socket.socket(fileno=number)) as asker, contextlib.suppress(OSError, ValueError):
                asker.setblocking(False)
                if _may_ask(asker):
                    self._reply(asker, time.monotonic() + _ASK_WITHIN)

    def _reply(self, asker: _socket.socket, deadline: float) -> None:
        line = bytearray()
        while not line.endswith(b"\n"):
            _wait_until(asker, select.POLLIN, deadline)
            more = asker.recv(65536)
            line += more
            if not more or len(line) > _MOST_BYTES:
                return
        answering = self._answer()
        try:
            answer = {} if answering is None else {"name": self.name} | answering(json.loads(line))
        except Exception:  # a bug in one figure must not end the thread
            logger.exception("This worker could not answer what it was asked.")
            return
        left = memoryview(json.dumps(answer).encode() + b"\n")
        while left:
            _wait_until(asker, select.POLLOUT, deadline)
            left = left[asker.send(left) :]


def _wait_until(asker: _socket.socket, what: int, deadline: float) -> None:
    """Wait until a socket is readable or writable. Raises TimeoutError."""
    poller = poll()
    poller.register(asker.fileno(), what)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _may_ask(asker: _socket.socket) -> bool:
    """Tell whether the process at the other end runs as the same user, or as root."""
    if sys.platform != "linux":  # the directory's mode says so too
        return True
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in (0, os.geteuid())


@dataclass(slots=True)
class Asked:
    """What the workers of one app on this host have answered, the names of those that have not, and all counters."""

    answers: list[Answer] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    totals: Totals = field(default_factory=dict)


def ask(
    directory: RunDirectory, question: Question, *, skip: str = "", within: float = ANSWER_WITHIN
) -> tuple[list[Answer], list[str]]:
    """Ask all workers in the directory but `skip`, at once. Return their answers, and the names of those without one.

    What a process has left that has ended is removed. It takes at most `within` seconds.
    """
    asked: list[_Asking] = []
    line = json.dumps(question).encode() + b"\n"
    with contextlib.ExitStack() as sockets:
        for worker in directory.workers():
            if worker != skip:
                asking = sockets.enter_context(contextlib.closing(_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
                asked.append(_Asking(worker, asking, directory.socket_of(worker), line))
        _wait_for(asked, time.monotonic() + within)
        for one in asked:
            if one.ended:
                directory.remove(one.worker)
    replies = [(one.worker, one.answer()) for one in asked if not one.ended]
    return (
        [answer for _, answer in replies if answer is not None],
        [worker for worker, answer in replies if answer is None],
    )


class _Asking:
    """One worker that is being asked."""

    def __init__(self, worker: str, connection: _socket.socket, address: str, question: bytes) -> None:
        self.worker = worker
        self.socket = connection
        self.received = bytearray()
        connection.setblocking(False)
        number = connection.connect_ex(address)
        self.ended = number in (errno.ECONNREFUSED, errno.ENOENT)  # its process
        # EAGAIN: so many others wait already for a worker that does not answer that no more can.
        self.done = number != 0
        if not self.done:
            with contextlib.suppress(OSError):
                connection.send(question)

    def receive(self) -> None:
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # it was killed: the connection is reset
            data = b""
            self.ended = not self.received
        self.received += data
        self.done = not data or self.received.endswith(b"\n") or len(self.received) > _MOST_BYTES

    def answer(self) -> Answer | None:
        with contextlib.suppress(ValueError):
            answer = json.loads(self.received)
            return answer if isinstance(answer, dict) else None
        return None


def _wait_for(asked: Sequence[_Asking], deadline: float) -> None:
    waiting = {one.socket.fileno(): one for one in asked if not one.done}
    poller = poll()
    for number in waiting:
        poller.register(number, select.POLLIN)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for number, _ in poller.poll(left * 1000):
            waiting[number].receive()
            if waiting[number].done:
                poller.unregister(number)
                del waiting[number]


def ask_all(app_id: str, question: Question, *, skip: str = "", within: float = ANSWER_WITHIN) -> Asked:
    """Ask the workers of an app on this host, but for the one named `skip`. All are in `totals`.

    Raises OSError if a directory cannot be used. One that is not there has no workers.
    """
    found = Asked()
    for uid in users():
        try:
            directory = RunDirectory(app_id, uid, create=False)
        except FileNotFoundError:
            continue
        with contextlib.closing(directory):
            answers, silent = ask(directory, question, skip=skip, within=within)
            found.answers += answers
            found.silent += silent
            found.totals = added([found.totals, directory.totals()])
    return found


def _tidy(directory: RunDirectory) -> None:
    """Remove what killed workers have left. Those that live are not disturbed."""
    for worker in directory.workers():
        if not exists(pid_of(worker)):
            with contextlib.closing(_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as trial:
                trial.setblocking(False)
                # A process of another container, which has processes of its own, may be there all the same.
                if trial.connect_ex(directory.socket_of(worker)) == errno.ECONNREFUSED:
                    directory.remove(worker)


def is_stopped(worker: str) -> bool:
    """Tell whether a worker's process is known to be stopped, as by SIGSTOP."""
    try:
        with open(f"/proc/{pid_of(worker)}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def resident_bytes() -> int | None:
    """Return the memory that this process occupies; None if that is not known."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
