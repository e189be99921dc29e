"""`flask sse tail`: events as they come, out of the database, and on demand which streams of this host get them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import click

from ..channels import check_channel
from ..engine.base import ControlMessage, Engine, Item, Readiness
from ..engine.postgres.control import DisconnectCommands
from ..engine.postgres.installation import InstallationLookup
from ..engine.postgres.listener import PostgresListener
from ..errors import PgSSEError
from ..hub.admission import OPEN_TIMEOUT
from ..repeats import printable
from ..runtime import Runtime
from ..server import siblings
from ..web.blueprint import sse_bp
from ..web.state import current_state
from .database import database, settings

_PAGE_BYTES = 65536
_ANY_SIZE = 2**30  # no value of PostgreSQL is larger
# An id is four times the microseconds since 2020, by PostgreSQL's clock (sql/schema_1.sql), or slightly more.
_EPOCH = 1577836800
_IDS_A_SECOND = 4_000_000
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# Seconds between two looks whether somebody still reads the output, and for which an answer of the workers holds.
_LOOK_EVERY = 0.5
_STREAMS_HOLD = 1.0
# The most streams that a line names.
_MOST_NAMED = 10


@dataclass(frozen=True, slots=True)
class Since:
    """Where to begin: after an id of the log, or so many seconds ago."""

    id: int | None = None
    seconds: float | None = None


def _read_since(context: click.Context, parameter: click.Parameter, value: str | None) -> Since | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,18})([smhd]?)", value, re.ASCII)
    if found is None:
        raise click.BadParameter(f"{value!r} is neither a time, as 90s, 10m, 2h or 1d, nor an id of the event log.")
    number = int(found[1])
    return Since(seconds=number * _UNITS[found[2]]) if found[2] else Since(id=number)


@sse_bp.cli.command("tail")
@click.argument("channels", metavar="CHANNEL...", nargs=-1, required=True)
@click.option(
    "--since",
    callback=_read_since,
    metavar="TIME|ID",
    help="Begin with the events of the last 90s, 10m, 2h, 1d, or after an id; the event log has them.",
)
@click.option("--streams", is_flag=True, help="Say also which streams of this host get each event.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as one line of JSON.")
def _tail(channels: tuple[str, ...], since: Since | None, streams: bool, as_json: bool) -> None:
    """Show events as they come, also those that are not in the event log, until Ctrl-C.

    Every channel is listened to by its name; there are no patterns.
    """
    try:
        names = list(dict.fromkeys(check_channel(channel) for channel in channels))
    except PgSSEError as error:
        raise click.ClickException(str(error)) from None
    with database("Nothing can be shown", {}):  # says in a line what is wrong
        pass
    runtime = current_state().runtime
    show = _Shown(runtime, as_json=as_json, streams=streams)
    try:
        with _events(runtime, names, since) as events:
            for event in events:
                show(event)
    except PgSSEError as error:
        raise click.ClickException(f"Nothing can be shown: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # as with `| head`; without this, Python prints an error at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(141) from None
    finally:
        runtime.close()


class _Sink:
    """Puts what a listener hands over into a queue. A text is for people: it is no event."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Item | str] = queue.SimpleQueue()
        self.readiness = Readiness.AWAY
        self.why = ""  # it is away

    def deliver(self, turn: Sequence[Item], position: int) -> None:
        for item in turn:
            self.queue.put(item)

    def gap(self, reason: str, position: int) -> None:
        self.queue.put(f"Events may be missing here ({reason}).")

    def pruned(self, through: int) -> None:
        pass

    def ready(self, readiness: Readiness, *, why: str = "", silent_for: float = 0.0, earlier: object = None) -> None:
        self.readiness, self.why = readiness, why

    def caught_up(self) -> None:
        pass

    def control(self, message: ControlMessage) -> None:
        pass


@contextlib.contextmanager
def _events(runtime: Runtime, channels: Sequence[str], since: Since | None) -> Iterator[Iterator[Item | None]]:
    """Listen, and give the events: first those of the log since then, without a gap to those that come."""
    dsn, listen_dsn = runtime.databases()
    sink = _Sink()
    # Not the app's own engine: that prunes the log too, after this process's SSE_RETENTION, which may be another one.
    listener = PostgresListener(
        listen_dsn or dsn,
        sink,
        InstallationLookup(runtime.settings.event_log, runtime.settings.log_owner),
        DisconnectCommands(runtime.keys, sink.control),
        polls=listen_dsn is None,
    )
    listener.start()
    try:
        if not listener.subscribe(channels).wait(OPEN_TIMEOUT):
            late = f"PostgreSQL ({dsn}) has not confirmed LISTEN within {OPEN_TIMEOUT:g} s."
            raise click.ClickException(f"Nothing can be shown: {sink.why or late}")
        yield _in_order(sink, runtime.worker.engine, channels, since)
    finally:
        listener.stop(2.0)


