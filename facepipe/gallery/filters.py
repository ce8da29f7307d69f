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
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a.isin(b),
    ast.NotIn: lambda a, b: ~a.isin(b),
}


def parse_filter(text: str) -> ds.Expression:
    """`status = 'ok' and (det_score > 0.9 or identity is null)` as a pyarrow expression."""
    # Words are rewritten outside of quotes only.
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text)
    python = "".join(part if n % 2 else _as_python(part) for n, part in enumerate(parts))
    try:
        body = ast.parse(python.strip(), mode="eval").body
        if isinstance(body, ast.Name):
            raise ValueError("a column alone is no condition")
        return _node(body)
    except (SyntaxError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise ConfigError(
            f"cannot read the filter {text!r}: write for example \"status = 'ok' and det_score > 0.9\""
        ) from error


def _as_python(text: str) -> str:
    text = re.sub(r"\bis\s+not\s+null\b", "!= None", text, flags=re.IGNORECASE)
    text = re.sub(r"\bis\s+null\b", "== None", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<![<>=!])=(?!=)", "==", text).replace("<>", "!=")
    return re.sub(r"\b(AND|OR|NOT|IN)\b", lambda word: word[0].lower(), text)


def _constant(value: Any, column: str) -> Any:
    """A constant, or several, of the column's type; text becomes a time where the column holds times."""
    kind = FACES.field(column).type
    if isinstance(value, list | tuple | set):
        return pa.array([_constant(v, column).as_py() for v in value], kind)
    if pa.types.is_timestamp(kind):
        value = datetime.fromisoformat(value)
        value = value if value.tzinfo else value.replace(tzinfo=UTC)
    return pa.scalar(value, kind)


def _node(node: ast.AST) -> Any:
    match node:
        case ast.BoolOp(op=op, values=values):
            result = _node(values[0])
            for value in values[1:]:
                result = result & _node(value) if isinstance(op, ast.And) else result | _node(value)
            return result
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_node(operand)
        case ast.Compare(left=left, ops=[op], comparators=[ast.Constant(value=None)]):
            return _node(left).is_null() if isinstance(op, ast.Eq) else _node(left).is_valid()
        case ast.Compare(left=ast.Name(id=name) as left, ops=[op], comparators=[right]):
            value = ast.literal_eval(right)
            several = isinstance(op, ast.In | ast.NotIn)
            return _COMPARE[type(op)](
                _node(left), _constant([value] if several and isinstance(value, str) else value, name)
            )
        case ast.Name(id=name):
            if name not in FACES.names:
                raise ConfigError(f"no column {name!r} in the filter; columns are {', '.join(FACES.names)}")
            return ds.field(name)
        case _:
            raise ValueError(ast.dump(node))
