"""The Pass: a live order board for a small kitchen, in which every open page changes at once.

    gunicorn -k gevent demo.app:app          (with DATABASE_URL in the environment; ./demo/run does it all)

The idea in one line: the HTML that answers the person who clicked is also sent, through PostgreSQL, to everybody else.
A view changes an order and calls ``notify()`` in the same transaction. PostgreSQL delivers the event if and when that
commits, to every worker on every host; each hands it to its open pages, and htmx puts the card where it belongs. A page
that was away (a hidden tab, a tunnel, a deploy) gets from the event log what it has missed.
"""

from __future__ import annotations

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
app.config["SSE_CHANNELS"] = ["orders"]  # whoever can open the page may listen to this channel, and to no other
app.register_blueprint(sse_bp)  # GET /sse?channel=orders
app.register_blueprint(htmx_bp)  # GET /htmx/htmx.min.js


@app.get("/")
def page() -> str:
    orders.create_tables(orders.database_url())
    cursor = sse_cursor()  # before the board is read: what changes after this line comes by the stream
    return render_template("page.html", board=orders.read_board(), menu=MENU, cursor=cursor)


@app.get("/board")
def board() -> str:
    """The columns alone: what a page fetches when it has been away for so long that the log does not reach back."""
    return render_template("board.html", board=orders.read_board())


@app.post("/orders")
def place() -> ResponseReturnValue:
    dish = request.form.get("dish", "")
    quantity = request.form.get("quantity", 1, type=int)
    if dish not in MENU:
        abort(400, "Please choose a dish from the menu.")
    if not 1 <= quantity <= 9:
        abort(400, "From one to nine of a dish, please.")
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
    """Send the order's card and a line for the log to every open page, when and only when this transaction commits."""
    notify("orders", render_template("event.html", order=order), connection=conn)


def card(order: Order) -> ResponseReturnValue:
    """Answer the page that asked. It gets the card by the stream as well, and takes whichever comes first."""
    if "HX-Request" not in request.headers:  # a browser without JavaScript has sent the plain form
        return redirect(url_for("page"), 303)
    return render_template("card.html", order=order)


def line_of_text(field: str, longest: int) -> str:
    """Return a form field as one line without control characters (NUL, which PostgreSQL refuses, is one)."""
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
    if status == 409:  # the page was behind: this header makes htmx send it the event "stale", and it fetches the board
        answer.headers["HX-Trigger"] = "stale"
    return answer


@app.before_request
def refuse_other_sites() -> None:
    """Refuse a form sent from another site's page. There is no session to carry a token, and none is needed:
    every browser says where a POST comes from."""
    site = request.headers.get("Sec-Fetch-Site")  # over https and to localhost; elsewhere there is Origin alone
    origin = request.headers.get("Origin")
    here = site == "same-origin" if site else not origin or urlsplit(origin).netloc == request.host
    if request.method == "POST" and not here:
        abort(403, "This form was sent from another site.")


@app.after_request
def only_from_here(response: Response) -> Response:
    """Nothing on the page comes from elsewhere, and no text of a visitor's could run as a script."""
    response.headers["Content-Security-Policy"] = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    return response
