"""The event log: installed, usable by this role, taking events, pruned, and no larger than it must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psycopg2

from ...engine.postgres.installation import MISSING, NotUsable
from ...engine.postgres.obstacle import END_THE_TRANSACTION, committing
from ...engine.postgres.retention import HOLDERS, LATE
from ...engine.postgres.schema import SCHEMA, VERSION
from ...engine.postgres.watch import TRIAL
from ...repeats import duration
from ...settings import POLL
from .result import Result, fault, in_two, ok, warning
from .setup import Check, NotLookedAt, Setup

# Seconds that a trial waits for the lock that publishers take.
_PATIENCE = 2.0
_TRY_NOTIFY = "SELECT pg_catalog.pg_notify(%s, '')"
_TRY_LOG = (
    f"BEGIN; SELECT {SCHEMA}.publish_v1(%s::pg_catalog.text, ARRAY['{{}}'::pg_catalog.json], "
    "ARRAY[''::pg_catalog.text]); ROLLBACK"
)
_EXAMINE = f"SELECT * FROM {SCHEMA}.examine_v1()"
_SIZE = f"""
SELECT pg_catalog.pg_total_relation_size(s.relid), s.n_live_tup, s.n_dead_tup,
    pg_catalog.current_setting('autovacuum') OPERATOR(pg_catalog.=) 'on' AND NOT COALESCE(
        c.reloptions && '{{autovacuum_enabled=false,autovacuum_enabled=off}}'::pg_catalog.text[], false)
FROM pg_catalog.pg_stat_all_tables s JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) s.relid
WHERE s.schemaname OPERATOR(pg_catalog.=) '{SCHEMA}' AND s.relname OPERATOR(pg_catalog.=) 'event'
"""
# What keeps vacuum from removing rows, the oldest first. https://www.postgresql.org/docs/current/routine-vacuuming.html
_OLD_SNAPSHOTS = """
SELECT o.name FROM (
    SELECT pg_catalog.concat('the transaction of session ', a.pid, ' of role "', a.usename, '" (application_name "',
            a.application_name, '", ', a.state, ')'),
        extract(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) a.xact_start)
    FROM pg_catalog.pg_stat_activity a
    WHERE a.backend_xmin IS NOT NULL AND a.pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid()
    UNION ALL
    SELECT pg_catalog.concat('the prepared transaction ', pg_catalog.quote_literal(p.gid), ' of role "', p.owner, '"'),
        extract(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) p.prepared)
    FROM pg_catalog.pg_prepared_xacts p
    UNION ALL
    SELECT pg_catalog.concat('the replication slot ', pg_catalog.quote_ident(r.slot_name), ', which nobody reads'),
        1000000000
    FROM pg_catalog.pg_replication_slots r WHERE r.xmin IS NOT NULL AND NOT r.active
) AS o (name, seconds)
WHERE o.seconds OPERATOR(pg_catalog.>=) %s::pg_catalog.numeric ORDER BY o.seconds DESC LIMIT 3
"""
# Seconds after which a transaction counts as one that keeps vacuum away, and deleted rows that are worth a word.
_OLD = 300.0
_MANY_DEAD = 10_000
_SYNCHRONOUS = """
SELECT pg_catalog.current_setting('synchronous_standby_names'), pg_catalog.count(r.pid)
FROM (SELECT) AS one LEFT JOIN pg_catalog.pg_stat_replication r
    ON r.sync_state OPERATOR(pg_catalog.=) ANY ('{sync,quorum}'::pg_catalog.text[])
WHERE pg_catalog.pg_has_role(current_user, 'pg_monitor', 'USAGE')
    AND pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.<>) ALL ('{off,local}'::pg_catalog.text[])
"""
_INIT = "Run flask sse init."


def installed(setup: Setup) -> Result:
    """The event log is there, has a version that fits, and may be used by this role."""
    setting = setup.settings.event_log
    _ = setup.database
    if setting is False:
        return ok(
            "SSE_EVENT_LOG is false: events are not kept, and those that are sent while a client is away are lost."
        )
    try:
        log = setup.log()
    except NotUsable as error:
        text, remedy = in_two(error)
        off = "Streams and notify() fail" if setting is True else "Events are not kept"
        return fault(f"{text} {off} until this is done.", remedy)
    if log is None:
        text, remedy = in_two(MISSING)
        if setting is True:
            required = 'SSE_LISTEN_URL is "poll"' if setup.settings.listen_url == POLL else "SSE_EVENT_LOG is true"
            return fault(f"{required}, and {text[0].lower()}{text[1:]} Streams and notify() fail.", remedy)
        return warning(
            f"{text} Events that are sent while a client is away are lost.",
            f"{remedy} Or set SSE_EVENT_LOG to false, if no event need be kept.",
        )
    if log.version > VERSION:
        return warning(
            f"The event log has version {log.version}, and this package knows version {VERSION}. It works with it.",
            "Upgrade flask_pg_sse on this host.",
        )
    return ok(f"The event log has version {log.version}, and this role may use it.")


def publishing(setup: Setup) -> Result:
    """An event can be sent: the rights are there, and no other session holds the locks. Nothing is really sent."""
    run = setup.execute
    try:
        run(_TRY_NOTIFY, (TRIAL,), patience=_PATIENCE)
    except psycopg2.errors.LockNotAvailable:
        holder = committing(lambda query, args: run(query, args))
        return fault(
            f"No transaction that notifies can commit before another one has done so: {holder}.", _go_on(holder)
        )
    except psycopg2.errors.ProgramLimitExceeded:
        return fault(
            "PostgreSQL's queue of notifications is full: nothing that notifies can commit.",
            f"{END_THE_TRANSACTION[:1].upper()}{END_THE_TRANSACTION[1:]}.",
        )
    try:
        log = setup.usable_log
    except NotLookedAt:
        return ok("A NOTIFY could be sent at once.")
    try:
        run(log.guarded(_TRY_LOG), (TRIAL,), patience=_PATIENCE)
    except psycopg2.errors.LockNotAvailable as error:
        text = error.diag.message_primary or str(error)
        return fault(text, _go_on(text))
    except psycopg2.errors.InsufficientPrivilege as error:
        return fault(
            f"This role may not send events through the log: {error.diag.message_primary}.",
            "Run flask sse init --grant-to ROLE, as the role that installed it.",
        )
    return ok("A NOTIFY, and an event of the log, could be sent at once.")


def _go_on(holder: str) -> str:
    if "synchronous standby" in holder:
        return _STANDBY_BACK
    return f"Let that session go on, or {END_THE_TRANSACTION}."


_STANDBY_BACK = "Bring the synchronous standby back, or take it out of synchronous_standby_names."


def synchronous_standby(setup: Setup) -> Result | None:
    """Commits do not wait for a standby that is gone."""
    for names, standbys in setup.execute(_SYNCHRONOUS):
        if names and not standbys:
            return fault(
                f"Commits wait for a synchronous standby (synchronous_standby_names is {names!r}), and none is "
                "connected: every notify() hangs.",
                _STANDBY_BACK,
            )
    return None


@dataclass(frozen=True, slots=True)
class Examined:
    """What the log's function examine_v1() says."""

    installations: int
    retentions: int
    oldest: float | None
    pending: int
    drawn: int
    highest: int | None
    triggers: str | None
    channels: list[str]


