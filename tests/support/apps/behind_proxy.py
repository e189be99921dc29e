"""The basic app behind one proxy, whose word on the client's address it takes."""

from __future__ import annotations

from werkzeug.middleware.proxy_fix import ProxyFix

from tests.support.apps.basic import app

app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1)  # type: ignore[method-assign]

__all__ = ["app"]
