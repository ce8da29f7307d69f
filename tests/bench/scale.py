"""The cost model of docs/scale.md: its tables for 10M, 100M and 1B images, and a check against what was measured.

    python tests/bench/scale.py

Graph, cluster, clean and dedup are those of curation_model.py. Constants carry where they come from. Machine, where one is measured: 2 shared cores of an AMD EPYC (AVX-512), 24 GiB, no
GPU; "estimated" and "assumed" figures are marked. The check compares the model with measurements that no constant was
read from, and with some that one was (they say so); more than 1.3 apart must be explained beside the point.
"""

from dataclasses import dataclass

from curation_model import estimate_peak, estimate_step
from tables import lasting, shown, table

from facepipe.index.plan import make_plan
from facepipe.sources.blocks import BlockSize
from facepipe.storage.hashtable import _FIRST_SLOTS, _MAX_LOAD

SIZES = (10_000_000, 100_000_000, 1_000_000_000)
GIB = 1 << 30

# Corpus: assumed, after the 32 development photos (mean 450 kB, 1.2 MP in the median) and the 64 of the embed bench.
SOURCE_BYTES, FACES_PER_IMAGE = 450e3, 1.1

# Bytes a row, measured: tests/bench/gallery_io.py (2026-11-27), LFW's thumbnails (3,984 faces).
ROW_BYTES, SMALL_FILE_BYTES, THUMB_BYTES = 540, 33, 2111
EDGES, EDGE_BYTES = 9.4, 12  # a face (docs/performance.md, 1M among 10 a person); u, v and distance uncompressed
LABEL_BYTES = 60  # uri and identity of a row in the index; estimated
STATS_BYTES = 1800  # an `add` in the log: 1.5 kB of statistics, measured; its path and the rest
IMAGES_PER_FILE = BlockSize().largest

# Milliseconds of a core an image of about a megapixel, and 1.1 faces (docs/performance.md, "embed on photos").
READ, DECODE, FULL_LOOK, ALIGN, EMBED = 0.4, 10.6, 19.8, 2.3, 11.6
LOOKS = (384 / 640) ** 2 + 5 / 32  # of a full look: the quick one, and a full one where that leaves doubt
DETECT = FULL_LOOK * LOOKS
FLOP = 2 * (0.74e9 * LOOKS + 2 * FACES_PER_IMAGE * 0.271e9)  # RetinaFace at 640x480, dlib's network twice a face

SIMULATED_LISTING = 82.0  # tests/bench/simulation.py, 2026-11-27: CPU, the table made and then all listed

# A core's throughput in single precision, exact search: docs/performance.md, "graph".
FLOPS_2_CORES = 133e9
CURATION = ("graph", "cluster", "clean", "dedup")
LOADED = "the model's constants were measured beside other work, and this at rest"
KMEANS_ROUNDS = 10  # faiss's default for inverted lists
SHARD_SECONDS = 13.05  # a million faces
LIST_NEW, LIST_KNOWN = 8.6e-6, 9.8e-6  # seconds an image: tests/bench/listing.py at 1M (2026-11-27)
# Seconds of CPU to open the table (tests/bench/table_files.py) and bytes of the driver (simulation), a file of the table.
OPEN_PER_FILE, DRIVER_PER_FILE = 10e-6, 12e3
NIGHT_PER_IMAGE, NIGHT_PER_CHANGE = 82e-6, 0.7e-3  # seconds, models left aside: tests/bench/nightly.py, three nights


@dataclass(frozen=True)
class Machine:
    """vcpus: two of them are one core's worth here as there (assumed); tflops: dense, half precision, by the data
    sheet; dollars an hour on demand and spot: assumed list prices of 2026-11."""

    name: str
    vcpus: int
    tflops: float
    hour: float
    spot: float


MACHINES = (
    Machine("general purpose, 16 vCPU", 16, 0, 0.82, 0.33),
    Machine("L4-class, 8 vCPU", 8, 121, 0.98, 0.40),
    Machine("A10G-class, 8 vCPU", 8, 70, 1.21, 0.50),
    Machine("H100-class, 1 of 8 GPUs, 24 vCPU", 24, 989, 6.88, 3.00),
)
UTILISATION = 0.15  # of the peak, small convolutions in batches; assumed
GET, PUT = 0.40, 5.00  # dollars a million requests (LIST and COPY as PUT), assumed list price of 2026-11


def slots(keys: float) -> int:
    """Of the table of known images: it doubles above its load."""
    found = _FIRST_SLOTS
    while keys > _MAX_LOAD * found:
        found *= 2
    return found


