"""A warning names events that went with their transaction; what was given up on purpose is not told."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, abort
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from flask_pg_sse import PgSSE, notify, notify_many
from flask_pg_sse.testing import capture, stream

MakeApp = Callable[..., Flask]
LOST = (
    "1 event for 'stock' went with its transaction, which ended without a commit, so no browser gets it: "
    "notify(connection=…) at "
)


class Shop:
    """An app with Flask-SQLAlchemy on PostgreSQL. A view is a function, and its answer "" or an error."""

    def __init__(self, app: Flask, log: pytest.LogCaptureFixture) -> None:
        self.app = app
        self.db = SQLAlchemy(app)
        self.view: Callable[[], Any] = str
        self.teardown: Callable[[], Any] = str
        self._log = log
        app.add_url_rule("/", "save", lambda: self.view(), methods=["POST"])
        app.teardown_appcontext(self._tear_down)  # runs before Flask-SQLAlchemy's, which came first

    def _tear_down(self, error: BaseException | None) -> None:
        self.teardown()

    def told(self) -> list[str]:
        """The warnings of the package since the last call."""
        found = [one.getMessage() for one in self._log.records if one.levelno >= logging.INFO]
        self._log.clear()
        return [line for line in found if "transaction" in line]

    def request(self, view: Callable[[], Any]) -> list[str]:
        """Answer one request with `view`, and return what is told then."""
        self.view = view
        self.app.test_client().post("/")
        return self.told()


@pytest.fixture
def shop(database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> Iterator[Shop]:
    url = database_url.replace("postgresql://", "postgresql+psycopg2://")
    shop = Shop(make_app(database_url, SQLALCHEMY_DATABASE_URI=url, PROPAGATE_EXCEPTIONS=False), caplog)
    yield shop
    with shop.app.app_context():
        shop.db.engine.dispose()


def test_notify_after_the_commit(shop: Shop) -> None:
    """As everybody who adds the call after the saving does once."""

    def save() -> tuple[str, int]:
        shop.db.session.execute(text("SELECT 1"))
        shop.db.session.commit()
        notify("stock", "x", connection=shop.db.session)
        return "", 204

    with stream(shop.app.test_client(), "/sse?channel=stock") as events:
        next(events)
        [line] = shop.request(save)
        events.nothing()
    line_number = save.__code__.co_firstlineno + 3
    assert line == f"{LOST}{__file__}:{line_number}, endpoint 'save'. Remedy: call notify() before the commit."
    assert shop.request(save) == [], "it is counted, and told again after a minute"


@pytest.mark.parametrize("end", ["close", "rollback", "remove", "forgotten", "on a connection"])
def test_each_end_without_a_commit(shop: Shop, end: str) -> None:
    def view() -> str:
        session: Any = shop.db.session
        if end == "on a connection":
            with shop.db.engine.connect() as connection:
                notify_many("stock", ["x", "y"], connection=connection)
            return ""
        if end == "forgotten":
            session = Session(shop.db.engine)
        notify_many("stock", ["x", "y"], connection=session)
        if end != "forgotten":
            getattr(session, end)()
        return ""

    told = shop.request(view)
    gc.collect()
    told = told or shop.told()
    assert len(told) == 1 and told[0].startswith("2 events for 'stock' went with their transaction"), told
    assert "test_losses.py" in told[0]


def test_what_is_committed_or_given_up_on_purpose_is_not_told(shop: Shop) -> None:
    session = shop.db.session

    def send(data: str = "x") -> None:
        notify("stock", data, connection=session)

    def committed() -> str:
        send()
        session.commit()
        return ""

    def committed_by_the_apps_teardown() -> str:
        send()
        return ""

    def fails() -> str:
        send()
        raise ZeroDivisionError

    def refuses() -> str:
        send()
        abort(409)

    def answers_with_an_error() -> tuple[str, int]:
        send()
        return "no", 422

    def handles_an_exception() -> str:
        send()
        try:
            session.execute(text("SELECT 1/0"))
        except Exception:
            session.rollback()
        return ""

    def savepoint() -> str:
        send()
        inner = session.begin_nested()
        send("y")
        inner.rollback()
        session.commit()
        return ""

    def tries_again() -> str:
        for attempt in range(2):
            send()
            if attempt:
                session.commit()
            session.rollback()
        return ""

    def with_autocommit() -> str:
        with shop.db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            notify("stock", "x", connection=connection)
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        send()
        return ""

    def on_the_packages_own_connection() -> str:
        notify("stock", "x")
        return ""

    for view in (
        committed,
        fails,
        refuses,
        answers_with_an_error,
        handles_an_exception,
        savepoint,
        tries_again,
        with_autocommit,
        on_the_packages_own_connection,
    ):
        assert shop.request(view) == [], view.__name__
    shop.teardown = session.commit
    assert shop.request(committed_by_the_apps_teardown) == []


def test_a_context_around_several_requests(shop: Shop) -> None:
    """As suites have it that keep one open: what a request that failed has given up is not told of the next one."""

    def refuses() -> tuple[str, int]:
        notify("stock", "x", connection=shop.db.session)
        shop.db.session.rollback()
        return "no", 422

    def forgets() -> str:
        notify("orders", "x", connection=shop.db.session)
        shop.db.session.rollback()
        return ""

    with shop.app.app_context():
        assert shop.request(refuses) == []
        shop.request(forgets)
    [line] = shop.told()
    assert line.startswith("1 event for 'orders'")


def test_one_place_that_is_called_often(shop: Shop) -> None:
    """One warning, also where the first calls were right."""

    def view() -> str:
        for number in range(5):
            notify(f"user-{number}", "x", connection=shop.db.session)
            if number == 1:
                shop.db.session.commit()
        return ""

    [line] = shop.request(view)
    assert line.startswith("3 events for 'user-2' and other channels went with their transaction"), line


def test_a_session_that_the_app_closes_after_the_package_was_told(shop: Shop) -> None:
    """Committed in another place: by a job that has got the session."""
    kept: list[Session] = []

    def view() -> str:
        kept.append(Session(shop.db.engine))
        notify("stock", "x", connection=kept[0])
        return ""

    assert shop.request(view) == []
    kept[0].commit()
    assert shop.told() == []
    notify_in_context(shop, kept[0])
    assert shop.told() == []
    kept[0].close()
    [line] = shop.told()
    assert line.startswith(LOST)


def notify_in_context(shop: Shop, session: Session) -> None:
    with shop.app.app_context():
        notify("stock", "x", connection=session)


def test_outside_a_request_it_is_told_when_the_transaction_ends(shop: Shop) -> None:
    """A shell and a consumer have one context for hours, and a notebook's never ends."""
    with shop.app.app_context():
        for number in range(3):
            notify(f"user-{number}", "x", connection=shop.db.session)
        shop.db.session.rollback()
        [line] = shop.told()
        assert line.startswith("3 events for 'user-0' and other channels went with their transaction"), line
    assert shop.told() == []
    with pytest.raises(ZeroDivisionError), shop.app.app_context():
        notify("stock", "x", connection=shop.db.session)
        raise ZeroDivisionError
    assert shop.told() == []


