"""The tables that travel between the steps of the search for duplicates, and what all steps know."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from facepipe.curation.duplicates.groups import GROUP_SCHEMA
from facepipe.curation.duplicates.images import read_faces
from facepipe.curation.duplicates.keep import DECISION_SCHEMA
from facepipe.curation.duplicates.pairs import (
    PAIR_SCHEMA,
)
from facepipe.curation.duplicates.rule import DuplicateRule
from facepipe.curation.graph.nodes import Nodes
from facepipe.decisions.persons import DecidedFaces
from facepipe.gallery import Gallery
from facepipe.nearest.similarity import Pairs
from facepipe.storage.spilled import SPILLED_ROWS
from facepipe.types import Float32

IMAGES = pa.schema([("uri", pa.string()), ("side", pa.int8()), ("image_id", pa.string())])
CONTENTS = pa.schema([("content", pa.uint64()), ("number", pa.int64())])
HASHED = pa.schema([("hash", pa.int64()), ("number", pa.int64()), ("has_face", pa.bool_()), ("shape", pa.float64())])
RANKED = pa.schema(
    [
        *HASHED,
        ("side", pa.int8()),
        ("standing", pa.int8()),
        ("pixels", pa.int64()),
        ("file_size", pa.int64()),
        ("sharpness", pa.float32()),
        ("ingested_at", pa.timestamp("us", "UTC")),
    ]
)
LOOKUPS = pa.schema([*HASHED, ("block", pa.int8()), ("is_turned", pa.bool_())])
LINKS = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("have_faces", pa.bool_())])
EDGES = pa.schema([("u", pa.int64()), ("v", pa.int64()), ("distance", pa.float32())])
NUMBER = ("number", pa.int64())
DECIDED = pa.schema([NUMBER, *(field for field in DECISION_SCHEMA if field.name not in IMAGES.names)])
PAIRS = pa.schema([("number_a", pa.int64()), ("number_b", pa.int64()), *PAIR_SCHEMA])
GROUPS = pa.schema([NUMBER, *(field for field in GROUP_SCHEMA if field.name != "group")])
KEPT = pa.schema([NUMBER, ("kept", pa.int64()), ("rank", pa.int64())])


@dataclass(frozen=True)
class CopySource:
    """The faces of one gallery or two, and their edges. Both are read in parts, and more than once.

    Attributes:
        read_faces: Reads rows as of `add_size_and_side`, with the column `node`, -1 for none.
        read_uris: Reads the uris of all rows.
        read_edges: Reads pairs of nodes. Those beyond the rule's radius do not count.
        vectors: Unit vectors of the nodes, (n, dim).
    """

    read_faces: Callable[[], Iterable[pa.Table]]
    read_uris: Callable[[], Iterable[pa.Array | pa.ChunkedArray]]
    read_edges: Callable[[], Iterable[Pairs]]
    vectors: Float32

    @classmethod
    def of_galleries(cls, galleries: Sequence[Gallery], nodes: Nodes, edges: Iterable[Pairs]) -> "CopySource":
        """Make it for galleries, whose positions are the sides of the nodes of their graph."""

        def read_uris() -> Iterator[pa.Array]:
            for gallery in galleries:
                for batch in gallery.batches(["uri"], rows=SPILLED_ROWS):
                    yield batch["uri"]

        return cls(lambda: read_faces(galleries, nodes), read_uris, lambda: edges, nodes.vectors)


@dataclass(frozen=True)
class CopySearch:
    """What all steps know.

    Attributes:
        rule: What counts as a duplicate, and which copy is kept.
        decided: What people have decided, of each side.
        side_count: Number of galleries that are compared.
        max_neighbours: Edges that a face can have.
        with_squashed: Whether pictures that were squashed are looked for.
    """

    rule: DuplicateRule
    decided: Sequence[DecidedFaces]
    side_count: int
    max_neighbours: int
    with_squashed: bool = True


def to_pairs(table: pa.Table) -> Pairs:
    """Convert a table of EDGES to pairs of nodes."""
    return Pairs(*(table[name].to_numpy() for name in EDGES.names))
