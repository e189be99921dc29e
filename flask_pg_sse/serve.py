"""The server that stands alone: the streams without an app of yours, configured by environment variables alone.

`gunicorn -k gevent flask_pg_sse.serve:app` serves it, and `flask-pg-sse serve` is the same thing. It understands the
URLs and the variables of sse_relay_server and sse_server_postgres_listen_notify: docs/migrate.md has them all.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from flask import Flask, abort
from flask.helpers import get_load_dotenv

from .errors import ConfigurationError, DatabaseNotConfigured
from .server.gunicorn import cannot_boot
from .settings import ORIGINS, Settings, switch
from .web.blueprint import sse_bp
from .web.health import HEALTH
from .web.ops import ops_bp
from .web.state import State, state_of

logger = logging.getLogger(__name__)

# `flask sse doctor` says the same.
OPEN_TO_ALL = "All channels are open to everybody who reaches this server."
LOSSY = (
    "Events come from Redis at %s, whose pub/sub keeps nothing: a client or a worker that is not connected when an "
    "event is sent misses it."
)

_TRACE = 5
# As gunicorn's own lines.
_LOG_FORMAT = "[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s"
_TIME_FORMAT = "%Y-%m-%d %H:%M:%S %z"

# Every path is a channel. These are what browsers and scanners ask for by themselves: each would be a stream that
# nobody reads, and a LISTEN.
_NO_CHANNEL = re.compile(r"(favicon\.ico|robots\.txt)\Z|apple-touch-icon|(.*/)?\.|.*\.php\Z", re.IGNORECASE | re.DOTALL)


def read_environment() -> None:
    """Add the variables of the file `.env` in the working directory to the environment, where they are not set there.

    As Flask does it, with python-dotenv; `FLASK_SKIP_DOTENV=1` leaves the file alone. Raises `ConfigurationError`, also
    if there is such a file and python-dotenv is not installed: the file may be what closes the channels.
    """
    if not get_load_dotenv() or not os.path.exists(".env"):
        return
    try:
        from dotenv import load_dotenv

        load_dotenv(".env", encoding="utf-8")
    except ImportError:
        raise ConfigurationError(
            "The file .env cannot be read without python-dotenv: pip install 'flask-pg-sse[dotenv]'. To leave the file "
            "alone, set FLASK_SKIP_DOTENV=1."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The file .env cannot be read: {error}. Correct it, or remove it.") from None


def create_app(environ: Mapping[str, str]) -> Flask:
    """Return the app that the environment describes. Raises `ConfigurationError` for a wrong value.

    Without `SSE_CHANNELS`, a key for signed URLs or an authorizer, all channels are open.
    """
    app = Flask(__name__, static_folder=None)
    app.config.update(_config(environ))
    app.debug = _switch(environ, "RELAY_SERVER_DEBUG")
    app.url_value_preprocessor(_read_path)
    for name, view in _HEALTH.items():
        app.add_url_rule(f"/{name}", name, view)
    app.register_blueprint(sse_bp, url_prefix="/")
    names = set(_HEALTH)
    if environ.get("SSE_OPS_TOKEN"):
        app.register_blueprint(ops_bp)
        names.add("metrics")
    state = state_of(app)
    if environ.get("REDIS_URL") and not _switch(environ, "RELAY_USE_PG"):
        state.runtime.use_redis(environ["REDIS_URL"], "REDIS_URL")
    state.open_unless_asked = "SSE_CHANNELS" not in environ and not state.runtime.keys()
    # Only PostgreSQL's senders fold names.
    state.hears_unquoted = state.runtime.settings.broker_url is None and state.runtime.redis is None
    state.no_channels = frozenset(names)
    return app


# `healthz` is what others call it.
_HEALTH = {**HEALTH, "healthz": HEALTH["readyz"]}


def check_database(app: Flask) -> None:
    """Raise `ConfigurationError` if the app has no database to listen to."""
    state = state_of(app)
    if state.runtime.redis is not None or state.runtime.settings.broker_url is not None:
        return
    if not (os.environ.get("DATABASE_URL") or app.config.get("SSE_DATABASE_URL")):
        raise DatabaseNotConfigured(
            "No database is configured: set DATABASE_URL to postgresql://user:password@host/database, in the "
            "environment or in the file .env."
        )
    state.runtime.databases()


def log_level(environ: Mapping[str, str]) -> int:
    """Return the level that `LOG_LEVEL` names. Raises `ConfigurationError`."""
    logging.addLevelName(_TRACE, "TRACE")
    name = environ.get("LOG_LEVEL") or "INFO"
    level = logging.getLevelName(name.upper())
    if not isinstance(level, int):
        raise ConfigurationError(f"LOG_LEVEL is {name!r}, and must be CRITICAL, ERROR, WARNING, INFO, DEBUG or TRACE.")
    return level


# Empty, other variables count as not set, as compose files set them (`${SSE_RETRY:-}`). These two would then open all.
_CLOSING = ("SSE_CHANNELS", "SSE_SECRET_KEY")


def _config(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the app's config: every `SSE_` variable by its name, and the older projects' variables."""
    config: dict[str, Any] = {
        name: value for name, value in environ.items() if name.startswith("SSE_") and (value or name in _CLOSING)
    }
    if "SSE_ALLOWED_ORIGINS" not in config and "ALLOWED_ORIGINS" in environ:
        # sse_relay_server ignored what is empty between two commas.
        origins = [origin.strip() for origin in environ["ALLOWED_ORIGINS"].split(",") if origin.strip()]
        try:
            Settings.from_config({"SSE_ALLOWED_ORIGINS": origins})
        except ConfigurationError:
            raise ConfigurationError(
                f"ALLOWED_ORIGINS is {environ['ALLOWED_ORIGINS']!r}, and must be {ORIGINS.expects}."
            ) from None
        config["SSE_ALLOWED_ORIGINS"] = origins
    return config


