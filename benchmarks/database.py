"""A fresh database for a benchmark, on its own server or on that of DATABASE_URL."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2

from benchmarks import machine
from flask_pg_sse import schema_sql
from tools import postgres


class Database:
    """A fresh database with the event log, and figures of its server."""

    def __init__(self, url: str, pid: int | None) -> None:
        self.url = url
        self._pid = pid  # of the postmaster, if it runs on this machine
        self._connection = psycopg2.connect(url)
        self._connection.autocommit = True
        self.execute(schema_sql())

    def execute(self, query: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(query, tuple(args) or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, query: str, args: Sequence[Any] = ()) -> Any:
        return self.execute(query, args)[0][0]

    def cpu(self) -> dict[int, float]:
        """Return the seconds of CPU of each process of the server; empty if the server runs elsewhere."""
        return machine.cpu(machine.children(self._pid)) if self._pid is not None else {}

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def database(fsync: str) -> Iterator[Database]:
    """Give a fresh database: on this run's own server, or on that of DATABASE_URL."""
    with contextlib.ExitStack() as stack:
        url, pid = os.environ.get("DATABASE_URL"), None
        if not url:
            scratch = postgres.scratch()
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            server = stack.enter_context(postgres.Server(scratch / "data", options={"fsync": fsync}))
            url, pid = server.url(), server.pid
        admin = psycopg2.connect(url)
        stack.callback(admin.close)
        admin.autocommit = True
        name = f"flask_pg_sse_benchmark_{uuid.uuid4().hex[:8]}"
        with admin.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
            stack.callback(admin.cursor().execute, f"DROP DATABASE {name} WITH (FORCE)")
        fresh = Database(urlunsplit(urlsplit(url)._replace(path=f"/{name}")), pid)
        stack.callback(fresh.close)
        yield fresh
