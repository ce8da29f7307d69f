"""Text of any language: different names stay different, and no cell is a formula."""

from hypothesis import given
from hypothesis import strategies as st

from facepipe.text import escape_undecodable, protect_cell, restore_cell


@given(st.binary(), st.binary())
def test_names_that_are_not_utf8_stay_different(left: bytes, right: bytes) -> None:
    texts = [escape_undecodable(name.decode("utf-8", "surrogateescape")) for name in (left, right)]
    # A name that holds % may read like the escapes of another.
    if b"%" not in left + right:
        assert (texts[0] == texts[1]) == (left == right)


@given(st.text("'=+-@\t\r\n\uff1da ") | st.text())
def test_no_cell_is_a_formula_and_all_read_back(text: str) -> None:
    cell = protect_cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"))
    assert restore_cell(cell) == text
