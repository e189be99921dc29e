"""Table changes as events: what `trigger_sql()` makes PostgreSQL send, to whom, and what it never does to a writer."""

from __future__ import annotations

import json
import select
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
import sqlalchemy
from flask import Flask

from flask_pg_sse import drop_schema_sql, drop_trigger_sql, schema_sql, trigger_sql
from flask_pg_sse.engine.postgres.codec import from_payload, pg_name
from flask_pg_sse.testing import stream
from tests.support.postgres import connect, dump, execute, fresh_database, load
from tests.support.processes import cpu
from tools import postgres

MakeApp = Callable[..., Flask]
Event = tuple[str, Any]  # its name and its data
ORDERS = "CREATE TABLE orders (id integer PRIMARY KEY, status text, total numeric)"


class Writer:
    """A session that changes tables, and what listeners hear of it."""

    def __init__(self, url: str, *, logged: bool) -> None:
        self.url = url
        self._logged = logged
        self._heard: dict[str, int] = {}
        self._marks = 0
        self._connection = connect(url)
        self._listener = connect(url)
        self.listen("marks")

    def close(self) -> None:
        self._connection.close()
        self._listener.close()

    def __call__(self, *statements: str) -> list[str]:
        """Run statements, and return the warnings that they cause."""
        self._connection.notices.clear()
        with self._connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
        return [notice for notice in self._connection.notices if notice.startswith("WARNING")]

    def listen(self, channel: str) -> None:
        with self._listener.cursor() as cursor:
            cursor.execute(f'LISTEN "{pg_name(channel)}"')

    def heard(self, channel: str = "orders") -> list[Event]:
        """Return the events on a channel since the last call, in order."""
        if self._logged:
            query = (
                "SELECT id, fields ->> 'event', data FROM flask_pg_sse.event WHERE channel = %s AND id > %s ORDER BY id"
            )
            rows = execute(self.url, query, (channel, self._heard.get(channel, 0)))
            if rows:
                self._heard[channel] = rows[-1][0]
            return [(event, json.loads(data)) for _, event, data in rows]
        self._marks += 1
        with self._listener.cursor() as cursor:  # what was committed before has come when this comes back
            cursor.execute("SELECT pg_notify('marks', %s)", (str(self._marks),))
        while not any(one.payload == str(self._marks) for one in self._listener.notifies):
            assert select.select([self._listener], [], [], 10)[0]
            self._listener.poll()
        mine = [one for one in self._listener.notifies if one.channel == pg_name(channel)]
        self._listener.notifies = [one for one in self._listener.notifies if one.channel != pg_name(channel)]
        found = [from_payload(one.payload).event for one in mine]
        return [(event.event or "", json.loads(event.data)) for event in found if event is not None]


@pytest.fixture(params=["log", "no log"])
def writer(request: pytest.FixtureRequest, log_server: postgres.Server) -> Iterator[Writer]:
    with fresh_database(log_server, logged=request.param == "log") as url:
        writer = Writer(url, logged=request.param == "log")
        writer.listen("orders")
        yield writer
        writer.close()


@pytest.fixture
def logged(log_url: str) -> Iterator[Writer]:
    writer = Writer(log_url, logged=True)
    yield writer
    writer.close()


@pytest.fixture
def shop(logged: Writer) -> Iterator[Callable[[str], Writer]]:
    """Another program's role, which may use its own schema `shop` and nothing else."""
    execute(logged.url, "CREATE ROLE shop LOGIN; CREATE SCHEMA shop AUTHORIZATION shop")
    made = []

    def connected(options: str = "") -> Writer:
        made.append(Writer(logged.url.replace("postgres@", "shop@"), logged=True))
        return made[-1]

    yield connected
    for one in made:
        one.close()
    execute(logged.url, "DROP OWNED BY shop CASCADE; DROP ROLE shop")


def version(writer: Writer) -> int:
    return int(execute(writer.url, "SHOW server_version_num")[0][0]) // 10000


# --- what is sent


def test_each_change_is_an_event(writer: Writer) -> None:
    writer(ORDERS, trigger_sql("orders", columns=["status"]))
    writer("INSERT INTO orders VALUES (1, 'new', 3.50), (2, NULL, 1)")
    assert writer.heard() == [("insert", {"id": 1, "status": "new"}), ("insert", {"id": 2, "status": None})]
    writer("UPDATE orders SET status = 'paid', id = 7 WHERE id = 1")
    assert writer.heard() == [("update", {"id": 7, "status": "paid", "old": {"id": 1, "status": "new"}})]
    writer("DELETE FROM orders WHERE id = 2")
    assert writer.heard() == [("delete", {"id": 2, "old": {"id": 2, "status": None}})]
    writer("TRUNCATE orders")
    assert writer.heard() == [("truncate", {})]
    writer("INSERT INTO orders SELECT 1 WHERE false", "UPDATE orders SET total = 0", "DELETE FROM orders")
    assert writer.heard() == []


