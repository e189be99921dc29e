"""The kitchen's orders in PostgreSQL, with plain psycopg2. Every value is a parameter."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

import psycopg2
from psycopg2.extensions import connection as Connection

from flask_pg_sse import schema_sql

MENU = ("Margherita", "Mushroom ramen", "Falafel wrap", "Fish tacos", "Garden salad", "Lemon tart")
STEPS = ("new", "cooking", "ready", "collected")  # an order moves from left to right, one step at a time
MAX_OPEN = 40  # orders not collected yet; keeps the table small
KEEP_COLLECTED = 4

COLUMNS = "id, dish, quantity, customer, note, status, version, changed_at"


class Refused(Exception):
    """The kitchen refuses an order; the text tells the visitor why."""


@dataclass(frozen=True, slots=True)
class Order:
    """One order, as COLUMNS selects it."""

    id: int
    dish: str
    quantity: int
    customer: str
    note: str
    status: str
    version: int  # of the board, when this order last changed
    changed_at: datetime

    @property
    def next_step(self) -> str | None:
        return STEPS[STEPS.index(self.status) + 1] if self.status != STEPS[-1] else None


@dataclass(frozen=True, slots=True)
class Board:
    """All orders at one moment, and the board's version at that moment."""

    version: int
    columns: dict[str, list[Order]]


def place(conn: Connection, dish: str, quantity: int, customer: str, note: str) -> Order:
    """Insert a new order. Raises Refused when too many are open."""
    with conn.cursor() as cur:
        version = next_version(conn)
        cur.execute("SELECT count(*) FROM demo_order WHERE status <> 'collected'")
        [(open_orders,)] = cur.fetchall()
        if open_orders >= MAX_OPEN:
            raise Refused(f"The kitchen has {MAX_OPEN} open orders and takes no more: collect some first.")
        cur.execute(
            f"""INSERT INTO demo_order (dish, quantity, customer, note, status, version)
                VALUES (%s, %s, %s, %s, 'new', %s) RETURNING {COLUMNS}""",
            (dish, quantity, customer, note, version),
        )
        [row] = cur.fetchall()
        return Order(*row)


def move(conn: Connection, order_id: int, to: str) -> Order:
    """Move an order to its next step, ``to``. Raises Refused if that is not its next step (any more)."""
    with conn.cursor() as cur:
        version = next_version(conn)
        # The statement checks the order's present step. If two people press the same button, one wins, and the other
        # does not move the order a second step.
        cur.execute(
            f"""UPDATE demo_order SET status = %s, version = %s, changed_at = now()
                WHERE id = %s AND status = %s RETURNING {COLUMNS}""",
            (to, version, order_id, STEPS[STEPS.index(to) - 1]),
        )
        moved = cur.fetchone()
        if moved is None:
            cur.execute("SELECT status FROM demo_order WHERE id = %s", (order_id,))
            found = cur.fetchone()
            raise Refused(f"Order {order_id} is {found[0]} now." if found else f"There is no order {order_id}.")
        cur.execute(  # keep the last few collected orders on the board, and delete older ones
            """DELETE FROM demo_order WHERE status = 'collected' AND version NOT IN (
                   SELECT version FROM demo_order WHERE status = 'collected' ORDER BY version DESC LIMIT %s)""",
            (KEEP_COLLECTED,),
        )
        return Order(*moved)


def next_version(conn: Connection) -> int:
    """Count a change of the board, and lock its row until the transaction ends.

    So writers commit one after the other, and versions are in the order of commits. PostgreSQL delivers notifications
    in the same order. A page can tell by the version alone which of two cards is newer.
    """
    with conn.cursor() as cur:
        cur.execute("UPDATE demo_board SET version = version + 1 RETURNING version")
        [(version,)] = cur.fetchall()
        return int(version)


def read_board() -> Board:
    """Read all orders. Each column is in the order of arrival (collected orders: newest first)."""
    with transaction() as conn, conn.cursor() as cur:
        cur.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")  # both reads see the same moment
        cur.execute("SELECT version FROM demo_board")
        [(version,)] = cur.fetchall()
        board = Board(version, {step: [] for step in STEPS})
        cur.execute(f"SELECT {COLUMNS} FROM demo_order ORDER BY version")
        for row in cur:
            order = Order(*row)
            board.columns[order.status].append(order)
        board.columns["collected"].reverse()
        return board


@contextmanager
def transaction() -> Iterator[Connection]:
    """Give a connection. Commit at the end of the block, or roll back if the block raises.

    One connection for each request keeps the demo short; a larger application has a pool. A plain psycopg2 call stops
    its gevent worker. That does not matter here, because these queries take about a millisecond.
    """
    create_tables(database_url())
    conn = psycopg2.connect(database_url())
    try:
        with conn:
            yield conn
    finally:
        conn.close()


@cache
def create_tables(url: str) -> None:
    """Run schema.sql and install the event log, once in each process.

    This happens at first use, so that the app starts even while PostgreSQL is down. ``flask sse init`` installs the log
    in the same way. With the log, a page that was away gets the missed events.
    """
    conn = psycopg2.connect(url)
    try:
        with conn, conn.cursor() as cur:
            cur.execute(Path(__file__).with_name("schema.sql").read_text())
            cur.execute(schema_sql())
    finally:
        conn.close()


def database_url() -> str:
    """Return the environment's DATABASE_URL, without SQLAlchemy's ``+driver``, because libpq refuses that."""
    url = os.environ.get("DATABASE_URL")
    if not url:
        raise RuntimeError("DATABASE_URL is not set. ./demo/run starts the demo with its own PostgreSQL.")
    return re.sub(r"^postgres(ql)?\+\w+:", "postgresql:", url)
