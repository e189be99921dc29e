"""A PostgreSQL whose clock is the test's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.postgres import Running, execute, scratch

_FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
needs_faketime = pytest.mark.skipif(_FAKETIME is None, reason="apt-get install libfaketime")


@contextmanager
def postgres_with_a_clock(running_postgres: Running) -> Iterator[tuple[str, Callable[[str], None]]]:
    """Run a server; give its URL, and a call that puts its clock off by seconds, as "+3600"."""
    with ExitStack() as stack:
        clock = stack.enter_context(scratch()) / "clock"  # the server runs as another user
        clock.write_text("+0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LD_PRELOAD", str(_FAKETIME))
            patch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
            patch.setenv("FAKETIME_NO_CACHE", "1")
            patch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            url = stack.enter_context(running_postgres()).url()

        def put_off(seconds: str) -> None:
            clock.write_text(seconds)
            [(there,)] = execute(url, "SELECT extract(epoch FROM clock_timestamp())::float8")
            assert abs(there - time.time() - float(seconds)) < 60, "the clock was not set"

        yield url, put_off
