"""The configuration of one app: one table of keys, types, defaults and meanings. No I/O.

`Settings` is that table. The key of a field is `SSE_` and the field's name in capitals. Parsing, error messages and the
table in the README all come from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of value: the expected value in words, and the function that reads it or raises ValueError."""

    expects: str
    parse: Callable[[Any], Any]


# As SSE_LISTEN_URL: read the event log once a second, because LISTEN is not to be had.
POLL = "poll"


def _texts(value: object) -> tuple[str, ...]:
    # A string is split at commas, never iterated: the letters of "news*" include "*", which would open every channel.
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")] if value.strip() else []
    if not isinstance(value, Sequence | set | frozenset) or isinstance(value, bytes):
        raise ValueError
    texts = tuple(value)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError
    return texts


def _origins(value: object) -> tuple[str, ...]:
    origins = tuple(text.lower() for text in _texts(value))
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s*]+", origin):
            raise ValueError
    # In the form that browsers send: without the scheme's default port (RFC 6454, section 6.2).
    return tuple(re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", origin) for origin in origins)


def _web_url(value: object) -> str:
    if not isinstance(value, str) or re.search(r"[\s?#]", value):
        raise ValueError
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError
    return value.rstrip("/")


_MOST = 2**31 - 1  # every browser and every system call accepts a number up to this one


def _whole(value: object) -> int:
    if isinstance(value, str):
        value = int(value)
    if type(value) is not int or not 1 <= value <= _MOST:
        raise ValueError
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError
    return number


def _key_text(value: object) -> object:
    if not isinstance(value, str | bytes) or not value:
        raise ValueError
    return value


def _role(value: object) -> str | None:
    if not isinstance(value, str) or re.search("://|=", value):  # a database's URL belongs to another key
        raise ValueError
    return value or None  # an environment file may have `SSE_LOG_OWNER=`


def _database(value: object) -> object:
    # A string, an object such as SQLAlchemy's URL, or a function. engine/postgres/dsn.py reads it at first use.
    if callable(value):
        inspect.signature(value).bind()  # TypeError if it needs arguments
        if inspect.iscoroutinefunction(value):
            raise ValueError
        return value
    if isinstance(value, str):
        return value if value.strip() else None  # an environment file may have `SSE_DATABASE_URL=`
    if not value or isinstance(value, bool | int | float | bytes):
        raise ValueError
    return value


def _listen(value: object) -> object:
    if isinstance(value, str) and value.strip().lower() == POLL:
        return POLL
    return _database(value)


def _broker(value: object) -> str | None:
    if isinstance(value, str) and value.strip() in ("", "memory://"):
        return value.strip() or None  # an environment file may have `SSE_BROKER_URL=`
    raise ValueError


def switch(value: object) -> bool:
    """Return a boolean, which may also be 0, 1, or one of the words true, false, 1 and 0. Raises ValueError."""
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise ValueError


def _on_off_or(word: str) -> Kind:
    def parse(value: object) -> object:
        return word if isinstance(value, str) and value.lower() == word else switch(value)

    return Kind(f'true, false or "{word}"', parse)


PATTERNS = Kind("a list of patterns, or a string of patterns with commas between them; no pattern may be empty", _texts)
ORIGINS = Kind('a list of origins such as "https://www.example.com" (no path, no wildcard inside), or "*"', _origins)
WEB_URL = Kind("an http:// or https:// URL without query", _web_url)
DATABASE = Kind("a PostgreSQL URL, or a function without arguments that returns it", _database)
LISTEN = Kind(f'{DATABASE.expects}, or "{POLL}"', _listen)
BROKER = Kind('"memory://" (for tests), or not set', _broker)
WHOLE = Kind(f"a whole number from 1 to {_MOST}", _whole)
SECONDS = Kind("a number of seconds greater than 0", _seconds)
ROLE = Kind("the name of a database role", _role)
SECRET = Kind("text or bytes that nobody can guess", _key_text)
ON_OFF_AUTO = _on_off_or("auto")
ON_OFF_ALWAYS = _on_off_or("always")


def _key(default: Any, kind: Kind, help: str) -> Any:
    # Error trackers send the repr() of local variables, which must not contain a password or a key.
    shown = kind not in (DATABASE, LISTEN, BROKER, SECRET)
    return dataclasses.field(default=default, repr=shown, metadata={"kind": kind, "help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The checked settings of one app."""

    channels: tuple[str, ...] = _key(
        (), PATTERNS, "channels that everybody may listen to; `*`, `?` and `[…]` as in `fnmatch`, case counts"
    )
    database_url: Any = _key(  # noqa: RUF009
        None, DATABASE, "the database; else `SQLALCHEMY_DATABASE_URI`, else the environment's `DATABASE_URL`"
    )
    listen_url: Any = _key(  # noqa: RUF009
        None,
        LISTEN,
        "a direct connection for LISTEN, if the database URL leads through PgBouncer; poll: read the log instead",
    )
    allowed_origins: tuple[str, ...] = _key(
        (),
        ORIGINS,
        "origins of other sites whose pages may open streams, with cookies; `*`: all sites, without cookies",
    )
    server_url: str | None = _key(
        None,
        WEB_URL,
        "URL of the streams, if another server has them, with the blueprint's path: `https://live.example.com/sse`",
    )
    secret_key: str | bytes | None = _key(
        None, SECRET, "signs URLs and `disconnect()`; else the app's `SECRET_KEY`; `SECRET_KEY_FALLBACKS` work too"
    )
    event_log: bool | str = _key(
        "auto",
        ON_OFF_AUTO,
        "auto: use the event log if it is installed (`flask sse init`); true: require it; false: do not use it",
    )
    log_owner: str | None = _key(
        None, ROLE, "a database role that the app trusts to own the event log (docs/security.md)"
    )
    retention: float = _key(86400.0, SECONDS, "seconds for which the event log keeps events")
    heartbeat: float = _key(
        15.0, SECONDS, "seconds after which a quiet stream gets a heartbeat, so that proxies keep it open"
    )
    retry: int = _key(3000, WHOLE, "milliseconds a browser waits before it reconnects")
    buffer_bytes: int = _key(
        262144,
        WHOLE,
        "bytes that may wait for one slow client; above that its stream reads the event log, or ends if there is none",
    )
    send_timeout: float = _key(
        30.0, SECONDS, "seconds in which a client must take 16 kB, or all that waits for it; else its stream is cut"
    )
    max_age: float | None = _key(
        None, SECONDS, "seconds after which a stream ends, so that permission is checked again; up to 10 % earlier"
    )
    max_streams: int | None = _key(
        None,
        WHOLE,
        "streams of one worker; by default 90 % of `worker_connections`, `threads` - 1 under gthread, else 1000",
    )
    max_streams_per_client: int | None = _key(
        None, WHOLE, "streams of one client in one worker, counted by its subject or, without a subject, by its address"
    )
    max_channels: int = _key(100, WHOLE, "channels on one stream")
    broker_url: str | None = _key(
        None, BROKER, "`memory://`: events stay in this process, for tests without PostgreSQL"
    )
    direct_write: bool | str = _key(
        True,
        ON_OFF_ALWAYS,
        "true: write to gunicorn's idle streams directly; always: behind middleware too; false: through generators",
    )

    ops_token: str | bytes | None = _key(
        None, SECRET, "opens `/metrics` of `ops_bp` to requests with `Authorization: Bearer` and it (docs/operate.md)"
    )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Read and check the keys of an app's config. None means not set.

        Raises `ConfigurationError`, which names the key, the value and the expected value.
        """
        values = {}
        for entry in dataclasses.fields(cls):
            value = config.get(key_of(entry.name))
            if value is None:
                continue
            kind: Kind = entry.metadata["kind"]
            try:
                values[entry.name] = kind.parse(value)
            except (ValueError, TypeError, OverflowError, KeyError):
                shown = _shown(value, kind)
                raise ConfigurationError(f"{key_of(entry.name)} is {shown}, and must be {kind.expects}.") from None
        settings = cls(**values)
        return settings._with_the_log_required() if settings.listen_url == POLL else settings

    def _with_the_log_required(self) -> Settings:
        if self.event_log is False:
            raise ConfigurationError(
                'SSE_LISTEN_URL is "poll", which reads the event log, and SSE_EVENT_LOG is false. Set SSE_EVENT_LOG to '
                "true, and install the log with flask sse init; or set SSE_LISTEN_URL to a direct connection."
            )
        return dataclasses.replace(self, event_log=True)


def _shown(value: object, kind: Kind) -> str:
    """Return a wrong value for an error message. A value that may contain a password, or a secret, is not shown."""
    if kind is SECRET:
        if isinstance(value, int | float):  # from_prefixed_env() reads JSON
            return f"a value of type {type(value).__name__} (in a FLASK_… variable digits are a number; write '\"…\"')"
        return "empty" if value in ("", b"") else f"a value of type {type(value).__name__}"
    if kind in (DATABASE, LISTEN, BROKER):
        return repr(value) if isinstance(value, bool | int | float) or not value else "that value"
    text = repr(value)
    if re.search(r"://.*@|passw", text, re.IGNORECASE):
        return f"a value of type {type(value).__name__} that may contain a password"
    return text


def key_of(field_name: str) -> str:
    """Return the config key of a field of `Settings`."""
    return "SSE_" + field_name.upper()


# Keys of other packages: flask-sse and invenio-sse have SSE_REDIS_URL, and flask-sse's forks more of this prefix.
_OTHERS = "SSE_REDIS_"


def unknown_keys(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the `SSE_` keys that are no settings, each with a sentence that names the setting that was meant.

    Only names are looked at, because the values may be secrets.
    """
    known = [key_of(entry.name) for entry in dataclasses.fields(Settings)]
    found = {}
    for key in config:
        name = str(key).upper()
        if name.startswith("SSE_") and key not in known and not name.startswith(_OTHERS):
            [meant] = difflib.get_close_matches(name, known, n=1) or [""]
            advice = f"Did you mean {meant}?" if meant else "The README has a table of all settings."
            found[key] = f"{key!r} is not a setting of flask_pg_sse, and changes nothing. {advice}"
    return found


def table() -> Iterator[tuple[str, str, Any, str]]:
    """Yield the key, the expected value, the default and the meaning of every setting, in the table's order."""
    for entry in dataclasses.fields(Settings):
        yield key_of(entry.name), entry.metadata["kind"].expects, entry.default, entry.metadata["help"]


def secret_keys(settings: Settings, config: Mapping[str, Any]) -> Sequence[str | bytes]:
    """Return the keys for signatures, oldest first; no keys if none is configured.

    Raises `ConfigurationError` for a wrong value. A string as `SECRET_KEY_FALLBACKS` is refused, because each of its
    letters would become a key.
    """
    key = settings.secret_key if settings.secret_key is not None else config.get("SECRET_KEY")
    fallbacks = config.get("SECRET_KEY_FALLBACKS") or []
    if not isinstance(fallbacks, Sequence) or isinstance(fallbacks, str | bytes):
        kind = type(fallbacks).__name__
        raise ConfigurationError(f"SECRET_KEY_FALLBACKS is a {kind}, and must be a list of keys.")
    if not key:  # Flask also treats an empty key as no key
        return []
    for name, value in [("SECRET_KEY", key), *(("SECRET_KEY_FALLBACKS", value) for value in fallbacks)]:
        if not isinstance(value, str | bytes) or not value:
            raise ConfigurationError(f"{name} holds {_shown(value, SECRET)}, and must hold {SECRET.expects}.")
    return [*fallbacks, key]


def database_sources(
    settings: Settings, config: Mapping[str, Any], environ: Mapping[str, str]
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the configured databases, first choice first, each as key, value and connect arguments."""
    if settings.database_url is not None:
        yield "SSE_DATABASE_URL", settings.database_url, {}
        return  # a wrong value here is an error; it must not fall back to another database
    if config.get("SQLALCHEMY_DATABASE_URI"):
        options = config.get("SQLALCHEMY_ENGINE_OPTIONS") or {}
        yield "SQLALCHEMY_DATABASE_URI", config["SQLALCHEMY_DATABASE_URI"], options.get("connect_args") or {}
    if environ.get("DATABASE_URL"):
        yield "DATABASE_URL of the environment", environ["DATABASE_URL"], {}
