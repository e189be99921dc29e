"""The notations of a database that people have: each is understood or refused, and no text shows a password."""

from __future__ import annotations

import ssl
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from psycopg2.extensions import parse_dsn
from sqlalchemy.engine import URL, make_url

from flask_pg_sse import ConfigurationError, DatabaseNotConfigured
from flask_pg_sse.engine.postgres.dsn import Dsn, is_postgres, to_dsn, uses_psycopg2

AWKWARD_PASSWORD = "p@ss/w:rd?%#&= +é€'\"\\[x]"


def params(value: object, **connect_args: Any) -> dict[str, str]:
    return dict(to_dsn(value, "SOURCE", connect_args).params)


def refusal(value: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        to_dsn(value, "SOURCE")
    return str(caught.value)


# -- notations


@pytest.mark.parametrize(
    "scheme",
    ["postgres", "postgresql", "postgresql+psycopg2", "postgresql+psycopg", "postgresql+asyncpg", "postgresql+pg8000"],
)
def test_schemes(scheme: str) -> None:
    expected = {"user": "u", "password": "p", "host": "h", "port": "5433", "dbname": "d"}
    assert params(f"{scheme}://u:p@h:5433/d") == expected
    assert params(f"  {scheme}://u:p@h:5433/d\n") == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://", {}),
        ("postgresql:///d", {"dbname": "d"}),
        ("postgresql://h", {"host": "h"}),
        ("postgresql://u@h/d", {"user": "u", "host": "h", "dbname": "d"}),
        ("postgresql://u%40corp:p%2Fq@h/d%20b", {"user": "u@corp", "password": "p/q", "host": "h", "dbname": "d b"}),
        ("postgresql://me@corp:p@h/d", {"user": "me@corp", "password": "p", "host": "h", "dbname": "d"}),
        ("postgresql://[::1]:5433/d", {"host": "::1", "port": "5433", "dbname": "d"}),
        ("postgresql://[2001:db8::1]/d", {"host": "2001:db8::1", "dbname": "d"}),
        ("postgresql://h/d?sslmode=require", {"host": "h", "dbname": "d", "sslmode": "require"}),
        ("postgresql://h/d?ssl=true", {"host": "h", "dbname": "d", "sslmode": "require"}),
        ("postgresql+asyncpg://h/d?ssl=verify-full", {"host": "h", "dbname": "d", "sslmode": "verify-full"}),
        ("postgresql+asyncpg://h/d?prepared_statement_cache_size=0", {"host": "h", "dbname": "d"}),
        ("postgresql://h:5433/d?user=me@corp&password=p", {
            "host": "h", "port": "5433", "dbname": "d", "user": "me@corp", "password": "p"}),
        ("postgresql://h/d?options=-c%20search_path%3Dx&application_name=shop", {
            "host": "h", "dbname": "d", "options": "-c search_path=x", "application_name": "shop"}),
        # sockets
        ("postgresql://%2Fvar%2Frun/d", {"host": "/var/run", "dbname": "d"}),
        ("postgresql://u:p@/d?host=/var/run", {"user": "u", "password": "p", "host": "/var/run", "dbname": "d"}),
        ("postgresql:///d?host=/cloudsql/a:b:c", {"host": "/cloudsql/a:b:c", "dbname": "d"}),
        # several hosts, libpq's way
        ("postgresql://a,b/d", {"host": "a,b", "dbname": "d"}),
        ("postgresql://u:p@a:1,b:2/d?target_session_attrs=primary", {
            "user": "u", "password": "p", "host": "a,b", "port": "1,2", "dbname": "d",
            "target_session_attrs": "primary"}),
        ("postgresql://a,b:2,[::1]:3/d", {"host": "a,b,::1", "port": ",2,3", "dbname": "d"}),
        # and SQLAlchemy's
        ("postgresql+psycopg2://u:p@/d?host=a:1&host=b:2", {
            "user": "u", "password": "p", "host": "a,b", "port": "1,2", "dbname": "d"}),
        ("postgresql+psycopg2://u@/d?host=a&host=b", {"user": "u", "host": "a,b", "dbname": "d"}),
        ("postgresql+psycopg2://u@/d?host=a,b&port=1,2", {"user": "u", "host": "a,b", "port": "1,2", "dbname": "d"}),
        ("postgresql+psycopg2://u@/d?host=[::1]:1&host=::2", {
            "user": "u", "host": "::1,::2", "port": "1,", "dbname": "d"}),
        # libpq's own strings
        ("host=h dbname=d user=u password=p", {"host": "h", "dbname": "d", "user": "u", "password": "p"}),
        ("dbname = 'a b' password='x://y'", {"dbname": "a b", "password": "x://y"}),
        ("service=shop", {"service": "shop"}),
    ],
)  # fmt: skip
def test_urls_and_strings(url: str, expected: dict[str, str]) -> None:
    assert is_postgres(url)
    assert params(url) == expected


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@example(AWKWARD_PASSWORD)
def test_any_password_in_a_url_object_arrives(password: str) -> None:
    url = URL.create("postgresql+psycopg2", "me@corp", password, "::1", 5433, "a b/%")
    expected = {"user": "me@corp", "password": password, "host": "::1", "port": "5433", "dbname": "a b/%"}
    assert params(url) == {key: value for key, value in expected.items() if value}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@example(AWKWARD_PASSWORD)
