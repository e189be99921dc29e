"""A process whose app registers conversions with the drivers, and then uses all of the package that runs a query.

    python -m tests.support.apps.registering URL what

It prints as JSON what the streams got, and fails if a registration is gone, or one has come, that the app did not make.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from decimal import Decimal
from typing import Any

import psycopg
import psycopg2
import psycopg2.extras
import sqlalchemy
from flask import Flask
from psycopg.adapt import Dumper, Loader
from psycopg.types.json import JsonbDumper
from psycopg2 import extensions
from sqlalchemy.orm import Session

from flask_pg_sse import disconnect, notify, notify_many, sse_bp, sse_cursor
from flask_pg_sse.testing import stream

OIDS = tuple(range(1, 5000))


class Text(str):
    """An app's own kind of text, such as Markup."""


class RefusingDumper(Dumper):
    def dump(self, obj: Any) -> bytes:
        raise AssertionError(f"dumped {obj!r}")


class RefusingLoader(Loader):
    def load(self, data: Any) -> Any:
        raise AssertionError(f"loaded {bytes(data)!r}")


def refuse(*values: Any, **named: Any) -> Any:
    raise AssertionError(f"converted {values!r}")


waited_for: list[Any] = []


def wait(connection: Any) -> None:
    waited_for.append(connection.info.dsn_parameters.get("application_name", ""))
    psycopg2.extras.wait_select(connection)


def register_what_apps_register() -> None:
    for kind in (list, dict, tuple):
        extensions.register_adapter(kind, psycopg2.extras.Json)
    extensions.register_type(extensions.new_type((1700, 700, 701), "DECIMAL", lambda v, c: v and Decimal(str(v))))
    extensions.register_type(extensions.new_type((20, 23), "ID", lambda v, c: v))
    extensions.register_type(extensions.new_type((16,), "YES_OR_NO", lambda v, c: {"t": "yes", "f": "no"}.get(str(v))))
    extensions.register_type(extensions.new_type((17,), "HEX", lambda v, c: v))
    psycopg2.extras.register_uuid()  # type: ignore[no-untyped-call]
    psycopg2.extras.register_default_json(globally=True, loads=refuse)
    psycopg.adapters.register_loader("int4", psycopg.types.string.TextLoader)
    psycopg.adapters.register_dumper(list, JsonbDumper)


def register_everything() -> None:
    for kind in (str, Text, int, float, bool, type(None), bytes, list, tuple, dict, object):
        extensions.register_adapter(kind, refuse)
    extensions.register_type(extensions.new_type(OIDS, "REFUSED", refuse))
    extensions.set_wait_callback(wait)
    # As instrumentation does, and wrappers that want rows as dictionaries.
    psycopg2.connect = functools.partial(psycopg2.connect, cursor_factory=psycopg2.extras.RealDictCursor)
    refuse_all(psycopg.adapters)


def refuse_all(adapters: Any) -> None:
    for kind in (str, Text, int, bool, list):
        adapters.register_dumper(kind, RefusingDumper)
    for oid in OIDS:
        adapters.register_loader(oid, RefusingLoader)


def registered(*connections: Any) -> list[Any]:
    """Return what is registered for the process and for some of the app's connections."""
    found: list[Any] = [extensions.get_wait_callback(), psycopg2.connect]
    found += [{**extensions.adapters}, {**extensions.string_types}, {**extensions.binary_types}]
    found += [{**extensions.encodings}]
    for place in (psycopg, *connections):
        if hasattr(place, "adapters"):
            found += [place.adapters.get_dumper(kind, psycopg.adapt.PyFormat.AUTO) for kind in (str, list, int)]
            found += [place.adapters.get_loader(oid, psycopg.pq.Format.TEXT) for oid in (*OIDS[:30], 2278)]
        elif isinstance(place, extensions.connection):
            found += [dict(place.string_types), dict(place.binary_types)]
        found.append(getattr(place, "cursor_factory", None))
    return found


Caller = tuple[str, Any, Any]


