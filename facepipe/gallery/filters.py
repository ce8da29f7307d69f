"""Filters written as text: comparisons of columns with constants, joined by and, or, not and brackets."""

import ast
import re
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from facepipe.errors import ConfigError
from facepipe.schema import FACES

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
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text)
    python = "".join(part if n % 2 else _to_python(part) for n, part in enumerate(parts))
    try:
        body = ast.parse(python.strip(), mode="eval").body
        if isinstance(body, ast.Name):
            raise ValueError("a column alone is not a condition")
        return _to_expression(body)
    except (SyntaxError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise ConfigError(
            f"cannot read the filter {text!r}: write for example \"status = 'ok' and det_score > 0.9\""
        ) from error


def _to_python(text: str) -> str:
    """Rewrite the operators of SQL as those of Python."""
    text = re.sub(r"\bis\s+not\s+null\b", "!= None", text, flags=re.IGNORECASE)
    text = re.sub(r"\bis\s+null\b", "== None", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<![<>=!])=(?!=)", "==", text).replace("<>", "!=")
    return re.sub(r"\b(AND|OR|NOT|IN)\b", lambda word: word[0].lower(), text)


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
            return _COMPARE[type(op)](_to_expression(left), _to_constant(constant, name))
        case ast.Name(id=name):
            if name not in FACES.names:
                raise ConfigError(f"no column {name!r} in the filter; columns are {', '.join(FACES.names)}")
            return ds.field(name)
        case _:
            raise ValueError(ast.dump(node))
