"""The list of all checks, and how they run: one after the other, each for a limited time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg2

from ...errors import ConfigurationError, PgSSEError
from . import configuration, database, delivery, event_log, proxy, web_server
from .result import Result, State, fault, in_two
from .setup import Check, NotLookedAt, Setup

# In the order in which they run and are printed. A later one may need what an earlier one has found.
CHECKS: dict[str, Check] = {
    **configuration.CHECKS,
    **web_server.CHECKS,
    **database.CHECKS,
    **event_log.CHECKS,
    **delivery.CHECKS,
    **proxy.CHECKS,
}
# Seconds for one check. Those that watch a stream have as long as the user has said, and these seconds more.
LIMIT = 15.0
_WATCH_FOR_LONGER = ("proxy cuts",)


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the answer: the check's name and what it has found."""

    name: str
    result: Result


def examine(setup: Setup) -> Iterator[Finding]:
    """Run all checks, and yield what they find as soon as it is found. Nothing that a check raises gets out."""
    try:
        for name, check in CHECKS.items():
            for result in _run(name, check, setup):
                yield Finding(name, result)
    finally:
        setup.close()


def _run(name: str, check: Check, setup: Setup) -> list[Result]:
    found: list[Result] = []

    def work() -> None:
        _ask(check, setup, found)

    # A thread, because a look-up of a host's name, for example, cannot be interrupted.
    thread = threading.Thread(target=work, name=f"doctor: {name}", daemon=True)
    limit = LIMIT + (setup.seconds if name in _WATCH_FOR_LONGER and setup.url else 0)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        setup.forget_connection()
        text = f"This could not be looked at within {limit:g} s."
        return [
            fault(text, "See the other lines first. If there is none: something does not answer and does not fail.")
        ]
    return list(found)


def _ask(check: Check, setup: Setup, found: list[Result]) -> None:
    try:
        answer = check(setup)
        for result in [answer] if isinstance(answer, Result) else answer or ():
            found.append(result)
    except NotLookedAt:
        pass
    except (PgSSEError, psycopg2.Error, OSError) as error:
        text, remedy = in_two(error)
        where = "Correct the app's config." if isinstance(error, ConfigurationError) else "Read the server's log."
        found.append(fault(text, remedy or where))
    except Exception as error:  # its text may hold anything, a secret too
        text = f"The check itself failed, with {type(error).__name__}."
        found.append(fault(text, "Report it as a bug of flask_pg_sse."))


def worst(findings: list[Finding]) -> State:
    return max((finding.result.state for finding in findings), default=State.OK)
