"""`flask sse doctor --url`: a stream through a real proxy, and what is wrong with that proxy, found and cured.

The proxies are those of the README and of docs/deploy.md. Each fault is an edit of one of these examples.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_pg_sse.cli.doctor import proxy as checks
from flask_pg_sse.cli.doctor import web_server
from tests.support.doctor import Answer, doctor, found
from tests.support.proxies import Proxies
from tests.support.servers import WebServer, free_port

StartServer = Callable[..., WebServer]
MakeApp = Callable[..., Flask]
KEY = "s3cret-key"


class Site:
    """An app under gunicorn, and proxies in front of it."""

    def __init__(
        self, url: str, app: Flask, server: WebServer, proxies: Proxies, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.app = app
        self.server = server
        self.proxies = proxies
        monkeypatch.setenv("SSL_CERT_FILE", str(proxies.authority))

    @property
    def direct(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def proxy(self, name: str, *edits: tuple[str, str]) -> WebServer:
        """Start a proxy of the documentation, with its example edited."""

        def edit(example: str) -> str:
            for old, new in edits:
                if old in example:
                    example = example.replace(old, new)
            return example

        return self.proxies.start(name, self.server, edit)

    def ask(self, proxy: WebServer, *options: str, seconds: float = 2) -> Answer:
        direct = () if "--direct" in options else ("--direct", self.direct)
        scheme = "http" if proxy.tls is None else "https"
        url = f"{scheme}://127.0.0.1:{proxy.port}"
        return doctor(self.app, "--url", url, *direct, "--seconds", str(seconds), *options)

    def ask_with_patience(self, proxy: WebServer, **options: Any) -> Answer:
        """Ask where all is well, and find nothing slow on a machine that is busy."""
        with pytest.MonkeyPatch.context() as patch:
            for limit in ("_OPEN_WITHIN", "_COME_WITHIN", "_LATE", "_RATHER_LATE"):
                patch.setattr(checks, limit, 20.0)
            patch.setattr(web_server, "_READ_WITHIN", 60.0)
            patch.setattr("flask_pg_sse.cli.doctor.checks.LIMIT", 60.0)  # of a whole check
            return self.ask(proxy, **options)


@pytest.fixture
def site(
    logged_url: str,
    make_app: MakeApp,
    start_server: StartServer,
    proxies: Proxies,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Any:
    monkeypatch.chdir(tmp_path)
    # Nobody but doctor's own signed URL opens its channel.
    environ = {"FLASK_SECRET_KEY": KEY, "FLASK_SSE_CHANNELS": "orders"}
    server = start_server(logged_url, app="tests.support.apps.basic:app", **environ)
    app = make_app(logged_url, SECRET_KEY=KEY, SSE_CHANNELS=["orders"])
    yield Site(logged_url, app, server, proxies, monkeypatch)
    for one in (server,):
        one.stop()


IN_THE_LOCATION = "location /sse {"


def in_the_location(directives: str) -> tuple[str, str]:
    return IN_THE_LOCATION, f"{IN_THE_LOCATION} {directives}"


def test_a_proxy_of_the_documentation(site: Site) -> None:
    answer = site.ask_with_patience(site.proxy("nginx"))
    assert answer.status == 0, answer.output
    found(answer, "proxy", "ok", "opened after", "Server: nginx")
    found(answer, "proxy delay", "ok", "4 events came through after")
    found(answer, "proxy resume", "ok")
    found(answer, "proxy cuts", "ok", "stayed open for 2 s")


@pytest.mark.slow
def test_a_proxy_that_buffers(site: Site) -> None:
    nginx = site.proxy("nginx", in_the_location("proxy_ignore_headers X-Accel-Buffering;"))
    answer = site.ask(nginx)
    [line] = [one for one in answer.lines if one["state"] == "fault"]
    assert "held back" in line["text"] and f"Past it, at {site.direct}, a stream opens" in line["text"], line
    assert "proxy_buffering off" in line["remedy"]
    nginx.stop()
    cured = site.proxy("nginx", in_the_location("proxy_ignore_headers X-Accel-Buffering; proxy_buffering off;"))
    assert site.ask_with_patience(cured).status == 0


@pytest.mark.slow
def test_a_proxy_that_cuts_quiet_streams(site: Site) -> None:
    nginx = site.proxy("nginx", ("proxy_read_timeout 60s;", "proxy_read_timeout 2s;"))
    line = found(site.ask(nginx, seconds=6), "proxy cuts", "fault", "cut a stream that was quiet for", "Server: nginx")
    assert "proxy_read_timeout 60s" in line["remedy"] and "less than 2 s" in line["remedy"], line
    nginx.stop()
    assert site.ask_with_patience(site.proxy("nginx"), seconds=6).status == 0


@pytest.mark.slow
def test_a_proxy_that_drops_last_event_id(site: Site) -> None:
    nginx = site.proxy("nginx", in_the_location('proxy_set_header Last-Event-ID "";'))
    line = found(site.ask(nginx), "proxy resume", "fault", "drops the header Last-Event-ID")
    assert "pass the header Last-Event-ID" in line["remedy"]


@pytest.mark.slow
def test_a_proxy_that_strips_the_query(site: Site) -> None:
    nginx = site.proxy("nginx", in_the_location("rewrite ^(.*)$ $1? break;"))
    line = found(site.ask(nginx), "proxy", "fault", "answered 400", "The query was lost on the way")
    assert "with its query" in line["remedy"]


@pytest.mark.slow
def test_a_proxy_that_compresses(site: Site) -> None:
    compress = "gzip on; gzip_types text/event-stream; gzip_proxied any; gzip_min_length 0;"
    answer = site.ask(site.proxy("nginx", in_the_location(compress)))
    line = found(answer, "proxy headers", "warning", "compresses the stream (gzip)", "no-transform")
    assert "Compress no text/event-stream" in line["remedy"]


@pytest.mark.slow
def test_an_answer_from_a_cache(site: Site) -> None:
    answer = site.ask(site.proxy("nginx", in_the_location("add_header Age 30;")))
    assert "cache pass the streams" in found(answer, "proxy headers", "fault", "from a cache")["remedy"]


@pytest.mark.slow
def test_a_proxy_that_closes_head(site: Site) -> None:
    answer = site.ask(site.proxy("nginx", in_the_location("if ($request_method = HEAD) { return 444; }")))
    assert "pass HEAD on" in found(answer, "proxy head", "warning", "A HEAD request for a stream fails")["remedy"]


@pytest.mark.slow
def test_a_front_that_answers_http_1_0(logged_url: str, site: Site, start_server: StartServer) -> None:
    environ = {"FLASK_SECRET_KEY": KEY, "FLASK_SSE_CHANNELS": "orders"}

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "tests.support.apps.http10", str(port)]

    old = start_server(logged_url, command=command, **environ)
    assert "HTTP/1.1" in found(site.ask(old), "proxy headers", "warning", "answers with HTTP/1.0")["remedy"]
    old.stop()


@pytest.mark.slow
def test_which_of_two_proxies_holds_a_stream_back(site: Site) -> None:
    inner = site.proxy("nginx", in_the_location("proxy_ignore_headers X-Accel-Buffering;"))
    outer_port, folder = free_port(), site.proxies.folder
    config = folder / "outer.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    config.write_text(
        f"daemon off; {'user root;' if os.geteuid() == 0 else ''} pid {folder}/outer.pid; error_log "
        f"{folder}/outer.log;\nevents {{}}\nhttp {{ access_log off;\n"
        + "".join(f"{kind}_temp_path {folder}/outer_{kind};\n" for kind in kinds)
        + f"server {{ listen 127.0.0.1:{outer_port}; proxy_buffering off; proxy_http_version 1.1; "
        f'proxy_set_header Connection ""; location / {{ proxy_pass https://127.0.0.1:{inner.port}; }} }} }}\n'
    )
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin") or ""
    command = [program, "-p", str(folder), "-c", str(config)]
    outer = site.proxies._start("", command=lambda _: command, port=outer_port)
    hops = ["--direct", f"https://127.0.0.1:{inner.port}", "--direct", site.direct]
    line = found(site.ask(outer, *hops), "proxy", "fault", f"https://127.0.0.1:{inner.port} (Server: ", "sent nothing")
    assert f"Past it, at {site.direct}, a stream opens" in line["text"]


@pytest.mark.slow
def test_events_that_come_late(logged_url: str, site: Site, start_server: StartServer) -> None:
    """By a hop before the app; or by the app's own middleware."""
    environ = {"FLASK_SECRET_KEY": KEY, "FLASK_SSE_CHANNELS": "orders"}
    holding = start_server(logged_url, app="tests.support.apps.holding:app", **environ)
    url = f"http://127.0.0.1:{holding.port}"
    line = found(site.ask(holding), "proxy delay", "fault", "Events are held back", f"What answers at {url} holds them")
    assert "docs/deploy.md" in line["remedy"]
    line = found(site.ask(holding, "--direct", url), "proxy delay", "fault", "The app itself holds them")
    assert "middleware" in line["remedy"]
    holding.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caddy", "haproxy"])
