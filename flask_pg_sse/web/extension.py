"""`PgSSE`: the package as an extension object, with or without an app."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

from flask import Flask, current_app, has_app_context, json

from ..runtime import Runtime
from .api import CurrentApp
from .authorize import Authorizer, SubjectOf, check_hook
from .blueprint import sse_bp
from .state import EXTENSION, State, current_state, state_of


class PgSSE(CurrentApp):
    """The package as an extension object, for one app, for several, or for none.

    database_url:       takes precedence over the app's `SSE_DATABASE_URL`. A URL, or a function that returns it.
    secret_key:         takes precedence over the app's `SSE_SECRET_KEY`.
    url_prefix, name:   the prefix and the name with which `init_app()` registers the blueprint.
    authorize, subject: the app's hooks, as described at `sse_bp.authorize` and `sse_bp.subject`.

    In an app context, the methods work on the current app, like the module's functions. Outside, they work on the one
    app that this object was given. Without any app, as in a script, the settings are those of the environment:
    `DATABASE_URL`, and variables with the names of the settings. `SSE_SECRET_KEY`, or `secret_key`, signs URLs and
    `disconnect()`; it must be the app's. `sse_url()` then needs `SSE_SERVER_URL`.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        database_url: str | Callable[[], str] | None = None,
        secret_key: str | bytes | None = None,
        url_prefix: str = "/sse",
        name: str = "sse",
        authorize: Authorizer | None = None,
        subject: SubjectOf | None = None,
    ) -> None:
        self._hooks = {"authorize": authorize, "subject": subject}
        for hook, function in self._hooks.items():
            if function is not None:
                check_hook(function, hook)
        given: dict[str, Any] = {"SSE_DATABASE_URL": database_url, "SSE_SECRET_KEY": secret_key}
        self._given = {key: value for key, value in given.items() if value is not None}
        self._url_prefix = url_prefix
        self._name = name
        settings: dict[str, Any] = {name: text for name, text in os.environ.items() if name.startswith("SSE_") and text}
        self._own = Runtime(settings | self._given, json.dumps)
        self._states: weakref.WeakSet[State] = weakref.WeakSet()  # of the apps that were given to init_app()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Register the blueprint under this object's name and prefix."""
        if not isinstance(app, Flask):
            raise TypeError(f"PgSSE() takes a Flask app, not {type(app).__name__}; pass a URL as database_url=….")
        app.config.update(self._given)
        app.register_blueprint(sse_bp, url_prefix=self._url_prefix, name=self._name, **self._hooks)
        self._states.add(state_of(app))

    def _runtime(self) -> Runtime:
        if has_app_context() and EXTENSION in current_app.extensions:
            return current_state().runtime
        states = list(self._states)
        if len(states) > 1:
            raise RuntimeError(
                "This PgSSE serves several apps, and none of them is the current app: call it in app.app_context()."
            )
        return states[0].runtime if states else self._own

    cursor = CurrentApp.sse_cursor

    def close(self) -> None:
        """End the streams, threads and connections that the methods have started. The next call starts them again."""
        self._runtime().close()
