"""Run the demo: a PostgreSQL (unless DATABASE_URL is set), gunicorn, and an orderly end. Started by ``./demo/run``.

HOST (127.0.0.1) and PORT (8000) choose the address, and HOST_NAMES adds host names under which the demo is found.
Ctrl-C, SIGTERM or SIGHUP stops everything that was started, and the exit status is 0. It is 1 when something could not
be started or ended by itself.
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
from collections.abc import Iterator

import psycopg2
from gunicorn.config import make_settings

from tools import postgres

START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0
COMMAND = [
    sys.executable, "-m", "gunicorn", "demo.app:app", "-k", "gevent", "-w", "2", "--log-level", "warning",
    # gunicorn's own limit for open streams; the package ends them sooner by itself.
    "--graceful-timeout", "4",
]  # fmt: skip
if "control_socket_disable" in make_settings():
    # Newer gunicorns would open a control socket in the user's home directory.
    COMMAND.append("--no-control-socket")


class DemoError(RuntimeError):
    """The demo cannot run; the message says what, why and the remedy."""


def address() -> tuple[str, int]:
    """Return host and port from the environment."""
    text = os.environ.get("PORT") or "8000"
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise DemoError(f"PORT={text!r} is no port: a number from 1 to 65535 is expected, as in PORT=8001 ./demo/run")
    return os.environ.get("HOST") or "127.0.0.1", int(text)


def shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return the listening socket that gunicorn is given.

    It is opened here, before anything is started, so that a port in use is found at once and cannot be taken by
    another program while PostgreSQL starts.
    """
    in_use = DemoError(
        f"{shown(host, port)} is in use by another program (an earlier demo, perhaps). Stop that one, or choose "
        f"another port:\n\n    PORT={port + 1 if port < 65535 else 8000} ./demo/run\n"
    )
    # Some systems (macOS) let a second program bind a part of an address that is taken as a whole.
    with contextlib.suppress(OSError), socket.create_connection((reachable(host), port), timeout=1):
        raise in_use
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(*found[:3])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
        listener.listen(2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise in_use from None
        raise DemoError(
            f"HOST={host} PORT={port} cannot be listened on: {error.strerror}. HOST must be an address of this "
            f"machine; a PORT below 1024 needs rights that not every user has."
        ) from None
    return listener


def reachable(host: str) -> str:
    """Return an address at which a server that listens on `host` answers on this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def network_address() -> str:
    """Return the address under which other devices see this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        # "Connecting" a UDP socket sends nothing; it only asks the routing table. The address is one for examples.
        probe.connect(("192.0.2.1", 9))
        found = str(probe.getsockname()[0])
        if not found.startswith(("127.", "0.")):
            return found
    return "<address of this machine>"


def check_database(url: str) -> None:
    """Raise unless a PostgreSQL answers at `url`."""
    plain = re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", url)
    try:
        psycopg2.connect(plain, connect_timeout=5).close()
    except (psycopg2.Error, UnicodeError) as error:
        raise DemoError(
            f"DATABASE_URL is set, and no connection came about:\n\n    {hide_password(str(error).strip(), plain)}\n\n"
            f"Start that server, correct DATABASE_URL (postgresql://user@host/database), or unset it to use an "
            f"embedded PostgreSQL."
        ) from None


def hide_password(text: str, url: str) -> str:
    found = re.search(r"://[^/@]*?:([^/]+)@", url) or re.search(r"password\s*=\s*('[^']*'|[^\s&]+)", url)
    return text.replace(found.group(1), "***") if found else text


@contextlib.contextmanager
def gunicorn(listener: socket.socket, database_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the web server as a child in a session of its own: Ctrl-C at the terminal reaches only this process."""
    process = subprocess.Popen(
        [*COMMAND, "-b", f"fd://{listener.fileno()}"],
        cwd=postgres.ROOT,
        env={**os.environ, "DATABASE_URL": database_url},
        stdin=subprocess.DEVNULL,
        pass_fds=(listener.fileno(),),
        start_new_session=True,
    )
    guard = postgres.guard(process.pid, "TERM")
    # As long as this process holds it too, clients that reconnect during the stop would wait in its queue.
    listener.close()
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            print("gunicorn does not end; killing it.", flush=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()
        guard.communicate(b"done\n")


def answers(host: str, port: int) -> bool:
    """Whether anything that speaks HTTP answers."""
    with contextlib.closing(http.client.HTTPConnection(reachable(host), port, timeout=2)) as connection:
        try:
            connection.request("GET", "/")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return False
    if status >= 500:
        raise DemoError(f"The page answers with the error {status}; the lines above say why.")
    return True


def run(asked_to_stop: list[int]) -> None:
    """Run everything until `asked_to_stop` has a signal in it, or something ends by itself."""
    host, port = address()
    url = os.environ.get("DATABASE_URL", "")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        server = None
        if url:
            check_database(url)
        else:
            server = postgres.Server(postgres.home() / "data")
            print(f"Starting PostgreSQL; its data are in {server.data_dir}", flush=True)
            stack.enter_context(server)
            url = server.url()
        if asked_to_stop:
            return
        process = stack.enter_context(gunicorn(listener, url))
        deadline = time.monotonic() + START_TIMEOUT
        ready = False
        while not asked_to_stop:
            if process.poll() is not None:
                raise DemoError(f"gunicorn has ended by itself (status {process.poll()}); the lines above say why.")
            if server is not None and not server.running:
                raise DemoError(f"PostgreSQL has ended by itself; stopping the rest. Its log: {server.log_path}")
            if not ready and time.monotonic() > deadline:
                raise DemoError(f"The page did not answer within {START_TIMEOUT:g} s.")
            if not ready and (ready := answers(host, port)):
                print(f"\n    Open http://{shown(reachable(host), port)}/\n")
                if host in ("0.0.0.0", "::"):
                    print(f"From a phone or another computer in the same network: http://{network_address()}:{port}/")
                print("Ctrl-C stops it.", flush=True)
            time.sleep(0.2)


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    asked_to_stop: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup asks that the end of the terminal be ignored.
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda number, frame: asked_to_stop.append(number))
    try:
        run(asked_to_stop)
    except (DemoError, postgres.PostgresError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print("\nStopped.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
