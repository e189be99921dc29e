"""The app of `basic` on a host of its own: TEST_HOST is its name, and TEST_RUN_DIRECTORY its memory (/dev/shm)."""

from __future__ import annotations

import os
import socket

from flask_pg_sse.server import rundir
from tests.support.apps.basic import app as app

name, directory = os.environ["TEST_HOST"], os.environ["TEST_RUN_DIRECTORY"]
socket.gethostname = lambda: name
rundir._base = lambda: directory
