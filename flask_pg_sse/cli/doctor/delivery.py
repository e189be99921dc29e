"""The workers: they hear, and what is sent goes to channels that somebody listens to."""

from __future__ import annotations

from collections.abc import Iterator

from ...engine.postgres.listener import BEAT_EVERY, PostgresListener
from ...repeats import duration
from .event_log import examined
from .result import Result, fault, ok, warning
from .setup import Check, Setup

# Seconds without a statement of a listener after which it is stuck: it sends a beat more often than that.
_SILENT = 3 * BEAT_EVERY
_LISTENERS = """
SELECT a.pid, pg_catalog.host(a.client_addr), a.client_port,
    extract(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) a.state_change)::pg_catalog.float8
FROM pg_catalog.pg_stat_activity a
WHERE a.application_name OPERATOR(pg_catalog.=) %s::pg_catalog.text
    AND a.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
ORDER BY a.pid
"""


def listeners(setup: Setup) -> Result:
    """The listeners of all workers are awake."""
    rows = setup.execute(_LISTENERS, (PostgresListener.APPLICATION_NAME,))
    if not rows:
        return ok("No worker listens now. A worker begins with its first stream.")
    silent = [
        f"session {pid} (from {address or 'a local socket'}{f', port {port}' if address else ''}; nothing for "
        f"{duration(seconds)})"
        for pid, address, port, seconds in rows
        if seconds is not None and seconds > _SILENT
    ]
    if silent:
        return fault(
            f"{len(silent)} of {len(rows)} listeners are deaf, which send a beat every {BEAT_EVERY:g} s if they work: "
            f"{', '.join(silent)}. Their workers are stopped or busy, or their hosts are gone.",
            "Find the process of that address and port (ss -tnp), and restart that worker; if its host is gone, end "
            "the session with pg_terminate_backend().",
        )
    return ok(f"Listeners, of all hosts: {len(rows)}. All of them are awake.")


def workers(setup: Setup) -> Result:
    """The workers of this host answer, and hear."""
    found = setup.workers
    if not found:
        return ok("No worker of this app has been found on this host.")
    streams = sum(one.get("streams") or 0 for one in found)
    mute = [str(one["pid"]) for one in found if one["state"] in ("stopped", "not answering")]
    if mute:
        return fault(
            f"{len(mute)} of {len(found)} workers of this host do not answer: {', '.join(mute)}. Their streams get "
            "nothing.",
            "Restart them: kill -CONT PID if the state is T (ps -o stat), else kill -ABRT PID.",
        )
    away = [f"{one['pid']} ({one['listener']})" for one in found if one.get("listener") in ("away", "log missing")]
    if away:
        return fault(
            f"{len(away)} of {len(found)} workers of this host do not hear PostgreSQL: {', '.join(away)}.",
            "Look at the other faults, and at the log of these workers.",
        )
    return ok(f"Workers of this host: {len(found)}. Streams: {streams}.")


def names(setup: Setup) -> Iterator[Result]:
    """Nothing is sent to a channel whose name differs only in case from one that streams listen to."""
    listened = {name for one in setup.workers for name in one.get("names", ())}
    sent = examined(setup).channels  # the one that was sent to last is the last one
    for number, name in enumerate(sent):
        meant = sorted(one for one in listened if one != name and one.casefold() == name.casefold())
        if name not in listened and meant and not set(meant) & set(sent[number:]):
            yield warning(
                f"Events are sent to channel {name!r}, to which no stream listens here, and streams listen to "
                f"{meant[0]!r}. Upper and lower case differ.",
                f"Send to {meant[0]!r}; or let the pages listen to {name!r}.",
            )


CHECKS: dict[str, Check] = {
    "workers": workers,
    "listeners": listeners,
    "channel names": names,
}
