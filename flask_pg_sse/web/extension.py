"""`PgSSE`: the package as an extension object, with or without an app."""

from __future__ import annotations

import weakref

from flask import Flask, current_app, has_app_context, json

from ..runtime import Runtime
from .api import CurrentApp
from .authorize import Authorizer, SubjectOf, check_hook
from .blueprint import sse_bp
from .state import EXTENSION, State, current_state, state_of


class PgSSE(CurrentApp):
    """The package as an extension object, for one app, for several, or for none.

    database_url:       takes precedence over the app's config. Without an app, the default is the environment variable
                        `DATABASE_URL`.
    url_prefix, name:   the prefix and the name with which `init_app()` registers the blueprint.
    authorize, subject: the app's hooks, as described at `sse_bp.authorize` and `sse_bp.subject`.

    In an app context, the methods work on the current app, like the module's functions. Outside, they work on the one
    app that this object was given. Without any app, they work on a separate runtime, which has no secret key: it can
    neither sign nor `disconnect()`. `sse_url()` needs an app context, unless `SSE_SERVER_URL` says where the streams
    are.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        database_url: str | None = None,
        url_prefix: str = "/sse",
        name: str = "sse",
        authorize: Authorizer | None = None,
        subject: SubjectOf | None = None,
    ) -> None:
        self._hooks = {"authorize": authorize, "subject": subject}
        for hook, function in self._hooks.items():
            if function is not None:
                check_hook(function, hook)
        self._database_url = database_url
        self._url_prefix = url_prefix
        self._name = name
        self._own = Runtime({"SSE_DATABASE_URL": database_url}, json.dumps)
        self._states: weakref.WeakSet[State] = weakref.WeakSet()  # of the apps that were given to init_app()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Register the blueprint under this object's name and prefix."""
        if not isinstance(app, Flask):
            raise TypeError(f"PgSSE() takes a Flask app, not {type(app).__name__}; pass a URL as database_url=….")
        if self._database_url is not None:
            app.config["SSE_DATABASE_URL"] = self._database_url
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
