"""Publishing in a transaction with the user's own deferred constraints and triggers.

These may be slow, and may need rows that another publisher has locked. A transaction that numbers an event delays every
other publisher until its end. So the event must be numbered last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import psycopg2
import pytest

from tests.support.client import eventually
from tests.support.log import NOTIFY, PUBLISH, InThread, connected, listening, logged, pending, run
from tests.support.postgres import execute
from tests.support.slow import but_one_slow

# Checking a row of `work` at commit needs a row of `gate`, which another session may hold; `indirect` writes to `work`
# only then. The foreign key needs a row of `gate` too.
TABLES = """
CREATE TABLE gate (id integer PRIMARY KEY);
INSERT INTO gate VALUES (1), (2);
CREATE TABLE work (id serial PRIMARY KEY);
CREATE TABLE indirect (id serial PRIMARY KEY);
CREATE TABLE more_indirect (id serial PRIMARY KEY);
CREATE TABLE child (gate integer REFERENCES gate DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION check_work() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM gate WHERE id = 1 FOR UPDATE;
    RETURN NULL;
END $$;
CREATE FUNCTION check_indirect() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO work DEFAULT VALUES;
    RETURN NULL;
END $$;
CREATE FUNCTION check_more_indirect() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO indirect DEFAULT VALUES;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER check_work AFTER INSERT ON work
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION check_work();
CREATE CONSTRAINT TRIGGER check_indirect AFTER INSERT ON indirect
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION check_indirect();
CREATE CONSTRAINT TRIGGER check_more_indirect AFTER INSERT ON more_indirect
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION check_more_indirect();
"""
WORK = {
    "trigger": "INSERT INTO work DEFAULT VALUES",
    "foreign key": "INSERT INTO child VALUES (1)",
    "trigger of a trigger": "INSERT INTO indirect DEFAULT VALUES",
    "and one more": "INSERT INTO more_indirect DEFAULT VALUES",
}
LOCKS = (
    "SELECT count(*) FROM pg_locks WHERE relation = 'flask_pg_sse.numbering'::regclass AND pid = %s "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


@pytest.fixture
def url(log_url: str) -> str:
    execute(log_url, TABLES)
    return log_url


@contextmanager
def gate_held(url: str) -> Iterator[Any]:
    """A publisher that holds the row that checks at commit need, and that will publish itself."""
    with connected(url) as holder:
        run(holder, "SELECT 1 FROM gate WHERE id = 1 FOR UPDATE")
        run(holder, "SET LOCAL deadlock_timeout = '50ms'")
        run(holder, NOTIFY, ("orders", "holder"))
        yield holder


def wait_until_blocked(url: str, connection: Any, by: Any) -> None:
    query = "SELECT pg_blocking_pids(%s)"
    pid = connection.info.backend_pid
    eventually(lambda: execute(url, query, (pid,))[0][0] == [by.info.backend_pid], 10, "one waits for the other")


def check_others_publish(url: str, waiting: Any) -> None:
    """Prove that the lock is free while `waiting` waits."""
    assert execute(url, LOCKS, (waiting.info.backend_pid,)) == [(0,)]
    with connected(url, transactions=False) as other:
        run(other, "SET lock_timeout = '2s'")
        run(other, PUBLISH, ("orders", ["{}"], ["immediate"]))
        run(other, NOTIFY, ("orders", "deferred"))


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("notify", ["before", "after", "before and after"])
def test_the_lock_is_not_held_while_the_users_own_checks_run(url: str, work: str, notify: str) -> None:
    with listening(url, "orders") as ear, gate_held(url) as holder, connected(url) as mine:
        if "before" in notify:
            run(mine, NOTIFY, ("orders", "mine"))
        run(mine, WORK[work])
        if "after" in notify:
            run(mine, NOTIFY, ("orders", "mine"))
        commit = InThread(mine.commit)
        try:
            wait_until_blocked(url, mine, holder)
            check_others_publish(url, mine)
        finally:
            holder.commit()  # needs the lock, and has what we wait for
            commit.join()
        count = 2 if "and" in notify else 1
        expected = ["immediate", "deferred", "holder", *["mine"] * count]
        assert [heard.data for heard in ear.wait(len(expected))] == expected
    assert [row[3] for row in logged(url)] == expected
    assert pending(url) == 0


@pytest.mark.parametrize("times", [1, 2, 3])
def test_set_constraints_all_immediate_numbers_nothing_early(url: str, times: int) -> None:
    """SET CONSTRAINTS is for the user's checks. Numbered then, the event would delay all others until our commit."""
    with listening(url, "orders") as ear, gate_held(url) as holder, connected(url) as mine:
        run(mine, NOTIFY, ("orders", "1"))
        for _ in range(times):
            run(mine, "SET CONSTRAINTS ALL IMMEDIATE")
        run(mine, NOTIFY, ("orders", "2"))
        assert execute(url, LOCKS, (mine.info.backend_pid,)) == [(0,)]
        run(mine, "SET CONSTRAINTS ALL DEFERRED")
        run(mine, NOTIFY, ("orders", "3"))
        run(mine, "SET CONSTRAINTS ALL IMMEDIATE")
        waiting = InThread(run, mine, "SELECT 1 FROM gate WHERE id = 1 FOR UPDATE")
        try:
            wait_until_blocked(url, mine, holder)
            check_others_publish(url, mine)
        finally:
            holder.commit()
            waiting.join()
        mine.commit()
        expected = ["immediate", "deferred", "holder", "1", "2", "3"]
        assert [heard.data for heard in ear.wait(6)] == expected
    assert [row[3] for row in logged(url)] == expected
    assert pending(url) == 0


# What a sender can do that has no right but EXECUTE on notify(): each goes on for as long as it likes after it.
HOLD = "SELECT 1 FROM gate WHERE id = 1 FOR UPDATE"
IMMEDIATE = "SET CONSTRAINTS ALL IMMEDIATE"
HOLDERS = {
    "in one DO": [f"DO $$ BEGIN {f'{IMMEDIATE}; ' * 2} PERFORM 1 FROM gate WHERE id = 1 FOR UPDATE; END $$"],
    "in a loop": [
        f"DO $$ BEGIN FOR n IN 1 .. 30 LOOP {IMMEDIATE}; END LOOP; PERFORM 1 FROM gate WHERE id = 1 FOR UPDATE; END $$"
    ],
    "by EXECUTE": [
        f"DO $$ BEGIN FOR n IN 1 .. 30 LOOP EXECUTE '{IMMEDIATE} /*' || chr(10) || 'at COMMIT */'; END LOOP; "
        "PERFORM 1 FROM gate WHERE id = 1 FOR UPDATE; END $$"
    ],
    "in functions in SQL": [f"SELECT {', '.join(['at_once()'] * 30)}", HOLD],
    "in functions in SQL, and at once": [f"{'SELECT at_once(); ' * 30} {HOLD}"],
    "in one message": [f"{f'{IMMEDIATE}; ' * 30} {HOLD}"],
    "in one message, in small letters": [f"{'set constraints all immediate /* */; ' * 30} {HOLD}"],
    "prepared": [f"{'EXECUTE at_once; ' * 30} {HOLD}"],
    "in a trigger of its own": ["INSERT INTO again VALUES (1)", "COMMIT"],
}


@pytest.mark.parametrize("how", but_one_slow(HOLDERS))
def test_a_sender_holds_nobody_up(url: str, how: str) -> None:
    """Whatever fires the trigger, only the commit itself numbers."""
    execute(
        url,
        f"""
        CREATE FUNCTION at_once() RETURNS void LANGUAGE sql AS '{IMMEDIATE}';
        CREATE TABLE again (id integer);
        CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            FOR n IN 1 .. 30 LOOP {IMMEDIATE}; END LOOP;
            PERFORM 1 FROM gate WHERE id = 1 FOR UPDATE;
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER again AFTER INSERT ON again
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION again();
        """,
    )
    with gate_held(url) as holder, closing(psycopg.connect(url, autocommit=True)) as mine:
        mine.pgconn.prepare(b"at_once", IMMEDIATE.encode())  # in SQL, PREPARE takes no such statement
        run(mine, "BEGIN")
        for data in "12":
            run(mine, NOTIFY, ("orders", data))
        *before, last = HOLDERS[how]
        for statement in before:
            run(mine, statement)
        going_on = InThread(run, mine, last)
        try:
            wait_until_blocked(url, mine, holder)
            check_others_publish(url, mine)
        finally:
            holder.commit()
            going_on.join()
        if last != "COMMIT":
            run(mine, "COMMIT")
    assert [row[3] for row in logged(url)] == ["immediate", "deferred", "holder", "1", "2"]
    assert pending(url) == 0


@pytest.mark.slow
@pytest.mark.parametrize("commits", [False, True])
def test_who_neither_numbers_nor_commits_is_named_soon(url: str, commits: bool) -> None:
    """With the lock held: a deferred trigger in the fifth round, or the immediate way in a transaction that goes on."""
    execute(
        url,
        """
        CREATE TABLE slow (id integer);
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.id < 8 THEN
                UPDATE slow SET id = NEW.id + 1;
            ELSE
                PERFORM 1 FROM gate WHERE id = 1 FOR UPDATE;
            END IF;
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT OR UPDATE ON slow
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow();
        """,
    )
    with gate_held(url) as holder, connected(url) as mine, connected(url, transactions=False) as other:
        run(mine, "SET application_name = 'a sender'")
        pid = mine.info.backend_pid
        if commits:
            run(mine, "INSERT INTO slow VALUES (1)")
            run(mine, NOTIFY, ("orders", "mine"))
        else:
            run(mine, PUBLISH, ("orders", ["{}"], ["mine"]))
        going_on = InThread(mine.commit if commits else lambda: run(mine, "SELECT 1 FROM gate WHERE id = 1 FOR UPDATE"))
        try:
            wait_until_blocked(url, mine, holder)
            began = time.monotonic()
            with pytest.raises(psycopg2.errors.LockNotAvailable) as caught:
                run(other, NOTIFY, ("orders", "other"))
            took = time.monotonic() - began
        finally:
            holder.rollback()
            going_on.join()
        mine.commit()
        run(other, NOTIFY, ("orders", "other"))
    assert 2.9 < took < 7, "not the whole 8 s"
    named = f'session {pid} of role "postgres" (application_name "a sender", '
    assert named in str(caught.value)
    assert "which has numbered its events, and does something else before its commit" in str(caught.value)
    assert [row[3] for row in logged(url)] == ["mine", "other"]


COMMITS = {
    "in one message": "BEGIN; {} SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL IMMEDIATE; COMMIT",
    "without BEGIN": "{}",
    "in a procedure": "CALL commits()",
    "in a procedure in a procedure": "DO $$ BEGIN CALL commits(); END $$",
    "in a DO, after SET CONSTRAINTS": "DO $$ BEGIN PERFORM flask_pg_sse.notify('orders', 'x'); "
    "SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL IMMEDIATE; COMMIT; PERFORM pg_sleep(0); END $$",
}


@pytest.mark.parametrize("how", but_one_slow(COMMITS))
def test_every_commit_is_known_as_one(url: str, how: str) -> None:
    execute(
        url,
        "CREATE PROCEDURE commits() LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM flask_pg_sse.notify('orders', 'x'); COMMIT; PERFORM 1; END $$",
    )
    with listening(url, "orders") as ear, connected(url, transactions=False) as mine:
        run(mine, COMMITS[how].format("SELECT flask_pg_sse.notify('orders', 'x');"))
        assert [heard.data for heard in ear.wait(1)] == ["x"]
    assert pending(url) == 0


def test_settings_may_be_reset_before_the_commit(url: str) -> None:
    with connected(url) as mine:
        for data in "123":
            run(mine, NOTIFY, ("orders", data))
            run(mine, "RESET ALL")
        mine.commit()
    assert [row[3] for row in logged(url)] == ["1", "2", "3"]


@pytest.mark.parametrize("value", ["", "(7,1)", "(4000000000,1)"])
def test_a_transaction_that_loses_its_own_events_fails(url: str, value: str) -> None:
    """By changing the setting that tells where they are, in the middle of the commit."""
    execute(
        url,
        f"""
        CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM set_config('flask_pg_sse.last', '{value}', true);
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER spoil AFTER INSERT ON child
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION spoil();
        """,
    )
    with connected(url) as mine:
        for data in "123":
            run(mine, NOTIFY, ("orders", data))
        run(mine, "INSERT INTO child VALUES (1)")
        with pytest.raises(psycopg2.errors.RaiseException, match=r"flask_pg_sse\.last was changed"):
            mine.commit()
    assert logged(url) == [] and pending(url) == 0


def test_a_check_that_fails_takes_the_events_along(url: str) -> None:
    with listening(url, "orders") as ear, connected(url) as connection:
        run(connection, NOTIFY, ("orders", "never"))
        run(connection, "INSERT INTO child VALUES (77)")
        run(connection, NOTIFY, ("orders", "never"))
        with pytest.raises(psycopg2.errors.ForeignKeyViolation):
            connection.commit()
        run(connection, NOTIFY, ("orders", "then"))
        connection.commit()
        assert [heard.data for heard in ear.wait(1)] == ["then"]
    assert [row[3] for row in logged(url)] == ["then"]


def test_a_deferred_trigger_may_notify(url: str) -> None:
    execute(
        url,
        """
        CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM flask_pg_sse.notify('orders', 'from the trigger');
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER tell AFTER INSERT ON child
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION tell();
        """,
    )
    with listening(url, "orders") as ear, connected(url) as connection:
        run(connection, NOTIFY, ("orders", "direct"))
        run(connection, "INSERT INTO child VALUES (1), (2)")
        connection.commit()
        assert sorted(heard.data for heard in ear.wait(3)) == ["direct", "from the trigger", "from the trigger"]
    assert [row[0] for row in logged(url)] == [heard.id for heard in ear.heard]
    assert pending(url) == 0


def test_publishers_wait_for_no_row_of_one_another(url: str) -> None:
    """Each holds a row that the other does not need; both publish, one commits while the other goes on."""
    with connected(url) as first, connected(url) as second, listening(url, "orders") as ear:
        for connection, row in ((first, 1), (second, 2)):
            run(connection, "SELECT 1 FROM gate WHERE id = %s FOR UPDATE", (row,))
            run(connection, NOTIFY, ("orders", str(row)))
        run(second, "SET LOCAL lock_timeout = '2s'")
        second.commit()
        ear.wait(1)
        first.commit()
        assert [heard.data for heard in ear.wait(2)] == ["2", "1"]


def test_waiting_for_the_lock_ends_with_the_commit_before(log_url: str) -> None:
    """The immediate way holds it until the end of its transaction; then the next in line goes on."""
    with connected(log_url) as first, connected(log_url) as second:
        run(first, PUBLISH, ("orders", ["{}"], ["first"]))
        run(second, NOTIFY, ("orders", "second"))
        commit = InThread(second.commit)
        try:
            wait_until_blocked(log_url, second, first)
        finally:
            first.commit()
            commit.join()
    assert [row[3] for row in logged(log_url)] == ["first", "second"]
