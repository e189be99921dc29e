"""The figures of this worker, for `flask sse status` and for the metrics."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping
from typing import Any

from .. import stats
from ..engine.base import Engine
from ..server import gunicorn, shutdown
from ..server.siblings import resident_bytes
from ..stats import Stats
from .hub import Hub

# The most channels, and streams, that an answer names.
_MOST = 1000


def figures(engine: Engine, hub: Hub | None, counted: Stats, *, draining: bool) -> dict[str, Any]:
    """Return what this worker does: numbers, bytes and seconds. Without a hub it has had no stream yet."""
    status = engine.status()
    streams = hub.streams() if hub is not None else []
    worker = shutdown.gunicorn_worker()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": importlib.import_module(__name__.partition(".")[0]).__version__,
        "state": "draining" if draining else "serving",
        "streams": len(streams),
        "behind": sum(not stream.live for stream in streams),
        "channels": status.channels,
        "delivered": int(counted.total(stats.DELIVERED)),
        "bytes": int(counted.total(stats.DELIVERED_BYTES)),
        "lag": status.lag,
        "memory": resident_bytes(),
        "listener": status.readiness.value if hub is not None else "not started",
        "arbiter": None if worker is None else gunicorn.arbiter_of(worker),
    }


def listened(hub: Hub | None, question: Mapping[str, Any]) -> dict[str, Any]:
    """Return who listens to what, if the question wants it, at most a thousand of each.

    `names`: the names of the channels that streams listen to. `channel`: the streams that listen to that channel.
    """
    found: dict[str, Any] = {}
    if question.get("names"):
        names = {name for stream in (hub.streams() if hub is not None else ()) for name in stream.channels}
        found["names"] = sorted(filter(str.isprintable, names))[:_MOST]
    if "channel" in question:
        streams = hub.streams([question["channel"]]) if hub is not None else []
        found["listeners"] = [
            {
                "subjects": sorted(stream.terms.subjects),
                "client": next(iter(stream.terms.clients), None),
                "behind": not stream.live,
            }
            for stream in streams[:_MOST]
        ]
    return found
