"""The trained, empty index from which every shard starts: one clustering and one codebook for all of them."""

import os
import secrets
from collections.abc import Callable
from typing import Any

from facepipe.errors import ConfigError, StorageError
from facepipe.index.grid import grid
from facepipe.index.manifest import Template, digest
from facepipe.index.plan import Plan, open_factory
from facepipe.nearest.faiss_engine import faiss, train_on_gpus, write_index
from facepipe.types import Float32

_WARMING_UP = 39  # vectors a list below which faiss would print warnings: the plan has said so already


def train(sample: Float32, plan: Plan, say: Callable[[str], None] = lambda line: None) -> Any:
    """A trained, empty index from a sample (n, 128) of unit vectors.

    Centroids lie on the grid (facepipe.index.grid), so that lists do not depend on the batch. Runs k-means on GPUs
    where faiss-gpu finds any; `say` hears why not, where it does and they cannot be used.
    Raises ConfigError where there are fewer vectors than lists.
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
    return train_on_gpus(lambda clustering: _trained(sample, plan, clustering), ivf.d, say)


def _trained(sample: Float32, plan: Plan, clustering: Any) -> Any:
    """clustering: the index that k-means looks for centroids in; None for one on the CPU."""
    index = open_factory(plan.factory)
    ivf = faiss.try_extract_index_ivf(index)
    ivf.cp.min_points_per_centroid = min(_WARMING_UP, max(1, len(sample) // ivf.nlist))
    if clustering is not None:
        ivf.clustering_index = clustering
    try:
        index.train(sample)
    finally:
        ivf.clustering_index = None
        if clustering is not None:
            clustering.thisown = True  # the assignment took it over, and nobody else would free its memory on the GPUs
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
