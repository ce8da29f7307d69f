"""Text of any language: escapes for bytes that are not UTF-8, and cells of CSV files that are no formulas."""

import re

# Half a surrogate pair: what Python makes of a byte that is not UTF-8, or what a JSON file may hold.
_SURROGATE = re.compile("[\ud800-\udfff]")
# What a spreadsheet takes for a formula. Some take the wide forms of these characters, or skip white space.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def escape_undecodable(text: str) -> str:
    """Return a text with %-escapes in place of bytes that are not UTF-8, so that different names stay different."""
    if text.isascii():
        return text
    return _SURROGATE.sub(lambda match: _escape_surrogate(match[0]), text)


def _escape_surrogate(character: str) -> str:
    code = ord(character)
    # Python decodes the bytes 80 to FF to U+DC80 to U+DCFF.
    data = bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else character.encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in data)


def protect_cell(text: str) -> str:
    """Return a cell of a CSV file that a spreadsheet takes for text: a `'` stands before what would be a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def restore_cell(cell: str) -> str:
    """Return the text that `protect_cell` made a cell of."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
