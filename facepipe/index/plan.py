"""What to build: factory, training size and shard size for a number of vectors and a memory budget."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from facepipe.errors import ConfigError
from facepipe.nearest.faiss_engine import faiss
from facepipe.schema import DEFAULT_DIM

# From this many vectors on an index has inverted lists; below, it compares with all vectors.
MIN_INVERTED_VECTORS = 50_000
FLAT = "IDMap2,Flat"
MAX_SHARD_VECTORS = 8_000_000
_MIN_BUDGET_SHARD_VECTORS = 100_000  # a tight budget does not make shards smaller than this
_NUMBER_BYTES = 4
_SIDE_BYTES = 12  # per vector: its id and its row; the vector itself comes on top
_POINTS_PER_LIST = 128  # training vectors per list: against 64 the same recall with 8 % less to scan
_MIN_POINTS_PER_LIST = 39  # faiss warns below
_MIN_TRAINING_VECTORS = 4096
_MIN_LISTS = 256
_MIN_HNSW_LISTS = 65_536  # from here on a graph finds the nearest centroids
_BATCH_BYTES = 64 << 20  # a batch of rows on its way from Parquet into the index, and the GEMM's blocks
_OUTGROWN = 4  # a plan for today's size would have this many times the lists
_MIN_LISTS_TO_REPLAN = 2048  # lists that justify replacing an exact index: about 200,000 faces
# A number, a prefix of the unit, and an `i` that changes nothing.
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class IndexPlan:
    """What will be built and what it will take. Sizes are in bytes.

    Attributes:
        vectors: Vectors to index.
        factory: Factory string of faiss.
        lists: Inverted lists; 0 for an exact index.
        train: Vectors to train on.
        shard_vectors: Vectors per shard.
        shard_limit: Maximum vectors per shard.
        vector_bytes: Code and id of a vector in the index; its side files take the vector and 12 more.
        base: What the process holds already.
        train_memory: Peak of training, above the base.
        shard_memory: Peak of building a shard, above the base.
        dim: Numbers per vector.
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
    dim: int = DEFAULT_DIM

    @property
    def memory(self) -> int:
        """Peak memory of the process."""
        return self.base + max(self.train_memory, self.shard_memory)

    @property
    def disk(self) -> int:
        """Bytes of the index with its side files, without the names and labels of images."""
        side = _NUMBER_BYTES * self.dim + _SIDE_BYTES
        return self.vectors * (self.vector_bytes + side) + self.lists * _NUMBER_BYTES * self.dim

    def describe(self) -> str:
        """Describe the plan in one line, for people."""
        shards = -(-self.vectors // self.shard_vectors) if self.vectors else 0
        return (
            f"plan: {self.vectors} faces, {self.factory}, {self.vector_bytes} bytes per face in the index and "
            f"{_NUMBER_BYTES * self.dim + _SIDE_BYTES} beside it; trains on {self.train}; "
            f"{shards} shards of {self.shard_vectors}; memory {format_size(self.memory)} "
            f"({format_size(self.base)} now, training {format_size(self.train_memory)}, "
            f"a shard {format_size(self.shard_memory)}); disk {format_size(self.disk)}"
        )


def make_plan(
    vectors: int,
    memory: int,
    base: int,
    factory: str | None = None,
    shard_vectors: int | None = None,
    trained: bool = False,
    dim: int = DEFAULT_DIM,
) -> IndexPlan:
    """Make the plan for a number of vectors within a memory budget.

    Below 50,000 vectors the index is exact. Above, it is an inverted file with 4-bit PQ codes, scanned with SIMD and
    re-scored exactly. Its lists are a power of two near 4 sqrt(n), or fewer if the budget does not hold their training
    set.

    Args:
        vectors: vectors to index.
        memory: budget of the process in bytes.
        base: bytes that the process holds already.
        factory: factory string of faiss instead of the planned one.
        shard_vectors: maximum vectors per shard, by default what the memory allows.
        trained: whether the factory is trained already, so that only the shards count.
        dim: numbers per vector.

    Raises:
        ConfigError: the budget is too small; the message names the smallest that works.
    """
    is_requested = factory is not None
    factory = factory or (FLAT if vectors < MIN_INVERTED_VECTORS else _name_factory(_choose_lists(vectors), dim))
    points = _POINTS_PER_LIST
    while True:
        plan = _compute_plan(
            vectors, memory, base, factory=factory, points=points, shard_vectors=shard_vectors, dim=dim
        )
        if trained:
            plan = replace(plan, train=0, train_memory=0)
        if base + plan.train_memory <= memory:
            break
        # First fewer training vectors per list, then half of the lists.
        if points > _MIN_POINTS_PER_LIST:
            points = max(_MIN_POINTS_PER_LIST, int(points * 0.8))
        elif not is_requested and plan.lists > _MIN_LISTS:
            factory = _name_factory(plan.lists // 2, dim)
            points = _POINTS_PER_LIST
        else:
            break
    if plan.memory > memory:
        raise ConfigError(
            f"a budget of {format_size(memory)} is too small to index {vectors} vectors with {plan.factory}: the "
            f"process holds {format_size(base)} before it starts, and the smallest budget that works is "
            f"{format_size(plan.memory)}"
        )
    return plan


def is_outgrown(lists: int, vectors: int) -> bool:
    """Say whether the plan for a number of vectors would have several times the lists of an index that has `lists`."""
    # Plan without a limit of memory. An exact index has 0 lists, so that the second limit applies to it.
    wanted = make_plan(max(1, vectors), 1 << 62, 0).lists
    return wanted >= (_OUTGROWN * lists or _MIN_LISTS_TO_REPLAN)


def _compute_plan(
    vectors: int, memory: int, base: int, *, factory: str, points: int, shard_vectors: int | None, dim: int
) -> IndexPlan:
    """Compute the sizes of an index with a given factory and given training vectors (`points`) per list."""
    lists = parse_lists(factory)
    code = compute_code_bytes(factory, dim)
    vector_bytes = _NUMBER_BYTES * dim
    train = min(vectors, max(points * lists, _MIN_TRAINING_VECTORS)) if lists else 0
    # Training holds the sample, three sets of centroids and one batch.
    train_memory = train * vector_bytes + 3 * lists * vector_bytes + (_BATCH_BYTES if lists else 0)
    # Growing lists double their capacity, and ids are sorted once: 24 bytes beside them.
    bytes_per_vector = 2 * code + 24
    # Each list is padded to a block of 32 codes.
    fixed = _BATCH_BYTES + lists * (vector_bytes + 32 * code)
    fitting = max(0, memory - base - fixed) // bytes_per_vector
    by_memory = min(MAX_SHARD_VECTORS, max(fitting, min(vectors, _MIN_BUDGET_SHARD_VECTORS)))
    limit = max(1, shard_vectors or by_memory)
    even = _split_evenly(vectors, limit)
    return IndexPlan(
        vectors=vectors,
        factory=factory,
        lists=lists,
        train=train,
        shard_vectors=even,
        shard_limit=limit,
        vector_bytes=code + 8,
        base=base,
        train_memory=train_memory,
        shard_memory=fixed + min(vectors, even) * bytes_per_vector,
        dim=dim,
    )


def _name_factory(lists: int, dim: int) -> str:
    graph = "_HNSW32" if lists >= _MIN_HNSW_LISTS else ""
    # A code has half a byte for two numbers, so an odd length gets a zero more.
    pad = f"Pad{dim + 1}," if dim % 2 else ""
    return f"{pad}IVF{lists}{graph},PQ{(dim + 1) // 2}x4fs"


def _choose_lists(vectors: int) -> int:
    # A power of two near 4 sqrt(n), from 2^8 to 2^18.
    return 1 << min(18, max(8, round(math.log2(4 * vectors**0.5))))


def _split_evenly(vectors: int, limit: int) -> int:
    """Return the size of about equal shards, rather than full ones and a small one at the end."""
    shards = max(1, -(-vectors // limit))
    return max(1, -(-vectors // shards))


def parse_lists(factory: str) -> int:
    """Parse the number of inverted lists of a factory string; 0 for an exact index."""
    match = re.search(r"IVF(\d+)", factory)
    return int(match[1]) if match else 0


def compute_code_bytes(factory: str, dim: int = DEFAULT_DIM) -> int:
    """Compute the bytes of a vector's code, without its id."""
    ivf = faiss.try_extract_index_ivf(open_factory(factory, dim))
    return _NUMBER_BYTES * dim if ivf is None else int(ivf.code_size)


def open_factory(factory: str, dim: int = DEFAULT_DIM) -> Any:
    """Create the empty, untrained index of a factory string.

    Exact indexes (`Flat`) and inverted files (`IVF...`) are usable, with or without a transform before them. They take
    ids natively, are merged bit for bit, and search around tombstones.

    Raises:
        ConfigError: facepipe cannot use the factory.
    """
    try:
        index = faiss.index_factory(dim, factory)
    except RuntimeError as error:
        raise ConfigError(f"faiss does not know the factory {factory!r} for vectors of {dim} numbers") from error
    if factory != FLAT and faiss.try_extract_index_ivf(index) is None:
        raise ConfigError(f"the factory {factory!r} does not support shards and deletion: use Flat or IVF…")
    return index


def parse_size(text: str) -> int:
    """Parse `4GiB`, `512M` or `1.5 GB` into bytes. All units are binary.

    Raises:
        ConfigError: the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise ConfigError(f"{text!r} is not a size: write 512MiB or 4GiB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def format_size(size: float) -> str:
    """Format bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
