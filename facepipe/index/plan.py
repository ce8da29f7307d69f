"""What to build: factory, training size and shard size for a number of vectors and a memory budget."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from facepipe.errors import ConfigError
from facepipe.nearest.faiss_engine import faiss
from facepipe.schema import EMBEDDING_DIM

FLAT_BELOW = 50_000
FLAT = "IDMap2,Flat"
SHARD_LARGEST = 8_000_000
_VECTOR = 4 * EMBEDDING_DIM
_POINTS_PER_LIST = 128  # training vectors a list: against 64 the same recall with 8 % less to scan
_FEWEST_POINTS = 39  # faiss warns below
_HNSW_FROM = 65_536  # lists from which the nearest centroids are found by a graph
_BATCH_BYTES = 64 << 20  # a batch of rows on its way from Parquet into the index, and the GEMM's blocks
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """What will be built and what it will take; sizes in bytes.

    train: vectors to train on; shard_vectors: what each shard gets; shard_limit: the most one may hold; vector_bytes:
    of a vector in the index (code and id), beside 524 in its side files; train_memory, shard_memory: peak of the two
    phases, above what the process holds already (base).
    """

    vectors: int
    factory: str
    lists: int
    train: int
    shard_vectors: int
    shard_limit: int
    vector_bytes: int
    base: int
    train_memory: int
    shard_memory: int

    @property
    def memory(self) -> int:
        """Peak memory of the process."""
        return self.base + max(self.train_memory, self.shard_memory)

    @property
    def disk(self) -> int:
        """Bytes of the index with its side files, names and labels of images left out."""
        return self.vectors * (self.vector_bytes + _VECTOR + 12) + self.lists * _VECTOR


def make_plan(
    vectors: int,
    memory: int,
    base: int,
    factory: str | None = None,
    shard_vectors: int | None = None,
    trained: bool = False,
) -> Plan:
    """The plan for a number of vectors within a memory budget, of which the process holds `base` already.

    Below 50,000 vectors an exact index. Above, an inverted file with 4-bit PQ codes, scanned with SIMD and re-scored
    exactly: lists as a power of two near 4 sqrt(n), fewer where the budget does not hold their training set. With a
    factory that is trained already only the shards count.
    Raises ConfigError for a budget that is too small, naming the smallest that works.
    """
    given = factory is not None
    factory = factory or (FLAT if vectors < FLAT_BELOW else _default(_lists_for(vectors)))
    points = _POINTS_PER_LIST
    while True:
        plan = _plan(vectors, memory, base, factory, points, shard_vectors)
        plan = replace(plan, train=0, train_memory=0) if trained else plan
        if base + plan.train_memory <= memory:
            break
        if points > _FEWEST_POINTS:
            points = max(_FEWEST_POINTS, int(points * 0.8))
        elif not given and plan.lists > 256:
            factory, points = _default(plan.lists // 2), _POINTS_PER_LIST
        else:
            break
    if plan.memory > memory:
        raise ConfigError(
            f"a budget of {shown(memory)} is too small to index {vectors} vectors with {plan.factory}: the process "
            f"holds {shown(base)} before it starts, and the smallest budget that works is {shown(plan.memory)}"
        )
    return plan


def _plan(vectors: int, memory: int, base: int, factory: str, points: int, shard_vectors: int | None) -> Plan:
    lists = lists_of(factory)
    code = code_bytes(factory)
    train = min(vectors, max(points * lists, 4096)) if lists else 0
    train_memory = train * _VECTOR + 3 * lists * _VECTOR + (_BATCH_BYTES if lists else 0)
    # Growing lists double their capacity, and ids are sorted once: 24 bytes beside them.
    each = 2 * code + 24
    fixed = _BATCH_BYTES + lists * (_VECTOR + 32 * code)
    fitting = max(0, memory - base - fixed) // each
    largest = max(1, shard_vectors or min(SHARD_LARGEST, max(fitting, min(vectors, 100_000))))
    return Plan(
        vectors=vectors,
        factory=factory,
        lists=lists,
        train=train,
        shard_vectors=_even(vectors, largest),
        shard_limit=largest,
        vector_bytes=code + 8,
        base=base,
        train_memory=train_memory,
        shard_memory=fixed + min(vectors, _even(vectors, largest)) * each,
    )


def _default(lists: int) -> str:
    graph = "_HNSW32" if lists >= _HNSW_FROM else ""
    return f"IVF{lists}{graph},PQ{EMBEDDING_DIM // 2}x4fs"


def _lists_for(vectors: int) -> int:
    return 1 << min(18, max(8, round(math.log2(4 * vectors**0.5))))


def _even(vectors: int, largest: int) -> int:
    """Shards of about equal size rather than a small one at the end."""
    shards = max(1, -(-vectors // largest))
    return max(1, -(-vectors // shards))


def lists_of(factory: str) -> int:
    """Inverted lists of a factory string, 0 for an exact index."""
    found = re.search(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0


def code_bytes(factory: str) -> int:
    """Bytes of a vector's code, id left out."""
    ivf = faiss.try_extract_index_ivf(open_factory(factory))
    return _VECTOR if ivf is None else int(ivf.code_size)


def open_factory(factory: str) -> Any:
    """The empty, untrained index of a factory string. Raises ConfigError where facepipe cannot use it.

    Usable are exact indexes (`Flat`) and inverted files (`IVF...`), with or without a transform before them: they take
    ids natively, are merged bit for bit, and search around tombstones.
    """
    try:
        index = faiss.index_factory(EMBEDDING_DIM, factory)
    except RuntimeError as error:
        raise ConfigError(f"faiss does not know the factory {factory!r}") from error
    if factory != FLAT and faiss.try_extract_index_ivf(index) is None:
        raise ConfigError(f"the factory {factory!r} cannot be sharded and erased from: use Flat or IVF…")
    return index


def parse_size(text: str) -> int:
    """`4GiB`, `512M` or `1.5 GB` as bytes; all units are binary."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise ConfigError(f"{text!r} is no size: write 512MiB or 4GiB")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def shown(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
