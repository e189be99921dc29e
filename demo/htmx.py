"""Serve htmx from the files that demo/htmx-files installs, so that the page needs no CDN."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from flask import Blueprint


def find_htmx() -> Path:
    """Return the folder that holds htmx 4 and its extensions. Raises RuntimeError, with the remedy, without one."""
    spec = find_spec("demo_htmx")
    for folder in (spec and spec.submodule_search_locations) or ():
        files = Path(folder, "htmx-4", "dist")
        if (files / "htmx.min.js").is_file() and (files / "ext" / "hx-sse.min.js").is_file():
            return files
    raise RuntimeError(
        "htmx 4 is not installed here. Start the demo with ./demo/run, or: pip install ./demo/htmx-files"
    )


htmx_bp = Blueprint("htmx", __name__, static_folder=find_htmx(), static_url_path="/htmx")
