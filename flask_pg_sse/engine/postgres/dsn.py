"""Convert the configured database to libpq's connection parameters.

The config may have `postgres://…`, SQLAlchemy's `postgresql+driver://…` with its own notation for several hosts, URL
objects, or libpq's own `host=… dbname=…`. https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import sys
import traceback
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

import psycopg2
from psycopg2.extensions import get_wait_callback, make_dsn, parse_dsn

from ...concurrency.greenlets import is_patched
from ...errors import IN_TESTS, ConfigurationError, DatabaseNotConfigured, DatabaseUnavailable
from ...settings import POLL, Settings, database_sources
from ..last_result import LastResult

logger = logging.getLogger(__name__)

_SCHEME = re.compile(r"(?:postgres|postgresql)(?:\+(\w+))?://", re.ASCII)
_KEYWORDS = re.compile(r"\w+\s*=", re.ASCII)
# user:password@hosts/database. As in SQLAlchemy the password may contain a raw "/" or "@". If a part of it were read as
# the host or the port, messages would show it.
_AUTHORITY = re.compile(r"(?:([^:/]*)(?::(.*))?@)?([^@/]*)(?:/([^@]*))?", re.DOTALL)
_HOST = re.compile(r"(?:\[([^]]*)\]|([^:]*))(?::(\d*))?", re.ASCII)
# Error messages may name these engines. Any other word before "://" may be a part of a secret.
_OTHER_ENGINES = ("sqlite", "mysql", "mariadb", "oracle", "mssql", "cockroachdb", "mongodb", "redis")
# These drivers pass the URL's options to libpq. Other drivers have their own options.
_LIBPQ_DRIVERS = ("", "psycopg", "psycopg2", "psycopg2cffi")
# What drivers take that says nothing about where a connection leads and how it is secured.
_DRIVERS_OWN = {
    "async", "async_", "async_fallback", "autocommit", "command_timeout", "connection_class", "connection_factory",
    "context", "cursor_factory", "dsn", "loop", "max_cacheable_statement_size", "max_cached_statement_lifetime",
    "prepare_threshold", "prepared_statement_cache_size", "prepared_statement_name_func", "record_class", "row_factory",
    "server_settings", "startup_params", "statement_cache_size", "tcp_keepalive", "timeout",
}  # fmt: skip

# Returns the SQLAlchemy engines that an app has for its database.
Engines = Callable[[], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Dsn:
    """A database as libpq's connection parameters. Its repr contains no secret.

    If the app has a function that returns the URL, that is `ask`, and `params` is empty.
    """

    source: str
    params: Mapping[str, str] = field(repr=False)
    ask: Callable[[], object] | None = field(default=None, repr=False)

    def current(self) -> Dsn:
        """Return the database with its parameters as they are now: the app's function is asked.

        Raises `DatabaseUnavailable` if the function fails. The error's text is not shown, because it may contain a
        secret.
        """
        if self.ask is None:
            return self
        try:
            url = self.ask()
        except BaseException as error:  # SystemExit or gevent.Timeout too: they must not end the listener
            if isinstance(error, KeyboardInterrupt | GeneratorExit) or type(error).__name__ == "GreenletExit":
                raise
            frame = traceback.extract_tb(error.__traceback__)[:3][-1]  # the line of the function
            raise DatabaseUnavailable(
                f"The function in {self.source} failed: {type(error).__name__} in {frame.filename}, line "
                f"{frame.lineno}. It is asked again at the next attempt to connect."
            ) from None
        return to_dsn(url, f"the result of {self.source}()")

    @property
    def host(self) -> str:
        return self.params.get("host") or self.params.get("hostaddr") or "local socket"

    def __str__(self) -> str:
        if self.ask is not None:
            return f"the result of {self.source}()"
        port = f":{self.params['port']}" if "port" in self.params else ""
        return f"{self.host}{port}, database {self.params.get('dbname', '(default)')}"


def is_postgres(value: object) -> bool:
    """Tell whether a configured value is for PostgreSQL, and not the URL of another engine."""
    text = _as_text(value)
    return bool(_SCHEME.match(text) or _KEYWORDS.match(text))


def to_dsn(value: object, source: str, connect_args: Mapping[str, Any] | None = None) -> Dsn:
    """Convert a URL or connection string. `connect_args` are SQLAlchemy's arguments for the driver's `connect()`.

    Raises `DatabaseNotConfigured` for another engine, and `ConfigurationError` for a value that libpq cannot read. The
    messages do not show the value, because it may contain a password.
    """
    text = _as_text(value)
    if not is_postgres(value):
        scheme = re.split(r"[+:]", text, maxsplit=1)[0]
        engine = f" ({scheme}://…)" if scheme in _OTHER_ENGINES else ""
        key = "SSE_LISTEN_URL" if "SSE_LISTEN_URL" in source else "SSE_DATABASE_URL"
        raise DatabaseNotConfigured(
            f"{source} is not a PostgreSQL URL{engine}. flask_pg_sse needs PostgreSQL: set {key} to "
            f"postgresql://user:password@host/database. {IN_TESTS}"
        )
    try:
        if hasattr(value, "render_as_string"):
            params = _from_url_object(value)
        elif scheme_found := _SCHEME.match(text):
            params = _from_url(text[scheme_found.end() :], scheme_found[1] or "")
        else:
            params = parse_dsn(text)
        params = {**parse_dsn((connect_args or {}).get("dsn") or ""), **params}
        params.update(_libpq_options((connect_args or {}).items(), ignored=_DRIVERS_OWN))
        params = parse_dsn(make_dsn(**params))
        if not re.fullmatch(r"[\d,]*", params.get("port", ""), re.ASCII) or "\0" in text:
            raise ValueError
    except (psycopg2.Error, ValueError) as error:
        hint = _UNKNOWN.format(error.name) if isinstance(error, _UnknownOption) else ""
        raise ConfigurationError(
            f"{source} is not a connection string that libpq can read{hint}. It must look like "
            "postgresql://user:password@host:port/database?sslmode=require, with special characters in the password "
            "percent-encoded (%40 for @)."
        ) from None
    return Dsn(source, params)


_UNKNOWN = (
    " (libpq has no option {!r}; say the same in SSE_DATABASE_URL in libpq's way, for a Unix socket "
    "postgresql:///database?host=/var/run/postgresql)"
)


class _UnknownOption(ValueError):
    def __init__(self, name: str) -> None:
        self.name = name


def _as_text(value: object) -> str:
    # SQLAlchemy's URL prints *** for the password.
    render = getattr(value, "render_as_string", None)
    return str(render(hide_password=False) if render else value).strip()


def _from_url(text: str, driver: str) -> dict[str, str]:
    """Read the part of a URL after the scheme, in libpq's or SQLAlchemy's notation.

    Neither libpq nor SQLAlchemy can read the other's notation.
    """
    head, _, query = text.partition("?")
    parts = _AUTHORITY.fullmatch(head)
    if parts is None:
        raise ValueError
    user, password, hosts, database = (part or "" for part in parts.groups())
    found = {"user": unquote(user), "password": unquote(password), "dbname": unquote(database)}
    found.update(_hosts(_split_host(host) for host in hosts.split(",")))
    # If the password contains a raw "?", the query begins with a part of the password and must not be shown.
    return _with_query(found, parse_qsl(query, keep_blank_values=True), driver, show=("@" not in query))


def _from_url_object(url: Any) -> dict[str, str]:
    """Read the parts of SQLAlchemy's URL object. Its text escapes different parts in different versions."""
    found = {"user": url.username, "password": url.password, "host": url.host, "port": url.port, "dbname": url.database}
    pairs = [
        (key, value) for key, values in url.query.items() for value in ([values] if isinstance(values, str) else values)
    ]
    return _with_query(found, pairs, url.drivername.partition("+")[2], show=True)


