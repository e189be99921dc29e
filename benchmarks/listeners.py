"""The load generator: a separate process with the streams of one server, as the benchmark sees it.

    python -m benchmarks.listeners DESCRIPTOR PADDING     what `Listeners` starts

Every measurement includes its CPU, so the report shows whether it was fast enough.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

from benchmarks.crowd import Crowd, Heard

ROOT = Path(__file__).resolve().parent.parent
# After so many seconds without any event, missing events count as lost.
QUIET = 5.0


class Listeners:
    """A process with the streams of one server. `padding` is that of the events which they receive."""

    def __init__(self, padding: int) -> None:
        self._pipe, theirs = Pipe()
        # Not by multiprocessing: its children import all modules of the parent, which takes a second of CPU here.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.listeners", str(theirs.fileno()), str(padding)],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def __enter__(self) -> Listeners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _order(self, *order: object) -> object:
        self._pipe.send(order)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def connect(self, port: int, path: str, first: int, clients: int, channels: int) -> None:
        """Open streams number `first` to `clients` on `path`, in which {channel} becomes a number below `channels`."""
        self._order("connect", port, path, first, clients, channels)

    def expect(self) -> None:
        """Begin to count."""
        self._order("expect")

    def finish(self, deliveries: int, published: Sequence[int]) -> Heard:
        """Wait for `deliveries`, or until no more events come, and return the counts.

        `published` has the number of events of each channel.
        """
        answer = self._order("finish", deliveries, published, QUIET)
        assert isinstance(answer, Heard)
        return answer


def main(orders: Connection, padding: int) -> None:
    """Make the calls that `orders` names until it closes, and read the streams all the time."""
    crowd = Crowd(padding)
    try:
        while True:
            if not orders.poll():
                crowd.read(0.02)
                continue
            name, *args = orders.recv()
            try:
                orders.send(_finish(crowd, *args) if name == "finish" else getattr(crowd, name)(*args))
            except OSError as error:
                orders.send(ConnectionError(str(error)))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        crowd.close()


def _finish(crowd: Crowd, deliveries: int, published: Sequence[int], quiet: float) -> Heard:
    asked = time.monotonic()
    while crowd.heard.deliveries < deliveries and time.monotonic() < max(asked, crowd.heard.last_at) + quiet:
        crowd.read(0.02)
    return crowd.finish(published)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
