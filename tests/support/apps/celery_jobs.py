"""A Celery worker whose process has used the app, with a stream too, before it forks its pool of processes."""

from __future__ import annotations

import os

from celery import Celery  # type: ignore[import-untyped]

from flask_pg_sse import notify
from flask_pg_sse.testing import stream
from tests.support.apps.basic import app as flask_app

app = Celery("jobs", broker="filesystem://", backend=None)
_folder = os.environ.get("CELERY_FOLDER", "")
app.conf.broker_transport_options = {
    "data_folder_in": _folder, "data_folder_out": _folder, "control_folder": f"{_folder}/control",
}  # fmt: skip
app.conf.broker_connection_retry_on_startup = True


@app.task(ignore_result=True)  # type: ignore[untyped-decorator]
def send(number: int) -> None:
    with flask_app.app_context():
        notify("orders", {"number": number, "pid": os.getpid()})


if "ONLY_SENDS" not in os.environ:
    events = stream(flask_app.test_client(), "/sse/orders")
    assert next(events).event == "sse-open"
    with flask_app.app_context():
        notify("orders", "loaded")
    assert next(events).data == "loaded"
