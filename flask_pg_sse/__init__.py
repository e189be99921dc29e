"""Real-time web pages for Flask, with the PostgreSQL that you already run.

The blueprint `sse_bp` streams Server-Sent Events, and `notify()` sends one; see the README. Importing the package
starts nothing and connects to nothing.
"""

from __future__ import annotations

from .cli import commands as _commands  # noqa: F401  # gives sse_bp its commands
from .cli.doctor import command as _doctor  # noqa: F401
from .engine.postgres.schema import drop_schema_sql, include_name, schema_sql
from .engine.postgres.triggers import drop_trigger_sql, trigger_sql
from .errors import (
    ConfigurationError,
    DatabaseNotConfigured,
    DatabaseUnavailable,
    EventLogMissing,
    InvalidChannel,
    InvalidEvent,
    PayloadTooLarge,
    PermissionDenied,
    PgSSEError,
)
from .web.api import disconnect, notify, notify_many, postgres_notify, sse_cursor, sse_url
from .web.blueprint import sse_bp
from .web.extension import PgSSE
from .web.ops import ops_bp

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "DatabaseNotConfigured",
    "DatabaseUnavailable",
    "EventLogMissing",
    "InvalidChannel",
    "InvalidEvent",
    "PayloadTooLarge",
    "PermissionDenied",
    "PgSSE",
    "PgSSEError",
    "disconnect",
    "drop_schema_sql",
    "drop_trigger_sql",
    "include_name",
    "notify",
    "notify_many",
    "ops_bp",
    "postgres_notify",
    "schema_sql",
    "sse_bp",
    "sse_cursor",
    "sse_url",
    "trigger_sql",
]
