"""Names of classes in the schema that Hugging Face's datasets write into Parquet files."""

import json
from typing import Any

import pyarrow as pa

_METADATA_KEY = b"huggingface"


def read_class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Read the names of the classes whose numbers a column holds; None if it is no column of classes."""
    text = (schema.metadata or {}).get(_METADATA_KEY)
    if text is None:
        return None
    try:
        feature: Any = json.loads(text)["info"]["features"][column]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    # A list of classes is a list of one feature, or a feature that has one inside.
    while (isinstance(feature, list) and len(feature) == 1) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    return [str(name) for name in names] if isinstance(names, list) else None