@contextmanager
def callers(url: str, *, refusing: bool) -> Iterator[list[Caller]]:
    """Open connections of all kinds, each with all that can be set on it, as name, connection and driver's connection.

    SQLAlchemy connects before anything is registered, because its own queries would fail.
    """
    plain = psycopg2.connect(url)
    with_rows = psycopg2.connect(url, cursor_factory=psycopg2.extras.RealDictCursor)
    three = psycopg.connect(url, row_factory=psycopg.rows.dict_row)
    raw = psycopg.connect(url, cursor_factory=psycopg.RawCursor)
    in_client = psycopg.connect(url, cursor_factory=psycopg.ClientCursor)
    found: list[Caller] = [
        ("psycopg2", plain, plain),
        ("psycopg2 with rows", with_rows, with_rows),
        ("psycopg", three, three),
        ("psycopg raw", raw, raw),
        ("psycopg client", in_client, in_client),
    ]
    engines = []
    for driver in ("psycopg2", "psycopg"):
        target = url.replace("postgresql://", f"postgresql+{driver}://")
        for options in ({}, {"stream_results": True}, {"yield_per": 10}):
            engine = sqlalchemy.create_engine(
                target, json_serializer=refuse, json_deserializer=refuse, execution_options=options
            )
            engines.append(engine)
            connection = engine.connect()
            found.append((f"{driver} {options}", connection, connection.connection.driver_connection))
            session = Session(engine)
            found.append((f"session {driver} {options}", session, session.connection().connection.driver_connection))
        pooled = engine.raw_connection()
        found.append((f"raw_connection {driver}", pooled, pooled.driver_connection))
    for _, _, inner in found:
        if refusing and isinstance(inner, psycopg.Connection):
            refuse_all(inner.adapters)
        elif refusing:
            extensions.register_type(extensions.new_type(OIDS, "REFUSED HERE", refuse), inner)
    yield found
    for _, connection, _ in found:
        connection.close()
    for engine in engines:
        engine.dispose()


def main(url: str, what: str) -> list[str]:
    app = Flask(__name__)
    app.config.update(SSE_DATABASE_URL=url, SSE_CHANNELS=["*"], SECRET_KEY="secret")
    app.register_blueprint(sse_bp)
    register: Callable[[], None] = {"usual": register_what_apps_register, "everything": register_everything}[what]
    with callers(url, refusing=what == "everything") as found, app.app_context():
        register()
        drivers = [inner for _, _, inner in found]
        before = registered(*drivers)
        data = use(app, found)
        assert registered(*drivers) == before
        if what == "usual":
            with closing(drivers[1].cursor()) as cursor:
                cursor.execute("SELECT %s::json #>> '{0}' AS first, 7::int8 AS id", (["x"],))
                assert cursor.fetchall() == [{"first": "x", "id": "7"}]
        for connection in drivers:
            connection.close()
        app.extensions["pg_sse"].close()
    assert not [name for name in waited_for if name.startswith("flask_pg_sse")], waited_for
    return data


def use(app: Flask, found: list[Caller]) -> list[str]:
    """Use the package, and return what came on the stream, and then what a stream that resumes gets."""
    client = app.test_client()
    events = stream(client, "/sse?channel=orders&channel=é'\"\\", timeout=20)
    assert (first := next(events)).event == "sse-open", first.data
    start = sse_cursor()
    sent = [notify(Text("orders"), Text("own"))]
    notify_many("é'\"\\", ["one", "two's \\"])
    notify("orders", {"n": 1.5}, event="e", durable=False)
    if start is not None:
        notify("orders", "x" * 9000)
    for name, connection, _ in found:
        notify(Text("orders"), Text(name), connection=connection)
        notify_many("orders", ["'", "\\"], connection=connection)
        notify("orders", "in passing", connection=connection, durable=False)
        connection.commit()
    data: list[str] = []
    expected = 4 + (start is not None) + 4 * len(found)
    while len(data) < expected:
        event = next(events)
        if event.event != "sse-cursor":
            data.append(event.data)
    if start is not None:
        again = stream(client, f"/sse?channel=orders&last_event_id={start}", timeout=20)
        assert next(again).event == "sse-open"
        following = next(again)
        assert following.data == "own" and sent == [int(following.id)]
        again.close()
    disconnect(channel="orders")
    assert json.loads((ended := next(events)).data) == {"reason": "revoked"}, ended
    for arguments in (["prune", "--max-age", "3600"], ["init"], ["prune"]) if start is not None else []:
        result = app.test_cli_runner().invoke(args=["sse", *arguments])
        assert result.exit_code == 0, result.output
    return data


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
