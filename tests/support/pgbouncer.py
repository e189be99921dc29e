"""A real PgBouncer in transaction mode between an app and PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest

from tests.support.client import eventually
from tests.support.postgres import connect
from tests.support.servers import free_port
from tools import postgres

PROGRAM = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@contextmanager
def pgbouncer(direct_url: str, **settings: object) -> Iterator[str]:
    """Run one for the time of the context, with settings of its own on top.

    Gives the URL that leads through it to the database of `direct_url`.
    """
    if PROGRAM is None:
        pytest.skip("no PgBouncer: install it (Debian: apt-get install pgbouncer)")
    direct = urlsplit(direct_url)
    port = free_port()
    folder = postgres.scratch()
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n* = host=127.0.0.1 port={direct.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        "pool_mode = transaction\nserver_idle_timeout = 1\nserver_login_retry = 1\n"
        + "".join(f"{key} = {value}\n" for key, value in settings.items())
    )
    config.chmod(0o644)
    user: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}  # it refuses to run as root
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **user
        )
    url = f"postgresql://postgres@127.0.0.1:{port}{direct.path}"
    try:
        eventually(lambda: _answers(url, process, folder / "log"), 60, "PgBouncer answers")
        yield url
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        connect(url).close()
    except psycopg2.OperationalError:
        return False
    return True