def _with_query(found: dict[str, Any], pairs: Iterable[tuple[str, str]], driver: str, *, show: bool) -> dict[str, str]:
    hosts = []
    options = []
    for key, value in pairs:
        if key == "host":  # SQLAlchemy's host=a:5433&host=b:5432
            hosts.append(_split_host(value))
        else:
            options.append((key, value))
    if hosts:
        found.update({key: value for key, value in _hosts(hosts).items() if value})
    try:
        found.update(_libpq_options(options, ignored=() if driver in _LIBPQ_DRIVERS else _DRIVERS_OWN))
    except _UnknownOption:
        if show:
            raise
        raise ValueError from None
    return {key: str(value) for key, value in found.items() if value}


def _split_host(text: str) -> tuple[str, str]:
    """Return the host, and the port or "". A socket directory and a bare IPv6 address may contain colons."""
    parts = _HOST.fullmatch(text)
    if parts:
        return unquote(parts[1] or parts[2] or ""), parts[3] or ""
    if not text.startswith("/"):
        ipaddress.IPv6Address(text)  # ValueError for any other text
    return text, ""


def _hosts(hosts: Iterable[tuple[str, str]]) -> dict[str, str]:
    names, ports = zip(*hosts, strict=True)
    return {"host": ",".join(names), "port": ",".join(ports) if any(ports) else ""}


def _libpq_options(options: Iterable[tuple[str, Any]], *, ignored: Collection[str]) -> Iterable[tuple[str, str]]:
    """Yield options under libpq's names, without the `ignored` ones. Raises `_UnknownOption` for any other."""
    for key, value in options:
        if value is None or key in ignored:
            continue
        if key in ("ssl", "ssl_context"):  # asyncpg's and pg8000's options, which may also be an SSLContext
            modes = {"true": "require", "false": "disable"}
            text = str(value).lower()
            yield "sslmode", modes.get(text, text if isinstance(value, str) else "require")
        elif key == "database":
            yield "dbname", str(value)
        elif not _is_libpq_option(key):
            raise _UnknownOption(key)
        else:
            yield key, str(value)


