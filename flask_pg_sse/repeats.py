"""Decide which of many equal messages are logged: the first at once, the next ones rarely. No I/O.

Other texts are brought into one line here, too.

The caller logs, and passes the time in seconds of the monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# The most kinds that are told apart. Further ones are counted together, as one kind.
_MOST_KINDS = 100


@dataclass(frozen=True, slots=True)
class Ended:
    """A trouble that is over: the seconds that it lasted, and the number of its messages, logged or not."""

    seconds: float
    messages: int

    def __str__(self) -> str:
        return duration(self.seconds)


class Repeats:
    """The messages of one trouble. Each has a kind, and a message of another kind is another message.

    The first of a kind is logged at once, and the next one that comes `first` seconds later. The time doubles with each
    that is logged, up to `most` seconds. With the same number for both, there is one line in that time.

    There is no lock: two threads that call at the same moment may both log.
    """

    def __init__(self, first: float = 60.0, most: float = 3600.0) -> None:
        self._first = first
        self._most = most
        self._kinds: dict[str, _Kind] = {}
        self._began = 0.0
        self._messages = 0  # since the trouble began
        self._logged = False  # whether one of them was logged

    def count(self, kind: str, now: float) -> int:
        """Count a message. Return 0 if it must not be logged.

        Otherwise return the number of messages of its kind since the last one that was logged, this one included.
        """
        if not self._messages:
            self._began = now
        self._messages += 1
        if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            kind = ""
        known = self._kinds.setdefault(kind, _Kind())
        known.unsaid += 1
        if now < known.next_at:
            return 0
        known.wait = min(self._most, known.wait * 2 or self._first)
        known.next_at = now + known.wait
        known.unsaid, unsaid = 0, known.unsaid
        self._logged = True
        return unsaid

    def log(self, log: Callable[..., None], kind: str, now: float, message: str, *args: object) -> None:
        """Count a message, and log it if it must be, by a logger's method."""
        if number := self.count(kind, now):
            log(message + "%s", *args, times(number), stacklevel=2)

    def over(self, now: float) -> Ended | None:
        """Note that the trouble is over. Return None if there was none, or if nothing of it was logged.

        A trouble that comes back at once is still the same one: a message of a kind that is known is logged `first`
        seconds after the last one of that kind, and not at once.
        """
        ended = Ended(now - self._began, self._messages) if self._logged else None
        self._messages, self._logged = 0, False
        for kind, known in list(self._kinds.items()):
            known.next_at = min(known.next_at, known.next_at - known.wait + self._first)
            known.wait = 0.0
            known.unsaid = 0 if ended else known.unsaid  # the caller tells the number of all
            if now >= known.next_at:
                self._kinds.pop(kind, None)
        return ended


class _Kind:
    __slots__ = ("next_at", "unsaid", "wait")

    def __init__(self) -> None:
        self.next_at = float("-inf")  # from when on the next message is logged
        self.wait = 0.0  # between the last one and that time
        self.unsaid = 0


def times(number: int) -> str:
    """Return the end of a sentence for the result of `count()`; empty for 1."""
    return "" if number == 1 else f" ({number} times since this was last logged)"


def one_line(error: object) -> str:
    """Return the message of another library's error in one line, for a sentence: without the full stop at its end.

    libpq's and PostgreSQL's messages have several lines, and a statement that PostgreSQL quotes is left out. libpq
    indents lines, and breaks sentences: an indented line in lower case goes on with the one before.
    """
    diag = getattr(error, "diag", None)
    parts = [getattr(diag, f"message_{name}", None) for name in ("primary", "detail", "hint")]
    text = "\n".join(filter(None, parts)) if parts[0] else str(error)
    joined = ""
    for line in filter(str.strip, text.splitlines()):
        words = " ".join(line.split())
        goes_on = joined.endswith((".", ":", ";", ",", "?", "!")) or (line[0].isspace() and words[0].islower())
        joined += f"{'' if not joined else ' ' if goes_on else '. '}{words}"
    return joined.removesuffix(".") or type(error).__name__


def printable(text: str) -> str:
    """Return text for a terminal, on one line and without control characters, which the terminal would obey.

    Names of the database, events, and workers of other users may hold any.
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def sentence(text: str) -> str:
    """Return a text with a full stop, unless it ends as a question or an exclamation."""
    return text if text.endswith(("?", "!")) else f"{text}."


def duration(seconds: float) -> str:
    """Return a time in words, for people: seconds up to two minutes, minutes up to two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
