"""The demo's routes, against a real PostgreSQL: what is stored, what is sent, what is refused."""

from __future__ import annotations

import importlib
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from flask.testing import FlaskClient

from flask_pg_sse.testing import capture
from tests.support.postgres import connect, execute

HTMX = {"HX-Request": "true"}
HOSTILE = """<script>alert("x")</script>"""


@pytest.fixture
def demo(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The demo's module, imported afresh: its app reads the database's URL once."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.delitem(sys.modules, "demo.app", raising=False)
    module = importlib.import_module("demo.app")
    yield module
    module.app.extensions["pg_sse"].close()
    monkeypatch.delitem(sys.modules, "demo.app")


@pytest.fixture
def client(demo: Any) -> FlaskClient:
    client: FlaskClient = demo.app.test_client()
    return client


@pytest.fixture
def heard(database_url: str) -> Iterator[Callable[[], list[str]]]:
    """Listen to the demo's channel; each call returns the payloads that have come so far, in a fixed moment."""
    connection = connect(database_url)
    connection.cursor().execute("LISTEN orders")
    payloads: list[str] = []

    def take() -> list[str]:
        # The session's own notification comes after everything that was committed before.
        connection.cursor().execute("NOTIFY orders, 'so far'")
        while not payloads or payloads[-1] != "so far":
            connection.poll()
            payloads.extend(notification.payload for notification in connection.notifies)
            connection.notifies.clear()
        found = payloads[:-1]
        payloads.clear()
        return found

    yield take
    connection.close()


def place(client: FlaskClient, **fields: str) -> Any:
    return client.post("/orders", data={"dish": "Fish tacos", "quantity": "1", **fields}, headers=HTMX)


def move(client: FlaskClient, order_id: int, to: str) -> Any:
    return client.post(f"/orders/{order_id}/move", data={"to": to}, headers=HTMX)


def stored(database_url: str) -> list[tuple[Any, ...]]:
    return execute(database_url, "SELECT id, status FROM demo_order ORDER BY id")


def test_the_first_page_shows_sample_orders_and_needs_nothing_from_elsewhere(client: FlaskClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert [page.text.count(name) for name in ("Noor", "Ada", "Linus")] == [1, 1, 1]
    assert "//" not in page.text, "no address of another host"
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        answer = client.get(path)
        assert answer.status_code == 200
        answer.close()
    assert page.headers["Content-Security-Policy"].startswith("default-src 'self'")


def test_an_order_is_stored_and_sent(demo: Any, client: FlaskClient, database_url: str) -> None:
    with capture(demo.app) as events:
        answer = place(client, dish="Lemon tart", quantity="2", name="Grace", note="a candle")
    assert answer.status_code == 200
    rows = execute(database_url, "SELECT dish, quantity, customer, note, status FROM demo_order WHERE id = 4")
    assert rows == [("Lemon tart", 2, "Grace", "a candle", "new")]
    (event,) = events
    assert (event.channel, event.event) == ("orders", None)
    assert event.data.startswith(answer.text.rstrip()), "the answer is the card that everybody gets"
    assert 'id="order-4"' in event.data and 'hx-target="#log"' in event.data


def test_the_event_is_of_the_same_transaction(demo: Any, client: FlaskClient, heard: Any, database_url: str) -> None:
    place(client, name="Grace")
    (payload,) = heard()
    assert "Grace" in payload
    with demo.app.test_request_context(), pytest.raises(ZeroDivisionError), demo.orders.transaction() as connection:
        demo.announce(demo.orders.place(connection, "Lemon tart", 1, "Nobody", ""), connection)
        _ = 1 / 0
    assert heard() == []
    assert len(stored(database_url)) == 4


def test_an_order_goes_through_all_steps(demo: Any, client: FlaskClient) -> None:
    place(client)
    with capture(demo.app) as events:
        for step in ("cooking", "ready", "collected"):
            answer = move(client, 4, step)
            assert answer.status_code == 200
            assert f'hx-target="#{step}"' in answer.text
    versions = [int(re.findall(r'data-version="(\d+)"', event.data)[0]) for event in events]
    assert versions == [5, 6, 7]
    assert "<button" not in answer.text


@pytest.mark.parametrize(
    ("order_id", "to", "status", "why"),
    [
        (3, "ready", 409, "Order 3 is new now."),
        (3, "new", 400, "cannot go there"),
        (3, "eaten", 400, "cannot go there"),
        (1, "cooking", 409, "Order 1 is ready now."),
        (99, "cooking", 409, "There is no order 99."),
        (10**30, "cooking", 409, "There is no order"),
    ],
)
def test_an_illegal_move_is_refused_in_words(
    demo: Any, client: FlaskClient, database_url: str, order_id: int, to: str, status: int, why: str
) -> None:
    client.get("/")
    before = stored(database_url)
    with capture(demo.app) as events:
        answer = move(client, order_id, to)
    assert answer.status_code == status
    assert 'hx-target="#toast"' in answer.text and why in answer.text
    assert answer.headers.get("HX-Trigger") == ("stale" if status == 409 else None)
    assert (events, stored(database_url)) == ([], before)


def test_of_two_who_move_an_order_at_once_one_wins(demo: Any, client: FlaskClient) -> None:
    place(client)
    barrier = threading.Barrier(2)
    answers: list[int] = []

    def press() -> None:
        own = demo.app.test_client()
        barrier.wait(10)
        answers.append(move(own, 4, "cooking").status_code)

    with capture(demo.app) as events:
        people = [threading.Thread(target=press) for _ in range(2)]
        for person in people:
            person.start()
        for person in people:
            person.join(10)
    assert sorted(answers) == [200, 409]
    assert len(events) == 1


def test_hostile_text_is_inert_everywhere(demo: Any, client: FlaskClient) -> None:
    partial = "<hx-partial hx-target=body>"
    with capture(demo.app) as events:
        place(client, name=HOSTILE, note=partial)
    for html in (events[0].data, client.get("/").text, client.get("/board").text):
        assert HOSTILE not in html and partial not in html
        assert "&lt;script&gt;alert" in html
        assert "&lt;hx-partial" in html


def test_the_largest_order_fits_into_a_notification(client: FlaskClient, heard: Any) -> None:
    assert place(client, dish="Mushroom ramen", quantity="9", name='"' * 30, note='"' * 80).status_code == 200
    assert place(client, dish="Mushroom ramen", quantity="9", name="🧑" * 30, note="🧑" * 80).status_code == 200
    assert [len(payload.encode()) < 4000 for payload in heard()] == [True, True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"dish": "Unicorn"},
        {"quantity": "0"},
        {"quantity": "10"},
        {"name": "x" * 31},
        {"note": "x" * 81},
    ],
)
def test_wrong_input_is_refused_in_words(demo: Any, client: FlaskClient, wrong: dict[str, str]) -> None:
    with capture(demo.app) as events:
        answer = place(client, **wrong)
    assert answer.status_code == 400
    assert re.search(r"please|too long", answer.text, re.IGNORECASE)
    assert events == []


