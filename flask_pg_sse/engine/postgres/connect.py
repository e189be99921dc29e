"""The package's own connections: asynchronous psycopg2, and the one place that waits for them.

A psycopg2 connection made with `async_=1` never blocks; `wait()` drives it with poll(). Under gevent that waits as a
greenlet, without the process-wide wait callback of psycopg2 that would break the app's own COPY and large objects and
ignores `connect_timeout`. https://www.psycopg.org/docs/advanced.html#asynchronous-support
"""

from __future__ import annotations

import ipaddress
import os
import random
import select
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, make_dsn

from ...errors import DatabaseUnavailable
from .dsn import Dsn

# Seconds for one host to answer, unless the URL's connect_timeout says otherwise.
CONNECT_TIMEOUT = 10.0


def connect(dsn: Dsn, application_name: str) -> Any:
    """Return a new connection in autocommit mode, with client encoding UTF-8.

    Hosts are tried one after another, until each has been silent for `connect_timeout` seconds. Raises
    `DatabaseUnavailable`.
    """
    errors = []
    defaults = {"application_name": application_name, "keepalives_idle": "30"}
    params = {**defaults, **dsn.params, "client_encoding": "UTF8"}
    timeout = _timeout(params.pop("connect_timeout", ""))
    for attempt in _attempts(params):
        connection = None
        try:
            connection = psycopg2.connect(make_dsn(**attempt), async_=1)
            wait(connection, timeout)
            return connection
        except (psycopg2.Error, OSError, UnicodeDecodeError) as error:
            errors.append(_reason(error))
            if connection is not None:
                connection.close()
        except BaseException:  # a greenlet may be killed while it waits
            if connection is not None:
                connection.close()
            raise
    why = "; ".join(dict.fromkeys(errors)).rstrip(".?")
    raise DatabaseUnavailable(
        f"PostgreSQL cannot be reached ({dsn}): {why}. See that it runs, and that {dsn.source} is right."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):  # the server refuses, in its own encoding: it does not know ours yet
        return " ".join(error.object.decode(errors="replace").split())
    return " ".join(str(error).split()) or type(error).__name__


def _timeout(text: str) -> float:
    """Return the seconds that a connect_timeout means; libpq's "for ever" (0 or less) and what is no number: ours."""
    try:
        return float(max(int(text), 0)) or CONNECT_TIMEOUT
    except ValueError:
        return CONNECT_TIMEOUT


def wait(connection: Any, timeout: float) -> None:
    """Wait until `connection` has done what it was asked; TimeoutError when nothing has come for `timeout` seconds."""
    while (state := connection.poll()) != POLL_OK:
        poller = select.poll()  # not select(): it cannot take a descriptor above 1023
        poller.register(connection.fileno(), select.POLLIN if state == POLL_READ else select.POLLOUT)
        if not poller.poll(timeout * 1000):
            raise TimeoutError("no answer in time")


def execute(
    connection: Any, query: str, args: tuple[Any, ...] | None = None, *, timeout: float, limit: float | None = None
) -> list[Any]:
    """Run a query and return its rows. After an error the connection may be in the midst of it: close it.

    `timeout` is how many seconds the server may be silent, and `limit`, the same by default, how many it may take in
    all, where a long answer may be on its way.

    PostgreSQL gives up shortly before. It would not notice that we have gone: what waits for a lock (at its commit too,
    where NOTIFY has one for all databases) would pile up there, until no connection is left for anybody, and then
    publish what its caller was told has failed. And where a database's default is SERIALIZABLE, what we read would make
    publishers fail.

    Sent together the statements are one transaction, and the settings end with it, through a pooler too.
    """
    settings = (
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; "
        f"SET LOCAL lock_timeout = {timeout * 900:.0f}; SET LOCAL statement_timeout = {(limit or timeout) * 900:.0f}; "
    )
    with connection.cursor() as cursor:
        cursor.execute(settings + query, args or None)
        wait(connection, timeout)
        return list(cursor.fetchall()) if cursor.description else []


def _attempts(params: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield connection parameters for one server address after another.

    libpq would walk through a list of hosts by itself, but resolves names with a call that stops all greenlets, and
    under `async_` it stays with a host that never answers.
    """
    servers = list(_servers(params))
    if params.get("load_balance_hosts") == "random":
        random.shuffle(servers)
    wanted = params.get("target_session_attrs")
    for target in ("standby", "any") if wanted == "prefer-standby" else (wanted,):
        for server in servers:
            attempt = {**params, **server}
            attempt.pop("load_balance_hosts", None)
            if target is not None:
                attempt["target_session_attrs"] = target
            yield attempt


def _servers(params: Mapping[str, str]) -> Iterator[dict[str, str]]:
    host = params.get("host") or os.environ.get("PGHOST") or ""
    if params.get("hostaddr") or not host:
        yield {}
        return
    hosts = host.split(",")
    ports = (params.get("port") or os.environ.get("PGPORT") or "5432").split(",")
    unknown: list[str] = []
    for index, name in enumerate(hosts):
        server = {"host": name, "port": ports[index if len(ports) == len(hosts) else 0] or "5432"}
        if not name or name.startswith(("/", "@")):  # a Unix socket
            yield server
            continue
        try:
            addresses = _resolve(name)
        except (OSError, UnicodeError) as error:
            unknown.append(f"{name!r} ({error})")
            continue
        yield from ({**server, "hostaddr": address} for address in addresses)
    if len(unknown) == len(hosts):
        raise DatabaseUnavailable(f"PostgreSQL's host name cannot be resolved: {', '.join(unknown)}")


def _resolve(host: str) -> list[str]:
    """Return the addresses of a host, through the `socket` module as gevent may have patched it."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))
