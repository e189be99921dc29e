"""Events that are erased before their time: gone from the log and from the workers' memory, and no client notices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import psycopg2
import pytest
from flask import Flask

from flask_pg_sse import notify, schema_sql
from flask_pg_sse.engine.base import Erased, Tail
from flask_pg_sse.hub.subscription import Subscription
from flask_pg_sse.testing import Received, stream
from tests.support.log import NOTIFY
from tests.support.postgres import connect, execute
from tests.unit.test_subscription import make_hub

MakeApp = Callable[..., Flask]


@pytest.fixture
def app(logged_url: str, make_app: MakeApp) -> Iterator[Flask]:
    app = make_app(logged_url, SSE_CHANNELS=["*"], SSE_EVENT_LOG=True)
    with app.app_context():
        yield app


def erase(url: str, arguments: str) -> int:
    return int(execute(url, f"SELECT flask_pg_sse.erase({arguments})")[0][0])


def log_of(url: str) -> list[tuple[int, str, str, str | None]]:
    return execute(url, "SELECT id, channel, fields::text, data FROM flask_pg_sse.event ORDER BY id")


def until(events: Iterator[Received], data: str) -> list[str]:
    """Return the data of the events up to this one, and the names of the package's own events."""
    found: list[str] = []
    while data not in found:
        event = next(events)
        found.append(event.event if event.event.startswith("sse-") else event.data)
    return found


def test_the_row_and_its_id_stay_and_what_it_said_goes(app: Flask, logged_url: str) -> None:
    first = notify("orders", "secret", event="created", comment="secret")
    second = notify("other", "kept")
    assert erase(logged_url, "'orders'") == 1
    rows = log_of(logged_url)
    assert rows[:2] == [(first, "", "{}", None), (second, "other", "{}", "kept")]
    assert [channel for _, channel, *_ in rows[2:]] == ["flask_pg_sse"]  # for the workers' memory
    assert "secret" not in str(rows)
    assert execute(logged_url, "SELECT refusal FROM flask_pg_sse.look_v1(%s)", ([first],)) == [(None,)]
    assert erase(logged_url, "'orders'") == 0 and len(log_of(logged_url)) == 3


def test_by_ids_and_by_both(app: Flask, logged_url: str) -> None:
    ids = [notify(channel, str(number)) for number, channel in enumerate(["a", "b", "a", "b"])]
    assert erase(logged_url, f"ids => ARRAY[{ids[0]}, {ids[1]}]") == 2
    assert erase(logged_url, "'a', ARRAY(SELECT id FROM flask_pg_sse.event WHERE data IN ('2', '3'))") == 1
    assert [row[3] for row in log_of(logged_url) if row[1] == "b"] == ["3"]
    with pytest.raises(psycopg2.errors.InvalidParameterValue, match="Name a channel"):
        erase(logged_url, "")


def test_no_command_to_end_streams_is_erased(app: Flask, logged_url: str) -> None:
    execute(logged_url, "SELECT flask_pg_sse.publish_v1('flask_pg_sse', ARRAY['{}']::json[], ARRAY['command'])")
    assert (
        erase(logged_url, "'flask_pg_sse'") == erase(logged_url, "ids => ARRAY(SELECT id FROM flask_pg_sse.event)") == 0
    )


def test_a_worker_forgets_it_and_a_client_on_an_erased_id_resumes(app: Flask, logged_url: str) -> None:
    client = app.test_client()
    with stream(client, "/sse?channel=orders") as held:  # keeps the channel in the worker's memory
        before = next(held).id
        erased = [notify("orders", "secret"), notify("orders", "also secret")]
        notify("orders", "kept")
        assert until(held, "kept") == ["secret", "also secret", "kept"]
        with stream(client, f"/sse?channel=orders&last_event_id={before}") as again:
            assert until(again, "kept") == ["sse-open", "secret", "also secret", "kept"]
        execute(logged_url, "SELECT flask_pg_sse.erase(ids => %s)", (erased,))
        notify("orders", "the worker has heard it")
        assert until(held, "the worker has heard it") == ["the worker has heard it"]
        for position in (before, *erased):
            with stream(client, f"/sse?channel=orders&last_event_id={position}") as again:
                assert until(again, "the worker has heard it") == ["sse-open", "kept", "the worker has heard it"]