def _in_order(sink: _Sink, engine: Engine, channels: Sequence[str], since: Since | None) -> Iterator[Item | None]:
    """Yield the events; None about twice a second while none comes."""
    shown = 0
    if since is not None:
        for item in _of_the_log(engine, channels, _begin(engine, since)):
            shown = item[2]
            yield item
    while True:
        try:
            found = sink.queue.get(timeout=_LOOK_EVERY)
        except queue.Empty:
            yield None
            continue
        if isinstance(found, str):
            click.echo(found, err=True)
        elif not 0 < found[2] <= shown:
            yield found


def _begin(engine: Engine, since: Since) -> int:
    if not engine.head():
        remedy = "set no SSE_EVENT_LOG" if settings().event_log is False else "run flask sse init"
        raise click.ClickException(f"--since needs the event log, which is not in use: {remedy}.")
    if since.id is not None:
        return since.id
    return max(0, int((engine.now() - (since.seconds or 0) - _EPOCH) * _IDS_A_SECOND))


def _of_the_log(engine: Engine, channels: Sequence[str], after: int) -> Iterator[Item]:
    """Yield the events in the log after an id, which need not be that of an event."""
    while True:
        page = engine.page(channels, after, _PAGE_BYTES, _ANY_SIZE)
        if page.refusal == "too-old":
            click.echo("The event log does not reach back so far: this is all that it has.", err=True)
            after = 0
        elif page.refusal is not None:  # no event has the id: begin at the last one before it
            if page.upto >= after or page.head <= after:
                return
            after = page.upto
        else:
            yield from page.items
            after = page.upto
            if after >= page.head:
                return


class _Shown:
    """Prints events: a line each."""

    def __init__(self, runtime: Runtime, *, as_json: bool, streams: bool) -> None:
        self._as_json = as_json
        self._who = _Streams(runtime.app_id()) if streams else None

    def __call__(self, item: Item | None) -> None:
        if item is None:
            if _nobody_reads():
                raise BrokenPipeError
            return
        channel, block, log_id = item
        fields = _fields(block)
        sent_at = log_id / _IDS_A_SECOND + _EPOCH if log_id else time.time()
        found: dict[str, Any] = {"channel": channel, "log_id": log_id or None, **fields}
        who = None if self._who is None else self._who.of(channel)
        if self._as_json:
            found = {"time": datetime.fromtimestamp(sent_at, timezone.utc).isoformat(timespec="milliseconds"), **found}
            click.echo(json.dumps(found if who is None else {**found, "streams": who}, ensure_ascii=False))
            return
        click.echo(_line(sent_at, found))
        if who is not None:
            click.echo(click.style(f"  → {_named(who)}", fg="green" if who else "yellow"))


def _fields(block: bytes) -> dict[str, Any]:
    """Return the fields of an encoded event. What follows its blank line is an `sse-cursor` of the package's own."""
    fields: dict[str, Any] = {"event": "message", "id": None, "data": None}
    for line in block.partition(b"\n\n")[0].decode().split("\n"):
        name, _, value = line.partition(": ")
        name = name or "comment"
        fields[name] = f"{fields[name]}\n{value}" if fields.get(name) is not None and name == "data" else value
    return {name: value for name, value in fields.items() if name}


def _line(sent_at: float, found: dict[str, Any]) -> str:
    then, now = time.localtime(sent_at), time.localtime()
    today = then[:3] == now[:3]
    parts = [
        click.style(time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then), dim=True),
        click.style(printable(found["channel"]), fg="cyan"),
        click.style(f"#{found['log_id']}" if found["log_id"] else "-", dim=True),
        click.style(printable(found["event"]), fg="yellow"),
        printable(found["data"] or ""),
    ]
    return " ".join(parts)


class _Streams:
    """Asks the workers of this host who listens."""

    def __init__(self, app_id: str) -> None:
        self._app_id = app_id
        self._known: dict[str, tuple[float, list[dict[str, Any]]]] = {}

    def of(self, channel: str) -> list[dict[str, Any]]:
        until, found = self._known.get(channel, (0.0, []))
        if time.monotonic() >= until:
            asked = siblings.ask_all(self._app_id, {"channel": channel})
            found = [{"pid": answer["pid"], **one} for answer in asked.answers for one in answer.get("listeners", ())]
            self._known[channel] = time.monotonic() + _STREAMS_HOLD, found
        return found


def _named(who: Sequence[dict[str, Any]]) -> str:
    if not who:
        return "no stream of this host"
    names = [", ".join(one["subjects"]) or one["client"] or "?" for one in who[:_MOST_NAMED]]
    more = f" and {len(who) - _MOST_NAMED} more" if len(who) > _MOST_NAMED else ""
    return f"{len(who)} stream{'' if len(who) == 1 else 's'} here: {printable('; '.join(names))}{more}"


def _nobody_reads() -> bool:
    """Tell whether the other end of a pipe that the output goes to is closed."""
    try:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        return any(what & select.POLLERR for _, what in poller.poll(0))
    except (OSError, ValueError):
        return False
