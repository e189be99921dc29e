"""One stream, from its first block to its last: what the WSGI server iterates over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import event
from .hub import Hub
from .server import Connection
from .subscription import Subscription


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """What a stream needs to know of its request, in plain values: request and app context are gone when it runs.

    `resumes` says that the client was connected before and names the last event that it has.
    """

    resumes: bool
    retry: int


def stream(hub: Hub, subscription: Subscription, request: StreamRequest, connection: Connection) -> Iterator[bytes]:
    """Yield the blocks of a stream until it ends.

    Nothing happens, and nothing needs to be undone, before the first `next()`: a response that is dropped before the
    server iterates over it (HEAD, an error in `after_request`) leaves nothing behind.
    """
    subscription.cut_off = connection.cut
    try:
        refusal = hub.open(subscription)
        if refusal is not None:
            yield hub.end_block(refusal)
        else:
            yield _opening(request)
            while (piece := subscription.take()) is not None:
                yield piece
        connection.stop_reading()
    finally:
        hub.close(subscription)


def _opening(request: StreamRequest) -> bytes:
    block = event.control_block("open", {}, retry=request.retry)
    if request.resumes:
        # There is nothing to replay from, and the client must not believe otherwise.
        block += event.control_block("reset", {"reason": "no-log"})
    return block
