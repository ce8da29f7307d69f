"""What Hugging Face's datasets write into the schema of a Parquet file: the kind of each column."""

import json
from typing import Any

import pyarrow as pa

_METADATA_KEY = b"huggingface"


def read_features(schema: pa.Schema) -> dict[str, Any]:
    """Read the description of each column, by its name; empty if there is none that can be read."""
    text = (schema.metadata or {}).get(_METADATA_KEY)
    try:
        features = json.loads(text or "{}")["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def list_image_columns(schema: pa.Schema) -> list[str]:
    """List the columns that hold images."""
    features = read_features(schema)
    return [name for name in schema.names if _get_type(features.get(name)) == "Image"]


def read_class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Read the names of the classes whose numbers a column holds; None if it is no column of classes."""
    feature = read_features(schema).get(column)
    # A list of classes is a list of one feature, or a feature that has one inside.
    while (isinstance(feature, list) and len(feature) == 1) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) and _get_type(feature) == "ClassLabel" else None
    return [str(name) for name in names] if isinstance(names, list) else None


def _get_type(feature: Any) -> Any:
    return feature.get("_type") if isinstance(feature, dict) else None
