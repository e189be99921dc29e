"""The proxies of the README and of docs/deploy.md, and a client that gives up where a browser's EventSource does."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tests.support.client import Message, request
from tests.support.documents import Document
from tests.support.servers import WebServer, free_port

# The program of each, and the Debian package that has it.
PROGRAMS = {
    "nginx": ("nginx", "nginx-light"),
    "haproxy": ("haproxy", "haproxy"),
    "caddy": ("caddy", "caddy"),
    "apache": ("apache2", "apache2"),
    "varnish": ("varnishd", "varnish"),
    "lighttpd": ("lighttpd", "lighttpd"),
}
Edit = Callable[[str], str]


def without_an_answer_of_its_own(nginx: str) -> str:
    """Return the README's nginx as most sites have it: it answers 502 while the app is away, to streams too."""
    return re.sub(r" error_page 502 [^;]*;", "", nginx)


class Proxies:
    """Starts the documented proxies in front of an app: on another port, and with a certificate of their own."""

    def __init__(self, start_server: Callable[..., WebServer], folder: Path) -> None:
        self.folder = folder
        self._start = start_server
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        self.pem = folder / "site.pem"
        issued.private_key_and_cert_chain_pem.write_to_path(str(self.pem))
        self.authority = folder / "authority.pem"  # for clients that are other processes: SSL_CERT_FILE
        authority.cert_pem.write_to_path(str(self.authority))
        self.trusted = ssl.create_default_context()
        authority.configure_trust(self.trusted)

    def start(self, name: str, app: WebServer, edit: Edit = str, *, ready: str = "/ping") -> WebServer:
        """Start a proxy, with its example's text as `edit` changes it. Skips the test where it is not installed."""
        program, package = PROGRAMS[name]
        path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
        if path is None:
            pytest.skip(f"{program} is not installed: apt-get install {package}")
        port = free_port()

        def local(example: str) -> str:
            changed = edit(example).replace("127.0.0.1:8000", f"127.0.0.1:{app.port}")
            return changed.replace("/etc/haproxy", str(self.folder)).replace("/etc/apache2", str(self.folder))

        command = getattr(self, f"_{name}")(path, port, app.port, local)
        tls = None if name in ("varnish", "lighttpd") else self.trusted
        home = str(self.folder)
        return self._start(
            "", command=lambda _: command, port=port, tls=tls, ready=ready,
            HOME=home, XDG_DATA_HOME=home, XDG_CONFIG_HOME=home,
        )  # fmt: skip

    def _write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def _nginx(self, program: str, port: int, app_port: int, local: Edit) -> list[str]:
        """With the installed version's directive for HTTP/2."""
        example = local(Document("README.md").example("nginx"))
        [(listen, http2, older)] = re.findall(r"^ *(listen 443 ssl;)\n *(http2 on;) .*: (listen .*;)$", example, re.M)
        said = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr
        if tuple(map(int, re.findall(r"nginx/(\d+)\.(\d+)\.(\d+)", said)[0])) < (1, 25, 1):
            example = example.replace(http2, "").replace(listen, older, 1)
        both = f"ssl_certificate {self.pem}; ssl_certificate_key {self.pem};"
        example = example.replace("# server_name", f"{both}  # server_name")
        example = example.replace("listen 443", f"listen 127.0.0.1:{port}", 1)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = "".join(f"{kind}_temp_path {self.folder}/{kind};\n" for kind in kinds)
        user = "user root;\n" if os.geteuid() == 0 else ""
        config = self._write(
            "nginx.conf",
            f"daemon off;\n{user}pid {self.folder}/pid;\nerror_log {self.folder}/error.log;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{places}{textwrap.dedent(example)}}}\n",
        )
        return [program, "-p", str(self.folder), "-c", config]

    def _haproxy(self, program: str, port: int, app_port: int, local: Edit) -> list[str]:
        deploy = Document("docs/deploy.md")
        self._write("away.http", local(deploy.example("haproxy-away")))
        example = local(deploy.example("haproxy")).replace("bind :443", f"bind 127.0.0.1:{port}")
        return [program, "-db", "-f", self._write("haproxy.cfg", example)]

    def _caddy(self, program: str, port: int, app_port: int, local: Edit) -> list[str]:
        example = local(Document("docs/deploy.md").example("caddy"))
        site = f"https://127.0.0.1:{port} {{\n    bind 127.0.0.1\n    tls {self.pem} {self.pem}"
        example = example.replace("www.example.com {", site, 1)
        config = self._write("Caddyfile", f"{{\n    admin off\n    auto_https off\n}}\n{example}")
        return [program, "run", "--adapter", "caddyfile", "--config", config]

    def _apache(self, program: str, port: int, app_port: int, local: Edit) -> list[str]:
        deploy = Document("docs/deploy.md")
        self._write("away.asis", local(deploy.example("apache-away")))
        room = deploy.example("apache-mpm")
        example = local(deploy.example("apache")).replace("*:443", f"127.0.0.1:{port}", 1)
        own = f"SSLEngine on\nSSLCertificateFile {self.pem}\nSSLCertificateKeyFile {self.pem}"
        example = example.replace("# ServerName", f"{own}\n# ServerName", 1)
        modules = ("mpm_event", "authz_core", "alias", *re.findall("^# a2enmod (.*)$", example, re.M)[0].split())
        folder = "/usr/lib/apache2/modules"
        loads = "".join(f"LoadModule {one}_module {folder}/mod_{one}.so\n" for one in ("proxy", *modules))
        user = "User www-data\nGroup www-data\n" if os.geteuid() == 0 else ""
        config = self._write(
            "apache.conf",
            f"{loads}{user}ServerRoot {self.folder}\nDefaultRuntimeDir {self.folder}\nPidFile {self.folder}/pid\n"
            f"Mutex file:{self.folder}\nErrorLog {self.folder}/error.log\nServerName 127.0.0.1\n"
            f"Listen 127.0.0.1:{port}\n{room}{example}",
        )
        return [program, "-D", "FOREGROUND", "-f", config]

    def _varnish(self, program: str, port: int, app_port: int, local: Edit) -> list[str]:
        example = local(Document("docs/deploy.md").example("varnish")).replace('"8000"', f'"{app_port}"', 1)
        config = self._write("varnish.vcl", example)
        place = ["-n", str(self.folder / "varnish"), "-s", "malloc,16m", "-j", "none"]
        return [program, "-F", "-a", f"127.0.0.1:{port}", "-f", config, *place]

    def _lighttpd(self, program: str, port: int, app_port: int, local: Edit) -> list[str]:
        deploy = Document("docs/deploy.md")
        (self.folder / "away").mkdir()
        answer = deploy.example("haproxy-away").split("\n\n", 1)[1]
        self._write("away/away.sse", local(answer))
        example = local(deploy.example("lighttpd")).replace("8000", str(app_port), 1)
        example = example.replace("8001", str(free_port())).replace("/etc/lighttpd", str(self.folder))
        own = f'server.document-root = "{self.folder}"\nserver.port = {port}\nserver.bind = "127.0.0.1"\n'
        return [program, "-D", "-f", self._write("lighttpd.conf", own + example)]


