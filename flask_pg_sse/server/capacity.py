"""Whether this web server can serve streams at all, and how many."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Mapping
from typing import Any

from ..concurrency.greenlets import is_patched
from . import gunicorn, uwsgi

# The default limit of streams for a worker about which nothing is known.
_STREAMS = 1000

# Why a server cannot serve streams, and the remedy.
EVENTLET = (
    "Streams cannot be served in a process that eventlet has patched: the connection that listens to "
    "PostgreSQL cannot wait there. Run gunicorn -k gevent (or -k gthread with --threads)."
)
HTTP2 = (
    "Streams cannot be served over gunicorn's own HTTP/2, which answers the requests of a connection one after "
    "another. Let nginx or another proxy speak HTTP/2 to browsers and HTTP/1.1 to gunicorn."
)
ONE_THREAD = (
    "Streams cannot be served by gunicorn's gthread worker with one thread, which this one would occupy. Run "
    "gunicorn -k gevent, or give it more --threads than streams."
)
SYNC = (
    "Streams cannot be served by gunicorn's sync worker, which handles one request at a time: this stream "
    "would block all others. Run gunicorn -k gevent (or -k gthread with --threads)."
)
# SSE_MAX_STREAMS leaves no connection for other requests: for `%` with the two numbers.
TOO_MANY_STREAMS = (
    "SSE_MAX_STREAMS is %d, and this worker holds %d connections at once. With that many streams it can answer no "
    "other request. Raise --worker-connections (--threads under gthread and uWSGI), or lower SSE_MAX_STREAMS."
)


def why_no_stream(environ: Mapping[str, Any], worker: Any = None, *, limited: bool = False) -> str | None:
    """Return why a stream would freeze this server, and the remedy; None if it would not.

    `worker` is gunicorn's worker, if it is known. `limited` says that `SSE_MAX_STREAMS` is set.

    A stream occupies the thread or process that serves it for hours. A server that handles one request at a time would
    then never answer another one, and a server with a few threads would not after a few streams. So the servers below
    serve streams. Another one does if `SSE_MAX_STREAMS` says how many it can take.
    """
    if _is_patched_by_eventlet():
        return EVENTLET
    under_gunicorn = gunicorn.socket_of(environ) is not None
    if under_gunicorn and environ.get("SERVER_PROTOCOL") == "HTTP/2.0":
        return HTTP2
    threads = None if worker is None else gunicorn.threads_of(worker)
    if threads is not None and threads < 2:
        return ONE_THREAD
    if uwsgi.serves(environ):
        return uwsgi.REFUSAL if uwsgi.at_once() < 2 else None
    software = environ.get("SERVER_SOFTWARE", "")
    if is_patched() and (limited or software.startswith("gevent/")):  # pywsgi, also as gunicorn's worker
        return None
    if environ.get("wsgi.multithread") and not _is_main_thread():
        if under_gunicorn or limited or software.startswith("Werkzeug/"):
            return None
        return (
            f"Streams cannot be served by this server ({software or 'it does not say its name'}): it is not known how "
            "many threads it has, and a few streams could occupy them all and stop the app. Run gunicorn -k gevent. Or "
            "set SSE_MAX_STREAMS to a smaller number than it has threads. It may notice late, or never, that a client "
            "has left."
        )
    if under_gunicorn:
        return SYNC
    if _is_test_client(environ):
        return None
    return (
        "Streams cannot be served by this server, which handles one request at a time: this stream would block all "
        "others. Run gunicorn -k gevent. With gevent's pywsgi, call gevent.monkey.patch_all() before any other import. "
        "With flask run, omit --without-threads."
    )


def _is_main_thread() -> bool:
    """Tell whether this request is handled where the server waits for others, whatever it says of its threads."""
    return not is_patched() and threading.current_thread() is threading.main_thread()


def _is_test_client(environ: Mapping[str, Any]) -> bool:
    """Tell whether the request comes from Flask's test client or its like: from no server, with a body in memory.

    uWSGI does not give its name either, but it reads the body from the connection.
    """
    if "SERVER_SOFTWARE" in environ or environ.get("wsgi.multithread") or environ.get("wsgi.multiprocess"):
        return False
    return isinstance(environ.get("wsgi.input"), io.BytesIO | None)


def _is_patched_by_eventlet() -> bool:
    patcher: Any = sys.modules.get("eventlet.patcher")
    return patcher is not None and any(map(patcher.is_monkey_patched, ("socket", "select", "thread")))


def room_for_streams(worker: Any) -> tuple[int, int | None]:
    """Return the default limit of streams for this process, and the number of streams that occupies it completely.

    `worker` is gunicorn's worker, if it is one.

    A stream holds a connection and, under gthread, a thread. The default leaves some of them for other requests. The
    second number is None if it is not known.
    """
    if worker is None:
        threads, holds = uwsgi.threads(), uwsgi.greenlets() or uwsgi.threads()
        if holds is None:
            return _STREAMS, None
    else:
        holds, threads = gunicorn.connections_of(worker), gunicorn.threads_of(worker)
    if threads is not None:
        holds = min(holds, threads)
        return max(1, holds - 1), holds
    return max(1, holds * 9 // 10), holds
