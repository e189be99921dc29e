"""What the app's extensions do at the end of a request must not reach a stream: no session is saved, no cookie set.

The answer reaches the browser when the app has long gone on: the user may have logged out meanwhile. A cookie of the
stream's request, or its session in a store of the server's, would take the place of the newer one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flask import current_app
from flask.globals import request_ctx
from flask.sessions import SecureCookieSession

from .state import current_state

# A null session refuses these.
_WRITES = ("__setitem__", "__delitem__", "clear", "pop", "popitem", "update", "setdefault")
# Mixin for the class of null sessions.
_Unsaved = type("_Unsaved", (), {name: getattr(SecureCookieSession, name) for name in _WRITES})

Headers = Iterable[tuple[str, str]]


def save_no_session() -> None:
    """Give the rest of this request a copy of its session, which takes changes and is never saved.

    Flask asks its session interface whether the session is a null session, and does not save one.
    """
    context: Any = request_ctx
    interface = current_app.session_interface
    name = "_session" if hasattr(context, "_session") else "session"  # a property of Flask 3.1.3 cannot be set
    session = getattr(context, name)
    if interface.is_null_session(session):
        return
    copy = current_state().subclass(_Unsaved, interface.null_session_class)(session)
    # What extensions keep besides: Flask-Session has the session's id there.
    kept = getattr(session, "__dict__", {})
    copy.__dict__.update({name: value for name, value in kept.items() if name not in copy.__dict__})
    setattr(context, name, copy)


# As long as the app has the response, it says that it is encoded already: compressors such as Flask-Compress then leave
# it alone. They would hold events back until they have enough for a block.
NOT_TO_COMPRESS = ("Content-Encoding", "identity")


def as_sent(headers: Headers) -> list[tuple[str, str]]:
    """Return the headers of an answer at the moment when it begins.

    An extension may have set a cookie without a session, such as Flask-Login's to remember the user.
    """
    return [header for header in headers if header[0].lower() != "set-cookie" and header != NOT_TO_COMPRESS]
