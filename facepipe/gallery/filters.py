"""Filters written as text: comparisons of columns with constants, joined by and, or, not and brackets."""

import ast
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from facepipe.errors import ConfigError
from facepipe.schema import FACES
from facepipe.sources.labels import list_label_forms

_COMPARE: dict[type, Any] = {
    ast.Eq: lambda column, value: column == value,
    ast.NotEq: lambda column, value: column != value,
    ast.Lt: lambda column, value: column < value,
    ast.LtE: lambda column, value: column <= value,
    ast.Gt: lambda column, value: column > value,
    ast.GtE: lambda column, value: column >= value,
    ast.In: lambda column, value: column.isin(value),
    ast.NotIn: lambda column, value: ~column.isin(value),
}
# A text in quotation marks. A mark in it is doubled or has a backslash before it.
_QUOTED = re.compile(r"""('(?:[^'\\]|''|\\.)*'|"(?:[^"\\]|""|\\.)*")""", re.DOTALL)
_ESCAPED = r"""\\[\\'"]"""
_LONE_BACKSLASH = re.compile(rf"(?:[^\\]|{_ESCAPED})*\\(?!{_ESCAPED[2:]})", re.DOTALL)
_PREFIX = re.compile(r"\b[bfru]{1,2}$", re.IGNORECASE)


@dataclass(frozen=True)
class ColumnText:
    """A text that a filter compares a column with.

    Attributes:
        column: name of the column.
        text: the text.
    """

    column: str
    text: str


def to_filter(where: str | ds.Expression | None) -> ds.Expression | None:
    """Parse a filter that is text; return an expression or None as it is."""
    if where is None or isinstance(where, ds.Expression):
        return where
    return parse_filter(where)