def _switch(environ: Mapping[str, str], name: str) -> bool:
    try:
        return switch(environ.get(name) or False)
    except ValueError:
        raise ConfigurationError(f"{name} is {environ[name]!r}, and must be true or false.") from None


def _read_path(endpoint: str | None, values: dict[str, Any] | None) -> None:
    """Refuse the paths that are no channels, and read `/channel=orders`, as sse_relay_server's README has it."""
    path = (values or {}).get("channel")
    if path is not None and values is not None:
        if _NO_CHANNEL.match(path):
            abort(404)
        values["channel"] = path.removeprefix("channel=")


def as_commands_are_called_here(text: str) -> str:
    """Return a text of the package with the commands as they are called without an app."""
    return text.replace("flask sse ", "flask-pg-sse ")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return as_commands_are_called_here(super().format(record))


def _serve() -> Flask:
    """Return the app for this process, with its log set up."""
    read_environment()
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(_LOG_FORMAT, _TIME_FORMAT))
    logging.basicConfig(level=log_level(os.environ), handlers=[handler])
    app = create_app(os.environ)
    check_database(app)
    _say_what_is_open(state_of(app))
    _say_what_is_lost(state_of(app))
    return app


def _say_what_is_lost(state: State) -> None:
    if state.runtime.redis is not None:
        logger.warning(f"{LOSSY} With PostgreSQL and its event log none is missed.", state.runtime.redis)


def _say_what_is_open(state: State) -> None:
    if state.open_to_all(sse_bp.default_authorize):
        logger.warning(
            "%s To close them, set SSE_CHANNELS to those that may stay open, or SSE_SECRET_KEY for signed URLs.",
            OPEN_TO_ALL,
        )


def __getattr__(name: str) -> Any:
    """Make `app` when it is asked for first, so that the command can look at the environment before."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return globals().setdefault("app", _serve())
    except ConfigurationError as error:
        raise cannot_boot(str(error)) from None
