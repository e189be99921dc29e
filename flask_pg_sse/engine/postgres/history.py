"""Reading the event log, on connections of its own, and never in a transaction of the caller's.

The functions that are called here are explained in sql/schema_1.sql.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...event import encode
from ..base import Item, Page, Tail
from . import codec, control
from .codec import Dropped
from .pool import Pool

# The fields as text: what psycopg2 cannot read as JSON would be an error of all rows.
_PAGE = (
    "SELECT pruned_through, head, upto, id, channel, fields::text, data, size "
    "FROM flask_pg_sse.page_v1(%s::text[], %s, %s, %s)"
)
_TAILS = (
    "SELECT channel, complete_after, id, fields::text, data FROM flask_pg_sse.tail_v1(%s::text[], %s::bigint[], %s)"
)
_HEAD = "SELECT flask_pg_sse.head_v1()"

# Seconds for one page, which may be an event of many megabytes on a slow line, as long as something comes.
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
    """Return the events on `channels` after an id: `max_bytes` of them, or a larger one alone, up to `max_event` bytes.

    `execute` runs a query on the database. What cannot be sent is passed over, and counted in `dropped`. On the control
    channel there are no events but commands, which `commanded` gets.
    """
    rows = execute(_PAGE, (list(channels), after, max_bytes, max_event))
    pruned_through, head, upto = rows[0][:3]
    items: list[Item] = []
    for _, _, _, log_id, channel, fields, data, size in rows:
        if log_id is None:
            break
        if size > max(max_bytes, max_event):
            return Page(pruned_through, head, after, items, (log_id, size))
        if channel == control.CHANNEL:
            if commanded is not None:
                commanded(data or "")
        else:
            items += _items(channel, log_id, fields, data, dropped)
    return Page(pruned_through, head, upto, items)


def _items(channel: str, log_id: int, fields: str, data: str | None, dropped: Dropped) -> list[Item]:
    try:
        return [(channel, encode(codec.from_row(fields, data), log_id), log_id)]
    except Exception as error:  # notify() lets none in; whatever others write, it keeps no other event away
        dropped.add(f"event {log_id} of the log", error)
        return []


class History:
    """The log, for streams that read it and for `sse_cursor()`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._dropped = Dropped()

    def page(self, channels: Sequence[str], after: int, max_bytes: int, max_event: int) -> Page:
        run = functools.partial(self._pool.execute, limit=LONGEST_READ)
        return read_page(run, channels, after, max_bytes, max_event, self._dropped)

    def last(self, uptos: Mapping[str, int], max_bytes: int) -> Sequence[Tail]:
        found: dict[str, tuple[int, list[Item]]] = {}
        rows = self._pool.execute(_TAILS, (list(uptos), list(uptos.values()), max_bytes))
        for channel, after, log_id, fields, data in rows:
            _, items = found.setdefault(channel, (after, []))
            if log_id is not None:
                items += _items(channel, log_id, fields, data, self._dropped)
        return [Tail(channel, after, items) for channel, (after, items) in found.items()]

    def head(self) -> int:
        """Return the id up to which everything is committed."""
        return int(self._pool.execute(_HEAD)[0][0])
