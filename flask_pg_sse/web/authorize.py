"""Who may listen to which channel: public patterns, the app's hooks, and what a refused client is told.

The hooks run in the request's own context, once a request.
"""

from __future__ import annotations

import inspect
import ipaddress
import json
import logging
import re
import uuid
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from werkzeug.exceptions import HTTPException

from ..tokens import Token

logger = logging.getLogger(__name__)

_SUBJECT_BYTES = 255
_NOBODY = frozenset[str]()  # one object for all streams that are nobody's

Authorizer = Callable[[str], bool]
SubjectOf = Callable[[], "str | int | None"]


class HookFailed(Exception):
    """A function of the app's raised what is no HTTP answer; it has been logged."""


def check_hook(function: object, name: str) -> None:
    """Raise TypeError for what cannot be an authorizer or a function that names the subject."""
    if not callable(function):
        raise TypeError(f"{name} is to be a function, not {type(function).__name__}.")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{name} is to be an ordinary function; {name_of(function)} is a coroutine, always true.")


def subjects_of(hook: SubjectOf | None, token: Token | None) -> frozenset[str] | None:
    """Return whose a stream is, as the token and the app say; None where the app's answer cannot be used.

    Raises `HookFailed`; HTTP exceptions pass.
    """
    subjects = {token.subject} if token is not None and token.subject is not None else set()
    if hook is not None:
        answer = _call(hook, "subject")
        if answer is not None:
            try:
                subjects.add(to_subject(answer))
            except (TypeError, ValueError) as error:
                logger.error("A stream was refused: subject %s: %s", name_of(hook), error)
                return None
    return frozenset(subjects) if subjects else _NOBODY


def may_listen(hook: Authorizer | None, channel: str) -> bool:
    """Tell whether the authorizer opens a channel. Raises `HookFailed`; HTTP exceptions pass."""
    if hook is None:
        return False
    answer = _call(hook, "authorize", channel)
    if answer is not True and answer is not False:
        logger.error(
            "Channel %r was refused: only True opens it, and the authorizer %s returned %s. (A decorator such as "
            "login_required answers in its place; ask current_user.is_authenticated in the function.)",
            channel,
            name_of(hook),
            type(answer).__name__,
        )
    return answer is True


def _call(hook: Callable[..., Any], name: str, *args: str) -> Any:
    try:
        return hook(*args)
    except HTTPException:
        raise
    except Exception as error:
        logger.exception("%s %s failed; the client is told to come back later.", name, name_of(hook))
        raise HookFailed from error


def closed_text(channel: str, *, debug: bool, bad_token: bool, patterns: Sequence[str], asked: bool) -> str:
    """Return why a channel is refused, in one line: which of the three ways would have opened it, and what to do."""
    ways = [
        "it is not among the site's public channels (SSE_CHANNELS)" if patterns else "the site has no public channels",
        "the URL's token is not one of this site's" if bad_token else "the URL has no token that was signed for it",
        "the site's authorizer did not allow it" if asked else "the site has no authorizer",
    ]
    text = f"Channel {channel!r} is not open to you: {ways[0]}, {ways[1]}, and {ways[2]}."
    if not debug:
        return f"{text} Log in, load the page anew, or ask who runs the site to open it."
    name = quoted(channel)
    return (
        f"{text} To open it to everybody: {how_to_open(channel)}; to who has the URL: sse_url({name}, "
        f"sign=True, expires=3600); to whom you choose: @sse_bp.authorize on a function of the channel that returns "
        "True for them."
    )


def name_of(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__name__) + "()"


def is_public(channel: str, patterns: Sequence[str]) -> bool:
    """Tell whether one of the patterns of `SSE_CHANNELS` opens `channel` to everybody; upper and lower case differ."""
    return any(fnmatchcase(channel, pattern) for pattern in patterns)


def how_to_open(channel: str) -> str:
    """Return the line of configuration that opens `channel` and no other, for a developer to copy.

    The name comes from a URL, so that anybody chooses what stands in this line.
    """
    pattern = re.sub(r"([*?[])", r"[\1]", channel)
    return f'app.config["SSE_CHANNELS"] = [{quoted(pattern)}]'


def quoted(text: str) -> str:
    """Return a text as a literal of Python, in one line."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def to_subject(value: object) -> str:
    """Return a subject as text: a string, or a user's id as databases give it, a whole number or a UUID.

    Raises TypeError for other types, which may not have one text, and ValueError for text that is empty, longer than
    255 bytes in UTF-8, or no Unicode.
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
    """Return what the streams of a client are counted under: its subjects or, where it has none, its address.

    Of an IPv6 address the first 64 bits count: the others are its owner's to choose.
    https://www.rfc-editor.org/rfc/rfc4291#section-2.5.4
    """
    if subjects:
        return tuple(f"subject {subject}" for subject in sorted(subjects))
    try:
        known = ipaddress.ip_address(address or "")
    except ValueError:  # the peer of a Unix socket has none
        return (f"address {address or ''}",)
    if isinstance(known, ipaddress.IPv6Address):
        known = known.ipv4_mapped or ipaddress.IPv6Address(int(known) >> 64 << 64)
    return (f"address {known}",)
