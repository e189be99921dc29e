"""Monitoring agents wrap the database drivers, and hand out connections of their own. Streams and notify() work there.

Each agent is installed, and started in the ways that its documentation names. None has anybody to report to.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.client import open_stream
from tests.support.servers import WebServer, gunicorn

NOWHERE = "http://127.0.0.1:9"
ENVIRONMENT = {
    "newrelic": {"NEW_RELIC_DEVELOPER_MODE": "true", "NEW_RELIC_APP_NAME": "tests", "NEW_RELIC_LICENSE_KEY": "0" * 40},
    "ddtrace": {
        "DD_TRACE_AGENT_URL": NOWHERE,
        "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
        "DD_REMOTE_CONFIGURATION_ENABLED": "false",
        "DD_DBM_PROPAGATION_MODE": "full",
    },
    "elasticapm": {
        "ELASTIC_APM_DISABLE_SEND": "true",
        "ELASTIC_APM_CENTRAL_CONFIG": "false",
        "DJANGO_SETTINGS_MODULE": "django.conf.global_settings",  # it looks at Django's settings where Django is there
    },
    "sentry_sdk": {"SENTRY_DSN": "http://key@127.0.0.1:9/1"},
    "opentelemetry": {f"OTEL_{name}_EXPORTER": "none" for name in ("TRACES", "METRICS", "LOGS")},
    "appsignal": {"APPSIGNAL_PUSH_API_ENDPOINT": NOWHERE},
}
COMMANDS = {
    "newrelic": ["newrelic-admin", "run-program"],
    "ddtrace": ["ddtrace-run"],
    "elasticapm": ["elasticapm-run"],
    "opentelemetry": ["opentelemetry-instrument"],
}
STARTS = [
    *(("newrelic", start) for start in ("command", "newrelic before", "newrelic after")),
    *(("ddtrace", start) for start in ("command", "ddtrace before", "ddtrace after", "ddtrace_auto before")),
    *(
        ("elasticapm", start)
        for start in ("command", "elasticapm before", "elasticapm after", "elasticapm_flask after")
    ),
    *(("sentry_sdk", start) for start in ("sentry before", "sentry after")),
    *(("opentelemetry", start) for start in ("command", "opentelemetry before", "opentelemetry after")),
    *(("appsignal", start) for start in ("appsignal before", "appsignal after")),
]


QUICK = ("newrelic", "command")


@pytest.mark.parametrize(
    ("agent", "start"),
    [pytest.param(*one, marks=[] if one == QUICK else pytest.mark.slow, id=f"{one[0]}-{one[1]}") for one in STARTS],
)
def test_streams_and_every_kind_of_connection(
    logged_url: str, start_server: Callable[..., WebServer], agent: str, start: str
) -> None:
    if agent != "newrelic" and importlib.util.find_spec("ddtrace") is None:
        pytest.skip("the agents are not here: ./tests/run --all fetches them")
    env = dict(ENVIRONMENT[agent])
    prefix: list[str] = []
    if start == "command":
        program, *arguments = COMMANDS[agent]
        prefix = [str(Path(sys.executable).with_name(program)), *arguments]
    else:
        env["AGENT"], env["STARTED"] = start.split()

    def command(port: int) -> list[str]:
        return [*prefix, *gunicorn("tests.support.apps.instrumented:app", port)]

    server = start_server(logged_url, command=command, **env)
    with open_stream(server.port, "orders", "it's") as stream:
        sent = json.loads(server.post("/notify"))
        got = {stream.event().data for _ in range(2 * len(sent) - 1)}
        assert got == {*sent, *(f"{name} in passing" for name in sent[1:])}
        server.post("/disconnect")
        assert stream.event().json == {"reason": "revoked"}
    assert json.loads(server.get("/wrapped")) == (agent != "sentry_sdk")
    warnings = [line for line in server.log().splitlines() if "WARNING" in line]
    # Datadog and Sentry iterate over each response.
    assert all("Streams go through their generators" in line for line in warnings), warnings
    assert "Traceback" not in server.log()
