"""Says when a worker is ready: one that gets SIGTERM earlier, while it boots, loses it and lives on (gunicorn 27)."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

control_socket_disable = True  # it would be one file in the home directory for all tests

# gevent patches a worker in 25 steps, and at each asks every package of .venv for plugins: a quarter of a start.
_plugins = functools.cache(metadata.entry_points)
metadata.entry_points = lambda **wanted: _plugins().select(**wanted)  # type: ignore[assignment]


def post_worker_init(worker: Any) -> None:
    worker.log.info("Worker is ready. Its process: %d.", worker.pid)