def test_a_ring_that_is_filled_meanwhile_does_not_bring_it_back() -> None:
    """The log was read before the events were erased, and the answer arrives after that."""
    hub = make_hub()
    subscription = Subscription(["orders"], 1000)
    hub.open(subscription)
    subscription.lineage = hub.lineage
    hub.deliver((), 200)
    hub.follow(["orders"])
    ((channel, upto),) = hub.unremembered(["orders"]).items()
    hub.control(Erased(100, None))
    hub.remember(Tail(channel, 0, [("orders", b"data: secret\n\n", 100)]), upto)
    subscription.sent = 50
    assert not hub.join(subscription, ahead=True)
    hub.deliver([("orders", b"data: new\n\n", 204)], 204)
    subscription.sent = 204
    assert hub.join(subscription, ahead=True)


@pytest.mark.parametrize(
    ("erased", "drops"),
    [(Erased(100, "orders"), True), (Erased(500, None), True), (Erased(96, None), False), (Erased(500, "x"), False)],
)
def test_what_waits_for_a_slow_client_is_read_from_the_log_instead(erased: Erased, drops: bool) -> None:
    hub = make_hub()
    subscription = Subscription(["orders"], 1000)
    hub.open(subscription)
    hub.deliver((), 96)
    hub.go_live(subscription)
    hub.deliver([("orders", b"data: secret\n\n", 100)], 100)
    hub.control(erased)
    assert subscription.live is not drops
    assert (subscription.take() == b"") is drops
    assert subscription.sent == (96 if drops else 100)


def test_publishers_and_readers_go_on(app: Flask, logged_url: str) -> None:
    """An erasure that is not committed yet delays nobody, and misses nothing that it has seen."""
    notify("orders", "secret")
    connection = connect(logged_url)
    connection.autocommit = False
    with connection.cursor() as cursor:
        cursor.execute("SELECT flask_pg_sse.erase('orders')")
        thread = threading.Thread(target=execute, args=(logged_url, NOTIFY, ("orders", "new")))
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    connection.commit()
    connection.close()
    assert [row[3] for row in log_of(logged_url) if row[1] == "orders"] == ["new"]


def test_who_may_erase(logged_url: str) -> None:
    execute(logged_url, "CREATE ROLE eraser LOGIN; CREATE ROLE stranger LOGIN")
    try:
        execute(logged_url, schema_sql(["eraser"]))
        execute(logged_url, NOTIFY, ("orders", "secret"))
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            erase(logged_url.replace("postgres@", "stranger@"), "'orders'")
        assert erase(logged_url.replace("postgres@", "eraser@"), "'orders'") == 1
    finally:
        for role in ("eraser", "stranger"):
            execute(logged_url, f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_the_command(app: Flask, logged_url: str) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = app.test_cli_runner().invoke(args=["sse", "erase", *arguments])
        return result.exit_code, result.output

    for number in range(3):
        notify("orders", {"user": str(number)})
    notify("it's", "100 %")
    code, said = run("orders", "--where", "data::json ->> 'user' = '1' -- not the others")
    assert code == 0 and said.startswith("Erased 1 event (") and "VACUUM flask_pg_sse.event" in said
    assert [row[3] for row in log_of(logged_url) if row[1] == "orders"] == ['{"user": "0"}', '{"user": "2"}']
    assert run("--where", "data LIKE '%00 %'")[1].startswith("Erased 1 event (")
    assert run("it's")[1].startswith("Erased 0 events (")
    assert run("orders")[1].startswith("Erased 2 events (")
    assert run()[0] == 2
    code, said = run("--where", "nonsense")
    assert code == 1 and said.startswith("Error: Nothing was erased (") and said.count("\n") == 1
