"""Retention: the oldest events leave the log, without a hole in what is left, and without a wait for anybody."""

from __future__ import annotations

import functools
import random
import threading

import pytest

from flask_pg_sse.engine.postgres import pool
from flask_pg_sse.engine.postgres.dsn import to_dsn
from flask_pg_sse.engine.postgres.retention import prune
from tests.support.client import eventually
from tests.support.log import NOTIFY, PUBLISH, InThread, connected, fill, listening, logged, pending, run
from tests.support.postgres import execute

PRUNE = "SELECT flask_pg_sse.prune_v1(%s, %s)"


def pruned_through(url: str) -> int:
    return int(execute(url, "SELECT pruned_through FROM flask_pg_sse.retention")[0][0])


def filled(url: str, count: int) -> list[int]:
    start = pruned_through(url)
    ids = [start + 3 * number for number in range(1, count + 1)]
    fill(url, [(number, "orders", "{}", "x") for number in ids])
    return ids


def test_what_is_pruned_is_a_prefix_by_id(log_url: str) -> None:
    """A clock that was set back leaves old times behind younger ones; no event goes before one with a smaller id."""
    ids = filled(log_url, 10)
    start = pruned_through(log_url)
    # 0 to 3 are old, 4 is young, 5 to 7 are old, 8 and 9 are young.
    execute(log_url, "UPDATE flask_pg_sse.event SET created_at = now() WHERE id = ANY (%s)", ([ids[4], *ids[8:]],))
    assert execute(log_url, PRUNE, ("2 days", 100)) == [(0,)]
    assert pruned_through(log_url) == start
    assert execute(log_url, PRUNE, ("1 hour", 100)) == [(4,)]
    assert [row[0] for row in logged(log_url)] == ids[4:]
    assert ids[3] <= pruned_through(log_url) < ids[4]
    assert execute(log_url, PRUNE, ("1 hour", 100)) == [(0,)]
    execute(log_url, "UPDATE flask_pg_sse.event SET created_at = now() - interval '1 day' WHERE id = %s", (ids[4],))
    assert execute(log_url, PRUNE, ("1 hour", 100)) == [(4,)]
    assert [row[0] for row in logged(log_url)] == ids[8:]
    assert execute(log_url, PRUNE, ("0 s", 100)) == [(2,)]
    assert pruned_through(log_url) == ids[-1] == execute(log_url, "SELECT flask_pg_sse.head_v1()")[0][0]
    assert execute(log_url, PRUNE, ("0 s", 100)) == [(0,)]
    assert pruned_through(log_url) == ids[-1]


def test_random_ages(log_url: str) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    rng = random.Random(seed)
    ages = dict.fromkeys(filled(log_url, 300), 0)
    ages.update({number: rng.randint(0, 10) if rng.random() < 0.2 else 10 for number in ages})
    query = (
        "UPDATE flask_pg_sse.event e SET created_at = now() - make_interval(hours => a.age) "
        "FROM unnest(%s::bigint[], %s::integer[]) AS a (id, age) WHERE a.id = e.id"
    )
    execute(log_url, query, (list(ages), list(ages.values())))
    while ages:
        hours, batch = rng.randint(0, 9), rng.randint(1, 40)
        expected: list[int] = []
        for number, age in ages.items():
            if age < hours or len(expected) == batch:
                break
            expected.append(number)
        assert execute(log_url, PRUNE, (f"{hours} hours", batch)) == [(len(expected),)]
        for number in expected:
            del ages[number]
        assert [row[0] for row in logged(log_url)] == list(ages)
        if expected:
            assert expected[-1] <= pruned_through(log_url) < min(ages, default=expected[-1] + 1)


def test_batches(log_url: str) -> None:
    ids = filled(log_url, 25)
    for deleted, last in ((10, ids[9]), (10, ids[19]), (5, ids[24]), (0, ids[24])):
        assert execute(log_url, PRUNE, ("1 hour", 10)) == [(deleted,)]
        assert pruned_through(log_url) == last


def test_one_session_at_a_time_and_publishers_wait_for_none(log_url: str) -> None:
    ids = filled(log_url, 20)
    with listening(log_url, "orders") as ear, connected(log_url) as first, connected(log_url) as publisher:
        assert run(first, PRUNE, ("1 hour", 10)) == [(10,)]
        assert execute(log_url, "SET lock_timeout = '2s'; " + PRUNE, ("1 hour", 10)) == [(None,)]
        # Neither the rows nor the number are gone for others.
        assert len(logged(log_url)) == 20 and pruned_through(log_url) < ids[0]
        run(publisher, "SET lock_timeout = '2s'")
        run(publisher, NOTIFY, ("orders", "deferred"))
        publisher.commit()
        run(publisher, PUBLISH, ("orders", ["{}"], ["immediate"]))
        publisher.commit()
        assert [heard.data for heard in ear.wait(2)] == ["deferred", "immediate"]
        first.rollback()
        assert len(logged(log_url)) == 22 and pruned_through(log_url) < ids[0]
        run(first, PRUNE, ("1 hour", 10))
        first.commit()
        assert pruned_through(log_url) == ids[9]
        assert execute(log_url, PRUNE, ("1 hour", 100)) == [(10,)]
        # And pruning waits for no publisher: what one has numbered and not committed is not there yet.
        run(publisher, PUBLISH, ("orders", ["{}"], ["open"]))
        assert execute(log_url, "SET lock_timeout = '2s'; " + PRUNE, ("0 s", 100)) == [(2,)]
        publisher.commit()
        assert [row[3] for row in logged(log_url)] == ["open"]
        assert pruned_through(log_url) < logged(log_url)[0][0]


