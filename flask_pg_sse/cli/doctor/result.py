"""What a check has found: ok, a warning or a fault, in words, with the remedy."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class State(enum.IntEnum):
    """How bad it is, and the exit status of the command."""

    OK = 0
    WARNING = 1
    FAULT = 2


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the answer. `text` says what was found; `remedy` says what to do, and is empty if all is well."""

    state: State
    text: str
    remedy: str = ""


def ok(text: str) -> Result:
    return Result(State.OK, text)


def warning(text: str, remedy: str) -> Result:
    return Result(State.WARNING, text, remedy)


def fault(text: str, remedy: str) -> Result:
    return Result(State.FAULT, text, remedy)


# The package's messages say what failed, why, and then the remedy: after this word, or in words that begin so.
_WORDS = "Add|Check|Correct|Create|Give|Install|Let|Raise|Remove|Run|Set|Upgrade|Use"
_REMEDY = re.compile(rf"(?:^|[:.] )Remedy: |(?<=[.?!] )(?=(?:{_WORDS}) )|(?<=: )(?=(?:{_WORDS.lower()}) )")


def in_two(message: object) -> tuple[str, str]:
    """Return a message of the package as what it says and its remedy. Errors and log lines are told in the same words.

    A message without a remedy is returned as it is.
    """
    text = " ".join(str(message).split())
    found = _REMEDY.search(text)
    if found is None:
        return _sentence(text), ""
    return _sentence(text[: found.start()]), _sentence(text[found.end() :])


def _sentence(text: str) -> str:
    text = text.strip().rstrip(":;,")
    text = f"Run {text}" if text.startswith("flask sse ") else text[:1].upper() + text[1:]
    return text if not text or text[-1] in ".?!…" else f"{text}."
