"""The console script `flask-pg-sse`: the server that stands alone, and the commands of `flask sse` without an app."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Sequence

import click
from flask import Flask
from flask.cli import ScriptInfo

from .. import serve as alone
from ..errors import ConfigurationError
from ..web.blueprint import sse_bp

# What gunicorn itself reads of its environment.
_GUNICORNS = ("GUNICORN_CMD_ARGS", "WEB_CONCURRENCY")


class _Commands(click.Group):
    def invoke(self, context: click.Context) -> object:
        """Run a command. The remedies of `flask sse` name this script instead."""
        try:
            return super().invoke(context)
        except click.ClickException as error:
            if type(error) is not click.ClickException:
                raise
            raise click.ClickException(alone.as_commands_are_called_here(error.message)) from None


@click.group(
    cls=_Commands, help="Server-Sent Events from PostgreSQL, configured by environment variables and the file .env."
)
@click.version_option(package_name="flask-pg-sse")
@click.pass_context
def main(context: click.Context) -> None:
    context.obj = ScriptInfo(create_app=_app_of_the_environment, set_debug_flag=False)


for _command in sse_bp.cli.commands.values():
    main.add_command(_command)


def _app_of_the_environment(script: object = None) -> Flask:
    try:
        alone.read_environment()
        return alone.create_app(os.environ)
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from None


@main.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address; 0.0.0.0: all addresses.")
@click.option("--port", default=8001, show_default=True, type=click.IntRange(1, 65535))
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Worker processes.  [default: 1]")
@click.argument("options", nargs=-1, metavar="[-- GUNICORN'S OWN OPTIONS]")
def _serve(host: str, port: int, workers: int | None, options: tuple[str, ...]) -> None:
    """Serve streams on GET /?channel=NAME and GET /NAME.

    This becomes gunicorn with the app flask_pg_sse.serve:app. A -b among gunicorn's own options replaces --host and
    --port.
    """
    environ = dict(os.environ)  # without .env: the workers read it, and read it again after SIGHUP
    app = _app_of_the_environment()
    try:
        alone.check_database(app)
        level = alone.log_level(os.environ)
    except ConfigurationError as error:
        raise click.ClickException(f"The server did not start: {error}") from None
    environ.update({name: os.environ[name] for name in _GUNICORNS if name in os.environ})
    line = [sys.executable, *_gunicorn(), "-k", "gevent", "--log-level", _gunicorns_level(level)]
    if not any(option.startswith(("-b", "--bind")) for option in options):
        line += ["-b", _address(host, port)]
    if workers is not None:
        line += ["-w", str(workers)]
    sys.stdout.flush()
    os.execve(sys.executable, [*line, *options, "flask_pg_sse.serve:app"], environ)


def _gunicorn() -> list[str]:
    """Return how Python runs gunicorn: by its script if there is one, because after SIGUSR2 `-m` would not work.

    gunicorn then starts itself again by the path of its module, beside which its `http` hides Python's.
    """
    script = shutil.which("gunicorn", path=sysconfig.get_path("scripts"))
    return [script] if script else ["-m", "gunicorn"]


def _gunicorns_level(level: int) -> str:
    names = {10: "debug", 20: "info", 30: "warning", 40: "error"}
    return next((name for most, name in names.items() if level <= most), "critical")


def _address(host: str, port: int) -> str:
    """Return the address for gunicorn. Raises ClickException if it is not free: gunicorn would try for five seconds."""
    try:
        if "LISTEN_FDS" not in os.environ:  # systemd listens there already, and hands its socket to gunicorn
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]  # create_server() adds the address
        raise click.ClickException(
            f"The server did not start: it cannot listen on {host}, port {port}: {why}. Stop what listens "
            "there, or choose another address with --host and --port."
        ) from None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def run(arguments: Sequence[str] | None = None) -> None:
    main(arguments, prog_name="flask-pg-sse")


if __name__ == "__main__":
    run()
