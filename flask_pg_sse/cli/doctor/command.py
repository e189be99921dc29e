"""`flask sse doctor`: print what the checks find."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import click
from flask import current_app

from ...repeats import printable
from ...serve import as_commands_are_called_here
from ...web.blueprint import sse_bp

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "fault": ("fault", "red")}


def _site(context: click.Context, option: click.Parameter, value: str | tuple[str, ...] | None) -> Any:
    if value is None or isinstance(value, tuple):
        return value if value is None else tuple(_site(context, option, one) for one in value)
    try:
        parts = urlsplit(value if "://" in value else f"https://{value}")
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise click.BadParameter("must be an http:// or https:// URL without user, password and query.")
    return parts.geturl().rstrip("/")


@sse_bp.cli.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--url", metavar="URL", callback=_site, help="Try a stream through the proxy that answers at this URL.")
@click.option(
    "--direct",
    metavar="URL",
    callback=_site,
    multiple=True,
    help="With --url: an address behind the proxy, to compare with. Repeatable, the app's own last. Default: that of "
    "the gunicorn that runs here.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1, 3600),
    help="With --url: how long to watch a quiet stream, to find what cuts it. Default: SSE_HEARTBEAT and 5 seconds.",
)
def _doctor(as_json: bool, url: str | None, direct: tuple[str, ...], seconds: float | None) -> None:
    """Look at everything from configuration to delivery, and say what to do about what is wrong.

    The exit status is 0 if all is well, 1 with warnings, and 2 with faults.
    """
    from .checks import Finding, examine, worst
    from .setup import Setup

    app: Any = current_app
    setup = Setup(app._get_current_object(), url=url, direct=direct, seconds=seconds)
    called = str if click.get_current_context().find_root().info_name != "flask-pg-sse" else as_commands_are_called_here
    findings: list[Finding] = []
    with _quiet():
        for finding in examine(setup):
            findings.append(finding)
            if not as_json:
                click.echo(called(_as_text(finding)))
    if as_json:
        lines = [
            {
                "name": one.name,
                "state": one.result.state.name.lower(),
                "text": called(one.result.text),
                "remedy": called(one.result.remedy),
            }
            for one in findings
        ]
        click.echo(json.dumps({"checks": lines}, ensure_ascii=False, indent=2))
    click.get_current_context().exit(int(worst(findings)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package's own log lines out of the answer: the checks say the same."""
    log = logging.getLogger("flask_pg_sse")
    before, log.disabled = log.level, False
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _as_text(finding: Any) -> str:
    word, colour = _MARKS[finding.result.state.name.lower()]
    line = f"{click.style(f'{word:<8}', fg=colour)}{finding.name}: {printable(finding.result.text)}"
    return f"{line}\n{'':8}Remedy: {printable(finding.result.remedy)}" if finding.result.remedy else line
