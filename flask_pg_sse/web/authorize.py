"""Decide which client may listen to which channel: public patterns, the app's hooks, and the text of a refusal.

The hooks run in the request's context: the subject hook once, the authorizer once for each channel that needs it.
"""

from __future__ import annotations

import inspect
import ipaddress
import json
import logging
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from werkzeug.exceptions import HTTPException

from ..tokens import Tokens
from .refusals import Refusals

_SUBJECT_BYTES = 255
# A longer address is none, but what the client wrote in a header that the app trusts. Streams keep it.
_ADDRESS = 64
_NOBODY = frozenset[str]()  # one object for all streams without a subject

# What `fnmatch` takes for a pattern.
_PATTERN = re.compile(r"[*?]|\[.+\]")
# As some gateways write an address into X-Forwarded-For. A new connection has a new port, so it must not count.
_WITH_PORT = re.compile(r"([0-9.]+):\d+|\[(.+)\](?::\d+)?")

Authorizer = Callable[[str], bool]
SubjectOf = Callable[[], "str | int | None"]


class HookFailed(Exception):
    """One of the app's hooks raised an exception that is not an HTTP answer. It has been logged.

    `since` is for how many seconds it has failed each time, at most 60.
    """

    def __init__(self, since: float) -> None:
        super().__init__(since)
        self.since = since


def check_hook(function: object, name: str) -> None:
    """Raise TypeError if `function` cannot be the hook `name`."""
    if not callable(function):
        raise TypeError(f"{name} must be a function, not {type(function).__name__}.")
    if inspect.iscoroutinefunction(function):
        raise TypeError(
            f"{name} must be an ordinary function. {name_of(function)} returns a coroutine, which is always true."
        )


def subjects_of(hook: SubjectOf | None, signed: frozenset[str], refusals: Refusals) -> frozenset[str] | None:
    """Return a stream's subjects, `signed` and the app's. Returns None if the app's answer is not a subject.

    Raises `HookFailed`. An HTTP exception of the hook is raised as it is.
    """
    subjects = set(signed)
    if hook is not None:
        answer = _call(hook, "subject", refusals)
        if answer is not None:
            try:
                subjects.add(to_subject(answer))
            except (TypeError, ValueError) as error:
                refusals.log(
                    "subject", "A stream was refused: subject %s: %s", name_of(hook), error, level=logging.ERROR
                )
                return None
    return frozenset(subjects) if subjects else _NOBODY


def may_listen(hook: Authorizer | None, channel: str, refusals: Refusals) -> bool:
    """Tell whether the authorizer opens a channel.

    Raises `HookFailed`. An HTTP exception of the hook is raised as it is.
    """
    if hook is None:
        return False
    answer = _call(hook, "authorize", refusals, channel)
    if answer is not True and answer is not False:
        refusals.log(
            "authorizer's answer",
            "Channel %r was refused: only True opens it, and the authorizer %s returned %s. (A decorator such as "
            "login_required replaces the function's answer. Check current_user.is_authenticated in the function.)",
            channel,
            name_of(hook),
            type(answer).__name__,
            level=logging.ERROR,
        )
    return answer is True


def _call(hook: Callable[..., Any], name: str, refusals: Refusals, *args: str) -> Any:
    try:
        answer = hook(*args)
    except HTTPException as answer:
        status = answer.get_response().status
        refusals.log(f"{name} answers", "A stream was refused: %s %s answered %s.", name, name_of(hook), status)
        raise
    except BaseException as error:  # also gevent.Timeout and SystemExit: after a 500 a browser never comes back
        text = "%s %s failed; the client is told to reconnect later."
        refusals.log(f"{name} fails", text, name, name_of(hook), level=logging.ERROR, traceback=True)
        raise HookFailed(refusals.hook_failed(name)) from error
    refusals.hook_works(name)
    return answer


def why_closed(channel: str, *, tokens: Tokens, patterns: Sequence[str], asked: bool) -> str:
    """Return why a channel is refused, in a sentence: the three ways to open it, and why each failed.

    `asked` says that there is an authorizer.
    """
    bad = "a token of the URL" if len(tokens.authentic) + tokens.others > 1 else "the URL's token"
    ways = [
        "it is not among the site's public channels (SSE_CHANNELS)" if patterns else "the site has no public channels",
        f"{bad} is not one of this site's" if tokens.others else "the URL has no token that was signed for it",
        "the site's authorizer did not allow it" if asked else "the site has no authorizer",
    ]
    return f"Channel {channel!r} is not open to you: {ways[0]}, {ways[1]}, and {ways[2]}."


