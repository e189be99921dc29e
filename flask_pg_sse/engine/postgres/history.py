"""Read the event log, on the package's own connections and never in a caller's transaction.

sql/schema_1.sql explains the SQL functions.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ...event import encode
from ..base import Item, Look, Page, Tail
from ..raw import Dropped
from . import codec, control
from .installation import InstallationLookup
from .pool import Pool

# The fields are read as text. If psycopg2 read them as JSON, one bad row would be an error for the whole query.
_PAGE = (
    "SELECT id, channel, fields::pg_catalog.text, data, size, upto, head, refusal "
    "FROM flask_pg_sse.page_v1(%s::pg_catalog.text[], %s::bigint, %s::bigint, %s::bigint)"
)
_LOOK = "SELECT id, refusal, head FROM flask_pg_sse.look_v1(%s::bigint[])"
_TAILS = (
    "SELECT channel, complete_after, id, fields::pg_catalog.text, data "
    "FROM flask_pg_sse.tail_v1(%s::pg_catalog.text[], %s::bigint[], %s::bigint)"
)
HEAD = "SELECT flask_pg_sse.head_v1()"

# Seconds for one page while bytes keep coming: it may be an event of many megabytes on a slow line.
LONGEST_READ = 600.0

Execute = Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]]


def read_page(
    execute: Execute,
    channels: Sequence[str],
    after: int,
    max_bytes: int,
    max_event: int,
    dropped: Dropped,
    commanded: Callable[[str], None] | None = None,
) -> Page:
    """Return the events on `channels` after an id: at most `max_bytes`, or one larger event, up to `max_event` bytes.

    These are bytes as streams send them. The log's own bytes may be fewer: each line end in the data becomes seven
    bytes. `execute` runs a query on the database. An event that cannot be sent is skipped, and counted in `dropped`.
    The control channel has commands instead of events; `commanded` is called with each.
    """
    *rows, (*_, upto, head, refusal) = execute(_PAGE, (list(channels), after, max_bytes, max_event))
    if refusal is not None:
        return Page(head, upto or 0, refusal=refusal)
    items: list[Item] = []
    left = max_bytes
    for log_id, channel, fields, data, size, *_ in rows:
        if size > max(max_bytes, max_event):
            return Page(head, after, items, (log_id, size))
        if channel == control.CHANNEL:
            if commanded is not None:
                commanded(data or "")
        else:
            for item in _items(channel, log_id, fields, data, dropped):
                sent = len(item[1])
                if items and sent > left:
                    return Page(head, after, items)
                # With no bytes for others, the caller wants this event alone and cannot know how long it has become.
                if sent > max(max_bytes, max_event) and max_bytes:
                    return Page(head, after, items, (log_id, sent))
                items.append(item)
                left -= sent
        after = log_id
    return Page(head, upto, items)


def _items(channel: str, log_id: int, fields: str, data: str | None, dropped: Dropped) -> list[Item]:
    try:
        return [(channel, encode(codec.from_row(fields, data), log_id), log_id)]
    except Exception as error:  # another writer's row; it must not hold up other events
        dropped.add(f"event {log_id} of the log", error)
        return []


def _newest(tail: Tail, max_bytes: int) -> Tail:
    """Return the newest of these events that have at most `max_bytes` as streams send them."""
    items = deque(tail.items)
    size = sum(len(block) for _, block, _ in items)
    after = tail.after
    while size > max_bytes:
        _, block, after = items.popleft()
        size -= len(block)
    return Tail(tail.channel, after, list(items))


class History:
    """The event log, for streams that read it and for `sse_cursor()`."""

    def __init__(self, pool: Pool, for_heads: Pool, installation: InstallationLookup) -> None:
        self._run = functools.partial(installation.execute, pool)
        self._run_for_head = functools.partial(installation.execute, for_heads)
        self._dropped = Dropped()

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page:
        # A page is short, and others wait for their turn.
        run = functools.partial(self._run, limit=LONGEST_READ if max_event else None)
        return read_page(run, channels, after, max_bytes, max_event, self._dropped)

    def look(self, ids: Collection[int]) -> Look:
        """Tell which of these ids no stream can go on after, with one query. `ids` has at least one."""
        rows = self._run(_LOOK, (list(ids),))
        return Look(rows[0][2], {log_id: refusal for log_id, refusal, _ in rows if refusal is not None})

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        found: dict[str, tuple[int, list[Item]]] = {}
        rows = self._run(_TAILS, (list(uptos), list(uptos.values()), max_bytes))
        for channel, after, log_id, fields, data in rows:
            _, items = found.setdefault(channel, (after, []))
            if log_id is not None:
                items += _items(channel, log_id, fields, data, self._dropped)
        return [_newest(Tail(channel, after, items), max_bytes) for channel, (after, items) in found.items()]

    def head(self) -> int:
        """Return the head of the log: the id up to which every event is committed."""
        return int(self._run_for_head(HEAD)[0][0])
