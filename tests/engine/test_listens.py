"""The table of a listener's channels: whose turn it is, what is dropped at once, and how many there may be."""

from __future__ import annotations

import pytest

from flask_pg_sse.engine.base import TooManyChannels
from flask_pg_sse.engine.listens import ListenTable, ListenTicket


def table(linger: float = 60.0, most: int = 10_000) -> ListenTable:
    return ListenTable(linger, str.upper, most=most)


def ask(listens: ListenTable, client: str, *channels: str) -> ListenTicket:
    ticket, missing = listens.add(channels, client)
    assert missing and isinstance(ticket, ListenTicket)
    return ticket


def test_clients_take_turns_and_a_streams_channels_come_together() -> None:
    listens = table()
    for number in range(50):
        ask(listens, "many", *(f"m{number}-{which}" for which in range(100)))
    ask(listens, "one", "x")
    ask(listens, "two", "y", "z")
    assert listens.due(1)[1] == [f"M0-{which}" for which in range(100)]
    assert listens.due(101)[1] == ["X", "Y", "Z", *(f"M1-{which}" for which in range(100))]


def test_one_channel_is_asked_for_once_and_by_whom_it_is_whose_turn() -> None:
    listens = table()
    ask(listens, "many", "a")
    ask(listens, "many", "b")
    late, alone = ask(listens, "many", "c", "d"), ask(listens, "one", "d")
    assert [listens.due(1)[1] for _ in range(5)] == [["A"], ["D"], ["B"], ["C"], []]
    listens.confirm(["D"], {"D"})
    assert alone.wait(0) and not late.wait(0)
    listens.confirm(["C"], {"C"})
    assert late.wait(0)


def test_who_leaves_before_its_turn_costs_nothing() -> None:
    listens = table()
    gone = ask(listens, "many", *(f"m{number}" for number in range(100)))
    gone.cancel()
    assert listens.due(500) == ([], [])
    listens.remove(f"m{number}" for number in range(100))
    assert not listens.channels() and not listens._queue


def test_a_channel_lingers_only_if_a_stream_on_it_was_open() -> None:
    listens = table()
    opened, other = ask(listens, "a", "kept", "b"), ask(listens, "b", "left", "c")
    listens.confirm(listens.due(500)[1], {"KEPT", "B", "LEFT"})  # not C: the bus has no such character
    assert opened.wait(0) and not other.wait(60), "it need not wait for what does not come"
    assert not listens.remove(["left", "c"]) or listens.next_due_in() == 0
    assert listens.due(500)[0] == ["LEFT"]
    listens.remove(["kept", "b"])
    assert listens.due(500)[0] == [] and 0 < listens.next_due_in() <= 60
    assert sorted(listens.listened()) == ["b", "kept"]


def test_a_channel_whose_only_stream_leaves_while_its_listen_is_under_way() -> None:
    listens = table()
    ticket = ask(listens, "a", "x")
    [name] = listens.due(500)[1]
    ticket.cancel()
    listens.remove(["x"])
    assert listens.channel_of(name) == "x", "its events may come"
    listens.confirm([name], {name})
    assert listens.due(500)[0] == [name] and not listens.channels()


def test_channels_are_bounded_in_all() -> None:
    listens = table(most=10)
    full = ask(listens, "a", *(f"a{number}" for number in range(9)))
    with pytest.raises(TooManyChannels):
        ask(listens, "b", "b1", "b2")
    assert len(listens.channels()) == 9, "nothing was counted"
    listens.confirm(listens.due(500)[1], {f"A{number}" for number in range(9)})
    assert full.wait(0)
    ticket, missing = listens.add([f"a{number}" for number in range(9)], "b")
    assert ticket.wait(0) and not missing, "who needs no new ones is let in"
    for _ in range(2):
        listens.remove(f"a{number}" for number in range(9))
    ask(listens, "b", *(f"b{number}" for number in range(10)))  # those that linger make room at once
    ended, begun = listens.due(500)
    assert len(ended) == 9 and begun == [f"B{number}" for number in range(10)]


def test_on_another_connection_all_that_are_wanted_come_first() -> None:
    listens = table()
    old = ask(listens, "a", "a1", "a2")
    listens.confirm(listens.due(500)[1], {"A1", "A2"})
    under_way = ask(listens, "b", "b1")
    assert listens.due(1)[1] == ["B1"]
    waiting = ask(listens, "c", "c1")
    listens.remove(["a1", "a2"])
    listens.lost()
    assert listens.restart() == 2 and old.given
    new = ask(listens, "d", "d1")
    assert listens.due(2)[1] == ["B1", "C1"]
    listens.confirm(["B1", "C1"], {"B1", "C1"})
    assert under_way.wait(0) and waiting.wait(0) and not new.wait(0)
    assert listens.due(500)[1] == ["D1"]
