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
    """Return the names of the channels that streams listen to, at most a thousand, if the question wants `names`."""
    if not question.get("names"):
        return {}
    names = {name for stream in (hub.streams() if hub is not None else ()) for name in stream.channels}
    return {"names": sorted(filter(str.isprintable, names))[:1000]}
