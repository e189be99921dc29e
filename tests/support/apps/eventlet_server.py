"""eventlet's own server, in a process that it has patched: `python -m tests.support.apps.eventlet_server PORT`."""

from __future__ import annotations

import sys

import eventlet  # type: ignore[import-untyped]
import eventlet.wsgi  # type: ignore[import-untyped]

eventlet.monkey_patch()

from tests.support.apps.basic import app  # noqa: E402

if __name__ == "__main__":
    eventlet.wsgi.server(eventlet.listen(("127.0.0.1", int(sys.argv[1]))), app)
