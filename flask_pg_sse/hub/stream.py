"""One stream, from its first block to its last: what the WSGI server iterates over."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .. import event
from ..errors import DatabaseUnavailable
from ..server.connection import Connection
from ..server.interning import interned
from .hub import Hub
from .replay import Replay
from .subscription import Subscription, Terms


def stream(
    hub: Hub, replay: Replay, subscription: Subscription, last_event_id: str, connection: Connection
) -> Iterator[bytes]:
    """Yield the blocks of a stream until it ends.

    `last_event_id` is what the client says of its own position, "" if nothing.

    Nothing happens, and nothing needs to be undone, before the first `next()`: a response that is dropped before the
    server iterates over it (HEAD, an error in `after_request`) leaves nothing behind.

    Most streams wait here for most of their time, so that what this function still holds then is held ten thousand
    times: no request, no other generator, no piece.
    """
    try:
        for piece in _opening(hub, replay, subscription, last_event_id):
            connection.in_flight = len(piece)
            yield piece
            connection.bytes_sent += connection.in_flight
            connection.in_flight = 0
        connection.intern()
        subscription.terms = _settled(subscription.terms)
        while (taken := subscription.take()) is not None:
            # Without a piece it has fallen behind.
            for piece in (taken,) if taken else replay.read(subscription):
                connection.in_flight = len(piece)
                yield piece
                connection.bytes_sent += connection.in_flight
                connection.in_flight = 0
            taken = piece = b""  # or the last one would be held for as long as nothing comes
        connection.stop_reading()
    finally:
        hub.close(subscription)


def _settled(terms: Terms) -> Terms:
    """Return the terms of a stream that has begun, without when it was asked for, which nobody asks any more.

    Most streams have the same then, but for those with an end of their own.
    """
    if terms.ends_at < math.inf:
        return terms
    settled: Terms = interned(Terms(terms.subjects, terms.clients))
    return settled


def _opening(hub: Hub, replay: Replay, subscription: Subscription, last_event_id: str) -> Iterator[bytes]:
    """Yield the first block, and what the client has missed. Whoever is refused has ended without one."""
    refusal = hub.open(subscription)
    if refusal is None:
        first = _go_live(hub, subscription, last_event_id)
        missed = replay.read(subscription, opening=True)
        try:
            first += next(missed, b"")  # before anything has left: the log may not answer
        except DatabaseUnavailable:
            refusal = "unavailable"
    if refusal is not None:
        # Its position goes back to the client: a page that fetches a new URL can go on from there.
        subscription.end(hub.end_block(refusal, event.to_log_id(last_event_id)))
        return
    yield first
    yield from missed


def _go_live(hub: Hub, subscription: Subscription, last_event_id: str) -> bytes:
    """Return the first block. The stream is live then, unless it has to read first what it has missed."""
    after = event.to_log_id(last_event_id)
    if hub.position and after is not None:
        subscription.sent = after
        return hub.open_block(after)
    position = hub.go_live(subscription) or None
    if not last_event_id:
        return hub.open_block(position)
    # There is nothing to replay from, and the client must not believe otherwise. The id comes with the reset and not
    # before: a client that is cut between the two blocks would come back with it, and never learn what it has missed.
    reset = event.control_block("reset", {"reason": "unknown-id" if position else "no-log"}, id=position)
    return hub.open_block(None) + reset
