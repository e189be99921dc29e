"""Events that a failover or a restore has undone. Clients that got them are told; no other client gets them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import pytest
from flask import Flask

from flask_pg_sse import notify
from flask_pg_sse.testing import stream
from tests.promises.test_turns import stopped
from tests.support.client import eventually
from tests.support.cluster import Cluster, promote
from tests.support.crowd import Crowd, Reader, calls_after, install, logged, publish
from tests.support.crowd import worker as worker_of
from tests.support.log import run
from tests.support.postgres import connect, execute
from tests.support.servers import WebServer, need_open_files

MakeApp = Callable[..., Flask]
Start = Callable[..., WebServer]


def send(channel: str, data: str) -> int:
    log_id = notify(channel, data)
    assert log_id is not None
    return log_id


def lose(url: str, after: int, then: str = "") -> None:
    """Put an older state of the log back in place, as TRUNCATE and the rows of a backup do.

    `then`: with an event on channel b already, before anybody can look.
    """
    with closing(connect(url)) as connection:
        run(connection, "BEGIN")
        run(connection, "CREATE TEMP TABLE backup AS SELECT * FROM flask_pg_sse.event WHERE id <= %s", (after,))
        run(connection, "TRUNCATE flask_pg_sse.event")
        run(connection, "INSERT INTO flask_pg_sse.event SELECT * FROM backup")
        if then:
            run(connection, "SELECT flask_pg_sse.notify('b', %s)", (then,))
        run(connection, "COMMIT")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "lost events that were sent" in record.getMessage()]


@pytest.mark.slow
@pytest.mark.parametrize("newer", ["events follow", "none follow"])
def test_a_restore_in_place(logged_url: str, make_app: MakeApp, caplog: pytest.LogCaptureFixture, newer: str) -> None:
    """The listener's connection stays, so the next beat finds out, even if the head of the log is a newer event."""
    app = make_app(logged_url, SSE_HEARTBEAT=0.5)
    with app.app_context():
        events = stream(app.test_client(), "/sse?channel=a", timeout=30)
        assert next(events).event == "sse-open"
        kept = [send("a", f"kept {number}") for number in range(3)]
        lost = [send("a", f"lost {number}") for number in range(3)]
        assert [next(events).id for _ in range(6)] == list(map(str, kept + lost))
        hub = app.extensions["pg_sse"].runtime.worker.streams[0]
        engine = app.extensions["pg_sse"].runtime.worker.engine
        eventually(lambda: engine._listener._receiver.confirmed >= lost[-1], 10, "a beat has come back")
        lose(logged_url, kept[-1], "on another channel" if newer == "events follow" else "")
        new = [log_id for log_id, _ in logged(logged_url, ["b"])]
        assert len(new) == (newer == "events follow")
        while (reset := next(events)).event == "sse-cursor":
            pass
        head = (new or kept)[-1]
        assert (reset.event, reset.json, reset.id) == ("sse-reset", {"reason": "undone"}, str(head))
        eventually(lambda: hub.position == head)
        [said] = told(caplog)
        assert f"after {kept[-1]} and up to {lost[-1]}" in said, said
        live = send("a", "live")
        assert (next(events).id, hub.position) == (str(live), live)
        events.close()


