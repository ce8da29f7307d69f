"""The table that duplicates are looked for in: all images of one gallery or of two, with or without a face."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.graph.nodes import Nodes
from facepipe.gallery import Gallery
from facepipe.types import Int64

COLUMNS = (
    *("face_id", "image_id", "uri", "source", "identity", "image_hash", "width", "height", "face_index", "sharpness"),
    *("face_px", "ingested_at", "fingerprint"),
)
SIZE = r"^(?P<size>\d{1,18})-"


def gather(galleries: Sequence[Gallery], nodes: Nodes) -> tuple[pa.Table, Int64]:
    """(the images' rows, their faces' rows included, with `side` and `file_size`; the row (n,) of each node)."""
    parts, row_of_node, rows = [], np.full(len(nodes), -1, np.int64), 0
    for side, gallery in enumerate(galleries):
        table = gallery.to_arrow(COLUMNS)
        faces = np.flatnonzero(table["face_id"].is_valid())
        at = nodes.find(table["face_id"].drop_null().to_numpy(), side)
        row_of_node[at[at >= 0]] = rows + faces[at >= 0]
        size = pc.struct_field(pc.extract_regex(table["fingerprint"], SIZE), "size").cast(pa.int64())
        table = table.drop_columns("fingerprint").append_column("file_size", size)
        parts.append(table.append_column("side", pa.array(np.full(table.num_rows, side, np.int8))))
        rows += table.num_rows
    return pa.concat_tables(parts), row_of_node
