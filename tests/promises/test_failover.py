"""What streams and publishers see of failovers, restores and copies: the rows of docs/failover.md, on real clusters."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg2
import pytest
from flask import Flask
from psycopg2.extensions import parse_dsn

from flask_pg_sse import notify
from flask_pg_sse.engine.postgres import pool
from flask_pg_sse.engine.postgres.schema import drop_schema_sql, schema_sql
from flask_pg_sse.errors import DatabaseUnavailable
from flask_pg_sse.testing import stream
from tests.promises.test_outages import events_come
from tests.promises.test_resume import listening, run_to_the_end
from tests.support.client import eventually, open_stream
from tests.support.cluster import Cluster, MakeCluster, promote
from tests.support.documents import Document
from tests.support.eventsource import LOGGED, Browser, check, for_ever
from tests.support.pgbouncer import pgbouncer
from tests.support.postgres import Running, connect, dump, execute, fresh_database, load
from tests.support.publishers import head, install_log, logged
from tests.support.servers import WebServer
from tools import postgres

Start = Callable[..., WebServer]
MakeApp = Callable[..., Flask]
Event = tuple[int, str, str]

CHANNELS = ["orders", "kitchen"]
PAGE = Document("docs/failover.md")


def example(name: str) -> str:
    return PAGE.example(name)


@dataclass(frozen=True)
class Call:
    """One call of a publisher: what it sent, how long that took, and whether it was told that it did not work."""

    text: str
    seconds: float
    failure: Exception | None


class Sender(threading.Thread):
    """Calls `notify()` a hundred times a second, or (`in_transaction`) in transactions on a connection of its own."""

    def __init__(self, app: Flask, url: str, *, in_transaction: bool) -> None:
        super().__init__(name="transactions" if in_transaction else "notify")
        self.calls: list[Call] = []
        self.failure: BaseException | None = None
        self._app = app
        self._url = url
        self._in_transaction = in_transaction
        self._connection: Any = None
        self._stop_asked = threading.Event()

    def run(self) -> None:
        try:
            with self._app.app_context():
                while not self._stop_asked.wait(0.01):
                    self._call(f"{LOGGED}{self.name} {len(self.calls)}")
        except BaseException as error:
            self.failure = error
        finally:
            self._disconnect()

    def _call(self, text: str) -> None:
        begun, failure = time.monotonic(), None
        channel = CHANNELS[len(self.calls) % 2]
        try:
            if self._in_transaction:
                self._connection = self._connection or connect(self._url)
                self._connection.autocommit = False
                notify(channel, text, connection=self._connection)
                self._connection.commit()
            else:
                notify(channel, text)
        except (psycopg2.Error, DatabaseUnavailable) as error:
            failure = error
            self._disconnect()
        self.calls.append(Call(text, time.monotonic() - begun, failure))

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg2.Error):
                self._connection.close()
        self._connection = None

    def abandon(self) -> None:
        """End its own connection, as the system does at a limit of time that this one has not."""
        with socket.socket(fileno=os.dup(self._connection.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)

    @property
    def failures(self) -> list[Call]:
        return [call for call in list(self.calls) if call.failure is not None]

    def stop(self) -> None:
        self._stop_asked.set()
        self.join(30)
        if self.is_alive():  # on a connection that says nothing more: a test has failed before it could abandon that
            self.abandon()
            self.join()


class Scene:
    """An app with two workers, streams that stay, streams that come and go, and two publishers."""

    def __init__(self, server: WebServer, senders: list[Sender], url: str) -> None:
        self.server = server
        self.senders = senders
        self.url = url
        self.log: list[Event] = []
        self.waits: list[float] = []  # in seconds, until all go on
        sets = [CHANNELS, CHANNELS[:1], CHANNELS[1:], CHANNELS]
        self.staying = [Browser([server.port], channels, seed, for_ever) for seed, channels in enumerate(sets)]
        self.leaving = [Browser([server.port], channels, 10 + seed) for seed, channels in enumerate(sets[:2])]
        self.browsers = self.staying + self.leaving

    def goes_on(self) -> None:
        """Wait until each stream has more events, and each publisher has sent some without a failure."""
        begun = time.monotonic()
        before = {sender: len(sender.calls) for sender in self.senders}

        def all_have_sent() -> bool:
            return all(len(sender.calls) > before[sender] + 5 and not sender.calls[-1].failure for sender in before)

        eventually(all_have_sent, 40, "publishers go on")
        events_come(self.browsers)
        self.waits.append(round(time.monotonic() - begun, 1))

    def all_have_what_is_in(self, url: str) -> None:
        """Wait until each stream has what is in the log now, and more than a standby or a backup of before."""
        newest = head(url)
        eventually(lambda: all(browser.at >= newest for browser in self.browsers), 40, f"all have {newest}")

    def end(self) -> None:
        for sender in self.senders:
            sender.stop()
        run_to_the_end(self.browsers, self.url, 60)
        assert not [sender.failure for sender in self.senders if sender.failure]
        assert "Traceback" not in self.server.log()
        self.log = logged(self.url)

    def check_all_exact(self) -> None:
        """Every stream has every event of the log once, in order, and the log has all that publishers were promised."""
        for browser in self.browsers:
            check(browser, self.log)
            assert not browser.resets, browser.resets
        assert [browser.connections for browser in self.staying] == [1] * len(self.staying), "their streams stayed open"
        texts = [data for _, _, data in self.log]
        assert len(texts) == len(set(texts))
        for sender in self.senders:
            promised = {call.text for call in sender.calls if call.failure is None}
            assert promised <= set(texts), sorted(promised - set(texts))[:5]

    def check_lost(self, before: list[Event], browsers: Sequence[Browser] = (), reason: str = "undone") -> None:
        """Each stream has what the lost log had, up to one `sse-reset`, and then exactly what there is."""
        kept = len([event for event in before if event in self.log])
        assert before[:kept] == self.log[:kept] and kept < len(before), "events were lost, all at the end"
        for browser in browsers or self.browsers:
            assert browser.failure is None, (browser.name, browser.failure)
            assert [reset.reason for reset in browser.resets] == [reason], (browser.name, browser.resets)
            (seen, after), (reset,) = browser.stretches, browser.resets
            wanted = [event for event in before if event[1] in browser.channels and event[0] > seen.after]
            assert seen.events == [(id, data) for id, _, data in wanted][: len(seen.events)]
            assert seen.events[-1] not in [(id, data) for id, _, data in self.log], "it had seen what was lost"
            assert reset.id == after.after and (not kept or reset.id >= self.log[kept - 1][0])
            wanted = [event for event in self.log if event[1] in browser.channels and event[0] > reset.id]
            assert after.events == [(id, data) for id, _, data in wanted]
        ids = [id for id, _, _ in before[kept:] + self.log]
        assert len(ids) == len(set(ids)), "no id is there twice"
        assert reason != "undone" or "has lost events that were sent" in self.server.log()

    def report(self, row: str) -> None:
        deliveries = sum(browser.deliveries for browser in self.browsers)
        print(f"\n{row}: {len(self.log)} events, {deliveries} deliveries; went on after {self.waits} s")
        for sender in self.senders:
            longest = max(call.seconds for call in sender.calls)
            print(f"  {sender.name}: {len(sender.calls)} calls, {len(sender.failures)} failed, longest {longest:.2f} s")
            print("  ", *{str(call.failure).splitlines()[0][:100] for call in sender.failures}, sep="\n    ")


Play = Callable[..., contextlib.AbstractContextManager[Scene]]


@pytest.fixture
def play(start_server: Start, make_app: MakeApp) -> Play:
    """Let streams and publishers run over the address of a cluster for the time of the context, and end in peace."""

    @contextmanager
    def run(
        cluster: Cluster, url: str | None = None, listen_url: str | None = None, app_name: str = "basic"
    ) -> Iterator[Scene]:
        url = url or cluster.url
        app = make_app(url, SSE_LISTEN_URL=listen_url)
        settings = {"FLASK_SSE_HEARTBEAT": "0.5", "FLASK_SSE_RETRY": "100"}
        if listen_url is not None:
            settings["FLASK_SSE_LISTEN_URL"] = listen_url
        server = start_server(url, "-w", "2", app=f"tests.support.apps.{app_name}:app", **settings)
        senders = [Sender(app, url, in_transaction=way) for way in (False, True)]
        scene = Scene(server, senders, url)
        try:
            with listening(scene.browsers):
                for sender in senders:
                    sender.start()
                scene.goes_on()
                yield scene
                scene.end()
        finally:
            for sender in senders:
                sender.stop()

    return run


def synchronous(cluster: Cluster, name: str = "standby") -> None:
    """Let commits wait for a standby, so that it has every event that anybody has seen."""
    execute(cluster.primary.url(), f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    execute(cluster.primary.url(), "SELECT pg_reload_conf()")
    query = "SELECT sync_state FROM pg_stat_replication WHERE application_name = %s"
    eventually(lambda: execute(cluster.primary.url(), query, (name,)) == [("sync",)], 30)


@pytest.fixture
def logged_cluster(cluster: Cluster) -> Cluster:
    install_log(cluster.primary.url())
    return cluster


# -- nothing is lost


def test_managed_failover(any_cluster: Cluster, play: Play) -> None:
    """The primary dies, the synchronous standby takes over, and the address moves to it."""
    cluster = any_cluster
    install_log(cluster.primary.url())
    standby = cluster.standby()
    synchronous(cluster)
    with play(cluster) as scene:
        cluster.primary.stop("kill")
        promote(standby)
        cluster.lead_to(standby)
        scene.goes_on()
    scene.report("managed failover")
    scene.check_all_exact()


@pytest.mark.slow
def test_managed_failover_of_a_host_that_says_nothing_more(logged_cluster: Cluster, play: Play) -> None:
    """No connection ends: the packets of all that stand get lost, and new ones reach the new primary."""
    standby = logged_cluster.standby()
    synchronous(logged_cluster)
    with play(logged_cluster) as scene:
        logged_cluster.address.silence()
        logged_cluster.primary.stop("kill")
        promote(standby)
        logged_cluster.lead_to(standby, drop=False)
        ours, theirs = scene.senders
        logged_cluster.address.restore()
        under_way = len(ours.calls)
        events_come(scene.browsers)
        theirs.abandon()
        scene.goes_on()
    scene.report("managed failover, silent")
    scene.check_all_exact()
    # What was called before may fail, at the package's own limit of time and not at TCP's quarter of an hour.
    assert not [call for call in ours.calls[under_way + 1 :] if call.failure]
    assert max(call.seconds for call in ours.calls) < 30


@pytest.mark.slow
def test_a_synchronous_standby_that_is_away(logged_cluster: Cluster, play: Play) -> None:
    """Commits wait for it, and so does all that publishes. Streams stay, new ones open."""
    standby = logged_cluster.standby(wal_retrieve_retry_interval="200ms")
    synchronous(logged_cluster)
    with play(logged_cluster) as scene:
        standby.line.cut()
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        eventually(lambda: execute(logged_cluster.primary.url(), waiting), 30, "a commit waits")
        open_stream(scene.server.port, "orders").close()
        standby.line.restore()
        scene.goes_on()
    scene.report("a synchronous standby that is away")
    scene.check_all_exact()
    assert not [call for sender in scene.senders for call in sender.failures]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["an address that moves", "a list of hosts"])
def test_switchover(logged_cluster: Cluster, play: Play, way: str) -> None:
    """The primary is stopped and follows its standby, then it is the other way round, as Patroni does it.

    With a list of hosts no address moves: `target_session_attrs` finds the primary.
    """
    first = logged_cluster.primary
    second = logged_cluster.standby()
    url = logged_cluster.url
    if way == "a list of hosts":
        app = Flask("example")
        exec(example("hosts"), {"app": app})
        names = {"app@": "postgres@", "/shop": "/postgres"}
        names |= {f"db{number}:5432": f"{postgres.HOST}:{one.port}" for number, one in enumerate((first, second), 1)}
        url = app.config["SSE_DATABASE_URL"]
        for name, real in names.items():
            url = url.replace(name, real)
    with play(logged_cluster, url) as scene:
        for old, new in ((first, second), (second, first)):
            old.stop("fast")  # which sends the standby all that it has
            promote(new)
            logged_cluster.lead_to(new)
            logged_cluster.follow(old, new)
            scene.goes_on()
    scene.report(f"switchover, {way}")
    scene.check_all_exact()


@pytest.mark.slow
def test_dump_and_restore_into_a_new_server(logged_cluster: Cluster, play: Play, running_postgres: Running) -> None:
    """Nobody writes meanwhile; then the address leads to the copy."""
    with running_postgres() as new, play(logged_cluster) as scene:
        logged_cluster.address.cut()
        load(dump(logged_cluster.primary.url()), new.url())
        logged_cluster.lead_to(new)
        scene.goes_on()
    scene.report("dump and restore")
    scene.check_all_exact()


@pytest.mark.slow
@pytest.mark.parametrize("prepared", ["the schema of a dump", "flask sse init"])
def test_logical_replication_and_cutover(
    logged_cluster: Cluster, play: Play, running_postgres: Running, prepared: str
) -> None:
    """A new server has all tables by a subscription; then nobody writes for a moment, and the address leads there."""
    old = logged_cluster.primary
    with running_postgres(wal_level="logical") as new, play(logged_cluster) as scene:
        if prepared == "the schema of a dump":
            load(dump(old.url(), "--schema-only"), new.url())
        else:
            install_log(new.url())
        execute(old.url(), example("publication"))
        execute(new.url(), example("subscription").replace("host=old dbname=shop", old.url()))
        tables = "SELECT count(*) > 0 AND bool_and(srsubstate = 'r') FROM pg_subscription_rel"
        eventually(lambda: execute(new.url(), tables) == [(True,)], 30, "all tables have been copied")
        execute(new.url(), "SELECT flask_pg_sse.notify('health', 'the new server publishes too')")
        scene.goes_on()
        logged_cluster.address.cut()
        ((lsn,),) = execute(old.url(), "SELECT pg_current_wal_lsn()::text")
        behind = f"SELECT confirmed_flush_lsn >= '{lsn}' FROM pg_replication_slots WHERE slot_name = 'everything'"
        eventually(lambda: execute(old.url(), behind) == [(True,)], 30, "the subscription has all")
        execute(new.url(), "DROP SUBSCRIPTION everything")
        execute(new.url(), schema_sql())
        logged_cluster.lead_to(new)
        scene.goes_on()
    scene.report("logical replication")
    scene.check_all_exact()


@pytest.mark.slow
def test_pg_upgrade(make_cluster: MakeCluster, play: Play) -> None:
    with make_cluster(version="15") as cluster:
        install_log(cluster.primary.url())
        with play(cluster) as scene:
            # Debian's 15.20 counts versions of a column in an option that 18.6 does not know.
            options = "UPDATE pg_attribute SET attoptions = NULL WHERE attoptions::text LIKE '{pg_attver=%}'"
            execute(cluster.primary.url(), options)
            cluster.primary.stop("fast")
            new = cluster.upgrade()
            new.start()
            cluster.lead_to(new)
            scene.goes_on()
    scene.report("pg_upgrade")
    scene.check_all_exact()


@pytest.mark.slow
@pytest.mark.parametrize("listen", ["direct", "poll"])
def test_a_failover_behind_a_pooler(logged_cluster: Cluster, play: Play, listen: str) -> None:
    """PgBouncer in transaction mode publishes, and LISTEN has a way of its own to the same address, or is not used."""
    standby = logged_cluster.standby()
    synchronous(logged_cluster)
    way = logged_cluster.url if listen == "direct" else "poll"
    with pgbouncer(logged_cluster.url) as pooled, play(logged_cluster, pooled, way) as scene:
        logged_cluster.primary.stop("kill")
        promote(standby)
        logged_cluster.lead_to(standby)
        scene.goes_on()
    scene.report(f"pooler, {listen}")
    scene.check_all_exact()


# -- something is lost


@pytest.mark.slow
def test_a_replica_that_lagged_is_promoted(logged_cluster: Cluster, play: Play) -> None:
    standby = logged_cluster.standby()
    with play(logged_cluster) as scene:
        standby.line.cut()
        scene.goes_on()
        scene.all_have_what_is_in(logged_cluster.primary.url())
        logged_cluster.address.cut()
        before = logged(logged_cluster.primary.url())
        promote(standby)
        logged_cluster.lead_to(standby)
        scene.goes_on()
    scene.report("lagging replica")
    scene.check_lost(before)


@pytest.mark.slow
def test_an_old_primary_that_lives_on(logged_cluster: Cluster, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection ends. A client that has one to the old primary goes on there, and what it sends is lost."""
    monkeypatch.setattr(pool, "_MOST_AGE", 1.0)
    old, new = logged_cluster.primary, logged_cluster.standby()
    synchronous(logged_cluster)
    with play(logged_cluster, app_name="watchful") as scene:
        execute(old.url(), "ALTER SYSTEM RESET synchronous_standby_names")
        execute(old.url(), "SELECT pg_reload_conf()")
        promote(new)
        scene.goes_on()
        scene.all_have_what_is_in(old.url())
        logged_cluster.lead_to(new, drop=False)
        moved = "The listener moves there"
        eventually(lambda: scene.server.log().count(moved) == 2, 90, "both workers have moved")
        before = logged(old.url())
        old.stop("fast")
        scene.goes_on()
    scene.report("an old primary that lives on")
    assert [browser.connections for browser in scene.staying] == [1] * len(scene.staying)
    scene.check_lost(before, scene.staying)


