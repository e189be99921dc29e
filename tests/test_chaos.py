"""Clients that come and go at random, on random channels, while events never pause and connections are killed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from tests.client import eventually, open_stream
from tests.conftest import connect, execute
from tests.servers import WebServer

CHANNELS = [f"room-{number}" for number in range(8)]
SECONDS = 4.0


class Publisher(threading.Thread):
    """Sends numbered events, each to one channel or, in one transaction, to several; `sent` holds them in order."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__()
        self.sent: list[tuple[int, str]] = []
        self.stop = threading.Event()
        self._url = url
        self._chooser = random.Random(seed)

    def run(self) -> None:
        connection = connect(self._url)
        number = 0
        with connection.cursor() as cursor:
            while not self.stop.is_set():
                many = self._chooser.choice([1, 1, 1, 5, 60])
                batch = [(number + n, self._chooser.choice(CHANNELS)) for n in range(many)]
                number += many
                self.sent += batch
                query = ",".join(cursor.mogrify("pg_notify(%s, %s)", (c, str(n))).decode() for n, c in batch)
                cursor.execute("SELECT " + query)
        connection.close()


class Client(threading.Thread):
    """Opens streams, reads some events, and leaves.

    `rows` holds, for each stream and after each of its resets, the channels, how many events had been sent when the
    promise to miss nothing was there, and what came.
    """

    def __init__(self, port: int, publisher: Publisher, seed: int, deadline: float) -> None:
        super().__init__()
        self.rows: list[tuple[list[str], int, list[int]]] = []
        self._publisher = publisher
        self.resets = 0
        self.failure: Exception | None = None
        self._port = port
        self._chooser = random.Random(seed)
        self._deadline = deadline

    def run(self) -> None:
        try:
            while time.monotonic() < self._deadline:
                self._one_stream()
        except Exception as error:
            self.failure = error

    def _one_stream(self) -> None:
        channels = self._chooser.sample(CHANNELS, self._chooser.choice([1, 1, 2, 3, 8]))
        with open_stream(self._port, *channels, timeout=20) as stream:
            row = self._new_row(channels)
            for _ in range(self._chooser.choice([0, 1, 20, 300])):
                message = stream.event()
                if message.event == "sse-reset":
                    self.resets += 1
                    row = self._new_row(channels)
                else:
                    assert message.event == "message", message
                    row.append(int(message.data or ""))

    def _new_row(self, channels: list[str]) -> list[int]:
        row: list[int] = []
        self.rows.append((channels, len(self._publisher.sent), row))
        return row


@pytest.mark.parametrize("killing", [False, True], ids=["calm", "killing"])
@pytest.mark.parametrize("options", [("-w", "2"), ("-k", "gthread", "--threads", "32")], ids=["gevent", "gthread"])
def test_every_stream_gets_all_and_only_its_events_in_order(
    database_url: str, start_server: Callable[..., WebServer], options: tuple[str, ...], killing: bool
) -> None:
    server = start_server(database_url, *options, FLASK_SSE_HEARTBEAT="0.5", FLASK_SSE_BUFFER_BYTES="10000000")
    publisher = Publisher(database_url, seed=1)
    deadline = time.monotonic() + SECONDS
    clients = [Client(server.port, publisher, seed, deadline) for seed in range(12)]
    publisher.start()
    for client in clients:
        client.start()
    if killing:
        kill = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'flask_pg_sse listener'"
        )
        while time.monotonic() < deadline:
            execute(database_url, kill)
            time.sleep(0.3)
    for client in clients:
        client.join()
    publisher.stop.set()
    publisher.join()

    received = 0
    for client in clients:
        assert client.failure is None, (client.failure, server.log()[-2000:])
        for channels, promised_from, row in client.rows:
            if row:
                expected = [n for n, channel in publisher.sent[promised_from : row[-1] + 1] if channel in channels]
                earlier = [number for number in row if number < promised_from]
                assert row == earlier + expected
                assert earlier == sorted(set(earlier)), "what came of the time before is in order, and once"
                received += len(row)
    resets = sum(client.resets for client in clients)
    assert received > 1000
    assert bool(resets) == killing
    assert "Traceback" not in server.log()
    eventually(lambda: '"streams":0' in server.get("/state").replace(" ", ""))