def test_clients_that_come_back(logged_url: str, make_app: MakeApp) -> None:
    """Each by its own id: what it lost is told, and what it has not seen comes from the log that there is."""
    app = make_app(logged_url)
    with app.app_context():
        kept = [send("a", f"kept {number}") for number in range(3)]
        lost = [send("a", f"lost {number}") for number in range(3)]
        lose(logged_url, kept[-1])
        after = send("a", "after")
        for log_id in lost:
            with closing(stream(app.test_client(), f"/sse?channel=a&last_event_id={log_id}", timeout=30)) as events:
                assert next(events).id == str(log_id)
                reset = next(events)
                assert (reset.event, reset.json, reset.id) == ("sse-reset", {"reason": "undone"}, str(after))
        for number, log_id in enumerate(kept):
            with closing(stream(app.test_client(), f"/sse?channel=a&last_event_id={log_id}", timeout=30)) as events:
                assert next(events).id == str(log_id)
                assert [next(events).id for _ in kept[number + 1 :]] == list(map(str, kept[number + 1 :]))
                assert next(events).id == str(after)


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_a_replica_that_lagged_is_promoted(cluster: Cluster, start_server: Start, worker: str) -> None:
    """Publishers run meanwhile. Streams that stay, that come back with ids of each kind, and that come new."""
    need_open_files(2000)
    install(cluster.primary.url())
    standby = cluster.standby()
    options = ("-k", worker, *(["--threads", "300"] if worker == "gthread" else []))
    server = start_server(cluster.url, *options, FLASK_SSE_HEARTBEAT="0.5", FLASK_SSE_RETRY="100")
    with Crowd(server.port) as crowd:
        staying = crowd.open(30, "a", "b")
        for number in range(20):
            publish(cluster.primary.url(), ("ab"[number % 2], f"seen {number}"))
        common = logged(cluster.primary.url(), ["a", "b"])
        eventually(lambda: len(logged(standby.url(), ["a", "b"])) == 20, 30)
        standby.line.silence()
        for number in range(20):
            publish(cluster.primary.url(), ("ab"[number % 2], f"undone {number}"))
        everything = logged(cluster.primary.url(), ["a", "b"])
        crowd.read_until(lambda: all(len(reader.events) == 40 for reader in staying), 30)
        assert all(reader.events == everything for reader in staying)

        promote(standby)
        cluster.lead_to(standby)
        for number in range(10):
            publish(standby.url(), ("ab"[number % 2], f"new {number}"))
        eventually(lambda: any("lost events that were sent" in line for line in server.log().splitlines()), 30)
        now = logged(standby.url(), ["a", "b"])
        assert len(now) == 30 and now[:20] == common and now[20][0] > everything[-1][0]

        ids = [log_id for log_id, _ in everything]
        again = {log_id: crowd.add("a", "b", last_event_id=log_id) for log_id in ids}
        crowd.read_until(lambda: all(len(reader.control) + len(reader.events) > 1 for reader in again.values()), 60)
        publish(standby.url(), ("a", "last a"), ("b", "last b"))
        final = logged(standby.url(), ["a", "b"])

        def complete() -> bool:
            everybody = [*staying, *again.values()]
            return all(sum(data.startswith("last") for _, data in reader.events) == 2 for reader in everybody)

        crowd.read_until(complete, 60)
        for reader in staying:
            [reset] = resets(reader)
            assert reader.events[:40] == everything
            assert reader.events[40:] == [event for event in final if event[0] > reset]
        for log_id, reader in again.items():
            if log_id > common[-1][0]:
                [reset] = resets(reader)
                assert reader.control[0][0] == "sse-open"
                assert reader.events == [event for event in final if event[0] > reset]
            else:
                assert resets(reader) == []
                assert reader.events == [event for event in final if event[0] > log_id]
        [said] = [line for line in server.log().splitlines() if "lost events that were sent" in line]
        assert f"after {common[-1][0]} and up to {ids[-1]}" in said, said


def resets(reader: Reader) -> list[int]:
    """Return the ids that its resets told it to go on from."""
    found = [(data, log_id) for name, data, log_id in reader.control if name == "sse-reset"]
    assert all(data == {"reason": "undone"} for data, _ in found), found
    return [log_id for _, log_id in found if log_id is not None]


@pytest.mark.slow
def test_a_thousand_that_come_back_with_lost_ids(database_url: str, start_server: Start) -> None:
    """One query answers for all that come at once."""
    need_open_files(4000)
    install(database_url)
    publish(database_url, *(("news", f"kept {number}") for number in range(10)))
    kept = logged(database_url, ["news"])[-1][0]
    publish(database_url, *(("news", f"lost {number}") for number in range(1000)))
    lost = [log_id for log_id, data in logged(database_url, ["news"]) if data.startswith("lost")]
    execute(database_url, "DELETE FROM flask_pg_sse.event WHERE id > %s", (kept,))
    server = start_server(database_url, "--worker-connections", "3000", "--backlog", "2048")
    with Crowd(server.port) as crowd:
        with stopped(worker_of(server)):
            readers = [crowd.add("news", last_event_id=log_id) for log_id in lost]
        crowd.read_until(lambda: all(len(reader.control) >= 2 for reader in readers), 60)
        publish(database_url, ("news", "live"))
        crowd.read_until(lambda: all(reader.events for reader in readers), 60)
        for reader in readers:
            assert resets(reader) == [kept] and [data for _, data in reader.events] == ["live"]
    found = calls_after(database_url, server)
    print(found)
    assert found["look_v1"] + found["page_v1"] + found["tail_v1"] <= 12
