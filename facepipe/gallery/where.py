"""Filters written as text: comparisons of columns with constants, joined by and, or, not and brackets."""

import ast
import re
from typing import Any

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
    ast.In: lambda a, b: a.isin(list(b)),
    ast.NotIn: lambda a, b: ~a.isin(list(b)),
}


def parse(text: str) -> ds.Expression:
    """`status = 'ok' and (det_score > 0.9 or identity is null)` as a pyarrow expression."""
    python = re.sub(r"\bis\s+not\s+null\b", "!= None", text, flags=re.IGNORECASE)
    python = re.sub(r"\bis\s+null\b", "== None", python, flags=re.IGNORECASE)
    python = re.sub(r"(?<![<>=!])=(?!=)", "==", python).replace("<>", "!=")
    python = re.sub(r"\b(AND|OR|NOT|IN)\b", lambda word: word[0].lower(), python)
    try:
        return _node(ast.parse(python.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"cannot read the filter {text!r}: write for example \"status = 'ok' and det_score > 0.9\""
        ) from error


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
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _COMPARE[type(op)](_node(left), ast.literal_eval(right))
        case ast.Name(id=name):
            if name not in FACES.names:
                raise ConfigError(f"no column {name!r} in the filter; columns are {', '.join(FACES.names)}")
            return ds.field(name)
        case _:
            raise ValueError(ast.dump(node))
