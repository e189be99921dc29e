"""Ask the workers of all hosts what they do: one signed NOTIFY, answered to a channel of the asker's own.

Any role of the database can hear the question. All that it learns is that somebody asks: neither the question nor the
answers can be read without the app's key, and only the key tells the channel of the answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import select
import time
from typing import Any

import psycopg2

from ...channels import RESERVED_PREFIX
from ...concurrency.greenlets import poll
from ...errors import DatabaseUnavailable
from ...repeats import one_line, sentence
from ...tokens import Keys, Question, read_answer, sign_question
from . import control
from .connect import connect, execute
from .dsn import Dsn

# Seconds that the database may take for each step. Somebody waits at a terminal.
_ANSWER_WITHIN = 2.0
# Both leave at the same commit. The second comes back to the asker, who then knows that LISTEN works.
_ASK = (
    f"SELECT pg_catalog.pg_notify('{control.CHANNEL}', %s::pg_catalog.text), "
    "pg_catalog.pg_notify(%s::pg_catalog.text, 'asked'); COMMIT"
)


def ask_all_hosts(dsn: Dsn, keys: Keys, within: float) -> list[dict[str, Any]]:
    """Return what the workers of all hosts answer within so many seconds. `dsn` is the database to listen to.

    Raises `DatabaseUnavailable` if it cannot be asked, or if nothing comes back through it.
    """
    dsn = dsn.current()
    dsn = dataclasses.replace(dsn, params={**dsn.params, "connect_timeout": f"{_ANSWER_WITHIN:.0f}"})
    with contextlib.closing(connect(dsn, "flask_pg_sse status")) as connection:
        try:
            return _ask(connection, keys, within)
        except (psycopg2.Error, TimeoutError) as error:
            raise DatabaseUnavailable(f"PostgreSQL ({dsn}) failed: {sentence(one_line(error))}") from error


def _ask(connection: Any, keys: Keys, within: float) -> list[dict[str, Any]]:
    channel = f"{RESERVED_PREFIX}_{secrets.token_hex(16)}"
    execute(connection, f"LISTEN {channel}", timeout=_ANSWER_WITHIN)
    [(transaction,)] = execute(connection, "BEGIN; SELECT pg_catalog.txid_current()", timeout=_ANSWER_WITHIN)
    question = Question(channel, transaction)
    payload = json.dumps({"ask": sign_question(keys, question)})
    execute(connection, _ASK, (payload, channel), timeout=_ANSWER_WITHIN)
    poller = poll()
    poller.register(connection.fileno(), select.POLLIN)
    deadline = time.monotonic() + within
    heard = False
    found: list[dict[str, Any]] = []
    while True:
        heard = heard or bool(connection.notifies)
        while connection.notifies:
            found += read_answer(keys, connection.notifies.pop(0).payload, question.nonce)
        left = deadline - time.monotonic()
        if left <= 0:
            break
        if poller.poll(left * 1000):
            connection.poll()
    if not heard:
        raise DatabaseUnavailable(
            "LISTEN receives nothing here, as through PgBouncer: set SSE_LISTEN_URL to a direct connection to "
            "PostgreSQL."
        )
    return found