@pytest.mark.slow
def test_recovery_to_a_point_in_time(logged_cluster: Cluster, play: Play) -> None:
    data = logged_cluster.backup("backup")
    with play(logged_cluster) as scene:
        execute(logged_cluster.primary.url(), "SELECT pg_create_restore_point('before the mishap')")
        scene.goes_on()
        scene.all_have_what_is_in(logged_cluster.primary.url())
        logged_cluster.address.cut()
        before = logged(logged_cluster.primary.url())
        logged_cluster.primary.stop("fast")
        logged_cluster.lead_to(logged_cluster.restore(data, "before the mishap"))
        scene.goes_on()
    scene.report("recovery to a point in time")
    scene.check_lost(before)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a new server", "in place"])
def test_last_nights_dump(logged_cluster: Cluster, play: Play, running_postgres: Running, place: str) -> None:
    old = logged_cluster.primary
    with running_postgres() as new, play(logged_cluster) as scene:
        dumped = dump(old.url())
        scene.goes_on()
        scene.all_have_what_is_in(old.url())
        logged_cluster.address.cut()
        before = logged(old.url())
        target = new if place == "a new server" else old
        if target is old:
            execute(old.url(), drop_schema_sql() + "DROP TABLE witness; DROP FUNCTION witness")
        load(dumped, target.url())
        logged_cluster.lead_to(target)
        scene.goes_on()
    scene.report(f"last night's dump, {place}")
    scene.check_lost(before)


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["undone", "too-old"])
def test_a_new_server_with_a_log_of_its_own(
    logged_cluster: Cluster, play: Play, running_postgres: Running, reason: str
) -> None:
    """As with a replication or a dump that leaves the log out. It begins before, or after, what streams have seen."""
    with running_postgres() as new:
        if reason == "undone":
            install_log(new.url())
        with play(logged_cluster) as scene:
            logged_cluster.address.cut()
            before = logged(logged_cluster.primary.url())
            if reason == "too-old":
                install_log(new.url())
            logged_cluster.lead_to(new)
            scene.goes_on()
    scene.report(f"a new log, {reason}")
    scene.check_lost(before, reason=reason)