def test_control_characters_never_reach_the_database(client: FlaskClient, database_url: str) -> None:
    assert place(client, name=" A\x00d\ra\u202e ", note="\x00").status_code == 200
    assert execute(database_url, "SELECT customer, note FROM demo_order WHERE id = 4") == [("A d a", "")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 303),
        ({"Sec-Fetch-Site": "same-origin"}, 303),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost"}, 403),
        ({"Origin": "http://localhost"}, 303),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_only_the_demos_own_page_may_send_its_forms(client: FlaskClient, headers: dict[str, str], status: int) -> None:
    answer = client.post("/orders", data={"dish": "Fish tacos"}, headers=headers)
    assert answer.status_code == status, "303: a plain form, without htmx, is sent back to the page"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("demo.localhost", 200),
        ("127.0.0.1:8000", 200),
        ("192.168.1.20:8000", 200),
        ("[fe80::1]:8000", 200),
        (socket.gethostname(), 200),
        ("board.example", 200),
        ("elsewhere.example:8000", 400),
        ("localhost.elsewhere.example", 400),
        ("127.0.0.1.elsewhere.example", 400),
    ],
)
def test_a_name_that_was_made_to_lead_here_is_refused(
    demo: Any, client: FlaskClient, monkeypatch: pytest.MonkeyPatch, host: str, status: int
) -> None:
    monkeypatch.setattr(demo, "NAMES", {*demo.NAMES, "board.example"})
    for url in ("/", "/sse?channel=orders"):
        with client.get(url, headers={"Host": host}) as answer:
            assert answer.status_code == status, answer.get_data(as_text=True)


def test_the_table_stays_small(demo: Any, client: FlaskClient, database_url: str) -> None:
    while (answer := place(client)).status_code == 200:
        pass
    assert answer.status_code == 409
    assert "collect some first" in answer.text
    open_orders = execute(database_url, "SELECT id FROM demo_order WHERE status <> 'collected' ORDER BY id")
    assert len(open_orders) == demo.orders.MAX_OPEN
    execute(database_url, "UPDATE demo_order SET status = 'ready'")
    for (order_id,) in open_orders[:10]:
        move(client, order_id, "collected")
    kept = execute(database_url, "SELECT id FROM demo_order WHERE status = 'collected' ORDER BY id")
    assert kept == open_orders[10 - demo.orders.KEEP_COLLECTED : 10]
    newest_first = [f'id="order-{order_id}"' for (order_id,) in reversed(kept)]
    page = client.get("/board").text
    assert re.findall(r'id="order-\d+"', page.split('id="collected"')[1]) == newest_first


def test_workers_that_start_at_once_make_the_tables_once(demo: Any, database_url: str) -> None:
    barrier = threading.Barrier(8)
    failures: list[Exception] = []

    def start() -> None:
        barrier.wait(10)
        try:
            demo.orders.create_tables.__wrapped__(database_url)
        except psycopg2.Error as error:
            failures.append(error)

    workers = [threading.Thread(target=start) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert failures == []
    assert stored(database_url) == [(1, "ready"), (2, "cooking"), (3, "new")]


def test_a_database_that_is_away_is_said_so(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg2://nobody@127.0.0.1:1/nothing")
    answer = place(client)
    assert answer.status_code == 503
    assert "cannot reach its database" in answer.text


def test_without_htmx_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    htmx = importlib.import_module("demo.htmx")
    monkeypatch.setattr(htmx, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"\./demo/run"):
        htmx.find_htmx()
