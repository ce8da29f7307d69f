"""Clusters as tables: one row a face, one a cluster, one a suspicion. Cluster ids are numbered by falling size."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.curation.graph.linkage import Clusters
from facepipe.curation.graph.nodes import Nodes
from facepipe.errors import EvaluationError, StorageError
from facepipe.gallery import Gallery
from facepipe.storage.store import open_store
from facepipe.types import Bool, Float32, Int64

FACES, CLUSTERS, MERGES, SPLITS, CENTRES = (
    *("faces.parquet", "clusters.parquet", "merges.parquet", "splits.parquet"),
    "centres.parquet",
)
FACE_ROWS = pa.schema(
    [
        ("face_id", pa.int64()),
        ("uri", pa.string()),
        ("identity", pa.string()),
        ("cluster", pa.int64()),
        ("size", pa.int64()),
        ("fit", pa.float32()),  # mean similarity to the rest of the cluster; null for a face that is alone
        ("medoid", pa.bool_()),
    ]
)
_ROWS = 65536


def by_size(labels: Int64, clusters: Clusters) -> Int64:
    """(k,) the id of each cluster: 0 for the largest; of equal ones the one with the first face."""
    order = np.lexsort((np.arange(len(clusters)), -clusters.size))
    ids = np.empty(len(clusters), np.int64)
    ids[order] = np.arange(len(order))
    return ids


def face_rows(
    gallery: Gallery, nodes: Nodes, cluster: Int64, size: Int64, fits: Float32, medoid: Bool
) -> Iterator[pa.Table]:
    """Rows of faces.parquet, in the gallery's order; arrays (n,) are by node."""
    for batch in gallery.batches(["face_id", "uri", "identity"], rows=_ROWS):
        faces = pa.Table.from_batches([batch.filter(batch["face_id"].is_valid())])
        at = nodes.find(faces["face_id"].to_numpy())
        faces, at = faces.filter(pa.array(at >= 0)), at[at >= 0]
        columns = [
            *(faces["face_id"], faces["uri"], faces["identity"], pa.array(cluster[at]), pa.array(size[at])),
            *(pa.array(fits[at], mask=np.isnan(fits[at])), pa.array(medoid[at])),
        ]
        yield pa.table([pa.chunked_array([c]) if isinstance(c, pa.Array) else c for c in columns], schema=FACE_ROWS)


def read(gallery: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """A table of the gallery's cluster report."""
    store = open_store(gallery, "reports/cluster")
    store.pull()
    path = store.local_path(name)
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError as error:
        raise EvaluationError(f"no clusters at {path!r}: `facepipe cluster {gallery}` makes them") from error
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error
