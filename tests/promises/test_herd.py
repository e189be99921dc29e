"""A thousand clients that come back at once: few queries, and each gets exactly what it missed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from tests.promises.test_turns import stopped
from tests.support.crowd import Crowd, Reader, calls_after, flood, install, logged, publish
from tests.support.crowd import worker as worker_of
from tests.support.postgres import execute
from tests.support.servers import WebServer, need_open_files

Start = Callable[..., WebServer]
COUNT = 1000
OPTIONS = ("--worker-connections", "3000", "--backlog", "2048")


@pytest.fixture(autouse=True)
def enough_descriptors() -> None:
    need_open_files(4 * COUNT)


@pytest.mark.parametrize("worker", ["fresh", pytest.param("knows", marks=pytest.mark.slow)])
def test_a_thousand_that_return_to_one_channel(database_url: str, start_server: Start, worker: str) -> None:
    install(database_url)
    chooser = random.Random(1)
    flood(database_url, ["news", "other"], 100, 200)
    server = start_server(database_url, *OPTIONS, FLASK_SSE_HEARTBEAT="300")
    with Crowd(server.port) as crowd:
        if worker == "knows":
            [stays] = crowd.open(1, "news")
            flood(database_url, ["news", "other"], 100, 200)
            crowd.read_until(lambda: len(stays.events) == 100)
        log = logged(database_url, ["news"])
        ids = [chooser.choice(log[-60:])[0] for _ in range(COUNT)]
        missed = {log_id: [event for event in log if event[0] > log_id] for log_id in set(ids)}
        with stopped(worker_of(server)):
            added = _open(crowd, ids, "news")
        last = {id(reader): log_id for reader, log_id in zip(added, ids, strict=True)}
        crowd.read_until(lambda: all(len(r.events) >= len(missed[last[id(r)]]) for r in crowd.readers[-COUNT:]), 60)
        publish(database_url, ("news", "live"))
        crowd.read_until(lambda: all(r.events and r.events[-1][1] == "live" for r in crowd.readers), 60)
        live = logged(database_url, ["news"])[-1:]
        for reader in crowd.readers[-COUNT:]:
            assert reader.events == missed[last[id(reader)]] + live
            assert [name for name, _, _ in reader.control] == ["sse-open"]
    found = calls_after(database_url, server)
    print(worker, found)
    # The listener's first look, and one question for what came before; some who came before its answer ask as well.
    assert found.get("page_v1", 0) + found.get("tail_v1", 0) <= 5
    assert found["look_v1"] <= 10, "all ids that come at once are looked up together"


def _open(crowd: Crowd, ids: Sequence[int], *channels: str) -> list[Reader]:
    return [crowd.add(*channels, last_event_id=log_id) for log_id in ids]


@pytest.mark.slow
def test_a_thousand_that_return_to_channels_of_their_own(database_url: str, start_server: Start) -> None:
    """Each of which has to be asked for: in batches."""
    install(database_url)
    names = [f"user-{number}" for number in range(COUNT)]
    flood(database_url, names, 4, 100, batch=1)
    log: dict[str, list[int]] = {}
    for channel, log_id in execute(database_url, "SELECT channel, id FROM flask_pg_sse.event ORDER BY id"):
        log.setdefault(channel, []).append(log_id)
    server = start_server(database_url, *OPTIONS, FLASK_SSE_HEARTBEAT="300")
    with Crowd(server.port) as crowd:
        with stopped(worker_of(server)):
            for name in names:
                crowd.add(name, last_event_id=log[name][0])
        crowd.read_until(lambda: all(len(reader.events) >= 3 for reader in crowd.readers), 60)
        for reader in crowd.readers:
            assert reader.ids == log[reader.channels[0]][1:]
    found = calls_after(database_url, server)
    print(found)
    # Those that wait for the same LISTEN go on together, 200 of them to a question.
    assert found["page_v1"] <= 5
    assert found["tail_v1"] <= 40


@pytest.mark.slow
def test_a_crowd_of_all_kinds(database_url: str, start_server: Start) -> None:
    """Near the end and far from it, on one channel and on several, with ids of old and of none, while events come."""
    install(database_url)
    chooser = random.Random(2)
    names = [f"room-{number}" for number in range(10)]
    flood(database_url, names, 150, 500)
    log = {name: logged(database_url, [name]) for name in names}
    everything = sorted(log_id for events in log.values() for log_id, _ in events)
    server = start_server(database_url, *OPTIONS, FLASK_SSE_HEARTBEAT="300")
    with Crowd(server.port) as crowd:
        kinds: list[tuple[tuple[str, ...], int | None]] = []
        for _ in range(300):
            channels = tuple(chooser.sample(names, chooser.choice([1, 1, 2, 5])))
            known = chooser.choice([everything[-1 - chooser.randrange(50)], chooser.choice(everything), 0, None])
            kinds.append((channels, known))
        for channels, known in kinds[:150]:
            crowd.add(*channels, last_event_id=known)
        flood(database_url, names, 20, 500)
        for channels, known in kinds[150:]:
            crowd.add(*channels, last_event_id=known)
        crowd.read_until(lambda: all(reader.opened for reader in crowd.readers), 60)
        publish(database_url, *((name, "last") for name in names))
        final = {name: logged(database_url, [name]) for name in names}

        def complete() -> bool:
            return all(sum(data == "last" for _, data in r.events) == len(r.channels) for r in crowd.readers)

        crowd.read_until(complete, 60)
        for reader, (channels, known) in zip(crowd.readers, kinds, strict=True):
            after = reader.control[0][2]
            assert after is not None and (known is None or after == known)
            expected = sorted(event for name in channels for event in final[name] if event[0] > after)
            assert reader.events == expected
            assert [name for name, _, _ in reader.control] == ["sse-open"]
