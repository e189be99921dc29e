"""No text of a channel or an event reaches SQL unquoted, whatever is in it and whichever way it comes.

Hostile texts as channels and as events, by every way in: each arrives as it was, on its own channel and no other, or is
refused in the package's own words; a table that they are out to drop is still there with its row.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import psycopg
import psycopg2
import pytest
import sqlalchemy
from flask import Flask
from psycopg2 import sql

from flask_pg_sse import InvalidChannel, InvalidEvent, PayloadTooLarge, notify, notify_many, schema_sql
from flask_pg_sse.engine.postgres.codec import from_payload, pg_name
from flask_pg_sse.engine.postgres.listener import PostgresListener
from flask_pg_sse.event import Event
from flask_pg_sse.testing import Received, stream
from tests.support.client import eventually
from tests.support.log import run
from tests.support.postgres import connect, execute, fresh_database
from tools import postgres

MakeApp = Callable[..., Flask]

DROP = "DROP TABLE canary"
HOSTILE = [
    f"'; {DROP}; --", f'"; {DROP}; --', f"\\'; {DROP}; --", f'\\"; {DROP}; --', f"'); {DROP}; --", f"x'; {DROP}",
    '"; NOTIFY x; --', '"; UNLISTEN *; --', "x', 'y'); NOTIFY x; --", f"$$; {DROP}; $$", f"$do$; {DROP}; $do$",
    "$function$", "$1", f"E'\\'; {DROP}; --'", "E'\\n'", "\\x27", "\\u0027", "U&'\\0027'", "\\.", "\\N", "\\", "\\\\",
    "'", "''", '"', '""', "'\"'\"", f"/* {DROP}", "*/", "--", "-- x", ";", ",", "{", "}", "{}", "{0}", "{x!r:>9}",
    "%", "%%", "%s", "%(x)s", "%d%n", ":arg0", ":arg1", "\\:arg0", "::text", "@x", "?", "NULL", "null", "None",
    "*", "orders; NOTIFY x", "x,y", "a' || pg_sleep(9) || '", f"\u2019; {DROP}; --", f"\u02bc; {DROP}; --",
    f"\uff07; {DROP}; --", f"\uff02; {DROP}; --", f"\u201d; {DROP}; --", "\u0635\u0301\u202e'", "\u3000x\u2028y",
    "\U0001f418'\"", "\u8a31\u529f", "Orders", "orders", "ORDERS", " orders", "orders ", "  ", "select", "User",
    "x" * 63, "x" * 64, "x" * 65, '"' * 63, '"' * 64, "'" * 63, "\u00e9" * 31 + "'", "\u00e9" * 32, "\u20ac" * 22,
    ("'; " + DROP + "; --") * 10, "\\" * 255, '"' * 255,
]  # fmt: skip
# What a channel may not be. The first two arrive where a stream of another name would have them cut.
ILLEGAL = [
    "", "x" * 256, '"' * 256, "\u20ac" * 86, f"orders\n{DROP}", "a\tb", "a\0b", "\0", "\x7f", "a\x85b",
    "flask_pg_sse", 'flask_pg_sse"; --', "flask_pg_sse:" + "0" * 40,
]  # fmt: skip
# Legal in data and comments alone.
LINES = [f"one\n\\.\n{DROP};\n\\q", f"'\n;{DROP};\n", "\n", "\\\n"]
# Channels on which nothing is ever sent.
DECOYS = ["x, y", "y", "s", "arg0", "canary", '";', "x" * 62, "UnHeard", "unheard", ""]


class Place(NamedTuple):
    url: str
    logged: bool


@pytest.fixture(scope="module", params=["log", "no log"])
def kept_place(
    request: pytest.FixtureRequest, log_server: postgres.Server, log_binaries: Path | None
) -> Iterator[Place]:
    """A database with the log and without it; on the older server with the strings of old: a backslash escapes."""
    with fresh_database(log_server) as url:
        if log_binaries is not None:
            name = url.rpartition("/")[2]
            execute(url, f"ALTER DATABASE {name} SET standard_conforming_strings = off")
            execute(url, f"ALTER DATABASE {name} SET escape_string_warning = off")
        execute(url, "CREATE TABLE canary (says text); INSERT INTO canary VALUES ('alive')")
        logged = request.param == "log"
        if logged:
            execute(url, schema_sql())
        yield Place(url, logged)


@pytest.fixture
def place(kept_place: Place) -> Iterator[Place]:
    """The database, with an empty log; its canary has to outlive each test."""
    if kept_place.logged:
        execute(kept_place.url, "TRUNCATE flask_pg_sse.event")
    yield kept_place
    assert_alive(kept_place.url)


def assert_alive(url: str) -> None:
    assert execute(url, "SELECT says FROM canary") == [("alive",)]
    found = execute(url, "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace")
    assert found == [("canary",)]


class Ear:
    """The notifications on the channels of all texts, and on some channels that no text means."""

    def __init__(self, url: str) -> None:
        self._connection = connect(url)
        self.heard: list[tuple[str, str]] = []
        names = {*map(pg_name, HOSTILE), *filter(None, DECOYS), "fence"}
        for name in names:
            run(self._connection, sql.SQL("LISTEN {}").format(sql.Identifier(name)).as_string(self._connection))
        assert {row[0] for row in run(self._connection, "SELECT pg_listening_channels()")} == names

    def stop(self) -> list[tuple[str, str]]:
        run(self._connection, "NOTIFY fence")

        def fenced() -> bool:
            self._connection.poll()
            self.heard += [(item.channel, item.payload) for item in self._connection.notifies]
            self._connection.notifies.clear()
            return ("fence", "") in self.heard

        eventually(fenced, 10)
        self._connection.close()
        return [item for item in self.heard if item[0] != "fence"]


class Ways:
    """All ways in. Each is a method of (channel, event), named in `ALL`."""

    def __init__(self, place: Place) -> None:
        self._psycopg2 = psycopg2.connect(place.url)
        self._psycopg = psycopg.connect(place.url)
        self._engines = [
            sqlalchemy.create_engine(place.url.replace("postgresql:", f"postgresql+{driver}:"))
            for driver in ("psycopg2", "psycopg")
        ]
        self._alchemy = [engine.connect() for engine in self._engines]
        self._plain = connect(place.url)
        self.all: dict[str, Callable[[str, Event], None]] = {
            "notify()": lambda channel, event: self._notify(channel, event),
            "durable=False": lambda channel, event: self._notify(channel, event, durable=False),
            "notify_many()": self._many,
            "psycopg2": lambda channel, event: self._in_transaction(channel, event, self._psycopg2),
            "psycopg": lambda channel, event: self._in_transaction(channel, event, self._psycopg),
            "SQLAlchemy, psycopg2": lambda channel, event: self._in_transaction(channel, event, self._alchemy[0]),
            "SQLAlchemy, psycopg": lambda channel, event: self._in_transaction(channel, event, self._alchemy[1]),
            "many in a transaction": lambda channel, event: self._many(channel, event, self._psycopg),
        }
        if place.logged:
            self.all["flask_pg_sse.notify"] = self._function
        self.raw: dict[str, Callable[[str, Event], None]] = {"NOTIFY": self._raw, "pg_notify()": self._pg_notify}

    def _notify(self, channel: str, event: Event, **options: Any) -> None:
        notify(channel, event.data, event=event.event, id=event.id, comment=event.comment, **options)

    def _in_transaction(self, channel: str, event: Event, connection: Any) -> None:
        self._notify(channel, event, connection=connection)
        connection.commit()

    def _many(self, channel: str, event: Event, connection: Any = None) -> None:
        fields = {"event": event.event, "comment": event.comment}
        notify_many(channel, [event.data], **fields, connection=connection)  # type: ignore[arg-type]
        if connection is not None:
            connection.commit()

    def _function(self, channel: str, event: Event) -> None:
        query = "SELECT flask_pg_sse.notify(%s, %s, event => %s, id => %s, comment => %s)"
        run(self._plain, query, (channel, event.data, event.event, event.id, event.comment))

    def _raw(self, channel: str, event: Event) -> None:
        query = sql.SQL("NOTIFY {}, {}").format(sql.Identifier(channel), sql.Literal(self._payload(event)))
        run(self._plain, query.as_string(self._plain))

    def _pg_notify(self, channel: str, event: Event) -> None:
        run(self._plain, "SELECT pg_notify(%s, %s)", (channel, self._payload(event)))

    @staticmethod
    def _payload(event: Event) -> str:
        fields = {name: getattr(event, name) for name in ("event", "id", "data", "comment")}
        given = {name: value for name, value in fields.items() if value is not None}
        return event.data if list(given) == ["data"] else json.dumps(given)

    def close(self) -> None:
        for connection in (self._psycopg2, self._psycopg, self._plain, *self._alchemy):
            connection.close()
        for engine in self._engines:
            engine.dispose()


@pytest.fixture
def app(place: Place, make_app: MakeApp) -> Iterator[Flask]:
    app = make_app(
        place.url, SSE_HEARTBEAT=1
    )  # its ticker, which forgets streams that are closed, comes four times as often
    with app.app_context():
        yield app


@pytest.fixture
def ways(place: Place) -> Iterator[Ways]:
    with closing(Ways(place)) as ways:
        yield ways


def url_of(channel: str, *, as_path: bool) -> str:
    """Return the URL of a stream on a channel. Routing takes a slash in front away, so such a name is for the query."""
    if as_path and not channel.startswith("/"):
        return f"/sse/{quote(channel, safe='')}"
    return f"/sse?{urlencode({'channel': channel})}"


def opened(app: Flask, url: str) -> Generator[Received, None, None]:
    """Open a stream, and return its events but the package's own."""
    events = stream(app.test_client(), url)
    assert next(events).event == "sse-open"
    return (event for event in events if not event.event.startswith("sse-"))


