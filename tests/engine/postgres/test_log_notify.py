"""Events come out of the event log and of NOTIFY as they went in: texts, sizes, names, encodings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import psycopg2
import pytest
from flask import Flask

from flask_pg_sse import notify_many
from flask_pg_sse.engine.postgres import pool
from flask_pg_sse.engine.postgres.codec import pg_name
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.event import _RESERVED
from tests.support.log import ENQUEUE, NOTIFY, PUBLISH, Heard, connected, listening, logged, run
from tests.support.postgres import execute, fresh_database
from tools import postgres

MakeApp = Callable[..., Flask]


def before_data(heard: Heard) -> int:
    """The bytes of the payload before the data."""
    return len(f'\x1e1{{"i":{heard.id},"s":"0123456789abcdef"}}\n'.encode())


def test_what_does_not_fit_a_notification_is_left_in_the_log(log_url: str) -> None:
    """PostgreSQL takes 7,999 bytes. Whether an event fits is decided before it has its id, of at most 19 digits."""
    with listening(log_url, "orders") as ear, connected(log_url, transactions=False) as connection:
        run(connection, NOTIFY, ("orders", "measure"))
        first = ear.wait(1)[0]
        before = before_data(first)
        most = 7998 - (19 - len(str(first.id)))
        for unit, payload in itertools.product(["x", "é", "€", "𝄞"], range(most - 3, most + 4)):
            count, rest = divmod(payload - before, len(unit.encode()))
            data = unit * count + "x" * rest
            run(connection, NOTIFY, ("orders", data))
            heard = ear.wait(len(ear.heard) + 1)[-1]
            if payload <= most:
                assert heard.data == data and heard.fields.keys() == {"s"}
            else:
                assert heard.data is None and heard.fields.keys() == {"s", "f"} and heard.fields["f"] is True
            assert logged(log_url)[-1] == (heard.id, "orders", {}, data)


@pytest.mark.slow
def test_a_hundred_thousand_events_in_one_call(logged_url: str, make_app: MakeApp) -> None:
    """They take longer than one event may, on the package's own connection or at the commit of another."""
    texts = [str(number) for number in range(100_000)]
    app = make_app(logged_url)
    with app.app_context(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "TIMEOUT", 1.0)
        notify_many("orders", texts)
        with connected(logged_url) as connection:
            notify_many("orders", texts, connection=connection)
            connection.commit()
    assert [row[3] for row in logged(logged_url)] == texts * 2


def test_five_megabytes(log_url: str) -> None:
    data = "Zürich 中文 𝄞\n" * 250_001
    assert len(data.encode()) > 5_000_000
    with listening(log_url, "orders") as ear, connected(log_url, transactions=False) as connection:
        run(connection, NOTIFY, ("orders", data))
        run(connection, PUBLISH, ("orders", ["{}"], [data]))
        assert [heard.fields["f"] for heard in ear.wait(2)] == [True, True]
    assert [row[3] for row in logged(log_url)] == [data, data]


def test_fields_travel_with_the_data(log_url: str) -> None:
    with listening(log_url, "orders") as ear:
        query = "SELECT flask_pg_sse.notify('orders', %s, event => %s, id => %s, retry => %s, comment => %s)"
        execute(log_url, query, ("one\ntwo\r\n", 'cre"ated', "a,\\b", 700, "two\nlines"))
        execute(log_url, query, (None, "", None, None, None))
        execute(log_url, "SELECT flask_pg_sse.notify('orders')")
        first, second, third = ear.wait(3)
    fields = {"event": 'cre"ated', "id": "a,\\b", "retry": 700, "comment": "two\nlines"}
    assert (first.data, {**first.fields, "s": 0}) == ("one\ntwo\r\n", {**fields, "s": 0})
    assert (second.data, third.data) == ("", "")
    assert [row[2:] for row in logged(log_url)] == [(fields, "one\ntwo\r\n"), ({}, ""), ({}, "")]


@pytest.mark.parametrize("size", [3, 20_000])
def test_data_with_a_zero_byte_travels_in_the_fields(log_url: str, size: int) -> None:
    """PostgreSQL's text cannot hold U+0000, and its json can hold it as an escape."""
    data = "a\0" * size
    with listening(log_url, "orders") as ear, connected(log_url) as connection:
        run(connection, ENQUEUE, ("orders", [json.dumps({"event": "e", "data": data})], [None]))
        connection.commit()
        heard = ear.wait(1)[0]
    assert heard.data is None
    assert heard.fields.get("data", data) == data and ("f" in heard.fields) == (size > 3)
    [(text, kept)] = execute(log_url, "SELECT fields::text, data FROM flask_pg_sse.event")
    assert json.loads(text) == {"event": "e", "data": data} and kept is None


CHANNELS = [
    "x" * 63, "x" * 64, "x" * 255, "é" * 31, "é" * 32, "é" * 31 + "x", "é" * 127 + "x", "€" * 21, "€" * 22, "€" * 85,
    "𝄞" * 15, "𝄞" * 16, "𝄞" * 63, "a b", "Ä", "%s", "*", "a/b",
]  # fmt: skip


def test_channels_are_notified_under_the_name_that_python_listens_to(log_url: str) -> None:
    with (
        listening(log_url, *map(pg_name, CHANNELS)) as ear,
        connected(log_url, transactions=False) as connection,
    ):
        for channel in CHANNELS:
            ear.heard.clear()
            run(connection, NOTIFY, (channel, "1"))
            run(connection, ENQUEUE, (channel, ["{}"], ["2"]))
            run(connection, PUBLISH, (channel, ["{}"], ["3"]))
            assert [(heard.channel, heard.data) for heard in ear.wait(3)] == [(pg_name(channel), n) for n in "123"]
    assert {row[1] for row in logged(log_url)} == set(CHANNELS)