def cpu_rate(cores: float, models: bool = True) -> float:
    """Images a second: the whole chain, or what is left to the CPU where the models run on a GPU."""
    return 1e3 * cores / (READ + DECODE + ALIGN + (DETECT + EMBED if models else 0))


def rate(machine: Machine) -> float:
    """Images a second: on a GPU machine the slower of its CPUs and the GPU's roofline (estimated)."""
    if not machine.tflops:
        return cpu_rate(machine.vcpus)
    return min(cpu_rate(machine.vcpus, models=False), gpu_rate(machine))


def gpu_rate(machine: Machine) -> float:
    return UTILISATION * machine.tflops * 1e12 / FLOP


def two_cores(where: str) -> float:
    return 1.0 if where == "one" else 2.0


def index_seconds(faces: float) -> tuple[float, float]:
    """(training, shards) on two cores."""
    plan = make_plan(int(faces), 16 * GIB, 0)
    return 2 * 128 * plan.train * plan.lists * KMEANS_ROUNDS / FLOPS_2_CORES, SHARD_SECONDS * faces / 1e6


def by_size(title: str, rows: dict[str, list[str]]) -> None:
    table(title, ["", "10M", "100M", "1B"], [[name, *cells] for name, cells in rows.items()])


def bytes_table() -> None:
    faces = [n * FACES_PER_IMAGE for n in SIZES]
    files = [n / IMAGES_PER_FILE for n in SIZES]
    plans = [make_plan(int(f), 64 * GIB, 0) for f in faces]
    by_size(
        "Bytes",
        {
            "source (450 kB an image, assumed)": [shown(n * SOURCE_BYTES) for n in SIZES],
            "gallery without thumbnails": [shown(f * (ROW_BYTES + SMALL_FILE_BYTES)) for f in faces],
            "thumbnails": [shown(f * THUMB_BYTES) for f in faces],
            "of the gallery, vectors": [shown(f * 512) for f in faces],
            "index: codes and ids": [shown(f * p.vector_bytes) for f, p in zip(faces, plans, strict=True)],
            "index: vectors, ids, rows, labels": [shown(f * (512 + 12 + LABEL_BYTES)) for f in faces],
            "graph's edges": [shown(f * EDGES * EDGE_BYTES) for f in faces],
            "files of the table as written": [f"{n:,.0f}" for n in files],
            "after compaction (128 MiB, with thumbnails)": [
                f"{f * (ROW_BYTES + THUMB_BYTES) / (128 << 20):,.0f}" for f in faces
            ],
            "log, statistics of its files": [shown(n * STATS_BYTES) for n in files],
            "table of known images (file-backed)": [shown(slots(n) * 32) for n in SIZES],
            "arithmetic of the models, FLOP": [f"{n * FLOP:.1e}" for n in SIZES],
        },
    )


def times_table() -> None:
    faces = [n * FACES_PER_IMAGE for n in SIZES]
    files = [n / IMAGES_PER_FILE for n in SIZES]
    by_size(
        "Time on two cores, or of one process",
        {
            "embedding, 2 cores": [lasting(n / cpu_rate(2)) for n in SIZES],
            "listing new images": [lasting(n * LIST_NEW) for n in SIZES],
            "listing known images": [lasting(n * LIST_KNOWN) for n in SIZES],
            "opening the table as written": [lasting(n * OPEN_PER_FILE) for n in files],
            "driver's memory for it": [shown(n * DRIVER_PER_FILE) for n in files],
            "index: training": [lasting(index_seconds(f)[0]) for f in faces],
            "index: shards": [lasting(index_seconds(f)[1]) for f in faces],
            **{step: [lasting(estimate_step(f, step, two_cores)) for f in faces] for step in CURATION},
            "memory of cluster, the largest of them": [f"{estimate_peak(f, 'cluster') / GIB:,.0f} GiB" for f in faces],
            "a night of 0.1 % changes, models left aside": [
                lasting(n * NIGHT_PER_IMAGE + n / 1000 * NIGHT_PER_CHANGE) for n in SIZES
            ],
        },
    )


def machines_table() -> None:
    rows = []
    for machine in MACHINES:
        found = rate(machine)
        hours = 1e6 / found / 3600
        limit = "models" if not machine.tflops else f"decoding; the GPU alone {gpu_rate(machine):,.0f}"
        if machine.tflops and gpu_rate(machine) <= cpu_rate(machine.vcpus, models=False):
            limit = "the GPU"
        rows.append(
            [machine.name, f"{machine.hour:.2f} / {machine.spot:.2f}", f"{found:,.0f}", limit]
            + [f"{hours * price:.2f}" for price in (machine.hour, machine.spot)]
        )
    head = ["machine", "$/h, on demand / spot (assumed)", "images/s", "limited by", "$ per 1M images", "spot"]
    table("Embedding, by machine", head, rows)


