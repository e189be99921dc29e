"""Read thousands of streams in one thread, and check every event on each of them.

All streams of a channel get the same bytes. So each piece is parsed once and then looked up. That makes a client in
Python fast enough to measure a server.
"""

from __future__ import annotations

import array
import re
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

# Bytes of one read.
_READ = 1 << 16
# Parsed pieces to remember: those of the events that are being delivered at one time.
_PIECES = 512
# Streams to open at once: fewer than any server's backlog.
_OPENING = 50
# Seconds in which a server must accept a connection and begin a stream.
_PATIENCE = 60.0


def data_of(number: int, published_at: int, padding: int) -> str:
    """Return the data of an event: its number on its channel, and the monotonic clock in nanoseconds."""
    return f'{{"n": {number}, "at": {published_at}, "pad": "{"x" * padding}"}}'


def _pattern(padding: int) -> re.Pattern[bytes]:
    return re.compile(rb'(?:id: \d+\n)?data: \{"n": (\d+), "at": (\d+), "pad": "x{%d}"\}' % padding)


@dataclass
class Heard:
    """What the streams received since `expect()`, and the CPU that this took."""

    deliveries: int = 0  # of different events
    missing: int = 0
    repeated: int = 0
    disordered: int = 0
    torn: int = 0
    ended: int = 0  # streams
    signs: int = 0  # of life: heartbeats and cursors
    # For each read: the seconds from publishing to reading of its oldest event, and the number of its events.
    latencies: array.array[float] = field(default_factory=lambda: array.array("d"))
    brought: array.array[int] = field(default_factory=lambda: array.array("L"))
    last_at: float = 0.0  # monotonic time of the last event
    cpu: float = 0.0  # seconds
    seconds: float = 0.0


class _Stream:
    __slots__ = ("channel", "following", "gaps", "rest", "sock")

    def __init__(self, sock: socket.socket, channel: int) -> None:
        self.sock = sock
        self.channel = channel
        self.following = 0  # the number of the next event
        self.gaps: set[int] = set()  # lower numbers that have not come
        self.rest: tuple[bytes, bytes] | None = None  # the beginnings of an incomplete block and of an incomplete chunk


class _Piece:
    """The parsed bytes of one read, after the rest of the read before."""

    __slots__ = ("at", "broken", "events", "first", "last", "numbers", "rest", "signs", "torn")

    def __init__(self, block: bytes, data: bytes, event: re.Pattern[bytes]) -> None:
        self.broken = False  # true if a chunk has another length than it says
        blocks = [block]
        at = 0
        while (end := data.find(b"\r\n", at)) >= 0:
            try:
                size = int(data[at:end], 16)
            except ValueError:
                size = -1
            if size >= 0 and len(data) < end + size + 4:
                break
            if size < 0 or data[end + size + 2 : end + size + 4] != b"\r\n":
                self.broken = True
                break
            blocks.append(data[end + 2 : end + 2 + size])
            at = end + size + 4
        *whole, rest = b"".join(blocks).split(b"\n\n")
        self.signs = self.torn = 0
        for index, one in enumerate(whole):
            whole[index] = self._after_heartbeats(one)
        rest = self._after_heartbeats(rest)
        self.rest = (rest, data[at:]) if rest or at < len(data) else None
        self.numbers: list[int] = []
        self.at = 0.0  # when the first event was published
        for one in whole:
            found = event.fullmatch(one)
            if found:
                self.numbers.append(int(found[1]))
                self.at = self.at or int(found[2]) / 1e9
            elif one.startswith((b": ", b"event: sse-", b"retry: ")):
                self.signs += 1
            else:
                self.torn += 1
        self.events = len(self.numbers)
        self.first = self.numbers[0] if self.numbers else 0
        self.last = self.first + self.events - 1
        if self.torn or self.numbers != list(range(self.first, self.last + 1)):
            self.first = -1  # never the expected number, so the events are checked one by one

    def _after_heartbeats(self, block: bytes) -> bytes:
        """Count the heartbeats before a block, which are comment lines without a blank line; return the block."""
        while block.startswith(b": heartbeat\n"):
            self.signs += 1
            block = block.removeprefix(b": heartbeat\n")
        return block


