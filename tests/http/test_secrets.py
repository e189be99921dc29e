"""Passwords, keys, tokens and tracebacks: no answer shows one, and no log of the package or of gunicorn's access."""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Config, Flask

from flask_pg_sse.tokens import Token, sign_token
from tests.engine.postgres.test_cli import extension, nested, renamed, twice
from tests.support.client import open_stream, request
from tests.support.servers import ROOT, WebServer, free_port, gunicorn
from tests.support.slow import but_one_slow

Start = Callable[..., WebServer]
MakeApp = Callable[..., Flask]

PASSWORD = "hunter2-of-the-database"
KEY = "hunter2-of-the-sessions"
OLD_KEY = "hunter2-of-last-year"
OF_ANOTHER = "of-another-client"
TOKEN = sign_token([KEY], Token(frozenset({"mine"}), subject="7"))
EXPIRED = sign_token([KEY], Token(frozenset({"mine"}), expires_at=time.time() - 60))
FORGED = sign_token(["another key"], Token(frozenset({"mine"})))
TOKENS = (TOKEN, EXPIRED, FORGED)
SECRETS = (PASSWORD, KEY, OLD_KEY)

APP = "tests.support.apps.telling:app"
ACCESS_LOG = ("--access-logfile", "-", "--log-level", "debug")
ALL_OF_THE_REQUEST = ("--access-logformat", "%(h)s %(m)s %(r)s %(q)s %(U)s %({raw_uri}e)s %({query_string}e)s %(s)s")
PYWSGI = (
    "from gevent import monkey; monkey.patch_all(); import sys; from gevent.pywsgi import WSGIServer;"
    "from tests.support.apps.telling import app; WSGIServer(('127.0.0.1', int(sys.argv[1])), app).serve_forever()"
)
SERVERS: dict[str, Callable[[int], list[str]]] = {
    "gevent": lambda port: gunicorn(APP, port, *ACCESS_LOG),
    "gevent, all of the request": lambda port: gunicorn(APP, port, *ACCESS_LOG, *ALL_OF_THE_REQUEST),
    "gthread": lambda port: gunicorn(APP, port, "-k", "gthread", "--threads", "8", *ACCESS_LOG, *ALL_OF_THE_REQUEST),
    "flask run": lambda port: [sys.executable, "-m", "flask", "--app", APP, "run", "--port", str(port)],
    "pywsgi": lambda port: [sys.executable, "-c", PYWSGI, str(port)],
}


def with_password(url: str) -> str:
    """The tests' PostgreSQL takes any."""
    parts = urlsplit(url)
    return f"postgresql://postgres:{PASSWORD}@{parts.hostname}:{parts.port}{parts.path}"


def ask(server: WebServer, query: str, status: int, method: str = "GET") -> str:
    with request(server.port, f"/sse?{query}", method=method, timeout=20) as response:
        assert response.status == status, response.read()
        if response.headers["content-type"].startswith("text/event-stream") and method != "HEAD":
            return str(response.next().data)
        return response.read().decode()


@pytest.mark.parametrize("debug", ["0", pytest.param("1", marks=pytest.mark.slow)], ids=["", "debug"])
@pytest.mark.parametrize("name", but_one_slow(SERVERS))
def test_answers_and_logs(name: str, debug: str, database_url: str, start_server: Start) -> None:
    env = {"FLASK_SECRET_KEY": KEY, "FLASK_SECRET_KEY_FALLBACKS": f'["{OLD_KEY}"]', "FLASK_DEBUG": debug}
    server = start_server(with_password(database_url), command=SERVERS[name], **env)
    answers = []
    with open_stream(server.port, "mine", path=f"/sse/mine?token={TOKEN}&x=") as stream:
        server.post("/notify/mine")
        assert stream.event().data == "hello"
    with open_stream(server.port, path=f"/sse?a=b&channel=mine&token={TOKEN}#") as stream:
        pass
    with open_stream(server.port, path=f"/sse?channel=mine&tok%65n={TOKEN}&x=") as stream:
        pass
    with open_stream(server.port, path=f"/sse?token={FORGED}&channel=mine&token={TOKEN}&tok%65n={EXPIRED}") as stream:
        pass
    answers.append(ask(server, f"channel=mine&token={TOKEN}", 200, method="HEAD"))
    answers.append(ask(server, f"token={EXPIRED}&channel=mine", 200))
    answers.append(ask(server, f"channel=mine&token={FORGED}", 403))
    answers.append(ask(server, f"channel=closed&token={TOKEN}", 403))
    answers.append(ask(server, f"channel=&token={TOKEN}", 400))
    answers.append(ask(server, f"channel=failing&token={TOKEN}", 200))
    answers.append(ask(server, f"token={TOKEN}" + "&x" * 200, 414))
    # These never reach the view.
    answers.append(ask(server, f"channel=mine&token={TOKEN}", 200, method="OPTIONS"))
    answers.append(ask(server, f"channel=mine&token={TOKEN}", 405, method="POST"))
    answers.append(ask(server, f"channel=mine&%74%6f%6B%65%6e={TOKEN}", 405, method="POST"))
    answers.append(ask(server, f"channel=mine&gated&token={TOKEN}", 401))
    if name in ("gevent", "gthread") and debug == "0":
        answers.append(ask(server, f"channel=mine&tearing&token={TOKEN}", 500))
    assert "expired" in answers[1] and "unavailable" in answers[5]
    with request(server.port, "/ping?token=the-apps-own") as response:
        assert response.status == 200
    server.stop()
    for secret in (*SECRETS, *TOKENS, OF_ANOTHER, "Traceback", str(ROOT), urlsplit(database_url).path):
        assert not [answer for answer in answers if secret in answer]
    log = server.log()
    assert not [secret for secret in SECRETS if secret in log]
    if name in ("flask run", "pywsgi"):  # they have read the request's line themselves; docs/security.md says so
        assert TOKEN in log
    else:
        assert "token=***" in log and "token=the-apps-own" in log
        assert ("Error handling request GET /sse?channel=mine&tearing&token=***" in log) == (len(answers) == 12)
        assert not [token for token in TOKENS if token in log or token.rpartition(".")[2] in log]


