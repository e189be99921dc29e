"""Let go of what a stream no longer needs of its request, whatever the client sent: the stream may last for days.

A web server keeps a request until its response has ended, for its access log and for hooks that run then. What the log
names stays as it is; of the rest, only what is short.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterable, MutableMapping
from typing import Any

# Characters. The most that is kept of one value, and of all headers together with their names.
_LONGEST = 256
_MOST = 2048

# What the access logs of the known servers name by default.
LOGGED_BY_DEFAULT = frozenset({"HTTP_AUTHORIZATION", "HTTP_REFERER", "HTTP_USER_AGENT", "RAW_URI"})


def release_environ(environ: MutableMapping[str, Any], named: Collection[str] = LOGGED_BY_DEFAULT) -> None:
    """Remove long headers from a WSGI environ, and cut other long texts. What is `named` stays.

    Headers are removed, because half of a value would be a wrong one. Code that runs later may rely on the other keys.
    """
    headers = [(name, value) for name, value in environ.items() if name.startswith("HTTP_") and type(value) is str]
    kept = {name for name, _ in within_room(headers, named)}
    for name, _ in headers:
        if name not in kept:
            del environ[name]
    for name, value in environ.items():
        if name == "HTTP_AUTHORIZATION":
            environ[name] = _user_alone(value)
        elif name not in named and name not in kept:
            environ[name] = _cut(value)
    if environ.get("werkzeug.request") is not None:  # of middleware: it has parsed cookies and parameters
        environ["werkzeug.request"] = None


def within_room(headers: Iterable[tuple[Any, Any]], named: Collection[str]) -> list[tuple[Any, Any]]:
    """Return the headers that are `named` (in upper case), and of the others those that are short, up to some total."""
    room = _MOST
    kept = []
    for header in headers:
        if header[0].upper() not in named:
            size = len(header[0]) + len(header[1])
            if size > min(_LONGEST, room):
                continue
            room -= size
        kept.append(header)
    return kept


def shortened(text: str) -> str:
    """Return a text, cut if it is long."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _cut(value: Any) -> Any:
    if type(value) is str:
        return shortened(value)
    if type(value) is dict:  # werkzeug's ProxyFix keeps the values that it has replaced
        return {name: shortened(text) if type(text) is str else text for name, text in value.items()}
    return value


def _user_alone(authorization: str) -> str:
    """Return what a log needs of a long `Authorization`: the name of the user, without the password."""
    if len(authorization) <= _LONGEST:
        return authorization
    scheme, _, credentials = authorization.partition(" ")
    try:
        user, _, _ = base64.b64decode(credentials.strip().encode()).partition(b":")
    except (binascii.Error, UnicodeEncodeError):
        user = b""
    return f"{scheme} {base64.b64encode(user + b':').decode()}" if scheme.lower() == "basic" else ""