def did_you_mean(channel: str, patterns: Sequence[str]) -> str:
    """Return a question, with a blank in front, if a refused name looks like a slip; "" otherwise."""
    name = channel.strip()
    if is_public(name, patterns):
        return f" Did you mean {name!r}? Blanks belong to a name."
    for pattern in patterns:
        if fnmatchcase(name.casefold(), pattern.casefold()):
            meant = f"one that {pattern!r} opens" if _PATTERN.search(pattern) else repr(pattern)
            return f" Did you mean {meant}? Upper and lower case differ."
    if "," in channel:
        several = "&".join(f"channel={name.strip()}" for name in channel.split(","))
        return f" Did you mean several channels? They are written as ?{several}."
    return ""


def hint_about(channels: Iterable[str], tokens: Tokens) -> str:
    """Return why a stream may miss something; else "".

    A token of its URL is not authentic, or one of its names looks like a pattern or like several names.
    """
    if tokens.others:
        return "A token of the URL is not one of this site's, or was cut off: channels that it alone has are not heard."
    for channel in channels:
        if "," in channel:
            return f"Channel {channel!r} is one channel with a comma in its name.{did_you_mean(channel, ())}"
        if _PATTERN.search(channel):
            return (
                f"Channel {channel!r} is one channel of exactly that name. Patterns are for SSE_CHANNELS: a stream "
                "names each of its channels."
            )
    return ""


def ways_to_open(channel: str, patterns: Sequence[str]) -> str:
    """Return the three ways to open a channel, for the developer."""
    name = quoted(channel)
    return (
        f" To open it to everybody: {how_to_open(channel, patterns)}; to everybody with a signed URL: sse_url({name}, "
        f"sign=True, expires=3600); to clients of your choice: @sse_bp.authorize on a function of the channel that "
        "returns True for them."
    )


def name_of(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__name__) + "()"


def is_public(channel: str, patterns: Sequence[str]) -> bool:
    """Tell whether one of the patterns of `SSE_CHANNELS` opens `channel` to everybody. Case matters."""
    return any(fnmatchcase(channel, pattern) for pattern in patterns)


def how_to_open(channel: str, patterns: Sequence[str]) -> str:
    """Return a line of configuration that opens `channel`, besides what `patterns` open, for the developer to copy.

    The channel's name comes from a URL, so anybody can choose it: the line must quote it safely.
    """
    pattern = re.sub(r"([*?[])", r"[\1]", channel)
    return f'app.config["SSE_CHANNELS"] = [{", ".join(map(quoted, [*patterns, pattern]))}]'


def quoted(text: str) -> str:
    """Return a text as a Python literal, in one line."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def to_subject(value: object) -> str:
    """Return a subject as text. It may be a string, a whole number or a UUID, as databases use for a user's id.

    Raises TypeError for other types, because their text may not be unique. Raises ValueError for text that is empty,
    longer than 255 bytes in UTF-8, or not valid Unicode.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | uuid.UUID):
        raise TypeError(f"A subject is a string, a whole number or a UUID, not {type(value).__name__}.")
    text = str.__str__(value) if isinstance(value, str) else str(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("The subject is not valid Unicode text: it holds half of a surrogate pair.") from None
    if not 1 <= size <= _SUBJECT_BYTES:
        raise ValueError(f"A subject has 1 to {_SUBJECT_BYTES} bytes in UTF-8; this one has {size}.")
    return text


def counted_under(subjects: Collection[str], address: str | None) -> tuple[str, ...]:
    """Return the names under which a client's streams are counted: its subjects or, if it has none, its address.

    A port after the address does not count. Only the first 64 bits of an IPv6 address count, because its owner can
    choose the others.
    https://www.rfc-editor.org/rfc/rfc4291#section-2.5.4
    """
    if subjects:
        return tuple(f"subject {subject}" for subject in sorted(subjects))
    text = address or ""
    with_port = _WITH_PORT.fullmatch(text)
    try:
        known = ipaddress.ip_address(text if with_port is None else with_port[1] or with_port[2])
    except ValueError:  # the peer of a Unix socket has no IP address
        return (f"address {text[:_ADDRESS]}",)
    if isinstance(known, ipaddress.IPv6Address):
        known = known.ipv4_mapped or ipaddress.IPv6Address(int(known) >> 64 << 64)
    return (f"address {known}",)
