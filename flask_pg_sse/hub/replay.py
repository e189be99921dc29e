"""Read from the event log what a stream has missed: after a reconnect, or because its client reads too slowly.

Each stream reads at its client's pace, and holds one page at a time. So the memory for slow clients is limited: pages
shrink as more streams read, and events larger than a page have a limit in bytes (`large_events.py`).

The streams take turns to ask the log, by their clients (`engine/turns.py`). A turn is one page, or the last events of
the channels of one stream.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from .. import event, stats
from ..concurrency.greenlets import sleep
from ..engine.base import LOG_READERS, Look, Page, Tail
from ..engine.turns import Turn, TurnQueue, Turns
from ..errors import DatabaseUnavailable
from .admission import OPEN_TIMEOUT
from .buffer import PIECE_BYTES
from .hub import Hub
from .large_events import LargeEvent, LargeEvents
from .subscription import Subscription

# Bytes of one page. All pages together have at most PAGES_BYTES, unless each is at its minimum already.
PAGE_BYTES = 65536
PAGE_BYTES_LEAST = 8192
PAGES_BYTES = 16 * 1024 * 1024
# The most bytes of events larger than a page that are in memory for clients that read the log. One event is always
# allowed.
LARGE_BYTES = 64 * 1024 * 1024
# The most channels and bytes of last events in one query. An answer takes several times its size while it is read.
_FILL = 200
FILL_BYTES = 4 * 1024 * 1024
# Seconds between two attempts to read while PostgreSQL is away.
_RETRY = 1.0

_T = TypeVar("_T")


class Log(Protocol):
    """The methods of an engine that read the log. All raise `DatabaseUnavailable`."""

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page: ...

    def look(self, ids: Collection[int]) -> Look: ...

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]: ...


class Replay:
    """Reads the log for the streams of one process. `heartbeat` is in seconds."""

    def __init__(self, hub: Hub, log: Log, *, heartbeat: float) -> None:
        self._hub = hub
        self._stats = hub.stats
        self._log = log
        self._heartbeat = heartbeat
        self._readers: set[object] = set()
        self._reading = Turns(LOG_READERS)
        self._looks = _Attempts()
        self._next_look = _Batch()
        self._fills = _Attempts()
        self._unfilled = TurnQueue[str]()  # the channels whose last events streams wait for
        self._large = LargeEvents(LARGE_BYTES)
        self._loads = _Attempts()

    def read(self, subscription: Subscription, *, opening: bool = False) -> Iterator[bytes]:
        """Yield what a stream has missed since `sent`, until it is live or has ended.

        With `opening`, `DatabaseUnavailable` is raised if the log has not answered yet. After that, the stream stays
        open and tries again.
        """
        reader = object()
        self._readers.add(reader)
        try:
            for page in self._pages(subscription, opening):
                for start in range(0, len(page), PIECE_BYTES):
                    yield page[start : start + PIECE_BYTES]
        finally:
            self._readers.discard(reader)

    def _pages(self, subscription: Subscription, opening: bool) -> Iterator[bytes]:
        channels = sorted(subscription.channels)
        ahead = not opening  # the log has been read, so the client does not wait for a hub that is behind the log
        heartbeat_at = time.monotonic() + self._heartbeat  # sent if the log does not answer until then
        while not (subscription.live or subscription.ended):
            try:
                lineage = self._hub.lineage  # before the log is asked
                if subscription.lineage != lineage:  # before memory is: it does not know what the log has lost
                    look = yield from self._look(subscription, opening)
                    refusal, head = look.refusals.get(subscription.sent), look.head
                    if refusal is None:
                        subscription.lineage = lineage
                        continue
                else:
                    yield from self._fill(subscription, channels, opening)
                    if self._hub.join(subscription, ahead=ahead):
                        return
                    turn = yield from self._turn(self._reading, subscription, opening=opening)
                    position = self._hub.position  # before the log is asked
                    try:
                        page = self._asked(
                            "page", lambda: self._log.page(channels, subscription.sent, self._page_bytes(), 0)
                        )
                    finally:
                        turn.leave()
                    refusal, head = page.refusal, page.head
                if subscription.ended:  # meanwhile; a client that has lost the right to listen must hear no more
                    return
                opening, ahead = False, True
                if refusal is not None:
                    subscription.sent, subscription.lineage = head, lineage
                    self._stats.count(stats.RESETS, of=refusal)
                    yield event.control_block("reset", {"reason": refusal}, id=head)
                elif page.too_large:
                    yield from self._one_large(subscription, channels, *page.too_large)
                elif page.upto == subscription.sent and page.head < position:
                    # The stream waits until the listener has found out, too. It could only ask the same again.
                    raise DatabaseUnavailable("The event log has lost events that the hub still has.")
                else:
                    subscription.sent = page.upto
                    block = b"".join([data for _, data, _ in page.items])
                    events = len(page.items)
                    del page  # not kept in memory while the client reads slowly
                    if block:
                        self._stats.delivered(0, events, len(block))
                        yield block
            except DatabaseUnavailable:
                if opening:
                    raise
                if subscription.ended:
                    return
                if status := self._hub.liveness.tell_behind(subscription):
                    yield status
                if time.monotonic() >= heartbeat_at:
                    heartbeat_at = time.monotonic() + self._heartbeat
                    yield event.HEARTBEAT
                sleep(min(_RETRY, self._heartbeat))

    def _one_large(
        self, subscription: Subscription, channels: Sequence[str], log_id: int, size: int
    ) -> Iterator[bytes]:
        """Yield the next event of a stream, which is larger than a page."""
        after, sent, reader = subscription.sent, 0, object()
        large = self._large.join(log_id, size, reader)
        try:
            while (piece := large.piece(sent)) != b"":
                if piece is None:
                    if (yield from self._load(subscription, large, channels, after, sent)):
                        continue
                    if sent:  # nothing may follow a part of an event
                        subscription.end(b"", reason="unavailable", drop=True)
                        if subscription.connection is not None:
                            subscription.connection.cut()
                    return
                if subscription.ended and not sent:
                    return
                subscription.sent = log_id
                self._stats.delivered(0, 0 if sent else 1, len(piece))
                sent += len(piece)
                yield piece
        finally:
            self._large.leave(large, reader)

    def _load(
        self, subscription: Subscription, large: LargeEvent, channels: Sequence[str], after: int, sent: int
    ) -> Generator[bytes, None, bool]:
        """Have a large event in memory, of which the client has `sent` bytes. Returns False if the log has it not."""

        def load() -> bool:
            if large.data is None:  # and another stream has not loaded it meanwhile
                self._large.make_room(large.size)
                page = self._asked("page", lambda: self._log.page(channels, after, 0, large.size))
                for _, data, log_id in page.items:
                    if log_id == large.log_id:
                        large.keep(data)
                if not page.items and page.refusal is None and not page.too_large:  # it cannot be sent
                    subscription.sent = large.log_id
            return large.data is not None

        # Not even a heartbeat may stand within an event.
        heartbeat = b"" if sent else event.HEARTBEAT
        while True:
            try:
                return (yield from self._alone(self._loads, subscription, load, heartbeat=heartbeat))
            except DatabaseUnavailable:
                if not sent:
                    raise
                if subscription.ended:
                    return False
                sleep(min(_RETRY, self._heartbeat))

    def _turn(
        self, turns: Turns, subscription: Subscription, *, opening: bool, heartbeat: bytes = event.HEARTBEAT
    ) -> Generator[bytes, None, Turn]:
        """Wait for a stream's turn and return it; the caller must leave it. Meanwhile an open stream has heartbeats.

        Raises `DatabaseUnavailable` if the stream has ended, or if it is opening and its turn does not come in time.
        """
        turn = turns.ask(subscription.terms.clients)
        try:
            while not subscription.wait_for(turn, OPEN_TIMEOUT if opening else self._heartbeat):
                if opening or subscription.ended:
                    raise DatabaseUnavailable("The event log is busy with other streams.")
                if heartbeat:
                    yield heartbeat
            return turn
        except BaseException:
            turn.leave()
            raise

    def _alone(
        self,
        attempts: _Attempts,
        subscription: Subscription,
        read: Callable[[], _T],
        *,
        opening: bool = False,
        heartbeat: bytes = event.HEARTBEAT,
    ) -> Generator[bytes, None, _T]:
        """Read while no other stream does so, and return the answer."""
        failed = attempts.failed
        turn = yield from self._turn(attempts.turns, subscription, opening=opening, heartbeat=heartbeat)
        try:
            if attempts.failed != failed:
                raise DatabaseUnavailable("The event log did not answer another stream, which read for this one too.")
            try:
                return read()
            except DatabaseUnavailable:
                attempts.failed += 1
                raise
        finally:
            turn.leave()

    def _look(self, subscription: Subscription, opening: bool) -> Generator[bytes, None, Look]:
        """Return what the log says of a stream's position: one query for all that come during another."""
        batch = self._next_look
        batch.ids[subscription.sent] = None

        def read() -> Look:
            if batch.answer is None or subscription.sent not in batch.asked:
                self._next_look = _Batch()
                batch.asked = tuple(batch.ids)  # a copy: with threads, another stream may add its own now
                batch.answer = self._asked("look", lambda: self._log.look(batch.asked))
            return batch.answer

        return (yield from self._alone(self._looks, subscription, read, opening=opening))

    def _fill(self, subscription: Subscription, channels: Sequence[str], opening: bool) -> Iterator[bytes]:
        """Have the hub remember the last events of `channels`, where it does not yet.

        One stream also reads for the streams that wait meanwhile. So many streams that open at once make few queries.
        """
        self._hub.follow(channels)
        missing = self._hub.unremembered(channels)
        if not missing:
            return
        client = subscription.terms.clients
        for channel in missing:
            self._unfilled.add(client, channel)
        try:
            yield from self._alone(self._fills, subscription, lambda: self._fill_with_others(missing), opening=opening)
        finally:
            for channel in missing:
                self._unfilled.discard(client, channel)

    def _fill_with_others(self, missing: Collection[str]) -> None:
        if not self._hub.unremembered(missing):
            return
        each = self._hub.memory
        most = max(1, min(_FILL, FILL_BYTES // each))
        batch = dict.fromkeys(missing)
        while len(batch) < most and (channel := self._unfilled.pop()) is not None:
            batch[channel] = None
        uptos = self._hub.unremembered(batch)
        names = list(uptos)
        for start in range(0, len(names), most):
            part = {name: uptos[name] for name in names[start : start + most]}
            for tail in self._asked("tails", functools.partial(self._log.last, part, each)):
                self._hub.remember(tail, part[tail.channel])

    def _asked(self, kind: str, query: Callable[[], _T]) -> _T:
        """Run a query of the log, and count it."""
        self._stats.count(stats.LOG_READS, of=kind)
        try:
            return query()
        except DatabaseUnavailable:
            self._stats.count(stats.LOG_READ_ERRORS)
            raise

    def _page_bytes(self) -> int:
        return max(PAGE_BYTES_LEAST, min(PAGE_BYTES, PAGES_BYTES // max(1, len(self._readers))))


class _Attempts:
    """Lets one stream at a time read the log. If that fails, it fails for all streams that waited meanwhile too.

    Otherwise each of them would wait its full time for a database that does not answer, and the last of many minutes.
    """

    def __init__(self) -> None:
        self.turns = Turns(1)
        self.failed = 0


class _Batch:
    """Positions that are looked up together, and the answer."""

    def __init__(self) -> None:
        self.ids: dict[int, None] = {}
        self.asked: tuple[int, ...] = ()
        self.answer: Look | None = None
