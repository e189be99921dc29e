"""How transactions of a caller's SQLAlchemy session or connection end, here on SQLite."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from flask_pg_sse.engine.transactions import Outcome, follow

COMMITTED, UNDONE, LOST = Outcome.COMMITTED, Outcome.UNDONE, Outcome.LOST


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A database in memory, with savepoints: https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#pysqlite-serializable"""
    engine = create_engine("sqlite://")

    @sqlalchemy.event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    yield engine
    engine.dispose()


class Followed:
    """Follows calls on one session or connection, and notes how each ended, under its letter."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.ended: dict[str, Outcome] = {}

    def __call__(self, letter: str) -> None:
        assert follow(self.connection, self._note, letter, used=True)

    def _note(self, outcome: Outcome, letters: list[str]) -> None:
        self.ended.update(dict.fromkeys(letters, outcome))


def in_a_session(engine: Engine) -> Session:
    return Session(engine)


def in_a_scoped_session(engine: Engine) -> Any:
    return scoped_session(sessionmaker(engine))


def on_a_connection(engine: Engine) -> Connection:
    return engine.connect()


KINDS = [in_a_session, in_a_scoped_session, on_a_connection]
Open = Callable[[Engine], Any]


@pytest.fixture(params=KINDS)
def call(request: pytest.FixtureRequest, engine: Engine) -> Iterator[Followed]:
    opened: Any = request.param(engine)
    yield Followed(opened)
    opened.close()


def test_commit(call: Followed) -> None:
    call("a")
    call.connection.execute(text("SELECT 1"))
    call("b")
    assert call.ended == {}
    call.connection.commit()
    assert call.ended == {"a": COMMITTED, "b": COMMITTED}
    call("c")
    call.connection.commit()
    assert call.ended["c"] is COMMITTED


@pytest.mark.parametrize("end", ["rollback", "close"])
def test_the_end_without_a_commit(call: Followed, end: str) -> None:
    call("before")
    call.connection.commit()
    call("after")
    getattr(call.connection, end)()
    assert call.ended == {"before": COMMITTED, "after": LOST}


def test_an_exception_on_its_way(call: Followed) -> None:
    try:
        call("except")
        raise ZeroDivisionError
    except ZeroDivisionError:
        call.connection.rollback()
    with contextlib.suppress(ZeroDivisionError), contextlib.closing(call.connection):
        call("with")
        raise ZeroDivisionError
    assert call.ended == {"except": UNDONE, "with": UNDONE}


def test_a_program_that_ends_well_has_lost_what_it_did_not_commit(call: Followed) -> None:
    for code in (0, None, 1):
        with contextlib.suppress(SystemExit):
            try:
                call(f"exit {code}")
                sys.exit(code)
            finally:
                call.connection.rollback()
    assert call.ended == {"exit 0": LOST, "exit None": LOST, "exit 1": UNDONE}


def test_savepoints(call: Followed) -> None:
    session = call.connection
    call("outside")
    with session.begin_nested():
        call("released")
        inner = session.begin_nested()
        call("rolled back")
        inner.rollback()
        with session.begin_nested():
            call("released twice")
    outer = session.begin_nested()
    call("within")
    with session.begin_nested():
        call("released into one that is rolled back")
    innermost = session.begin_nested()
    call("innermost")
    innermost.rollback()
    outer.rollback()
    call("at the end")
    session.commit()
    sent = {letter for letter, outcome in call.ended.items() if outcome is COMMITTED}
    assert sent == {"outside", "released", "released twice", "at the end"}
    assert {call.ended[letter] for letter in call.ended.keys() - sent} == {UNDONE} and len(call.ended) == 8


def test_the_first_call_within_savepoints(call: Followed) -> None:
    session = call.connection
    session.begin_nested()
    second = session.begin_nested()
    call("a")
    second.commit()
    call("b")
    session.rollback()
    assert len(call.ended) == 2 and COMMITTED not in call.ended.values()


@pytest.mark.parametrize("open_", [in_a_session, on_a_connection])
def test_what_is_forgotten_does_not_commit(engine: Engine, open_: Open) -> None:
    call = Followed(open_(engine))
    call("a")
    del call.connection
    gc.collect()
    assert call.ended == {"a": LOST}


def test_a_commit_that_fails(call: Followed) -> None:
    """A foreign key that is checked at the commit."""
    call.connection.execute(text("CREATE TABLE a (id INTEGER PRIMARY KEY)"))
    call.connection.execute(text("CREATE TABLE b (a INTEGER REFERENCES a DEFERRABLE INITIALLY DEFERRED)"))
    call.connection.commit()
    call.connection.execute(text("INSERT INTO b VALUES (7)"))
    call("a")
    try:
        call.connection.commit()
    except sqlalchemy.exc.IntegrityError:
        call.connection.rollback()
    assert call.ended == {"a": Outcome.FAILED if isinstance(call.connection, Connection) else UNDONE}


def test_a_statement_that_fails_after_a_commit_takes_nothing_back(call: Followed) -> None:
    call("a")
    call.connection.commit()
    with pytest.raises(sqlalchemy.exc.OperationalError):
        call.connection.execute(text("SELECT FROM"))
    call.connection.rollback()
    assert call.ended == {"a": COMMITTED}


def test_a_session_in_a_tests_own_transaction_counts_by_its_commit(engine: Engine) -> None:
    """https://docs.sqlalchemy.org/en/20/orm/session_transaction.html#joining-a-session-into-an-external-transaction-such-as-for-test-suites"""
    with engine.connect() as connection:
        outer = connection.begin()
        session = Session(connection, join_transaction_mode="create_savepoint")
        call = Followed(session)
        call("a")
        session.commit()
        call("b")
        session.rollback()
        session.close()
        outer.rollback()
    assert call.ended == {"a": COMMITTED, "b": LOST}


@pytest.mark.parametrize("open_", KINDS)
def test_where_each_statement_is_committed_by_itself_there_is_nothing_to_follow(open_: Open) -> None:
    for engine in (create_engine("sqlite://", isolation_level="AUTOCOMMIT"), create_engine("sqlite://")):
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        opened = open_(engine)
        opened.execute(text("SELECT 1"))
        assert not follow(opened, lambda outcome, calls: None, None, used=True)
        opened.close()
        engine.dispose()


def test_a_drivers_own_connection_cannot_be_followed(engine: Engine) -> None:
    with contextlib.closing(engine.raw_connection()) as connection:
        assert not follow(connection.driver_connection, lambda outcome, calls: None, None, used=True)


def test_during_a_flush(engine: Engine) -> None:
    """As an event handler of the app may call it."""

    class Base(sqlalchemy.orm.DeclarativeBase):
        pass

    class Order(Base):
        __tablename__ = "orders"
        id: sqlalchemy.orm.Mapped[int] = sqlalchemy.orm.mapped_column(primary_key=True)

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        call = Followed(session)

        @sqlalchemy.event.listens_for(session, "before_flush")
        def before_flush(*_: Any) -> None:
            call("a")
            with session.begin_nested():
                call("b")

        session.add(Order())
        session.commit()
    assert call.ended == {"a": COMMITTED, "b": COMMITTED}
