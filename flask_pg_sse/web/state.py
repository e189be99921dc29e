"""The package's state in an app: `app.extensions["pg_sse"]`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from flask import Flask, current_app

from ..runtime import Runtime
from .authorize import Authorizer, SubjectOf, check_hook
from .refusals import Refusals

EXTENSION = "pg_sse"


class State:
    """The value of `app.extensions["pg_sse"]`: the app's runtime and hooks, and the blueprint's name in that app."""

    def __init__(self, app: Flask, blueprint_name: str) -> None:
        self.runtime = Runtime(app.config, lambda data: app.json.dumps(data))
        reference = weakref.ref(app)  # the runtime must not keep an abandoned app
        self.runtime.engines = lambda: _engines_of(reference())
        self.blueprint_name = blueprint_name
        self.refusals = Refusals(app, self.runtime.count)
        self.authorize: Authorizer | None = None
        self.subject: SubjectOf | None = None
        # The differences of the server that stands alone. Nothing says who may listen, so all channels are open:
        self.open_unless_asked = False
        # A stream also hears what is sent to its channel's name without quotes, as `unquoted()` has it.
        self.hears_unquoted = False
        # Names that no stream can listen to, because its URLs mean something else.
        self.no_channels = frozenset[str]()
        self._subclasses: dict[tuple[type, type], type] = {}

    def open_to_all(self, authorizer: Authorizer | None) -> bool:
        """Tell whether every channel is open to everybody. `authorizer` is the one that would be asked otherwise."""
        return self.open_unless_asked and authorizer is None

    def set_hooks(self, authorize: Any, subject: Any) -> None:
        """Set the app's hooks; None leaves one as it is. Raises RuntimeError if another one is set already."""
        for name, function in (("authorize", authorize), ("subject", subject)):
            if function is None:
                continue
            check_hook(function, name)
            before = getattr(self, name)
            if before is not None and before is not function:
                raise RuntimeError(f"This app has an {name} already; register_blueprint(sse_bp, {name}=…) takes one.")
            setattr(self, name, function)

    def subclass(self, mixin: type, of: type[Any]) -> type[Any]:
        """Return a class of the app's with a mixin, always the same one.

        It is kept here, and in no cache of the module: a class that an app's factory defines refers to the app.
        """
        made = self._subclasses.get((mixin, of))
        if made is None:
            made = self._subclasses[mixin, of] = type(f"{mixin.__name__}{of.__name__}", (mixin, of), {})
        return made

    def close(self) -> None:
        """End all streams, threads and connections of this app in this process."""
        self.runtime.close()


def _engines_of(app: Flask | None) -> Sequence[Any]:
    """Return Flask-SQLAlchemy's engine for the app's own database, in a sequence that may be empty."""
    if app is None:
        return ()
    extension: Any = app.extensions.get("sqlalchemy")
    with app.app_context():  # Flask-SQLAlchemy's `engines` cannot even be looked for without it
        engine = getattr(extension, "engines", {}).get(None)
    return () if engine is None else (engine,)


def state_of(app: Flask) -> State:
    """Return the state of an app. Raises RuntimeError, with the remedy, if the blueprint is not registered."""
    state: State | None = app.extensions.get(EXTENSION)
    if state is None:
        raise RuntimeError(
            "flask_pg_sse is not set up for this app: call app.register_blueprint(sse_bp), or PgSSE(app), first."
        )
    return state


def current_state() -> State:
    """Return the state of the current app."""
    return state_of(current_app._get_current_object())  # type: ignore[attr-defined]
