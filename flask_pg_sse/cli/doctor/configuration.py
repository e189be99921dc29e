"""The app's settings: those that nobody reads, and those that open too much or too little."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ...engine.postgres.dsn import Dsn
from ...errors import PgSSEError
from ...serve import LOSSY, OPEN_TO_ALL
from ...settings import POLL, unknown_keys
from ...web.authorize import is_public
from ...web.blueprint import sse_bp
from .result import Result, fault, ok, warning
from .setup import Check, NotLookedAt, Setup

# A name that a pattern for some channels does not match.
_ANY = "any-channel-at-all"


def settings(setup: Setup) -> Iterator[Result]:
    """All keys are known, and have values that can be read."""
    unknown = unknown_keys(setup.app.config)
    for text in unknown.values():
        yield warning(text, "Correct the key, or remove it.")
    try:
        _ = setup.state.runtime.settings
    except PgSSEError as error:
        yield fault(str(error), "Correct the value in the app's config.")
        return
    if not unknown:
        yield ok("All SSE_ keys are known, and have values that can be read.")


def secret_key(setup: Setup) -> Result:
    """There is a key to sign URLs and commands with."""
    keys = setup.state.runtime.keys()
    if keys:
        return ok("There is a secret key, so URLs can be signed and disconnect() works.")
    return warning(
        "There is no secret key, so no URL can be signed, and disconnect() is refused.",
        "Set SSE_SECRET_KEY, or an app's SECRET_KEY, to a random text, the same for all workers and hosts.",
    )


def open_channels(setup: Setup) -> Result:
    """Some channels can be listened to, and not every channel by everybody."""
    patterns = setup.settings.channels
    authorizer = setup.state.authorize or sse_bp.default_authorize
    if is_public(_ANY, patterns) or setup.state.open_to_all(authorizer):
        return warning(
            OPEN_TO_ALL,
            "Set SSE_CHANNELS to those that everybody may hear; open the others by signed URLs, or by an authorizer.",
        )
    ways = []
    if patterns:
        ways.append(f"by SSE_CHANNELS ({', '.join(patterns)})")
    if setup.state.runtime.keys():
        ways.append("by signed URLs")
    if authorizer is not None:
        ways.append("by the app's authorizer")
    if ways:
        return ok(f"Channels are open {', '.join(ways)}.")
    return fault(
        "No channel is open to anybody: every stream is refused (403).",
        "Set SSE_CHANNELS to the channels that everybody may hear; or set SECRET_KEY, and sign URLs; or set an "
        "authorizer.",
    )


def broker(setup: Setup) -> Result | None:
    """Events come from PostgreSQL, or at least from somewhere that other processes reach."""
    if setup.settings.broker_url is not None:
        return fault(
            "SSE_BROKER_URL is memory://, for tests: events reach only the process that sends them.",
            "Remove SSE_BROKER_URL, and set SSE_DATABASE_URL.",
        )
    redis = setup.state.runtime.redis
    if redis is None:
        return None
    redis.connect().disconnect()
    return warning(
        LOSSY % redis,
        "Set DATABASE_URL and RELAY_USE_PG=1, and run flask-pg-sse init, if no event may be missed.",
    )


def hosts(setup: Setup) -> Iterator[Result]:
    """A URL with several hosts says which one is wanted."""
    for dsn in _addresses(setup):
        named = dsn.params.get("host") or os.environ.get("PGHOST", "")
        if "," in named and "target_session_attrs" not in dsn.params and not os.environ.get("PGTARGETSESSIONATTRS"):
            yield warning(
                f"{dsn.source} names several hosts without saying which one is wanted. The first that answers is "
                "used, and that may be a standby after a failover.",
                f"Add ?target_session_attrs=primary to {dsn.source}.",
            )


def listen_address(setup: Setup) -> Result | None:
    """LISTEN is used. Without it, some events do not come."""
    if setup.settings.listen_url != POLL:
        return None
    return warning(
        'SSE_LISTEN_URL is "poll": the event log is read once a second. Events come up to a second late, and raw '
        "NOTIFYs and events with durable=False do not come at all.",
        "Set SSE_LISTEN_URL to a direct connection to PostgreSQL, if there is one.",
    )


def _addresses(setup: Setup) -> list[Dsn]:
    if not setup.uses_postgres:
        return []
    try:
        dsn, listen = setup.databases
        dsn, listen = dsn.current(), listen and listen.current()
    except PgSSEError:
        raise NotLookedAt from None  # the check of the database says it
    return [dsn] if listen is None or listen.source == dsn.source else [dsn, listen]


CHECKS: dict[str, Check] = {
    "settings": settings,
    "secret key": secret_key,
    "channels": open_channels,
    "broker": broker,
    "hosts": hosts,
    "listen address": listen_address,
}
