"""What a caller's connection answers about the event log counts for that connection alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from flask import Flask
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from flask_pg_sse import EventLogMissing, notify
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
