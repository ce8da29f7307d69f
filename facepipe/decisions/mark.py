"""Which decisions a report respects: the version of their table, in a small file of the report."""

import json
import os

from facepipe.decisions.table import DecisionTable
from facepipe.storage import replace_file

DECIDED = "decided.json"


def save_decisions_mark(folder: str, version: int) -> None:
    """Note in a report's folder which version of the table of decisions it respects; nothing if there is none."""
    if version < 0:
        return
    with replace_file(os.path.join(folder, DECIDED)) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        json.dump({"version": version}, file)


def has_new_decisions(folder: str, gallery: str) -> bool:
    """Tell whether people have decided something since a report was made.

    Args:
        folder: local folder of the report.
        gallery: path or URL of the gallery.
    """
    try:
        with open(os.path.join(folder, DECIDED), encoding="utf-8") as file:
            version = int(json.load(file)["version"])
    except (OSError, ValueError, TypeError, KeyError):
        version = -1
    return DecisionTable(gallery).version != version
