"""The public names, as a list: everything else may move."""

from __future__ import annotations

import flask_pg_sse
from flask_pg_sse import testing

NAMES = [
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
NAMES_FOR_TESTS = ["Captured", "Disconnected", "Events", "Received", "Stream", "capture", "close", "parse", "stream"]


def test_the_package_exports_these_names() -> None:
    assert sorted(flask_pg_sse.__all__) == NAMES
    assert all(hasattr(flask_pg_sse, name) for name in NAMES)


def test_testing_exports_these_names() -> None:
    assert sorted(testing.__all__) == NAMES_FOR_TESTS