# --- as channels


@pytest.fixture
def listening_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The channels that the package's own connection listens to, from PostgreSQL, always current; or an error."""
    found: list[str] = []
    sessions: set[int] = set()
    change_listens = PostgresListener._change_listens

    def change_and_look(self: PostgresListener, connection: Any) -> bool:
        sessions.add(connection.info.backend_pid)
        busy = change_listens(self, connection)
        found[:] = [row[0] for row in self._execute(connection, "SELECT pg_catalog.pg_listening_channels()")]
        return busy

    monkeypatch.setattr(PostgresListener, "_change_listens", change_and_look)
    yield found
    assert len(sessions) == 1


def test_channels(place: Place, app: Flask, ways: Ways, listening_to: list[str]) -> None:
    """One stream for each, by both forms of the URL in turn: they get what was sent to them, and nothing else."""
    ear = Ear(place.url)
    streams = {}
    for number, channel in enumerate(HOSTILE):
        streams[channel] = opened(app, url_of(channel, as_path=number % 2 == 0))
    # The other form each, which must mean the same.
    for number, channel in enumerate(HOSTILE):
        again = opened(app, url_of(channel, as_path=number % 2 == 1))
        notify(channel, "the other form")
        assert next(again).data == "the other form"
        again.close()
    names = {pg_name(channel) for channel in HOSTILE}
    eventually(lambda: {*listening_to} == {*names, "flask_pg_sse"}, 5)

    sent: Counter[str] = Counter(map(pg_name, HOSTILE))
    for channel in HOSTILE:
        fitting = {**ways.all, **(ways.raw if len(channel.encode()) < 64 else {})}
        for way, send in fitting.items():
            send(channel, Event(f"by {way}: {channel}"))
        sent[pg_name(channel)] += len(fitting) + 1
        notify(channel, "the end")
        assert next(streams[channel]).data == "the other form"
        assert [next(streams[channel]).data for _ in range(len(fitting) + 1)] == [
            *(f"by {way}: {channel}" for way in fitting), "the end"
        ]  # fmt: skip
    # Nothing more has come on any stream: what was sent last is what comes next.
    for channel in HOSTILE:
        notify(channel, "truly the end")
        sent[pg_name(channel)] += 1
        assert next(streams[channel]).data == "truly the end"
    assert Counter(name for name, _ in ear.stop()) == sent
    if place.logged:
        rows = execute(place.url, "SELECT channel, count(*) FROM flask_pg_sse.event GROUP BY 1")
        assert dict(rows) == dict.fromkeys(HOSTILE, 3 + len(ways.all) - 1)  # the one that is not durable

    # And UNLISTEN, of all but one.
    app.extensions["pg_sse"].runtime._worker.engine._listener._listens._linger = 0
    kept = streams.pop('"; UNLISTEN *; --')
    for events in streams.values():
        events.close()
    eventually(lambda: {*listening_to} == {'"; UNLISTEN *; --', "flask_pg_sse"}, 5)
    notify('"; UNLISTEN *; --', "still there")
    assert next(kept).data == "still there"


