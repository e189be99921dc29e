"""Asking the app who a client is and what it may listen to. In the request's own context, once a request."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flask import Blueprint
from werkzeug.exceptions import HTTPException

from .. import access
from ..tokens import Token

logger = logging.getLogger(__name__)

_NOBODY = frozenset[str]()  # one object for all streams that are nobody's

Authorizer = Callable[[str], bool]
SubjectOf = Callable[[], "str | int | None"]
_F = TypeVar("_F", bound=Callable[..., Any])


class HookFailed(Exception):
    """A function of the app's raised what is no HTTP answer; it has been logged."""


class SSEBlueprint(Blueprint):
    """The blueprint, with the two functions by which all apps of the process decide who may listen.

    An app's own, given to `register_blueprint()` or to `PgSSE`, come before these.
    """

    default_authorize: Authorizer | None = None
    default_subject: SubjectOf | None = None

    def authorize(self, function: _F) -> _F:
        """Have `function(channel)` decide who may listen to the channels that are neither public nor signed for.

        It runs in the request's context, so that `session` and flask_login's `current_user` are there, once for each
        such channel. Only `True` opens the channel; `False` refuses; an HTTP exception (`abort(401)`) is the answer. An
        authorizer that fails refuses for the moment: the browser tries again.

        Raises TypeError for what cannot be called so, and RuntimeError where another one was set before: it would
        decide for all apps of the process. An app's own is `register_blueprint(sse_bp, authorize=…)`.
        """
        self.default_authorize = _only(self.default_authorize, function, "authorize")
        return function

    def subject(self, function: _F) -> _F:
        """Have `function()` name the client: a string, a whole number or a UUID; None for a stranger.

        A user's id, as a rule. `disconnect(subject=…)` finds the streams by it, and `SSE_MAX_STREAMS_PER_CLIENT` counts
        by it. It runs in the request's context, for every stream. Raises as `authorize` does.
        """
        self.default_subject = _only(self.default_subject, function, "subject")
        return function


def _only(before: Any, function: _F, name: str) -> _F:
    check_hook(function, name)
    if before is not None and before is not function:
        raise RuntimeError(
            f"@sse_bp.{name} was set before, to {_name_of(before)}, and is one for all apps of the process. Give each "
            f"app its own: register_blueprint(sse_bp, {name}=…)."
        )
    return function


def check_hook(function: object, name: str) -> None:
    """Raise TypeError for what cannot be an authorizer or a function that names the subject."""
    if not callable(function):
        raise TypeError(f"{name} is to be a function, not {type(function).__name__}.")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{name} is to be an ordinary function; {_name_of(function)} is a coroutine, always true.")


def subjects_of(hook: SubjectOf | None, token: Token | None) -> frozenset[str] | None:
    """Return whose a stream is, as the token and the app say; None where the app's answer cannot be used.

    Raises `HookFailed`; HTTP exceptions pass.
    """
    subjects = {token.subject} if token is not None and token.subject is not None else set()
    if hook is not None:
        answer = _call(hook, "subject")
        if answer is not None:
            try:
                subjects.add(access.to_subject(answer))
            except (TypeError, ValueError) as error:
                logger.error("A stream was refused: subject %s: %s", _name_of(hook), error)
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
            _name_of(hook),
            type(answer).__name__,
        )
    return answer is True


def _call(hook: Callable[..., Any], name: str, *args: str) -> Any:
    try:
        return hook(*args)
    except HTTPException:
        raise
    except Exception as error:
        logger.exception("%s %s failed; the client is told to come back later.", name, _name_of(hook))
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
    quoted = access.quoted(channel)
    return (
        f"{text} To open it to everybody: {access.how_to_open(channel)}; to who has the URL: sse_url({quoted}, "
        f"sign=True, expires=3600); to whom you choose: @sse_bp.authorize on a function of the channel that returns "
        "True for them."
    )


def _name_of(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__name__) + "()"
