"""The faces of named persons: who a face is that nobody has named, because its cluster has a name.

The cluster report lists them in a small table, which answers are read from.
"""

import io
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Int64

NAMED = "named.parquet"
NAMED_SCHEMA = pa.schema([("face_id", pa.int64()), ("person", pa.int64()), ("name", pa.string())])
_FOLDER = "reports/cluster"


@dataclass(frozen=True)
class NamedPersons:
    """Faces in clusters that have a name.

    Attributes:
        ids: Sorted ids of the faces, (n,).
        person: Ids of their persons, (n,).
        name: Names of these, (n,).
    """

    ids: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    person: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    name: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))

    @classmethod
    def load(cls, gallery: str) -> "NamedPersons":
        """Load them from the cluster report of a gallery; nobody if it has none, or has named nobody.

        Raises:
            StorageError: the table cannot be read.
        """
        path = storage.join(gallery, _FOLDER, NAMED)
        if not storage.file_exists(path):
            return cls()
        try:
            table = pq.read_table(io.BytesIO(storage.read(path)), schema=NAMED_SCHEMA).sort_by("face_id")
        except pa.ArrowException as error:
            raise StorageError(
                f"cannot read {path!r}: {str(error).splitlines()[0]}; run `facepipe cluster {gallery}` again"
            ) from error
        name = pa.concat_arrays([*table["name"].chunks, pa.array([], pa.string())])
        return cls(table["face_id"].to_numpy(), table["person"].to_numpy(), name)

    def find_names(self, ids: Int64) -> pa.Array:
        """Find the names of the persons of faces (m,); null for faces without one."""
        at = find_sorted(self.ids, ids)
        return self.name.take(pa.array(at, mask=at < 0))

    def find_persons(self, ids: Int64) -> pa.Array:
        """Find the ids of the persons of faces (m,); null for faces of nobody who has a name."""
        at = find_sorted(self.ids, ids)
        return pa.array(self.person, pa.int64()).take(pa.array(at, mask=at < 0))


def build_named_rows(ids: Int64, clusters: Int64, persons: pa.Table) -> pa.Table:
    """Build the rows of the table, by face id.

    Args:
        ids: ids of faces, (n,).
        clusters: numbers of their clusters, (n,).
        persons: rows of persons.parquet.
    """
    named = persons.select(["person", "cluster", "name"]).drop_null().sort_by("cluster")
    at = find_sorted(named["cluster"].to_numpy(), clusters)
    chosen = np.flatnonzero(at >= 0)
    rows = named.select(["person", "name"]).take(pa.array(at[chosen]))
    table = pa.table([pa.array(ids[chosen]), rows["person"], rows["name"]], schema=NAMED_SCHEMA)
    return table.sort_by("face_id")
