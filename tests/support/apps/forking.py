"""The basic app, with views that fork: `python -m tests.support.apps.forking PORT` serves it with gevent's pywsgi."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import gevent.monkey

    gevent.monkey.patch_all()

import atexit
import concurrent.futures
import ctypes
import gc
import multiprocessing
import os
import time
from pathlib import Path

from flask import request
from flask.typing import ResponseReturnValue

from flask_pg_sse import notify
from flask_pg_sse.concurrency.greenlets import original
from flask_pg_sse.server import shutdown
from flask_pg_sse.testing import stream
from tests.support.apps.basic import app

_fork = multiprocessing.get_context("fork")
_held: list[object] = []  # until the process ends


def job(folder: str) -> None:
    """Notify, go on until the test says so, with pauses in which greenlets run, and notify again."""
    with app.app_context():
        notify("jobs", f"begun in {os.getpid()}")
        while not Path(folder, "go").exists():
            time.sleep(0.01)
        notify("jobs", "ended")


def patient_job() -> None:
    """Notify for longer than a second, without a pause of the app's own in which greenlets run."""
    with app.app_context():
        for number in range(20):
            notify("jobs", number)
            original("time", "sleep")(0.1)


def listening_job(folder: str) -> None:
    """Hear a stream of the child's own."""
    events = stream(app.test_client(), "/sse/jobs", timeout=10)
    assert next(events).event == "sse-open"
    with app.app_context():
        notify("jobs", "own")
    Path(folder, "heard").write_text(next(events).data)
    job(folder)
    events.close()


@app.post("/fork/<how>")
def fork(how: str) -> ResponseReturnValue:
    folder = request.args.get("folder", "")
    if how == "patient":
        child = _fork.Process(target=patient_job)
        child.start()
        _held.append(child)
        return ""
    worker = shutdown.gunicorn_worker()
    if worker is not None:  # the copy of its main greenlet ends a child that lets greenlets run for a second
        os.register_at_fork(after_in_child=lambda: setattr(worker, "notify", lambda: None))
    if how == "multiprocessing":
        child = _fork.Process(target=job, args=(folder,))
        child.start()
        _held.append(child)
    elif how == "listening":
        child = _fork.Process(target=listening_job, args=(folder,))
        child.start()
        _held.append(child)
    elif how == "os.fork":
        if os.fork() == 0:
            try:
                job(folder)
            finally:
                os._exit(0)
    elif how == "atexit":
        if os.fork() == 0:
            try:
                job(folder)
                atexit._run_exitfuncs()
                gc.collect()
            finally:
                os._exit(0)
    elif how == "executor":
        executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=_fork)
        executor.submit(job, folder)
        _held.append(executor)
    elif how == "c":  # of which Python hears nothing
        libc = ctypes.CDLL(None)
        forked: int = libc.fork()
        while forked == 0:
            libc.usleep(10_000)
            if not libc.access(f"{folder}/go".encode(), 0):
                libc._exit(0)
        return str(forked)
    return ""


if __name__ == "__main__":
    from gevent.pywsgi import WSGIServer

    WSGIServer(("127.0.0.1", int(sys.argv[1])), app).serve_forever()
