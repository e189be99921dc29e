"""Whether this web server can serve streams at all, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..concurrency import is_patched
from . import gunicorn

# The default limit of streams for a worker about which nothing is known.
_STREAMS = 1000


def why_no_stream(environ: Mapping[str, Any], worker: Any = None) -> str | None:
    """Return why a stream would freeze this server, and the remedy; None if it would not.

    `worker` is gunicorn's worker, if it is known. A stream occupies the thread or process that serves it for hours. A
    server that handles one request at a time would then never answer another one.
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
            "gunicorn -k gevent, or give it more --threads than streams."
        )
    if environ.get("wsgi.multithread"):
        return None
    if under_gunicorn:
        return (
            "Streams cannot be served by gunicorn's sync worker, which handles one request at a time: this stream "
            "would block all others. Run gunicorn -k gevent (or -k gthread with --threads)."
        )
    if is_patched() or "SERVER_SOFTWARE" not in environ:  # greenlets, or Flask's test client without a server
        return None
    return (
        "Streams cannot be served by this server, which handles one request at a time: this stream would block all "
        "others. Run gunicorn -k gevent. With gevent's pywsgi, call gevent.monkey.patch_all() before any other import. "
        "With flask run, omit --without-threads."
    )


def room_for_streams(worker: Any) -> tuple[int, int | None]:
    """Return the default limit of streams for a gunicorn worker, and the number of streams that occupies it completely.

    A stream holds a connection and, under gthread, a thread. The default leaves some of them for other requests. The
    second number is None if it is not known.
    """
    if worker is None:
        return _STREAMS, None
    holds, threads = gunicorn.connections_of(worker), gunicorn.threads_of(worker)
    if threads is not None:
        holds = min(holds, threads)
        return max(1, holds - 1), holds
    return max(1, holds * 9 // 10), holds
