"""Read from the event log what a stream has missed: after a reconnect, or because its client reads too slowly.

Each stream reads at its client's pace, and holds one page at a time. So the memory for slow clients is limited: pages
shrink as more streams read, and events larger than a page have a limit in bytes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from .. import event
from ..engine.base import Look, Page, Tail
from ..errors import DatabaseUnavailable
from .buffer import PIECE_BYTES
from .hub import Hub
from .subscription import Subscription

logger = logging.getLogger(__name__)

# Bytes of one page. All pages together have at most PAGES_BYTES, unless each is at its minimum already.
PAGE_BYTES = 65536
PAGE_BYTES_LEAST = 8192
PAGES_BYTES = 16 * 1024 * 1024
# The most bytes of events larger than a page that may be on their way to clients that read the log. One event is always
# allowed.
LARGE_BYTES = 64 * 1024 * 1024
# Seconds that a stream waits for room within LARGE_BYTES. After that its client is told to reconnect.
_LARGE_TIMEOUT = 10.0
# The most channels and bytes of last events in one query. An answer takes several times its size while it is read.
_FILL = 200
FILL_BYTES = 4 * 1024 * 1024
# Seconds between two attempts to read while PostgreSQL is away.
_RETRY = 1.0


class Log(Protocol):
    """The methods of an engine that read the log. All raise `DatabaseUnavailable`."""

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page: ...

    def look(self, ids: Collection[int]) -> Look: ...

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]: ...


class Replay:
    """Reads the log for the streams of one process. `heartbeat` is in seconds."""

    def __init__(self, hub: Hub, log: Log, *, heartbeat: float) -> None:
        self._hub = hub
        self._log = log
        self._heartbeat = heartbeat
        self._readers: set[object] = set()
        self._looks = _Looks(log)
        self._filling = _Attempts()
        self._unfilled: dict[str, None] = {}  # the channels whose last events streams wait for, in order
        self._large = _LargeEvents(LARGE_BYTES)

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
                    look = self._looks.look(subscription.sent)
                    refusal, head = look.refusals.get(subscription.sent), look.head
                    if refusal is None:
                        subscription.lineage = lineage
                        continue
                else:
                    self._fill(channels)
                    if self._hub.join(subscription, ahead=ahead):
                        return
                    page = self._log.page(channels, subscription.sent, self._page_bytes(), 0)
                    refusal, head = page.refusal, page.head
                if subscription.ended:  # meanwhile; a client that has lost the right to listen must hear no more
                    return
                opening, ahead = False, True
                if refusal is not None:
                    subscription.sent, subscription.lineage = head, lineage
                    yield event.control_block("reset", {"reason": refusal}, id=head)
                elif page.too_large:
                    yield from self._one_large(subscription, channels, *page.too_large)
                else:
                    subscription.sent = page.upto
                    block = b"".join([data for _, data, _ in page.items])
                    del page  # not kept in memory while the client reads slowly
                    if block:
                        yield block
            except DatabaseUnavailable:
                if opening:
                    raise
                if time.monotonic() >= heartbeat_at:
                    heartbeat_at = time.monotonic() + self._heartbeat
                    yield event.HEARTBEAT
                time.sleep(min(_RETRY, self._heartbeat))

    def _one_large(
        self, subscription: Subscription, channels: Sequence[str], log_id: int, size: int
    ) -> Iterator[bytes]:
        """Yield the next event of a stream, which is larger than a page."""
        after = subscription.sent
        with self._large.hold(log_id, size, lambda: self._log.page(channels, after, 0, size)) as page:
            if page is None:
                logger.info("A stream was ended: too many large events wait for clients that read slowly.")
                subscription.end(self._hub.end_block("behind"))
            elif page.refusal is None and not page.too_large and not subscription.ended:
                # The page may be another stream's. Apart from this event, it is then about that stream's channels.
                subscription.sent = log_id
                yield from (data for _, data, item_id in page.items if item_id == log_id)

    def _fill(self, channels: Sequence[str]) -> None:
        """Have the hub remember the last events of `channels`, where it does not yet.

        One stream also reads for the streams that wait meanwhile. So many streams that open at once make few queries.
        """
        self._hub.follow(channels)
        missing = self._hub.unremembered(channels)
        if not missing:
            return
        self._unfilled.update(dict.fromkeys(missing))
        try:
            with self._filling.attempt():
                self._fill_with_others(missing)
        finally:
            for channel in missing:
                self._unfilled.pop(channel, None)

    def _fill_with_others(self, missing: Collection[str]) -> None:
        if not self._hub.unremembered(missing):
            return
        each = self._hub.memory
        most = max(1, min(_FILL, FILL_BYTES // each))
        batch = list(dict.fromkeys([*missing, *list(self._unfilled)]))[: max(most, len(missing))]
        uptos = self._hub.unremembered(batch)
        names = list(uptos)
        for start in range(0, len(names), most):
            part = {name: uptos[name] for name in names[start : start + most]}
            for tail in self._log.last(part, each):
                self._hub.remember(tail, part[tail.channel])
        for channel in batch:  # done: the next batch of a waiting stream then has other channels
            self._unfilled.pop(channel, None)

    def _page_bytes(self) -> int:
        return max(PAGE_BYTES_LEAST, min(PAGE_BYTES, PAGES_BYTES // max(1, len(self._readers))))


class _Attempts:
    """Lets one caller at a time read the log. If that fails, it fails for all callers that waited meanwhile too.

    Otherwise each of them would wait its full time for a database that does not answer, and the last of many minutes.
    """

    def __init__(self) -> None:
        self._one = threading.Lock()
        self._failed = 0

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        failed = self._failed
        with self._one:
            if self._failed != failed:
                raise DatabaseUnavailable("The event log did not answer another stream, which read for this one too.")
            try:
                yield
            except DatabaseUnavailable:
                self._failed += 1
                raise


class _Looks:
    """Looks up in the log the positions that clients come back with: one query for all that come during another."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._joining = threading.Lock()
        self._next = _Batch()
        self._attempts = _Attempts()

    def look(self, log_id: int) -> Look:
        """Return what the log says of this id, and perhaps of others."""
        with self._joining:
            batch = self._next
            batch.ids.add(log_id)
        with self._attempts.attempt():
            if batch.answer is None:
                with self._joining:
                    self._next = _Batch()
                batch.answer = self._log.look(batch.ids)
            return batch.answer


