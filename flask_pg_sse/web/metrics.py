"""The metrics of all workers of an app on this host, as Prometheus reads them.

Counters come from the workers' directory, where those of ended workers are too. So their sum does not fall when a
worker ends or does not answer. Gauges come from the workers that answer. https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigurationError
from ..runtime import Runtime
from ..server import siblings
from ..stats import COUNTERS, Totals

_PREFIX = "flask_pg_sse_"
GAUGES = {
    "workers": "Workers of this app on this host that answer.",
    "workers_not_answering": "Workers that did not answer in time: busy, or stopped.",
    "workers_listening": "Workers that hear PostgreSQL. A worker listens from its first stream on.",
    "streams": "Open streams.",
    "streams_behind": "Open streams that read the event log, because their clients are slow or have missed events.",
    "channels": "Channels that workers listen to: one of two workers counts twice.",
    "listener_lag_seconds": "The longest time that events may have been on their way to a worker.",
    "workers_resident_memory_bytes": "Memory that the workers occupy.",
}


def exposition(runtime: Runtime, accept: str) -> tuple[bytes, str]:
    """Return the metrics and their content type, in the format that `accept` asks for.

    Raises `ConfigurationError` if prometheus_client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
    except ImportError:
        raise ConfigurationError("The metrics need prometheus_client: pip install 'flask-pg-sse[metrics]'.") from None
    answers, silent, totals = _of_this_host(runtime)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families([*_counters(totals), *_gauges(answers, len(silent))]))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Families:
    """A collector of prometheus_client, of what has been collected already."""

    def __init__(self, families: Sequence[Any]) -> None:
        self._families = families

    def collect(self) -> Iterable[Any]:
        return self._families


def _of_this_host(runtime: Runtime) -> tuple[list[siblings.Answer], list[str], Totals]:
    worker = runtime.worker
    presence = worker.presence
    answers = [worker.answer({})]
    if presence is None or not presence.is_listed:
        return answers, [], worker.stats.totals()
    try:
        asked = siblings.ask_all(runtime.app_id(), {}, skip=presence.name)
    except OSError:
        return answers, [], worker.stats.totals()
    return answers + [answer for answer in asked.answers if answer], asked.silent, asked.totals


def _counters(totals: Mapping[tuple[str, str], float]) -> Iterable[Any]:
    from prometheus_client.core import CounterMetricFamily

    for counter in COUNTERS:
        name, labels = counter.name.removesuffix("_total"), [counter.label] if counter.label else []
        family = CounterMetricFamily(name, counter.help, labels=labels)
        for key in counter.keys:
            family.add_metric([key[1]] if counter.label else [], totals.get(key, 0.0))
        yield family


def _gauges(answers: Sequence[siblings.Answer], silent: int) -> Iterable[Any]:
    from prometheus_client.core import GaugeMetricFamily

    def numbers(key: str) -> list[float]:
        return [answer[key] for answer in answers if answer.get(key) is not None]

    listening = sum(answer.get("listener") == "ready" for answer in answers)
    values = {
        "workers": len(answers),
        "workers_not_answering": silent,
        "workers_listening": listening,
        "streams": sum(numbers("streams")),
        "streams_behind": sum(numbers("behind")),
        "channels": sum(numbers("channels")),
        "listener_lag_seconds": max(numbers("lag"), default=0.0),
        "workers_resident_memory_bytes": sum(numbers("memory")),
    }
    for name, value in values.items():
        yield GaugeMetricFamily(_PREFIX + name, GAUGES[name], value=value)
