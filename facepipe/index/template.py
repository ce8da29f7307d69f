"""The trained, empty index from which every shard starts: one clustering and one codebook for all of them."""

import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from facepipe.errors import ConfigError, IndexDamagedError, StorageError
from facepipe.index.centroids import settle_centroids
from facepipe.index.manifest import FileDigest, Template, compute_digest
from facepipe.index.plan import IndexPlan, open_factory
from facepipe.index.two_level import MIN_CENTROIDS, train_centroids
from facepipe.nearest.faiss_engine import faiss, train_on_gpus, write_index
from facepipe.storage.store import Store
from facepipe.types import Float32

_POINTS_PER_LIST_TO_WARN = 39  # below, faiss would print warnings; the plan has said so already


def train_template(sample: Float32, plan: IndexPlan, log: Callable[[str], None] = lambda line: None) -> Any:
    """Train an empty index.

    Centroids lie on the grid (facepipe.index.grid), so that lists do not depend on the batch. Each is the mean of many
    faces (facepipe.index.centroids). k-means runs on GPUs if faiss-gpu finds any. On CPUs it runs in two levels if
    there are many lists (facepipe.index.two_level).

    Args:
        sample: unit vectors (n, dim).
        plan: names the factory.
        log: is called with the reason if there are GPUs and they cannot be used.

    Raises:
        ConfigError: there are fewer vectors than lists.
    """
    index = open_factory(plan.factory, plan.dim)
    ivf = faiss.try_extract_index_ivf(index)
    # An exact index needs no training.
    if ivf is None:
        return index
    if len(sample) < ivf.nlist:
        raise ConfigError(
            f"{plan.factory} has {ivf.nlist} lists and needs as many vectors to train on; the gallery has "
            f"{len(sample)}: choose fewer lists, or omit --factory"
        )
    return train_on_gpus(lambda clustering_index: _train(sample, plan, clustering_index), ivf.d, log)


def _train(sample: Float32, plan: IndexPlan, clustering_index: Any) -> Any:
    """Train with the index in which k-means looks for centroids; None for one on the CPU."""
    index = open_factory(plan.factory, plan.dim)
    ivf = faiss.try_extract_index_ivf(index)
    ivf.cp.min_points_per_centroid = min(_POINTS_PER_LIST_TO_WARN, max(1, len(sample) // ivf.nlist))
    if clustering_index is not None:
        ivf.clustering_index = clustering_index
    elif ivf.nlist >= MIN_CENTROIDS and not isinstance(index, faiss.IndexPreTransform):
        # faiss trains no centroids if there are as many as lists.
        ivf.quantizer.add(train_centroids(np.ascontiguousarray(sample, np.float32), ivf.nlist))
    try:
        index.train(sample)
        # No centroid rests on few faces. All lie on the grid, on which distances are exact.
        settle_centroids(index, sample, clustering_index)
    finally:
        ivf.clustering_index = None
        if clustering_index is not None:
            # The assignment took over ownership. Without this the memory on the GPUs is never freed.
            clustering_index.thisown = True
    return index


def open_template(store: Store, template: Template) -> Any:
    """Open a trained, empty index.

    Raises:
        IndexDamagedError: it cannot be opened.
    """
    store.fetch(template.name, template.file.bytes, template.file.sha256)
    path = store.local_path(template.name)
    try:
        return faiss.read_index(path)
    except RuntimeError as error:
        raise IndexDamagedError(
            f"the template {path!r} cannot be opened: `facepipe index GALLERY --repair` rebuilds what is damaged"
        ) from error


def replace_template(store: Store, template: Template, index: Any) -> Template:
    """Write a template again that has got other centroids, under a new name."""
    name, file = _write_template(index, store.folder)
    return replace(template, name=name, file=file)


def save_template(index: Any, folder: str, plan: IndexPlan, *, seed: int, chosen: bool) -> Template:
    """Write a trained index. Its imbalance is measured once the first shards are built."""
    name, file = _write_template(index, folder)
    return Template(
        name=name,
        file=file,
        factory=plan.factory,
        lists=plan.lists,
        trained_on=plan.train,
        vectors=plan.vectors,
        imbalance=1.0,
        seed=seed,
        chosen=chosen,
    )


def _write_template(index: Any, folder: str) -> tuple[str, FileDigest]:
    name = f"template-{secrets.token_hex(6)}.faiss"
    path = os.path.join(folder, name)
    try:
        write_index(index, path)
    except (OSError, RuntimeError) as error:  # faiss reports a full disk as RuntimeError
        raise StorageError(f"cannot write {path!r}: {str(error).splitlines()[0]}") from error
    return name, compute_digest(path)
