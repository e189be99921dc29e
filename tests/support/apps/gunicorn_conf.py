"""Says when a worker is ready: one that gets SIGTERM earlier, while it boots, loses it and lives on (gunicorn 27)."""

from __future__ import annotations

from typing import Any

control_socket_disable = True  # it would be one file in the home directory for all tests


def post_worker_init(worker: Any) -> None:
    worker.log.info("Worker is ready. Its process: %d.", worker.pid)
