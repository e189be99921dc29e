"""What is known of uWSGI: how many requests one of its processes answers at once.

It does not give its name. `wsgi.multithread` says whether there are threads, and not how many. But within it there is a
module `uwsgi`. https://uwsgi-docs.readthedocs.io/en/latest/PythonModule.html
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..concurrency.greenlets import is_patched

REFUSAL = (
    "Streams cannot be served by uWSGI as it is started here: a process handles one request at a time, and this stream "
    "would block all others. Start it with --threads, and more of them than streams, or with --gevent and "
    "--gevent-monkey-patch. Or run gunicorn -k gevent."
)


def serves(environ: Mapping[str, Any]) -> bool:
    """Tell whether a request comes from uWSGI."""
    return "uwsgi.version" in environ


def greenlets() -> int | None:
    """Return how many greenlets of a process answer requests; None if it has threads, or is no process of uWSGI."""
    return _cores() if getattr(_module(), "loop", None) == b"gevent" else None


def threads() -> int | None:
    """Return how many threads of a process answer requests; None if it has greenlets, or is no process of uWSGI."""
    module = _module()
    if module is None or module.loop is not None:
        return None
    # With --async and no loop there are as many cores, and one thread for all of them.
    return 1 if "async" in module.opt or b"async" in module.opt else _cores()


def at_once() -> int:
    """Return how many requests a process of uWSGI answers at once, as far as streams let it."""
    return (greenlets() if is_patched() else None) or threads() or 1


def _module() -> Any:
    module: Any = sys.modules.get("uwsgi")
    return module if hasattr(module, "cores") and hasattr(module, "loop") and hasattr(module, "opt") else None


def _cores() -> int | None:
    module = _module()
    return None if module is None else int(module.cores)