# -- a dump every night


@pytest.fixture
def by(logged_url: str) -> Iterator[Callable[..., str]]:
    """Give the URL of a database for a role: the app's own, which has orders and may use the log, or "backup"."""
    name = parse_dsn(logged_url)["dbname"]
    app, backup = f"app_{name}", f"backup_{name}"
    execute(logged_url, f"CREATE ROLE {app} LOGIN")
    execute(logged_url, example("backup").replace("backup", backup))
    execute(logged_url, f"CREATE TABLE orders (dish text); ALTER TABLE orders OWNER TO {app}")
    execute(logged_url, schema_sql([app]))
    yield lambda role, url=logged_url: url.replace("postgres@", f"{role}_{name}@")
    for role in (app, backup):
        execute(logged_url, f"DROP OWNED BY {role} CASCADE")
        execute(logged_url, f"DROP ROLE {role}")


@pytest.fixture
def seen(by: Callable[..., str], make_app: MakeApp) -> int:
    """The id of the first of two events, which a browser has got before it went away."""
    with make_app(by("app")).app_context():
        first, _ = notify("orders", "one"), notify("orders", "two")
    assert first is not None
    return first


def test_a_dump_by_a_role_that_may_read_all(
    by: Callable[..., str], seen: int, postgres_server: postgres.Server, make_app: MakeApp
) -> None:
    """It has the log, and browsers miss nothing."""
    with fresh_database(postgres_server) as copy:
        load(dump(by("backup")), copy)
        app = make_app(by("app", copy))
        with app.app_context():
            events = stream(app.test_client(), f"/sse?channel=orders&last_event_id={seen}", timeout=30)
            assert [next(events).event, next(events).data] == ["sse-open", "two"]
            notify("orders", "three")
            assert next(events).data == "three"
        app.extensions["pg_sse"].close()


def test_a_dump_by_the_apps_own_role(
    by: Callable[..., str], seen: int, postgres_server: postgres.Server, make_app: MakeApp
) -> None:
    """It leaves the log out; `flask sse init` makes a new one, and browsers load their pages again."""
    with fresh_database(postgres_server) as copy:
        with pytest.raises(subprocess.CalledProcessError) as caught:
            load(dump(by("app")), copy)
        assert b"permission denied for table" in caught.value.stderr
        load(dump(by("app"), "--exclude-schema=flask_pg_sse"), copy)
        assert execute(copy, "SELECT count(*) FROM orders") == [(0,)]
        execute(copy, schema_sql([parse_dsn(by("app"))["user"]]))
        app = make_app(by("app", copy))
        with app.app_context():
            events = stream(app.test_client(), f"/sse?channel=orders&last_event_id={seen}", timeout=30)
            assert next(events).event == "sse-open"
            reset = next(events)
            assert (reset.event, reset.json["reason"]) == ("sse-reset", "too-old")
            assert (notify("orders", "three") or 0) > seen
            assert next(events).data == "three"
        app.extensions["pg_sse"].close()