def test_the_events_belong_to_the_transaction(writer: Writer) -> None:
    writer(ORDERS, trigger_sql("orders"))
    writer("BEGIN", "INSERT INTO orders VALUES (1)", "ROLLBACK", "BEGIN", "INSERT INTO orders VALUES (2)")
    writer("SAVEPOINT s", "INSERT INTO orders VALUES (3)", "ROLLBACK TO s", "INSERT INTO orders VALUES (4)")
    assert writer.heard() == []
    writer("COMMIT")
    assert [data["id"] for _, data in writer.heard()] == [2, 4]


def test_equal_changes_of_one_transaction_are_two_events(writer: Writer) -> None:
    writer("CREATE TABLE orders (status text)", trigger_sql("orders"))
    writer("INSERT INTO orders VALUES ('x'), ('x')")
    assert writer.heard() == [("insert", {"status": "x"})] * 2
    writer("UPDATE orders SET status = 'y'")
    assert writer.heard() == [("update", {"status": "y", "old": {"status": "x"}})] * 2
    writer("DELETE FROM orders")
    assert writer.heard() == [("delete", {"old": {"status": "y"}})] * 2


def test_an_update_of_many_rows_pairs_each_row_with_its_old_values(writer: Writer) -> None:
    """Also where all keys change, so that old and new rows have the same keys in another order."""
    writer(ORDERS, trigger_sql("orders"), "ALTER TABLE orders DROP CONSTRAINT orders_pkey")
    writer(
        "ALTER TABLE orders ADD PRIMARY KEY (id) DEFERRABLE",
        "INSERT INTO orders SELECT g, g FROM generate_series(1, 2500) g",
    )
    writer.heard()
    writer("UPDATE orders SET id = 2501 - id")
    heard = writer.heard()
    assert len(heard) == 2500
    assert all(data["status"] == data["old"]["status"] and data["id"] + data["old"]["id"] == 2501 for _, data in heard)


@pytest.mark.parametrize(
    ("schema", "table", "column"),
    [
        ("public", "Orders", "Id"),
        ('a "quoted" schema', "it's a % :table {x} \\ $do$", 'a "b", c'),
        ("s" * 63, "t" * 63, "c" * 63),
        ("schéma", "täble", "ñ"),
        ("public", "select", "new"),
        ("public", "new_rows", "r"),
    ],
)
def test_any_identifier(writer: Writer, schema: str, table: str, column: str) -> None:
    def quoted(name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    name = f"{quoted(schema)}.{quoted(table)}"
    writer(
        f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}", f"CREATE TABLE {name} ({quoted(column)} integer PRIMARY KEY)"
    )
    when = f"NEW.{quoted(column)} % 2 = 1"
    writer(trigger_sql(table, schema=schema, channel="orders", columns=[column], when=when))
    writer(f"INSERT INTO {name} VALUES (4), (5)")
    assert writer.heard() == [("insert", {column: 5})]
    writer(drop_trigger_sql(table, schema=schema))
    writer(f"INSERT INTO {name} VALUES (7)")
    assert writer.heard() == []


def test_the_script_contains_nothing_that_drivers_take_for_a_parameter(writer: Writer) -> None:
    script = trigger_sql("orders", channel="a:b-{id}", when="NEW.status LIKE 'x%' AND NEW.status <> ':no'")
    for one in (script, drop_trigger_sql("orders", channel="a:b-{id}")):
        assert "%" not in one and one.isascii() and sqlalchemy.text(one)._bindparams == {}
        assert str(sqlalchemy.text(one)) == one  # as Alembic's offline mode writes it
    writer(ORDERS, f"PREPARE one AS SELECT 1; {script}", drop_trigger_sql("orders"), drop_trigger_sql("orders"))
    writer("DROP TABLE orders", drop_trigger_sql("orders"))
    assert execute(writer.url, "SELECT count(*) FROM pg_proc WHERE proname LIKE 'flask_pg_sse_watch%'") == [(0,)]


def test_again_replaces_and_another_channel_adds(writer: Writer) -> None:
    writer(ORDERS, trigger_sql("orders"), trigger_sql("orders", on=["insert"], columns=["id"]))
    writer.listen("other")
    writer(trigger_sql("orders", channel="other", on=["delete"]))
    writer("INSERT INTO orders VALUES (1, 'x')", "DELETE FROM orders")
    assert writer.heard() == [("insert", {"id": 1})]
    assert [event for event, _ in writer.heard("other")] == ["delete"]
    writer(drop_trigger_sql("orders", channel="other"), "INSERT INTO orders VALUES (1, 'x')", "DELETE FROM orders")
    assert (len(writer.heard()), writer.heard("other")) == (1, [])
    # A table that was renamed keeps its triggers, also when another one gets the name.
    writer("ALTER TABLE orders RENAME TO former", ORDERS, trigger_sql("orders", columns=["id"]))
    writer("INSERT INTO former VALUES (2)", "INSERT INTO orders VALUES (3)")
    assert [data["id"] for _, data in writer.heard()] == [2, 3]