def test_all_on_one_stream(place: Place, app: Flask) -> None:
    """They are listened to in one batch of statements, and read from the log by one query."""
    before = [notify(channel, f"before {number}") for number, channel in enumerate(HOSTILE)]
    query = urlencode([("channel", channel) for channel in HOSTILE])
    events = opened(app, f"/sse?{query}&last_event_id=" + ("0" if place.logged else ""))
    if place.logged:
        assert None not in before
        assert [next(events).data for _ in HOSTILE] == [f"before {number}" for number in range(len(HOSTILE))]
    for number, channel in enumerate(HOSTILE):
        notify(channel, str(number))
    assert [next(events).data for _ in HOSTILE] == [str(number) for number in range(len(HOSTILE))]
    events.close()
    # Again within the moment that a channel is remembered, and then from the log alone.
    if place.logged:
        for _ in range(2):
            events = opened(app, f"/sse?{query}&last_event_id={before[-1]}")
            assert [next(events).data for _ in HOSTILE] == [str(number) for number in range(len(HOSTILE))]
            events.close()
            app.extensions["pg_sse"].close()


def test_names_that_are_none_are_refused_everywhere(place: Place, app: Flask, ways: Ways) -> None:
    ear = Ear(place.url)
    client = app.test_client()
    for channel in ILLEGAL:
        for way, send in ways.all.items():
            error: type[Exception] = InvalidChannel
            if way == "flask_pg_sse.notify":
                error = ValueError if "\0" in channel else psycopg2.errors.InvalidParameterValue
            with pytest.raises(error):
                send(channel, Event("x"))
        answer = client.get(url_of(channel, as_path=False))
        assert (answer.status_code, answer.mimetype) == (400, "text/plain"), channel
        # The router has no path with a line end in it.
        assert client.get(url_of(channel, as_path=True)).status_code == (404 if "\n" in channel else 400), channel
    with pytest.raises(InvalidChannel):
        notify("\ud800'", "x")
    assert ear.stop() == []
    # PostgreSQL folds what is not quoted, and nothing else.
    lower, mixed = (opened(app, f"/sse?channel={name}") for name in ("orders", "Orders"))
    execute(place.url, "NOTIFY Orders, 'folded'")
    execute(place.url, "NOTIFY \"Orders\", 'quoted'")
    assert (next(lower).data, next(mixed).data) == ("folded", "quoted")


