"""One stream, from its first block to its last: what the WSGI server iterates over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import event
from .errors import DatabaseUnavailable
from .hub import Hub
from .replay import Replay
from .server import Connection
from .subscription import Subscription


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """What a stream needs to know of its request, in plain values: request and app context are gone when it runs.

    `last_event_id` is what the client says of its own position, "" if nothing.
    """

    last_event_id: str
    retry: int


def stream(
    hub: Hub, replay: Replay, subscription: Subscription, request: StreamRequest, connection: Connection
) -> Iterator[bytes]:
    """Yield the blocks of a stream until it ends.

    Nothing happens, and nothing needs to be undone, before the first `next()`: a response that is dropped before the
    server iterates over it (HEAD, an error in `after_request`) leaves nothing behind.
    """
    subscription.connection = connection
    progress = subscription.progress
    try:
        for piece in _pieces(hub, replay, subscription, request):
            progress.in_flight = len(piece)
            yield piece
            progress.sent += progress.in_flight
            progress.in_flight = 0
        connection.stop_reading()
    finally:
        hub.close(subscription)


def _pieces(hub: Hub, replay: Replay, subscription: Subscription, request: StreamRequest) -> Iterator[bytes]:
    refusal = hub.open(subscription)
    if refusal is None:
        opening = _go_live(hub, subscription, request)
        missed = replay.read(subscription, opening=True)
        try:
            opening += next(missed, b"")  # before anything has left: the log may not answer
        except DatabaseUnavailable:
            refusal = "unavailable"
    if refusal is not None:
        yield hub.end_block(refusal)
        return
    yield opening
    yield from missed
    while (piece := subscription.take()) is not None:
        if piece:
            yield piece
        else:  # it has fallen behind
            yield from replay.read(subscription)


def _go_live(hub: Hub, subscription: Subscription, request: StreamRequest) -> bytes:
    """Return the first block. The stream is live then, unless it has to read first what it has missed."""
    after = event.to_log_id(request.last_event_id)
    if hub.position and after is not None:
        subscription.sent = after
        return event.control_block("open", {}, id=after, retry=request.retry)
    position = hub.go_live(subscription) or None
    if not request.last_event_id:
        return event.control_block("open", {}, id=position, retry=request.retry)
    # There is nothing to replay from, and the client must not believe otherwise. The id comes with the reset and not
    # before: a client that is cut between the two blocks would come back with it, and never learn what it has missed.
    reset = event.control_block("reset", {"reason": "unknown-id" if position else "no-log"}, id=position)
    return event.control_block("open", {}, retry=request.retry) + reset
