"""What holds for every test. The fixtures that start servers and browsers are in tests/support."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from flask import Flask

from flask_pg_sse import sse_bp
from flask_pg_sse.hub import worker
from flask_pg_sse.server import rundir
from tests.support.client import eventually

pytest_plugins = [
    "tests.support.browsers", "tests.support.postgres", "tests.support.cluster", "tests.support.servers",
    "tests.support.proxies", "tests.support.redis",
]  # fmt: skip
# A busy machine is no bug: a test that says how long something may take measures that itself.
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")
# A job in the background of a shell ignores Ctrl-C, and so would the programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
COLLECTED = pytest.StashKey[list[pytest.Item]]()  # before any are left out


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too (tests/README.md)")
    parser.addoption("--postgres", metavar="VERSION", help="a PostgreSQL in the wheel's place: 14, 15, 16 or 17")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are marked slow, except with --all or -m, and in a file that the command line names."""
    config.stash[COLLECTED] = list(items)
    if config.option.all or config.option.markexpr:
        return
    named = {(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args}
    left_out = {item for item in items if item.get_closest_marker("slow") and item.path not in named}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Fail a test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield

    def left() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in before]

    try:
        eventually(lambda: not left(), 5)
    except AssertionError:
        raise AssertionError(f"threads are left: {left()}") from None


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's own databases out of the tests."""
    for name in list(os.environ):
        if name in ("DATABASE_URL", "REDIS_URL", "RELAY_USE_PG") or name.startswith(("PG", "FLASK_", "SSE_")):
            monkeypatch.delenv(name)


@pytest.fixture
def make_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Flask]]:
    """Make apps with the blueprint and open channels, or hooks; what they start is ended after the test.

    However a test opens its first stream, that waits for LISTEN as `stream()` does, on a busy machine too.
    """
    monkeypatch.setattr(worker, "_MOMENT", worker._MOMENT_IN_TESTS)
    apps: list[Flask] = []

    def make(database_url: str | None = None, /, *, authorize: Any = None, subject: Any = None, **config: Any) -> Flask:
        app = Flask("tests")
        app.config.update(TESTING=True, SSE_CHANNELS=["*"], SSE_DATABASE_URL=database_url)
        app.config.update(config)
        app.register_blueprint(sse_bp, authorize=authorize, subject=subject)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.extensions["pg_sse"].close()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With NO_SKIPS=1, as in CI, a skipped test fails the run: it would be green without having looked."""
    with contextlib.suppress(OSError):  # each test's database is an app of its own, of which a directory stays
        rundir.forget_apps(unused_for=600)
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("NO_SKIPS") == "1" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
