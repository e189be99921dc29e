"""The URL of a Redis or Valkey server, and connections to it: all that engines on such a server have in common.

The client library is redis-py. Only these engines import this module, so nobody else needs the library.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from ..concurrency.forks import close_in_children
from ..errors import ConfigurationError, DatabaseUnavailable
from ..repeats import one_line

try:
    import redis
    from redis.connection import AbstractConnection, parse_url
except ModuleNotFoundError as error:
    raise ConfigurationError("Redis needs the client redis-py: pip install 'flask-pg-sse[redis]'.") from error

_parse_url: Any = parse_url  # has no types
# Seconds in which the server must accept a connection, and answer. A URL may have other ones.
ANSWER_WITHIN = 5.0
# redis-py's names for the schemes.
_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}
# Options of redis-py's pools, and one that changes what is read.
_NOT_OURS = ("max_connections", "timeout", "decode_responses")
# The most characters of a server's message in one of ours.
_MOST_SAID = 200


@dataclass(frozen=True, slots=True)
class Broker:
    """A Redis or Valkey server. Its text has no password. `source` is the setting that has the URL."""

    where: str
    source: str
    _kind: Any = field(repr=False)  # redis-py's class of connections
    _options: Mapping[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return self.where

    def connect(self) -> Any:
        """Return a new connection of redis-py. Raises `DatabaseUnavailable`."""
        connection = self._kind(**self._options)
        try:
            connection.connect()
        except (redis.RedisError, OSError) as error:
            raise self.unavailable(error) from error
        return connection

    def pool(self, size: int) -> Any:
        """Return a pool of redis-py, of at most `size` connections, which open when they are needed."""
        made: Any = redis.BlockingConnectionPool
        return made(size, ANSWER_WITHIN, connection_class=self._kind, **self._options)

    def unavailable(self, error: Exception) -> DatabaseUnavailable:
        """Return an error of redis-py as one line that says what failed, why, and the remedy."""
        said = one_line(error)
        if secret := self._options.get("password"):
            said = said.replace(secret, "***")
        said = said if len(said) <= _MOST_SAID else said[:_MOST_SAID] + " …"
        remedy = f"Check that it runs, and that {self.source} is right (rediss:// is TLS)."
        if isinstance(error, redis.AuthenticationError):
            what, remedy = "refused the login", f"Check the user and the password in {self.source}."
        elif said.startswith("DENIED"):
            what, said = "refused", "it is in protected mode, in which it serves only its own host"
            remedy = f"Set a password there (requirepass), and in {self.source}."
        elif isinstance(error, redis.exceptions.NoPermissionError):
            what, remedy = "refused", f"Give the user in {self.source} that right (ACL SETUSER)."
        elif isinstance(error, redis.InvalidResponse):
            what, remedy = "did not answer as Redis does", f"Check the host and the port in {self.source}."
        elif isinstance(error, _Sentinel):
            what, remedy = "cannot be used", f"Set {self.source} to the primary itself, or to a proxy that leads to it."
        else:
            what = "cannot be reached"
        return DatabaseUnavailable(f"Redis at {self.where} {what}: {said}. {remedy}")


class _Sentinel(redis.RedisError):
    pass


def _begin(connection: Any) -> None:
    """Log in and choose the database, and close the connection whatever prevents it.

    redis-py leaves it open, and its pool would give it to the next caller, if the greenlet is killed meanwhile.
    """
    try:
        if connection.pid != os.getpid():  # in the copy of a greenlet, whose original sends the same
            raise redis.ConnectionError("This process was forked from one in the middle of this command")
        close_in_children(connection._sock)
        connection.on_connect()
        _refuse_sentinel(connection)
    except BaseException as error:
        connection.disconnect()
        if isinstance(error, ValueError | LookupError):  # of a reader that could not read what came
            raise redis.InvalidResponse(str(error)) from error
        raise


def _refuse_sentinel(connection: Any) -> None:
    """Ask the server what it is. A Sentinel lets clients subscribe, and they never hear anything.

    Servers before 6.2 do not know the question without a version.
    """
    connection.send_command("HELLO")
    try:
        said = connection.read_response()
    except redis.ResponseError as error:
        if str(error).startswith("DENIED"):
            raise
        return
    about = said if isinstance(said, dict) else dict(zip(said[::2], said[1::2], strict=True))
    if b"sentinel" in (about.get(b"mode"), str(about.get("mode")).encode()):
        raise _Sentinel("it is a Sentinel, which carries no events")


_IS_NEW = "driver_info" in inspect.signature(AbstractConnection.__init__).parameters  # redis-py 7.2
# RESP2 is the protocol of every server; `?protocol=3` in the URL asks for RESP3. Without a name of the library no
# CLIENT SETINFO is sent, which would take the answer of a server that refuses everybody, and drop it.
_DEFAULTS: Mapping[str, Any] = {
    "protocol": 2,
    "redis_connect_func": _begin,
    "socket_timeout": ANSWER_WITHIN,
    "socket_connect_timeout": ANSWER_WITHIN,
    **({"driver_info": None} if _IS_NEW else {"lib_name": None, "lib_version": None}),
}


def to_broker(url: object, source: str) -> Broker:
    """Read the URL of a server. `source` is the setting that has it. Raises `ConfigurationError`, without the URL."""
    wrong = functools.partial(_wrong, source)
    text = str(url).strip()
    unreadable = wrong("has a host or a port that cannot be read; in a password, write / ? # @ : % as %2F %3F …")
    try:
        parts = urlsplit(text)
    except ValueError:
        raise unreadable from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    _refuse_groups(parts, options, wrong)
    try:
        port = parts.port
    except ValueError:
        raise unreadable from None
    scheme = parts.scheme.lower()
    if scheme not in _SCHEMES:
        raise wrong("must begin with redis://, rediss:// (TLS) or unix://")
    if scheme == "unix":
        if parts.netloc.rpartition("@")[2] or not parts.path.strip("/"):
            raise wrong("must be unix:///the/path/of/the/socket, with three slashes")
        where = parts.path
    else:
        if not re.fullmatch(r"/?([0-9]*)", parts.path):
            raise wrong("has a path that is not the number of a database: redis://host:6379/0")
        where = f"{parts.hostname or 'localhost'}:{port or 6379}"
    try:
        found: dict[str, Any] = _parse_url(_SCHEMES[scheme] + text[len(scheme) :])
        kind = found.pop("connection_class", redis.Connection)
        kept = {**_DEFAULTS, **{name: value for name, value in found.items() if name not in _NOT_OURS}}
        kind(**kept)  # opens nothing
    except (TypeError, ValueError, redis.RedisError):
        raise wrong(f"has options that redis-py does not take, or not so: {', '.join(options)}") from None
    return Broker(where, source, kind, kept)


def _refuse_groups(parts: SplitResult, options: Mapping[str, str], wrong: Any) -> None:
    """Refuse URLs that name several servers."""
    words = f"{parts.scheme.lower()} {' '.join(options).lower()}"
    for group in ("sentinel", "cluster"):
        if group in words:
            raise wrong(f"names a {group.title()}, and must name one server: its primary, or a proxy that leads to it")
    if "," in parts.netloc.rpartition("@")[2] or {"master", "master_name", "service_name"} & options.keys():
        raise wrong("names several servers (Sentinel or Cluster), and must name one: the primary, or a proxy")


def _wrong(source: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"{source} {what}.")