# --- tables of all kinds


def test_partitions_also_those_that_come_later(writer: Writer) -> None:
    writer(
        "CREATE TABLE orders (id integer, day integer, PRIMARY KEY (id, day)) PARTITION BY LIST (day)",
        "CREATE TABLE monday PARTITION OF orders FOR VALUES IN (1)",
        trigger_sql("orders"),
        "CREATE TABLE tuesday (day integer, extra integer, id integer NOT NULL, PRIMARY KEY (id, day))",
        "ALTER TABLE tuesday DROP COLUMN extra",
        "ALTER TABLE orders ATTACH PARTITION tuesday FOR VALUES IN (2)",
    )
    writer("INSERT INTO orders VALUES (1, 1), (2, 2)", "INSERT INTO tuesday (id, day) VALUES (3, 2)")
    assert writer.heard() == [("insert", {"id": i, "day": d}) for i, d in ((1, 1), (2, 2), (3, 2))]
    writer("UPDATE orders SET day = 2 WHERE id = 1")  # as PostgreSQL does it: out of one partition, into another
    assert [event for event, _ in writer.heard()] == ["delete", "insert"]
    writer("UPDATE orders SET id = 9 WHERE id = 1", "DELETE FROM tuesday WHERE id = 3")
    assert writer.heard() == [
        ("update", {"id": 9, "day": 2, "old": {"id": 1, "day": 2}}),
        ("delete", {"id": 3, "day": 2, "old": {"id": 3, "day": 2}}),
    ]
    writer(drop_trigger_sql("orders"), "INSERT INTO tuesday (id, day) VALUES (4, 2)")
    assert writer.heard() == []


def test_generated_columns_composite_keys_and_types_of_all_kinds(writer: Writer) -> None:
    virtual = "VIRTUAL" if version(writer) >= 18 else "STORED"
    writer(
        "CREATE TYPE state AS ENUM ('new', 'paid')",
        "CREATE TYPE place AS (x integer, y integer)",
        "CREATE DOMAIN cents AS integer",
        "CREATE TABLE orders (a integer, b text, state state, place place, cents cents, ratio float8, doc jsonb, "
        "states state[], numbers integer[], twice integer GENERATED ALWAYS AS (a * 2) STORED, "
        f"thrice integer GENERATED ALWAYS AS (a * 3) {virtual}, PRIMARY KEY (b, a))",
        trigger_sql("orders", when="NEW.thrice > 3 OR OLD.thrice > 3"),
    )
    values = "'paid', (1, 2), 350, 'NaN', '{\"a\": [1]}', '{new,paid}', '{1,2}'"
    writer(f"INSERT INTO orders VALUES (1, 'x', {values}), (2, 'y', {values})")
    expected = {"a": 2, "b": "y", "state": "paid", "place": "(1,2)", "cents": 350, "ratio": "NaN", "doc": {"a": [1]}}
    expected |= {"states": "{new,paid}", "numbers": [1, 2], "twice": 4, "thrice": 6}
    assert writer.heard() == [("insert", expected)]
    writer("DELETE FROM orders")
    assert writer.heard() == [("delete", {"a": 2, "b": "y", "old": expected})]


def test_statements_of_all_kinds(writer: Writer) -> None:
    writer(ORDERS, "CREATE TABLE items (id integer PRIMARY KEY, order_id integer REFERENCES orders ON DELETE CASCADE)")
    writer(trigger_sql("orders", columns=["status"]), trigger_sql("items", channel="orders", on=["delete"]))
    writer("INSERT INTO orders VALUES (1, 'a'), (2, 'b')", "INSERT INTO items VALUES (5, 1), (6, 1)")
    writer.heard()
    writer("INSERT INTO orders VALUES (2, 'c'), (3, 'd') ON CONFLICT (id) DO UPDATE SET status = EXCLUDED.status")
    assert sorted(writer.heard(), key=str) == [
        ("insert", {"id": 3, "status": "d"}),
        ("update", {"id": 2, "status": "c", "old": {"id": 2, "status": "b"}}),
    ]
    writer("WITH gone AS (DELETE FROM orders WHERE id = 1 RETURNING id) UPDATE orders SET status = 'e' WHERE id = 3")
    heard = writer.heard()
    assert sorted(event for event, _ in heard) == ["delete", "delete", "delete", "update"]
    assert [data["old"]["id"] for event, data in heard if event == "delete" and "order_id" in data["old"]] == [5, 6]
    if version(writer) >= 15:
        writer(
            "MERGE INTO orders o USING (VALUES (2, 'f'), (3, NULL), (4, 'g')) AS v (id, status) ON o.id = v.id "
            "WHEN MATCHED AND v.status IS NULL THEN DELETE WHEN MATCHED THEN UPDATE SET status = v.status "
            "WHEN NOT MATCHED THEN INSERT VALUES (v.id, v.status)"
        )
        assert sorted((event, data["id"]) for event, data in writer.heard()) == [
            ("delete", 3),
            ("insert", 4),
            ("update", 2),
        ]


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("CREATE VIEW orders AS SELECT 1 AS id", "public.orders is not a table with rows of its own"),
        ('CREATE TABLE "Orders" (id integer)', "there is no table orders in the schema public"),
        ("CREATE TABLE orders (id integer, old integer)", 'a column is called "old"'),
    ],
)
def test_what_cannot_be_watched_is_refused_in_words(logged: Writer, statement: str, words: str) -> None:
    logged(statement)
    with pytest.raises(psycopg2.Error) as refused:
        logged(trigger_sql("orders"))
    assert refused.value.diag.message_primary == words or words in str(refused.value)
    assert refused.value.diag.message_hint or statement.startswith("CREATE VIEW")
    assert logged("SHOW search_path") == []


