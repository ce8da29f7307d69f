"""What an erasure removes, and which columns or fields would reveal it.

The name of a column tells what it holds. So a label that is also one of facepipe's words ("keep", "12") removes nothing
of others.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from facepipe.types import Int64, UInt64

# Roles of columns: what their values are.
URIS = "uris"
NAMES = "names"
CONTENTS = "contents"
IDS = "ids"
ANY = "any"
# A column of another person's row that only compares with the erased: the row stays, without the value.
COMPARED = "nearest_identity"
# Patterns of column names, and their roles; the first one that matches counts.
_ROLES = (
    (re.compile(r"uri.*|kept_uri|path"), URIS),
    (re.compile(r"(nearest_)?identity.*|suggested|left|right"), NAMES),
    (re.compile(r"image_id.*"), CONTENTS),
    (re.compile(r"face_id.*|medoid"), IDS),
    (re.compile(r"decision|reason|kind|label|probability"), None),  # words and numbers that facepipe defines
)


@dataclass(frozen=True)
class ErasedData:
    """What must not be left.

    Attributes:
        uris: uris of the erased images.
        names: labels that no other image has.
        contents: image ids.
        faces: sorted face ids.
        marks: sorted marks of the vectors (`facepipe.erasure.selection.compute_marks`).
    """

    uris: frozenset[str]
    names: frozenset[str]
    contents: frozenset[str]
    faces: Int64
    marks: UInt64

    @cached_property
    def by_role(self) -> dict[str, frozenset[str]]:
        """Texts that reveal erased data, by the role of the column."""
        # Lists and pages hold ids as text.
        ids = frozenset(map(str, self.faces.tolist()))
        return {
            URIS: self.uris,
            NAMES: self.names,
            CONTENTS: self.contents,
            IDS: ids,
            # In an unknown column any text counts, but no id: a number may be anything.
            ANY: self.uris | self.names | self.contents,
        }

    @cached_property
    def arrays(self) -> dict[str, pa.Array]:
        """The same as Arrow arrays; ids are numbers."""
        arrays = {role: pa.array(sorted(values), pa.string()) for role, values in self.by_role.items() if role != IDS}
        arrays[IDS] = pa.array(self.faces)
        return arrays


def find_role(column: str) -> str | None:
    """Find what a column or a field of a list holds; None if it cannot reveal anybody."""
    for pattern, role in _ROLES:
        if pattern.fullmatch(column):
            return role
    return ANY
