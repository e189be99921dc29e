"""All ways to publish: notify() on its own connection and in transactions, SQL, plain NOTIFY, at the same time."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import psycopg2
from flask import Flask

from flask_pg_sse import notify, notify_many
from flask_pg_sse.engine.postgres.schema import schema_sql
from flask_pg_sse.errors import DatabaseUnavailable
from tests.support.eventsource import FOREIGN_IDS, LOGGED
from tests.support.postgres import connect, execute

# What a browser received is compared with this, and not with the log itself, which may have been pruned meanwhile. It
# is written in the transaction that writes the log.
_WITNESS = """
CREATE TABLE witness (id bigint, channel text, data text);
CREATE FUNCTION witness() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.witness VALUES (NEW.id, NEW.channel, NEW.data);
    RETURN NULL;
END $$;
CREATE TRIGGER witness AFTER INSERT ON flask_pg_sse.event FOR EACH ROW EXECUTE FUNCTION witness();
"""


def install_log(url: str) -> None:
    """Install the event log, and what remembers all that was ever in it."""
    execute(url, schema_sql() + _WITNESS)


def logged(url: str) -> list[tuple[int, str, str]]:
    """Return id, channel and data of every event that was committed, in the order of their ids."""
    return [(int(row[0]), row[1], row[2]) for row in execute(url, "SELECT id, channel, data FROM witness ORDER BY id")]


def head(url: str) -> int:
    return int(execute(url, "SELECT flask_pg_sse.head_v1()")[0][0])


class Publisher(threading.Thread):
    """Publishes in one of the four ways until it is stopped, and goes on where PostgreSQL went away.

    Only the log shows what it published: if the connection breaks during a commit, nobody knows. `pace` is the longest
    pause in seconds. `attempts` of unlogged events and `failures` are counted.
    """

    def __init__(
        self, app: Flask, url: str, way: str, channels: Sequence[str], seed: int, pace: float, large: bool = True
    ) -> None:
        super().__init__(name=f"publisher-{way}-{seed}")
        self.failures = 0
        self.failure: BaseException | None = None
        self._app = app
        self._url = url
        self._channels = list(channels)
        self._pace = pace
        self._large = large
        self._chooser = random.Random(seed)
        self._number = 0
        self._stop_asked = threading.Event()
        ways: dict[str, Callable[[Any], None]] = {
            "own": self._own, "many": self._many, "sql": self._sql, "transaction": self._transaction,
        }  # fmt: skip
        self._publish = ways[way]
        self._connects = way in ("sql", "transaction")

    def stop(self) -> None:
        self._stop_asked.set()

    def run(self) -> None:
        try:
            with self._app.app_context():
                while not self._stop_asked.is_set():
                    self._until_it_breaks()
        except BaseException as error:
            self.failure = error

    def _until_it_breaks(self) -> None:
        connection = None
        try:
            connection = connect(self._url) if self._connects else None
            while not self._stop_asked.is_set():
                self._publish(connection)
                self._stop_asked.wait(self._chooser.uniform(0, self._pace))
        except (psycopg2.Error, DatabaseUnavailable):
            self.failures += 1
            self._stop_asked.wait(0.05)
        finally:
            if connection is not None:
                connection.close()

    # -- what to say, and to whom

    def _text(self, kind: str = LOGGED) -> str:
        self._number += 1
        text = f"{kind}{self.name} {self._number}"
        size = self._chooser.random()
        if self._large and kind == LOGGED and size < 0.03:  # beyond NOTIFY's limit, beyond a page's
            return text.ljust(self._chooser.choice([9000, 9000, 30000, 90000]), "x")
        return text + "\nand a second line" if size > 0.8 else text

    def _channel(self) -> str:
        return self._chooser.choice(self._channels)

    def _id(self) -> str | None:
        return self._chooser.choice([None] * 8 + list(FOREIGN_IDS))

    # -- the ways

    def _own(self, connection: None) -> None:
        if self._chooser.random() < 0.2:
            notify(self._channel(), self._text("raw "), durable=False, id=self._id())
        else:
            notify(self._channel(), self._text(), id=self._id(), event=self._chooser.choice([None, "created"]))

    def _many(self, connection: None) -> None:
        notify_many(self._channel(), [self._text() for _ in range(self._chooser.choice([1, 5, 20]))])

    def _sql(self, connection: Any) -> None:
        with connection.cursor() as cursor:
            way = self._chooser.random()
            if way < 0.15:
                cursor.execute("SELECT pg_notify(%s, %s)", (self._channel(), self._text("raw ")))
            elif way < 0.3:  # as senders of the older projects write it
                payload = json.dumps({"id": self._chooser.choice(FOREIGN_IDS), "data": self._text("raw ")})
                cursor.execute("SELECT pg_notify(%s, %s)", (self._channel(), payload))
            else:
                query = "SELECT flask_pg_sse.notify(%s, %s, id => %s)"
                cursor.execute(query, (self._channel(), self._text(), self._id()))

    def _transaction(self, connection: Any) -> None:
        chooser = self._chooser
        with connection.cursor() as cursor:
            cursor.execute(f"BEGIN ISOLATION LEVEL {chooser.choice(['READ COMMITTED', 'SERIALIZABLE'])}")
            for _ in range(chooser.choice([1, 2, 6])):
                savepoint = chooser.random() < 0.4
                if savepoint:
                    cursor.execute("SAVEPOINT here")
                self._within(connection)
                if savepoint:
                    cursor.execute(chooser.choice(["ROLLBACK TO here", "RELEASE here"]))
            self._stop_asked.wait(chooser.uniform(0, self._pace))
            cursor.execute(chooser.choice(["COMMIT", "COMMIT", "ROLLBACK"]))

    def _within(self, connection: Any) -> None:
        if self._chooser.random() < 0.2:
            notify(self._channel(), self._text("raw "), durable=False, connection=connection)
        elif self._chooser.random() < 0.3:
            notify_many(self._channel(), [self._text() for _ in range(5)], connection=connection)
        else:
            notify(self._channel(), self._text(), id=self._id(), connection=connection)


class Counting(threading.Thread):
    """Sends 0, 1, 2 … on a channel through the log, twenty a second, while its block runs. `sent` has all of them."""

    def __init__(self, url: str, channel: str) -> None:
        super().__init__(name=f"counting on {channel}")
        self.sent: list[str] = []
        self._url = url
        self._channel = channel
        self._stop_asked = threading.Event()

    def run(self) -> None:
        connection = connect(self._url)
        try:
            with connection.cursor() as cursor:
                while not self._stop_asked.wait(0.05):
                    number = str(len(self.sent))
                    cursor.execute("SELECT flask_pg_sse.notify(%s, %s)", (self._channel, number))
                    self.sent.append(number)
        finally:
            connection.close()

    def __enter__(self) -> Counting:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()
