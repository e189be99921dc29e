"""gevent's own server: `python -m tests.support.apps.pywsgi PORT [unpatched]`."""

from __future__ import annotations

import sys

if "unpatched" not in sys.argv:
    import gevent.monkey

    gevent.monkey.patch_all()

from gevent.pywsgi import WSGIServer

from tests.support.apps.basic import app

if __name__ == "__main__":
    WSGIServer(("127.0.0.1", int(sys.argv[1])), app).serve_forever()