def test_any_percent_encoded_password_arrives(password: str) -> None:
    url = f"postgresql://u:{quote(password, safe='')}@h/d"
    expected = {"user": "u", "password": password, "host": "h", "dbname": "d"}
    assert params(url) == expected == parse_dsn(url)


@pytest.mark.parametrize("password", ["pa/ss", "pa@ss", "p:a/s@s", "5/x", "5432/x@y", "a#b", "100%", "é ü"])
def test_a_password_that_sqlalchemy_takes_without_encoding_is_taken_too(password: str) -> None:
    assert params(f"postgresql+psycopg2://u:{password}@h:1/d") == {
        "user": "u", "password": password, "host": "h", "port": "1", "dbname": "d",
    }  # fmt: skip


def test_url_objects_with_several_hosts() -> None:
    url = make_url("postgresql+psycopg2://u:p@/d?host=a:1&host=b:2&sslmode=require")
    expected = {"user": "u", "password": "p", "host": "a,b", "port": "1,2", "dbname": "d", "sslmode": "require"}
    assert params(url) == expected


def test_connect_args_of_sqlalchemy() -> None:
    found = params(
        "postgresql+psycopg2://u:p@h/d", sslmode="require", keepalives=1, password="q", database="e", port=5433,
        sslrootcert=None, cursor_factory=object(), async_=True, dsn="host=x", statement_cache_size=0,
    )  # fmt: skip
    assert found == {
        "user": "u", "password": "q", "host": "h", "port": "5433", "dbname": "e", "sslmode": "require",
        "keepalives": "1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "mode"), [(True, "require"), ("verify-full", "verify-full"), (False, "disable"), (None, None)]
)
def test_connect_args_of_asyncpg(value: object, mode: str | None) -> None:
    assert params("postgresql+asyncpg://h/d", ssl=value).get("sslmode") == mode


def test_an_ssl_context_means_no_connection_without_ssl() -> None:
    assert params("postgresql+asyncpg://h/d", ssl=ssl.create_default_context())["sslmode"] == "require"


# -- what is refused, and how


