"""Helpers for the tests of the event log: publish, listen, read the log, and wait."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.support.client import eventually
from tests.support.postgres import connect, execute
from tools import postgres

# LONG=10 races ten times as long.
LONG = int(os.environ.get("LONG", "1"))
NOTIFY = "SELECT flask_pg_sse.notify(%s, %s)"
ENQUEUE = "SELECT flask_pg_sse.enqueue_v1(%s, %s::json[], %s)"
PUBLISH = "SELECT flask_pg_sse.publish_v1(%s, %s::json[], %s)"


class Heard(NamedTuple):
    id: int
    channel: str
    fields: dict[str, Any]
    data: str | None


class Ear:
    """A connection that listens. `heard` grows with `poll()`."""

    def __init__(self, url: str, channels: Iterable[str]) -> None:
        self.connection = connect(url)
        self.heard: list[Heard] = []
        for channel in channels:
            quoted = channel.replace('"', '""')
            run(self.connection, f'LISTEN "{quoted}"')

    def poll(self) -> list[Heard]:
        """Take what has come; the new ones. Beats are not events: see `Beating`."""
        self.connection.poll()
        new = [understand(notify.channel, notify.payload) for notify in self.connection.notifies]
        self.connection.notifies.clear()
        self.heard += new
        return new

    def wait(self, count: int) -> list[Heard]:
        eventually(lambda: self.poll() is None or len(self.heard) >= count, 20, f"{count} notifications")
        return self.heard

    def close(self) -> None:
        self.connection.close()


def understand(channel: str, payload: str) -> Heard:
    assert payload[:2] == "\x1e1", payload
    head, mark, data = payload[2:].partition("\n")
    fields = json.loads(head)
    return Heard(fields.pop("i"), channel, fields, data if mark else None)


@contextmanager
def listening(url: str, *channels: str) -> Any:
    ear = Ear(url, channels)
    try:
        yield ear
    finally:
        ear.close()


@contextmanager
def connected(url: str, *, transactions: bool = True) -> Any:
    """A connection, by default with transactions that begin by themselves."""
    connection = connect(url)
    connection.autocommit = not transactions
    try:
        yield connection
    finally:
        connection.close()


def run(connection: Any, query: str, args: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, args)
        return list(cursor.fetchall()) if cursor.description else []


def logged(url: str) -> list[tuple[Any, ...]]:
    """Return (id, channel, fields, data) of all events in the log."""
    return execute(url, "SELECT id, channel, fields, data FROM flask_pg_sse.event ORDER BY id")


def pending(url: str) -> int:
    return int(execute(url, "SELECT count(*) FROM flask_pg_sse.pending")[0][0])


def fill(url: str, events: Iterable[tuple[int, str, str, str | None]]) -> None:
    """Write events to the log past its functions, with ids of the test's choice; they are a day old."""
    rows = list(events)
    query = (
        "INSERT INTO flask_pg_sse.event SELECT *, now() - interval '1 day' "
        "FROM unnest(%s::bigint[], %s::text[], %s::json[], %s::text[])"
    )
    execute(url, query, tuple(map(list, zip(*rows, strict=True))))
    execute(url, "SELECT setval('flask_pg_sse.event_id', %s)", (rows[-1][0],))


class InThread:
    """A call in a thread of its own; its error is raised by `join()`."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call, args))
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            call(*args)
        except BaseException as error:
            self._error = error

    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float = 60) -> None:
        self._thread.join(timeout)
        assert not self.alive(), "the thread does not end"
        if self._error is not None:
            raise self._error


WAIT_FOR_A_STANDBY = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@contextmanager
def standby_away(server: postgres.Server) -> Iterator[None]:
    """Commits wait for a synchronous standby that is not there."""
    url = server.url()

    def a_commit_waits() -> bool:
        trial, waited = InThread(execute, url, "CREATE TABLE trial (); DROP TABLE trial"), False
        while trial.alive():
            for (pid,) in execute(url, WAIT_FOR_A_STANDBY):
                waited = True
                execute(url, "SELECT pg_cancel_backend(%s)", (pid,))  # which ends the wait
        trial.join()
        return waited

    execute(url, "ALTER SYSTEM SET synchronous_standby_names = 'away'")
    execute(url, "SELECT pg_reload_conf()")
    # Commits begin to wait when the checkpointer has read it, a moment after new sessions have.
    eventually(a_commit_waits)
    try:
        yield
    finally:
        execute(url, "ALTER SYSTEM RESET synchronous_standby_names")
        execute(url, "SELECT pg_reload_conf()")


def publish_at_random(url: str, name: str, channels: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """Publish in every way there is, and return the texts of each transaction that was committed.

    No other table is touched: an error, be it a serialization failure or a deadlock, is the log's own.
    """
    rng = random.Random(f"{seed} {name}")
    committed: list[list[str]] = []
    number = 0

    def next_text() -> str:
        nonlocal number
        number += 1
        return f"{name}-{number}"

    def send() -> list[str]:
        """Queue one or three events in the open transaction."""
        if rng.random() < 0.7:
            text = next_text()
            run(connection, NOTIFY, (rng.choice(channels), text))
            return [text]
        texts = [next_text() for _ in range(3)]
        run(connection, ENQUEUE, (rng.choice(channels), ["{}"] * 3, texts))
        return texts

    with connected(url) as connection, connected(url, transactions=False) as autocommit:
        for _ in range(rounds):
            if rng.random() < 0.3:
                texts = [next_text() for _ in range(rng.randint(1, 3))]
                run(autocommit, PUBLISH, (rng.choice(channels), ["{}"] * len(texts), texts))
                committed.append(texts)
                continue
            level = rng.choice(["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
            run(connection, f"SET TRANSACTION ISOLATION LEVEL {level}")
            texts = []
            for _ in range(rng.randint(1, 4)):
                match rng.randrange(4):
                    case 0:
                        run(connection, "SAVEPOINT here")
                        send()
                        run(connection, "ROLLBACK TO SAVEPOINT here")
                    case 1:
                        run(connection, "SAVEPOINT here")
                        texts += send()
                        run(connection, "RELEASE SAVEPOINT here")
                    case 2:
                        run(connection, "SELECT pg_sleep(%s)", (rng.random() / 300,))
                        texts += send()
                    case _:
                        texts += send()
            if rng.random() < 0.2:
                connection.rollback()
            else:
                connection.commit()
                committed.append(texts)
    return committed
