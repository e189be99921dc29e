"""Serve htmx from the files of the installed django-htmx package, so that the page needs no CDN."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from flask import Blueprint


def find_htmx() -> Path:
    """Return the folder that holds htmx 4 and its extensions. Raises RuntimeError, with the remedy, without one."""
    spec = find_spec("django_htmx")  # finds the package without importing it: it is only a box of static files here
    for folder in (spec and spec.submodule_search_locations) or ():
        files = Path(folder, "static", "django_htmx")
        if (files / "htmx-4.min.js").is_file() and (files / "ext" / "hx-sse-4.min.js").is_file():
            return files
    raise RuntimeError(
        "The demo takes htmx 4 from the package django-htmx, and it is not installed here. "
        "Start the demo with ./demo/run, or: pip install --no-deps django-htmx"
    )


htmx_bp = Blueprint("htmx", __name__, static_folder=find_htmx(), static_url_path="/htmx")