def test_the_head_stays_while_all_is_pruned(log_url: str) -> None:
    """Read in a race with pruning, it never goes back."""
    stop = threading.Event()
    count = 0

    def publish_and_prune() -> None:
        nonlocal count
        with connected(log_url, transactions=False) as connection:
            while not stop.is_set():
                run(connection, PUBLISH, ("orders", ["{}"], ["x"]))
                run(connection, PRUNE, ("0 s", 100))
                count += 1

    worker = InThread(publish_and_prune)
    try:
        with connected(log_url, transactions=False) as connection:
            head = 0
            while count < 300 and worker.alive():
                before, head = head, run(connection, "SELECT flask_pg_sse.head_v1()")[0][0]
                assert head >= before
    finally:
        stop.set()
        worker.join()
    assert logged(log_url) == []


def test_a_batch_that_is_full_does_not_look_through_what_is_pending(log_url: str) -> None:
    """After a burst that table is large, and all of it would have to be read each time: the last batch does it."""
    filled(log_url, 20)
    old = "INSERT INTO flask_pg_sse.pending (channel, fields, data, created_at) "
    old += "SELECT 'orders', ARRAY[json '{}'], '{never}', now() - interval '2 hours'"
    execute(log_url, f"SET session_replication_role = replica; {old}")
    for deleted, left in ((10, 1), (10, 1), (0, 0)):
        assert execute(log_url, PRUNE, ("1 hour", 10)) == [(deleted,)]
        assert pending(log_url) == left


def test_the_tables_are_locked_in_the_order_of_publishers(log_url: str) -> None:
    """Or an upgrade that locks both, `pending` first, would deadlock with pruning."""
    filled(log_url, 5)
    with connected(log_url) as upgrade:
        run(upgrade, "LOCK TABLE flask_pg_sse.pending")
        worker = InThread(execute, log_url, PRUNE, ("1 hour", 100))
        waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = 'flask_pg_sse.pending'::regclass"
        eventually(lambda: run(upgrade, waiting)[0][0], 10)
        run(upgrade, "SET LOCAL lock_timeout = '2s'; LOCK TABLE flask_pg_sse.event")
        upgrade.commit()
        worker.join()
    assert logged(log_url) == []


def test_rows_whose_trigger_never_fired_go_after_an_hour(log_url: str) -> None:
    with connected(log_url) as connection:
        run(connection, "SET LOCAL session_replication_role = replica")
        run(connection, NOTIFY, ("orders", "never"))
        connection.commit()
        assert pending(log_url) == 1
        execute(log_url, PRUNE, ("0 s", 100))
        assert pending(log_url) == 1
        # Those of a transaction that goes on are not touched, however old they are.
        run(connection, NOTIFY, ("orders", "in time"))
        run(connection, "SET LOCAL session_replication_role = replica")
        run(connection, "UPDATE flask_pg_sse.pending SET created_at = now() - interval '2 hours' "
            "WHERE data = '{in time}'")  # fmt: skip
        run(connection, "SET LOCAL session_replication_role = origin")
        aged = "now() - interval '61 minutes'"
        execute(log_url, f"SET session_replication_role = replica; UPDATE flask_pg_sse.pending SET created_at = {aged}")
        execute(log_url, "SET lock_timeout = '2s'; " + PRUNE, ("0 s", 100))
        assert pending(log_url) == 0
        connection.rollback()
        run(connection, NOTIFY, ("orders", "in time"))
        connection.commit()
    assert [row[3] for row in logged(log_url)] == ["in time"]


@pytest.mark.parametrize("batch", [5000, 2, 1])
def test_what_is_dated_in_the_future_is_as_old_as_what_follows_it(
    log_url: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's clock was ahead for a time, or behind. Nothing goes before its time for that."""
    monkeypatch.setattr("flask_pg_sse.engine.postgres.retention.BATCH", batch)
    ages = {"old": "1 hour", "future": "-10 years", "young": "0"}
    for dated, deleted in (
        (["future", "old", "old", "young"], 3),
        (["future", "future", "future", "old", "young"], 4),
        (["old", "future", "young"], 1),
        (["old", "future"], 1),
        (["old", "young", "old", "future", "old"], 1),
        (["future", "future"], 0),
        (["future", "young", "old"], 0),
    ):
        execute(log_url, "TRUNCATE flask_pg_sse.event")
        for age in dated:
            execute(log_url, PUBLISH, ("orders", ["{}"], [age]))
        for age, interval in ages.items():
            query = "UPDATE flask_pg_sse.event SET created_at = now() - %s::interval WHERE data = %s"
            execute(log_url, query, (interval, age))
        assert prune(lambda query, args: execute(log_url, query, tuple(args)), 60.0) == (deleted, False), dated
        assert [row[3] for row in logged(log_url)] == dated[deleted:]


@pytest.mark.slow
def test_batches_get_smaller_where_they_take_too_long(log_url: str) -> None:
    """As for events of many megabytes; here it is a trigger that takes two milliseconds for each."""
    filled(log_url, 1000)
    execute(
        log_url,
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(0.002); RETURN OLD; END $$;"
        "CREATE TRIGGER slowly BEFORE DELETE ON flask_pg_sse.event FOR EACH ROW EXECUTE FUNCTION slowly()",
    )
    connections = pool.Pool(to_dsn(log_url, "the test"), "prune", 1)
    # PostgreSQL ends the statement; this side waits for ten seconds to hear of it.
    assert prune(functools.partial(connections.execute, limit=0.8), 60.0) == (1000, False)
    connections.close()
    assert logged(log_url) == []
