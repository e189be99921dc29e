"""Run the demo: a PostgreSQL (unless DATABASE_URL is set), gunicorn, and an orderly end. Started by ``./demo/run``.

HOST (127.0.0.1) and PORT (8000) choose the address. Ctrl-C, SIGTERM or SIGHUP stops everything that was started, and
the exit status is 0; it is 1 when something could not be started or ended by itself.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

import psycopg2
from gunicorn.config import make_settings

from tools import postgres

APP = "demo.app:app"
WORKERS = 2
START_TIMEOUT = 60.0
# gunicorn's own limit for open streams; the package ends them sooner by itself.
GRACEFUL_TIMEOUT = 4
STOP_TIMEOUT = 15.0

_GUARD = 'if read -r line; then exit 0; fi; kill -TERM "$1"; exit 0'


class DemoError(RuntimeError):
    """The demo cannot run; the message says what, why and the remedy."""


class Stop(BaseException):
    """A signal asked for the end."""


class Signals:
    """Turns the signals that ask for the end into `Stop`, raised where nothing is half-started."""

    def __init__(self) -> None:
        self.asked = False
        self.shielded = True

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        # nohup asks that the end of the terminal be ignored.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.shielded:
            self.shielded = True
            raise Stop

    def check(self) -> None:
        """Raise `Stop` if a signal has come while nothing could be interrupted."""
        if self.asked:
            raise Stop

    def sleep(self, seconds: float) -> None:
        """Sleep, and raise `Stop` as soon as a signal comes."""
        self.check()
        self.shielded = False
        try:
            self.check()
            time.sleep(seconds)
        finally:
            self.shielded = True


def say(text: str) -> None:
    print(text, flush=True)


def address() -> tuple[str, int]:
    """Return host and port from the environment."""
    host = os.environ.get("HOST") or "127.0.0.1"
    text = os.environ.get("PORT") or "8000"
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise DemoError(f"PORT={text!r} is no port: a number from 1 to 65535 is expected, as in PORT=8001 ./demo/run")
    return host, int(text)


def listen(host: str, port: int) -> socket.socket:
    """Return the listening socket that gunicorn is given.

    It is opened here, before anything is started, so that a port in use is found at once and cannot be taken by
    another program while PostgreSQL starts.
    """
    shown = f"[{host}]" if ":" in host else host
    other = port + 1 if port < 65535 else 8000
    in_use = DemoError(
        f"{shown}:{port} is in use by another program (an earlier demo, perhaps). Stop that one, or choose another "
        f"port:\n\n    PORT={other} ./demo/run\n"
    )
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise DemoError(f"HOST={host!r} is not an address of this machine: {error.strerror}") from None
    # Some systems (macOS) let a second program bind a part of an address that is taken as a whole.
    with contextlib.suppress(OSError), socket.create_connection((reachable(host), port), timeout=1):
        raise in_use
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise in_use from None
        if error.errno == errno.EACCES:
            raise DemoError(
                f"Port {port} needs rights that this user does not have. Choose one from 1024 up:\n\n"
                f"    PORT=8000 ./demo/run\n"
            ) from None
        raise DemoError(f"HOST={host!r} is not an address of this machine: {error.strerror}") from None
    return listener


def reachable(host: str) -> str:
    """Return an address at which a server that listens on `host` answers on this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def page_url(host: str, port: int) -> str:
    host = reachable(host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def network_address() -> str | None:
    """Return the address under which other devices see this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        # "Connecting" a UDP socket sends nothing; it only asks the routing table. The address is one for examples.
        probe.connect(("192.0.2.1", 9))
        found = probe.getsockname()[0]
        if isinstance(found, str) and not found.startswith(("127.", "0.")):
            return found
    return None


def check_database(url: str) -> None:
    """Raise unless a PostgreSQL answers at `url`."""
    plain = re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", url)
    if not re.match(r"postgres(ql)?://", plain) and "=" not in plain:
        raise DemoError(
            "DATABASE_URL is set and is no URL of a PostgreSQL: DATABASE_URL=postgresql://user@host/database is "
            "expected. Unset it to use an embedded PostgreSQL."
        )
    try:
        psycopg2.connect(plain, connect_timeout=5).close()
    except (psycopg2.Error, UnicodeError) as error:
        raise DemoError(
            f"DATABASE_URL is set, and no connection came about:\n\n    {hide_password(str(error).strip(), plain)}\n\n"
            f"Start that server, correct DATABASE_URL, or unset it to use an embedded PostgreSQL."
        ) from None


def hide_password(text: str, url: str) -> str:
    found = re.search(r"://[^/@]*?:([^/]+)@", url) or re.search(r"password\s*=\s*('[^']*'|[^\s&]+)", url)
    return text.replace(found.group(1), "***") if found else text


class Gunicorn:
    """The web server, as a child in a session of its own: Ctrl-C at the terminal reaches only this process."""

    def __init__(self, listener: socket.socket, database_url: str) -> None:
        command = [sys.executable, "-m", "gunicorn", "-k", "gevent", "-w", str(WORKERS)]
        command += ["-b", f"fd://{listener.fileno()}"]
        command += ["--graceful-timeout", str(GRACEFUL_TIMEOUT), "--log-level", "warning"]
        if "control_socket_disable" in make_settings():
            # Newer gunicorns would open a control socket in the user's home directory.
            command.append("--no-control-socket")
        self._process = subprocess.Popen(
            [*command, APP],
            cwd=postgres.ROOT,
            env={**os.environ, "DATABASE_URL": database_url},
            stdin=subprocess.DEVNULL,
            pass_fds=(listener.fileno(),),
            start_new_session=True,
        )
        # See postgres.py: the same for a gunicorn whose parent was killed.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(self._process.pid)], stdin=subprocess.PIPE, start_new_session=True
        )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        """End it, politely first; its workers are in its process group."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                say("gunicorn does not end; killing it.")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            self._guard.communicate(b"done\n")


def answers(host: str, port: int) -> bool:
    """Whether anything that speaks HTTP answers."""
    connection = http.client.HTTPConnection(reachable(host), port, timeout=2)
    try:
        connection.request("GET", "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    if status >= 500:
        raise DemoError(f"The page answers with the error {status}; the lines above say why.")
    return True


def run(signals: Signals) -> None:
    host, port = address()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        url = os.environ.get("DATABASE_URL", "")
        server: postgres.Server | None = None
        if url:
            check_database(url)
        else:
            server = postgres.Server(postgres.home() / "data")
            say(f"Starting PostgreSQL; its data are in {server.data_dir}")
            stack.callback(server.stop)
            server.start()
            url = server.url()
        signals.check()
        gunicorn = Gunicorn(listener, url)
        stack.callback(gunicorn.stop)
        # As long as this process holds it too, clients that reconnect during the stop would wait in its queue.
        listener.close()

        deadline = time.monotonic() + START_TIMEOUT
        while not answers(host, port):
            signals.check()
            if gunicorn.poll() is not None:
                raise DemoError(f"gunicorn has ended by itself (status {gunicorn.poll()}); the lines above say why.")
            if time.monotonic() > deadline:
                raise DemoError(f"The page did not answer within {START_TIMEOUT:g} s.")
            signals.sleep(0.1)

        say(f"\n    Open {page_url(host, port)}\n")
        if host in ("0.0.0.0", "::"):
            place = network_address()
            shown = f"http://{place}:{port}/" if place else f"http://<address of this machine>:{port}/"
            say(f"From a phone or another computer in the same network: {shown}")
        say("Ctrl-C stops it.")
        while True:
            signals.sleep(0.3)
            if gunicorn.poll() is not None:
                raise DemoError(f"gunicorn has ended by itself (status {gunicorn.poll()}); stopping the rest.")
            if server is not None and not server.running:
                raise DemoError(f"PostgreSQL has ended by itself; stopping the rest. Its log: {server.log_path}")


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    signals = Signals()
    signals.install()
    try:
        run(signals)
    except Stop:
        say("\nStopped.")
        return 0
    except (DemoError, postgres.PostgresError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
