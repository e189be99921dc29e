"""An app with the blueprint and nothing else, for commands: its key comes from the environment, and it logs nothing."""

from __future__ import annotations

import os

from flask import Flask

from flask_pg_sse import sse_bp

app = Flask(__name__)
app.config["SECRET_KEY"] = os.environ.get("SECRET_KEY")
app.register_blueprint(sse_bp)