@pytest.fixture
def proxies(start_server: Callable[..., WebServer]) -> Iterator[Proxies]:
    """The documented proxies, with a folder that those can read which give up root's rights."""
    folder = Path(tempfile.mkdtemp(prefix="flask_pg_sse_proxy-"))
    folder.chmod(0o755)
    yield Proxies(start_server, folder)
    shutil.rmtree(folder, ignore_errors=True)


class Page(threading.Thread):
    """A page with an EventSource: it reconnects after every end of its stream, and never after an error status.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#the-eventsource-interface
    """

    def __init__(self, server: WebServer, channel: str) -> None:
        super().__init__(name=f"page on {server.port}", daemon=True)
        self.heard: list[str] = []  # the data of events
        self.told: list[str] = []  # the reasons of `sse-end`
        self.opened = 0
        self.ended_by: str | None = None  # the answer after which it does not come back
        self._server = server
        self._path = f"/sse?channel={channel}"
        self._last_event_id = ""
        self._retry = 3000
        self._left = threading.Event()

    def leave(self) -> None:
        self._left.set()
        self.join()

    def run(self) -> None:
        while not self._left.is_set() and self.ended_by is None:
            try:
                self._one_stream()
            except (OSError, EOFError):
                self._left.wait(self._retry / 1000)

    def _one_stream(self) -> None:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        if self._last_event_id:
            headers["Last-Event-ID"] = self._last_event_id
        with request(self._server.port, self._path, headers=headers, tls=self._server.tls) as stream:
            if stream.status != 200 or not stream.headers.get("content-type", "").startswith("text/event-stream"):
                self.ended_by = f"{stream.status} {stream.headers}"
                return
            stream.timeout = 0.2
            while not self._left.is_set():
                try:
                    self._take(stream.next())
                except TimeoutError:
                    continue

    def _take(self, message: Message) -> None:
        self._last_event_id = message.id or self._last_event_id
        self._retry = message.retry or self._retry
        if message.event == "sse-open":
            self.opened += 1
        elif message.event == "sse-end":
            self.told.append(message.json["reason"])
        elif message.event == "message" and message.data is not None:
            self.heard.append(message.data)
