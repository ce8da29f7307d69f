"""How a label is written: one person is one text, whatever brought the label.

A label may come from a folder's name, a line of a list, a column of numbers, a JSON member or the command line. All of
them go through `format_label`, so that `1` in a list, the integer 1 and the float 1.0 in a table name the same person.
"""

import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LABEL_COLUMNS = (
    "identity",
    "label",
    "identity_id",
    "person",
    "person_id",
    "person_name",
    "subject",
    "subject_id",
    "class",
    "class_id",
    "class_name",
    "target",
    "celebrity",
)
"""Names of columns that hold labels, in lower case; of several that are there the first one counts."""

# Words that programs write for a value that is not there. Their case matters, because a person may be called Nan. Null
# and NA are names.
_ABSENT = frozenset({"nan", "NaN", "<NA>", "NaT", "None"})
# White space, and what fixed-length strings and marks of byte order leave at the ends of a text.
_MARGIN = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + "\ufeff\x00"
# Whole numbers as floats are printed: 7.0, 7.000000, 7., 7.000e+00 and Java's 7.0E0. 7e0 may be a hexadecimal number.
_WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0*")
_EXPONENT = re.compile(r"-?[0-9](?:\.[0-9]*[eE][+-]?|[eE][+-])[0-9]{1,3}")
# Larger floats are not whole numbers of a column of labels.
_MAX_WHOLE = 2.0**64


def format_label(value: object) -> str | None:
    r"""Write a label in the one way that the gallery has for it.

    Text is stripped, brought to Unicode's normal form C, and bytes that are not UTF-8 are written as `\xe9`. A whole
    number is written without a fraction, also if it is a float or the text of one. The result is a fixed point.

    Args:
        value: a text, bytes, a number, a date, a list of one label, or nothing.

    Returns:
        The label; None for null, NaN, an empty text, and a list that holds no or several labels.
    """
    # Unpack what holds one value: scalars of Arrow and NumPy, and lists of one label.
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, np.floating):
        # A float32 keeps its own shortest text: 0.1, and not 0.10000000149.
        value = float(value) if float(value).is_integer() else float(str(value))
    if isinstance(value, np.generic):
        value = value.tolist()
    if value is None or isinstance(value, dict | list | tuple):
        return None
    if isinstance(value, float):
        return _format_float(value)
    if isinstance(value, Decimal):
        return _format_text(format(value, "f"))
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return _format_text(value.decode("utf-8", "surrogateescape"))
    return _format_text(str(value))


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Sort labels: by their value if all are whole numbers, else as text."""
    distinct = set(labels)
    if all(label.isdecimal() and label.isascii() for label in distinct):
        return sorted(distinct, key=lambda label: (int(label), label))
    return sorted(distinct)


def find_label_column(names: Sequence[str]) -> str | None:
    """Find the column that holds labels by its name, in upper or lower case; None if none is known."""
    by_name = {name.lower(): name for name in reversed(names)}
    return next((by_name[column] for column in LABEL_COLUMNS if column in by_name), None)


def normalise_name(name: str) -> str:
    """Normalise a name for comparison: written as a label, in lower case, with spaces for `_`."""
    return (format_label(name) or name).replace("_", " ").strip().lower()


def format_labels(column: "pa.Array | pa.ChunkedArray", names: Sequence[str] | None = None) -> list[str | None]:
    """Write the labels of a column, as `format_label` does.

    Args:
        column: labels of any type.
        names: names of classes, if the column holds their numbers. A negative number is then no label.

    Returns:
        One label or None per row.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: Sequence[Any]
    if pa.types.is_floating(column.type) and column.type != pa.float64():
        values = list(column.to_numpy(zero_copy_only=False))
    else:
        values = column.to_pylist()
    labels = [format_label(value) for value in values]
    return labels if names is None else [_name_class(label, names) for label in labels]


def _name_class(label: str | None, names: Sequence[str]) -> str | None:
    """Return the name of a class from its number. A number beyond the names stays a number."""
    try:
        number = int(label or "-1")
    except ValueError:
        return label
    if number < 0:
        return None
    return format_label(names[number]) if number < len(names) else label


def _format_float(value: float) -> str | None:
    if math.isnan(value):
        return None
    is_whole = value.is_integer() and abs(value) < _MAX_WHOLE
    return str(int(value)) if is_whole else repr(value)


def _format_text(text: str) -> str | None:
    # Most labels are short and plain.
    if not text.isascii():
        text = unicodedata.normalize("NFC", _repair(text))
    text = text.strip(_MARGIN)
    if not text or text in _ABSENT:
        return None
    if match := _WHOLE_NUMBER.fullmatch(text):
        return "0" if match[1] == "-0" else match[1]
    if _EXPONENT.fullmatch(text):
        return _format_float(float(text))
    return text


def _repair(text: str) -> str:
    """Write bytes that are not UTF-8 as escapes. Names that differ in them stay different."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def list_label_forms(label: str) -> list[str]:
    """List the ways in which a table may hold a label that somebody typed; the gallery's own way comes first.

    A table of an older facepipe holds labels as their source had them: in another normal form, or as 1.0 for 1. Text in
    a mixture of normal forms is among them only if it was typed so.
    """
    typed = _repair(label)
    own = format_label(label) or unicodedata.normalize("NFC", typed)
    return list(dict.fromkeys([own, unicodedata.normalize("NFD", own), typed]))


def find_unnormalised(column: "pa.Array | pa.ChunkedArray") -> list[str]:
    """List the distinct labels of a string column that are not in Unicode's normal form C."""
    distinct = pc.unique(column).drop_null()
    others = distinct.filter(pc.invert(pc.string_is_ascii(distinct)))
    return [label for label in others.to_pylist() if not unicodedata.is_normalized("NFC", label)]


def normalise_labels(column: "pa.Array | pa.ChunkedArray") -> "pa.Array | pa.ChunkedArray":
    """Bring each label of a string column into normal form C; nulls stay, and so does a column that needs nothing."""
    if not find_unnormalised(column):
        return column
    labels = [None if label is None else unicodedata.normalize("NFC", label) for label in column.to_pylist()]
    array = pa.array(labels, pa.string())
    return pa.chunked_array([array]) if isinstance(column, pa.ChunkedArray) else array