def test_without_an_app(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    sse = PgSSE(database_url=database_url)
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    with Session(engine) as session:
        for data in "xy":
            sse.notify("stock", data, connection=session)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith("2 events for 'stock' went with their transaction")
    engine.dispose()
    sse.close()


def test_a_forked_child_knows_nothing_of_its_parents_transactions(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    engine = create_engine("sqlite://")
    with capture(app) as events, Session(engine) as session:
        with app.app_context():
            notify("stock", "x", connection=session)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, as pytest-xdist has
            child = os.fork()
        if child == 0:
            try:
                session.close()
                os._exit(len(caplog.records))
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        session.commit()
    assert [event.data for event in events] == ["x"] and not caplog.records
    engine.dispose()


def test_a_session_within_an_asynchronous_one(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(database_url)

    async def run(*, commits: bool) -> None:
        engine = create_async_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
        async with AsyncSession(engine) as session:
            with app.app_context():
                await session.run_sync(lambda inner: notify("stock", "x", connection=inner))
            if commits:
                await session.commit()
        await engine.dispose()

    asyncio.run(run(commits=True))
    assert "transaction" not in caplog.text
    asyncio.run(run(commits=False))
    assert LOST in caplog.text


def test_the_ways_to_begin(shop: Shop) -> None:
    def view() -> str:
        with shop.db.session.begin():
            notify("stock", "x", connection=shop.db.session)
        with shop.db.engine.begin() as connection:
            notify("stock", "x", connection=connection)
        with Session(shop.db.engine) as session, session.begin():
            notify("stock", "x", connection=session)
        with shop.db.engine.connect() as connection, Session(connection) as session:
            notify("stock", "x", connection=session.connection())
            session.commit()
            connection.commit()
        return ""

    assert shop.request(view) == []


def test_in_capture_too(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    engine = create_engine("sqlite://")
    with capture(app), app.app_context(), Session(engine) as session:
        notify("stock", "x", connection=session)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith(LOST)
    engine.dispose()


def test_a_commit_that_fails_is_an_error_already(shop: Shop) -> None:
    def view() -> str:
        session = shop.db.session
        session.execute(text("CREATE TEMP TABLE a (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
        session.execute(text("INSERT INTO a VALUES (1), (1)"))
        notify("stock", "x", connection=session)
        try:
            session.commit()
        except IntegrityError:
            session.rollback()
        return ""

    assert shop.request(view) == []
