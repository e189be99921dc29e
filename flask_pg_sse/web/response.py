"""A stream as a Flask response: its headers, and how the server begins and ends it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flask import Response, current_app, request
from werkzeug.datastructures import Headers as ResponseHeaders

from .. import event
from ..hub.admission import TryLater
from ..server.connection import Connection
from ..settings import Settings
from .state import current_state
from .unsaved import NOT_TO_COMPRESS, Headers, as_sent, save_no_session

# Pages of other sites cannot show an answer in a frame, or have it read as a script: whether that works would tell them
# whether the user may listen.
_NOT_FOR_OTHERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),
)
_HEADERS = (
    ("Content-Type", "text/event-stream; charset=utf-8"),
    # "no-transform" and nginx's own header keep proxies from buffering the stream.
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
    NOT_TO_COMPRESS,
    *_NOT_FOR_OTHERS,
)
# Where the app was asked, by its session for example, the answer is for this client only.
_PRIVATE_HEADERS = tuple((name, f"{value}, no-store" if name == "Cache-Control" else value) for name, value in _HEADERS)


class _WithoutCookies:
    """Mixin for a response class: no cookie leaves, whatever has set it, and however late."""

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        def start(status: str, headers: Headers, *error: Any) -> Any:
            return start_response(status, as_sent(headers), *error)

        body: Iterable[bytes] = super().__call__(environ, start)  # type: ignore[misc]
        return body


class _Begins(_WithoutCookies):
    """Mixin for a response class: tells the connection when the server has begun to send the response."""

    def __init__(self, body: Iterable[bytes], begin: Callable[[Any], None], *, private: bool) -> None:
        """Make a response as Flask does. `begin` is called with the return value of `start_response`."""
        super().__init__(body, headers=_PRIVATE_HEADERS if private else _HEADERS)  # type: ignore[call-arg]
        # Code that wants the whole body (a log, a compressor) then fails or skips it, and does not wait for its end.
        self.direct_passthrough = True
        self._pg_sse_begin = begin

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        def start(status: str, headers: Headers, *error: Any) -> Any:
            write = start_response(status, headers, *error)
            self._pg_sse_begin(write)
            return write

        return super().__call__(environ, start)


class _StreamResponse(_Begins, Response):
    def get_wsgi_headers(self, environ: Any) -> ResponseHeaders:
        """Return the headers as they are. Werkzeug would copy them first, for changes that a stream does not need."""
        return self.headers


def answer_without_session(response: Response) -> Response:
    """Keep a refusal, or a hook's HTTP exception, from setting a cookie and from saving the session.

    It may come as late as a stream: the hooks can take long, and a worker that has just started waits for PostgreSQL.
    """
    if isinstance(response, _WithoutCookies):
        return response
    save_no_session()
    answer: Response = current_state().subclass(_WithoutCookies, type(response)).force_type(response)
    return answer


def stream_response(
    body: Iterable[bytes],
    connection: Connection,
    settings: Settings,
    *,
    private: bool,
    direct_write: bool | str = False,
) -> Response:
    """Return the response that sends `body` as a stream. `private` keeps caches from storing it."""
    save_no_session()
    begin = functools.partial(
        connection.response_started, body=id(body), direct_write=direct_write, send_timeout=settings.send_timeout
    )
    apps = current_app.response_class  # the stream's is a subclass of it, or Flask would convert the response
    made: type[Any] = _StreamResponse if apps is Response else current_state().subclass(_Begins, apps)
    response: Response = made(body, begin, private=private)
    return response


class Blocks:
    """The body of a stream that ends at once. (For a tuple, werkzeug would set Content-Length.)"""

    def __init__(self, connection: Connection, *blocks: bytes) -> None:
        self._connection = connection
        self._blocks = blocks

    def __iter__(self) -> Iterator[bytes]:
        yield from self._blocks
        self._connection.end()  # before the server would send the last chunk

    def close(self) -> None:  # werkzeug does not iterate for HEAD, but it does close
        self._connection.end()


def refusal(status: int, text: str) -> Response:
    response = current_app.response_class(text + "\n", status, _NOT_FOR_OTHERS, mimetype="text/plain")
    response.cache_control.no_store = True  # caches may keep some error statuses by themselves
    return response


def ended(later: TryLater, last_event_id: str, comment: str, *, private: bool) -> Response:
    """Refuse a stream for now. After this answer a browser's EventSource reconnects; after an error status it does not.

    The client gets its position back as the event's id: a page that fetches a new URL can continue from there.
    """
    settings = current_state().runtime.settings
    retry, position = later.retry(settings.retry), event.to_log_id(last_event_id)
    block = event.end_block(later.reason, retry, id=position, comment=comment)
    connection = Connection(request.environ)
    body = Blocks(connection, *() if request.method == "HEAD" else (block,))
    return stream_response(body, connection, settings, private=private)
