"""The basic app where direct writes are counted, sockets have small buffers, and middleware touches the body."""

from __future__ import annotations

import gc
import os
import socket
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flask import jsonify
from flask.typing import ResponseReturnValue

from flask_pg_sse.hub import subscription
from flask_pg_sse.server.direct_write import write
from tests.support.apps.basic import app

_seen: Counter[str] = Counter()


def counting(way: Any, chunk: bytes, flags: int) -> int:
    size = len(chunk)
    part = int(os.environ.get("TAKE_PART", "0"))
    if part and not sum(_seen.values()) % part:  # as a full socket does, which a test cannot have at will
        chunk = memoryview(chunk)[: len(chunk) // 2].tobytes()
    try:
        sent = write(way, chunk, flags)
    except OSError:
        _seen["none"] += 1
        raise
    _seen["whole" if sent == size else "part"] += 1
    return sent


vars(subscription)["write"] = counting


@app.get("/writes")
def writes() -> ResponseReturnValue:
    return jsonify({name: _seen[name] for name in ("whole", "part", "none")})


def masked(piece: bytes) -> bytes:
    return piece.replace(b"secret", b"******")


@app.get("/garbage")
def garbage() -> ResponseReturnValue:
    """How many objects only the garbage collector could free, since the last time."""
    gc.disable()
    return str(gc.collect())


class Middleware:
    """Middleware between an app and its server: it passes the body on, or changes it."""

    def __init__(self, inner: Any, kind: str) -> None:
        self._inner = inner
        self._kind = kind

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        if "SEND_BUFFER" in os.environ:
            size = int(os.environ["SEND_BUFFER"])
            environ["gunicorn.socket"].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        if not self._kind or not environ["PATH_INFO"].startswith("/sse"):
            unchanged: Iterable[bytes] = self._inner(environ, start_response)
            return unchanged

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            if self._kind == "compress":
                headers = [*headers, ("Content-Encoding", "deflate")]
            return start_response(status, headers, exc_info)

        body: Iterable[bytes] = self._inner(environ, start)
        if self._kind == "mask lazily":  # in C: no frame of ours is below the server's
            return map(masked, body)
        is_file: bool = isinstance(body, environ["wsgi.file_wrapper"])
        return body if is_file and self._kind == "mask all but files" else self._changed(body)

    def _changed(self, body: Iterable[bytes]) -> Iterator[bytes]:
        pack = zlib.compressobj()
        held = b""
        try:
            for piece in body:
                if self._kind == "compress":
                    yield pack.compress(piece) + pack.flush(zlib.Z_SYNC_FLUSH)
                elif self._kind == "rewrite":
                    yield b": rewritten\n" + piece
                elif self._kind.startswith("mask"):
                    yield masked(piece)
                elif self._kind == "delay":  # the beginning of each piece at once, the rest with the next
                    yield held + piece[:-1]
                    held = piece[-1:]
                else:
                    yield piece
        finally:
            close: Callable[[], None] = getattr(body, "close", lambda: None)
            close()


app.wsgi_app = Middleware(app.wsgi_app, os.environ.get("MIDDLEWARE", ""))  # type: ignore[method-assign]

__all__ = ["app"]
