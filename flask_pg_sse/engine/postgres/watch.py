"""Look from time to time which server the addresses lead to, and tell the listener when it must follow.

A server to which the URL does not lead any more may live on: after a failover with a split brain, behind a proxy that
was moved, or as a host that became read-only. Its connections stand, and nothing comes through them any more.
"""

from __future__ import annotations

import contextlib
import logging
import random
import select
import time
from collections.abc import Callable
from typing import Any

import psycopg2

from ...channels import RESERVED_PREFIX
from ...concurrency.background import BackgroundThread
from ...concurrency.greenlets import poll
from ...errors import DatabaseUnavailable
from ...repeats import Repeats, one_line, times
from .connect import connect, connect_to_listen, execute, is_read_only
from .dsn import Dsn
from .identity import Finding, Server, Sightings, who
from .listener import PostgresListener
from .obstacle import NOT_NOW

logger = logging.getLogger(__name__)

# Seconds between two looks, and between two that follow on a look that has found another server.
_EVERY = 30.0
_AGAIN = 2.0
# Seconds after which a listener that was deaf tries LISTEN again.
_TRY_AGAIN = 600.0
# Seconds in which a server must answer a statement, and a notification must come back.
_ANSWER_WITHIN = 5.0
# A channel to try LISTEN on. No listener hears it.
TRIAL = f"{RESERVED_PREFIX}.trial"

# What is wrong with an address, and the remedy. `flask sse doctor` says the same.
UNSTEADY = "leads now to one server, now to another"
STEADY = "an address that leads to the primary alone, or all hosts in the URL, with ?target_session_attrs=primary"


class AddressWatch(BackgroundThread):
    """Compares the server that `listener` is connected to with the one that its address leads to, in a thread.

    `dsn` is the database that the app sends to. If it has another address, both must lead to the same database.
    `on_move` is called when the listener moves to another server.
    """

    def __init__(self, dsn: Dsn, listener: PostgresListener, on_move: Callable[[], None]) -> None:
        super().__init__("pg-sse-watch")
        self._dsn = dsn
        self._on_move = on_move
        self._listener = listener
        self._sightings = Sightings()
        self._unsteady = Repeats()
        self._unfit = Repeats()
        self._apart = Repeats()
        self._looked_at = 0.0
        self._tried_at = time.monotonic()
        # At once if the two addresses may lead to different databases: that is a mistake of the configuration.
        self._look_at = time.monotonic() + (_EVERY if dsn == listener.dsn else _AGAIN)

    def look_soon(self) -> None:
        """Look now, or soon if the last look was a moment ago. Any thread may call it."""
        self._look_at = min(self._look_at, self._looked_at + _AGAIN)
        self._wakeup.set()

    def made(self, connection: Any) -> None:
        """Compare the server of a new connection to the app's database. Raises as `connect.execute()`."""
        ours = self._listener.server
        if ours is None:
            return
        with contextlib.suppress(psycopg2.errors.InsufficientPrivilege):
            if _who(connection) != ours:
                self.look_soon()

    def _work(self) -> None:
        while not self._stopping:
            if (left := self._look_at - time.monotonic()) > 0:
                self._wakeup.wait(left)
                continue
            self._look_at = time.monotonic() + _EVERY * random.uniform(0.8, 1.0)
            try:
                again = self._look()
            except (psycopg2.Error, OSError, DatabaseUnavailable) as error:
                again = False  # if the listener's own connection fails too, it says so
                logger.debug("Could not look which server an address leads to: %s", error)
            self._looked_at = time.monotonic()
            if again:
                self._look_at = self._looked_at + _AGAIN

    def _look(self) -> bool:
        """Look once where the addresses lead. Return whether to look again soon."""
        listener = self._listener
        ours, apart = listener.server, self._dsn != listener.dsn
        if ours is None and not apart:  # it is not connected, and follows the address when it connects
            return False
        connection = connect_to_listen(listener.dsn, "flask_pg_sse look")
        moving = False
        try:
            if ours is not None and connection.info.parameter_status("in_hot_standby") == "on":
                self._say_unfit("it is a standby", ours)
                return False
            found = _who(connection)
            finding = Finding.SAME
            if ours is not None:
                finding = self._sightings.saw(found, ours, time.monotonic())
                moving = self._judge(finding, connection, found, ours)
        finally:
            if not moving:
                connection.close()
        if apart:
            self._compare(found)
        return finding in (Finding.OTHER, Finding.UNSTEADY)

    def _judge(self, finding: Finding, connection: Any, found: Server, ours: Server) -> bool:
        """Say what a look has found. Return whether the listener moves to the connection."""
        listener, now = self._listener, time.monotonic()
        if finding is Finding.UNSTEADY:
            self._say_unsteady(ours, now)
        moved = finding is Finding.MOVED
        if not (moved or self._listens_again(now)) or not self._fit(connection, ours, moved=moved):
            return False
        if moved:
            text = "%s now leads to the %s. The listener moves there from the %s."
            logger.warning(text, listener.dsn, found, ours)
            self._sightings.left(ours, now)
            self._on_move()
        execute(connection, f"SET application_name = '{listener.APPLICATION_NAME}'", timeout=_ANSWER_WITHIN)
        listener.move_to(connection, instead_of=ours)
        return True

    def _listens_again(self, now: float) -> bool:
        """Tell whether to try LISTEN again. A listener that was deaf reads the log instead."""
        if self._listener.hears or self._listener.polls or now < self._tried_at + _TRY_AGAIN:
            return False
        self._tried_at = now
        return True

    def _fit(self, connection: Any, ours: Server, *, moved: bool) -> bool:
        """Tell whether the listener can move to a connection, and log why not."""
        hears = self._listener.hears or not moved  # one that reads the log can do so anywhere
        try:
            why_not = _why_not(connection, read_only=self._listener.read_only, hears=hears)
        except (psycopg2.Error, OSError, DatabaseUnavailable) as error:
            why_not = one_line(error)
        if why_not and moved:
            self._say_unfit(why_not, ours)
        return not why_not

    def _say_unfit(self, why_not: str, ours: Server) -> None:
        if number := self._unfit.count(why_not, time.monotonic()):
            logger.warning(
                "%s now leads to another server, where LISTEN does not work: %s. The listener stays with the %s%s.",
                self._listener.dsn, why_not, ours, times(number),
            )  # fmt: skip

    def _say_unsteady(self, ours: Server, now: float) -> None:
        if number := self._unsteady.count("unsteady", now):
            logger.warning(
                "%s %s%s. The listener stays with the %s. Events that are sent elsewhere do not arrive. Remedy: %s.",
                self._listener.dsn, UNSTEADY, times(number), ours, STEADY,
            )  # fmt: skip

    def _compare(self, found: Server) -> None:
        """Compare where the app listens with where it sends."""
        listen = self._listener.dsn
        connection = connect(self._dsn, "flask_pg_sse look")
        try:
            other = _who(connection)
        finally:
            connection.close()
        now = time.monotonic()
        if other != found:
            if number := self._apart.count(f"{other} {found}", now):
                logger.error("%s", apart(self._dsn, other, listen, found, times(number)))
        elif ended := self._apart.over(now):
            logger.warning("%s and %s lead to one database again, after %s.", self._dsn.source, listen.source, ended)


