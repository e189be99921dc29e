"""What a caller's connection answers about the event log counts for that connection alone, also on a read replica."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import psycopg2
import pytest
from flask import Flask
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from flask_pg_sse import EventLogMissing, notify, schema_sql, sse_cursor, sse_url
from flask_pg_sse.engine.caller import send_on
from flask_pg_sse.engine.transactions import follow
from flask_pg_sse.testing import stream
from tests.support.client import eventually
from tests.support.cluster import Cluster, caught_up
from tests.support.postgres import execute, fresh_database
from tests.support.servers import free_port
from tools import postgres

MakeApp = Callable[..., Flask]


@pytest.fixture
def tenant(logged_url: str) -> Iterator[str]:
    """A role without any right on the log, which rows of its own are written under."""
    execute(logged_url, "CREATE ROLE tenant; CREATE TABLE row (number int); GRANT ALL ON row TO tenant")
    yield "tenant"
    execute(logged_url, "DROP OWNED BY tenant; DROP ROLE tenant")


def kept(url: str) -> list[str]:
    return [data for (data,) in execute(url, "SELECT data FROM flask_pg_sse.event ORDER BY id")]


@pytest.mark.parametrize("where", ["another role", "another database"])
def test_events_of_others_are_kept_beside_a_connection_that_cannot_use_the_log(
    logged_url: str, database_url: str, tenant: str, make_app: MakeApp, where: str
) -> None:
    app = make_app(logged_url)
    ended = threading.Event()
    refused: list[str] = []
    disturbs = {"another role": (logged_url, "SET LOCAL ROLE tenant; "), "another database": (database_url, "")}
    url, begins = disturbs[where]
    execute(url, "CREATE TABLE IF NOT EXISTS row (number int)")

    def disturb() -> None:
        with app.app_context(), closing(psycopg2.connect(url)) as connection:
            while not ended.is_set():
                connection.cursor().execute(f"{begins}INSERT INTO row VALUES (1)")
                try:
                    notify("orders", "lost", connection=connection)
                except EventLogMissing as error:
                    refused.append(str(error))
                connection.commit()  # the transaction is whole

    def send(number: int) -> None:
        with app.app_context(), closing(psycopg2.connect(logged_url)) as connection:
            for count in range(40):
                notify("orders", f"{number} {count}", connection=connection)
                connection.commit()

    threads = [threading.Thread(target=send, args=(number,)) for number in range(3)]
    disturbing = threading.Thread(target=disturb)
    for thread in (disturbing, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: refused)
    ended.set()
    disturbing.join()
    assert sorted(kept(logged_url)) == sorted(f"{number} {count}" for number in range(3) for count in range(40))
    [text] = set(refused)
    assert text.startswith("The event log cannot be used on this connection: ") and "Remedy: " in text
    assert execute(url, "SELECT count(*) FROM row") == [(len(refused),)]


def test_a_role_that_only_lacks_the_rights_is_told_which(logged_url: str, tenant: str, make_app: MakeApp) -> None:
    app = make_app(logged_url, SSE_LOG_OWNER="postgres")
    engine = create_engine(logged_url.replace("postgresql:", "postgresql+psycopg:"))
    with app.app_context(), Session(engine) as session:
        session.execute(text("SET LOCAL ROLE tenant"))
        with pytest.raises(EventLogMissing, match=r'role "tenant" may not use it. .*--grant-to tenant'):
            notify("orders", "x", connection=session)
        assert notify("orders", "in passing", durable=False, connection=session) is None
        session.execute(text("RESET ROLE"))
        notify("orders", "y", connection=session)
        session.commit()
    engine.dispose()
    assert kept(logged_url) == ["y"]


@pytest.mark.parametrize("logged", [False, True], ids=["without a log", "a copy of the log"])
def test_another_database_is_named(
    logged_url: str, postgres_server: postgres.Server, make_app: MakeApp, logged: bool
) -> None:
    """A copy of a database has the log's schema under the same numbers, and the same key."""
    with fresh_database(postgres_server, logged=logged) as other, make_app(logged_url).app_context():
        name = other.rpartition("/")[2]
        with closing(psycopg2.connect(other)) as connection:
            with pytest.raises(EventLogMissing, match=f'its database "{name}" is not the one .* Remedy'):
                notify("orders", "elsewhere", connection=connection)
            connection.commit()
        assert notify("orders", "here") is not None
        assert logged is False or kept(other) == []
    assert kept(logged_url) == ["here"]


def test_a_search_path_that_leads_elsewhere_changes_nothing(logged_url: str, make_app: MakeApp) -> None:
    with make_app(logged_url).app_context(), closing(psycopg2.connect(logged_url)) as connection:
        connection.cursor().execute("CREATE SCHEMA elsewhere; SET LOCAL search_path = elsewhere")
        notify("orders", "x", connection=connection)
        connection.commit()
    assert kept(logged_url) == ["x"]


def nowhere() -> str:
    return f"postgresql://postgres@127.0.0.1:{free_port()}/nothing"


