"""The benchmarks run, print their reports, and count right; these tests do not judge the figures."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import breadth, delivery, fanout, fits, machine, others, publishing, rest, rig
from benchmarks.crowd import Crowd, Heard, data_of
from benchmarks.publisher import Publisher
from benchmarks.servers import VARIANTS
from tests.support.documents import Document

ROOT = Path(__file__).resolve().parents[2]
PAGE = Document("docs/performance.md")
TIMES = "\N{MULTIPLICATION SIGN}"
TINY = ["--clients", "4,8,12", "--crowd", "4", "--channels", "2,4,6", "--rounds", "1", "--seconds", "0.1"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
    for row in rows:
        assert not {"nan", "inf"}.intersection(row), row
    return rows


@pytest.mark.slow
def test_publishing_prints_its_tables() -> None:
    tiny = ["--quick", "--clients", "1", "--sizes", "100", "--rounds", "1", "--seconds", "0.01", "--events", "1000"]
    done = run("benchmarks.publishing", *tiny, "--fsync", "off")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = rows_of(done.stdout)
    for _, title, _ in [*publishing.SINGLE, *publishing.TRANSACTIONS, *publishing.BULK]:
        assert [row for row in rows if title in row], title
    assert re.search(r"^Pruned [1-9][\d,]* events in .* batches", done.stdout, re.MULTILINE)
    assert "fsync off" in done.stdout


@pytest.mark.slow
def test_coming_back_prints_its_tables() -> None:
    done = run("benchmarks.resuming", "--events", "8000", "--clients", "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.findall(r"^### A log of (.*) events$", done.stdout, re.MULTILINE) == ["8,000"]
    rows = rows_of(done.stdout)
    assert len([row for row in rows if row[0].startswith("3 to ")]) == 4
    names = {row[0].partition(",")[0] for row in rows}
    shown = PAGE.text.partition("<!-- resuming: begin -->")[2].partition("<!-- resuming: end -->")[0]
    assert {
        row[0].partition(",")[0] for row in rows_of(shown) if "come" not in row[0] and " to " not in row[0]
    } <= names


# -- the fan-out


def test_a_worker_says_that_it_is_ready_in_one_write() -> None:
    """The workers share a pipe. With PYTHONUNBUFFERED, print() writes the end of the line by itself."""
    reader, writer = os.pipe2(os.O_DIRECT)  # each read returns what one write has written
    try:
        hook = "from benchmarks.gunicorn_conf import post_worker_init; post_worker_init(None)"
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        subprocess.run([sys.executable, "-c", hook], stdout=writer, env=environ, check=True)
        assert os.read(reader, 100) == b"ready\n"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.slow
def test_fanout_prints_its_report_into_a_document_and_draws_a_plot(tmp_path: Path) -> None:
    page, figure = tmp_path / "page.md", tmp_path / "plot.svg"
    page.write_text("Before.\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nAfter.\n")
    places = ["--into", str(page), "--plot", str(figure)]
    sizes = ["--clients", "4,8,12,9999999", "--workers", "1,3", "--doublings", "1"]
    done = run("benchmarks.fanout", *TINY, *sizes, *places)
    assert done.returncode == 0, done.stderr
    report = done.stdout
    assert "Left out: 9,999,999 clients." in report
    rows = rows_of(report)
    for size in ("4", "8", "12"):
        assert [row[2] for row in rows if row[0] == size and len(row) == 8] == [one.title for one in VARIANTS]
    for size in ("2", "4", "6"):
        assert [row[1] for row in rows if row[0] == size and len(row) == 7] == [one.title for one in VARIANTS]
    assert [row[0] for row in rows if len(row) == 10][1:] == [one.title for one in VARIANTS]
    for said in (
        "An event to n clients costs this package", "An event on one of n channels costs the floor",
        "An event to 4 clients costs w workers together", "With w workers that listen, an event costs PostgreSQL",
        "n streams take", "Half of n clients have an event of this package after",
    ):  # fmt: skip
        assert re.search(rf"^- {said} .+\.$", report, re.MULTILINE), said
    assert re.search(r"^[1-9][\d,]+ deliveries were checked: none was lost", report, re.MULTILINE)
    for said in ("clients, 1 of 9", "channels, 9 of 9", "workers, 2 of 2", "at rest, 6 of 6", "other requests, 3 of 3"):
        assert f"{said}: " in done.stderr
    assert page.read_text() == f"Before.\n<!-- measured: begin -->\n\n{report}\n<!-- measured: end -->\nAfter.\n"
    assert ElementTree.parse(figure).getroot().tag.endswith("svg")


@pytest.mark.slow
def test_a_lost_event_is_said_and_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    send = Publisher._send

    def forget_the_third(self: Publisher, channel: int, data: list[str]) -> None:
        if '"n": 3,' not in data[0] or self._prefix != "package_":
            send(self, channel, data)

    monkeypatch.setattr(Publisher, "_send", forget_the_third)
    monkeypatch.setattr("benchmarks.listeners.QUIET", 0.5)
    cores = machine.cores()
    status = fanout.main([*TINY, "--clients", "3", "--only", "clients", "--plot", str(tmp_path / "plot.svg")])
    out, err = capsys.readouterr()
    assert status == 1
    assert "3 clients, this package: 3 lost" in out and "none was lost" not in out
    assert "!! 3 clients, this package: 3 lost" in err
    assert machine.cores() == cores
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in machine.children(os.getpid())]
    assert not [command for command in commands if b"gunicorn" in command or b"benchmarks" in command]


def test_a_document_without_a_place_and_a_section_that_is_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--into", "README.md"], "measured: end"), (["--only", "latency"], "there are clients, ")):
        with pytest.raises(SystemExit):
            fanout.main(arguments)
        assert said in capsys.readouterr().err


def test_another_system_than_linux_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "measures_cpu", lambda: False)
    assert fanout.main([]) == 2
    assert "needs Linux" in capsys.readouterr().err


# -- the load generator


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def block(number: int, log_id: int | None = None) -> bytes:
    head = f"id: {log_id}\n" if log_id is not None else ""
    return f"{head}data: {data_of(number, time.monotonic_ns(), 20)}\n\n".encode()


def chunks(*numbers: int) -> list[bytes]:
    return [chunk(block(number)) for number in numbers]


BEGIN = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(
    b"retry: 3000\nevent: sse-open\nid: 1\ndata: {}\n\n"
)


@contextlib.contextmanager
def fake_server(script: Sequence[bytes], begin: bytes = BEGIN) -> Iterator[tuple[int, threading.Event]]:
    """Begin one stream and, when told, send pieces of bytes on it, and then close it."""
    go = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                client.recv(4096)
                client.sendall(begin)
                go.wait(10)
                for piece in script:
                    client.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1], go
        finally:
            go.set()
            thread.join()


def heard_of(script: Sequence[bytes], published: int) -> Heard:
    """Let the load generator hear what a server sends that says it has sent so many events."""
    crowd = Crowd(20)
    with fake_server(script) as (port, go):
        crowd.connect(port, "/?channel={channel}", 0, 1, 1)
        crowd.expect()
        go.set()
        deadline = time.monotonic() + 10
        while not crowd.heard.ended and time.monotonic() < deadline:
            crowd.read(0.1)
    crowd.close()
    return crowd.finish([published])


WHOLE = b"".join(chunk(block(number, log_id=number + 7)) for number in range(4))
LONG = b"".join(block(number) for number in range(4))


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        pytest.param(chunks(0, 1, 2, 3), "", id="all"),
        pytest.param([WHOLE], "", id="all at once, with ids"),
        pytest.param([WHOLE[at : at + 1] for at in range(len(WHOLE))], "", id="byte by byte"),
        pytest.param([chunk(LONG[:75]), chunk(LONG[75:76]), chunk(LONG[76:])], "", id="events across chunks"),
        pytest.param([*chunks(0, 1), chunk(b": heartbeat\n"), *chunks(2, 3)], "", id="a heartbeat"),
        pytest.param([chunk(b": heartbeat\n" * 2 + LONG), chunk(b": heartbeat\n")], "", id="heartbeats and events"),
        pytest.param([*chunks(0, 1), chunk(b": ping\n\n"), *chunks(2, 3)], "", id="another server's heartbeat"),
        pytest.param(chunks(0, 1, 3), "1 lost", id="one lost"),
        pytest.param(chunks(0, 1), "2 lost", id="the last ones lost"),
        pytest.param(chunks(0, 1, 1, 2, 3, 0), "2 repeated", id="repeated"),
        pytest.param(chunks(0, 2, 1, 3), "1 out of order", id="swapped"),
        pytest.param(chunks(3, 0, 2), "1 lost, 2 out of order", id="lost and swapped"),
        pytest.param([*chunks(0), chunk(block(1)[:30] + b"\n\n"), *chunks(2, 3)], "1 lost, 1 torn", id="torn"),
        pytest.param([*chunks(0), chunk(block(1)[:30] + block(2)), *chunks(3)], "2 lost, 1 torn", id="torn, joined"),
        pytest.param([*chunks(0), chunk(block(1)[:-5] + b'"}\n\n'), *chunks(2, 3)], "1 lost, 1 torn", id="too short"),
        pytest.param([*chunks(0, 1), b"4\r\nno more than this"], "2 lost, 1 torn", id="a chunk of another length"),
        pytest.param([b"Internal Server Error\r\n"], "4 lost, 1 torn", id="no chunk at all"),
    ],
)  # fmt: skip
def test_the_load_generator_counts_right(script: Sequence[bytes], wrong: str) -> None:
    heard = heard_of(script, 4)
    assert heard.ended == 1  # the fake server closes every stream when it is through
    assert rig.faults(heard) == f"{wrong}, 1 of the streams ended".removeprefix(", ")
    assert heard.deliveries == 4 - heard.missing
    assert sum(heard.brought) >= heard.deliveries and all(one > 0 for one in heard.latencies)
    assert heard.cpu > 0


def test_a_stream_that_is_refused_is_no_stream() -> None:
    with fake_server([], begin=b"HTTP/1.1 403 FORBIDDEN\r\n\r\nno") as (port, go):
        crowd = Crowd(20)
        go.set()
        with pytest.raises(ConnectionError, match=r"did not begin a stream, it said: HTTP/1[.]1 403"):
            crowd.connect(port, "/?channel={channel}", 0, 1, 1)
        crowd.close()


def test_percentiles_count_what_a_read_has_brought() -> None:
    assert rig.percentiles([3.0, 1.0, 2.0], [1, 98, 1]) == (1.0, 2.0)
    assert rig.percentiles([5.0]) == (5.0, 5.0)


# -- lines, plot, page


def test_a_line_is_claimed_only_where_one_is() -> None:
    def said(*points: tuple[float, float]) -> str:
        return fits.sentence("n dishes cost", points, "n", "dishes", "µs")

    straight = said((100, 1000), (1000, 6400), (5000, 30400))
    assert straight == f"n dishes cost 400 µs + n {TIMES} 6.00 µs (largest deviation 0 %)."
    assert said((1, 98), (10, 101), (100, 103)).startswith("n dishes cost 101 µs, whatever the number of dishes")
    assert "no straight line fits" in said((1, 100), (10, 10000), (100, 100))
    assert "it does not grow" in said((1, 100), (10, 80), (100, 20))
    assert "too little" in said((1, 100), (10, 80))
    assert f"cost n {TIMES} 9.12 µs" in said((10, 80), (100, 1000), (1000, 10000))


def test_the_plot_is_the_same_for_the_same_figures(tmp_path: Path) -> None:
    from benchmarks import plot  # which takes half a second to import, in each process that collects this file

    def measured(cpu: float) -> list[rig.Measured]:
        return [rig.Measured(1, 1, 1.0, cpu, 0.0, 0.5, 4.0, 9.0, 0.0, 1.0)]

    curves = {one.name: [(100, measured(9e-6)), (1000, measured(6e-6))] for one in VARIANTS}
    for name in ("a.svg", "b.svg"):
        plot.draw(curves, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for one in ("this package, 99 %", "the floor, median", "SSE_DIRECT_WRITE = False", "1,000"):
        assert one in text
    assert str(ROOT) not in text and not re.search(r"\b20\d\d-\d\d", text)


def test_the_page_has_what_the_benchmark_prints() -> None:
    PAGE.assert_links_lead_somewhere()
    found = fanout.MEASURED.search(PAGE.text)
    assert found
    code = "".join(Path(module.__file__ or "").read_text() for module in (breadth, delivery, others, rest))
    titles = re.findall(r'yield "### (.*)"', code)
    assert len(titles) == len(fanout.SECTIONS)
    assert set(re.findall(r"^### (.*)$", found[0], re.MULTILINE)) == {*titles}
    assert "WRONG" not in found[0]
    ElementTree.parse(ROOT / "docs" / "performance.svg")


def test_the_script_can_be_run_anywhere() -> None:
    script = ROOT / "benchmarks" / "run"
    assert os.access(script, os.X_OK)
    for shell in ("sh", "dash"):
        with contextlib.suppress(FileNotFoundError):
            assert subprocess.run([shell, "-n", str(script)]).returncode == 0
