"""Everything that the package knows of gunicorn's insides. Names that another version may change are used only here.

Tested with gunicorn 23 to 27. If something is not as expected, the stream goes on without it: through its generator,
and without knowing the worker's limits.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping
from typing import Any

from ..tokens import without_token
from .interning import NO_INPUT, interned, interned_pairs, interned_values

# -- the worker


def worker_behind(handler: Any) -> Any:
    """Return the worker whose method a signal handler is; None if it is not a worker's method."""
    owner = getattr(handler, "__self__", None)
    workers = sys.modules.get("gunicorn.workers.base")
    return owner if workers is not None and isinstance(owner, workers.Worker) else None


def is_running() -> bool:
    """Tell whether this process may be a gunicorn worker: it has loaded the module of gunicorn's workers."""
    return "gunicorn.workers.base" in sys.modules


def is_arbiters(handler: Any) -> bool:
    """Tell whether a signal handler is the arbiter's. With --preload, the arbiter loads the app."""
    return hasattr(getattr(handler, "__self__", None), "spawn_workers")


def threads_of(worker: Any) -> int | None:
    """Return the number of a gthread worker's threads, each of which serves one request; None for other workers."""
    return int(worker.cfg.threads) if worker.cfg.worker_class_str == "gthread" else None


def connections_of(worker: Any) -> int:
    """Return how many connections a worker can hold at once."""
    return int(worker.cfg.worker_connections)


# -- one request and its response


def socket_of(environ: Mapping[str, Any]) -> Any:
    """Return the client's socket; None under another server."""
    return environ.get("gunicorn.socket")


_used_of_response = operator.attrgetter("chunked", "headers", "headers_sent", "req", "sent", "sock")


def response_behind(write: Any) -> Any:
    """Return gunicorn's response, whose method `write` is; None if there is none. `start_response` returned `write`.

    Also None for HTTP/2, and for a response without an attribute that is used here, as a later gunicorn's may be.
    """
    response = getattr(write, "__self__", None)
    of = type(response)
    if (of.__module__, of.__qualname__) != ("gunicorn.http.wsgi", "Response"):
        return None
    try:
        _used_of_response(response)
    except AttributeError:
        return None
    return response


def mask_token(response: Any) -> None:
    """Keep the token out of gunicorn's log of a request that fails later, for example in an app's teardown."""
    for name in ("uri", "query"):
        text = getattr(response.req, name, None)
        if isinstance(text, str) and "token=" in text:
            setattr(response.req, name, without_token(text))


_REQUEST_TEXTS = ("method", "uri", "path", "query", "fragment", "scheme")
_texts_of = operator.attrgetter(*_REQUEST_TEXTS)
# gunicorn makes new objects for these in each request, though the numbers are mostly the same.
_REQUEST_NUMBERS = ("version", "max_buffer_headers")


def intern_request(environ: dict[str, Any], response: Any) -> None:
    """Share the values that a request has in common with others. Call it once the response has begun.

    gunicorn keeps the request's environ and headers for its access log until the response has ended. Raises
    AttributeError, KeyError or TypeError if this version of gunicorn keeps the request differently.
    """
    request = response.req
    _intern_objects(environ, request)
    names, values = interned_values(environ), interned_values(environ.values())
    environ.clear()  # otherwise the dict keeps its old name objects
    environ.update(zip(names, values, strict=True))
    for name, text in zip(_REQUEST_TEXTS, interned_values(_texts_of(request)), strict=True):
        setattr(request, name, text)  # not with vars(), which would create a dict for the object
    [response.status] = interned_values([response.status])
    for name in _REQUEST_NUMBERS:
        setattr(request, name, interned(getattr(request, name)))
    request.headers[:] = interned_pairs(request.headers)
    response.headers[:] = interned_pairs(response.headers)


def _intern_objects(environ: dict[str, Any], request: Any) -> None:
    if "wsgi.early_hints" in environ:
        environ["wsgi.early_hints"] = _too_late
    if not environ.get("CONTENT_LENGTH") and "HTTP_TRANSFER_ENCODING" not in environ:
        if request.body is environ["wsgi.input"]:
            request.body = NO_INPUT
        environ["wsgi.input"] = NO_INPUT
    errors = environ["wsgi.errors"]
    streams = getattr(errors, "streams", None)
    if isinstance(streams, list):  # part of the key, because gunicorn replaces the streams when it reopens its logs
        environ["wsgi.errors"] = interned(("wsgi.errors", type(errors), *streams), errors)


def _too_late(headers: object) -> None:
    """Do nothing, as gunicorn's own `wsgi.early_hints` does once the response has begun."""
