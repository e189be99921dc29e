"""The private directory of an app's workers: nobody else's, whatever stands there; no counter is lost or doubled."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flask_pg_sse import stats
from flask_pg_sse.server import rundir
from flask_pg_sse.server.host import HostPresence
from flask_pg_sse.server.rundir import RunDirectory
from flask_pg_sse.server.siblings import Presence, app_id, ask, ask_all
from flask_pg_sse.stats import Stats
from tests.support.client import eventually

APP = "0" * 32


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for all run directories, whose path is longer than a Unix socket's address may be."""
    path = tmp_path / ("long" * 30)
    path.mkdir()
    monkeypatch.setattr(rundir, "_base", lambda: str(path))
    return path


class Figures:
    def answer(self, question: object) -> dict[str, object]:
        return {"asked": question}


Make = Callable[[], Presence]


@pytest.fixture
def appear(base: Path) -> Iterator[Make]:
    """Make workers that answer, all in this process."""
    made: list[tuple[Presence, Figures]] = []

    def make() -> Presence:
        figures = Figures()
        presence = Presence(APP, Stats(), figures.answer)
        made.append((presence, figures))
        presence.start()
        return presence

    yield make
    for presence, _ in made:
        presence.stop(5)


def names(base: Path) -> set[str]:
    return {path.name for path in base.glob(f"*/{APP}/*")} - {"lock", "ended.json"}


def total(base: Path) -> float:
    return ask_all(APP, {}).totals.get((stats.OPENED.name, ""), 0)


def kill(presence: Presence) -> None:
    """Let a worker go as SIGKILL does: nothing of it is removed."""
    directory = presence._directory
    assert directory is not None
    presence._directory = None
    presence.stop(5)
    directory.close()


def test_workers_answer_each_other_and_nobody_else_can_look(base: Path, appear: Make) -> None:
    first, second = appear(), appear()
    asked = ask_all(APP, {"what": "figures"}, skip=first.name)
    assert (asked.answers, asked.silent) == ([{"name": second.name, "asked": {"what": "figures"}}], [])
    [users] = base.iterdir()
    assert users.name == f"flask-pg-sse-{os.geteuid()}"
    for path in (users, users / APP):
        assert path.stat().st_mode & 0o777 == 0o700
    second.stop(5)
    assert names(base) == {f"{first.name}.socket", f"{first.name}.counters"}


def test_the_name_of_the_app_tells_neither_database_nor_key() -> None:
    names = {app_id(bus, key) for bus in ("db/one", "db/two") for key in ("", "secret", b"other")}
    assert len(names) == 6
    assert all(len(name) == 32 and "one" not in name and "secret" not in name for name in names)
    assert app_id("db/one", "secret") == app_id("db/one", b"secret")


def test_a_link_or_an_open_directory_is_refused(base: Path, caplog: pytest.LogCaptureFixture, appear: Make) -> None:
    users = base / f"flask-pg-sse-{os.geteuid()}"
    elsewhere = base / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    users.symlink_to(elsewhere)
    appear()
    assert list(elsewhere.iterdir()) == []
    assert "do not know this worker" in caplog.text
    with pytest.raises(OSError):
        ask_all(APP, {})
    users.unlink()
    users.mkdir()
    users.chmod(0o755)
    appear()
    assert list(users.iterdir()) == []
    assert "has mode 0755. Remove it" in caplog.text
    if os.geteuid() == 0:
        users.chmod(0o700)
        os.chown(users, 12345, 12345)
        appear()
        assert "it belongs to user 12345" in caplog.text and list(users.iterdir()) == []


def test_counters_never_fall_when_workers_are_killed_or_stop(base: Path, appear: Make) -> None:
    workers = [appear() for _ in range(4)]
    for worker in workers:
        worker._stats.count(stats.OPENED, 10)
    assert total(base) == 40
    kill(workers[0])
    assert total(base) == 40 and not any(name.startswith(workers[0].name) for name in names(base))
    workers[1].stop(5)
    assert total(base) == 40
    assert len(names(base)) == 4
    workers[2]._stats.count(stats.OPENED)
    assert total(base) == 41


