"""Channel names: their limits in bytes, and their names in PostgreSQL."""

from __future__ import annotations

import enum
import unicodedata
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flask_pg_sse.channels import RESERVED_PREFIX, check_channel
from flask_pg_sse.engine.postgres.codec import pg_name
from flask_pg_sse.errors import InvalidChannel

plain = st.characters(exclude_categories=["Cc", "Cs"])


@pytest.mark.parametrize("char", ["a", "é", "€", "😀"])
def test_a_name_has_1_to_255_bytes_of_utf_8(char: str) -> None:
    width = len(char.encode())
    longest = char * (255 // width) + "x" * (255 % width)
    assert check_channel(longest) == longest
    with pytest.raises(InvalidChannel, match="256"):
        check_channel(longest + "x")
    assert check_channel(char) == char
    with pytest.raises(InvalidChannel, match="1 to 255"):
        check_channel("")


def test_every_control_character_is_refused_wherever_it_stands() -> None:
    controls = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Cc"]
    assert len(controls) == 32 + 1 + 32  # C0, DEL, C1
    for char in controls:
        for name in (char, f"{char}a", f"a{char}", f"a{char}b"):
            with pytest.raises(InvalidChannel, match="control"):
                check_channel(name)


@pytest.mark.parametrize("name", ["\ud800", "a\udfff", "\ud83d\ude00"])
def test_surrogates_are_refused(name: str) -> None:
    with pytest.raises(InvalidChannel, match="surrogate"):
        check_channel(name)


@pytest.mark.parametrize("name", ["flask_pg_sse", "flask_pg_sse.control", "flask_pg_sse:" + "0" * 40, "flask_pg_ssex"])
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidChannel, match="reserved"):
        check_channel(name)


@pytest.mark.parametrize("name", ["flask_pg_ss", "Flask_pg_sse", " flask_pg_sse", "x flask_pg_sse", "ﬂask_pg_sse"])
def test_names_that_only_look_reserved_are_allowed(name: str) -> None:
    assert check_channel(name) == name


@pytest.mark.parametrize("name", [None, 5, b"orders", ["orders"], ("a",), True])
def test_only_strings_are_names(name: Any) -> None:
    with pytest.raises(InvalidChannel, match=type(name).__name__):
        check_channel(name)


class Channel(str, enum.Enum):
    ORDERS = "orders"


def test_a_member_of_an_enumeration_is_the_text_it_holds() -> None:
    name = check_channel(Channel.ORDERS)
    assert (type(name), f"{name}") == (str, "orders")


@given(st.text(plain, min_size=1, max_size=255))
def test_names_of_63_bytes_stand_as_they_are_and_longer_ones_under_a_hash(name: str) -> None:
    size = len(name.encode())
    assume(size <= 255 and not name.startswith(RESERVED_PREFIX))
    check_channel(name)
    known_as = pg_name(name)
    assert len(known_as.encode()) <= 63
    assert (known_as == name) == (size <= 63)


@pytest.mark.parametrize("char", ["a", "é", "€", "😀"])
def test_the_border_lies_between_63_and_64_bytes(char: str) -> None:
    width = len(char.encode())
    name = char * (63 // width) + "x" * (63 % width)
    assert pg_name(name) == name
    assert pg_name(name + "x").startswith(RESERVED_PREFIX)


@given(st.text(plain, min_size=64, max_size=255))
def test_no_legal_name_is_that_of_a_hash(name: str) -> None:
    hashed = pg_name(name)
    with pytest.raises(InvalidChannel, match="reserved"):
        check_channel(hashed)
    # Names that PostgreSQL would cut to the same 63 bytes stay apart.
    assert pg_name(name + "x") != hashed