def requests_table() -> None:
    """Requests for a million images, as facepipe makes them."""
    blocks = 1e6 / IMAGES_PER_FILE
    ways = {
        "objects, one an image": (1e6, 1e6 / 1000, 0.0),
        # Images of 100 kB: 64 MiB a GET while headers are read, and two GETs of up to 32 MiB a block.
        "tar shards of 10,000": (1e11 / (64 << 20) + 2 * blocks, 0.1, 100.0),
        "Parquet shards of 10,000, row groups of 128": (1e6 / 128 + 3 * blocks, 0.1, 100 + blocks),
    }
    rows = []
    for name, (gets, lists, heads) in ways.items():
        heads, puts = heads + blocks, 2 * blocks  # a mark is looked for; a mark and a part are written
        cost = (gets + heads) / 1e6 * GET + (lists + puts) / 1e6 * PUT
        rows.append([name, *(f"{n:,.0f}" for n in (gets, lists, heads, puts)), f"{cost:.2f}"])
    head = ["source", "GET", "LIST (1000 a page)", "HEAD", "PUT", "$ (assumed prices)"]
    table("Requests to an object store for 1M images", head, rows)


def lfw_rate() -> float:
    """Crops of 150x150 on two cores: the detector by pixels, decoding by bytes."""
    detect = FULL_LOOK * 224 * 224 / (640 * 480)  # with its mirrored border
    return 2e3 / (READ + 0.5 + detect + ALIGN + EMBED * 1.045 / FACES_PER_IMAGE)


def check() -> None:
    """Model / measured."""
    points = [
        ("embed, photos, 2 workers, images/s", cpu_rate(2), 59.2, "stages apart, together"),
        ("embed, LFW crops, 2 workers, images/s", lfw_rate(), 126, ""),
        ("detector, ms an image of the photos", DETECT, 11.6, "resizing and doubt's own cost left out"),
        ("detector, GFLOP/s of a core", 2 * 0.74 / FULL_LOOK * 1e3, 85, "in the chain / alone"),
        (
            "bytes a row, LFW with thumbnails",
            ROW_BYTES + THUMB_BYTES,
            2799,
            "files of 117 rows: footers of 88 bytes a row",
        ),
        ("bytes a row, files of 512", ROW_BYTES + SMALL_FILE_BYTES, 573, "read from it"),
        ("table of 1M known images, MiB", slots(1e6) * 32 / (1 << 20), 64, ""),
        ("index, training for 1M, s", index_seconds(1e6)[0], 47.4, ""),
        ("index, training for 2M, s", index_seconds(2e6)[0], 44.2, "4,096 lists as for 1M"),
        ("index, shards of 2M, s", index_seconds(2e6)[1], 23.4, ""),
        ("graph of 1,003,811, s", estimate_step(1_003_811, "graph", two_cores), 170.7, LOADED),
        ("graph of 303,811, s", estimate_step(303_811, "graph", two_cores), 48.5, LOADED),
        ("graph of 103,811, s", estimate_step(103_811, "graph", two_cores), 17.3, LOADED),
        ("merging and review of 303,811, s", estimate_step(303_811, "cluster", two_cores), 11.4, LOADED),
        ("a night, 100k, 1,000 changes, s", 1e5 * NIGHT_PER_IMAGE + 1000 * NIGHT_PER_CHANGE, 9.43, "read from it"),
        (
            "listing 10M known images of a folder, s",
            10e6 * LIST_KNOWN,
            SIMULATED_LISTING,
            "Parquet shards, busy machine",
        ),
        ("opening 100,000 files, s of CPU", 100_000 * OPEN_PER_FILE, 0.98, "read from it"),
        ("opening 20,000 files, s of CPU", 20_000 * OPEN_PER_FILE, 0.22, ""),
        ("statistics in the log, 19,558 files, MB", 19_558 * STATS_BYTES / 1e6, 40.3, "590 commits of their own in it"),
    ]
    rows = [[name, f"{model:,.3g}", f"{found:,.4g}", f"{model / found:.2f}", why] for name, model, found, why in points]
    table("The model against measurements", ["", "model", "measured", "model / measured", ""], rows)
    for name, model, found, why in points:
        assert why or 1 / 1.3 <= model / found <= 1.3, f"{name}: {model / found:.2f}, and no word why"


def main() -> None:
    bytes_table()
    times_table()
    machines_table()
    requests_table()
    check()


if __name__ == "__main__":
    main()