def test_a_process_that_is_killed_while_it_moves_counters_doubles_none(
    base: Path, appear: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = appear(), appear()
    second._stats.count(stats.OPENED, 5)
    kill(second)

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            ask_all(APP, {})
    directory = RunDirectory(APP, os.geteuid(), create=False)
    with contextlib.closing(directory):
        assert directory.totals()[stats.OPENED.name, ""] == 5
    assert total(base) == 5
    assert names(base) == {f"{first.name}.socket", f"{first.name}.counters"}


def test_a_lock_that_is_held_loses_nothing_and_holds_nobody_up(base: Path, appear: Make) -> None:
    worker = appear()
    worker._stats.count(stats.OPENED, 5)
    kill(worker)
    directory = RunDirectory(APP, os.geteuid(), create=False)
    with contextlib.closing(directory), directory._locked() as locked:
        assert locked
        assert total(base) == 5
        assert len(names(base)) == 2
    assert total(base) == 5 and not names(base)


def test_a_worker_that_was_tidied_away_comes_back(base: Path, appear: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_pg_sse.server.siblings._LOOK_EVERY", 0.05)
    worker = appear()
    worker._stats.count(stats.OPENED, 5)
    for path in base.glob(f"*/{APP}/*"):
        path.unlink()
    (base / f"flask-pg-sse-{os.geteuid()}" / APP).rmdir()
    eventually(lambda: len(ask_all(APP, {}).answers) == 1)
    assert total(base) == 5


def test_the_child_of_a_worker_does_not_stand_for_it(base: Path, appear: Make) -> None:
    """Otherwise a worker would seem to live as long as a job that it has started."""
    worker = appear()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        kill(worker)
        directory = RunDirectory(APP, os.geteuid(), create=False)
        with contextlib.closing(directory):
            assert ask(directory, {}) == ([], [])
        assert names(base) == set()
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_apps_without_workers_are_forgotten_after_a_day(base: Path, appear: Make) -> None:
    appear()
    users = base / f"flask-pg-sse-{os.geteuid()}"
    for name, age in (("old", 100_000), ("new", 1000)):
        (users / name).mkdir(mode=0o700)
        (users / name / "ended.json").write_text("{}")
        os.utime(users / name, (0, os.stat(users).st_mtime - age))
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    for end in ("socket", "counters"):
        (users / "old" / f"{killed.pid}-0123abcd.{end}").touch()
    os.utime(users / "old", (0, os.stat(users).st_mtime - 100_000))
    os.utime(users / APP, (0, 0))
    rundir.forget_apps()
    assert {path.name for path in users.iterdir()} == {"new", APP}


def test_sixty_four_workers_answer_another_host_once(base: Path) -> None:
    figures = Figures()
    workers = [HostPresence(APP, Stats(), figures.answer) for _ in range(64)]
    answers: list[list[object]] = []
    for worker in workers:
        worker.start()
    try:
        for nonce in ("first", "second", "first"):
            for worker in workers:
                worker.asked(nonce, lambda found: answers.append([one["name"] for one in found]))
            eventually(lambda: not any(worker._answering for worker in workers))
        assert [len(one) for one in answers] == [64, 64]
        assert set(answers[0]) == {worker.name for worker in workers}
    finally:
        for worker in workers:
            worker.stop(5)


def test_the_listener_does_not_wait_for_an_answer(base: Path) -> None:
    figures, goes_on = Figures(), threading.Event()
    worker = HostPresence(APP, Stats(), figures.answer)
    worker.start()

    def wait(found: object) -> None:
        assert goes_on.wait(10)

    try:
        for number in range(100):  # more than are answered at once
            worker.asked(str(number), wait)
        assert 0 < len(worker._answering) <= 8
        goes_on.set()
        eventually(lambda: not worker._answering)
    finally:
        worker.stop(5)