def test_the_log_itself_cannot_be_watched(logged: Writer) -> None:
    with pytest.raises(psycopg2.errors.WrongObjectType, match="a part of the event log itself"):
        logged(trigger_sql("event", schema="flask_pg_sse"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"on": ["select"]},
        {"on": []},
        {"columns": []},
        {"when": " "},
        {"channel": "a\n"},
        {"channel": "flask_pg_sse"},
        {"channel": "{id"},
        {"channel": "x" * 256},
    ],
)
def test_arguments_that_cannot_be_right(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        trigger_sql("orders", **wrong)


# --- conditions


def test_a_condition_sees_the_old_and_the_new_row(writer: Writer) -> None:
    writer(ORDERS, trigger_sql("orders", when="NEW.status <> OLD.status -- not the total"))
    writer("INSERT INTO orders VALUES (1, 'new', 0), (2, 'new', 0)")  # an insert has no old row: all is NULL
    writer("UPDATE orders SET total = 1", "UPDATE orders SET status = 'paid' WHERE id = 2")
    assert [(event, data["id"]) for event, data in writer.heard()] == [("update", 2)]
    writer(trigger_sql("orders", when="NEW IS DISTINCT FROM OLD"))
    writer("UPDATE orders SET status = 'paid'")
    assert [(event, data["id"]) for event, data in writer.heard()] == [("update", 1)]


@pytest.mark.parametrize(
    "when",
    ["NEW.statsu = 'x'", "NEW.status = ", "NEW.status", "true) OR (status = 'x'", "NEW IS DISTINCT FROM OLD"],
)
def test_a_wrong_condition_is_an_error_when_it_is_installed(logged: Writer, when: str) -> None:
    logged(ORDERS, "ALTER TABLE orders ADD document json")  # of which PostgreSQL cannot tell whether two are equal
    with pytest.raises(psycopg2.Error):
        logged(trigger_sql("orders", when=when))
    assert execute(logged.url, "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'flask_pg_sse%'") == [(0,)]


def test_a_condition_that_fails_for_a_row_does_not_fail_the_writer(writer: Writer) -> None:
    writer(ORDERS, trigger_sql("orders", when="1 / NEW.total > 0"))
    (warning,) = writer("INSERT INTO orders VALUES (1, 'x', 0)")
    assert "changes of public.orders: nothing was sent: division by zero" in warning
    assert execute(writer.url, "SELECT count(*) FROM orders") == [(1,)]
    assert writer("INSERT INTO orders VALUES (2, 'x', 1)") == []
    assert [data["id"] for _, data in writer.heard()] == [2]


# --- channels that depend on the row


def test_a_channel_by_a_columns_value(writer: Writer) -> None:
    for channel in ("orders-1", "orders-2", "{}-" + "é" * 60):
        writer.listen(channel)
    writer(
        "CREATE TABLE orders (id integer PRIMARY KEY, customer text)",
        trigger_sql("orders", channel="orders-{customer}"),
    )
    writer("INSERT INTO orders VALUES (7, '1'), (8, '2'), (9, NULL)")
    assert writer.heard("orders-1") == [("insert", {"id": 7, "customer": "1"})]
    assert writer.heard("orders-2") == [("insert", {"id": 8, "customer": "2"})]
    # What moves to another customer leaves the one's page and appears on the other's, which is not told whose it was.
    writer("UPDATE orders SET customer = '2' WHERE id = 7")
    assert writer.heard("orders-1") == [("delete", {"id": 7, "old": {"id": 7, "customer": "1"}})]
    assert writer.heard("orders-2") == [("insert", {"id": 7, "customer": "2"})]
    writer(drop_trigger_sql("orders"), trigger_sql("orders", channel="{{}}-{customer}", on=["insert"]))
    writer(f"INSERT INTO orders VALUES (10, '{'é' * 60}')")
    assert [data["id"] for _, data in writer.heard("{}-" + "é" * 60)] == [10]
    (warning,) = writer("TRUNCATE orders", trigger_sql("orders", channel="orders-{customer}"), "TRUNCATE orders")
    assert "TRUNCATE was not sent" in warning


@pytest.mark.parametrize("value", ["", "x" * 256, "a\nb", "flask_pg_sse", "\x85"])
def test_a_value_that_makes_no_legal_name_does_not_fail_the_writer(writer: Writer, value: str) -> None:
    writer.listen("fine")
    writer("CREATE TABLE orders (id integer PRIMARY KEY, name text)", trigger_sql("orders", channel="{name}"))
    with closing(connect(writer.url)) as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO orders VALUES (1, %s), (2, 'fine'), (3, %s)", (value, value))
        (warning,) = connection.notices
    assert "2 events were not sent" in warning and "is no name for a channel" in warning
    assert [data["id"] for _, data in writer.heard("fine")] == [2]


# --- rights


def test_another_programs_role_needs_no_right_on_the_log(logged: Writer, shop: Callable[..., Writer]) -> None:
    """A trigger without SECURITY DEFINER, as an older edition of the docs had it, stopped that program's writes."""
    program = shop()
    program("CREATE TABLE shop.orders (id integer PRIMARY KEY, status text)")
    execute(logged.url, trigger_sql("orders", schema="shop"))
    assert program("INSERT INTO shop.orders VALUES (1, 'new')", "UPDATE shop.orders SET status = 'paid'") == []
    assert [event for event, _ in logged.heard()] == ["insert", "update"]
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        program("SELECT flask_pg_sse.notify('orders', 'x')")


def test_no_other_role_can_use_the_function_on_a_table_of_its_own(logged: Writer, shop: Callable[..., Writer]) -> None:
    program = shop()
    program("CREATE TABLE shop.orders (id integer PRIMARY KEY)", "CREATE TABLE shop.mine (id integer)")
    execute(
        logged.url,
        "ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO shop; " + trigger_sql("orders", schema="shop"),
    )
    [(function,)] = execute(
        logged.url, "SELECT oid::regprocedure::text FROM pg_proc WHERE proname LIKE 'flask_pg_sse_watch%'"
    )
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        program(f"CREATE TRIGGER t AFTER INSERT ON shop.mine FOR EACH ROW EXECUTE FUNCTION {function}")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        program(f"ALTER FUNCTION {function} SECURITY INVOKER")
    query = "SELECT prosecdef, proconfig::text FROM pg_proc WHERE proname LIKE 'flask_pg_sse_watch%'"
    [(definer, settings)] = execute(logged.url, query)
    assert definer and "search_path=pg_catalog, pg_temp" in settings


def test_a_tables_owner_watches_it_once_the_log_is_granted(logged: Writer, shop: Callable[..., Writer]) -> None:
    program = shop()
    program("CREATE TABLE shop.orders (id integer PRIMARY KEY)")
    with pytest.raises(psycopg2.errors.ObjectNotInPrerequisiteState) as refused:
        program(trigger_sql("orders", schema="shop"))
    assert refused.value.diag.message_primary == "the role shop may not send events through the event log"
    assert "flask sse init --grant-to shop" in (refused.value.diag.message_hint or "")
    execute(logged.url, schema_sql(["shop"]))
    program(trigger_sql("orders", schema="shop"), "INSERT INTO shop.orders VALUES (1)")
    assert logged.heard() == [("insert", {"id": 1})]
    # Without the right, the events go on without the log, and that is said.
    execute(logged.url, "REVOKE ALL ON ALL FUNCTIONS IN SCHEMA flask_pg_sse FROM shop")
    (warning,) = program("INSERT INTO shop.orders VALUES (2)")
    assert "may not use it or does not trust its owner" in warning


ATTACK = """
    CREATE TABLE shop.seen (who text);
    CREATE TYPE shop.mood AS ENUM ('x');
    CREATE FUNCTION shop.trap(shop.mood) RETURNS {0} LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO shop.seen VALUES (current_user); RETURN {1}; END $$;
    CREATE CAST (shop.mood AS {0}) WITH FUNCTION shop.trap AS IMPLICIT;
"""


@pytest.mark.parametrize("kind", [("text", "'x'"), ("json", "'{}'"), ("integer", "1")])
@pytest.mark.parametrize("when", [None, "NEW.mood = 1 OR true"])
def test_a_tables_owner_cannot_run_code_with_the_functions_rights(
    logged: Writer, shop: Callable[..., Writer], kind: tuple[str, str], when: str | None
) -> None:
    """The column gets a type of that role's own, with a cast that is a function of that role's own."""
    program = shop()
    program("CREATE TABLE shop.orders (id integer PRIMARY KEY, mood integer)")
    execute(logged.url, trigger_sql("orders", schema="shop", when=when))
    program(ATTACK.format(*kind), "GRANT ALL ON SCHEMA shop TO PUBLIC", "GRANT ALL ON shop.seen TO PUBLIC")
    program("ALTER TABLE shop.orders ALTER mood TYPE shop.mood USING 'x'")
    warnings = program(
        "INSERT INTO shop.orders VALUES (1, 'x')", "UPDATE shop.orders SET id = 2", "DELETE FROM shop.orders"
    )
    assert execute(logged.url, "SELECT who FROM shop.seen") == []
    if when is None:
        assert logged.heard()[0] == ("insert", {"id": 1, "mood": "x"}) and warnings == []
    else:
        assert logged.heard() == [] and "might call functions of other roles" in warnings[0]
        # Nor is the condition tried by the command, which the trap would turn into an error of its own.
        program(
            f"CREATE OR REPLACE FUNCTION shop.trap(shop.mood) RETURNS {kind[0]} LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'trapped'; END $$"
        )
        with pytest.raises(psycopg2.errors.ObjectNotInPrerequisiteState, match="might call functions"):
            execute(logged.url, trigger_sql("orders", schema="shop", when=f"NEW.mood::{kind[0]} IS NULL"))


def test_no_condition_on_a_row_type_of_the_tables_owner(logged: Writer, shop: Callable[..., Writer]) -> None:
    """Its columns may get any type later."""
    program = shop()
    program(
        "CREATE TYPE shop.place AS (x integer)",
        "CREATE TABLE shop.orders (id integer PRIMARY KEY, places shop.place[])",
    )
    script = trigger_sql("orders", schema="shop", when="(NEW.places[1]).x > 0")
    with pytest.raises(psycopg2.errors.ObjectNotInPrerequisiteState, match=r"might call functions .*shop\.place"):
        execute(logged.url, script)
    execute(logged.url, schema_sql(["shop"]))
    program(script, "INSERT INTO shop.orders VALUES (1, ARRAY[ROW(0)::shop.place]), (2, ARRAY[ROW(1)::shop.place])")
    assert [data["id"] for _, data in logged.heard()] == [2]


def test_a_schema_of_a_stranger_is_not_used(log_server: postgres.Server) -> None:
    with fresh_database(log_server) as url, closing(Writer(url, logged=False)) as writer:
        execute(url, "CREATE ROLE stranger LOGIN")
        try:
            writer.listen("orders")
            writer(ORDERS, trigger_sql("orders"), "CREATE SCHEMA flask_pg_sse AUTHORIZATION stranger")
            writer(
                "CREATE FUNCTION flask_pg_sse.enqueue_v1(text, json[], text[]) RETURNS void "
                "LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$",
                "ALTER FUNCTION flask_pg_sse.enqueue_v1 OWNER TO stranger",
                "GRANT USAGE ON SCHEMA flask_pg_sse TO PUBLIC",
                "CREATE ROLE app LOGIN",
            )
            [(function,)] = execute(
                url, "SELECT oid::regprocedure::text FROM pg_proc WHERE proname LIKE 'flask_pg_sse_watch%'"
            )
            execute(url, f"ALTER FUNCTION {function} OWNER TO app")
            (warning,) = writer("INSERT INTO orders VALUES (1)")
            assert "does not trust its owner" in warning
            assert [data["id"] for _, data in writer.heard()] == [1]
        finally:
            execute(url, "DROP OWNED BY stranger CASCADE; DROP OWNED BY app CASCADE; DROP ROLE stranger; DROP ROLE app")


# --- what changes later


def test_a_column_that_is_gone_is_said_and_fails_no_writer(writer: Writer) -> None:
    writer(ORDERS, trigger_sql("orders"), "ALTER TABLE orders ADD secret text")
    assert writer("INSERT INTO orders VALUES (1, 'x', 2, 'hush')") == []
    assert writer.heard() == [("insert", {"id": 1, "status": "x", "total": 2})]  # no column of later
    writer("ALTER TABLE orders RENAME status TO state")
    (warning,) = writer("UPDATE orders SET total = 3")
    assert "there is no column status any more" in warning and "flask sse watch" in warning
    assert writer.heard() == [("update", {"id": 1, "total": 3, "old": {"id": 1, "total": 2}})]
    writer("ALTER TABLE orders DROP COLUMN total", "ALTER TABLE orders ALTER id TYPE bigint")
    (warning,) = writer("DELETE FROM orders")
    assert "there is no column status, total any more" in warning
    assert writer.heard() == [("delete", {"id": 1, "old": {"id": 1}})]
    writer(trigger_sql("orders"))
    assert writer("INSERT INTO orders (id, state) VALUES (2, 'y')") == []
    assert writer.heard() == [("insert", {"id": 2, "state": "y", "secret": None})]


def test_a_condition_whose_column_is_gone_is_said_and_fails_no_writer(writer: Writer) -> None:
    writer(
        ORDERS, trigger_sql("orders", columns=["id"], when="NEW.status = 'x'"), "ALTER TABLE orders DROP COLUMN status"
    )
    (warning,) = writer("INSERT INTO orders VALUES (1)")
    assert "nothing was sent: column new.status does not exist" in warning
    assert writer.heard() == []


def test_the_log_may_come_and_go(log_server: postgres.Server) -> None:
    with fresh_database(log_server) as url:
        for logged in (False, True, False):
            execute(url, schema_sql() if logged else drop_schema_sql())
            writer = Writer(url, logged=logged)
            writer.listen("orders")
            if not execute(url, "SELECT to_regclass('orders')::text")[0][0]:
                writer(ORDERS, trigger_sql("orders"))
            assert writer("DELETE FROM orders", "INSERT INTO orders VALUES (1)") == []
            assert ("insert", {"id": 1, "status": None, "total": None}) in writer.heard()
            writer.close()


def test_a_dump_and_its_restore(logged: Writer, log_server: postgres.Server) -> None:
    logged("CREATE DOMAIN cents AS integer", "CREATE TABLE orders (id cents PRIMARY KEY)", trigger_sql("orders"))
    with fresh_database(log_server) as copy:
        load(dump(logged.url), copy)
        writer = Writer(copy, logged=True)
        assert writer("INSERT INTO orders VALUES (1)") == []
        assert writer.heard() == [("insert", {"id": 1})]
        writer.close()


# --- large rows, and many


def test_a_row_that_notify_cannot_carry(writer: Writer) -> None:
    writer(ORDERS, trigger_sql("orders"))
    warnings = writer("INSERT INTO orders VALUES (1, repeat('é', 5000)), (2, 'x')")
    (first, second) = writer.heard()
    assert second == ("insert", {"id": 2, "status": "x", "total": None})
    if not warnings:
        assert first[1]["status"] == "é" * 5000
        return
    assert first == ("insert", {"id": 1})
    assert "1 events are larger than NOTIFY can send. 1 were sent with the key columns alone, and 0 not" in warnings[0]
    writer("UPDATE orders SET id = 3 WHERE id = 1", "DELETE FROM orders WHERE id = 3")
    assert writer.heard() == [("update", {"id": 3, "old": {"id": 1}}), ("delete", {"id": 3, "old": {"id": 3}})]
    writer("ALTER TABLE orders DROP CONSTRAINT orders_pkey", trigger_sql("orders"))
    (warning,) = writer("INSERT INTO orders VALUES (1, repeat('é', 5000))")
    assert "0 were sent with the key columns alone, and 1 not at all" in warning
    assert writer.heard() == []


def test_many_rows_are_a_few_calls(logged: Writer) -> None:
    logged(ORDERS, trigger_sql("orders"), "BEGIN", "INSERT INTO orders SELECT g FROM generate_series(1, 5000) g")
    with logged._connection.cursor() as cursor:
        cursor.execute("SELECT count(*), sum(cardinality(data)) FROM flask_pg_sse.pending")
        assert cursor.fetchone() == (6, 5000)
        cursor.execute("SELECT count(*) FROM pg_cursors WHERE statement NOT LIKE '%pg_cursors%'")
        assert cursor.fetchone() == (0,)  # each would make all later savepoints slower, and so each row of a partition
    logged("COMMIT")
    assert [data["id"] for _, data in logged.heard()] == list(range(1, 5001))


@pytest.mark.slow
def test_a_copy_of_100000_rows_costs_less_than_a_call_for_each(logged: Writer) -> None:
    by_row = """
        CREATE FUNCTION by_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM flask_pg_sse.notify('by row', row_to_json(NEW)::text, event => 'insert'); RETURN NULL;
        END $$;
        CREATE TABLE by_row (LIKE orders);
        CREATE TRIGGER by_row AFTER INSERT ON by_row FOR EACH ROW EXECUTE FUNCTION by_row()
    """
    logged(ORDERS, trigger_sql("orders"), by_row)

    pid = logged._connection.info.backend_pid
    ticks = {}
    for table in ("by_row", "orders"):
        before = cpu(pid)  # in which other processes have no part
        logged(f"INSERT INTO {table} SELECT g, 'new', 1 FROM generate_series(1, 100000) g")
        ticks[table] = cpu(pid) - before
    assert [data["id"] for _, data in logged.heard()] == list(range(1, 100001))
    assert ticks["orders"] < ticks["by_row"], ticks


# --- in the browser's stream


def test_a_stream_hears_what_another_program_writes(writer: Writer, make_app: MakeApp) -> None:
    writer(ORDERS, trigger_sql("orders", columns=["status"]))
    app = make_app(writer.url, SSE_CHANNELS=["orders"])
    with stream(app.test_client(), "/sse?channel=orders") as events:
        assert next(events).event == "sse-open"
        writer("INSERT INTO orders VALUES (1, 'new')", "UPDATE orders SET status = 'paid'")
        first, second = next(events), next(events)
    assert (first.event, json.loads(first.data)) == ("insert", {"id": 1, "status": "new"})
    assert (second.event, json.loads(second.data)["old"]) == ("update", {"id": 1, "status": "new"})


# --- the commands


def sse(app: Flask, *arguments: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["sse", *arguments])
    return result.exit_code, result.output


def test_the_commands(writer: Writer, make_app: MakeApp) -> None:
    app = make_app(writer.url)
    assert sse(app, "watch", "--list")[1].startswith("No table is watched (")
    writer("CREATE SCHEMA s", "CREATE TABLE s.orders (id integer PRIMARY KEY, status text, total numeric)")
    code, said = sse(app, "watch", "orders")
    assert code == 1 and said.startswith("Error: The table is not watched (")
    assert "there is no table orders in the schema public. Did you mean s.orders?" in said and said.count("\n") == 1
    options = ["--schema", "s", "--on", "insert,update", "--columns", "id,status", "--when", "NEW.total > 1"]
    code, said = sse(app, "watch", "orders", *options)
    assert (code, said.split(" (")[0]) == (0, "Changes of s.orders are sent to the channel 'orders'")
    writer("INSERT INTO s.orders VALUES (1, 'x', 1), (2, 'x', 2)", "DELETE FROM s.orders")
    assert writer.heard() == [("insert", {"id": 2, "status": "x"})]
    listed = "s.orders -> orders: insert, update; columns id, status; when NEW.total > 1"
    assert sse(app, "watch", "--list") == (0, f"{listed}\n")
    writer("ALTER TABLE s.orders DROP COLUMN status")
    assert sse(app, "watch", "--list") == (0, f"{listed} (the table has no status any more: run watch again)\n")
    writer("ALTER TABLE s.orders DISABLE TRIGGER USER")
    assert "(its triggers are switched off)" in sse(app, "watch", "--list")[1]
    assert sse(app, "unwatch", "orders", "--schema", "s", "--channel", "else")[0] == 1
    assert sse(app, "unwatch", "orders", "--schema", "s")[1].startswith("Changes of s.orders are not sent any more (")
    code, said = sse(app, "unwatch", "orders", "--schema", "s")
    assert code == 1 and said.startswith("Error: No changes of s.orders were sent (")


def test_a_table_that_is_watched_with_all_columns_is_listed_too(writer: Writer, make_app: MakeApp) -> None:
    app = make_app(writer.url)
    writer("CREATE TABLE orders (id integer PRIMARY KEY)", "CREATE TABLE stock (id integer PRIMARY KEY)")
    assert sse(app, "watch", "stock", "--columns", "id")[0] == sse(app, "watch", "orders")[0] == 0
    listed = [f"public.{name} -> {name}: insert, update, delete" for name in ("orders", "stock")]
    assert sse(app, "watch", "--list") == (0, f"{listed[0]}\n{listed[1]}; columns id\n")


def test_a_table_with_all_its_columns_is_listed(writer: Writer, make_app: MakeApp) -> None:
    app = make_app(writer.url)
    writer(ORDERS)
    assert sse(app, "watch", "orders", "--channel", "orders-{status}")[0] == 0
    listed = "public.orders -> orders-{status}: insert, update, delete"
    assert sse(app, "watch", "--list") == (0, f"{listed}\n")
    writer("ALTER TABLE orders DROP COLUMN total")
    writer("ALTER TABLE orders RENAME COLUMN status TO state")
    gone = "(the table has no status, total any more: run watch again)"
    assert sse(app, "watch", "--list") == (0, f"{listed} {gone}\n")


def test_a_table_whose_functions_comment_is_gone_is_listed(writer: Writer, make_app: MakeApp) -> None:
    """As after a dump with --no-comments."""
    app = make_app(writer.url)
    writer(ORDERS, trigger_sql("orders"))
    [(function,)] = execute(
        writer.url, "SELECT oid::regprocedure::text FROM pg_proc WHERE proname ~ '^flask_pg_sse_watch_'"
    )
    for comment in ("NULL", "'written by somebody'", "'{}'"):
        writer(f"COMMENT ON FUNCTION {function} IS {comment}")
        assert sse(app, "watch", "--list") == (
            0,
            "public.orders -> ? (the comment on its function is not as watch made it: run watch again)\n",
        )


def test_commands_that_are_given_nonsense(writer: Writer, make_app: MakeApp) -> None:
    app = make_app(writer.url)
    for arguments, words in (
        ([], "Name the table, or ask for --list."),
        (["orders", "--on", "select"], "on must be some of insert, update, delete, not select."),
        (["orders", "--channel", "a{"], "has a brace without its partner"),
    ):
        code, said = sse(app, "watch", *arguments)
        assert code == 2 and words in said
    assert sse(app, "watch", "orders", "--sql") == (0, trigger_sql("orders"))
    assert sse(app, "unwatch", "orders", "--sql") == (0, drop_trigger_sql("orders"))
    assert sse(app, "watch", "orders", "--columns", '"a,b",c', "--sql") == (
        0,
        trigger_sql("orders", columns=["a,b", "c"]),
    )
