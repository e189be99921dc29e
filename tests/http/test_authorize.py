"""The app's own functions: who a client is, and what it may listen to."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import flask_login  # type: ignore[import-untyped]
import pytest
from flask import Flask, abort, g, has_request_context, redirect, request, session
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Mapped, mapped_column

from flask_pg_sse import PgSSE, notify, sse_bp
from flask_pg_sse.testing import stream
from flask_pg_sse.web.blueprint import SSEBlueprint
from tests.support.client import request as http
from tests.support.postgres import members
from tests.support.servers import WebServer

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., WebServer]


@pytest.fixture
def app_with(database_url: str, make_app: Callable[..., Flask]) -> Callable[..., Flask]:
    """Make an app whose blueprint gets the hooks."""

    def make(*, channels: Any = (), testing: bool = True, **hooks: Any) -> Flask:
        return make_app(database_url, SECRET_KEY="x", SSE_CHANNELS=list(channels), TESTING=testing, **hooks)

    return make


def status(app: Flask, url: str = "/sse?channel=orders", **options: Any) -> int:
    """Return the status; 200 only for a stream that has really opened."""
    with app.test_client().get(url, **options) as response:
        if response.status_code == 200:
            pieces = iter(response.iter_encoded())
            block = next(pieces) + next(pieces)
            assert b"event: sse-open" in block, block
        return response.status_code


# -- the authorizer


def test_true_opens_and_false_refuses(app_with: Callable[..., Flask]) -> None:
    app = app_with(authorize=lambda channel: channel == "orders")
    assert status(app) == 200
    assert status(app, "/sse/orders") == 200
    assert status(app, "/sse?channel=secret") == 403
    assert status(app, "/sse?channel=orders&channel=secret") == 403


class Truthy:
    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("answer", [None, 1, "yes", "True", [True], Truthy(), 0, "", object(), b"secret: hunter2"])
def test_only_true_opens(app_with: Callable[..., Flask], caplog: pytest.LogCaptureFixture, answer: Any) -> None:
    def may_listen(channel: str) -> Any:
        return answer

    assert status(app_with(authorize=may_listen)) == 403
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "may_listen()" in record.message and type(answer).__name__ in record.message
    assert "hunter2" not in record.message


def test_false_is_no_error(app_with: Callable[..., Flask], caplog: pytest.LogCaptureFixture) -> None:
    assert status(app_with(authorize=lambda channel: False)) == 403
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_it_is_asked_once_for_each_channel_that_is_not_open_already(app_with: Callable[..., Flask]) -> None:
    asked: list[str] = []

    def may_listen(channel: str) -> bool:
        asked.append(channel)
        return True

    app = app_with(channels=["news", "room-*"], authorize=may_listen)
    query = "channel=a&channel=news&channel=b&channel=a&channel=room-7"
    assert status(app, f"/sse?{query}") == 200
    assert asked == ["a", "b"]
    asked.clear()
    assert status(app, "/sse?channel=flask_pg_sse") == 400
    assert status(app, "/sse?channel=a%00") == 400
    assert asked == [], "reserved and illegal names come before any rule"
    with app.test_client().head("/sse?channel=a") as response:
        assert response.status_code == 200
    assert asked == ["a"], "HEAD is asked as GET is"


def test_it_runs_in_the_one_context_of_the_request(app_with: Callable[..., Flask]) -> None:
    contexts: list[object] = []
    torn_down: list[object] = []

    def may_listen(channel: str) -> bool:
        assert has_request_context()
        g.setdefault("token", uuid.uuid4())
        contexts.append(g.token)
        return session.get("user") == "ann" and request.args.getlist("channel") == ["a", "b"]

    app = app_with(authorize=may_listen)
    app.teardown_request(lambda error: torn_down.append(g.get("token")))

    @app.get("/login")
    def login() -> str:
        session["user"] = "ann"
        return ""

    client = app.test_client()
    assert client.get("/sse?channel=a&channel=b").status_code == 403
    client.get("/login")
    contexts.clear()
    torn_down.clear()
    events = stream(client, "/sse?channel=a&channel=b")
    assert next(events).event == "sse-open"
    assert len(contexts) == 2 and len(set(contexts)) == 1
    assert torn_down == contexts[:1], "the context has ended before the stream's first byte"
    events.close()


def test_http_exceptions_are_the_answer(app_with: Callable[..., Flask]) -> None:
    def may_listen(channel: str) -> bool:
        abort(int(channel))

    app = app_with(authorize=may_listen)
    assert [status(app, f"/sse?channel={code}") for code in (401, 403, 404, 429)] == [401, 403, 404, 429]
    own = app_with(authorize=may_listen)
    own.register_error_handler(401, lambda error: ("log in first", 401))
    assert own.test_client().get("/sse?channel=401").text == "log in first"


@pytest.mark.parametrize("hook", ["authorize", "subject"])
@pytest.mark.parametrize("testing", [True, False])
def test_a_function_that_fails_refuses_for_the_moment(
    app_with: Callable[..., Flask], caplog: pytest.LogCaptureFixture, hook: str, testing: bool
) -> None:
    """The database may be away: a browser comes back after this, and never after a 500."""

    def broken(*args: str) -> bool:
        raise ValueError("postgresql://u:hunter2@h/d")

    app = app_with(testing=testing, channels=["orders"] if hook == "subject" else [], **{hook: broken})
    with app.test_client().get("/sse?channel=orders") as response:
        assert (response.status_code, response.mimetype) == (200, "text/event-stream")
        assert '{"reason": "unavailable"}' in response.get_data(as_text=True)
        assert "hunter2" not in response.get_data(as_text=True) and "Traceback" not in response.get_data(as_text=True)
    assert "broken() failed" in caplog.text


def test_login_required_on_the_authorizer_lets_nobody_in_by_mistake(
    app_with: Callable[..., Flask], caplog: pytest.LogCaptureFixture
) -> None:
    """It answers with a redirect, or with the 401 of the app's handler, in the function's place."""

    @flask_login.login_required  # type: ignore[untyped-decorator]
    def may_listen(channel: str) -> bool:
        return channel == f"user-{flask_login.current_user.get_id()}"

    def login_app(**options: Any) -> Flask:
        app = app_with(authorize=may_listen)
        manager = flask_login.LoginManager(app)
        for name, value in options.items():
            setattr(manager, name, value)

        class User(flask_login.UserMixin):  # type: ignore[misc]
            def __init__(self, id: str) -> None:
                self.id = id

        manager.user_loader(User)

        @app.get("/login/<id>", endpoint="login")
        def login(id: str) -> str:
            flask_login.login_user(User(id))
            return ""

        @app.get("/logout")
        def logout() -> str:
            flask_login.logout_user()
            return ""

        return app

    app = login_app()
    client = app.test_client()
    assert client.get("/sse?channel=user-7").status_code == 401
    client.get("/login/7")
    events = stream(client, "/sse?channel=user-7")
    assert next(events).event == "sse-open"
    events.close()
    assert client.get("/sse?channel=user-8").status_code == 403
    client.get("/logout")
    assert client.get("/sse?channel=user-7").status_code == 401
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

    redirecting = login_app(unauthorized_callback=lambda: redirect("/login/0"))
    with redirecting.test_client().get("/sse?channel=user-7") as response:
        assert response.status_code == 403 and "Location" not in response.headers
    assert "only True opens it" in caplog.text and "login_required" in caplog.text


# -- whose stream it is


@pytest.mark.parametrize("answer", ["7", 7, uuid.UUID(int=7), "é", "x" * 255, None])
def test_subjects(app_with: Callable[..., Flask], answer: Any) -> None:
    assert status(app_with(channels=["*"], subject=lambda: answer)) == 200


@pytest.mark.parametrize("answer", ["", "x" * 256, "\ud800", True, 7.0, b"7", ["7"], object(), Truthy()])
def test_subjects_that_are_none_refuse(
    app_with: Callable[..., Flask], caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    with app_with(channels=["*"], subject=lambda: answer).test_client().get("/sse?channel=a") as response:
        assert response.status_code == 403 and "whose stream" in response.get_data(as_text=True)
    assert "A stream was refused: subject" in caplog.text


def test_a_subject_opens_nothing(app_with: Callable[..., Flask]) -> None:
    assert status(app_with(subject=lambda: "admin")) == 403


# -- where they are set


def test_each_app_has_its_own(app_with: Callable[..., Flask]) -> None:
    first, second = (
        app_with(authorize=lambda channel: channel == "a"),
        app_with(authorize=lambda channel: channel == "b"),
    )
    third = app_with()
    found = [[status(app, f"/sse?channel={name}") for name in "ab"] for app in (first, second, third)]
    assert found == [[200, 403], [403, 200], [403, 403]]


def test_on_the_extension_object(database_url: str) -> None:
    sse = PgSSE(authorize=lambda channel: channel == "a", subject=lambda: "7", database_url=database_url)
    app = Flask("tests")
    sse.init_app(app)
    assert [status(app, f"/sse?channel={name}") for name in "ab"] == [200, 403]
    sse.close()


@pytest.mark.parametrize("hook", ["authorize", "subject"])
@pytest.mark.parametrize("wrong", ["may_listen", True, 5, {"a": True}])
def test_what_is_no_function(hook: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"{hook} must be a function, not"):
        Flask("tests").register_blueprint(sse_bp, **{hook: wrong})
    with pytest.raises(TypeError, match=f"{hook} must be a function, not"):
        getattr(SSEBlueprint("x", __name__), hook)(wrong)


@pytest.mark.parametrize("hook", ["authorize", "subject"])
def test_a_coroutine_function_would_always_be_true(hook: str) -> None:
    async def may_listen(channel: str) -> bool:
        return False

    with pytest.raises(TypeError, match="coroutine"):
        Flask("tests").register_blueprint(sse_bp, **{hook: may_listen})


def test_a_coroutine_that_hides_opens_nothing(app_with: Callable[..., Flask]) -> None:
    async def may_listen(channel: str) -> bool:
        return True

    with pytest.warns(RuntimeWarning, match="never awaited"):
        assert status(app_with(authorize=lambda channel: may_listen(channel))) == 403


@pytest.mark.parametrize("hook", ["authorize", "subject"])
def test_the_decorators_take_one_function(hook: str) -> None:
    blueprint = SSEBlueprint("x", __name__)
    decorate = getattr(blueprint, hook)

    def first(*args: str) -> bool:
        return True

    assert decorate(first) is first, "the name goes on meaning the function"
    assert decorate(first) is first
    with pytest.raises(RuntimeError, match=rf"@sse_bp\.{hook} was set before, to .*first\(\)"):
        decorate(lambda *args: True)


@pytest.mark.parametrize("hook", ["authorize", "subject"])
def test_an_app_takes_one_function(hook: str) -> None:
    app = Flask("tests")

    def first(*args: str) -> bool:
        return True

    app.register_blueprint(sse_bp, **{hook: first})
    app.register_blueprint(sse_bp, name="again", url_prefix="/again", **{hook: first})
    app.register_blueprint(sse_bp, name="more", url_prefix="/more")
    with pytest.raises(RuntimeError, match=f"has an? {hook} already"):
        app.register_blueprint(sse_bp, name="other", url_prefix="/other", **{hook: lambda *args: True})


def test_the_decorators_are_defaults_that_an_apps_own_beat(database_url: str) -> None:
    """In a process of its own: they would decide for the apps of all tests."""
    script = f"""
    from flask import Flask
    from flask_pg_sse import sse_bp

    @sse_bp.authorize
    def may_listen(channel):
        return channel == "default"

    @sse_bp.subject
    def whose_stream():
        return 7

    def make(**hooks):
        app = Flask("x")
        app.config.update(SSE_DATABASE_URL={database_url!r})
        app.register_blueprint(sse_bp, **hooks)
        return app

    plain, own = make(), make(authorize=lambda channel: channel == "own")
    for app in plain, own:
        for channel in "default", "own":
            response = app.test_client().get(f"/sse?channel={{channel}}")
            print(response.status_code)
            response.close()
        app.extensions["pg_sse"].close()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["200", "403", "403", "200"]