def parse_filter(text: str) -> ds.Expression:
    """Parse text such as `status = 'ok' and (det_score > 0.9 or identity is null)` to a pyarrow expression.

    Raises:
        ConfigError: the text is not a filter, or names an unknown column.
    """
    # SQL's words become Python's, outside of quotes only. Every second part is a quoted text.
    parts = _QUOTED.split(text)
    _check_quotes(parts, text)
    python = "".join(repr(_unquote(part)) if n % 2 else _to_python(part) for n, part in enumerate(parts))
    try:
        body = ast.parse(python.strip(), mode="eval").body
        if isinstance(body, ast.Name):
            raise ValueError("a column alone is not a condition")
        return _to_expression(body)
    except (SyntaxError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise ConfigError(
            f"cannot read the filter {text!r}: write for example \"status = 'ok' and det_score > 0.9\". A filter knows "
            "= != < <= > >=, in (...), is null, is not null, and, or, not and brackets"
        ) from error


def list_texts(text: str) -> list[ColumnText]:
    """List the columns that a valid filter compares with texts for equality, and the texts."""
    parts = _QUOTED.split(text)
    python = "".join(repr(_unquote(part)) if n % 2 else _to_python(part) for n, part in enumerate(parts))
    texts = []
    for node in ast.walk(ast.parse(python.strip(), mode="eval")):
        match node:
            case ast.Compare(left=ast.Name(id=column), ops=[ast.Eq() | ast.In()], comparators=[right]):
                values = ast.literal_eval(right)
                values = [values] if isinstance(values, str) else values
                texts += [ColumnText(column, value) for value in values or () if isinstance(value, str)]
    return texts


def _check_quotes(parts: list[str], text: str) -> None:
    """Refuse what SQL and Python would read as different texts, so that no filter selects nothing without a word."""
    outside = parts[::2]
    if any("'" in part or '"' in part for part in outside):
        raise ConfigError(f"the filter {text!r} has a quotation mark without its partner")
    # Python would join two texts in a row, and give a letter before a text a meaning.
    has_neighbours = any(not part.strip() for part in outside[1:-1])
    if has_neighbours or any(_PREFIX.search(part) for part in outside[:-1]):
        raise ConfigError(
            f"the filter {text!r} has something other than an operator before a text: write name = 'text'"
        )
    for part in parts[1::2]:
        if _LONE_BACKSLASH.match(part):
            raise ConfigError(f"the filter {text!r} has a single backslash in the text {part}: write \\\\ for it")


def _unquote(part: str) -> str:
    """Return the text that a quoted part stands for: a doubled quotation mark is one, as in SQL."""
    mark = part[0]
    return re.sub(rf"{_ESCAPED}|{mark}{mark}", lambda match: match[0][-1], part[1:-1])


def _to_python(text: str) -> str:
    """Rewrite the operators of SQL as those of Python."""
    text = re.sub(r"\bis\s+not\s+null\b", "!= None", text, flags=re.IGNORECASE)
    text = re.sub(r"\bis\s+null\b", "== None", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<![<>=!])=(?!=)", "==", text).replace("<>", "!=")
    return re.sub(r"\b(AND|OR|NOT|IN)\b", lambda word: word[0].lower(), text)


def _compare_label(op: ast.cmpop, column: Any, value: Any) -> Any:
    """Compare labels in the form in which they are stored; an older table may hold other forms of the same label."""
    labels = [value] if isinstance(value, str) else value
    if not all(isinstance(label, str) for label in labels):
        raise TypeError("a label is a text")
    if isinstance(op, ast.In | ast.NotIn):
        forms = [form for label in labels for form in list_label_forms(label)]
        return _COMPARE[type(op)](column, _to_constant(forms, "identity"))
    forms = list_label_forms(value)
    if isinstance(op, ast.Eq) and len(forms) > 1:
        return column.isin(_to_constant(forms, "identity"))
    # No row has two forms, so all of them differ.
    result = _COMPARE[type(op)](column, _to_constant(forms[0], "identity"))
    for form in forms[1:] if isinstance(op, ast.NotEq) else []:
        result = result & (column != _to_constant(form, "identity"))
    return result


def _to_constant(value: Any, column: str) -> Any:
    """Convert a constant, or several, to the column's type; text becomes a time if the column holds times."""
    # Comparisons want both sides of the same type, so the constant takes the column's.
    kind = FACES.field(column).type
    if isinstance(value, list | tuple | set):
        return pa.array([_to_constant(item, column).as_py() for item in value], kind)
    if pa.types.is_timestamp(kind):
        value = datetime.fromisoformat(value)
        value = value if value.tzinfo else value.replace(tzinfo=UTC)
    return pa.scalar(value, kind)


def _to_expression(node: ast.AST) -> Any:
    """Convert a node of Python's syntax tree to a pyarrow expression. Raises ValueError for other syntax."""
    match node:
        case ast.BoolOp(op=op, values=values):
            result = _to_expression(values[0])
            for value in values[1:]:
                operand = _to_expression(value)
                result = result & operand if isinstance(op, ast.And) else result | operand
            return result
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_to_expression(operand)
        # A comparison with null becomes a test for null: null equals nothing, not even itself.
        case ast.Compare(left=left, ops=[op], comparators=[ast.Constant(value=None)]):
            column = _to_expression(left)
            return column.is_null() if isinstance(op, ast.Eq) else column.is_valid()
        case ast.Compare(left=ast.Name(id=name) as left, ops=[op], comparators=[right]):
            constant = ast.literal_eval(right)
            if isinstance(op, ast.In | ast.NotIn) and isinstance(constant, str):
                constant = [constant]  # `in ('a')` is a text in brackets for Python
            if name == "identity":
                return _compare_label(op, _to_expression(left), constant)
            return _COMPARE[type(op)](_to_expression(left), _to_constant(constant, name))
        case ast.Name(id=name):
            if name not in FACES.names:
                raise ConfigError(f"no column {name!r} in the filter; columns are {', '.join(FACES.names)}")
            return ds.field(name)
        case _:
            raise ValueError(ast.dump(node))
