"""Clients that come and go at random, on random channels, while events never pause and connections are killed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from tests.support.client import eventually, open_stream
from tests.support.postgres import connect, execute
from tests.support.servers import WebServer

CHANNELS = [f"room-{number}" for number in range(8)]
SECONDS = 4.0
# How many events a client may be behind. Beyond that they come more slowly: PostgreSQL can send more than servers and
# clients on a busy machine can read, and a stream that begins then waits behind all that has not been read.
BEHIND = 5000


class Publisher(threading.Thread):
    """Sends numbered events, each to one channel or, in one transaction, to several; `sent` holds them in order."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__()
        self.sent: list[tuple[int, str]] = []
        self.clients: list[Client] = []
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
                if number - min(client.reached for client in self.clients) > BEHIND:
                    self.stop.wait(0.01)
        connection.close()


class Client(threading.Thread):
    """Opens streams, reads some events, and leaves.

    `rows` holds, for each stream and after each of its resets, the channels, how many events had been sent when the
    promise to miss nothing was there, and what came. `reached` is the number of the last event that came, or that had
    been sent when the last row began.
    """

    def __init__(self, port: int, publisher: Publisher, seed: int, stop: threading.Event, stays: bool) -> None:
        super().__init__()
        self.rows: list[tuple[list[str], int, list[int]]] = []
        self.reached = 0
        self._publisher = publisher
        self.resets = 0
        self.failure: Exception | None = None
        self._port = port
        self._chooser = random.Random(seed)
        self._stop_asked = stop
        self._stays = stays

    def run(self) -> None:
        try:
            while not self._stop_asked.is_set():
                self._one_stream()
        except Exception as error:
            self.failure = error

    def _one_stream(self) -> None:
        channels = self._chooser.sample(CHANNELS, self._chooser.choice([1, 1, 2, 3, 8]))
        with open_stream(self._port, *channels, timeout=20) as stream:
            row = self._new_row(channels)
            left = 10**9 if self._stays else self._chooser.choice([0, 1, 20, 300])
            while left and not self._stop_asked.is_set():
                left -= 1
                message = stream.event()
                if message.event == "sse-reset":
                    self.resets += 1
                    row = self._new_row(channels)
                else:
                    assert message.event == "message", message
                    self.reached = int(message.data or "")
                    row.append(self.reached)

    def _new_row(self, channels: list[str]) -> list[int]:
        row: list[int] = []
        self.reached = len(self._publisher.sent)
        self.rows.append((channels, self.reached, row))
        return row


def kill_listeners(url: str, publisher: Publisher, stop: threading.Event) -> None:
    """End the listeners' sessions, and again when some have only begun; then wait until all of them have come back.

    Listeners that are never given the time to come back, on a busy machine, would have nothing to tell.
    """
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'flask_pg_sse listener' "
        "AND clock_timestamp() - backend_start > %s * interval '1 second'"
    )
    if execute(url, kill, (1,)):
        stop.wait(random.uniform(0, 0.3))
        execute(url, kill, (0,))
        sent = len(publisher.sent)
        eventually(
            lambda: all(client.reached > sent or client.failure for client in publisher.clients),
            60,
            "the listeners are back",
        )


@pytest.mark.parametrize("killing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["calm", "killing"])
@pytest.mark.parametrize(
    "options",
    [("-w", "2"), pytest.param(("-k", "gthread", "--threads", "96"), marks=pytest.mark.slow)],
    ids=["gevent", "gthread"],
)
def test_every_stream_gets_all_and_only_its_events_in_order(
    database_url: str, start_server: Callable[..., WebServer], options: tuple[str, ...], killing: bool
) -> None:
    server = start_server(database_url, *options, FLASK_SSE_HEARTBEAT="0.5", FLASK_SSE_BUFFER_BYTES="10000000")
    publisher = Publisher(database_url, seed=1)
    stop = threading.Event()
    # One stays, whatever happens: it sees every reset.
    clients = [Client(server.port, publisher, seed, stop, stays=seed == 0) for seed in range(12)]
    publisher.clients = clients
    publisher.start()
    for client in clients:
        client.start()
    begun = time.monotonic()

    def enough() -> bool:
        assert time.monotonic() < begun + 120, "events and resets come"
        received = sum(len(row) for client in clients for _, _, row in list(client.rows))
        resets = clients[0].resets >= 3 * killing or clients[0].failure is not None
        return time.monotonic() > begun + SECONDS and received > 1000 and resets

    try:
        eventually(lambda: clients[0].rows or clients[0].failure, 60, "the one that stays is there")
        while not enough():
            if killing:
                kill_listeners(database_url, publisher, stop)
            stop.wait(0.1)
    finally:
        stop.set()
        for client in clients:
            client.join()
        publisher.stop.set()
        publisher.join()
    print(f"{len(publisher.sent)} events, {clients[0].resets} resets in {time.monotonic() - begun:.1f} s")

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