@pytest.mark.parametrize(
    ("url", "connect_args", "name"),
    [
        ("postgresql+pg8000://u:hunter2@/d", {"unix_sock": "/run/postgresql/.s.PGSQL.5433"}, "unix_sock"),
        ("postgresql+pg8000://u:hunter2@/d?unix_sock=/run/postgresql/.s.PGSQL.5433", {}, "unix_sock"),
        ("postgresql+asyncpg://u:hunter2@h/d", {"direct_tls": True}, "direct_tls"),
        ("postgresql+psycopg2://u:hunter2@h/d", {"sslmod": "require"}, "sslmod"),
    ],
)
def test_an_option_that_libpq_does_not_have_is_never_dropped(url: str, connect_args: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        params(url, **connect_args)
    assert f"libpq has no option '{name}'" in str(raised.value) and "SSE_DATABASE_URL" in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg2"])
def test_what_drivers_do_with_a_connection_is_not_for_libpq(driver: str) -> None:
    found = params(f"postgresql+{driver}://h/d", server_settings={"jit": "off"}, command_timeout=5, autocommit=True)
    assert found == {"host": "h", "dbname": "d"}
    assert params("postgresql+pg8000://h/d", ssl_context=object())["sslmode"] == "require"


@pytest.mark.parametrize(
    ("value", "engine"),
    [("sqlite:///app.db", "sqlite"), ("sqlite://", "sqlite"), ("mysql+pymysql://u:hunter2@h/d", "mysql"),
     (URL.create("sqlite", database="app.db"), "sqlite"), ("oracle://u:hunter2@h/x=1", "oracle")],
)  # fmt: skip
def test_another_engine_is_named(value: object, engine: str) -> None:
    assert not is_postgres(value)
    with pytest.raises(DatabaseNotConfigured, match=rf"SOURCE .*\({engine}://…\)") as caught:
        to_dsn(value, "SOURCE")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["hunter2", "hunter2://x", "hunter2:hunter2@h", "u:hunter2@h/d", ":hunter2", "hunter2.x-y"]
)
def test_garbage_is_not_repeated(value: str) -> None:
    with pytest.raises(DatabaseNotConfigured) as caught:
        to_dsn(value, "SOURCE")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "hunter2=", "password=hunter2 hunter2", "password='hunter2", "host=h pass=x hunter2=1",
        "user=u password=hunter2 =",
        "postgresql://u:hunter2@h:x/d", "postgresql://u:hunter2@h/d?nonsense=1", "postgresql://u:hunter2@[::1/d",
        "postgresql://u:hunter2@a:b:c/d", "postgresql://u:p?hunter2@h/d", "postgresql://u:1?hunter2=1@h/d",
        "postgresql://u:hunter2?x=1@h/d", "postgresql://u:hunter2@h/d?port=x", "postgresql://u:hunter2@h/\0",
        "postgresql://u:hunter2\ud800@h/d", "postgresql+asyncpg://u:hunter2?x@h/d",
    ],
)  # fmt: skip
def test_what_libpq_cannot_read_is_refused_without_the_password(value: str) -> None:
    message = refusal(value)
    assert "SOURCE" in message
    assert "postgresql://user:password@host" in message
    assert "hunter2" not in message


def test_a_misspelt_option_is_named() -> None:
    assert "'sslmodee'" in refusal("postgresql+psycopg2://u:p@h/d?sslmodee=require")


@given(
    st.sampled_from(["postgresql://", "postgres://", "postgresql+asyncpg://", "host=h password=", "mysql://", ""]),
    st.text("u@/:?#%&=' ,[]1x", max_size=6),
    st.text("@/:?#%&=' ,[]12", max_size=6),
)
def test_whatever_is_configured_no_piece_of_a_password_is_shown(scheme: str, before: str, after: str) -> None:
    """The secret stands behind `user:` or `password=`, where people put it; what surrounds it is broken in any way."""
    assume("?" not in after and "?" not in before)
    user = "" if scheme.startswith("host") else "user:"
    value = f"{scheme}{user}{before}SECRET{after}" + ("" if scheme.startswith("host") else "@localhost/db")
    try:
        dsn = to_dsn(value, "SOURCE")
    except ConfigurationError as error:
        assert "SECRET" not in str(error)
    else:
        assert "SECRET" not in f"{dsn} {dsn!r} {dsn.host}"


def test_a_dsn_shows_where_it_leads_and_nothing_else() -> None:
    dsn = to_dsn("postgresql://user:hunter2@db.example.org:5433/shop?sslpassword=hunter2", "SOURCE")
    assert str(dsn) == "db.example.org:5433, database shop"
    assert "hunter2" not in repr(dsn)
    assert str(Dsn("x", {})) == "local socket, database (default)"


@pytest.mark.parametrize(
    ("url", "uses"),
    [
        ("postgresql+psycopg2://u:p@h/d", True),
        ("postgresql+psycopg://u:p@h/d", False),
        ("sqlite://", False),
        ("postgresql://u:p@h:port/d", False),
        ("nosuch://h/d", False),
        ("no URL", False),
    ],
)
def test_which_url_has_sqlalchemy_take_psycopg2(url: str, uses: bool) -> None:
    """Some it cannot read, and the app may give the package another URL."""
    assert uses_psycopg2(url) is uses


def test_sqlalchemy_14_is_asked_for_its_driver_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("sqlalchemy.make_url")
    assert uses_psycopg2("postgresql+psycopg2://u:p@h/d")
