"""All workers of this host as one list, for `flask sse status` here, and for one that asks from another host.

A question from another host reaches every worker that listens. One of them answers for all, which it asks over their
Unix sockets: so each host sends one answer, and the workers that do not listen yet, or do not answer, are in it too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..concurrency.background import BackgroundThread
from ..errors import PgSSEError
from . import siblings
from .rundir import RunDirectory, pid_of

logger = logging.getLogger(__name__)

# Seconds over which the workers of all hosts spread.
_SPREAD = 0.1
# Seconds that the workers of this host have to answer: less than the asker waits.
_ANSWER_WITHIN = 0.4
# The most questions that are being answered at once. Those that come then are not answered.
_MOST = 8
# What another host is told of a worker.
_COUNTS = (
    "name", "host", "pid", "version", "state", "streams", "behind", "channels", "delivered", "bytes", "lag", "memory",
    "listener",
)  # fmt: skip

Worker = dict[str, Any]


def workers_here(app_id: str, *, within: float = siblings.ANSWER_WITHIN, **question: Any) -> list[Worker]:
    """Return the workers of this host: those that answer, those that do not, and those that have not been used.

    Raises OSError if a directory cannot be used.
    """
    asked = siblings.ask_all(app_id, question, within=within)
    here = socket.gethostname()
    found = [answer for answer in asked.answers if answer]
    for name in asked.silent:
        state = "stopped" if siblings.is_stopped(name) else "not answering"
        found.append({"name": name, "host": here, "pid": pid_of(name), "state": state, "streams": None})
    known = {worker.get("pid") for worker in found}
    for arbiter in {worker["arbiter"] for worker in found if worker.get("arbiter")}:
        idle = [pid for pid in children(arbiter) if pid not in known]
        found += [{"host": here, "pid": pid, "state": "not used yet", "streams": 0} for pid in idle]
    return in_order(found)


def in_order(workers: Iterable[Worker]) -> list[Worker]:
    return sorted(workers, key=lambda worker: (str(worker.get("host")), worker.get("pid") or 0))


def children(process: int) -> list[int]:
    """Return the processes that a process has started, where Linux tells. Under --preload they are all workers."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


class HostPresence(siblings.Presence):
    """Lets others on this host find this worker, and answers for all of them what is asked from another host."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._answering: set[_Answering] = set()

    def asked(self, nonce: str, reply: Callable[[Sequence[Mapping[str, Any]]], None]) -> None:
        """Answer a question with `reply()` in a thread, if no other worker of this host does. It does not wait."""
        if self._stopping or len(self._answering) >= _MOST:
            return
        one = _Answering(self, nonce, reply)
        self._answering.add(one)
        try:
            one.start()
        except RuntimeError as error:  # no thread can be started
            self._answering.discard(one)
            logger.warning("flask sse status --all-hosts got no answer from this worker: %s.", error)

    def stop(self, timeout: float) -> None:
        super().stop(timeout)
        for one in list(self._answering):
            one.stop(timeout)

    def answer_for_all(self, nonce: str, reply: Callable[[Sequence[Mapping[str, Any]]], None]) -> None:
        if self.is_listed:
            with contextlib.closing(RunDirectory(self._app_id, os.geteuid(), create=False)) as directory:
                if not directory.claim(nonce):
                    return
            found = workers_here(self._app_id, within=_ANSWER_WITHIN)
        else:
            answering = self._answer()
            found = [] if answering is None else [answering({})]
        if found:
            reply([{key: worker[key] for key in _COUNTS if key in worker} for worker in found])

    def answered(self, one: _Answering) -> None:
        self._answering.discard(one)


class _Answering(BackgroundThread):
    def __init__(
        self, presence: HostPresence, nonce: str, reply: Callable[[Sequence[Mapping[str, Any]]], None]
    ) -> None:
        super().__init__("pg-sse-answer")
        self._presence = presence
        self._nonce = nonce
        self._reply = reply

    def _work(self) -> None:
        try:
            self._wakeup.wait(random.uniform(0, _SPREAD))
            if not self._stopping:
                self._presence.answer_for_all(self._nonce, self._reply)
        except (PgSSEError, OSError) as error:
            logger.warning("flask sse status --all-hosts got no answer from this worker: %s", error)
        finally:
            self._presence.answered(self)
