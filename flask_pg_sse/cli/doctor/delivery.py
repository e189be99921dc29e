"""The workers: they hear, and what is sent goes to channels that somebody listens to."""

from __future__ import annotations

from ...engine.postgres.listener import BEAT_EVERY, PostgresListener
from ...repeats import duration
from .result import Result, fault, ok
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
    return ok(f"{len(rows)} workers listen, and all of them are awake.")


CHECKS: dict[str, Check] = {
    "listeners": listeners,
}
