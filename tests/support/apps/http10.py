"""The basic app under Python's own server, which answers with HTTP/1.0: `python -m tests.support.apps.http10 PORT`."""

from __future__ import annotations

import sys
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIServer, make_server

from tests.support.apps.basic import app


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


def _threaded(environ: dict[str, Any], start_response: Any) -> Any:
    return app(environ | {"wsgi.multithread": True}, start_response)


if __name__ == "__main__":
    app.config["SSE_MAX_STREAMS"] = 10
    with make_server("127.0.0.1", int(sys.argv[1]), _threaded, server_class=_Server) as server:
        server.serve_forever()
