"""An app with a SIGTERM handler of its own, set before or (SET_LATE=1) after the blueprint is registered."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


def set_handler() -> None:
    previous: Any = signal.getsignal(signal.SIGTERM)

    def own(signum: int, frame: FrameType | None) -> None:
        print("the app's own handler ran", flush=True)
        previous(signum, frame)

    signal.signal(signal.SIGTERM, own)


if not os.environ.get("SET_LATE"):
    set_handler()

from tests.support.apps.basic import app  # noqa: E402

if os.environ.get("SET_LATE"):
    set_handler()

__all__ = ["app"]
