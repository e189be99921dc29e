"""What stands between the app and the browser (`--url`): it passes a stream on at once, whole, and leaves it open."""

from __future__ import annotations

import json
import secrets
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit

from flask import url_for

from ...tokens import Token, sign_token
from ...web.authorize import is_public
from .probe import Probe
from .result import Result, fault, ok, warning
from .setup import Check, NotLookedAt, Setup
from .web_server import addresses

# Seconds in which a stream must open, and an event must come.
_OPEN_WITHIN = 6.0
_COME_WITHIN = 3.0
# Events that are sent, and the seconds between two of them. Together they are smaller than any proxy's buffer.
_EVENTS = 4
_EVERY = 0.3
# Seconds that an event may take, and from how many on it counts as late where it comes much faster past the proxy.
_LATE = 1.0
_RATHER_LATE = 0.15
# By what a proxy says of itself in the headers Server, Via and the like.
_BUFFERING = {
    "nginx": "Set proxy_buffering off; for the streams, and no proxy_ignore_headers X-Accel-Buffering and no gzip for "
    "text/event-stream.",
    "caddy": "Set flush_interval -1 in reverse_proxy, and no encode for the streams.",
    "apache": "Set flushpackets=on in ProxyPass, and no DEFLATE filter for the streams.",
    "varnish": "Set return (pipe) for the streams.",
    "lighttpd": "Set server.stream-response-body = 2.",
    "haproxy": "Set option http-no-delay.",
    "cloudflare": "Set a rule that leaves the streams uncompressed and uncached.",
}
_EXAMPLES = "docs/deploy.md has an example for each proxy."
# Headers that name a hop.
_TELLING = ("server", "via", "x-served-by", "x-cache", "cf-cache-status", "cf-ray", "x-amz-cf-pop", "x-varnish")


@dataclass
class Trial:
    """The trial stream at each hop, the outermost first, and what was sent on it."""

    channel: str
    hops: Sequence[Probe]
    query: str
    sent: list[tuple[float, str]] = field(default_factory=list)  # when, and the data
    logged: bool = False

    @property
    def outer(self) -> Probe:
        return self.hops[0]

    @property
    def open_hops(self) -> Sequence[Probe]:
        return [hop for hop in self.hops if hop.first("sse-open")]

    def close(self) -> None:
        for hop in self.hops:
            hop.close()


def opens(setup: Setup) -> Iterator[Result]:
    """A stream opens through the proxy."""
    if setup.url is None:
        return
    trial = _begin(setup)
    if trial is None:
        yield warning(
            "A stream through the proxy was not tried: it needs a signed URL, and there is no secret key.",
            "Set SSE_SECRET_KEY, or an app's SECRET_KEY, here and on the server.",
        )
        return
    setup.trial = trial
    for hop in trial.hops:
        hop.start()
    until = time.monotonic() + _OPEN_WITHIN
    for hop in trial.hops:
        hop.wait_for(lambda hop=hop: hop.blocks or (hop.status is not None and not hop.is_stream),  # type: ignore[misc]
                     until - time.monotonic())  # fmt: skip
    outer = trial.outer
    opened = outer.first("sse-open")
    if opened is None:
        yield _why_not_open(trial)
    else:
        yield ok(
            f"A stream opened after {(opened.at - outer.started_at) * 1000:.0f} ms at {_where(outer)}{_signs(outer)}."
        )


def _begin(setup: Setup) -> Trial | None:
    channel = f"doctor-{secrets.token_hex(8)}"
    query = {"channel": channel}
    if not is_public(channel, setup.settings.channels):
        keys = setup.state.runtime.keys()
        if not keys:
            return None
        expires = time.time() + setup.seconds + 300
        query["token"] = sign_token(keys, Token(frozenset([channel]), expires))
    with setup.app.test_request_context():
        path = url_for(f"{setup.state.blueprint_name}.stream").rstrip("/")
    sites = [setup.url or "", *setup.direct]
    if not setup.direct:
        sites += addresses(setup)
    encoded = urlencode(query)
    return Trial(channel, [Probe(_with_path(site, path), encoded) for site in dict.fromkeys(sites)], encoded)