def examined(setup: Setup) -> Examined:
    """Return what the log's own function says of its tables. Raises `NotLookedAt` if there is no log."""
    if setup.examined is None:
        [row] = setup.execute(setup.usable_log.guarded(_EXAMINE))
        setup.examined = Examined(*row)
    found: Examined = setup.examined
    return found


def tables(setup: Setup) -> Iterator[Result]:
    """The log's tables and triggers are as the installation makes them."""
    found = examined(setup)
    if (found.installations, found.retentions) != (1, 1):
        yield fault(
            f"The tables of one row have {found.installations} (installation) and {found.retentions} (retention) rows.",
            _INIT,
        )
    if found.triggers:
        yield fault(f"Triggers are not as flask sse init sets them, as after a restore: {found.triggers}.", _INIT)
    if found.pending:
        yield warning(
            f"Events stay in flask_pg_sse.pending and were never sent ({found.pending}): they were written while "
            "triggers did not fire (session_replication_role = replica, or a trigger that is off).",
            "Send them again if they matter, and DELETE FROM flask_pg_sse.pending. Pruning deletes them after an hour.",
        )
    # The trial to publish has just drawn an id, by the clock.
    if found.highest is not None and found.drawn < found.highest:
        yield fault(
            "The log's sequence and the server's clock are both behind the last event, as after a restore: new events "
            "get ids that streams have passed, and do not arrive.",
            f"SELECT setval('flask_pg_sse.event_id', {found.highest}), as the log's owner; and set the clock right.",
        )
        return
    if not (found.triggers or found.pending) and (found.installations, found.retentions) == (1, 1):
        yield ok("The log's tables and triggers are as flask sse init makes them.")


def pruning(setup: Setup) -> Result:
    """Events older than SSE_RETENTION are deleted."""
    found, retention = examined(setup), setup.settings.retention
    if found.oldest is None:
        return ok("The log is empty.")
    text = f"The oldest event is {duration(found.oldest)} old, and SSE_RETENTION is {duration(retention)}."
    if found.oldest <= retention + LATE:
        return ok(text)
    [(holders,)] = setup.execute(setup.usable_log.guarded(HOLDERS))
    if "session " in holders and not holders.startswith("no session"):
        return warning(f"{text} Pruning does not happen: the lock for it is held by {holders}.", f"{_go_on(holders)}")
    return warning(
        f"{text} Nothing prunes: the workers do it while they serve streams.",
        "Run flask sse prune, from cron too if no worker serves streams. If workers do, read their logs.",
    )


def size(setup: Setup) -> Result:
    """The log is not larger than its events."""
    _ = setup.usable_log
    [(in_bytes, live, dead, autovacuum)] = setup.execute(_SIZE)
    text = f"The log has about {live} events, and {_mb(in_bytes)} with its indexes."
    if dead < max(_MANY_DEAD, live / 2):
        return ok(text)
    text = f"{text} About {dead} deleted events take room in it, and are not removed"
    holders = [name for (name,) in setup.execute(_OLD_SNAPSHOTS, (_OLD,))]
    if holders:
        return warning(
            f"{text}: vacuum has to keep them for {', '.join(holders)}.",
            "End that transaction (COMMIT or ROLLBACK PREPARED; pg_terminate_backend()), or drop that slot "
            "(pg_drop_replication_slot()).",
        )
    if not autovacuum:
        return warning(f"{text}: autovacuum is off.", f"Set autovacuum to on, and VACUUM {SCHEMA}.event now.")
    return ok(f"{text} yet: autovacuum comes within minutes.")


def _mb(number: int) -> str:
    return f"{number / 1_000_000:.1f} MB"


CHECKS: dict[str, Check] = {
    "event log": installed,
    "publishing": publishing,
    "synchronous standby": synchronous_standby,
    "log tables": tables,
    "pruning": pruning,
    "log size": size,
}
