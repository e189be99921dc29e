"""notify(): on connections of the package's own, and in the transactions of all kinds of callers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import psycopg2
import psycopg2.extras
import pytest
import sqlalchemy
from flask import Flask
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from flask_pg_sse import (
    DatabaseUnavailable,
    InvalidChannel,
    InvalidEvent,
    PayloadTooLarge,
    PgSSE,
    notify,
    notify_many,
    postgres_notify,
)
from flask_pg_sse.engine.postgres.codec import from_payload
from flask_pg_sse.event import Event
from tests.support.client import eventually
from tests.support.postgres import connect, execute, fresh_database
from tools import postgres

MakeApp = Callable[..., Flask]


class Ear:
    """A plain LISTEN connection: what other programs would hear."""

    def __init__(self, url: str, *channels: str) -> None:
        self.connection = connect(url)
        for channel in channels:
            self.connection.cursor().execute(f'LISTEN "{channel}"')

    def heard(self) -> list[tuple[str, Event]]:
        """Return what has come; a NOTIFY of our own behind it proves that nothing is still under way."""
        self.connection.cursor().execute("LISTEN fence; NOTIFY fence")
        found: list[tuple[str, Event]] = []

        def fenced() -> bool:
            self.connection.poll()
            for notification in self.connection.notifies:
                if notification.channel == "fence":
                    self.connection.notifies.clear()
                    return True
                event = from_payload(notification.payload).event
                assert event is not None
                found.append((notification.channel, event))
            self.connection.notifies.clear()
            return False

        eventually(fenced)
        return found

    def data(self) -> list[str]:
        return [event.data for _, event in self.heard()]


@pytest.fixture(params=[False, True], ids=["without the log", "through the log"])
def logged(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def database_url(postgres_server: postgres.Server, logged: bool) -> Iterator[str]:
    with fresh_database(postgres_server, logged=logged) as url:
        yield url


@pytest.fixture
def ear(database_url: str) -> Iterator[Ear]:
    ear = Ear(database_url, "orders", "other")
    yield ear
    ear.connection.close()


@pytest.fixture
def app(database_url: str, make_app: MakeApp) -> Iterator[Flask]:
    app = make_app(database_url)
    with app.app_context():
        yield app


def test_notify_sends_all_fields(app: Flask, ear: Ear, logged: bool) -> None:
    log_id = notify("orders", {"id": 7}, event="created", id=12, retry=500, comment="note")
    assert isinstance(log_id, int) if logged else log_id is None
    assert ear.heard() == [("orders", Event('{"id": 7}', "created", "12", 500, "note"))]


def test_notify_alone_is_an_empty_event(app: Flask, ear: Ear) -> None:
    notify("orders")
    assert ear.heard() == [("orders", Event(""))]


def test_calls_of_the_older_projects_run_unchanged(app: Flask, ear: Ear) -> None:
    payload = {"event": "NEW_NOTIFICATION", "id": 1, "data": '{"message": "A new notification"}'}
    notify(channel="orders", sse_payload=payload)
    postgres_notify(channel="orders", sse_payload=payload)
    postgres_notify(channel="orders", sse_payload={"data": {"a": 1}, "retry": 1000, "comment": "c", "event": None})
    expected = Event('{"message": "A new notification"}', "NEW_NOTIFICATION", "1")
    third = Event('{"a": 1}', None, None, 1000, "c")
    assert ear.heard() == [("orders", expected), ("orders", expected), ("orders", third)]
    with pytest.raises(TypeError, match="not both"):
        notify("orders", "x", sse_payload=payload)
    with pytest.raises(TypeError, match="sep"):
        notify("orders", sse_payload={"sep": "x"})


def test_notify_many_is_one_transaction_in_order(app: Flask, ear: Ear) -> None:
    notify_many("orders", range(1000), event="count")
    assert [int(data) for data in ear.data()] == list(range(1000))
    with pytest.raises(PayloadTooLarge):
        notify_many("orders", ["fits", "x" * 8000], durable=False)
    notify_many("orders", [])
    with pytest.raises(TypeError):
        notify_many("orders", "text")
    assert ear.heard() == []


def test_refused_calls_send_nothing(app: Flask, ear: Ear) -> None:
    bad: list[tuple[type[Exception], dict[str, Any]]] = [
        (InvalidChannel, {"channel": "flask_pg_sse"}),
        (InvalidChannel, {"channel": ""}),
        (InvalidEvent, {"event": "sse-end"}),
        (InvalidEvent, {"event": "a\nb"}),
        (InvalidEvent, {"id": "a\rb"}),
        (InvalidEvent, {"id": "a\0b"}),
        (InvalidEvent, {"retry": -1}),
        (InvalidEvent, {"retry": 99}),
        (InvalidEvent, {"retry": 3_600_001}),
        (InvalidEvent, {"event": "\ufeff sse-end"}),
        (InvalidEvent, {"data": float("nan")}),
        (InvalidEvent, {"data": {"deep": [float("inf")]}}),
        (InvalidEvent, {"data": b"\xff"}),
        (InvalidEvent, {"data": "\ud800"}),
        (TypeError, {"data": object()}),
        (PayloadTooLarge, {"data": "x" * 8000, "durable": False}),
    ]
    for error, call in bad:
        with pytest.raises(error):
            notify(**{"channel": "orders", **call})
    assert ear.heard() == []


def test_the_applications_json_provider_is_used(database_url: str, make_app: MakeApp, ear: Ear) -> None:
    app = make_app(database_url)
    app.json.dumps = lambda obj, **kwargs: "from the provider"  # type: ignore[method-assign]
    with app.app_context():
        notify("orders", {"a": 1})
    assert ear.data() == ["from the provider"]


def test_any_text_survives_the_way(app: Flask, ear: Ear) -> None:
    texts = ["", " x", "a\nb\r\nc\rd", "NUL \0 inside", "\u2028\u2029\x85", "\U0001f373 é", "'\"\\%s;--", "\x1e1{}"]
    texts += ["{}", '{"data": 1}']
    for text in texts:
        notify("orders", text)
    assert ear.data() == texts


def test_without_an_app(database_url: str, ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    sse = PgSSE(database_url=database_url)
    try:
        sse.notify("orders", {"a": 1}, event="e")
        sse.notify_many("orders", ["b", "c"])
    finally:
        sse.close()
    monkeypatch.setenv("DATABASE_URL", database_url)
    from_environment = PgSSE()
    try:
        from_environment.notify("orders", "d")
    finally:
        from_environment.close()
    assert ear.data() == ['{"a": 1}', "b", "c", "d"]


def test_a_connection_that_the_server_closed_is_replaced(app: Flask, ear: Ear, database_url: str) -> None:
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'flask_pg_sse notify'"
    for number in range(20):
        notify("orders", str(number))
        execute(database_url, kill)
    notify("orders", "end")
    assert ear.data() == [*map(str, range(20)), "end"]


def test_a_restart_of_postgres_goes_unnoticed(own_postgres: postgres.Server, make_app: MakeApp) -> None:
    app = make_app(own_postgres.url())
    with app.app_context():
        modes: tuple[postgres.StopMode, ...] = ("fast", "immediate")
        for mode in modes:
            notify("orders", "x")
            own_postgres.restart(mode)
        notify("orders", "x")
        own_postgres.stop()
        with pytest.raises(DatabaseUnavailable, match="cannot be reached") as caught:
            notify("orders", "x")
        assert isinstance(caught.value, ConnectionError)
        own_postgres.start()
        notify("orders", "x")


def test_many_threads_share_a_few_connections(app: Flask, ear: Ear, database_url: str) -> None:
    def send(number: int) -> None:
        with app.app_context():
            for count in range(25):
                notify("orders", f"{number} {count}")

    threads = [threading.Thread(target=send, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    heard = ear.data()
    assert sorted(heard) == sorted(f"{number} {count}" for number in range(16) for count in range(25))
    for number in range(16):
        assert [int(d.split()[1]) for d in heard if d.split()[0] == str(number)] == list(range(25))
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flask_pg_sse notify'"
    assert execute(database_url, query)[0][0] <= 4


# -- transactions of the caller

Kind = tuple[Any, Callable[[], None], Callable[[], None], Callable[[str], None], Callable[[], None]]


def sqlalchemy_url(url: str, driver: str) -> str:
    return url.replace("postgresql://", f"postgresql+{driver}://")


def raw(connection: Any) -> Kind:
    def run(statement: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement)

    return connection, connection.commit, connection.rollback, run, connection.close


def via_sqlalchemy(url: str, driver: str, kind: str) -> Kind:
    engine = sqlalchemy.create_engine(sqlalchemy_url(url, driver))
    target: Any
    if kind == "connection":
        target = engine.connect()
    elif kind == "session":
        target = Session(engine)
    else:
        target = scoped_session(sessionmaker(engine))

    def run(statement: str) -> None:
        target.execute(sqlalchemy.text(statement))

    def close() -> None:
        target.close()
        engine.dispose()

    return target, target.commit, target.rollback, run, close


KINDS: dict[str, Callable[[str], Kind]] = {
    "psycopg2": lambda url: raw(psycopg2.connect(url)),
    "psycopg2 with dict rows": lambda url: raw(psycopg2.connect(url, cursor_factory=psycopg2.extras.RealDictCursor)),
    "psycopg": lambda url: raw(psycopg.connect(url)),
    "psycopg with dict rows": lambda url: raw(psycopg.connect(url, row_factory=psycopg.rows.dict_row)),
    **{
        f"sqlalchemy {kind} {driver}": lambda url, kind=kind, driver=driver: via_sqlalchemy(url, driver, kind)  # type: ignore[misc]
        for kind in ("connection", "session", "scoped_session")
        for driver in ("psycopg2", "psycopg")
    },
}


@pytest.fixture(params=KINDS)
def caller(request: pytest.FixtureRequest, database_url: str) -> Iterator[Kind]:
    kind = KINDS[request.param](database_url)
    yield kind
    kind[4]()


def test_the_event_leaves_on_commit_and_never_after_rollback(app: Flask, ear: Ear, caller: Kind) -> None:
    connection, commit, rollback, run, _ = caller
    run("CREATE TABLE thing (id int)")
    notify("orders", "one", connection=connection)
    notify("other", {"n": 2}, event="two", connection=connection)
    assert ear.heard() == [], "nothing before the commit"
    commit()
    assert ear.heard() == [("orders", Event("one")), ("other", Event('{"n": 2}', "two"))]

    notify("orders", "never", connection=connection)
    rollback()
    notify("orders", "three", connection=connection)
    commit()
    assert ear.data() == ["three"]


def test_savepoints_take_their_events_along(app: Flask, ear: Ear, caller: Kind) -> None:
    connection, commit, _, run, _ = caller
    notify("orders", "one", connection=connection)
    run("SAVEPOINT a")
    notify("orders", "never", connection=connection)
    run("ROLLBACK TO SAVEPOINT a")
    run("SAVEPOINT b")
    notify("orders", "two", connection=connection)
    run("RELEASE SAVEPOINT b")
    commit()
    assert ear.data() == ["one", "two"]


def test_equal_events_of_one_transaction_all_arrive(app: Flask, ear: Ear, caller: Kind) -> None:
    connection, commit, _, _, _ = caller
    for _ in range(40):
        notify("orders", "same", event="e", connection=connection)
    notify_many("orders", ["same"] * 40, event="e", connection=connection)
    commit()
    assert ear.data() == ["same"] * 80


def test_text_is_safe_in_every_driver(app: Flask, ear: Ear, caller: Kind) -> None:
    connection, commit, _, _, _ = caller
    texts = ["'; DROP TABLE x; --", "%s %(a)s %%", ":name \\:x", "\\'", "NUL \0", "é\U0001f373", "a\nb"]
    for text in texts:
        notify("orders", text, connection=connection)
    commit()
    assert ear.data() == texts


def test_too_large_an_event_leaves_the_transaction_alone(app: Flask, ear: Ear, caller: Kind) -> None:
    connection, commit, _, _, _ = caller
    with pytest.raises(PayloadTooLarge):
        notify("orders", "x" * 8000, connection=connection, durable=False)
    notify("orders", "fine", connection=connection)
    commit()
    assert ear.data() == ["fine"]


def test_any_size_in_a_callers_transaction(app: Flask, ear: Ear, caller: Kind, logged: bool, database_url: str) -> None:
    """Text of several bytes a character, to 5 MB; without the log, an error before anything is sent."""
    connection, commit, _, _, _ = caller
    large = "é€" * 1_000_000
    if not logged:
        with pytest.raises(PayloadTooLarge, match="flask sse init"):
            notify("orders", large, connection=connection)
        commit()
        assert ear.data() == []
        return
    assert notify("orders", large, connection=connection) is None
    commit()
    rows = execute(database_url, "SELECT channel, data FROM flask_pg_sse.event")
    assert rows == [("orders", large)]


def test_an_event_that_is_not_durable_stands_in_no_log(app: Flask, ear: Ear, caller: Kind, database_url: str) -> None:
    connection, commit, _, _, _ = caller
    notify("orders", "typing", durable=False, connection=connection)
    notify_many("orders", ["a", "b"], durable=False, connection=connection)
    commit()
    assert notify("orders", "typing", durable=False) is None
    assert ear.data() == ["typing", "a", "b", "typing"]
    if execute(database_url, "SELECT to_regclass('flask_pg_sse.event') IS NOT NULL")[0][0]:
        assert execute(database_url, "SELECT count(*) FROM flask_pg_sse.event") == [(0,)]


def test_an_autocommit_connection_sends_at_once(app: Flask, ear: Ear, database_url: str) -> None:
    connection = connect(database_url)
    notify("orders", "now", connection=connection)
    assert ear.data() == ["now"]
    connection.close()


def test_two_transactions_arrive_in_the_order_of_their_commits(app: Flask, ear: Ear, database_url: str) -> None:
    first, second = psycopg2.connect(database_url), psycopg2.connect(database_url)
    notify("orders", "of the first", connection=first)
    notify("orders", "of the second", connection=second)
    second.commit()
    first.commit()
    assert ear.data() == ["of the second", "of the first"]
    first.close()
    second.close()


def test_asynchronous_connections_are_refused_with_the_way(app: Flask, database_url: str) -> None:
    async def main() -> None:
        connection = await psycopg.AsyncConnection.connect(database_url)
        with pytest.raises(TypeError, match="synchronous"):
            notify("orders", "x", connection=connection)
        await connection.close()
        engine = create_async_engine(sqlalchemy_url(database_url, "psycopg"))
        async with AsyncSession(engine) as session:
            with pytest.raises(TypeError, match="run_sync"):
                notify("orders", "x", connection=session)
            await session.run_sync(lambda s: notify("orders", "x", connection=s))
            await session.rollback()
        async with engine.connect() as async_connection:
            with pytest.raises(TypeError, match="run_sync"):
                notify("orders", "x", connection=async_connection)
        await engine.dispose()

    asyncio.run(main())
    asynchronous = psycopg2.connect(database_url, async_=1)
    with pytest.raises(TypeError, match="synchronous"):
        notify("orders", "x", connection=asynchronous)
    asynchronous.close()


@pytest.mark.parametrize("wrong", ["a string", 7, object()])
def test_what_is_no_connection_is_refused_in_words(app: Flask, wrong: object) -> None:
    with pytest.raises(TypeError, match="psycopg2 or psycopg 3 connection"):
        notify("orders", "x", connection=wrong)


def test_an_engine_is_no_connection(app: Flask, database_url: str) -> None:
    engine = sqlalchemy.create_engine(sqlalchemy_url(database_url, "psycopg2"))
    with pytest.raises(TypeError, match="Session"):
        notify("orders", "x", connection=engine)
    engine.dispose()
