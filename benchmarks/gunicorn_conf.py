"""Says on standard output when a worker is ready, as the floor does."""

from __future__ import annotations

from typing import Any

control_socket_disable = True  # it would be one file in the home directory for all servers


def post_worker_init(worker: Any) -> None:
    print("ready", flush=True)
