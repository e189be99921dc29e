"""The basic app with one page, from the file PAGE, and what demo/htmx-files installs beside it."""

from __future__ import annotations

import os
from pathlib import Path

from flask import redirect, render_template_string, send_from_directory
from flask.typing import ResponseReturnValue

from demo.htmx import find_htmx
from tests.support.apps.basic import app


@app.get("/")
def page() -> ResponseReturnValue:
    return render_template_string(
        "<!doctype html><link rel=icon href=data:,><body>" + Path(os.environ["PAGE"]).read_text()
    )


dishes: list[str] = []


@app.post("/dish/<name>")
def add_dish(name: str) -> ResponseReturnValue:
    dishes.append(name)
    return ""


@app.get("/rows")
def rows() -> ResponseReturnValue:
    """The dishes of this worker, as HTML."""
    return render_template_string("{% for dish in dishes %}<li>{{ dish }}</li>{% endfor %}", dishes=dishes)


@app.get("/htmx/<path:name>")
def htmx(name: str) -> ResponseReturnValue:
    files = find_htmx().parent.parent
    for whole in (f"{name}.js", f"{name}/index.js"):  # what their imports leave out, as bundlers add it
        if (files / whole).is_file():
            return redirect(f"/htmx/{whole}")
    return send_from_directory(files, name)


__all__ = ["app"]
