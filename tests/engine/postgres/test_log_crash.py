"""Every event that a listener has received is in the log, and its id never belongs to another event."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import psycopg2

from tests.support.client import eventually
from tests.support.log import ENQUEUE, LONG, NOTIFY, PUBLISH, Ear, InThread, connected, listening, logged, run
from tests.support.postgres import execute
from tools import postgres


def publish_until_the_server_is_gone(url: str, name: str) -> None:
    with contextlib.suppress(psycopg2.OperationalError, psycopg2.InterfaceError), connected(url) as connection:
        number = 0
        while True:
            number += 1
            if number % 3 == 0:
                run(connection, PUBLISH, ("orders", ["{}"], [f"{name}-{number}"]))
            elif number % 3 == 1:
                run(connection, NOTIFY, ("orders", f"{name}-{number}"))
            else:
                run(connection, ENQUEUE, ("orders", ["{}"] * 2, [f"{name}-{number}-a", f"{name}-{number}-b"]))
            connection.commit()


def test_what_was_heard_before_a_crash_is_in_the_log_after_it(crashing_log_server: postgres.Server) -> None:
    """Although PostgreSQL is told to wait for no commit (synchronous_commit = off), and would lose the last ones."""
    server = crashing_log_server
    url = server.url()
    heard: dict[int, str | None] = {}
    for round in range(6 * LONG):
        ear = Ear(url, ["orders"])

        def hear(ear: Ear = ear) -> None:
            with contextlib.suppress(psycopg2.OperationalError, psycopg2.InterfaceError):
                while True:
                    eventually(ear.poll, 60)

        threads = [InThread(publish_until_the_server_is_gone, url, f"{round}-{n}") for n in range(4)]
        threads.append(InThread(hear))
        try:
            eventually(lambda ear=ear: len(ear.heard) > 50, 30)  # type: ignore[misc]
        finally:
            server.stop("immediate")
            for thread in threads:
                thread.join()
            ear.close()
            server.start()
        ids = [event.id for event in ear.heard]
        assert ids == sorted(set(ids))
        assert not heard or ids[0] > max(heard), "an id was handed out again"
        heard.update((event.id, event.data) for event in ear.heard)
        kept = {row[0]: row[3] for row in logged(url)}
        lost = sorted(heard.keys() - kept.keys())
        assert not lost, f"{len(lost)} of {len(heard)} events were heard and are lost, the first after round {round}"
        assert {number: kept[number] for number in heard} == heard
    # The test looks where it can hurt: an ordinary commit does not survive this.
    execute(url, "DROP TABLE IF EXISTS proof; CREATE TABLE proof ()")
    execute(url, "CHECKPOINT")
    execute(url, "INSERT INTO proof DEFAULT VALUES")
    server.stop("immediate")
    server.start()
    assert execute(url, "SELECT count(*) FROM proof") == [(0,)]


def test_an_event_makes_its_own_commit_wait_and_no_other(crashing_log_server: postgres.Server) -> None:
    url = crashing_log_server.url()
    with connected(url) as connection:
        run(connection, NOTIFY, ("orders", "x"))
        connection.commit()
        assert run(connection, "SHOW synchronous_commit") == [("off",)]
        run(connection, PUBLISH, ("orders", ["{}"], ["x"]))
        assert run(connection, "SHOW synchronous_commit") == [("on",)]
        connection.commit()
        run(connection, "SET synchronous_commit = remote_apply")
        run(connection, PUBLISH, ("orders", ["{}"], ["x"]))
        assert run(connection, "SHOW synchronous_commit") == [("remote_apply",)]
        connection.commit()


def publish(url: str, count: int) -> list[int]:
    with connected(url, transactions=False) as connection:
        return [run(connection, PUBLISH, ("orders", ["{}"], ["x"]))[0][0] for _ in range(count)]


def test_ids_jump_once_after_a_restart(crashing_log_server: postgres.Server) -> None:
    url = crashing_log_server.url()
    before = publish(url, 3)
    assert before == list(range(before[0], before[0] + 3))
    modes: tuple[postgres.StopMode, ...] = ("fast", "immediate")
    for mode in modes:
        crashing_log_server.restart(mode)
        after = publish(url, 3)
        assert after[0] > before[-1] + 100_000
        assert after == list(range(after[0], after[0] + 3))
        before = after


def copy(source: Path, target: Path) -> None:
    # With owners: the files may belong to another user than ours.
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


def test_a_server_that_was_restored_hands_no_id_out_again(crashing_log_server: postgres.Server) -> None:
    """Although the one that went on after the copy was restarted too, more than once, and its ids jumped each time."""
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
    after = publish(url, 5)
    assert after[0] > max(seen)
    assert after == list(range(after[0], after[0] + 5))


def test_ids_go_on_where_the_clock_is_wrong(crashing_log_server: postgres.Server) -> None:
    """Behind the ids, as it seems."""
    url = crashing_log_server.url()
    execute(url, "SELECT setval('flask_pg_sse.event_id', 9000000000000000)")
    before = publish(url, 3)
    crashing_log_server.restart("immediate")
    after = publish(url, 3)
    assert after[0] > before[-1] + 100_000
    assert after == list(range(after[0], after[0] + 3))
    assert after[-1] < 2**53, "exact in JavaScript"


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
    after = publish(log_url, 5)
    assert after[0] > max(seen)
    assert after == list(range(after[0], after[0] + 5))


def test_a_schema_that_was_restored_hands_no_id_out_again(log_url: str) -> None:
    """As pg_restore --clean does: the tables are new ones, and the sequences have their old values."""
    seen = publish(log_url, 5)
    values = "SELECT e.last_value, n.last_value FROM flask_pg_sse.event_id e, flask_pg_sse.numbered_by n"
    event_id, numbered_by = execute(log_url, values)[0]
    seen += publish(log_url, 50)
    execute(log_url, "CREATE TABLE flask_pg_sse.copy (LIKE flask_pg_sse.event INCLUDING ALL)")
    execute(log_url, "DROP TABLE flask_pg_sse.event; ALTER TABLE flask_pg_sse.copy RENAME TO event")
    query = "SELECT setval('flask_pg_sse.event_id', %s), setval('flask_pg_sse.numbered_by', %s)"
    execute(log_url, query, (event_id, numbered_by))
    assert publish(log_url, 5)[0] > max(seen)


def test_pending_survives_no_crash_and_needs_not_to(crashing_log_server: postgres.Server) -> None:
    """It is emptied after one; what was in it had not been committed."""
    server = crashing_log_server
    url = server.url()
    with connected(url) as connection:
        run(connection, NOTIFY, ("orders", "never"))
        server.stop("immediate")
    server.start()
    with listening(url, "orders") as ear:
        execute(url, NOTIFY, ("orders", "then"))
        assert [event.data for event in ear.wait(1)] == ["then"]
    assert [row[3] for row in logged(url)] == ["then"]
    assert execute(url, "SELECT count(*) FROM flask_pg_sse.pending") == [(0,)]