class _Batch:
    def __init__(self) -> None:
        self.ids: set[int] = set()
        self.answer: Look | None = None


class _LargeEvents:
    """Events larger than a page, on their way to slow clients: each is loaded once, and all have at most `limit` bytes.

    The holders of an event are a set, not a count: the garbage collector may end a stream in the middle of any
    statement here.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._held: dict[int, _Large] = {}

    @contextlib.contextmanager
    def hold(self, log_id: int, size: int, load: Callable[[], Page]) -> Iterator[Page | None]:
        """Give the page with one event, which is loaded once for all its holders. None if there is no room in time."""
        holder = object()
        large = self._enter(log_id, size, holder)
        if large is None:
            yield None
            return
        try:
            with large.loading.attempt():
                if large.page is None:
                    large.page = load()
            yield large.page
        finally:
            with self._changed:
                large.holders.discard(holder)
                if not large.holders and self._held.get(log_id) is large:
                    del self._held[log_id]
                self._changed.notify_all()

    def _enter(self, log_id: int, size: int, holder: object) -> _Large | None:
        deadline = time.monotonic() + _LARGE_TIMEOUT
        with self._changed:
            while log_id not in self._held and self._held and self._size() + size > self._limit:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    return None
            large = self._held.setdefault(log_id, _Large(size))
            large.holders.add(holder)
            return large

    def _size(self) -> int:
        return sum(large.size for large in list(self._held.values()))


class _Large:
    def __init__(self, size: int) -> None:
        self.size = size
        self.holders: set[object] = set()
        self.page: Page | None = None
        self.loading = _Attempts()
