"""A browser's EventSource as far as resuming goes, for clients that lose their connection at any byte.

It shares no code with the package and, unlike tests/support/client.py, takes whatever bytes came:
https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

FOR_EVER = 2**40  # bytes

# Data of events that the log keeps begin with this, in these tests; no others do.
LOGGED = "log "
# What senders here give as an id of their own. None of them is one that the log gives.
FOREIGN_IDS = ("1", "1", "seed-7", "0042")


@dataclass(frozen=True, slots=True)
class Dispatched:
    """One event as a page gets it."""

    event: str
    data: str
    last_event_id: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Parser:
    """Turns the bytes of a stream into events. An event that the stream's end cuts off does not count."""

    def __init__(self, last_event_id: str) -> None:
        self.last_event_id = last_event_id  # committed by the blank line of a block, not by its id line
        self._id_buffer = last_event_id
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Dispatched]:
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        for block in blocks:
            name, lines = "message", []
            for line in block.decode().split("\n"):
                key, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if key == "id":
                    self._id_buffer = value
                elif key == "event":
                    name = value
                elif key == "data":
                    lines.append(value)
                else:
                    assert key in ("", "retry"), block
            self.last_event_id = self._id_buffer
            if lines:
                yield Dispatched(name, "\n".join(lines), self.last_event_id)


class Chunks:
    """Takes an answer apart as its bytes come: the head, then the chunks of the body."""

    def __init__(self) -> None:
        self.head = b""
        self.finished = False
        self._raw = b""
        self._left = 0

    def feed(self, raw: bytes) -> bytes:
        """Return what of the body is in these bytes."""
        self._raw += raw
        if not self.head:
            head, end, rest = self._raw.partition(b"\r\n\r\n")
            if not end:
                return b""
            self.head, self._raw = head, rest
        body = b""
        while self._raw:
            if self._left:
                piece, self._raw = self._raw[: self._left], self._raw[self._left :]
                self._left -= len(piece)
                body += piece
                continue
            size, end, rest = self._raw.partition(b"\r\n")
            if not end:
                break
            self._raw = rest
            if size:  # else the end of the chunk before
                self._left = int(size, 16)
                self.finished = self._left == 0
        return body


