"""`flask sse status --all-hosts`: ask through PostgreSQL, and put what comes to the workers of this host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import click

from ..engine.postgres.questions import ask_all_hosts
from ..errors import ConfigurationError
from ..runtime import Runtime
from ..server.host import Worker, in_order

# Seconds in which answers are awaited. How many hosts there are is not known, so it always takes that long.
_WITHIN = 1.0


def question_of(runtime: Runtime) -> Callable[[], list[Worker]]:
    """Return what asks the workers of all hosts, which raises `PgSSEError`. Raises ClickException if none can ask."""
    try:
        keys = runtime.signing_keys("flask sse status --all-hosts")
        if runtime.redis is not None or runtime.settings.broker_url is not None:
            raise ConfigurationError("--all-hosts needs PostgreSQL: no other bus carries the question.")
        _, listen_dsn = runtime.databases()
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from None
    if listen_dsn is None:
        raise click.ClickException(
            '--all-hosts needs LISTEN, and with SSE_LISTEN_URL = "poll" the workers do not use it. Run flask sse '
            "status on each host."
        )
    return functools.partial(ask_all_hosts, listen_dsn, keys, _WITHIN)


def with_others(here: Iterable[Worker], answered: Iterable[Worker]) -> list[Worker]:
    """Return the workers of this host, and those others that have answered. This host's have answered too."""
    found = list(here)
    known = {_identity(worker) for worker in found}
    for worker in answered:
        if _identity(worker) not in known:
            known.add(_identity(worker))
            found.append(worker)
    return in_order(found)


def _identity(worker: Worker) -> object:
    # Not host and process for all: containers may share the name of the host, and each has a process 7.
    return worker.get("name") or (worker.get("host"), worker.get("pid"))
