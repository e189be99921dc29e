"""Everything that the package knows of gunicorn's insides. Names that another version may change are used only here.

Tested with gunicorn 23 to 27. If something is not as expected, the stream goes on without it: through its generator,
and without knowing the worker's limits.
"""

from __future__ import annotations

import _socket
import contextlib
import functools
import io
import json
import operator
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..tokens import without_token
from .interning import NO_INPUT, interned, interned_pairs, interned_values
from .release import LOGGED_BY_DEFAULT, release_environ, shortened, within_room

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


def print_settings() -> None:
    """Print as JSON the settings that gunicorn would have with this process's arguments and environment.

    It reads its configuration file as gunicorn does, so this must be a process of its own.
    """
    from gunicorn.app.wsgiapp import WSGIApplication

    sys.argv.append("no:app")  # gunicorn wants a name, and takes the first one; it is not loaded
    cfg = WSGIApplication("%(prog)s [OPTIONS] [APP_MODULE]", prog="gunicorn").cfg
    hooks = [getattr(hook, "__code__", None) for hook in (cfg.post_fork, cfg.post_worker_init, cfg.when_ready)]
    named = [name for code in hooks if code is not None for name in code.co_names]
    print(
        json.dumps(
            {
                "worker_class": cfg.worker_class_str,
                "workers": cfg.workers,
                "threads": cfg.threads,
                "worker_connections": cfg.worker_connections,
                "http2": "h2" in getattr(cfg, "http_protocols", ()),
                "binds": cfg.bind,
                "psycogreen": any("psycogreen" in name for name in [*sys.modules, *named]),
            }
        )
    )


def has_booted(worker: Any) -> bool:
    """Tell whether a worker has loaded the app, and serves requests."""
    return bool(worker.booted)


def arbiter_of(worker: Any) -> int:
    """Return the process id of the arbiter that has started a worker."""
    return int(worker.ppid)


def cannot_boot(reason: str) -> Exception:
    """Return the exception for which gunicorn prints one line, the reason, and stops with an exit status."""
    from gunicorn.errors import AppImportError

    return AppImportError(reason)


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
        if isinstance(text, str):
            setattr(response.req, name, without_token(text))


def end_connection(response: Any, *, unfinished: bool) -> None:
    """Have the connection end with the response, for the client too. It goes on where gunicorn only closes its socket:
    a process may have been forked meanwhile, and have the socket too.

    With `unfinished` the response ends without the last chunk of its chunked body (RFC 9112, section 7.1). The class of
    the response is replaced by one that only ends differently. So what middleware still writes goes out first, gunicorn
    logs the request and closes the connection as always, and a stream takes no more memory.
    """
    of: Any = type(response)
    response.__class__ = _ending(of, unfinished)


@functools.cache
def _ending(of: Any, unfinished: bool) -> Any:
    class Ending(of):  # type: ignore[misc]
        def close(self) -> None:
            if unfinished and self.headers_sent:
                self.chunked = False
            super().close()
            hang_up(self.sock)

    return Ending


def hang_up(client: Any) -> None:
    """End the connection on a socket, for all processes that have it. What was sent before still arrives."""
    # The base class's method, because an SSL socket's own would go on without encryption.
    with contextlib.suppress(OSError, TypeError):  # the client has disconnected; or a test's socket, which is none
        _socket.socket.shutdown(getattr(client, "_sock", client), _socket.SHUT_RDWR)


def release_request(environ: dict[str, Any], response: Any) -> None:
    """Let go of what the access log does not name of a request. Call it once the app has answered.

    Raises AttributeError or TypeError if this version of gunicorn keeps the request differently.
    """
    request, log = response.req, access_log(response.cfg)
    release_environ(environ, log.environ)
    request.headers[:] = within_room(request.headers, log.request)
    request.trailers = []
    uri = environ.get("RAW_URI")
    request.uri = uri if request.uri == uri else shortened(request.uri)
    for name in ("path", "query", "fragment"):
        setattr(request, name, shortened(getattr(request, name)))
    request.unreader.buf = io.BytesIO()  # what the client sent after the request; the connection will be closed


def release_response(response: Any) -> None:
    """Let go of what the access log does not name of a response's headers. They have been sent."""
    response.headers[:] = within_room(response.headers, access_log(response.cfg).response)


@dataclass(frozen=True, slots=True)
class AccessLog:
    """The names in an access log's format, in upper case: of the environ, and of the headers both ways."""

    environ: frozenset[str]
    request: frozenset[str]
    response: frozenset[str]


_OFF = AccessLog(frozenset(), frozenset(), frozenset())
LOG_OF_ANOTHER_SERVER = AccessLog(LOGGED_BY_DEFAULT, frozenset(), frozenset())
# The environ's variables behind the atoms of one letter, where a client chooses how long they are.
_ATOMS = {
    "a": "HTTP_USER_AGENT", "f": "HTTP_REFERER", "q": "QUERY_STRING", "r": "RAW_URI", "u": "HTTP_AUTHORIZATION",
    "U": "PATH_INFO",
}  # fmt: skip
_ATOM = re.compile(r"%\((?:\{([^}]*)\}([ieo])|(.))\)")


def access_log(cfg: Any) -> AccessLog:
    """Return what the access log names. A logger of the app's own is assumed to name what gunicorn's does."""
    own = cfg.logger_class.__module__ != "gunicorn.glogging"
    syslog = cfg.syslog and not cfg.disable_redirect_access_to_syslog
    on = cfg.accesslog or cfg.logconfig or cfg.logconfig_dict or getattr(cfg, "logconfig_json", None) or syslog
    return _names_in(cfg.access_log_format, by_default=own) if own or on else _OFF


@functools.cache
def _names_in(log_format: str, *, by_default: bool) -> AccessLog:
    found = _ATOM.findall(log_format)
    names = {kind: frozenset(name.upper() for name, of, _ in found if of == kind) for kind in "ieo"}
    environ = {_ATOMS[letter] for _, _, letter in found if letter in _ATOMS} | names["e"]
    environ |= LOGGED_BY_DEFAULT if by_default else frozenset()
    return AccessLog(frozenset(environ), names["i"], names["o"])


_REQUEST_TEXTS = ("method", "uri", "path", "query", "fragment", "scheme")
_texts_of = operator.attrgetter(*_REQUEST_TEXTS)
# gunicorn makes new objects for these in each request, though the numbers are mostly the same.
_REQUEST_NUMBERS = ("version", "max_buffer_headers")


def intern_request(environ: dict[str, Any], response: Any) -> None:
    """Share the values that a request has in common with others. Call it once the app has answered.

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
