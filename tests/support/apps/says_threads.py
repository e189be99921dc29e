"""The basic app, told that there are threads: `python -m tests.support.apps.says_threads PORT` serves it with none."""

from __future__ import annotations

import sys
from typing import Any
from wsgiref.simple_server import make_server

from tests.support.apps.basic import app as basic


def app(environ: dict[str, Any], start_response: Any) -> Any:
    return basic({**environ, "wsgi.multithread": True}, start_response)


if __name__ == "__main__":
    make_server("127.0.0.1", int(sys.argv[1]), app).serve_forever()
