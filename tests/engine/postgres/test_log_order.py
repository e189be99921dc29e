"""The event log's first guarantee: ids are in the order of commits over all channels, and so is what listeners hear."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import threading
from bisect import bisect_right
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest

from flask_pg_sse.engine.postgres import history as log
from flask_pg_sse.engine.postgres import listener, publish
from flask_pg_sse.engine.postgres import retention as prune
from flask_pg_sse.engine.postgres.connect import connect as own_connection
from flask_pg_sse.engine.postgres.connect import execute as own_execute
from flask_pg_sse.engine.postgres.dsn import to_dsn
from tests.support.client import eventually
from tests.support.log import (
    ENQUEUE,
    LONG,
    NOTIFY,
    PUBLISH,
    InThread,
    connected,
    listening,
    logged,
    pending,
    publish_at_random,
    run,
    understand,
)
from tests.support.postgres import execute

CHANNELS = ["a", "b", "c", "d"]


def watch(url: str, stop: threading.Event) -> None:
    """Fail when an event becomes visible below one that had been visible before."""
    with connected(url, transactions=False) as connection:
        top, below = 0, 0
        while not stop.is_set():
            query = "SELECT count(*) FILTER (WHERE id <= %s), max(id), count(*) FROM flask_pg_sse.event"
            still_below, new_top, new_below = run(connection, query, (top,))[0]
            assert still_below == below, f"{still_below - below} events came late, below {top}"
            top, below = new_top or 0, new_below


def beat(url: str, stop: threading.Event, beats: list[tuple[int, int]]) -> None:
    """Send beats and note (head, how many events had been heard) whenever one comes back."""
    with connected(url, transactions=False) as connection:
        run(connection, f"LISTEN flask_pg_sse; LISTEN {'; LISTEN '.join(CHANNELS)}")
        heard = 0
        while not stop.is_set():
            run(connection, "SELECT flask_pg_sse.beat_v1(%s)", (str(len(beats)),))
            count = len(beats)
            while len(beats) == count:
                connection.poll()
                for notify in connection.notifies:
                    if notify.channel == "flask_pg_sse":
                        assert notify.pid == connection.info.backend_pid
                        answer = json.loads(notify.payload)
                        assert answer.keys() == {"beat", "head"} and answer["beat"] == str(count)
                        beats.append((answer["head"], heard))
                    else:
                        heard += 1
                connection.notifies.clear()


def test_ids_are_in_the_order_of_commits(log_url: str) -> None:
    """At every isolation level, with savepoints, rollbacks and the immediate way among them."""
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    stop = threading.Event()
    beats: list[tuple[int, int]] = []
    committed: list[list[str]] = []

    def publish(name: str) -> None:
        committed.extend(publish_at_random(log_url, name, CHANNELS, 200 * LONG, seed))

    with listening(log_url, *CHANNELS) as ear:
        watchers = [InThread(watch, log_url, stop), InThread(beat, log_url, stop, beats)]
        try:
            eventually(lambda: beats)  # it listens: what was committed before that it would not have heard
            for publisher in [InThread(publish, f"t{number}") for number in range(8)]:
                publisher.join(60 * LONG)
            sent = sum(map(len, committed))
            ear.wait(sent)
            seen = len(beats)
            eventually(lambda: len(beats) > seen or not watchers[1].alive())
        finally:
            stop.set()
            for watcher in watchers:
                watcher.join()
        rows = logged(log_url)
        assert [(i, channel, data) for i, channel, _, data in rows] == [(h.id, h.channel, h.data) for h in ear.heard]
    ids = [row[0] for row in rows]
    assert ids == sorted(set(ids))
    # All that was committed and nothing else, each transaction's events in their order and together.
    position = {row[3]: number for number, row in enumerate(rows)}
    assert len(rows) == sent and position.keys() == {text for texts in committed for text in texts}
    for texts in committed:
        first = position[texts[0]] if texts else 0
        assert [position[text] for text in texts] == list(range(first, first + len(texts)))
    assert pending(log_url) == 0
    # A session that gets a beat's notification has got all events up to the beat's head before.
    assert len(beats) > 20
    for head, heard in beats:
        assert bisect_right(ids, head) <= heard


def test_transactions_may_commit_in_another_order_than_they_notify(log_url: str) -> None:
    with listening(log_url, "orders") as ear, connected(log_url) as first, connected(log_url) as second:
        run(first, NOTIFY, ("orders", "first"))
        run(second, NOTIFY, ("orders", "second"))
        second.commit()
        assert [heard.data for heard in ear.wait(1)] == ["second"]
        first.commit()
        assert [heard.data for heard in ear.wait(2)] == ["second", "first"]
        assert [heard.id for heard in ear.heard] == [row[0] for row in logged(log_url)]
    assert [row[3] for row in logged(log_url)] == ["second", "first"]


@pytest.mark.slow
def test_ten_thousand_events_in_one_transaction(log_url: str) -> None:
    with listening(log_url, "orders") as ear, connected(log_url) as connection:
        run(connection, "SELECT flask_pg_sse.notify('orders', n::text) FROM generate_series(1, 5000) AS n")
        texts = list(map(str, range(5001, 10_001)))
        run(connection, ENQUEUE, ("orders", ["{}"] * 5000, texts))
        connection.commit()
        ear.wait(10_000)
    assert [int(heard.data) for heard in ear.heard] == list(range(1, 10_001))
    assert [int(row[3]) for row in logged(log_url)] == list(range(1, 10_001))
    assert pending(log_url) == 0


def test_rollback_and_savepoints(log_url: str) -> None:
    with listening(log_url, "orders") as ear, connected(log_url) as connection:
        run(connection, NOTIFY, ("orders", "rolled back"))
        connection.rollback()
        run(connection, NOTIFY, ("orders", "1"))
        run(connection, "SAVEPOINT one")
        run(connection, NOTIFY, ("orders", "rolled back"))
        run(connection, "SAVEPOINT two")
        run(connection, NOTIFY, ("orders", "rolled back"))
        run(connection, "RELEASE SAVEPOINT two")
        run(connection, "ROLLBACK TO SAVEPOINT one")
        run(connection, NOTIFY, ("orders", "2"))
        run(connection, "SAVEPOINT early")
        # What was to fire here comes back with the rollback, and fires at commit.
        run(connection, "SET CONSTRAINTS ALL IMMEDIATE")
        run(connection, NOTIFY, ("orders", "rolled back"))
        run(connection, "ROLLBACK TO SAVEPOINT early")
        run(connection, "DO $$ BEGIN PERFORM flask_pg_sse.notify('orders', 'rolled back'); RAISE 'x'; "
            "EXCEPTION WHEN OTHERS THEN PERFORM flask_pg_sse.notify('orders', '3'); END $$")  # fmt: skip
        connection.commit()
        assert [heard.data for heard in ear.wait(3)] == ["1", "2", "3"]
    assert [row[3] for row in logged(log_url)] == ["1", "2", "3"]
    assert pending(log_url) == 0


def test_a_procedure_that_commits(log_url: str) -> None:
    with listening(log_url, "orders") as ear, connected(log_url, transactions=False) as connection:
        run(connection, "DO $$ BEGIN FOR n IN 1 .. 5 LOOP PERFORM flask_pg_sse.notify('orders', n::text); "
            "IF n % 2 = 1 THEN COMMIT; ELSE ROLLBACK; END IF; END LOOP; END $$")  # fmt: skip
        assert [heard.data for heard in ear.wait(3)] == ["1", "3", "5"]


@pytest.mark.parametrize("way", ["notify", "enqueue", "publish"])
def test_equal_events_are_each_an_event(log_url: str, way: str) -> None:
    """PostgreSQL alone folds equal notifications of one transaction into one."""
    with listening(log_url, "orders") as ear, connected(log_url) as connection:
        if way == "notify":
            for _ in range(3):
                run(connection, NOTIFY, ("orders", "same"))
        else:
            run(connection, ENQUEUE if way == "enqueue" else PUBLISH, ("orders", ["{}"] * 3, ["same"] * 3))
        connection.commit()
        assert [heard.data for heard in ear.wait(3)] == ["same"] * 3
    assert [row[0] for row in logged(log_url)] == [heard.id for heard in ear.heard]


def test_publishing_at_once_returns_the_last_id(log_url: str) -> None:
    with connected(log_url, transactions=False) as connection:
        for count in (1, 3):
            ids = run(connection, PUBLISH, ("orders", ["{}"] * count, ["x"] * count))[0][0]
            assert ids == logged(log_url)[-1][0]
        assert run(connection, PUBLISH, ("orders", [], [])) == [(None,)]
    assert len(logged(log_url)) == 4


def test_the_head_is_what_all_can_see(log_url: str) -> None:
    """Neither the sequence's last value nor the id of an event whose transaction goes on."""
    head = "SELECT flask_pg_sse.head_v1()"
    start = execute(log_url, head)[0][0]
    assert start == execute(log_url, "SELECT pruned_through FROM flask_pg_sse.retention")[0][0] > 0
    with connected(log_url) as connection:
        first = run(connection, PUBLISH, ("orders", ["{}"], ["x"]))[0][0]
        assert execute(log_url, head) == [(start,)]
        connection.rollback()
        assert execute(log_url, head) == [(start,)]
        second = run(connection, PUBLISH, ("orders", ["{}"], ["x"]))[0][0]
        assert execute(log_url, head) == [(start,)]
        connection.commit()
        assert start < first < second
        assert execute(log_url, head) == [(second,)]
        run(connection, PUBLISH, ("orders", ["{}"], ["x"]))
        connection.rollback()
        assert execute(log_url, head) == [(second,)]
    assert execute(log_url, "SELECT flask_pg_sse.prune_v1('0 s', 100)") == [(1,)]
    assert logged(log_url) == [] and execute(log_url, head) == [(second,)]


