"""Which streams are looked at from time to time: all that need it, and no others."""

from __future__ import annotations

import threading
from typing import Any

from flask_pg_sse.hub.block import Block
from flask_pg_sse.hub.subscription import Subscription, Terms
from flask_pg_sse.hub.timers import Watchlist
from tests.support.model import Connection


def begun(watchlist: Watchlist, **terms: Any) -> Subscription:
    subscription = Subscription("a", 1000, Terms(**terms))
    subscription.connection = Connection()  # type: ignore[assignment]
    watchlist.begin(subscription)
    subscription.go_live(0, Block(b""), 0.0)
    return subscription


def test_a_stream_is_looked_at_while_it_is_not_parked() -> None:
    watchlist = Watchlist()
    subscription = begun(watchlist)
    assert watchlist.take(0) == {subscription}, "it opens"
    parked = threading.Thread(target=subscription.take)
    parked.start()
    while watchlist.take(0):
        pass
    subscription.offer(Block(b"x"), 0.0)
    parked.join()
    assert watchlist.take(0) == {subscription}, "it sends"
    watchlist.end(subscription)
    assert not watchlist.take(0)


def test_who_was_judged_while_it_sent_is_looked_at_once_more() -> None:
    """Or it would be judged by that when it sends again, an hour later."""
    watchlist = Watchlist()
    subscription = begun(watchlist)
    connection: Any = subscription.connection
    connection.in_flight = 100
    assert watchlist.take(0) == {subscription} and not connection.stalled(0, 10)
    connection.in_flight = 0
    subscription.awake.discard(subscription)
    assert watchlist.take(1) == {subscription} and not connection.stalled(1, 10)
    assert not watchlist.take(2)
    connection.in_flight = 100
    subscription.awake.add(subscription)
    assert watchlist.take(3600) == {subscription} and not connection.stalled(3600, 10)


def test_streams_are_looked_at_when_they_are_to_end() -> None:
    watchlist = Watchlist()
    streams = [begun(watchlist, ends_at=at) for at in (30, 10, 20, 10, 40)]
    for subscription in streams:
        subscription.awake.discard(subscription)
    assert watchlist.next_end == 10
    assert not watchlist.take(9)
    assert watchlist.take(10) == {streams[1], streams[3]}
    watchlist.end(streams[2])
    watchlist.end(streams[1])  # whose time has come already
    assert watchlist.next_end == 30
    assert watchlist.take(35) == {streams[0]}
    watchlist.end(streams[4])
    assert watchlist.next_end == float("inf") and not watchlist.take(100)
