"""The generator of one stream, which the WSGI server iterates over: from the first block to the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from .. import event, stats
from ..errors import DatabaseUnavailable
from ..server.connection import Connection
from ..server.interning import interned
from .admission import TryLater
from .hub import Hub
from .replay import Replay
from .subscription import Subscription, Terms

# Logs why a stream cannot begin, and returns what its client is told of it in a comment, if anything.
Refused = Callable[[TryLater], str]


def stream(
    hub: Hub,
    replay: Replay,
    subscription: Subscription,
    last_event_id: str,
    connection: Connection,
    refused: Refused | None = None,
    hint: str = "",
) -> Iterator[bytes]:
    """Yield the blocks of a stream until it ends.

    `last_event_id` is the position that the client gives; "" if it gives none. `refused` is called if the stream cannot
    begin. `hint` is a comment for the developer.

    Nothing happens before the first `next()`. So a response that is dropped before the server iterates over it (HEAD,
    an error in `after_request`) leaves nothing to undo.

    Most streams wait here most of the time. What this function holds at that point is held ten thousand times, so it
    holds no request, no other generator and no piece.
    """
    try:
        connection.release_request()
        for piece in _opening(hub, replay, subscription, last_event_id, refused, hint):
            connection.in_flight = len(piece)
            yield piece
            connection.bytes_sent += connection.in_flight
            connection.in_flight = 0
            connection.release_response()
        refused, hint = None, ""
        subscription.terms = _settled(subscription.terms)
        while (taken := subscription.take()) is not None:
            # An empty piece means that the stream has fallen behind.
            for piece in (taken,) if taken else replay.read(subscription):
                connection.in_flight = len(piece)
                yield piece
                connection.bytes_sent += connection.in_flight
                connection.in_flight = 0
            taken = piece = b""  # otherwise the last piece stays in memory until the next one comes
        connection.end()
    finally:
        hub.close(subscription)


def _settled(terms: Terms) -> Terms:
    """Return the terms of a stream that has begun, without `asked_at`, which is no longer needed.

    Most streams then share one object; a stream with a fixed end keeps its own.
    """
    if terms.ends_at < math.inf:
        return terms
    settled: Terms = interned(Terms(terms.subjects, terms.clients, revocable=terms.revocable))
    return settled


def _opening(
    hub: Hub, replay: Replay, subscription: Subscription, last_event_id: str, refused: Refused | None, hint: str
) -> Iterator[bytes]:
    """Yield the first block, and what the client has missed. A stream that cannot begin is ended here.

    The first line leaves at once: nothing that the app has answered, such as a cookie, may reach the client late.
    """
    try:
        hub.open(subscription)
        yield event.first_lines(hub.retry, hint)
        hub.wait_until_heard(subscription)
        first = _go_live(hub, subscription, last_event_id)
        missed = replay.read(subscription, opening=True)
        try:
            first += next(missed, b"")  # before anything is said, because the log may not answer
        except DatabaseUnavailable as error:
            raise TryLater("unavailable", str(error), kind="read") from None
    except TryLater as later:
        if subscription.reason == "client":  # it has left and was not refused, and PostgreSQL is not to blame
            return
        comment = refused(later) if refused is not None else ""
        # The client gets its position back: a page that fetches a new URL can continue from there.
        position = event.to_log_id(last_event_id)
        subscription.end(event.end_block(later.reason, later.retry(hub.retry), id=position, comment=comment))
        return
    subscription.opened = True
    hub.stats.count(stats.OPENED)
    yield first
    yield from missed


def _go_live(hub: Hub, subscription: Subscription, last_event_id: str) -> bytes:
    """Return the first block, and let the stream go live, unless it must first read what it has missed."""
    after = event.to_log_id(last_event_id)
    if hub.position and after is not None:
        subscription.sent = after
        return event.open_block(after)
    position = hub.go_live(subscription) or None
    if not last_event_id:
        return event.open_block(position)
    # There is nothing to replay from, and the client must learn that. The id comes with the reset and not before it.
    # Otherwise a client that is cut between the two blocks would reconnect with the id, and never learn of the gap.
    reason = "unknown-id" if position else "no-log"
    hub.stats.count(stats.RESETS, of=reason)
    reset = event.control_block("reset", {"reason": reason}, id=position)
    return event.open_block(None) + reset
