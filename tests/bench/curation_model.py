"""The cost model of graph, cluster, clean and dedup: operations, bytes and messages, counted from the code.

    python tests/bench/curation_model.py

What a step does is counted as a function of the faces n: pairs that are compared, edges that are weighed, candidates that
are judged. A few constants, in seconds of one core per operation, turn that into time; they were measured alone on small
inputs. The check compares the model with whole runs of tests/bench/curation.py, and demands a factor of 1.5 or a word why.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tables import lasting, shown, table

GIB = 1 << 30
SIZES = (1e6, 5e6, 17e6, 42e6, 100e6, 1e9)
VECTOR = 512  # bytes
EDGES = 9.0  # a face: 8.97 of 100,000, 9.00 of 300,000 (ten faces a person)
CANDIDATES = 2.9  # identities that a face may belong to: 290,953 for 100,000 faces
MAX_CELLS_PER_FACE = 24

# Seconds of a core per operation (2 shared cores, AMD EPYC, no GPU, one thread, 2026-12-01, other work beside it).
DENSITY_PAIR, COUNTED_PAIR = 7.7e-9, 9.1e-9  # a face against the cohort; and in a histogram of similarities
PRODUCT = 4.8e-9  # of two vectors, in a matrix product
TRUE_PAIR = 12e-9  # of a sample with all faces, selected
JOINED_PAIR = 6.5e-9  # of two faces of a cell, selected
ROW = 8.5e-6  # of the table: read, sorted by id, written
EDGE = 5e-6  # merged: weighed, contracted and written on the ladder
REVIEWED_EDGE = 4e-6  # and again for suspects
FIT = 1.1e-6  # of a face with an identity's centre: two vectors from memory
IMAGE = 9.7e-6  # of dedup: read, sent to its partitions, its row written
IMAGE_STEPS = 4e-6  # and described, linked by content and hash, judged with its component: in tasks
MOVED_PER_IMAGE = 670  # bytes into and out of these tasks: 674 of 100,000
IMAGES_PER_PARTITION, STEPS_OF_COPIES = 1 << 18, 5

COHORT, ROUNDS, COUNTED, SAMPLED_PAIRS, MEASURED_PAIRS = 4096, 4, 1e9, 5e8, 1e9
JUDGING_ROUNDS = 31  # of at most 40; measured at 100,000
STRANGERS = 200_000
TASK_PAIRS, TASK_ROWS = 2e8, 65_536
LARGE = 16_384  # cells from which k-means has two levels
CORES_PER_VCPU = 0.5  # assumed


def count_cells(n: float) -> int:
    """Count the cells as facepipe.curation.graph.cells does."""
    number = 1
    while number * 2 <= n / 244:
        number *= 2
    return number if n > 30_000 else 1


def count_cells_per_face(n: float) -> float:
    """Cells that a face must be in for a recall of .985: 6 of 256, 9 of 1,024 and 12 of 4,096 (measured), 3 more per 4."""
    cells = count_cells(n)
    rounds = 0
    while 4 ** (rounds + 1) <= cells / 256:
        rounds += 1
    return min(MAX_CELLS_PER_FACE, 6.0 + 3.0 * rounds + (1.0 if cells >= LARGE else 0.0)) if cells > 1 else 1.0


def count_joined_pairs(n: float) -> float:
    """Pairs in cells; the squares of the sizes are 1.2 times those of equal cells."""
    cells = count_cells(n)
    in_cell = n * count_cells_per_face(n) / cells
    return 1.2 * cells * in_cell**2 / 2


@dataclass(frozen=True)
class Work:
    """What a step costs.

    Attributes:
        step: Command.
        name: What is done.
        count: Operations.
        unit: What is counted.
        seconds: Seconds of one core.
        where: `nodes` (tasks on Ray), `threads` (all cores of the driver) or `one` (one core of the driver).
        moved: Bytes that travel between machines on Ray.
        messages: Tasks.
        held: Bytes of the driver meanwhile, beyond what it holds at rest.
    """

    step: str
    name: str
    count: float
    unit: str
    seconds: float
    where: str
    moved: float = 0
    messages: float = 0
    held: float = 0


def list_work(n: float) -> list[Work]:
    """List the work on n faces of as many images."""
    cells = count_cells(n)
    each = count_cells_per_face(n)
    pairs = count_joined_pairs(n)
    counted = min(COHORT * n, COUNTED)
    sampled = min(COHORT * n, max(SAMPLED_PAIRS, 200 * n))
    measured = min(COHORT * n, max(MEASURED_PAIRS, 200 * n))
    points = min(64 * cells, max(1 << 22, 8 * cells))
    kmeans = 8 * points * cells if cells < LARGE else 12 * points * cells**0.5
    edges = EDGES * n
    fits = JUDGING_ROUNDS * ((1 + CANDIDATES) * n + STRANGERS)
    cohort = min(n, COHORT)
    work = [
        Work("graph", "read the faces", n, "rows", n * ROW, "one", n * 540, 0, 60 * n),
        Work(
            *("graph", "densities", ROUNDS * cohort * n, "pairs", ROUNDS * cohort * n * DENSITY_PAIR, "nodes"),
            *(ROUNDS * n * VECTOR, ROUNDS * n / TASK_ROWS, 20 * n),
        ),
        Work(
            "graph",
            "histogram",
            ROUNDS * counted,
            "pairs",
            ROUNDS * counted * COUNTED_PAIR,
            "threads",
            held=20 * n + 2.6e8,
        ),
    ]
    if cells > 1:
        work += [
            Work("graph", "k-means", kmeans, "products", kmeans * PRODUCT, "threads", held=points * VECTOR * 1.1),
            Work("graph", "sample for cells", sampled, "pairs", sampled * TRUE_PAIR, "threads", held=1e8),
            Work(
                *("graph", "assignment to cells", n * cells, "products", n * cells * PRODUCT, "nodes"),
                *(n * (VECTOR + 4 * each), n / TASK_ROWS, 30 * n),
            ),
        ]
    return [
        *work,
        Work(
            *("graph", "pairs in cells", pairs, "pairs", pairs * JOINED_PAIR, "nodes"),
            *(n * each * VECTOR + edges * 20, max(1.0, pairs / TASK_PAIRS), 30 * n + 1e8),
        ),
        Work("graph", "recall", measured, "pairs", measured * TRUE_PAIR, "threads", held=20 * n + 1e8),
        Work("cluster", "merging", edges, "edges", edges * EDGE, "one", edges * 80, 0, 236 * n + 1.9e8),
        Work("cluster", "review and tables", edges, "edges", edges * REVIEWED_EDGE, "one", held=236 * n + 1.9e8),
        *_list_copy_work(n, "clean"),
        Work("clean", "judging", fits, "fits", fits * FIT, "one", held=230 * n + 1e8),
        *_list_copy_work(n, "dedup"),
    ]


def _list_copy_work(n: float, step: str) -> list[Work]:
    """List the work of the search for copies, partition by partition. Images take 13 bytes each: image, root, mark."""
    tasks = STEPS_OF_COPIES * max(1.0, n / IMAGES_PER_PARTITION)
    held = 13 * n + 1.5e8 * n / max(1, -(-n // IMAGES_PER_PARTITION)) / IMAGES_PER_PARTITION
    return [
        Work(step, "read and partition images", n, "images", n * IMAGE, "one", held=held),
        Work(step, "link and judge images", n, "images", n * IMAGE_STEPS, "nodes", n * MOVED_PER_IMAGE, tasks, held),
    ]


def estimate_step(n: float, step: str, cores: Callable[[str], float]) -> float:
    """Estimate the seconds of a step, with so many cores for each kind of work."""
    return sum(work.seconds / cores(work.where) for work in list_work(n) if work.step == step)


def estimate_peak(n: float, step: str) -> float:
    """Estimate the bytes that a step holds at most, beyond the libraries."""
    return max(work.held for work in list_work(n) if work.step == step)


def print_counts() -> None:
    """Print what each step does, at three sizes."""
    rows = []
    for small, middle, large in zip(list_work(1e6), list_work(17e6), list_work(100e6), strict=True):
        rows.append(
            [small.step, small.name, small.unit, small.where]
            + [f"{work.count:.1e}" for work in (small, middle, large)]
            + [lasting(large.seconds), shown(large.moved), f"{large.messages:,.0f}", f"{large.held / GIB:.1f}"]
        )
    head = ["step", "work", "unit", "where", "at 1M", "at 17M", "at 100M"]
    head += ["core time at 100M", "moved", "tasks", "GiB of the driver"]
    table("What graph, cluster, clean and dedup do", head, rows)


def print_times() -> None:
    """Print seconds per step, on one machine and on sixteen."""

    def here(where: str) -> float:
        return 1.0 if where == "one" else 16 * CORES_PER_VCPU

    def spread(where: str) -> float:
        return 16 * 16 * CORES_PER_VCPU if where == "nodes" else here(where)

    for title, cores in (("One machine of 16 vCPU", here), ("16 nodes of 16 vCPU, with Ray", spread)):
        rows = [
            [step, *(lasting(estimate_step(n, step, cores)) for n in SIZES)]
            for step in ("graph", "cluster", "clean", "dedup")
        ]
        table(title, ["", "1M", "5M", "17M", "42M", "100M", "1B"], rows)
    rows = []
    for step in ("graph", "cluster", "clean", "dedup"):
        rows.append([step, *(f"{estimate_peak(n, step) / GIB:,.1f}" for n in SIZES)])
    table("Memory of the largest process, GiB without mapped files", ["", "1M", "5M", "17M", "42M", "100M", "1B"], rows)
    rows = [[f"{count_cells(n):,}" for n in SIZES], [f"{count_cells_per_face(n):.0f}" for n in SIZES]]
    table("Cells", ["", "1M", "5M", "17M", "42M", "100M", "1B"], [["cells", *rows[0]], ["cells per face", *rows[1]]])


# CPU of cluster and dedup: that of the version before at rest, times the ratio of both in one run on a busy machine.
# That of clean is of the version before: judging took as long side by side.
# Step, faces, CPU seconds, MiB beyond the start: `tests/bench/curation.py WORK`, ten faces a person, 2 shared cores, 2026-12-01.
MEASURED = (
    ("graph", 1e5, 38.0, 289, ""),
    ("cluster", 1e5, 8.4, 206, "read from it"),
    ("clean", 1e5, 21.6, 125, "read from it"),
    ("dedup", 1e5, 1.4, 25, "the start had left room of its own"),
    ("cluster", 3e5, 25.4, 251, "read from it"),
    ("clean", 3e5, 56.0, 122, "the start had left room of its own"),
    ("dedup", 3e5, 4.2, 98, "read from it"),
    ("graph", 1e6, 381.9, 361, "a load of 15"),
    ("cluster", 1e6, 136.7, 607, "a load of 15"),
    ("clean", 1e6, 263.3, 298, "a load of 13"),
    ("dedup", 1e6, 16.5, 248, "a load of 15"),
)


def check() -> None:
    """Compare the model with whole runs (tests/bench/curation.py, one thread): CPU seconds, and MiB beyond the start."""

    def one_core(where: str) -> float:
        return 1.0

    rows = []
    for step, n, seconds, mib, why in MEASURED:
        for unit, model, found in (
            ("CPU s", estimate_step(n, step, one_core), seconds),
            ("MiB", estimate_peak(n, step) / (1 << 20), mib),
        ):
            rows.append([f"{step} of {n:,.0f}, {unit}", f"{model:,.3g}", f"{found:,.4g}", f"{model / found:.2f}", why])
            assert why or 1 / 1.5 <= model / found <= 1.5, f"{step} of {n}: {model:.3g} {unit} for {found}, no word why"
    table("The model against measurements", ["", "model", "measured", "model / measured", ""], rows)


def main() -> None:
    """Print all tables."""
    print_counts()
    print_times()
    check()


if __name__ == "__main__":
    main()