def _who(connection: Any) -> Server:
    return who(lambda query: execute(connection, query, timeout=_ANSWER_WITHIN))


def apart(dsn: Dsn, server: Server, listen: Dsn, heard: Server, times: str = "") -> str:
    """Return in words that the app sends to one database and listens to another. `times` says how often it did."""
    return (
        f"{dsn.source} leads to the {server}, and {listen.source} to the {heard}. What the app sends to the one does "
        f"not arrive from the other{times}. Remedy: set {listen.source} to a direct connection to the database of "
        f"{dsn.source}."
    )


def _why_not(connection: Any, *, read_only: bool, hears: bool) -> str | None:
    """Try LISTEN, if the listener `hears`. Return why the listener cannot use a connection; None if it can.

    `read_only` says that the present server is read-only by default too: then that is how the role is meant to be.
    """
    if is_read_only(connection) and not read_only:
        return "it is read-only"
    try:
        return None if not hears or hears_itself(connection) else "it receives nothing"
    except NOT_NOW:
        return None  # NOTIFY has to wait there, or its queue is full; the listener says so


def hears_itself(connection: Any) -> bool:
    """Try LISTEN: tell whether the connection receives what it notifies.

    Raises the errors `obstacle.NOT_NOW` if NOTIFY has to wait, or its queue is full, and as `connect.execute()`.
    """
    execute(connection, f'LISTEN "{TRIAL}"', timeout=_ANSWER_WITHIN)
    execute(connection, "SELECT pg_catalog.pg_notify(%s, '')", (TRIAL,), timeout=_ANSWER_WITHIN)
    deadline = time.monotonic() + _ANSWER_WITHIN
    poller = poll()
    poller.register(connection.fileno(), select.POLLIN)
    heard = False
    while not heard:
        connection.poll()
        heard = any(one.pid == connection.info.backend_pid for one in connection.notifies)
        left = deadline - time.monotonic()
        if not heard and (left <= 0 or not poller.poll(left * 1000)):
            break
    connection.notifies = []
    execute(connection, f'UNLISTEN "{TRIAL}"', timeout=_ANSWER_WITHIN)  # the session may be a pooler's
    return heard
