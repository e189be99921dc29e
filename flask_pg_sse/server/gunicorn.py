"""All that the package knows of gunicorn's insides: names that another version may change stand here and nowhere else.

Tried with gunicorn 23 to 27. Where something is not as expected, the stream goes on without it: through its generator,
with the worker's own limits unknown.
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
    """Return the worker whose method a signal handler is; None if it is no worker's."""
    owner = getattr(handler, "__self__", None)
    workers = sys.modules.get("gunicorn.workers.base")
    return owner if workers is not None and isinstance(owner, workers.Worker) else None


def is_running() -> bool:
    """Tell whether this process may be a gunicorn worker: it has loaded what workers are made of."""
    return "gunicorn.workers.base" in sys.modules


def is_arbiters(handler: Any) -> bool:
    """Tell whether a signal handler is the arbiter's, which loads the app itself under --preload."""
    return hasattr(getattr(handler, "__self__", None), "spawn_workers")


def threads_of(worker: Any) -> int | None:
    """Return the threads of a gthread worker, each of which serves one request; None for other workers."""
    return int(worker.cfg.threads) if worker.cfg.worker_class_str == "gthread" else None


def connections_of(worker: Any) -> int:
    """Return how many connections a worker holds at once."""
    return int(worker.cfg.worker_connections)


# -- one request and its response


def socket_of(environ: Mapping[str, Any]) -> Any:
    """Return the client's socket; None under another server."""
    return environ.get("gunicorn.socket")


_used_of_response = operator.attrgetter("chunked", "headers", "headers_sent", "req", "sent", "sock")


def response_behind(write: Any) -> Any:
    """Return the response of gunicorn's whose method `write` is (`start_response` returned it); None if there is none.

    Only a response over HTTP/1 that has all that is used of it: a later gunicorn's may not.
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
    """Keep the token out of gunicorn's log of a request that fails after all, in an app's teardown for example."""
    for name in ("uri", "query"):
        text = getattr(response.req, name, None)
        if isinstance(text, str) and "token=" in text:
            setattr(response.req, name, without_token(text))


_REQUEST_TEXTS = ("method", "uri", "path", "query", "fragment", "scheme")
_texts_of = operator.attrgetter(*_REQUEST_TEXTS)
# gunicorn makes new objects of these for each request, out of few numbers.
_REQUEST_NUMBERS = ("version", "max_buffer_headers")


def intern_request(environ: dict[str, Any], response: Any) -> None:
    """Make one object of all that a request has in common with others; its response has begun.

    gunicorn holds the request's environ and headers until the response has ended, for its access log. Raises
    AttributeError, KeyError or TypeError where a version of gunicorn keeps the request otherwise.
    """
    request = response.req
    _intern_objects(environ, request)
    names, values = interned_values(environ), interned_values(environ.values())
    environ.clear()  # a dict gives up its old names only so
    environ.update(zip(names, values, strict=True))
    for name, text in zip(_REQUEST_TEXTS, interned_values(_texts_of(request)), strict=True):
        setattr(request, name, text)  # not by vars(), which makes a dict that the object has not had
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
    if isinstance(streams, list):  # others once the log's files have been opened again
        environ["wsgi.errors"] = interned(("wsgi.errors", type(errors), *streams), errors)


def _too_late(headers: object) -> None:
    """Do what gunicorn's own `wsgi.early_hints` does once the response has begun: nothing."""
