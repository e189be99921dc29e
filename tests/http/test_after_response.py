"""disconnect(after_response=True): it is sent when the response has been closed; where none follows, at once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, Response, abort

from flask_pg_sse import DatabaseUnavailable, disconnect
from flask_pg_sse.engine.base import Disconnect
from flask_pg_sse.engine.outbox import MOST, Outbox
from flask_pg_sse.testing import capture, stream
from flask_pg_sse.web import after_response
from tests.support.client import eventually
from tests.support.postgres import execute
from tests.support.servers import ROOT

MakeApp = Callable[..., Flask]


@pytest.fixture
def sent() -> list[str]:
    return []


@pytest.fixture
def app(database_url: str, make_app: MakeApp, sent: list[str]) -> Flask:
    app = make_app(database_url, SECRET_KEY="x", SSE_CHANNELS=["open"], TESTING=False)
    worker = app.extensions["pg_sse"].runtime.worker
    control = worker.engine.control

    def send(command: Disconnect) -> None:
        sent.append(command.subject or "")
        control(command)

    worker.engine.control = worker.outbox._send = send

    @app.post("/<subject>/<how>")
    def view(subject: str, how: str) -> Any:
        disconnect(subject=subject, after_response=how != "now")
        assert sent == ([subject] if how == "now" else [])
        if how == "fails":
            abort(500)
        if how == "raises":
            raise ValueError
        if how == "streams":
            return Response(slowly())
        return "done"

    def slowly() -> Iterator[str]:
        yield "begun"
        eventually(lambda: sent, what="a long response holds it up for a second at most")
        yield "ended"

    return app


@pytest.fixture
def closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a busy machine takes to close a response."""
    monkeypatch.setattr(after_response, "LONGEST", 60.0)


@pytest.mark.usefixtures("closed_in_time")
@pytest.mark.parametrize("how", ["answers", "fails", "raises"])
def test_it_is_sent_once_when_the_response_is_closed(app: Flask, sent: list[str], how: str) -> None:
    app.config["PROPAGATE_EXCEPTIONS"] = False
    with app.test_client().post(f"/7/{how}") as response:
        assert response.status_code == (200 if how == "answers" else 500) and sent == []
    outbox = app.extensions["pg_sse"].runtime.worker.outbox
    eventually(lambda: sent and outbox._sender is None, what="nothing is left to be sent")
    assert sent == ["7"]


def test_a_response_that_nobody_closes_or_that_takes_long(app: Flask, sent: list[str]) -> None:
    begun = time.monotonic()
    response = app.test_client().post("/7/answers")
    eventually(lambda: sent == ["7"])
    assert time.monotonic() - begun > 0.9
    response.close()
    eventually(lambda: sent == ["7", "7"], what="the right way all the same: when it is closed")
    sent.clear()
    assert app.test_client().post("/8/streams").text == "begunended"


def test_at_once_by_default_or_if_no_response_follows(app: Flask, sent: list[str]) -> None:
    assert app.test_client().post("/7/now").status_code == 200
    with app.app_context():
        disconnect(subject=8, after_response=True)
    with app.test_request_context():
        disconnect(subject=9, after_response=True)
        assert sent == ["7", "8", "9"]


LAST_REQUEST = """
import sys
from flask import Flask
from flask_pg_sse import disconnect, sse_bp

app = Flask("app")
app.config.update(SECRET_KEY="x", SSE_DATABASE_URL=sys.argv[1])
app.register_blueprint(sse_bp)

@app.post("/logout")
def logout():
    disconnect(subject=7, after_response=True)
    return ""

app.test_client().post("/logout").close()
"""


def test_a_process_that_ends_after_its_last_request_sends_it_first(logged_url: str) -> None:
    done = subprocess.run([sys.executable, "-c", LAST_REQUEST, logged_url], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert execute(logged_url, "SELECT count(*) FROM flask_pg_sse.event WHERE channel = 'flask_pg_sse'") == [(1,)]


def test_commands_that_wait_are_bounded_and_each_is_one(caplog: pytest.LogCaptureFixture) -> None:
    away = True
    sent: list[Disconnect] = []

    def send(command: Disconnect) -> None:
        if away:
            raise DatabaseUnavailable("PostgreSQL is away.")
        sent.append(command)

    ended: list[Disconnect] = []
    outbox = Outbox(send, ended.append)
    for number in range(MOST + 10):
        outbox.add(Disconnect(f"{number % (MOST + 5)}", None))
    eventually(lambda: ended)
    assert MOST - 1 <= len(outbox) <= MOST + 1  # one may be on its way
    assert caplog.text.count("A disconnect() was dropped") == 1 and "PostgreSQL is away. It is kept" in caplog.text
    away = False
    eventually(lambda: not len(outbox), 30)
    eventually(lambda: outbox._sender is None)
    assert len(sent) == len(set(sent)) and len(sent) >= MOST


@pytest.mark.usefixtures("closed_in_time")
def test_a_page_that_is_back_with_its_right_is_not_ended_again(app: Flask, sent: list[str]) -> None:
    """The command comes back to the worker that has sent it, and must not be obeyed there before that too."""
    ended: list[Disconnect] = []
    hub: Any = app.extensions["pg_sse"].runtime.worker.streams[0]
    eventually(hub.admission._answered.is_set, what="it hears commands")
    end_here = hub.disconnect

    def end(command: Disconnect) -> None:
        ended.append(command)
        end_here(command)

    hub.disconnect = end
    for number in range(5):
        app.test_client().post(f"/{number}/answers").close()
        eventually(lambda: sent == [ended[-1].subject] if ended else False)
        sent.clear()
        assert len(ended) == number + 1


def test_in_a_streams_own_hook(database_url: str, make_app: MakeApp) -> None:
    """Its response takes as long as the stream: a hook that ends the user's other streams does so at once."""

    def may_listen(channel: str) -> bool:
        if channel == "newer":
            disconnect(channel="older", after_response=True)
        return True

    app = make_app(database_url, authorize=may_listen, SECRET_KEY="x", SSE_CHANNELS=[])
    older = stream(app.test_client(), "/sse?channel=older")
    assert next(older).event == "sse-open"
    newer = stream(app.test_client(), "/sse?channel=newer")
    assert next(newer).event == "sse-open"
    assert next(older).json == {"reason": "revoked"}
    newer.close()


def test_a_test_without_a_database_sees_it_at_once(app: Flask, sent: list[str]) -> None:
    with capture(app) as events:
        with app.test_request_context():
            disconnect(subject=7, after_response=True)
        assert events.disconnected == [("7", None)] and sent == []
