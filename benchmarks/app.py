"""The measured application: the README's first example, one more route, and settings from the environment."""

from __future__ import annotations

from flask import Flask

from flask_pg_sse import sse_bp

app = Flask(__name__)
app.config["SSE_CHANNELS"] = ["*"]
app.config.from_prefixed_env()
app.register_blueprint(sse_bp)


@app.get("/ping")
def ping() -> str:
    return "pong"