class Crowd:
    """The streams of one server. Events of channel number k are numbered from 0; each `expect()` starts again at 0."""

    def __init__(self, padding: int) -> None:
        self.heard = Heard()
        self._event = _pattern(padding)
        self._streams: dict[int, _Stream] = {}
        self._ended: list[_Stream] = []
        self._epoll = select.epoll()
        self._pieces: dict[bytes, _Piece] = {}
        self._begun: tuple[float, float] | None = None

    def connect(self, port: int, path: str, first: int, clients: int, channels: int) -> None:
        """Open streams number `first` to `clients`, some at a time; raise ConnectionError if one does not begin.

        The streams use the channels in turn.
        """
        for start in range(first, clients, _OPENING):
            opening = []
            for number in range(start, min(clients, start + _OPENING)):
                sock = socket.socket()
                sock.settimeout(_PATIENCE)
                sock.connect(("127.0.0.1", port))
                channel = number % channels
                sock.sendall(f"GET {path.format(channel=channel)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                opening.append(_Stream(sock, channel))
            try:
                while opening:
                    self._begin(opening[0])
                    opening.pop(0)
            finally:
                for stream in opening:
                    stream.sock.close()

    def _begin(self, stream: _Stream) -> None:
        """Read the head and the first block, which confirms LISTEN."""
        answer = b""
        while b"\n\n\r\n" not in answer:
            data = stream.sock.recv(_READ)
            answer += data
            if not data or not answer.startswith(b"HTTP/1.1 200"[: len(answer)]) or b"event: sse-end" in answer:
                raise ConnectionError(f"The server did not begin a stream, it said: {answer.decode(errors='replace')}")
        stream.sock.setblocking(False)
        self._streams[stream.sock.fileno()] = stream
        self._epoll.register(stream.sock.fileno(), select.EPOLLIN)
        stream.rest = (b"", b"")
        self._hear(stream, answer.partition(b"\r\n\r\n")[2], time.monotonic())

    def expect(self) -> None:
        """Begin to count: the next event of every channel is number 0."""
        self.heard = Heard()
        for stream in (*self._streams.values(), *self._ended):
            stream.following = 0
            stream.gaps.clear()
        self._begun = (time.monotonic(), time.process_time())

    def read(self, timeout: float) -> None:
        """Read from all streams that have data; wait for at most `timeout` seconds."""
        for number, _ in self._epoll.poll(timeout, 512):
            stream = self._streams[number]
            try:
                data = stream.sock.recv(_READ)
            except OSError:
                data = b""
            if data and self._hear(stream, data, time.monotonic()):
                continue
            self.heard.ended += 1
            self._epoll.unregister(number)
            self._streams.pop(number).sock.close()
            self._ended.append(stream)

    def _hear(self, stream: _Stream, data: bytes, now: float) -> bool:
        """Count the events in `data`; return False if the stream cannot be read any further."""
        if stream.rest is None:
            piece = self._pieces.get(data)
            if piece is None:
                if len(self._pieces) >= _PIECES:
                    self._pieces.clear()
                piece = self._pieces[data] = _Piece(b"", data, self._event)
        else:
            block, chunk = stream.rest
            piece = _Piece(block, chunk + data, self._event)
        stream.rest = piece.rest
        heard = self.heard
        heard.signs += piece.signs
        if piece.first != stream.following or not piece.events:
            heard.torn += piece.torn
            if piece.numbers:
                self._sort_out(stream, piece.numbers)
        else:
            stream.following = piece.last + 1
            heard.deliveries += piece.events
        if piece.events:
            heard.latencies.append(now - piece.at)
            heard.brought.append(piece.events)
            heard.last_at = now
        heard.torn += piece.broken
        return not piece.broken

    def _sort_out(self, stream: _Stream, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number >= stream.following:
                stream.gaps.update(range(stream.following, number))
                stream.following = number + 1
                self.heard.deliveries += 1
            elif number in stream.gaps:
                stream.gaps.remove(number)
                self.heard.disordered += 1
                self.heard.deliveries += 1
            else:
                self.heard.repeated += 1

    def finish(self, published: Sequence[int]) -> Heard:
        """Return the counts. `published` has the events of each channel; events that have not come are missing."""
        heard = self.heard
        for stream in (*self._streams.values(), *self._ended):
            heard.missing += len(stream.gaps) + max(0, published[stream.channel] - stream.following)
        if self._begun is not None:
            at, cpu = self._begun
            heard.seconds, heard.cpu = time.monotonic() - at, time.process_time() - cpu
        self.heard = Heard()
        return heard

    def close(self) -> None:
        for stream in self._streams.values():
            stream.sock.close()
        self._streams.clear()
        self._epoll.close()