def test_positions_of_clients(place: Place, app: Flask) -> None:
    """The other text of a URL that has to do with the database."""
    for text in [*HOSTILE, *LINES, "1; " + DROP, "9" * 30, "-1", "1e3", "\u0661"]:
        events = stream(app.test_client(), f"/sse?{urlencode({'channel': 'orders', 'last_event_id': text})}")
        assert next(events).event == "sse-open"
        reason = "unknown-id" if place.logged else "no-log"
        assert next(events).json == {"reason": reason}, text
        events.close()


# --- as events


@pytest.mark.slow
def test_texts(place: Place, app: Flask, ways: Ways) -> None:
    """As data, name, id and comment of one event, by every way in: on the wire, on a stream and in the log."""
    ear = Ear(place.url)
    events = opened(app, "/sse?channel=orders")
    sent: list[Event] = []
    logged: list[Event] = []
    for text in [*HOSTILE, *LINES, "NUL \0', \0"]:
        one_line = not {"\n", "\0"} & {*text}
        for way, send in {**ways.all, **ways.raw}.items():
            if "\0" in text and way in ("flask_pg_sse.notify", "NOTIFY", "pg_notify()"):
                continue  # no text of PostgreSQL's
            event = Event(
                text,
                text if one_line else None,
                text if one_line and "many" not in way else None,
                comment=None if "\0" in text else text,
            )
            send("orders", event)
            sent.append(event)
            if way not in ("durable=False", *ways.raw):
                logged.append(event)
            received = next(events)
            assert (received.event, received.data) == (event.event or "message", text), way
            if event.id is not None:
                assert received.id == text, way
    heard = ear.stop()
    assert [name for name, _ in heard] == ["orders"] * len(sent)
    assert [from_payload(payload).event for _, payload in heard] == sent
    if place.logged:
        rows = execute(place.url, "SELECT channel, fields, data FROM flask_pg_sse.event ORDER BY id")
        assert {row[0] for row in rows} == {"orders"} and len(rows) == len(logged)
        for (_, fields, data), event in zip(rows, logged, strict=True):
            found = {"event": None, "id": None, "comment": None, "data": data, **fields}
            assert found == {"event": event.event, "id": event.id, "comment": event.comment, "data": event.data}


