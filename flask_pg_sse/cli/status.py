"""`flask sse status`: the workers that serve this app, and what they do. Those of this host need no PostgreSQL."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from ..errors import ConfigurationError, PgSSEError
from ..repeats import printable
from ..runtime import Runtime
from ..server.host import Worker, workers_here
from ..web.blueprint import sse_bp
from ..web.state import current_state
from .all_hosts import question_of, with_others

# Seconds between two looks with --watch.
_EVERY = 2.0
_NOBODY = (
    "No worker of this app has been found on this host. Run this command as the user of the workers, or as root, with "
    "the same database and secret key. A worker of gunicorn is there once it has booted (under --preload, and under "
    "other servers: once it has served a stream)."
)


@sse_bp.cli.command("status")
@click.option("--json", "as_json", is_flag=True, help='Print one line of JSON: {"workers": [{"host", "pid", …}]}.')
@click.option("--watch", is_flag=True, help="Look again every two seconds, until Ctrl-C.")
@click.option("--all-hosts", is_flag=True, help="Ask the workers of other hosts too, through PostgreSQL.")
def _status(as_json: bool, watch: bool, all_hosts: bool) -> None:
    """Show the workers of this host that serve this app: their streams, what they deliver, and whether they answer.

    PostgreSQL is asked only with --all-hosts. The workers of this host are shown also while it is away.
    """
    looks = _Looks(current_state().runtime, everywhere=all_hosts)
    if not watch:
        click.echo(looks(as_json))
        return
    try:
        while True:
            shown = looks(as_json)
            if not as_json and sys.stdout.isatty():
                click.clear()
            click.echo(shown)
            time.sleep(_EVERY)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def look(app_id: str, **question: Any) -> list[Worker]:
    """Return the workers of this host. Raises ClickException."""
    try:
        return workers_here(app_id, **question)
    except OSError as error:
        raise click.ClickException(f"The workers of this host cannot be found: {error}.") from None


class _Looks:
    """Looks at the workers, of all hosts if `everywhere`. Raises ClickException if it cannot be done at all."""

    def __init__(self, runtime: Runtime, *, everywhere: bool) -> None:
        self._app_id = _app_id(runtime)
        self._ask = question_of(runtime) if everywhere else None

    def __call__(self, as_json: bool) -> str:
        found = look(self._app_id)
        why = ""
        if self._ask is not None:
            try:
                found = with_others(found, self._ask())
            except PgSSEError as error:
                why = f"Other hosts cannot be asked: {error}"
        found = [{key: value for key, value in worker.items() if key != "name"} for worker in found]
        if as_json:
            return json.dumps({"workers": found, **({"other_hosts": why} if why else {})})
        shown = _table(found) if found else _NOBODY
        return f"{shown}\n{click.style(printable(why), fg='red')}" if why else shown


def _app_id(runtime: Runtime) -> str:
    try:
        return runtime.app_id()
    except ConfigurationError as error:
        raise click.ClickException(f"It is not known which workers to look for: {error}") from None


def _bytes(number: float | None) -> str:
    if number is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _lag(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


# A column: its heading, a worker's key, and how the value is shown.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("PID", "pid", str),
    ("STREAMS", "streams", _count),
    ("BEHIND", "behind", _count),
    ("CHANNELS", "channels", _count),
    ("DELIVERED", "delivered", _count),
    ("BYTES", "bytes", _bytes),
    ("LAG", "lag", _lag),
    ("MEMORY", "memory", _bytes),
    ("LISTENER", "listener", lambda text: str(text or "-")),
    ("VERSION", "version", lambda text: str(text or "-")),
    ("STATE", "state", str),
)
_COLOURS = {
    "serving": "green", "ready": "green", "draining": "yellow", "not used yet": "cyan", "stopped": "red",
    "not answering": "red", "away": "red", "log missing": "red",
}  # fmt: skip


def _table(workers: Sequence[Worker]) -> str:
    columns = _COLUMNS
    if len({worker.get("host") for worker in workers}) > 1:
        columns = (("HOST", "host", str), *columns)
    rows = [[printable(show(worker.get(key))) for _, key, show in columns] for worker in workers]
    headings = [heading for heading, _, _ in columns]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [click.style(_line(headings, widths), bold=True)]
    lines += [_line(row, widths, colour=True) for row in rows]
    streams = sum(worker.get("streams") or 0 for worker in workers)
    mute = sum(worker["state"] in ("stopped", "not answering") for worker in workers)
    total = f"{_plural(len(workers), 'worker')}, {_plural(streams, 'stream')}"
    lines.append(total + (click.style(f"; {mute} without an answer", fg="red") if mute else ""))
    return "\n".join(lines)


def _line(cells: Iterable[str], widths: Sequence[int], *, colour: bool = False) -> str:
    parts = []
    for cell, width in zip(cells, widths, strict=True):
        aligned = cell.rjust(width) if cell[:1].isdigit() or cell == "-" or not colour else cell.ljust(width)
        parts.append(click.style(aligned, fg=_COLOURS.get(cell)) if colour else aligned)
    return "  ".join(parts).rstrip()


def _plural(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
