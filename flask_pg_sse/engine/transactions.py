"""Follow a transaction of a caller's SQLAlchemy session or connection to its end, of any database.

SQLAlchemy's own events say how it ends. They cost one look-up for each transaction of the process, from the first call
of `follow()` on. SQLAlchemy is never imported here: it is used only if the caller has imported it.
https://docs.sqlalchemy.org/en/20/orm/events.html#session-events
https://docs.sqlalchemy.org/en/20/core/events.html#sqlalchemy.events.ConnectionEvents
"""

from __future__ import annotations

import enum
import functools
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from .caller import commits_writes, to_session


class Outcome(enum.Enum):
    """How a transaction ended.

    COMMITTED: with a commit. A session that joins a transaction of a test's own counts by its own `commit()`.
    UNDONE:    rolled back for a reason that is known: an exception was on its way, or a savepoint was rolled back.
    LOST:      rolled back, closed or forgotten without such a reason.
    FAILED:    the commit failed, although COMMITTED was told before.
    """

    COMMITTED = enum.auto()
    UNDONE = enum.auto()
    LOST = enum.auto()
    FAILED = enum.auto()


Ended = Callable[[Outcome, list[Any]], None]


def follow(connection: Any, ended: Ended, call: Any, *, used: bool) -> bool:
    """Call `ended` when the transaction that the connection is in now has ended. Return False if that cannot be known.

    It cannot with a driver's own connection, and there is no transaction if each statement is committed by itself.
    `used` tells whether a statement has run in the transaction, so that looking at its connection connects to nothing.
    `ended` gets its outcome, and each `call` that was given with the same `ended` and has that outcome, in order.

    `ended` is called in the thread that ends the transaction. It is called twice, at last with FAILED, if a
    `Connection` cannot commit, because SQLAlchemy tells of that commit before it is done.
    """
    session = to_session(connection)
    if session is not None:
        return _follow_session(session, ended, call, used=used)
    engine = sys.modules.get("sqlalchemy.engine")
    if engine is not None and isinstance(connection, engine.Connection):
        return _follow_connection(connection, ended, call)
    return False


def _without_commit() -> Outcome:
    error = sys.exc_info()[1]
    ends_well = isinstance(error, SystemExit) and not error.code  # sys.exit() at the end of a job
    return Outcome.LOST if error is None or ends_well else Outcome.UNDONE


def _commits_each_statement(connection: Any) -> bool:
    if commits_writes(connection):
        return True
    level = connection.get_execution_options().get("isolation_level")
    if level is None:  # not by an option, so by an argument of create_engine()
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    # In sqlite3 `autocommit` is not a boolean unless somebody has set it.
    return level == "AUTOCOMMIT" or getattr(connection.connection.dbapi_connection, "autocommit", None) is True


def _tell(over: Iterable[Any], outcome: Outcome) -> None:
    together: dict[Ended, list[Any]] = {}
    for _, ended, call in over:
        together.setdefault(ended, []).append(call)
    for ended, calls in together.items():
        ended(outcome, calls)


class _Waiting(list[Any]):
    """The calls that wait for the end of a session's or a connection's transaction, each with where it is in that.

    If the session or connection is forgotten, the transaction will not commit.
    """

    def take(self) -> list[Any]:
        taken = list(self)
        self.clear()
        return taken

    def __del__(self) -> None:
        if self and not sys.is_finalizing():
            _tell(self.take(), _without_commit())


# -- sessions

_KEY = "flask_pg_sse"


def _follow_session(session: Any, ended: Ended, call: Any, *, used: bool) -> bool:
    _listen_to_sessions()
    if not session.in_transaction():
        session.begin()  # as its first statement would
    elif used and _commits_each_statement(session.connection(bind_arguments={"clause": _clause()})):
        return False
    waiting = session.info.setdefault(_KEY, _Waiting())
    waiting.append((session.get_nested_transaction() or session.get_transaction(), ended, call))
    return True


