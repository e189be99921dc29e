"""From what users configure to what libpq accepts.

Users write `postgres://…`, SQLAlchemy's `postgresql+driver://…` with its own way to name several hosts, URL objects, or
libpq's own `host=… dbname=…`. https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from ...errors import ConfigurationError, DatabaseNotConfigured

_SCHEME = re.compile(r"(?:postgres|postgresql)(?:\+(\w+))?://", re.ASCII)
_KEYWORDS = re.compile(r"\w+\s*=", re.ASCII)
# user:password@hosts/database. As in SQLAlchemy the password may hold a raw "/" or "@": a piece of it that was taken
# for the host or the port would be shown.
_AUTHORITY = re.compile(r"(?:([^:/]*)(?::(.*))?@)?([^@/]*)(?:/([^@]*))?", re.DOTALL)
_HOST = re.compile(r"(?:\[([^]]*)\]|([^:]*))(?::(\d*))?", re.ASCII)
# The engines that an error may name. Another word before "://" may be a piece of a secret.
_OTHER_ENGINES = ("sqlite", "mysql", "mariadb", "oracle", "mssql", "cockroachdb", "mongodb", "redis")
# Drivers that hand the URL's options to libpq. The others have options of their own, which mean nothing here.
_LIBPQ_DRIVERS = ("", "psycopg", "psycopg2", "psycopg2cffi")


@dataclass(frozen=True, slots=True)
class Dsn:
    """A database as libpq's connection parameters. Its repr shows no secret."""

    source: str
    params: Mapping[str, str] = field(repr=False)

    @property
    def host(self) -> str:
        return self.params.get("host") or self.params.get("hostaddr") or "local socket"

    def __str__(self) -> str:
        port = f":{self.params['port']}" if "port" in self.params else ""
        return f"{self.host}{port}, database {self.params.get('dbname', '(default)')}"


def is_postgres(value: object) -> bool:
    """Tell whether a configured value means a PostgreSQL database; other engines' URLs do not."""
    text = _as_text(value)
    return bool(_SCHEME.match(text) or _KEYWORDS.match(text))


def to_dsn(value: object, source: str, connect_args: Mapping[str, Any] | None = None) -> Dsn:
    """Convert a URL or connection string. `connect_args` are SQLAlchemy's, for the driver's `connect()`.

    Raises `DatabaseNotConfigured` for other engines and `ConfigurationError` for what libpq cannot read. Neither shows
    the value: it may hold a password.
    """
    text = _as_text(value)
    if not is_postgres(value):
        scheme = re.split(r"[+:]", text, maxsplit=1)[0]
        engine = f" ({scheme}://…)" if scheme in _OTHER_ENGINES else ""
        raise DatabaseNotConfigured(
            f"{source} is not a PostgreSQL URL{engine}. LISTEN and NOTIFY are PostgreSQL's: set SSE_DATABASE_URL to "
            "postgresql://user:password@host/database."
        )
    try:
        if hasattr(value, "render_as_string"):
            params = _from_url_object(value)
        elif scheme_found := _SCHEME.match(text):
            params = _from_url(text[scheme_found.end() :], scheme_found[1] or "")
        else:
            params = parse_dsn(text)
        params.update(_known_options((connect_args or {}).items()))
        params = parse_dsn(make_dsn(**params))
        if not re.fullmatch(r"[\d,]*", params.get("port", ""), re.ASCII) or "\0" in text:
            raise ValueError
    except (psycopg2.Error, ValueError) as error:
        hint = f" (libpq has no option {error.name!r})" if isinstance(error, _UnknownOption) else ""
        raise ConfigurationError(
            f"{source} is not a connection string that libpq can read{hint}. Expected "
            "postgresql://user:password@host:port/database?sslmode=require or the like, with special characters in the "
            "password percent-encoded (%40 for @)."
        ) from None
    return Dsn(source, params)


class _UnknownOption(ValueError):
    def __init__(self, name: str) -> None:
        self.name = name


def _as_text(value: object) -> str:
    # SQLAlchemy's URL prints *** for the password.
    render = getattr(value, "render_as_string", None)
    return str(render(hide_password=False) if render else value).strip()


def _from_url(text: str, driver: str) -> dict[str, str]:
    """Read what follows the scheme, in libpq's notation or SQLAlchemy's: neither's reader takes the other's."""
    head, _, query = text.partition("?")
    parts = _AUTHORITY.fullmatch(head)
    if parts is None:
        raise ValueError
    user, password, hosts, database = (part or "" for part in parts.groups())
    found = {"user": unquote(user), "password": unquote(password), "dbname": unquote(database)}
    found.update(_hosts(_split_host(host) for host in hosts.split(",")))
    # Behind a "?" in the password, not percent-encoded, comes a piece of it.
    return _with_query(found, parse_qsl(query, keep_blank_values=True), driver, show=("@" not in query))


def _from_url_object(url: Any) -> dict[str, str]:
    """Read SQLAlchemy's URL by its parts: which of them its text has escaped differs between versions."""
    found = {"user": url.username, "password": url.password, "host": url.host, "port": url.port, "dbname": url.database}
    pairs = [
        (key, value) for key, values in url.query.items() for value in ([values] if isinstance(values, str) else values)
    ]
    return _with_query(found, pairs, url.drivername.partition("+")[2], show=True)


def _with_query(found: dict[str, Any], pairs: Iterable[tuple[str, str]], driver: str, *, show: bool) -> dict[str, str]:
    hosts = []
    options = []
    for key, value in pairs:
        if key == "host":  # host=a:5433&host=b:5432 of SQLAlchemy
            hosts.append(_split_host(value))
        elif driver in _LIBPQ_DRIVERS and not dict(_known_options([(key, value)])):
            raise _UnknownOption(key) if show else ValueError
        else:
            options.append((key, value))
    if hosts:
        found.update({key: value for key, value in _hosts(hosts).items() if value})
    found.update(_known_options(options))
    return {key: str(value) for key, value in found.items() if value}


def _split_host(text: str) -> tuple[str, str]:
    """Return host and port, if any; a socket directory and a bare IPv6 address may hold colons."""
    parts = _HOST.fullmatch(text)
    if parts:
        return unquote(parts[1] or parts[2] or ""), parts[3] or ""
    if not text.startswith("/"):
        ipaddress.IPv6Address(text)  # ValueError if it is none
    return text, ""


def _hosts(hosts: Iterable[tuple[str, str]]) -> dict[str, str]:
    names, ports = zip(*hosts, strict=True)
    return {"host": ",".join(names), "port": ",".join(ports) if any(ports) else ""}


def _known_options(options: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, str]]:
    """Yield the options that mean something to libpq, under its names."""
    for key, value in options:
        if value is None:
            continue
        if key == "ssl":  # asyncpg's, which may also be an SSLContext
            modes = {"true": "require", "false": "disable"}
            text = str(value).lower()
            yield "sslmode", modes.get(text, text if isinstance(value, str) else "require")
        elif key == "database":
            yield "dbname", str(value)
        elif _is_libpq_option(key):
            yield key, str(value)


def _is_libpq_option(key: str) -> bool:
    try:
        make_dsn(**{key: "1"})
    except (psycopg2.Error, TypeError):
        return False
    return True