def test_other_proxies_of_the_documentation(site: Site, name: str) -> None:
    answer = site.ask_with_patience(site.proxy(name))
    assert answer.status == 0, answer.output


def test_another_key_on_the_server(site: Site) -> None:
    site.app.config["SECRET_KEY"] = "another"
    answer = doctor(site.app, "--url", site.direct, "--seconds", "1")
    line = found(answer, "proxy", "fault", "answered 403", "is not open to you")
    assert "same SECRET_KEY" in line["remedy"]


def test_no_key_is_said_and_nothing_is_tried(site: Site, logged_url: str, make_app: MakeApp) -> None:
    answer = doctor(make_app(logged_url, SSE_CHANNELS=["orders"]), "--url", site.direct)
    found(answer, "secret key", "warning")
    assert "SECRET_KEY" in found(answer, "proxy", "warning", "not tried")["remedy"]


@pytest.mark.slow
def test_a_site_that_is_not_there_or_no_app_or_not_trusted(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = doctor(site.app, "--url", f"http://127.0.0.1:{free_port()}", "--direct", site.direct)
    found(gone, "proxy", "fault", "cannot be reached", "Past it, at")
    elsewhere = doctor(site.app, "--url", f"{site.direct}/nowhere")
    assert "correct --url" in found(elsewhere, "proxy", "fault", "answered 404")["remedy"]
    nginx = site.proxy("nginx")
    monkeypatch.delenv("SSL_CERT_FILE")
    found(site.ask(nginx), "proxy", "fault", "certificate is not trusted")


@pytest.mark.slow
def test_the_app_is_away(site: Site) -> None:
    nginx = site.proxy("nginx")
    site.server.stop()
    found(site.ask(nginx), "proxy", "fault", "sse-end unavailable")


@pytest.mark.parametrize("url", ["ftp://a", "http://user:hush-hush@a", "http://a?token=x", "http://[", "http://a:x"])
def test_an_url_that_is_none(make_app: MakeApp, url: str) -> None:
    result = make_app(None).test_cli_runner().invoke(args=["sse", "doctor", "--url", url])
    assert result.exit_code == 2 and "must be an http:// or https:// URL" in result.output
    assert "hush-hush" not in result.output


@pytest.mark.slow
def test_it_ends_in_time_where_the_proxy_accepts_and_never_answers(site: Site) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        answer = doctor(site.app, "--url", f"http://127.0.0.1:{silent.getsockname()[1]}", "--direct", site.direct)
    found(answer, "proxy", "fault", f"sent nothing for {checks._OPEN_WITHIN:g} s")
    assert answer.seconds < 40