def _is_libpq_option(key: str) -> bool:
    try:
        make_dsn(**{key: "1"})
    except (psycopg2.Error, TypeError):
        return False
    return True


def _to_asked(value: Any, source: str) -> Dsn | None:
    if not callable(value):
        return None
    try:
        reference: Callable[[], Callable[[], object] | None] = weakref.ref(value)  # the app's settings keep it
    except TypeError:  # an object of C, or with __slots__
        reference = lambda: value  # noqa: E731
    return Dsn(source, {}, LastResult(reference, None))


_NO_DATABASE = (
    "No PostgreSQL database is configured for flask_pg_sse. Set SSE_DATABASE_URL (or SQLALCHEMY_DATABASE_URI, or the "
    f"environment's DATABASE_URL) to postgresql://user:password@host/database. {IN_TESTS}"
)


def configured_databases(
    settings: Settings, config: Mapping[str, Any], engines: Engines = tuple
) -> tuple[Dsn, Dsn | None]:
    """Return the database to notify and the database to listen to, from an app's config, and log both.

    The second is None if the event log must be read from the first instead. `engines` returns the SQLAlchemy engines
    that the app has for its database.

    Raises `DatabaseNotConfigured` and `ConfigurationError`.
    """
    sources = list(database_sources(settings, config, os.environ))
    if not sources:
        raise DatabaseNotConfigured(_NO_DATABASE)
    # If none is PostgreSQL's, the first one is named in the error.
    source, value, connect_args = next((one for one in sources if callable(one[1]) or is_postgres(one[1])), sources[0])
    dsn = _to_asked(value, source) or to_dsn(value, source, connect_args)
    if source == "SQLALCHEMY_DATABASE_URI":
        _warn_of_psycopg2(value)
        _warn_of_found_passwords(dsn, config.get("SQLALCHEMY_ENGINE_OPTIONS") or {}, engines)
    listen: Dsn | None = dsn
    if settings.listen_url == POLL:
        listen = None
        logger.info("Reading the event log once a second, without LISTEN (SSE_LISTEN_URL is %r).", POLL)
    elif settings.listen_url is not None:
        listen = _to_asked(settings.listen_url, "SSE_LISTEN_URL") or to_dsn(settings.listen_url, "SSE_LISTEN_URL")
        logger.info("Listening at %s (from SSE_LISTEN_URL).", listen)
    logger.info("Using PostgreSQL at %s (from %s).", dsn, dsn.source)
    return dsn, listen


# What an app's queries do under gevent, and the remedy.
PSYCOPG2 = (
    "SQLALCHEMY_DATABASE_URI uses psycopg2. Each query then stops the whole gevent worker, with all streams, until "
    "PostgreSQL answers. Use psycopg 3 (postgresql+psycopg://), or call psycogreen.gevent.patch_psycopg()."
)


def _warn_of_psycopg2(url: Any) -> None:
    """Warn if the app's own queries will stop all its streams, as far as that can be known."""
    if is_patched() and get_wait_callback() is None and uses_psycopg2(url):
        logger.warning(PSYCOPG2)


def _warn_of_found_passwords(dsn: Dsn, options: Mapping[str, Any], engines: Engines) -> None:
    """Warn if the app's engine connects in a way of its own, so that the URL alone will not do."""
    made = list(engines())
    how = ""
    if options.get("creator") or any(_creator_of(engine) != "sqlalchemy.engine.create" for engine in made):
        how = "creator"
    elif "password" not in dsn.params and any(engine.dialect.dispatch.do_connect for engine in made):
        how = "do_connect"
    if how:
        logger.warning(
            "The app's SQLAlchemy engine finds its password by %s, which flask_pg_sse does not call. Set "
            "SSE_DATABASE_URL to a function that returns the URL, with the password of the moment.",
            how,
        )


def _creator_of(engine: Any) -> str:
    """Return the module of the function that an engine connects with."""
    return str(getattr(engine.pool._creator, "__module__", ""))


def uses_psycopg2(url: Any) -> bool:
    """Tell whether SQLAlchemy, if it is in use, takes psycopg2 for this URL."""
    sqlalchemy: Any = sys.modules.get("sqlalchemy")
    if sqlalchemy is None:
        return False
    try:
        return bool(sqlalchemy.engine.make_url(url).get_driver_name() == "psycopg2")
    except (ValueError, sqlalchemy.exc.SQLAlchemyError):  # it cannot use this URL at all
        return False