# -- what it has borrowed is given back


def test_its_database_session_is_back_in_the_pool_before_the_stream_begins(database_url: str) -> None:
    """Ten streams, whose authorizer asks the database, and a pool of one connection."""
    db = SQLAlchemy()

    class Membership(db.Model):  # type: ignore[name-defined,misc]
        channel: Mapped[str] = mapped_column(primary_key=True)

    def may_listen(channel: str) -> bool:
        return db.session.get(Membership, channel) is not None

    app = Flask("tests")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=database_url.replace("postgresql://", "postgresql+psycopg2://"),
        SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 2},
    )
    db.init_app(app)
    app.register_blueprint(sse_bp, authorize=may_listen)
    with app.app_context():
        db.create_all()
        db.session.add(Membership(channel="orders"))
        db.session.commit()
        pool: Any = db.engine.pool
    try:
        with ExitStack() as stack:
            streams = []
            for _ in range(10):
                events = stream(app.test_client(), "/sse?channel=orders")
                stack.callback(events.close)
                assert next(events).event == "sse-open"
                assert pool.checkedout() == 0
                streams.append(events)
            assert status(app, "/sse?channel=secret") == 403
            with app.app_context():
                notify("orders", "x")
            assert [next(events).data for events in streams] == ["x"] * 10
    finally:
        app.extensions["pg_sse"].close()
        with app.app_context():
            db.engine.dispose()


