"""`flask sse tail`, as a person uses it: in a terminal, in a pipe, and ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import IO, Any

import pytest

from tests.support.client import eventually, open_stream
from tests.support.postgres import execute
from tests.support.servers import ROOT, WebServer

Start = Callable[..., WebServer]


class Tail:
    """A running `flask sse tail`, whose lines are read as they come."""

    def __init__(self, url: str, *arguments: str, stdout: int = subprocess.PIPE) -> None:
        command = [sys.executable, "-m", "flask", "--app", "tests.support.apps.quiet", "sse", "tail", *arguments]
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": url}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,)) if self.process.stdout else None
        if self._reader is not None:
            self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self.lines.append(line)

    def wait_for(self, count: int) -> list[str]:
        eventually(lambda: len(self.lines) >= count or self.process.poll() is not None, 30)
        assert self.process.poll() is None, self.errors()
        return self.lines

    def stop(self) -> tuple[int, str]:
        """Press Ctrl-C; return the exit status and what was said."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20), self.errors()

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._reader is not None:
            self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def tail() -> Iterator[Callable[..., Tail]]:
    started: list[Tail] = []

    def start(url: str, *arguments: str, **options: Any) -> Tail:
        started.append(Tail(url, *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def send(url: str, channel: str, data: str, **fields: str) -> None:
    execute(url, "SELECT flask_pg_sse.notify(%s, %s, event => %s)", (channel, data, fields.get("event")))


def hears(running: Tail, url: str, channel: str, lines_each: int = 1) -> int:
    """Wait until a tail hears a channel; return how many lines it has shown by then."""

    def heard(text: str) -> bool:
        return any(line.endswith(f" {text}\n") for line in running.lines)

    eventually(lambda: execute(url, "SELECT pg_notify(%s, 'ready?')", (channel,)) and heard("ready?"), 30)
    execute(url, "SELECT pg_notify(%s, 'ready.')", (channel,))
    eventually(lambda: heard("ready.") and len(running.lines) % lines_each == 0)
    return len(running.lines)


def test_events_of_all_kinds_come_as_lines_and_ctrl_c_is_quiet(logged_url: str, tail: Callable[..., Tail]) -> None:
    running = tail(logged_url, "orders", "stock")
    before = hears(running, logged_url, "orders")
    send(logged_url, "orders", '{"id": 7}', event="created")
    execute(logged_url, "SELECT pg_notify('stock', 'raw')")
    send(logged_url, "others", "not this")
    send(logged_url, "stock", "two\nlines \x1b[31m", event="x")
    lines = running.wait_for(before + 3)[-3:]
    assert re.fullmatch(r'\d\d:\d\d:\d\d orders #\d+ created {"id": 7}\n', lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d stock - message raw\n", lines[1])
    assert re.fullmatch(r"\d\d:\d\d:\d\d stock #\d+ x two\\nlines \\x1b\[31m\n", lines[2])
    assert running.stop() == (130, "")


def test_since_begins_in_the_log_and_goes_on_without_a_gap(logged_url: str, tail: Callable[..., Tail]) -> None:
    for number in range(5):
        send(logged_url, "orders", str(number))
        send(logged_url, "others", "not this")
    running = tail(logged_url, "orders", "--since", "10m", "--json")
    events = [json.loads(line) for line in running.wait_for(5)]
    assert [event["data"] for event in events] == list("01234")
    assert events[0] == {
        "time": events[0]["time"],
        "channel": "orders",
        "log_id": events[0]["log_id"],
        "event": "message",
        "id": str(events[0]["log_id"]),
        "data": "0",
    }
    send(logged_url, "orders", "5")
    assert json.loads(running.wait_for(6)[5])["data"] == "5"
    assert running.stop()[0] == 130
    for since in (str(events[2]["log_id"]), str(events[2]["log_id"] + 1)):  # also an id that no event has
        again = tail(logged_url, "orders", "--since", since, "--json")
        assert [json.loads(line)["data"] for line in again.wait_for(3)] == ["3", "4", "5"]
        again.stop()


def test_an_event_of_the_log_has_the_time_at_which_it_was_sent(logged_url: str, tail: Callable[..., Tail]) -> None:
    execute(logged_url, "UPDATE flask_pg_sse.retention SET pruned_through = 0")  # as on a log that is days old
    query = """
        INSERT INTO flask_pg_sse.event (id, channel, fields, data, created_at)
        SELECT 4000000 * extract(epoch FROM t - timestamptz '2020-01-01 00:00Z'), 'orders', '{}', 'old', t
        FROM (SELECT clock_timestamp() - interval '2 days') AS ago (t)
        RETURNING extract(epoch FROM created_at)::float8
    """
    [(sent_at,)] = execute(logged_url, query)
    send(logged_url, "orders", "new")
    lines = tail(logged_url, "orders", "--since", "3d").wait_for(2)
    assert lines[0].startswith(time.strftime("%Y-%m-%d %H:%M:%S orders #", time.localtime(int(sent_at))))
    assert re.fullmatch(r"\d\d:\d\d:\d\d orders #\d+ message new\n", lines[1])
    told = json.loads(tail(logged_url, "orders", "--since", "3d", "--json").wait_for(1)[0])["time"]
    assert told.endswith("+00:00") and abs(datetime.fromisoformat(told).timestamp() - sent_at) < 0.01


@pytest.mark.slow
def test_no_event_is_missed_or_doubled_while_it_changes_over(logged_url: str, tail: Callable[..., Tail]) -> None:
    done = threading.Event()
    sent: list[int] = []

    def publish() -> None:
        while not done.is_set() or len(sent) < 50:
            send(logged_url, "orders", str(len(sent)))
            sent.append(len(sent))

    publisher = threading.Thread(target=publish)
    publisher.start()
    running = tail(logged_url, "orders", "--since", "1h", "--json")
    running.wait_for(50)
    done.set()
    publisher.join()
    lines = running.wait_for(len(sent))
    assert [json.loads(line)["data"] for line in lines] == [str(number) for number in sent]


@pytest.mark.slow
def test_the_streams_that_get_an_event_are_named(
    logged_url: str, start_server: Start, tail: Callable[..., Tail]
) -> None:
    server = start_server(logged_url, app="tests.support.apps.basic:app")
    with open_stream(server.port, "orders"), open_stream(server.port, "orders", "stock"):
        running = tail(logged_url, "orders", "stock", "--streams")
        before = hears(running, logged_url, "orders", 2)
        send(logged_url, "orders", "x")
        send(logged_url, "stock", "y")
        lines = running.wait_for(before + 4)[before:]
        assert lines[1] == "  → 2 streams here: address 127.0.0.1; address 127.0.0.1\n"
        assert lines[3] == "  → 1 stream here: address 127.0.0.1\n"


@pytest.mark.slow
def test_a_terminal_gets_colours(logged_url: str, tail: Callable[..., Tail]) -> None:
    leader, follower = pty.openpty()
    try:
        tail(logged_url, "orders", stdout=follower)
        seen = bytearray()

        def coloured() -> bool:
            send(logged_url, "orders", "x", event="created")
            if select.select([leader], [], [], 0.2)[0]:
                seen.extend(os.read(leader, 4096))
            return b"\x1b[33mcreated\x1b[0m" in seen

        eventually(coloured, 60)
    finally:
        os.close(leader)
        os.close(follower)


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_ends_it_quietly(logged_url: str, tail: Callable[..., Tail]) -> None:
    """As `| head -1`: also if nothing more comes."""
    reader, writer = os.pipe()
    piped = tail(logged_url, "orders", stdout=writer)
    os.close(writer)
    os.close(reader)
    assert piped.process.wait(60) == 141
    assert piped.errors() == ""


@pytest.mark.parametrize("setting", [{"SSE_LISTEN_URL": "poll"}, {"SSE_EVENT_LOG": "true"}])
def test_a_log_that_is_required_and_missing_is_named(database_url: str, setting: dict[str, str]) -> None:
    command = [sys.executable, "-m", "flask_pg_sse.cli.main", "tail", "orders"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": database_url, **setting}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Remedy: flask" in last, done.stderr
    assert last.startswith("Error: Nothing can be shown: The event log is required"), last


def test_since_names_the_setting_that_turns_the_log_off(logged_url: str) -> None:
    command = [sys.executable, "-m", "flask_pg_sse.cli.main", "tail", "orders", "--since", "1m"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": logged_url, "SSE_EVENT_LOG": "false"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "Error: --since needs the event log, which is not in use: set no SSE_EVENT_LOG.\n"


def test_what_cannot_be_is_one_line(database_url: str, tail: Callable[..., Tail]) -> None:
    for url, arguments, words in (
        ("postgresql://127.0.0.1:1/x", ["orders"], "Error: Nothing can be shown: "),
        (database_url, ["orders", "--since", "10m"], "Error: --since needs the event log"),
        (database_url, ["flask_pg_sse"], "Error: "),
    ):
        command = [sys.executable, "-m", "flask", "--app", "tests.support.apps.quiet", "sse", "tail", *arguments]
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": url}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(words)