def _with_path(site: str, path: str) -> str:
    return site if path and urlsplit(site).path.rstrip("/").endswith(path) else site + (path or "/")


def _why_not_open(trial: Trial) -> Result:
    # The hop next to one where the stream opens; or the first, if it opens nowhere.
    number = next((at for at, hop in enumerate(trial.hops) if hop in trial.open_hops), 1) - 1
    outer = trial.hops[number]
    inner = trial.hops[number + 1] if number + 1 < len(trial.hops) else None
    where = _where(outer)
    past = f" Past it, at {_where(inner)}, a stream opens." if inner is not None and inner in trial.open_hops else ""
    if outer.error:
        return fault(
            f"{where} cannot be reached: {outer.error}.{past}", "Correct --url, the proxy, or its certificate."
        )
    if outer.status is None:
        asked = _head(outer, trial.query)  # which is not held back, and tells what answers there
        return fault(
            f"{where}{_signs(asked)} sent nothing for {_OPEN_WITHIN:g} s, not even headers: the stream is held back "
            f"until more of it has come, or until it ends.{past}",
            _how_not_to_buffer(asked),
        )
    if outer.is_stream and (ended := outer.first("sse-end")):
        reason = _reason(ended.data)
        return fault(
            f"The app refused the stream now: sse-end {reason}.{past}",
            "docs/operate.md says what each reason means; the app's log says why.",
        )
    if outer.is_stream:
        return fault(
            f"{where} sent headers{_signs(outer)}, and no event for {_OPEN_WITHIN:g} s.{past}",
            _how_not_to_buffer(outer) if past else "Read the log of the app, and look at the lines above.",
        )
    said = " ".join(outer.body.split())[:300] if "text/plain" in outer.headers.get("content-type", "") else ""
    text = f"{where} answered {outer.status}{_signs(outer)}, and no stream.{f' It says: {said}' if said else ''}{past}"
    if "names no channel" in said or (outer.status == 403 and past):
        return fault(
            f"{text} The query was lost on the way.",
            "Let the proxy pass the URL on as it is, with its query (under nginx a proxy_pass without $args of its "
            "own).",
        )
    remedies = {
        301: "Use the address that it redirects to.", 302: "Use the address that it redirects to.",
        308: "Use the address that it redirects to.", 401: "Let the streams pass without the proxy's own password.",
        403: "Give this command the same SECRET_KEY (SSE_SECRET_KEY) as the server has.",
        404: "Let the proxy pass the streams' path to the app, or correct --url.",
        502: "Start the app, or correct its address in the proxy.",
        503: "Start the app, or correct its address in the proxy.",
        504: "Start the app, or correct its address in the proxy.",
    }  # fmt: skip
    return fault(text, remedies.get(outer.status, f"Read the logs of the proxy and the app. {_EXAMPLES}"))


def delay(setup: Setup) -> Result:
    """Events come through at once."""
    trial = _trial(setup)
    _send(setup, trial)
    late = [hop for hop in trial.open_hops if _is_late(trial, hop)]
    outer = trial.outer
    if not late:
        return ok(f"{_EVENTS} events came through after {_delays(trial, outer)}.")
    hop = late[-1]  # what is nearest to the app
    behind = [one for one in trial.open_hops if one not in late]
    text = f"Events are held back: {_delays(trial, hop)} at {_where(hop)}{_signs(hop)}"
    if behind:
        return fault(
            f"{text}, and {_delays(trial, behind[0])} at {_where(behind[0])}. What answers at {_where(hop)} holds "
            "them.",
            _how_not_to_buffer(hop),
        )
    if setup.direct or len(trial.hops) > 1:
        return fault(
            f"{text}, the app's own address. The app itself holds them.",
            "Remove middleware that compresses or collects answers (Flask-Compress), and look at the workers' load.",
        )
    return fault(
        f"{text}. A proxy on the way holds them, or the app itself: --direct with the app's own address tells which.",
        _how_not_to_buffer(hop),
    )


