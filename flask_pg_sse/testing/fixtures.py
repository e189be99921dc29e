"""A fixture of pytest for the tests of apps. In the `conftest.py` of the root folder:

pytest_plugins = ["flask_pg_sse.testing.fixtures"]
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask

from .capture import Events, capture


@pytest.fixture
def sse_events(app: Flask) -> Iterator[Events]:
    """The events that `app`, a fixture of yours, sends in this test, by `capture()`: no database is needed."""
    with capture(app) as events:
        yield events