@pytest.mark.slow
@pytest.mark.parametrize(("why", "debug"), [("nobody is there", "0"), ("unknown role", "1"), ("no such database", "0")])
def test_a_database_that_cannot_be_reached(why: str, debug: str, database_url: str, start_server: Start) -> None:
    parts = urlsplit(database_url)
    at = f"{parts.hostname}:{parts.port}"
    url = {
        "nobody is there": f"host=127.0.0.1 port={free_port()} dbname=shop user=postgres password={PASSWORD}",
        "unknown role": f"postgresql://nobody:{PASSWORD}@{at}{parts.path}",
        "no such database": f"postgresql://postgres:{PASSWORD}@{at}/nowhere",
    }[why]
    env = {"FLASK_SECRET_KEY": KEY, "FLASK_DEBUG": debug, "FLASK_SSE_CHANNELS": "*"}
    server = start_server(url, command=SERVERS["gevent"], **env)
    refusal = ""
    if debug == "0":  # in debug Flask leaves the error to the server, which closes the connection
        with request(server.port, "/notify/a", method="POST") as response:
            assert response.status == 500
            refusal = response.read().decode()
    stream = ask(server, "channel=a", 200)
    assert json.loads(stream) == {"reason": "unavailable"}
    server.stop()
    assert "flask_pg_sse" in server.log(), "it says that there is no database"
    assert not [secret for secret in SECRETS if secret in server.log() + refusal + stream]
    assert "Traceback" not in refusal and "127.0.0.1" not in refusal


@pytest.mark.parametrize("command", [["sse", "init"], ["sse", "prune"]])
def test_errors_of_the_commands(command: list[str]) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "FLASK_", "SSE_"))}
    env |= {
        "DATABASE_URL": f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()}/shop",
        "FLASK_SECRET_KEY": KEY,
        "PYTHONPATH": str(ROOT),
    }
    line = [sys.executable, "-m", "flask", "--app", APP, *command]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert not [secret for secret in (*SECRETS, "Traceback") if secret in done.stdout + done.stderr]


def test_what_a_debugger_or_an_error_tracker_prints(
    database_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """Error trackers send the repr() of what stood in a frame."""
    caplog.set_level(logging.DEBUG)
    url = with_password(database_url)
    app = make_app(url, SSE_LISTEN_URL=url, SSE_SECRET_KEY=KEY, SECRET_KEY_FALLBACKS=[OLD_KEY])
    state = app.extensions["pg_sse"]
    with app.test_client().get("/sse?channel=a") as response:
        assert b"sse-open" in b"".join(itertools.islice(response.iter_encoded(), 2))
        things = [state, state.runtime, state.runtime.settings, *vars(state).values(), *vars(state.runtime).values()]
    shown = "".join(repr(thing) for thing in things if not isinstance(thing, Config)) + caplog.text
    assert not [secret for secret in SECRETS if secret in shown]


@pytest.mark.parametrize(
    ("register", "paths"),
    [(renamed, ["/live"]), (twice, ["/sse", "/live"]), (nested, ["/parent/sse"]), (extension, ["/sse"])],
)
def test_tokens_are_masked_wherever_the_streams_are(register: Callable[[Flask], None], paths: list[str]) -> None:
    """In what gunicorn logs from; an app's own `token=` is its own."""
    app = Flask("tests")
    register(app)
    app.get("/own")(lambda: "pong")
    inner, seen = app.wsgi_app, []

    def wsgi(environ: Any, start_response: Any) -> Any:
        environ["RAW_URI"] = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        answer = inner(environ, start_response)
        seen.append((environ["RAW_URI"], environ["QUERY_STRING"]))
        return answer

    app.wsgi_app = wsgi  # type: ignore[method-assign]
    client = app.test_client()
    for path in paths:
        assert client.options(f"{path}?a=b&token={TOKEN}").status_code == 200
        assert client.delete(f"{path}/mine?token={TOKEN}&token={FORGED}").status_code == 405
        masked = "token=***&token=***"
        assert seen == [(f"{path}?a=b&token=***", "a=b&token=***"), (f"{path}/mine?{masked}", masked)]
        seen.clear()
    assert client.get("/own?token=mine").text == "pong"
    assert client.get("/nowhere?token=mine").status_code == 404  # the app may pass it on to another
    assert seen == [("/own?token=mine", "token=mine"), ("/nowhere?token=***", "token=mine")]
