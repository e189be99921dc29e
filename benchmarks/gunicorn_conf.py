"""Print on standard output when a worker is ready, as the floor does."""

from __future__ import annotations

from typing import Any

control_socket_disable = True  # all servers would share one file in the home directory


def post_worker_init(worker: Any) -> None:
    print("ready", flush=True)