EVIL = [
    "'; DROP TABLE flask_pg_sse.event; --", '"; UNLISTEN *; --', "$function$", "$$", "%s %% %(x)s", "\\'; SELECT 1",
    "E'\\n'", "{}", '{"i": 1}', "NULL", "\\N", "a'||pg_sleep(9)||'", "<script>", "): $1", "\\x00", "\\u0000", "🐘'\"",
]  # fmt: skip


def test_texts_arrive_verbatim(log_url: str) -> None:
    query = "SELECT flask_pg_sse.notify(%s, %s, event => %s, id => %s, comment => %s)"
    with listening(log_url, *EVIL) as ear, connected(log_url, transactions=False) as connection:
        for text in EVIL:
            run(connection, query, (text,) * 5)
            heard = ear.wait(len(ear.heard) + 1)[-1]
            assert (heard.channel, heard.data) == (text, text)
            assert {**heard.fields, "s": 0} == {"event": text, "id": text, "comment": text, "s": 0}
    fields = [{"event": text, "id": text, "comment": text} for text in EVIL]
    assert [row[1:] for row in logged(log_url)] == list(zip(EVIL, fields, EVIL, strict=True))


def test_control_characters_of_the_wire_form_arrive_in_data(log_url: str) -> None:
    data = "".join(map(chr, range(1, 256))) + '\x1e1{"i":1}\nx'
    with listening(log_url, "orders") as ear:
        execute(log_url, NOTIFY, ("orders", data))
        assert ear.wait(1)[0].data == data


WRONG: list[dict[str, object]] = [
    {"channel": ""}, {"channel": None}, {"channel": "x" * 256}, {"channel": "é" * 128}, {"channel": "a\nb"},
    {"channel": "\x01"}, {"channel": "\x7f"}, {"channel": "é\x85"}, {"channel": "\x80"}, {"channel": "x\x9f"},
    {"channel": "flask_pg_sse"}, {"channel": "flask_pg_sse:x"},
    {"event": "sse-end"}, {"event": "a\nb"}, {"event": "a\rb"}, {"id": "a\n"}, {"id": "\r"},
    {"retry": -1}, {"retry": 0}, {"retry": 99}, {"retry": 3_600_001}, {"retry": 2**63 - 1},
]  # fmt: skip


def test_what_no_stream_could_carry_is_refused(log_url: str) -> None:
    query = "SELECT flask_pg_sse.notify(%(channel)s, 'x', event => %(event)s, id => %(id)s, retry => %(retry)s)"
    with connected(log_url, transactions=False) as connection:
        for wrong in WRONG:
            arguments = {"channel": "orders", "event": None, "id": None, "retry": None, **wrong}
            with pytest.raises(psycopg2.errors.InvalidParameterValue), connection.cursor() as cursor:
                cursor.execute(query, arguments)
    assert logged(log_url) == []


def test_sql_and_python_reserve_the_same_names(log_url: str) -> None:
    """Also after what clients may take away before them. No other character does that."""
    before = [chr(number) for number in range(1, 0x10000) if not 0xD800 <= number < 0xE000]
    reserved = [text for text in before if _RESERVED.match(f"{text}sse-x")]
    assert len(reserved) > 40
    refused = """
        CREATE FUNCTION pg_temp.refused(text) RETURNS boolean LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM flask_pg_sse.notify('orders', event => $1);
            RETURN false;
        EXCEPTION WHEN invalid_parameter_value THEN
            RETURN true;
        END $$;
        SELECT name FROM unnest(%s) AS name WHERE pg_temp.refused(name)
    """
    names = [f"{text}sse-x" for text in reserved] + ["\ufeff \t\xa0sse-end", " sse-"]
    assert [row[0] for row in execute(log_url, refused, (names,))] == names
    others = [f"{text}sse-x" for text in before[::50] if text not in reserved] + [
        "sse",
        "SSE-x",
        "x sse-open",
        "\ufeff",
    ]
    assert execute(log_url, refused, (others,)) == []


# What stands in the database as one byte may have three in UTF-8, and bytes that mean control characters in one
# encoding are letters in another.
ENCODED = {
    "LATIN1": ["é", "\xa0", "é" * 31, "é" * 32, "é" * 127],
    "LATIN9": ["€", "€" * 21, "€" * 22, "€" * 31, "€" * 85],
    "WIN1252": ["€uro", "“x”", "€" * 22, "™" * 31],
    "WIN1251": ["Ђ", "№" * 21, "№" * 22, "Привет"],
    "EUC_JP": ["日本", "日" * 21, "日" * 22],
    "SQL_ASCII": ["É", "à", "中文", "€" * 21, "€" * 22],
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_databases_in_other_encodings(log_server: postgres.Server, encoding: str) -> None:
    with fresh_database(log_server, f"ENCODING '{encoding}' LOCALE 'C'") as url:
        execute(url, schema_sql())
        url += "?client_encoding=utf8"
        for channel in ["orders", "x" * 64, *ENCODED[encoding]]:
            with listening(url, pg_name(channel)) as ear:
                execute(url, NOTIFY, (channel, f"data {channel}"))
                assert [(h.channel, h.data) for h in ear.wait(1)] == [(pg_name(channel), f"data {channel}")]
            assert logged(url)[-1][1:] == (channel, {}, f"data {channel}")
        for channel in ["a\nb", "\x01", "x\x7f"]:
            with pytest.raises(psycopg2.errors.InvalidParameterValue):
                execute(url, NOTIFY, (channel, "x"))
        execute(url, NOTIFY, ("orders", "x" * 10_000))
        assert logged(url)[-1][3] == "x" * 10_000
