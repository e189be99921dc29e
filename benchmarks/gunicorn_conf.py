"""Print on standard output when a worker is ready, as the floor does."""

from __future__ import annotations

import os
from typing import Any

control_socket_disable = True  # all servers would share one file in the home directory


def post_worker_init(worker: Any) -> None:
    # In one write, which print() does not promise: the workers share the pipe, and their lines must not mix.
    os.write(1, b"ready\n")
