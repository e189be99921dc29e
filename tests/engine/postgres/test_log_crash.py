"""Every event that a listener has received is in the log, also after a crash."""

from __future__ import annotations

import contextlib

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
    # The test looks where it can hurt: an ordinary commit does not survive this, unless PostgreSQL writes at that very
    # moment, which it does every ten seconds.
    execute(url, "DROP TABLE IF EXISTS proof; CREATE TABLE proof ()")

    def is_lost() -> bool:
        execute(url, "TRUNCATE proof")
        execute(url, "CHECKPOINT")
        execute(url, "INSERT INTO proof DEFAULT VALUES")
        server.stop("immediate")
        server.start()
        return execute(url, "SELECT count(*) FROM proof") == [(0,)]

    eventually(is_lost, 60)


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
