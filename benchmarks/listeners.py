"""The load generator: a process of its own with the streams of one server, seen from outside.

    python -m benchmarks.listeners DESCRIPTOR PADDING     what `Listeners` starts

Nobody has to believe that it is fast enough: what it used of the CPU comes with every measurement.
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
# Seconds without any event after which what is still to come is taken to be lost.
QUIET = 5.0


class Listeners:
    """A process with the streams of one server. `padding` is that of the events that they will hear."""

    def __init__(self, padding: int) -> None:
        self._pipe, theirs = Pipe()
        # Not by multiprocessing, whose children import all that their parent has: here that takes a second of CPU.
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
        """Wait until so many deliveries have come, as long as any come, and return what was heard.

        `published` has the number of events of each channel.
        """
        answer = self._order("finish", deliveries, published, QUIET)
        assert isinstance(answer, Heard)
        return answer


def main(orders: Connection, padding: int) -> None:
    """Do what comes on `orders` until it is closed, and read all the time."""
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
