"""Count the streams that hear a channel's notifications under another name than the channel's.

A stream on `Orders` may also hear what is sent to `orders`, but only the raw notifications of programs that wrote the
name without quotes (`channels.unquoted()`).
"""

from __future__ import annotations

from collections.abc import Iterable

from ...channels import heard_unquoted, name_heard_unquoted
from ...concurrency.locks import Lock


class UnquotedNames:
    """The names that streams hear so. `heard` has each name's channel for the hub; only this class changes it."""

    def __init__(self) -> None:
        self.heard: dict[str, str] = {}
        self._streams: dict[str, int] = {}
        self._lock = Lock()

    def add(self, channels: Iterable[str]) -> list[str]:
        """Count one more stream on `channels`. Return the channels to listen to for it."""
        return self._change(channels, 1)

    def remove(self, channels: Iterable[str]) -> list[str]:
        """Count one stream fewer on `channels`. Return the channels that `add()` returned for it."""
        return self._change(channels, -1)

    def _change(self, channels: Iterable[str], by: int) -> list[str]:
        plain = []
        for channel in channels:
            name = name_heard_unquoted(channel)
            plain.append(channel if name is None else name)
            if name is not None:
                with self._lock:
                    streams = self._streams[name] = self._streams.get(name, 0) + by
                    self.heard[name] = heard_unquoted(name)
                    if not streams:
                        del self._streams[name], self.heard[name]
        return plain
