"""The tables of a cluster report: one row per face, per cluster and per suspicion.

Clusters are numbered by falling size.
"""

import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.nodes import Nodes
from facepipe.errors import EvaluationError, StorageError
from facepipe.gallery import Gallery
from facepipe.storage.store import open_store
from facepipe.types import Bool, Float32, Int64

FACES = "faces.parquet"
CLUSTERS = "clusters.parquet"
MERGES = "merges.parquet"
SPLITS = "splits.parquet"
LEFT_OUT = "left_out.parquet"
FACE_SCHEMA = pa.schema(
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
LEFT_OUT_SCHEMA = pa.schema([("face_id", pa.int64())])  # faces that people ignore
_ROWS = 65536


def number_by_size(clusters: Clusters, is_left_out: Bool | None = None) -> Int64:
    """Assign numbers to clusters (k,) by falling size, from 0. Equal ones are ordered by their first face.

    Args:
        clusters: the clusters.
        is_left_out: whether a cluster holds what is left out, (k,). It gets the number -1.
    """
    order = np.lexsort((np.arange(len(clusters)), -clusters.size))
    if is_left_out is not None:
        order = order[~is_left_out[order]]
    numbers = np.full(len(clusters), -1, np.int64)
    numbers[order] = np.arange(len(order))
    return numbers


def read_highest_number(path: str) -> int:
    """Read the highest number in a table of clusters, those without faces included; -1 if there is no table."""
    try:
        numbers = pq.read_table(path, columns=["cluster"])["cluster"].to_numpy()
    except FileNotFoundError:
        return -1
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error
    return int(numbers.max(initial=-1))


def read_left_out(folder: str) -> Int64:
    """Read the sorted ids of the faces that a report leaves out; none if it has no such table."""
    path = os.path.join(folder, LEFT_OUT)
    try:
        return np.sort(pq.read_table(path)["face_id"].to_numpy())
    except FileNotFoundError:
        return np.empty(0, np.int64)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error


def build_face_rows(
    gallery: Gallery, nodes: Nodes, *, cluster: Int64, size: Int64, fits: Float32, is_medoid: Bool
) -> Iterator[pa.Table]:
    """Build the rows of faces.parquet: one row per face, in the gallery's order.

    Args:
        gallery: the gallery.
        nodes: n nodes.
        cluster: number of each node's cluster, (n,), -1 for a face that is left out.
        size: size of that cluster, (n,).
        fits: mean similarity to the rest of it, (n,), NaN for a face that is alone.
        is_medoid: whether the node is its medoid, (n,).
    """
    for batch in gallery.batches(["face_id", "uri", "identity"], rows=_ROWS):
        faces = pa.Table.from_batches([batch.filter(batch["face_id"].is_valid())])
        at = nodes.find(faces["face_id"].to_numpy())
        # Faces that are not in the graph have no cluster, and neither have those that are left out.
        has_cluster = at >= 0
        has_cluster[has_cluster] = cluster[at[has_cluster]] >= 0
        faces = faces.filter(pa.array(has_cluster))
        at = at[has_cluster]
        columns = {
            "face_id": faces["face_id"],
            "uri": faces["uri"],
            "identity": faces["identity"],
            "cluster": pa.array(cluster[at]),
            "size": pa.array(size[at]),
            "fit": pa.array(fits[at], mask=np.isnan(fits[at])),
            "medoid": pa.array(is_medoid[at]),
        }
        yield pa.table(columns, schema=FACE_SCHEMA)


def read_cluster_table(gallery: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read a table of a gallery's cluster report.

    Args:
        gallery: path of the gallery.
        name: file name of the table.
        columns: columns to read, all by default.

    Raises:
        EvaluationError: if there is no such table.
        StorageError: if it cannot be read.
    """
    # Fetch the report if it is kept in an object store.
    store = open_store(gallery, "reports/cluster")
    store.pull()
    path = store.local_path(name)
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError as error:
        raise EvaluationError(f"no clusters at {path!r}: run `facepipe cluster {gallery}` first") from error
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error
