"""The trained, empty index from which every shard starts: one clustering and one codebook for all of them."""

import os
import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.errors import ConfigError, StorageError
from facepipe.index.engine import faiss, write_index
from facepipe.index.grid import grid
from facepipe.index.manifest import Template, digest
from facepipe.index.plan import Plan, open_factory

_WARMING_UP = 39  # vectors a list below which faiss would print warnings: the plan has said so already


def train(sample: npt.NDArray[np.float32], plan: Plan) -> Any:
    """A trained, empty index from a sample (n, 128) of unit vectors.

    Centroids lie on the grid (facepipe.index.grid), so that lists do not depend on the batch. Runs k-means on GPUs
    where faiss-gpu finds any. Raises ConfigError where there are fewer vectors than lists.
    """
    index = open_factory(plan.factory)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return index
    if len(sample) < ivf.nlist:
        raise ConfigError(
            f"{plan.factory} has {ivf.nlist} lists and needs as many vectors to train on; the gallery gives "
            f"{len(sample)}: choose fewer lists, or leave --factory out"
        )
    ivf.cp.min_points_per_centroid = min(_WARMING_UP, max(1, len(sample) // ivf.nlist))
    if hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0:
        ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
    index.train(sample)
    ivf.clustering_index = None
    centroids = grid(ivf.quantizer.reconstruct_n(0, ivf.nlist))
    ivf.quantizer.reset()
    ivf.quantizer.add(centroids)
    return index


def save(index: Any, folder: str, plan: Plan, seed: int, chosen: bool) -> Template:
    """Write a trained index; imbalance is set once the first shards are built."""
    name = f"template-{secrets.token_hex(6)}.faiss"
    path = os.path.join(folder, name)
    try:
        write_index(index, path)
    except (OSError, RuntimeError) as error:  # faiss reports a full disk as RuntimeError
        raise StorageError(f"cannot write {path!r}: {str(error).splitlines()[0]}") from error
    return Template(name, digest(path), plan.factory, plan.lists, plan.train, plan.vectors, 1.0, seed, chosen)
