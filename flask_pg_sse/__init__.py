"""Real-time web pages for Flask out of the PostgreSQL you already run.

`sse_bp` is the blueprint that streams Server-Sent Events, `notify()` sends one; see the README. Importing the package
starts nothing and connects to nothing.
"""

from __future__ import annotations

from .blueprint import sse_bp
from .errors import (
    ConfigurationError,
    DatabaseNotConfigured,
    DatabaseUnavailable,
    EventLogMissing,
    InvalidChannel,
    InvalidEvent,
    PayloadTooLarge,
    PgSSEError,
)
from .extension import PgSSE, notify, notify_many, postgres_notify, sse_cursor, sse_url

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "DatabaseNotConfigured",
    "DatabaseUnavailable",
    "EventLogMissing",
    "InvalidChannel",
    "InvalidEvent",
    "PayloadTooLarge",
    "PgSSE",
    "PgSSEError",
    "notify",
    "notify_many",
    "postgres_notify",
    "sse_bp",
    "sse_cursor",
    "sse_url",
]
