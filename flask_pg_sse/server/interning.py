"""What gunicorn keeps of a request while its stream lasts, with all that is equal in many of them made one object.

gunicorn holds the request's environ and headers until the response has ended, for its access log. The streams of one
page have nearly the same in them, ten thousand times. Nothing is taken away: whoever looks finds equal values, and the
same behaviour.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from operator import attrgetter
from typing import Any

# Values that are remembered, and the longest text among them: clients choose most of them, so that together they must
# stay small. What is forgotten stays shared by those who have it.
_MOST = 4096
_LONGEST = 256

_REQUEST_TEXTS = ("method", "uri", "path", "query", "fragment", "scheme")
_texts_of = attrgetter(*_REQUEST_TEXTS)
# Made anew for each request, and out of few numbers.
_REQUEST_NUMBERS = ("version", "max_buffer_headers")

_known: dict[Any, Any] = {}


def share(environ: dict[str, Any], response: Any) -> None:
    """Share what a request of gunicorn's has in common with others. Its response has begun."""
    request = response.req
    _share_objects(environ, request)
    names, values = _texts(environ), _texts(environ.values())
    environ.clear()  # a dict gives up its old names only so
    environ.update(zip(names, values, strict=True))
    for name, text in zip(_REQUEST_TEXTS, _texts(_texts_of(request)), strict=True):
        setattr(request, name, text)  # not by vars(), which makes a dict that the object has not had
    [response.status] = _texts([response.status])
    for name in _REQUEST_NUMBERS:
        setattr(request, name, shared(getattr(request, name)))
    request.headers[:] = _pairs(request.headers)
    response.headers[:] = _pairs(response.headers)


def _share_objects(environ: dict[str, Any], request: Any) -> None:
    if "wsgi.early_hints" in environ:
        environ["wsgi.early_hints"] = _too_late
    if not environ.get("CONTENT_LENGTH") and "HTTP_TRANSFER_ENCODING" not in environ:
        if request.body is environ["wsgi.input"]:
            request.body = _NO_INPUT
        environ["wsgi.input"] = _NO_INPUT
    errors = environ["wsgi.errors"]
    streams = getattr(errors, "streams", None)
    if isinstance(streams, list):  # others once the log's files have been opened anew
        environ["wsgi.errors"] = shared(("wsgi.errors", type(errors), *streams), errors)


def _texts(values: Collection[Any]) -> list[Any]:
    """Return values, with those texts that are known in place of equal ones."""
    # No call but one of C for each: there are fifty in a request, and a storm of reconnects has thousands of those.
    keep = _known_with_room(len(values)).setdefault
    return [keep(value, value) if type(value) is str and len(value) <= _LONGEST else value for value in values]


def _pairs(headers: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    keep = _known_with_room(len(headers)).setdefault
    return [keep(pair, pair) if len(pair[0]) + len(pair[1]) <= _LONGEST else pair for pair in headers]


def shared(key: Any, value: Any = None) -> Any:
    """Return what was first given for an equal key: `value`, or the key itself."""
    return _known_with_room(1).setdefault(key, key if value is None else value)


def _known_with_room(more: int) -> dict[Any, Any]:
    if len(_known) + more > _MOST:
        _known.clear()
    return _known


def _too_late(headers: object) -> None:
    """Do what gunicorn's own `wsgi.early_hints` does once the response has begun."""


class _NoInput(io.RawIOBase):
    """The body of a request that has none. Nobody can close it for the others."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        return 0

    def close(self) -> None:
        pass


_NO_INPUT = _NoInput()