def _send(setup: Setup, trial: Trial) -> None:
    for number in range(_EVENTS):
        data = f"{number} {secrets.token_hex(4)}"
        trial.sent.append((time.monotonic(), data))
        log_id = setup.state.runtime.notify(trial.channel, [data], {})
        trial.logged = log_id is not None
        time.sleep(_EVERY)
    until = time.monotonic() + _COME_WITHIN
    for hop in trial.open_hops:
        hop.wait_for(lambda hop=hop: all(hop.of(data) for _, data in trial.sent),  # type: ignore[misc]
                     max(0.0, until - time.monotonic()))  # fmt: skip


def _times(trial: Trial, hop: Probe) -> list[float]:
    return [block.at - at for at, data in trial.sent if (block := hop.of(data))]


def _delays(trial: Trial, hop: Probe) -> str:
    times = _times(trial, hop)
    if not times:
        return f"none of {_EVENTS} within {_COME_WITHIN:g} s"
    shown = f"{statistics.median(times) * 1000:.0f} ms (the slowest {max(times) * 1000:.0f} ms)"
    return shown if len(times) == _EVENTS else f"{shown}, {_EVENTS - len(times)} of {_EVENTS} not at all"


def _is_late(trial: Trial, hop: Probe) -> bool:
    times = _times(trial, hop)
    if len(times) < _EVENTS or statistics.median(times) > _LATE:
        return True
    inner = [found for one in trial.open_hops if one is not hop and (found := _times(trial, one))]
    fastest = min(map(statistics.median, inner), default=0.0)
    return bool(inner) and statistics.median(times) > max(_RATHER_LATE, 4 * fastest)


def headers(setup: Setup) -> Iterator[Result]:
    """The answer is passed on as the app gave it."""
    outer = _trial(setup).outer
    found = outer.headers
    encoding = found.get("content-encoding", "identity")
    if encoding != "identity":
        yield warning(
            f"{_where(outer)} compresses the stream ({encoding}){_signs(outer)}, although the app says no-transform. "
            "What compresses may hold small events back.",
            f"Compress no text/event-stream. {_EXAMPLES}",
        )
    if (
        found.get("age", "0") != "0"
        or "HIT" in f"{found.get('x-cache', '')} {found.get('cf-cache-status', '')}".upper()
    ):
        yield fault(
            f"{_where(outer)} answers from a cache{_signs(outer)}: clients get an old stream, or that of somebody "
            "else.",
            "Let the cache pass the streams (Cache-Control: no-cache), whatever the query.",
        )
    if outer.http10:
        yield warning(
            f"{_where(outer)} answers with HTTP/1.0, which has no end by which clients built on fetch come back.",
            f"Let it talk HTTP/1.1, to browsers and to the app. {_EXAMPLES}",
        )
    if encoding == "identity" and not outer.http10:
        yield ok(f"The stream's headers came through{_signs(outer)}.")


def resume(setup: Setup) -> Result | None:
    """A client that comes back with Last-Event-ID gets what it has missed."""
    trial = _trial(setup)
    seen = trial.outer.of(trial.sent[0][1]) if trial.sent else None
    if not trial.logged or seen is None or not seen.id:
        return None
    missed = trial.sent[1][1]
    if _resumes(trial.outer.url, trial.query, missed, {"Last-Event-ID": seen.id}):
        return ok("A client that comes back with Last-Event-ID gets what it has missed.")
    query = f"{trial.query}&{urlencode({'last_event_id': seen.id})}"
    if _resumes(trial.outer.url, query, missed):
        return fault(
            f"{_where(trial.outer)} drops the header Last-Event-ID{_signs(trial.outer)}: clients that come back miss "
            "what was sent meanwhile.",
            "Let the proxy pass the header Last-Event-ID on to the app.",
        )
    return fault(
        "A client that comes back gets nothing of what it has missed, neither by the header Last-Event-ID nor by the "
        "query.",
        "Read the log of the app.",
    )


def _resumes(url: str, query: str, missed: str, headers: dict[str, str] | None = None) -> bool:
    again = Probe(url, query, headers)
    again.start()
    try:
        return again.wait_for(lambda: again.of(missed), _COME_WITHIN)
    finally:
        again.close()


