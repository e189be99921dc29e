"""The Pass: a live order board for a small kitchen, in which every open page changes at once.

    gunicorn -k gevent demo.app:app          (with DATABASE_URL in the environment; ./demo/run does it all)

The idea in one line: the server sends the HTML that answers a click to all other pages too, through PostgreSQL.
A view changes an order and calls ``notify()`` in the same transaction. If that commits, PostgreSQL delivers the event
to every worker on every host. Each worker sends it to its open pages, and htmx puts the card in its place. A page that
was away (a hidden tab, a tunnel, a deploy) gets the missed events from the event log.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit

import psycopg2
from flask import Flask, Response, abort, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from psycopg2.extensions import connection as Connection
from werkzeug.exceptions import HTTPException

from demo import orders
from demo.htmx import htmx_bp
from demo.orders import MENU, STEPS, Order
from flask_pg_sse import DatabaseUnavailable, notify, sse_bp, sse_cursor

app = Flask(__name__)
app.config["SSE_CHANNELS"] = ["orders"]  # everybody may listen to this channel, and to no other
app.register_blueprint(sse_bp)  # GET /sse?channel=orders
app.register_blueprint(htmx_bp)  # GET /htmx/htmx.min.js


@app.get("/")
def page() -> str:
    orders.create_tables(orders.database_url())
    cursor = sse_cursor()  # before the board is read: the stream brings all changes after this line
    return render_template("page.html", board=orders.read_board(), menu=MENU, cursor=cursor)


@app.get("/board")
def board() -> str:
    """The columns only. A page fetches them when it was away for longer than the log reaches back."""
    return render_template("board.html", board=orders.read_board())


@app.post("/orders")
def place() -> ResponseReturnValue:
    dish = request.form.get("dish", "")
    quantity = request.form.get("quantity", 1, type=int)
    if dish not in MENU:
        abort(400, "Please choose a dish from the menu.")
    if not 1 <= quantity <= 9:
        abort(400, "Please order one to nine of a dish.")
    customer = line_of_text("name", 30) or "Guest"
    note = line_of_text("note", 80)
    with orders.transaction() as conn:
        order = orders.place(conn, dish, quantity, customer, note)
        announce(order, conn)
    return card(order)


@app.post("/orders/<int:order_id>/move")
def move(order_id: int) -> ResponseReturnValue:
    to = request.form.get("to", "")
    if to not in STEPS[1:]:
        abort(400, "An order cannot go there.")
    with orders.transaction() as conn:
        order = orders.move(conn, order_id, to)
        announce(order, conn)
    return card(order)


def announce(order: Order, conn: Connection) -> None:
    """Send the order's card and a line for the log to every open page, if and when this transaction commits."""
    notify("orders", render_template("event.html", order=order), connection=conn)


def card(order: Order) -> ResponseReturnValue:
    """Answer the page that asked. It also gets the card by its stream, and shows the one that comes first."""
    if "HX-Request" not in request.headers:  # the plain form, from a browser without JavaScript
        return redirect(url_for("page"), 303)
    return render_template("card.html", order=order)


def line_of_text(field: str, longest: int) -> str:
    """Return a form field as one line without control characters (PostgreSQL refuses NUL, for example)."""
    text = "".join(c if c.isprintable() else " " for c in request.form.get(field, ""))
    text = " ".join(text.split())
    if len(text) > longest:
        abort(400, f"The {field} is too long: {longest} characters at most.")
    return text


@app.errorhandler(400)
@app.errorhandler(403)
def wrong(error: HTTPException) -> Response:
    return refusal(error.code or 400, error.description or error.name)


@app.errorhandler(orders.Refused)
def refused(error: orders.Refused) -> Response:
    return refusal(409, str(error))


@app.errorhandler(psycopg2.OperationalError)
@app.errorhandler(DatabaseUnavailable)
def no_database(error: Exception) -> Response:
    app.logger.error("no database: %s", error)
    return refusal(503, "The kitchen cannot reach its database. Please try again in a moment.")


def refusal(status: int, message: str) -> Response:
    """Tell the visitor what went wrong, in a line on the page."""
    if "HX-Request" not in request.headers:
        return Response(message, status, mimetype="text/plain")
    answer = Response(render_template("refusal.html", message=message), status)
    if status == 409:  # the page is behind: the header makes htmx fire "stale", and the page fetches the board
        answer.headers["HX-Trigger"] = "stale"
    return answer


# The names of this machine, and those under which a proxy shows the demo (HOST_NAMES, separated by commas).
NAMES = {"localhost", socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
NAMES.update(filter(None, re.split(r"[\s,]+", os.environ.get("HOST_NAMES", "").lower())))


@app.before_request
def refuse_other_names() -> None:
    """Refuse a request for a host name that is not this machine's.

    Another site's name can be made to lead to this machine's address (DNS rebinding). Its page could then read the
    board and send forms, because for the browser the demo would be that site. An address cannot be made to do that.
    """
    name = re.sub(r":\d*$", "", request.host.lower()).strip("[]")
    if name in NAMES or name.endswith(".localhost"):
        return
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        abort(400, f"The demo is not called {name!r}. Open it by its address, or start it with HOST_NAMES={name}.")


@app.before_request
def refuse_other_sites() -> None:
    """Refuse a form sent from another site's page.

    This needs no session and no token: every browser says where a POST comes from.
    """
    site = request.headers.get("Sec-Fetch-Site")  # only over https and to localhost; elsewhere there is Origin
    origin = request.headers.get("Origin")
    here = site == "same-origin" if site else not origin or urlsplit(origin).netloc == request.host
    if request.method == "POST" and not here:
        abort(403, "This form was sent from another site.")


@app.after_request
def only_from_here(response: Response) -> Response:
    """Allow content from this server only, so that no visitor's text can run as a script."""
    response.headers["Content-Security-Policy"] = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    return response
