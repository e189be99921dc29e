"""What this web server can hold: why it can have no stream at all, and how many there may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..concurrency import is_patched
from . import gunicorn

# Streams of a worker about which nothing is known.
_STREAMS = 1000


def why_no_stream(environ: Mapping[str, Any], worker: Any = None) -> str | None:
    """Return why a stream would freeze this server, and the remedy; None if it would not.

    `worker` is gunicorn's, where it is known. A stream occupies whatever serves it for hours: under a server that has
    one request at a time nothing else would ever be answered again.
    """
    under_gunicorn = gunicorn.socket_of(environ) is not None
    if under_gunicorn and environ.get("SERVER_PROTOCOL") == "HTTP/2.0":
        return (
            "Streams cannot be served over gunicorn's own HTTP/2, which answers the requests of a connection one after "
            "another. Let nginx or another proxy speak HTTP/2 to browsers and HTTP/1.1 to gunicorn."
        )
    threads = None if worker is None else gunicorn.threads_of(worker)
    if threads is not None and threads < 2:
        return (
            "Streams cannot be served by gunicorn's gthread worker with one thread, which this one would occupy. Run "
            "gunicorn -k gevent, or give it more --threads than there are to be streams."
        )
    if environ.get("wsgi.multithread"):
        return None
    if under_gunicorn:
        return (
            "Streams cannot be served by gunicorn's sync worker, which has one request at a time: this one would stop "
            "all others. Run gunicorn -k gevent (or -k gthread with --threads)."
        )
    if is_patched() or "SERVER_SOFTWARE" not in environ:  # greenlets; or Flask's test client, no server at all
        return None
    return (
        "Streams cannot be served by this server, which has one request at a time: this one would stop all others. Run "
        "gunicorn -k gevent; with gevent's pywsgi call gevent.monkey.patch_all() before any other import; with "
        "flask run leave --without-threads away."
    )


def room_for_streams(worker: Any) -> tuple[int, int | None]:
    """Return how many streams a gunicorn worker should have by itself, and how many at all would leave it nothing else.

    A stream holds a connection, under gthread a thread: other requests are to find one too. None: not known.
    """
    if worker is None:
        return _STREAMS, None
    holds, threads = gunicorn.connections_of(worker), gunicorn.threads_of(worker)
    if threads is not None:
        holds = min(holds, threads)
        return max(1, holds - 1), holds
    return max(1, holds * 9 // 10), holds
