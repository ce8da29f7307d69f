"""What people have decided about faces: a table of the gallery that every later run reads.

    decisions = read_decisions(gallery)                 # the active ones, with the faces that they mean now
    decisions.same_pairs                                # (m, 2) face ids that are one person
    add_decisions(gallery, [{"decision": "is", "face_id": "17", "person": "Ann"}], who="me")

The modules:

    schema      the columns, and the kinds of decisions
    table       the Delta table GALLERY/decisions: reading, appending, joining small files
    rows        rows as people write them, checked value by value
    resolve     which face of the gallery a row means
    undo        which rows are active
    conflicts   decisions that contradict each other
    add         checks and appends rows
    read        what the other parts of facepipe read
    files, clean_lists, folders   rows from files, from lists of `clean`, from a folder sorted by hand
    apply       all of these into a gallery
    export      all decisions as a file
"""

from facepipe.decisions.add import AddSummary, add_decisions, undo_decisions
from facepipe.decisions.conflicts import Conflict, find_conflicts
from facepipe.decisions.read import Decisions, read_decisions
from facepipe.decisions.schema import (
    DIFFERENT_FROM,
    IGNORE,
    IS,
    IS_NOT,
    KEEP,
    KINDS,
    NOT_A_FACE,
    SAME_AS,
    UNDO,
)

__all__ = [
    "DIFFERENT_FROM",
    "IGNORE",
    "IS",
    "IS_NOT",
    "KEEP",
    "KINDS",
    "NOT_A_FACE",
    "SAME_AS",
    "UNDO",
    "AddSummary",
    "Conflict",
    "Decisions",
    "add_decisions",
    "find_conflicts",
    "read_decisions",
    "undo_decisions",
]