def test_publishing_disturbs_no_serializable_transaction(log_url: str) -> None:
    """Two that overlap in every way, and each writes many rows: locks on rows would become locks on pages."""
    with connected(log_url) as first, connected(log_url) as second:
        for round, order in itertools.product(range(3), ("first", "second")):
            for connection in (first, second):
                run(connection, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            for number in range(20):
                for connection in (first, second):
                    run(connection, NOTIFY, ("orders", f"{round} {number}"))
            for connection in (first, second) if order == "first" else (second, first):
                connection.commit()
    assert len(logged(log_url)) == 240


def test_a_role_that_may_only_call_the_functions(log_url: str) -> None:
    """It can publish, deferred too, and neither read nor write the tables."""
    role = f"app_{os.getpid()}_{random.randrange(10**9)}"
    execute(log_url, f"CREATE ROLE {role}")
    try:
        with listening(log_url, "orders") as ear, connected(log_url) as connection:
            run(connection, f"SET SESSION AUTHORIZATION {role}")
            connection.commit()
            for denied in ("SELECT flask_pg_sse.head_v1()", "SELECT flask_pg_sse.notify('orders')"):
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    run(connection, denied)
                connection.rollback()
            execute(log_url, f"GRANT USAGE ON SCHEMA flask_pg_sse TO {role}")
            execute(log_url, f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA flask_pg_sse TO {role}")
            run(connection, NOTIFY, ("orders", "x"))
            connection.commit()
            run(connection, PUBLISH, ("orders", ["{}"], ["y"]))
            connection.commit()
            for table in ("event", "pending", "installation", "retention"):
                with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                    run(connection, f"SELECT * FROM flask_pg_sse.{table}")
                connection.rollback()
            assert [heard.data for heard in ear.wait(2)] == ["x", "y"]
    finally:
        execute(log_url, f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_the_signature_of_an_event(log_url: str) -> None:
    """Every role of the database can send a NOTIFY with an id in it; only the log knows the key."""
    with listening(log_url, "orders") as ear:
        execute(log_url, NOTIFY, ("orders", "x"))
        heard = ear.wait(1)[0]
    key: Any = execute(log_url, "SELECT key FROM flask_pg_sse.installed_v1()")[0][0]
    name, rest = b"orders", b"}\nx"
    signed = hashlib.sha256(bytes(key) + heard.id.to_bytes(8, "big") + len(name).to_bytes(4, "big") + name + rest)
    assert heard.fields == {"s": signed.hexdigest()[:16]}
    assert understand("orders", f'\x1e1{{"i":{heard.id},"s":"{heard.fields["s"]}"}}\nx') == heard


@pytest.mark.parametrize(
    ("query", "args"),
    [
        (listener._BEAT_OF_LOG, ("1", 0)),
        (prune._PRUNE, (60.0, 5000)),
        (log.HEAD, ()),
        (log._PAGE, (["orders"], 0, 1000, 0)),
        (log._TAILS, (["orders"], [2**62], 1000)),
        (publish._PUBLISH, ("orders", ["{}"], ["x"])),
    ],
    ids=["beat", "prune", "head", "page", "tails", "publish"],
)
def test_what_the_package_does_makes_no_serializable_publisher_fail(
    log_url: str, query: str, args: tuple[Any, ...]
) -> None:
    """Where that is a database's default: what runs beside a publisher must not count as a reader that conflicts."""
    name = urlsplit(log_url).path[1:]
    execute(log_url, f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    execute(log_url, "CREATE TABLE stock AS SELECT n AS id, 0 AS sold FROM generate_series(1, 2000) AS n")
    execute(log_url, "ALTER TABLE stock ADD PRIMARY KEY (id)")
    execute(log_url, NOTIFY, ("orders", "first"))
    with closing(own_connection(to_dsn(log_url, "the test"), "own")) as own, connected(log_url) as publisher:
        run(publisher, "SELECT sold FROM stock WHERE id = 1")
        run(publisher, NOTIFY, ("orders", "second"))
        execute(log_url, "UPDATE stock SET sold = 1 WHERE id = 1")
        own_execute(own, query, args, timeout=5)
        publisher.commit()
