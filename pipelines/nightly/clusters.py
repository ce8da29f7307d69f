"""Whether a night can put new faces into clusters, asked before it tries: no run is then recorded as failed."""

import os

import pyarrow.parquet as pq

from facepipe.curation.clusters import tables
from facepipe.errors import EvaluationError
from facepipe.gallery import Gallery
from facepipe.storage.store import open_store
from pipelines import cluster
from pipelines.runtime.workspace import locate_reports


def explain_no_clusters(gallery: str) -> str:
    """Return why new faces cannot be assigned, or "" if they can."""
    table = Gallery(gallery)
    if os.path.isdir(os.path.join(locate_reports(table), f"{cluster.NAME}.old")):  # a run stopped between two renames
        return ""
    try:
        tables.read_cluster_table(table.path, tables.CLUSTERS, ["cluster"])
    except EvaluationError:
        return f'no clusters yet: run `facepipe cluster {gallery}` once, or set night.clusters = "make"'
    return ""


def count_clusters(gallery: str) -> int:
    """Count the clusters that new faces can be assigned to."""
    path = open_store(gallery, f"reports/{cluster.NAME}").local_path(tables.CLUSTERS)
    return pq.read_metadata(path).num_rows if os.path.exists(path) else 0
