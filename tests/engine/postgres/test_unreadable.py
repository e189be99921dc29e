"""An event in the log that cannot be sent is skipped: it stops no stream, and holds back no other event."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from urllib.parse import urlencode

import psycopg2
import pytest
from flask import Flask
from flask.testing import FlaskClient

from flask_pg_sse import notify
from flask_pg_sse.engine.postgres import codec
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.testing import Received, stream
from tests.support.log import ENQUEUE, PUBLISH, connected, logged, run
from tests.support.postgres import execute, fresh_database
from tools import postgres

MakeApp = Callable[..., Flask]
LISTENERS = (
    "SELECT pid FROM pg_stat_activity WHERE application_name = 'flask_pg_sse listener' AND datname = current_database()"
)
# Fields as JSON can write them and no event can have them: the first two make Python's own reader fail.
UNREADABLE = [
    '{"id": ' + "9" * 5000 + "}",
    '{"retry": ' + "[" * 5000 + "]" * 5000 + "}",
    '{"event": "a\\nb"}',
    '{"event": "sse-end"}',
    '{"retry": -1}',
    '{"id": "half of a pair: \\ud800"}',
    '{"unknown": 1}',
    '{"data": "given twice"}',
]  # fmt: skip


@contextlib.contextmanager
def opened(client: FlaskClient, url: str) -> Iterator[Iterator[Received]]:
    events = stream(client, url, timeout=20)
    try:
        yield events
    finally:
        events.close()


def test_rows_that_no_event_can_be_made_of(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """Every publisher can write them, and so can the tables' owner, who need not even write JSON objects."""
    execute(database_url, schema_sql())
    client = make_app(database_url).test_client()
    with opened(client, "/sse?channel=orders") as live:
        begun = next(live)
        listeners = execute(database_url, LISTENERS)
        execute(
            database_url,
            "INSERT INTO flask_pg_sse.event SELECT nextval('flask_pg_sse.event_id'), 'orders', '[]', 'x', now()",
        )
        for number, fields in enumerate(UNREADABLE):
            # The second is too large for NOTIFY: the listener reads it from the log.
            for padding in ("", "x" * 10_000):
                execute(database_url, PUBLISH, ("orders", [fields], [padding]))
            execute(database_url, PUBLISH, ("orders", ["{}"], [f"after {number}"]))
            assert next(live).data == f"after {number}"
        assert execute(database_url, LISTENERS) == listeners, "it reconnected"
    expected = [f"after {number}" for number in range(len(UNREADABLE))]
    for other in ("", "&channel=other"):  # what is remembered of a channel, and pages of the log
        url = f"/sse?channel=orders{other}&last_event_id={begun.id}"
        with opened(client, url) as resumed:
            assert next(resumed).event == "sse-open"
            assert [next(resumed).data for _ in expected] == expected
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert 1 <= len(said) <= 3, "at most once a minute for each reader"


@pytest.mark.parametrize("encoding", ["WIN1252", "SQL_ASCII"])
def test_bytes_that_are_no_text_in_utf_8_are_refused(log_server: postgres.Server, encoding: str) -> None:
    """In other encodings than UTF8 a text may hold what PostgreSQL could not give to any reader."""
    with fresh_database(log_server, f"ENCODING '{encoding}' LOCALE 'C'") as url:
        execute(url, schema_sql())
        with connected(f"{url}?client_encoding=utf8", transactions=False) as connection:
            for call in (
                "SELECT flask_pg_sse.notify('orders', E'x\\x81')",
                "SELECT flask_pg_sse.notify('orders', 'x', event => E'x\\x81')",
                "SELECT flask_pg_sse.notify('orders', 'x', comment => E'x\\x81')",
                "SELECT flask_pg_sse.notify(E'x\\x81', 'x')",
                "SELECT flask_pg_sse.publish_v1('orders', ARRAY['{}'::json], ARRAY[E'x\\x81'])",
                "SELECT flask_pg_sse.publish_v1('orders', ARRAY[E'{\"id\": \"x\\x81\"}'::json], ARRAY['x'])",
                "SELECT flask_pg_sse.publish_v1(E'x\\x81', ARRAY['{}'::json], ARRAY['x'])",
                "SELECT flask_pg_sse.enqueue_v1('orders', ARRAY['{}'::json], ARRAY[E'x\\x81'])",
            ):
                with pytest.raises((psycopg2.errors.UntranslatableCharacter, psycopg2.errors.CharacterNotInRepertoire)):
                    run(connection, call)
            # In a transaction at the call, and not only at its end.
            run(connection, "BEGIN")
            with pytest.raises((psycopg2.errors.UntranslatableCharacter, psycopg2.errors.CharacterNotInRepertoire)):
                run(connection, "SELECT flask_pg_sse.notify('orders', E'x\\x81')")
            run(connection, "ROLLBACK")
            assert logged(url) == []


