"""A gunicorn configuration with small send buffers: clients that stop reading are felt at once, not megabytes later."""

from __future__ import annotations

import socket
from typing import Any

from tests.support.apps.gunicorn_conf import control_socket_disable, post_worker_init

__all__ = ["control_socket_disable", "post_worker_init", "when_ready"]


def when_ready(arbiter: Any) -> None:
    for listener in arbiter.LISTENERS:  # accepted sockets inherit it
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
