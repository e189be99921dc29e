"""Finding out if there is an event log: an error of the database never means "there is none"."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import psycopg2
import pytest
from flask import Flask

from flask_pg_sse import notify, schema_sql
from flask_pg_sse.engine.postgres import installation
from flask_pg_sse.errors import DatabaseUnavailable
from tests.support.client import eventually
from tests.support.postgres import execute
from tools import postgres

MakeApp = Callable[..., Flask]


def test_events_of_the_first_moment_go_to_the_log_from_every_thread(
    database_url: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one asks whether there is a log; the others come before it has an answer."""
    execute(database_url, schema_sql())
    app = make_app(database_url)
    asking = threading.Semaphore(0)
    ids: list[int | None] = []
    look_up = installation.look_up

    def look_up_slowly(run: Callable[[str], Sequence[Sequence[Any]]], log_owner: str | None) -> Any:
        asking.release()
        eventually(lambda: ids or asking._value == 3)  # all ask, or one did not need to
        return look_up(run, log_owner)

    def send() -> None:
        with app.app_context():
            ids.append(notify("a", "x"))

    monkeypatch.setattr(installation, "look_up", look_up_slowly)
    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 3 and None not in ids
    assert execute(database_url, "SELECT count(*) FROM flask_pg_sse.event") == [(3,)]


def test_events_after_an_outage_go_to_the_log_again(own_postgres: postgres.Server, make_app: MakeApp) -> None:
    execute(own_postgres.url(), schema_sql())
    with make_app(own_postgres.url()).app_context():
        assert notify("a", "before") is not None
        own_postgres.stop()
        for _ in range(3):
            with pytest.raises(DatabaseUnavailable) as caught:
                notify("a", "nobody is there")
            assert isinstance(caught.value.__cause__, psycopg2.Error | None)
        own_postgres.start()
        assert notify("a", "after") is not None
    assert execute(own_postgres.url(), "SELECT data FROM flask_pg_sse.event ORDER BY id") == [("before",), ("after",)]
