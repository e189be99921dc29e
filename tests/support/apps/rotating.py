"""The basic app. A function finds its database's URL, with the password from a file, as Vault's agent leaves it.

`PASSWORD_FILE` names the file. With `LISTEN`, SSE_LISTEN_URL is such a function too.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.support.apps import basic

app = basic.app
asked: list[float] = []


def find() -> str:
    asked.append(time.monotonic())
    time.sleep(0.05)  # it may block: under gevent other greenlets go on
    password = Path(os.environ["PASSWORD_FILE"]).read_text()
    if password == "exit":
        raise SystemExit(f"the secret is {password}")
    return os.environ["DATABASE_URL"].replace("app@", f"app:{password}@")


app.config["SSE_DATABASE_URL"] = find
if "LISTEN" in os.environ:
    app.config["SSE_LISTEN_URL"] = find
