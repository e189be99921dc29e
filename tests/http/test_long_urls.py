"""URLs with many or long names: what a web server would refuse is compressed into the token, or is an error."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import pytest
from flask import Flask

from flask_pg_sse import sse_url
from flask_pg_sse.testing import stream
from tests.support.client import request
from tests.support.postgres import execute
from tests.support.servers import WebServer

MakeApp = Callable[..., Flask]
NAMES = [f"order-{uuid.uuid5(uuid.NAMESPACE_DNS, str(number))}" for number in range(100)]


@pytest.fixture
def app(database_url: str, make_app: MakeApp) -> Flask:
    return make_app(database_url, SSE_CHANNELS=[], SECRET_KEY="secret")


def url_of(app: Flask, names: list[str], **options: object) -> str:
    with app.test_request_context():
        return sse_url(names, **options)  # type: ignore[arg-type]


def test_a_hundred_names_with_uuids_are_one_stream_of_gunicorn(
    logged_url: str, app: Flask, start_server: Callable[..., WebServer]
) -> None:
    server = start_server(logged_url, FLASK_SSE_CHANNELS="[]", FLASK_SECRET_KEY="secret")
    url = url_of(app, NAMES, expires=600, subject="ann", cursor=0)
    assert 2000 < len(url) <= 4000
    with request(server.port, url) as response:
        assert (response.status, response.next().event) == (200, "sse-open")
        for name in (NAMES[0], NAMES[-1]):
            execute(logged_url, "SELECT pg_notify(%s, 'x')", (name,))
            assert response.next().data == "x"


def test_names_are_in_clear_up_to_two_thousand_bytes(app: Flask) -> None:
    for count in range(1, 60):
        url = url_of(app, NAMES[:count], sign=True)
        in_clear = f"channel={NAMES[0]}" in url
        assert in_clear or len(f"{url}&channel=") + sum(len(f"&channel={name}") for name in NAMES[:count]) > 2000
        assert len(url) <= 2000 or not in_clear
    assert not in_clear
    events = stream(app.test_client(), url)
    assert next(events).event == "sse-open"
    events.close()


def test_what_is_still_too_long_is_an_error_with_the_remedy(app: Flask) -> None:
    with pytest.raises(ValueError, match=r"100 channels, whose URL has \d+ bytes, .* more than 4000\. Sign it"):
        url_of(app, NAMES)
    longer = [f"{uuid.uuid4()}{uuid.uuid4()}{uuid.uuid4()}" for _ in range(100)]
    with pytest.raises(ValueError, match=r"more than 4000\. Use fewer or shorter names"):
        url_of(app, longer, sign=True)
    unsigned = url_of(app, NAMES[:75])
    assert 3000 < len(unsigned) <= 4000 and "token=" not in unsigned


def test_a_token_alone_is_refused_as_any_other(app: Flask, make_app: MakeApp) -> None:
    client = app.test_client()
    url = url_of(app, NAMES, expires=600)
    assert "channel=" not in url
    for wrong in (url[:-1], url_of(make_app(SECRET_KEY="another"), NAMES, sign=True), "/sse?token=x"):
        response = client.get(wrong)
        assert response.status_code == 403 and "The URL's token, which has the channels, is not" in response.text
    url = url_of(app, NAMES[:99], expires=600)
    assert "channel=" not in url
    assert client.get(url + "&channel=other").status_code == 403  # it opens exactly its channels
    url = url_of(app, NAMES, expires=0.01)
    time.sleep(0.02)
    events = stream(client, url)
    assert (ended := next(events)).event == "sse-end" and ended.json == {"reason": "expired"}


def test_a_token_with_more_channels_than_a_stream_may_have(app: Flask, make_app: MakeApp) -> None:
    url = url_of(app, NAMES, sign=True)
    response = make_app(SSE_MAX_CHANNELS=99, SECRET_KEY="secret").test_client().get(url)
    assert response.status_code == 400 and "100 channels, and one stream has at most 99" in response.text