@pytest.mark.slow
def test_long_texts(place: Place, app: Flask, ways: Ways) -> None:
    """Longer than a NOTIFY may be: whole through the log, or refused."""
    events = opened(app, "/sse?channel=orders")
    for unit in ("'\"", "\\", "\\'", "%s$$", "\U0001f418'"):
        text = unit * (20_000 // len(unit))
        for way, send in ways.all.items():
            if place.logged and way != "durable=False":
                send("orders", Event(text))
                assert next(events).data == text, way
            else:
                with pytest.raises(PayloadTooLarge):
                    send("orders", Event(text))


def test_texts_that_no_stream_carries_are_refused(place: Place, app: Flask) -> None:
    ear = Ear(place.url)
    for wrong in (f"a\n{DROP}", "a\rb", "a\0b", "\ud800'"):
        for field in ("event", "id"):
            with pytest.raises(InvalidEvent):
                notify("orders", "x", **{field: wrong})  # type: ignore[arg-type]
    with pytest.raises(InvalidEvent):
        notify("orders", "\ud800'")
    assert ear.stop() == []


# In some, the second byte of a character is that of a backslash, which has broken many a quoting.
ENCODINGS = {
    "SJIS": ["\u8868'; " + DROP + "; --", "\u8868\\", "\u80fd'"],
    "BIG5": ["\u8a31'; " + DROP + "; --", "\u529f\\", "\u529f'"],
    "GBK": ["\u8a97'; " + DROP + "; --", "\u8a97\\", "\u7e97'"],
    "LATIN1": ["\u00bf'; " + DROP + "; --", "\u00a7\\", "\u00e8'"],
}


def test_a_callers_connection_in_another_encoding(log_url: str, make_app: MakeApp) -> None:
    execute(log_url, "CREATE TABLE canary (says text); INSERT INTO canary VALUES ('alive')")
    assert all(b"\\" in ENCODINGS[name][0].encode(name.lower()) for name in ("SJIS", "BIG5"))
    sent = []
    with make_app(log_url).app_context():
        for encoding, strings in itertools.product(ENCODINGS, ("on", "off")):
            with closing(psycopg2.connect(log_url)) as connection:
                connection.set_client_encoding(encoding)
                run(connection, f"SET standard_conforming_strings = {strings}")
                for text in ENCODINGS[encoding]:
                    notify(text, text, event=text, connection=connection)
                    notify(text, text, event=text, connection=connection, durable=False)
                    sent.append((text, text, text))
                connection.commit()
    assert execute(log_url, "SELECT channel, fields->>'event', data FROM flask_pg_sse.event ORDER BY id") == sent
    assert_alive(log_url)


# --- as roles, and as arguments of the commands


ROLES = [text for text in HOSTILE if len(text.encode()) < 64 and text.strip()]


@pytest.fixture
def roles(log_server: postgres.Server) -> Iterator[list[str]]:
    """Roles of all those names; what they were granted goes with the test's database."""
    quoted = ['"' + role.replace('"', '""') + '"' for role in ROLES]
    execute(log_server.url(), ";".join(f"CREATE ROLE {role}" for role in quoted))
    yield ROLES
    execute(log_server.url(), f"DROP ROLE {', '.join(quoted)}")


def let_in(url: str) -> set[str]:
    """Return the roles that may use the log, beside its owner."""
    query = """
        SELECT rolname::text FROM pg_roles WHERE NOT rolsuper AND rolname !~ '^pg_'
        AND has_function_privilege(oid, 'flask_pg_sse.installed_v1()', 'EXECUTE')
        AND has_schema_privilege(oid, 'flask_pg_sse', 'USAGE')
    """
    return {row[0] for row in execute(url, query)}


def test_roles(log_server: postgres.Server, log_binaries: Path | None, roles: list[str], make_app: MakeApp) -> None:
    """By the command, by what it prints, and by schema_sql() through the drivers."""
    with fresh_database(log_server) as url:
        strings = "on" if log_binaries is None else "off"
        execute(url, f"ALTER DATABASE {url.rpartition('/')[2]} SET standard_conforming_strings = {strings}")
        execute(url, "CREATE TABLE canary (says text); INSERT INTO canary VALUES ('alive')")
        runner = make_app(url).test_cli_runner()
        quarter = len(roles) // 4
        parts = [roles[:quarter], roles[quarter : 2 * quarter], roles[2 * quarter : 3 * quarter], roles[3 * quarter :]]
        expected: set[str] = set()
        for number, part in enumerate(parts):
            options = [item for role in part for item in ("--grant-to", role)]
            if number == 0:
                result = runner.invoke(args=["sse", "init", *options])
                assert result.exit_code == 0, result.output
            elif number == 1:
                execute(url, runner.invoke(args=["sse", "init", "--sql", *options]).stdout)
            else:
                driver = "psycopg" if number == 2 else "psycopg2"
                engine = sqlalchemy.create_engine(url.replace("postgresql:", f"postgresql+{driver}:"))
                with engine.begin() as connection:
                    connection.execute(sqlalchemy.text(schema_sql(part)))
                engine.dispose()
            expected |= {*part}
            assert let_in(url) == expected
        # A name with one byte too many is no role's; PostgreSQL would cut it, and take it for another.
        for role in ("x" * 64, '"' * 64, "nobody'; " + DROP + "; --", "\u00e9" * 32, " ", "current_user"):
            result = runner.invoke(args=["sse", "init", "--grant-to", role])
            assert result.exit_code == 1 and "does not exist. Create the role first" in result.stderr, role
        assert let_in(url) == expected
        assert_alive(url)


def test_the_age_of_what_is_pruned(log_url: str, make_app: MakeApp) -> None:
    execute(log_url, "CREATE TABLE canary (says text); INSERT INTO canary VALUES ('alive')")
    runner = make_app(log_url).test_cli_runner()
    with make_app(log_url).app_context():
        notify("orders", "kept")
    for age in [*HOSTILE, "1; " + DROP, "1 day", "-1", "inf", "1e300"]:
        result = runner.invoke(args=["sse", "prune", f"--max-age={age}"])
        assert result.exit_code == 2 and "--max-age" in result.stderr, age
    result = runner.invoke(args=["sse", "prune", "--max-age=nan"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert execute(log_url, "SELECT data FROM flask_pg_sse.event") == [("kept",)]
    assert_alive(log_url)