@functools.cache
def _clause() -> Any:
    # By which a session that has several databases chooses, as it does for the package's own statements.
    return sys.modules["sqlalchemy"].text("SELECT 1")


@functools.cache
def _listen_to_sessions() -> None:
    # To the class, because to listen to one session takes longer than a notify().
    session, event = sys.modules["sqlalchemy.orm"].Session, sys.modules["sqlalchemy.event"]
    event.listen(session, "after_commit", _session_committed)
    event.listen(session, "after_transaction_end", _session_ended)


def _session_committed(session: Any) -> None:
    waiting = session.info.get(_KEY)
    if not waiting:
        return
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        _tell(waiting.take(), Outcome.COMMITTED)
        return
    outer = savepoint.parent
    while not outer.nested and outer.parent is not None:  # a flush
        outer = outer.parent
    waiting[:] = [(outer if transaction is savepoint else transaction, *rest) for transaction, *rest in waiting]


def _session_ended(session: Any, transaction: Any) -> None:
    waiting = session.info.get(_KEY)
    if not waiting:
        return
    over = [one for one in waiting if one[0] is transaction]
    waiting[:] = [one for one in waiting if one[0] is not transaction]
    _tell(over, Outcome.UNDONE if transaction.nested else _without_commit())


# -- connections


class _Connection:
    """What waits on one connection, each with the number of the savepoint that it was in (0: in none)."""

    def __init__(self) -> None:
        self.waiting = _Waiting()
        self.committed: list[Any] = []  # by the last commit, which may still fail


_connections: weakref.WeakKeyDictionary[Any, _Connection] = weakref.WeakKeyDictionary()
_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def _follow_connection(connection: Any, ended: Ended, call: Any) -> bool:
    if _commits_each_statement(connection):
        return False
    _listen_to_connections(connection.engine)
    if not connection.in_transaction():
        connection.begin()  # as its first statement would
    savepoint = connection.get_nested_transaction()
    number = 0 if savepoint is None else _number(savepoint._savepoint)
    _connections.setdefault(connection, _Connection()).waiting.append((number, ended, call))
    return True


def _number(savepoint: str) -> int:
    # SQLAlchemy numbers the savepoints of a connection: sa_savepoint_1, sa_savepoint_2 …
    return int(savepoint.rpartition("_")[2])


def _listen_to_connections(engine: Any) -> None:
    # To the engine, because to listen to one connection takes half a millisecond.
    if engine in _engines:
        return
    _engines.add(engine)
    listen = sys.modules["sqlalchemy.event"].listen
    listen(engine, "commit", _connection_committed)
    listen(engine, "commit_twophase", _connection_committed)
    listen(engine, "rollback", _connection_rolled_back)
    listen(engine, "rollback_twophase", _connection_rolled_back)
    listen(engine, "rollback_savepoint", _savepoint_rolled_back)
    listen(engine, "handle_error", _connection_failed)


def _connection_committed(connection: Any, *_: Any) -> None:
    # SQLAlchemy says this before it commits, and says nothing after.
    if (its := _connections.get(connection)) is not None:
        its.committed = its.waiting.take()
        _tell(its.committed, Outcome.COMMITTED)


def _connection_failed(context: Any) -> None:
    its = _connections.get(context.connection) if context.connection is not None else None
    if its is not None and context.statement is None:  # no statement: a commit or a rollback
        committed, its.committed = its.committed, []
        _tell(committed, Outcome.FAILED)


def _connection_rolled_back(connection: Any, *_: Any) -> None:
    if (its := _connections.get(connection)) is not None:
        its.committed = []
        _tell(its.waiting.take(), _without_commit())


def _savepoint_rolled_back(connection: Any, name: str, *_: Any) -> None:
    # What is in savepoints with a larger number, released or not, is within this one.
    if (its := _connections.get(connection)) is not None:
        undone = [one for one in its.waiting if one[0] >= _number(name)]
        its.waiting[:] = [one for one in its.waiting if one[0] < _number(name)]
        _tell(undone, Outcome.UNDONE)
