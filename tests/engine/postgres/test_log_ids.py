"""No id is ever given to two events, whatever is lost, restored, copied or failed over; and ids only rise.

An id is 4 * the microseconds since 2020 + the server's timeline modulo 4, or more if the last one was not lower.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from flask import Flask

from flask_pg_sse import notify, schema_sql
from flask_pg_sse.testing import stream
from tests.support.client import eventually
from tests.support.clock import needs_faketime, postgres_with_a_clock
from tests.support.cluster import Cluster, promote
from tests.support.log import ENQUEUE, LONG, NOTIFY, PUBLISH, InThread, connected, logged, run
from tests.support.postgres import Running, dump, execute, fresh_database, restore_rows
from tools import postgres

MakeApp = Callable[..., Flask]

MICROSECONDS = "SELECT (extract(epoch FROM clock_timestamp() - timestamptz '2020-01-01 00:00+00') * 1000000)::bigint"
TIMELINE = "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer % 4"
AN_HOUR = 4 * 3_600_000_000
# Above all that a clock shows before 2091, and below 2**53.
FAR = 9_000_000_000_000_000


def publish(url: str, count: int, data: str = "x") -> list[int]:
    with connected(url, transactions=False) as connection:
        return [run(connection, PUBLISH, ("orders", ["{}"], [data]))[0][0] for _ in range(count)]


def clock(url: str) -> int:
    return int(execute(url, MICROSECONDS)[0][0])


def timeline(url: str) -> int:
    return int(execute(url, TIMELINE)[0][0])


def copy(source: Path, target: Path) -> None:
    # With owners: the files may belong to another user than ours.
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


# --- what an id is


def test_an_id_is_the_clocks_time_and_the_timeline(log_url: str) -> None:
    ((start,),) = execute(log_url, "SELECT flask_pg_sse.head_v1()")
    before = clock(log_url)
    ids = publish(log_url, 3)
    for data in "ab":
        execute(log_url, NOTIFY, ("orders", data))
    with connected(log_url) as connection:
        run(connection, ENQUEUE, ("orders", ["{}"] * 3, ["x"] * 3))
        run(connection, NOTIFY, ("orders", "x"))
        connection.commit()
    assert [row[0] for row in logged(log_url)][:3] == ids
    ids = [row[0] for row in logged(log_url)]
    assert len(ids) == 9 and start < ids[0] and all(first < second for first, second in pairwise(ids))
    assert before <= ids[0] // 4 and ids[-1] // 4 <= clock(log_url)
    assert {number % 4 for number in ids} == {timeline(log_url)}
    assert ids[-1] < 2**53, "exact in JavaScript"


def test_where_the_clock_is_behind_ids_go_on_in_steps_of_four(log_url: str) -> None:
    """Steps of one would lose the timeline."""
    own = timeline(log_url)
    execute(log_url, "SELECT setval('flask_pg_sse.event_id', %s)", (FAR,))
    assert publish(log_url, 3) == [FAR + 4 + own, FAR + 8 + own, FAR + 12 + own]
    execute(log_url, PUBLISH, ("orders", ["{}"] * 100, ["x"] * 100))
    assert [row[0] for row in logged(log_url)] == [FAR + 4 * n + own for n in range(1, 104)]
    assert logged(log_url)[-1][0] < 2**53


def test_a_server_that_tells_no_timeline(log_server: postgres.Server) -> None:
    """As some that are only similar to PostgreSQL: `init` finds that out, also after a restore to such a server."""
    with fresh_database(log_server) as url:
        owner = f"owner_{url.rpartition('_')[2]}"
        theirs = url.replace("postgres@", f"{owner}@")
        execute(url, f"CREATE ROLE {owner} LOGIN; GRANT CREATE ON DATABASE {url.rpartition('/')[2]} TO {owner}")
        try:
            execute(theirs, schema_sql())
            execute(url, "REVOKE EXECUTE ON FUNCTION pg_walfile_name FROM PUBLIC")
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                publish(url, 1)
            execute(theirs, schema_sql())
            assert {number % 4 for number in publish(url, 9)} == {0}
            execute(url, "GRANT EXECUTE ON FUNCTION pg_walfile_name TO PUBLIC")
            execute(theirs, schema_sql())
            assert {number % 4 for number in publish(url, 9)} == {timeline(url)}
        finally:
            execute(url, f"DROP OWNED BY {owner} CASCADE; DROP ROLE {owner}")


# --- restarts, copies and restores


def test_ids_rise_over_restarts(crashing_log_server: postgres.Server) -> None:
    ids = publish(crashing_log_server.url(), 3)
    modes: tuple[postgres.StopMode, ...] = ("fast", "immediate")
    for mode in modes:
        crashing_log_server.restart(mode)
        ids += publish(crashing_log_server.url(), 3)
    assert ids == sorted(set(ids))


def test_a_server_that_was_restored_hands_no_id_out_again(crashing_log_server: postgres.Server) -> None:
    """Although the one that went on after the copy was restarted too, more than once."""
    server = crashing_log_server
    url = server.url()
    backup = server.data_dir.with_name("backup")
    seen = publish(url, 5)
    server.stop()
    copy(server.data_dir, backup)
    for _ in range(3):
        server.start()
        seen += publish(url, 50)
        server.stop("immediate")
    shutil.rmtree(server.data_dir)
    backup.rename(server.data_dir)
    server.start()
    assert len(logged(url)) == 5
    assert publish(url, 5)[0] > max(seen)


def test_a_database_that_was_restored_hands_no_id_out_again(log_url: str) -> None:
    """From a copy, on a server that went on: only the database is another."""
    name = log_url.rpartition("/")[2]
    other = log_url.replace(name, "postgres")
    seen = publish(log_url, 5)
    execute(other, f"CREATE DATABASE {name}_copy TEMPLATE {name}")
    seen += publish(log_url, 50)
    execute(other, f"DROP DATABASE {name}")
    execute(other, f"ALTER DATABASE {name}_copy RENAME TO {name}")
    assert len(logged(log_url)) == 5
    assert publish(log_url, 5)[0] > max(seen)


def test_a_schema_that_was_restored_hands_no_id_out_again(log_url: str) -> None:
    """As pg_restore --clean does: the tables are new ones, and the sequence has its old value."""
    seen = publish(log_url, 5)
    ((event_id,),) = execute(log_url, "SELECT last_value FROM flask_pg_sse.event_id")
    seen += publish(log_url, 50)
    execute(log_url, "CREATE TABLE flask_pg_sse.copy (LIKE flask_pg_sse.event INCLUDING ALL)")
    execute(log_url, "DROP TABLE flask_pg_sse.event; ALTER TABLE flask_pg_sse.copy RENAME TO event")
    execute(log_url, "SELECT setval('flask_pg_sse.event_id', %s)", (event_id,))
    assert publish(log_url, 5)[0] > max(seen)


@pytest.mark.parametrize("options", [[], ["--disable-triggers"]], ids=["", "triggers off"])
def test_rows_that_were_put_back_in_place(logged_url: str, make_app: MakeApp, options: list[str]) -> None:
    """TRUNCATE and pg_restore --data-only, beside streams that go on: each gets all that comes after it."""
    publish(logged_url, 10)
    archive = dump(logged_url, "-Fc")
    app = make_app(logged_url)
    with app.app_context():
        live = stream(app.test_client(), "/sse?channel=orders")
        assert next(live).event == "sse-open"
        seen = [notify("orders", f"lost {n}") for n in range(20)]
        assert [next(live).data for _ in range(20)] == [f"lost {n}" for n in range(20)]
        execute(logged_url, "TRUNCATE flask_pg_sse.event, flask_pg_sse.installation, flask_pg_sse.retention")
        assert not restore_rows(archive, logged_url, *options)
        assert len(logged(logged_url)) == 10
        new = [notify("orders", f"new {n}") for n in range(30)]
        assert not {*seen} & {*new} and min(map(int, map(str, new))) > max(map(int, map(str, seen)))
        assert [next(live).data for _ in range(30)] == [f"new {n}" for n in range(30)]


# --- clocks


@pytest.mark.slow
@needs_faketime
def test_no_clock_gives_an_id_out_twice(running_postgres: Running) -> None:
    """An hour behind or ahead, or stepping back and forth while many publish."""
    with postgres_with_a_clock(running_postgres) as (url, put_off):
        execute(url, schema_sql())
        own = timeline(url)
        ids: list[int] = []
        for step in ("+0", "-3600", "+3600", "+0", "-3600"):
            put_off(step)
            ids += publish(url, 20)
            assert ids == sorted(set(ids)), f"after {step} s"
        assert {number % 4 for number in ids} == {own}
        assert ids[-1] - ids[0] < AN_HOUR * 2
        stop = threading.Event()
        found: list[list[int]] = [[] for _ in range(4)]

        def work(ids: list[int]) -> None:
            while not stop.is_set():
                # A session that waits when the clock is put forward may take its own limit for over.
                with contextlib.suppress(psycopg2.errors.LockNotAvailable):
                    ids += publish(url, 1)

        threads = [InThread(work, one) for one in found]
        try:
            for step in ("+3600", "-10", "+10", "-3600", "+7200", "+0"):
                count = len(found[0])
                put_off(step)
                eventually(lambda count=count: len(found[0]) > count + 20, 60)  # type: ignore[misc]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert all(one == sorted(one) for one in found), "each publisher's ids rise"
        given = sorted(number for one in found for number in one)
        assert len(given) == len({*given}) and given[0] > ids[-1]
        assert [row[0] for row in logged(url)] == ids + given


# --- failovers


@pytest.mark.slow
def test_two_servers_of_a_split_brain_have_no_id_in_common(cluster: Cluster) -> None:
    """A standby is promoted and the old primary lives on; both publish as fast as they can."""
    url = cluster.primary.url()
    execute(url, schema_sql())
    before = publish(url, 20)
    # The clock seems to be behind: all ids follow the last one, which both have, and no clock tells them apart.
    execute(url, "SELECT setval('flask_pg_sse.event_id', %s)", (FAR,))
    standby = cluster.standby()
    promote(standby)
    stop = threading.Event()
    ids: dict[str, list[int]] = {}

    def work(url: str) -> None:
        while not stop.is_set():
            ids[url] = ids.get(url, []) + publish(url, 100)

    both = [url, standby.url()]
    threads = [InThread(work, one) for one in both]
    try:
        time.sleep(3 * LONG)  # how long it lasts, not a wait for something
        eventually(lambda: all(len(ids.get(one, ())) > 1000 for one in both), 60)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    first, second = (ids[one] for one in both)
    overlap = min(first[-1], second[-1]) - max(first[0], second[0])
    assert overlap > 2000, "each gave out ids of the same range"
    assert not {*first} & {*second} and not {*before} & {*first, *second}
    assert timeline(both[0]) != timeline(both[1])


# --- logical replication


class Replication:
    """From one database's log to another's, which has a log of its own."""

    def __init__(self, cluster: Cluster, ends: ExitStack) -> None:
        self.source = ends.enter_context(fresh_database(cluster.primary, logged=True))
        self.target = ends.enter_context(fresh_database(cluster.primary, logged=True))
        execute(self.source, "CREATE PUBLICATION log FOR TABLE flask_pg_sse.event")
        # A subscription within one server cannot make its slot.
        self.slot = f"slot_{self.target.rpartition('_')[2]}"

    @contextmanager
    def running(self) -> Iterator[None]:
        execute(self.source, "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (self.slot,))
        execute(
            self.target,
            f"CREATE SUBSCRIPTION log CONNECTION '{self.source}' PUBLICATION log "
            f"WITH (create_slot = false, slot_name = '{self.slot}')",
        )
        try:
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        execute(self.target, "ALTER SUBSCRIPTION log DISABLE")
        execute(self.target, "ALTER SUBSCRIPTION log SET (slot_name = NONE)")
        execute(self.target, "DROP SUBSCRIPTION log")
        drop = (
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s AND NOT active"
        )
        eventually(lambda: execute(self.source, drop, (self.slot,)))

    def brought(self, ids: list[int]) -> None:
        there = "SELECT count(*) FROM flask_pg_sse.event WHERE id = ANY (%s)"
        eventually(lambda: execute(self.target, there, (ids,)) == [(len(ids),)], 30, "the rows are there")


@pytest.fixture
def replication(cluster: Cluster) -> Any:
    with ExitStack() as ends:
        yield Replication(cluster, ends)


def test_after_a_cutover_ids_are_above_the_rows_that_replication_brought(
    replication: Replication, make_app: MakeApp
) -> None:
    """Although the source's clock was an hour ahead, and the target had published before."""
    source, target = replication.source, replication.target
    publish(target, 1)
    execute(source, "SELECT setval('flask_pg_sse.event_id', 4 * %s::bigint)", (clock(source) + AN_HOUR // 4,))
    first = publish(source, 5)  # of these the initial copy is made, the others follow
    with replication.running():
        replication.brought(first)
        rows = first + publish(source, 20)
        replication.brought(rows)
    app = make_app(target)
    with app.app_context():
        resumed = stream(app.test_client(), f"/sse?channel=orders&last_event_id={rows[-1]}")
        assert next(resumed).event == "sse-open"
        new = [notify("orders", f"after {n}") for n in range(20)]
        assert [next(resumed).data for _ in range(20)] == [f"after {n}" for n in range(20)]
    assert int(str(new[0])) > rows[-1]
    # A row that is written without replication moves nothing.
    execute(target, "INSERT INTO flask_pg_sse.event VALUES (%s, 'orders', '{}', 'x', now())", (FAR,))
    assert publish(target, 1)[0] < FAR


@pytest.mark.slow
def test_a_publisher_never_puts_the_sequence_back_below_such_a_row(replication: Replication) -> None:
    """Both at full speed, at SERIALIZABLE too: no publisher fails, and each id is above all rows that were there."""
    source, target = replication.source, replication.target
    execute(source, "SELECT setval('flask_pg_sse.event_id', 4 * %s::bigint)", (clock(source) + AN_HOUR // 4,))
    stop = threading.Event()
    given: list[list[tuple[int, int]]] = [[] for _ in range(3)]

    def work(given: list[tuple[int, int]], level: str) -> None:
        with connected(target, transactions=False) as connection:
            run(connection, f"SET default_transaction_isolation = '{level}'")
            while not stop.is_set():
                ((top,),) = run(connection, "SELECT coalesce(max(id), 0) FROM flask_pg_sse.event")
                ((number,),) = run(connection, PUBLISH, ("orders", ["{}"], ["x"]))
                given.append((top, number))

    rows = publish(source, 20)
    levels = ("read committed", "repeatable read", "serializable")
    with replication.running():
        threads = [InThread(work, one, level) for one, level in zip(given, levels, strict=True)]
        try:
            replication.brought(rows)  # by the initial copy; the others come one by one
            for _ in range(20 * LONG):
                # The source goes ahead by more than the target publishes meanwhile, and its events come in one
                # transaction: both have the same timeline, so between two of them the target could draw the same id.
                execute(source, f"SELECT setval('flask_pg_sse.event_id', {rows[-1] + 4_000_000})")
                ((last,),) = execute(source, PUBLISH, ("orders", ["{}"] * 20, ["x"] * 20))
                rows += range(last - 4 * 19, last + 1, 4)
            replication.brought(rows)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert all(len(one) > 10 for one in given)
    assert not [(top, number) for one in given for top, number in one if number <= top]
    assert publish(target, 1)[0] > max(rows)