@pytest.mark.parametrize("own", [nowhere, lambda: None], ids=["cannot be reached", "is not configured"])
def test_without_the_apps_own_database_the_connection_answers_for_itself(
    logged_url: str, database_url: str, make_app: MakeApp, own: Callable[[], str | None]
) -> None:
    url = own()
    with make_app(url).app_context(), closing(psycopg2.connect(logged_url)) as connection:
        notify("orders", "x", connection=connection)
        connection.commit()
        with closing(psycopg2.connect(database_url)) as without:

            def send() -> Any:
                return notify("orders", "y", connection=without)

            if url is None:
                assert send() is None
            else:  # whether the app uses a log is not known
                with pytest.raises(ConnectionError, match="cannot be reached"):
                    send()
    assert kept(logged_url) == ["x"]


# -- sse_cursor(connection=…)

READERS: dict[str, Callable[[str], Any]] = {
    "psycopg2": psycopg2.connect,
    "psycopg": psycopg.connect,
    "session": lambda url: Session(
        create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_page_whose_data_come_from_a_replica_that_lags_misses_nothing(
    cluster: Cluster, make_app: MakeApp, reader: str
) -> None:
    primary = cluster.primary.url()
    execute(primary, schema_sql())
    execute(primary, "CREATE TABLE dish (name text)")
    app = make_app(primary)

    def order(name: str) -> None:
        with closing(psycopg2.connect(primary)) as connection:
            connection.cursor().execute("INSERT INTO dish VALUES (%s)", (name,))
            notify("orders", name, connection=connection)
            connection.commit()

    def rows(connection: Any) -> list[str]:
        query = "SELECT name FROM dish"
        if isinstance(connection, Session):
            return [name for (name,) in connection.execute(text(query))]
        with connection.cursor() as cursor:
            cursor.execute(query)
            return [name for (name,) in cursor]

    with app.test_request_context():
        order("soup")
        replica = cluster.standby("replica")
        caught_up(replica, cluster.primary)
        execute(replica.url(), "SELECT pg_wal_replay_pause()")
        order("cake")
        with closing(READERS[reader](replica.url())) as connection:
            url = sse_url("orders", cursor=sse_cursor(connection=connection))
            assert rows(connection) == ["soup"]
            assert sse_cursor(connection=connection) != sse_cursor()
    events = stream(app.test_client(), url)
    assert next(events).event == "sse-open"
    assert next(events).data == "cake"
    events.close()


def test_the_cursor_of_a_connection_is_the_head_that_it_sees(
    logged_url: str, database_url: str, make_app: MakeApp
) -> None:
    with make_app(logged_url).app_context(), closing(psycopg2.connect(logged_url)) as connection:
        connection.set_session(isolation_level="REPEATABLE READ")
        seen = notify("orders", "before")
        assert sse_cursor(connection=connection) == seen
        later = notify("orders", "after the snapshot")
        assert sse_cursor(connection=connection) == seen and sse_cursor() == later
        connection.rollback()
        assert sse_cursor(connection=connection) == later
        with closing(psycopg2.connect(database_url)) as other, pytest.raises(EventLogMissing, match="its database"):
            sse_cursor(connection=other)
    with make_app(database_url).app_context(), closing(psycopg2.connect(database_url)) as connection:
        assert sse_cursor(connection=connection) is None
        session = AsyncSession()
        with pytest.raises(TypeError, match=r"run_sync\(lambda s: sse_cursor\(connection=s\)\)"):
            sse_cursor(connection=session)
        asyncio.run(session.close())


class OptionsOf14(dict[str, Any]):
    """As SQLAlchemy 1.4 has a connection's options: the C of its `immutabledict` gives the keys as a list."""

    def keys(self) -> Any:
        return list(super().keys())


@pytest.fixture
def like_14(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SQLAlchemy's connections differ as those of 1.4 do, which cannot be installed beside the tests' own."""
    options = Connection.get_execution_options
    monkeypatch.setattr(Connection, "get_execution_options", lambda self: OptionsOf14(options(self)))
    monkeypatch.setattr(Connection, "_is_future", False, raising=False)


@pytest.mark.usefixtures("like_14")
def test_a_session_of_sqlalchemy_14_sends(logged_url: str, make_app: MakeApp) -> None:
    engine = create_engine(logged_url.replace("postgresql:", "postgresql+psycopg2:"), poolclass=NullPool)
    with make_app(logged_url).app_context():
        with Session(engine) as session:
            notify("orders", "committed", connection=session)
            session.commit()
        with engine.connect().execution_options(stream_results=True) as connection, connection.begin():
            notify("orders", "from a connection for large results", connection=connection)
        with engine.connect() as connection:
            assert sse_cursor(connection=connection)
    assert kept(logged_url) == ["committed", "from a connection for large results"]


@pytest.mark.usefixtures("like_14")
def test_a_connection_of_sqlalchemy_14_that_has_not_begun_is_let_commit_by_itself(database_url: str) -> None:
    """It commits a statement that has the option `autocommit`, and a transaction of ours would keep it from that."""
    engine = create_engine(database_url.replace("postgresql:", "postgresql+psycopg2:"), poolclass=NullPool)
    options: list[Any] = []

    @event.listens_for(engine, "before_execute")
    def look(connection: Any, statement: Any, *_: Any) -> None:
        options.append(statement.get_execution_options().get("autocommit"))

    with engine.connect() as connection:
        assert not follow(connection, lambda *_: None, None, used=False)
        assert not connection.in_transaction()
        send_on(connection, "SELECT {}", ("x",))
    with engine.connect() as connection, connection.begin():
        assert follow(connection, lambda *_: None, None, used=False)
        send_on(connection, "SELECT {}", ("x",))
    assert options == [True, None]
