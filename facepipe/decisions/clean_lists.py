"""Decisions that `facepipe clean` has made, above a certainty that somebody states, as decisions of a person."""

from collections.abc import Collection, Mapping
from typing import Any

from facepipe.decisions.schema import IS, IS_NOT

WHO = "facepipe clean"
"""Who has decided, for decisions of a program that nobody has looked at."""
FOLDER = "reports/clean"
TABLE = "decisions.parquet"

_RELABEL = "relabel"
_OUTLIER = "outlier"


def is_clean_list(columns: Collection[str]) -> bool:
    """Tell by its columns whether a list is relabel.csv or decisions.parquet of `facepipe clean`."""
    return {"suggested", "face_id", "identity"} <= set(columns)


def read_clean_row(values: Mapping[str, Any], at_least: float | None) -> dict[str, Any] | str | None:
    """Make a decision of a row of such a list.

    `relabel` becomes *is* the suggested person, and `outlier` *is not* the label's person. The other rows change no
    label, or do not say who it is.

    Args:
        values: the row. `probability` is that of relabel.csv.
        at_least: only rows of at least this probability; all by default.

    Returns:
        A row as `add_decisions` takes it; None if the row decides nothing; a text that says why it cannot be used.
    """
    kind = values.get("decision")
    if kind not in (_RELABEL, _OUTLIER):
        return None
    names = ("suggested_probability", "probability") if kind == _RELABEL else ("noise",)
    text = next((values[name] for name in names if values.get(name) is not None), None)
    try:
        probability = None if text in (None, "") else float(text)
    except (TypeError, ValueError):
        return f"probability {str(text)[:40]!r} is not a number"
    if at_least is not None and (probability is None or not probability >= at_least):
        return None
    return {
        "decision": IS if kind == _RELABEL else IS_NOT,
        "face_id": values.get("face_id"),
        "person": values.get("suggested" if kind == _RELABEL else "identity"),
        "who": WHO,
        "why": "clean" if probability is None else f"clean: probability {probability:.4f}",
    }