def test_fields_that_are_no_object_are_refused(log_url: str) -> None:
    with connected(log_url, transactions=False) as connection:
        for query in (PUBLISH, ENQUEUE):
            for fields in ("[]", "1", '"x"', "null", "true"):
                with pytest.raises(psycopg2.errors.InvalidParameterValue, match="JSON object"):
                    run(connection, query, ("orders", [fields], ["x"]))
    assert logged(log_url) == []


# Each with bytes that PostgreSQL takes as text and cannot convert, and with names and data that it can.
POISON = {
    "SQL_ASCII": ["x\\x81", "\\xff"],
    "WIN1252": ["x\\x81", "\\x8d"],
    "LATIN1": [],  # every byte is a character
    "EUC_JP": ["x\\xa9\\xa1", "\\x8f\\xa1\\xa1"],
}
TEXTS = {
    "SQL_ASCII": ["é", "日本"],
    "WIN1252": ["€uro", "“x”"],
    "LATIN1": ["é", "ÿ"],
    "EUC_JP": ["日本", "\uff5e①㈱"],
}


@pytest.mark.parametrize("logs", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "encoding", ["EUC_JP", *[pytest.param(name, marks=pytest.mark.slow) for name in POISON if name != "EUC_JP"]]
)
def test_a_notify_of_bytes_that_are_no_text_ends_no_listener(
    log_server: postgres.Server, make_app: MakeApp, caplog: pytest.LogCaptureFixture, encoding: str, logs: bool
) -> None:
    """From a role that may only connect. What it sends is dropped, and all around it arrives, on any channel."""
    with fresh_database(log_server, f"ENCODING '{encoding}' LOCALE 'C'") as url:
        execute(url, "CREATE ROLE passer_by LOGIN")
        try:
            if logs:
                execute(url, schema_sql())
            app = make_app(url)
            channels = ["orders", *TEXTS[encoding][:1], TEXTS[encoding][1] * 12]
            with opened(app.test_client(), "/sse?" + urlencode({"channel": channels}, doseq=True)) as live:
                assert next(live).event == "sse-open"
                before = execute(url, LISTENERS)
                passer_by = url.replace("postgres@", "passer_by@")
                for number, channel in enumerate(channels * 2):
                    for poison in POISON[encoding]:
                        execute(passer_by, f"SELECT pg_notify('orders', E'{poison}'), pg_notify('orders', 'raw')")
                        assert next(live).data == "raw"
                    for text in (*TEXTS[encoding], "x"):
                        said = f"{text} {number}"
                        with app.app_context():
                            assert (notify(channel, said) is not None) is logs
                            notify(channel, said, durable=False)
                        execute(f"{passer_by}?client_encoding=utf8", "SELECT pg_notify('orders', %s)", (said,))
                        assert [next(live).data for _ in range(3)] == [said] * 3
                    if logs:  # from the log: what is too large for NOTIFY
                        execute(f"{url}?client_encoding=utf8", PUBLISH, (channel, ["{}"], [text * 9000]))
                        assert next(live).data == text * 9000
                assert execute(url, LISTENERS) == before, "it reconnected"
            dropped = [text for text in caplog.messages if text.startswith("Dropped")]
            assert (
                dropped
                == ["Dropped a NOTIFY payload (1 so far): It is not text in the database's encoding."][
                    : len(POISON[encoding])
                ]
            )
            app.extensions["pg_sse"].close()
        finally:
            execute(url, "DROP ROLE passer_by")


def test_psycopg2s_table_of_encodings_is_as_it_was(log_server: postgres.Server, make_app: MakeApp) -> None:
    """The listener changes it for the moments in which it connects, and no other connection sees that."""
    before = dict(psycopg2.extensions.encodings)
    with fresh_database(log_server, "ENCODING 'SQL_ASCII' LOCALE 'C'") as url:
        app = make_app(url)
        with opened(app.test_client(), "/sse?channel=orders") as live:
            next(live)
            assert psycopg2.extensions.encodings == before
            with connected(url) as theirs, theirs.cursor() as cursor:
                cursor.execute(r"SELECT E'\xe9'")
                with pytest.raises(UnicodeDecodeError):
                    cursor.fetchone()
        app.extensions["pg_sse"].close()


@pytest.mark.parametrize("logs", [True, False])
def test_raw_notifications_do_not_reach_a_channel_with_a_long_name(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture, logs: bool
) -> None:
    """PostgreSQL's name for it is a hash, which everybody can compute."""
    if logs:
        execute(database_url, schema_sql())
    channel = "room-" + "x" * 80
    app = make_app(database_url)
    with opened(app.test_client(), f"/sse?channel={channel}") as live, app.app_context():
        assert next(live).event == "sse-open"
        for payload in ("raw", '{"data": "raw"}', ""):
            execute(database_url, "SELECT pg_notify(%s, %s)", (codec.pg_name(channel), payload))
        notify(channel, "1")
        notify(channel, "2", durable=False)
        assert [next(live).data, next(live).data] == ["1", "2"]
    assert "longer than 63 bytes" in caplog.text