@dataclass(slots=True)
class Stretch:
    """The events after one id of the log: each event's id (None if its sender chose one) and its data."""

    after: int
    events: list[tuple[int | None, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reset:
    """An sse-reset: the id that the client had sent (None: it came later in a stream), and the answer."""

    asked: str | None
    reason: str
    id: int


class Browser(threading.Thread):
    """Listens to `channels` at one of `ports` after another, and is cut off again and again, at any byte.

    `chosen_ports` may change. It ends when it has everything up to the id that `finish()` names. `stays` returns the
    number of bytes that it may read before the next cut.
    """

    def __init__(
        self,
        ports: Sequence[int],
        channels: Sequence[str],
        seed: int,
        stays: Callable[[random.Random], int] | None = None,
        away: float = 0.0,
    ) -> None:
        super().__init__(name=f"browser-{seed}")
        self.ports = list(ports)
        self.channels = list(channels)
        self.stretches: list[Stretch] = []
        self.resets: list[Reset] = []
        self.failure: BaseException | None = None
        self.connections = 0
        self.ends: list[str] = []
        self.at = 0  # everything up to this id of the log has come
        self.deliveries = 0
        self._chooser = random.Random(seed)
        self._stays = stays or any_number_of_bytes
        self._away = away
        self._last_event_id = ""
        self._target: int | None = None
        self._deadline = float("inf")
        self._given_up = threading.Event()

    def finish(self, target: int, deadline: float) -> None:
        """End once everything up to the id `target` has come, or at the monotonic time `deadline`."""
        self._deadline = deadline
        self._target = target

    def give_up(self) -> None:
        self._given_up.set()

    @property
    def _done(self) -> bool:
        return self._given_up.is_set() or (self._target is not None and self.at >= self._target)

    def run(self) -> None:
        try:
            while not self._done:
                assert time.monotonic() < self._deadline, f"{self.at} is behind {self._target}"
                self._one_connection()
        except BaseException as error:
            self.failure = error

    def _one_connection(self) -> None:
        left = self._stays(self._chooser) if self._target is None else FOR_EVER
        asked = self._last_event_id
        parser, chunks = Parser(asked), Chunks()
        fresh = True
        try:
            with socket.create_connection(("127.0.0.1", self._chooser.choice(self.ports)), timeout=5) as sock:
                sock.sendall(self._request(asked))
                sock.settimeout(0.5)
                while left > 0 and not self._done and not chunks.finished:
                    assert time.monotonic() < self._deadline, f"{self.at} is behind {self._target}"
                    try:
                        raw = sock.recv(min(left, 65536))
                    except TimeoutError:
                        if left < FOR_EVER and self._chooser.random() < 0.3:
                            break  # not more comes than this
                        continue
                    if not raw:
                        break
                    left -= len(raw) if left < FOR_EVER else 0
                    body = chunks.feed(raw)
                    if chunks.head:
                        assert chunks.head.startswith(b"HTTP/1.1 200"), chunks.head
                    for one in parser.feed(body):
                        if fresh and one.event != "sse-end":
                            fresh = False
                            self.connections += 1
                            assert one.event == "sse-open", one
                            self._open(asked, one)
                        else:
                            self._take(asked, one)
                    self._last_event_id = parser.last_event_id
                if self._chooser.random() < 0.3:  # as a vanished client does: a reset and no farewell
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:  # the server is being started again, or the line broke
            self._given_up.wait(0.05)
        if self._away and self._target is None:
            self._given_up.wait(self._chooser.uniform(0, self._away))

    def _request(self, asked: str) -> bytes:
        pairs = [("channel", channel) for channel in self.channels]
        header = ""
        if asked:
            way = self._chooser.choice(["header", "query", "both"])
            if way == "query":
                pairs.append(("last_event_id", asked))
            else:
                header = f"Last-Event-ID: {asked}\r\n"
            if way == "both":  # a page's own URL may hold an id that is long out of date: the header beats it
                pairs.append(("last_event_id", self._chooser.choice(["0", "7", "x", str(2**62)])))
        return f"GET /sse?{urlencode(pairs)} HTTP/1.1\r\nHost: 127.0.0.1\r\n{header}\r\n".encode()

    def _open(self, asked: str, opening: Dispatched) -> None:
        if asked:
            assert opening.last_event_id == asked  # no other position before there is an sse-reset
        else:
            assert not self.stretches, "it came back as a stranger"
            self.stretches.append(Stretch(int(opening.last_event_id)))
        self._reached(opening)

    def _take(self, asked: str, one: Dispatched) -> None:
        if one.event == "sse-reset":
            # In the same write as sse-open, hence the second block, if it answers what was asked.
            self.resets.append(Reset(asked, one.json["reason"], int(one.last_event_id)))
            self.stretches.append(Stretch(int(one.last_event_id)))
        elif one.event == "sse-end":
            self.ends.append(one.json["reason"])
        elif one.event == "sse-status":
            assert type(one.json["live"]) is bool, one
        elif one.event == "sse-cursor":
            events = self.stretches[-1].events
            if events and events[-1][0] is None:
                events[-1] = (int(one.last_event_id), events[-1][1])
        elif one.data.startswith(LOGGED):
            log_id = int(one.last_event_id) if is_of_the_log(one.last_event_id) else None
            self.stretches[-1].events.append((log_id, one.data))
            self.deliveries += 1
        else:
            assert one.data.startswith("raw "), one
        self._reached(one)

    def _reached(self, one: Dispatched) -> None:
        if is_of_the_log(one.last_event_id):
            # An sse-reset names the position of its worker, and another one may have been faster.
            assert int(one.last_event_id) >= self.at or one.event == "sse-reset", f"{one} after {self.at}"
            self.at = int(one.last_event_id)


def is_of_the_log(last_event_id: str) -> bool:
    return last_event_id.isdigit() and last_event_id not in FOREIGN_IDS


def any_number_of_bytes(chooser: random.Random) -> int:
    """Cut anywhere: in the head, in the first block, among a few events, among many."""
    return chooser.randrange(chooser.choice([300, 600, 2000, 20000, 200000, 1000000]))


def for_ever(chooser: random.Random) -> int:
    """Never leave."""
    return FOR_EVER


def check(browser: Browser, log: Sequence[tuple[int, str, str]]) -> None:
    """Compare what came with the log's events (id, channel, data), to the event."""
    assert browser.failure is None, (browser.name, browser.failure)
    rows = [(log_id, data) for log_id, channel, data in log if channel in browser.channels]
    for stretch in browser.stretches:
        expected = [row for row in rows if row[0] > stretch.after]
        if stretch is not browser.stretches[-1]:
            expected = expected[: len(stretch.events)]  # up to the cut that made a reset necessary
        got = stretch.events
        if [data for _, data in got] != [data for _, data in expected]:
            raise AssertionError(difference(browser, got, expected))
        for (log_id, data), (expected_id, _) in zip(got, expected, strict=True):
            assert log_id in (None, expected_id), (browser.name, log_id, expected_id, data[:60])


def difference(browser: Browser, got: Sequence[tuple[int | None, str]], expected: Sequence[tuple[int, str]]) -> str:
    got_data, expected_data = [data for _, data in got], [data for _, data in expected]
    lost = [(log_id, data[:40]) for log_id, data in expected if data not in set(got_data)]
    twice = [data[:40] for number, data in enumerate(got_data) if data in got_data[:number]]
    return (
        f"{browser.name} on {browser.channels}: {len(got)} of {len(expected)} events; lost {len(lost)}: {lost[:5]}; "
        f"twice {len(twice)}: {twice[:5]}; resets {browser.resets[:5]}; order "
        f"{'right' if sorted(got_data) != sorted(expected_data) else 'WRONG'}"
    )
