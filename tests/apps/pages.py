"""The basic app with one page, from the file PAGE, and htmx beside it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from flask import render_template_string, send_from_directory
from flask.typing import ResponseReturnValue

from tests.apps.basic import app


@app.get("/")
def page() -> ResponseReturnValue:
    return render_template_string(
        "<!doctype html><link rel=icon href=data:,><body>" + Path(os.environ["PAGE"]).read_text()
    )


@app.get("/htmx/<path:name>")
def htmx(name: str) -> ResponseReturnValue:
    spec = importlib.util.find_spec("django_htmx")
    assert spec is not None and spec.origin is not None
    return send_from_directory(Path(spec.origin).parent / "static" / "django_htmx", name)


__all__ = ["app"]