@pytest.mark.parametrize(
    ("worker", "driver", "warned"),
    [
        ("gevent", "psycopg2", 1),
        pytest.param("gevent", "psycopg", 0, marks=pytest.mark.slow),
        pytest.param("gthread", "psycopg2", 0, marks=pytest.mark.slow),
    ],
)
def test_a_driver_that_stops_the_whole_worker_is_warned_about(
    database_url: str, start_server: Start, worker: str, driver: str, warned: int
) -> None:
    url = database_url.replace("postgresql://", f"postgresql+{driver}://")
    server = start_server(url, "-k", worker, "--threads", "4", app="tests.support.apps.members:app")
    server.post("/notify/a", b'{"data": 1}')
    server.post("/notify/a", b'{"data": 2}')
    assert server.log().count("SQLALCHEMY_DATABASE_URI uses psycopg2") == warned


def test_the_same_under_gunicorn(database_url: str, start_server: Start) -> None:
    members(database_url, ("ann", "orders"))
    server = start_server(database_url, app="tests.support.apps.members:app")
    with ExitStack() as stack:
        path = "/sse?user=ann&channel=orders"
        streams = [stack.enter_context(http(server.port, path)) for _ in range(10)]
        assert [events.next().event for events in streams] == ["sse-open"] * 10
        assert server.get("/checked-out") == "0"
        for other in ("/sse?user=ann&channel=secret", "/sse?user=bob&channel=orders", "/sse?channel=orders"):
            with http(server.port, other) as response:
                assert response.status == 403
        server.post("/notify/orders", b'{"data": "x"}')
        assert [events.event().data for events in streams] == ["x"] * 10
