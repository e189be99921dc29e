"""One browser for this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.support.browsers import running_browser


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """In the place of one a module: to start it takes two seconds of a processor, and no test here uses asyncio."""
    with running_browser() as browser:
        yield browser