def head(setup: Setup) -> Result | None:
    """A HEAD request is answered, and opens no stream."""
    trial = _trial(setup)
    asked = _head(trial.outer, trial.query)
    if asked.status == 200 and asked.ended_at is not None:
        return None
    why = asked.error or (f"status {asked.status}" if asked.status else f"no answer within {_COME_WITHIN:g} s")
    return warning(
        f"A HEAD request for a stream fails at {_where(trial.outer)}: {why}. Link checkers and monitors send such.",
        "Let the proxy pass HEAD on.",
    )


def _head(hop: Probe, query: str) -> Probe:
    asked = Probe(hop.url, query, method="HEAD")
    asked.start()
    asked.wait_for(lambda: asked.ended_at is not None, _COME_WITHIN)
    asked.close()
    return asked


def cuts(setup: Setup) -> Result:
    """A quiet stream stays open."""
    trial = _trial(setup)
    outer, heartbeat = trial.outer, setup.settings.heartbeat
    opened = outer.first("sse-open")
    if opened is None:
        raise NotLookedAt
    outer.wait_for(lambda: False, max(0.0, outer.last_byte_at + setup.seconds - time.monotonic()))
    if outer.ended_at is None:
        trial.close()
        beats = len([at for at in outer.heartbeats if at > opened.at]) + len(
            [block for block in outer.blocks if block.event == "sse-cursor"]
        )
        if setup.seconds > heartbeat + _COME_WITHIN and not beats:
            return fault(
                f"No heartbeat came through in {setup.seconds:g} s, and the app sends one after {heartbeat:g} s.",
                _how_not_to_buffer(outer),
            )
        longer = (
            "" if setup.seconds > heartbeat else f" That is less than SSE_HEARTBEAT ({heartbeat:g} s): watch longer."
        )
        return ok(f"A quiet stream stayed open for {setup.seconds:g} s. Heartbeats: {beats}.{longer}")
    trial.close()
    if ended := outer.first("sse-end"):
        return ok(f"The app itself ended the stream (sse-end {_reason(ended.data)}).")
    quiet, lasted = outer.ended_at - outer.last_byte_at, outer.ended_at - outer.started_at
    if quiet >= _RATHER_LATE:
        return fault(
            f"{_where(outer)} cut a stream that was quiet for {quiet:.1f} s{_signs(outer)}. The app sends a heartbeat "
            f"every {heartbeat:g} s.",
            f"Set the proxy's read timeout longer than SSE_HEARTBEAT, {heartbeat:g} s (under nginx: proxy_read_timeout "
            f"60s); or set SSE_HEARTBEAT to less than {quiet:.0f} s.",
        )
    return fault(
        f"{_where(outer)} cut a stream that was {lasted:.1f} s old{_signs(outer)}.",
        "Raise the proxy's limit for the whole of an answer. With the event log, clients come back and miss nothing.",
    )


def _trial(setup: Setup) -> Trial:
    """Return the trial stream. Raises `NotLookedAt` if there is none, or if it has not opened."""
    trial = setup.trial
    if not isinstance(trial, Trial) or not trial.outer.first("sse-open"):
        if isinstance(trial, Trial):
            trial.close()
        raise NotLookedAt
    return trial


def _where(hop: Probe) -> str:
    parts = urlsplit(hop.url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"


def _signs(hop: Probe) -> str:
    """Return the headers by which the hops name themselves, in parentheses."""
    found = [f"{name.title()}: {hop.headers[name][:80]}" for name in _TELLING if name in hop.headers]
    return f" ({'; '.join(found)})" if found else ""


def _how_not_to_buffer(hop: Probe) -> str:
    said = _signs(hop).lower()
    own = next(
        (remedy for name, remedy in _BUFFERING.items() if name in said), "Switch off its buffering for the streams."
    )
    return f"{own} {_EXAMPLES}"


def _reason(data: str) -> str:
    try:
        return str(json.loads(data)["reason"])[:40]
    except (ValueError, LookupError, TypeError):
        return "without a reason"


CHECKS: dict[str, Check] = {
    "proxy": opens,
    "proxy delay": delay,
    "proxy headers": headers,
    "proxy resume": resume,
    "proxy head": head,
    "proxy cuts": cuts,
}
