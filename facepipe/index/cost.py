"""What a query costs, in nanoseconds of one core: measured on AMD EPYC with AVX-512 (docs/performance.md).

Only ratios matter: which of two settings is cheaper, and whether to scan everything instead. The figures of a GPU are
estimated, not measured: an H200's data sheet says 989 TFLOP/s in half precision and 4.8 TB/s. A pair of 128-D vectors
takes 256 FLOP, at 40 % of that 0.65 ps. Its product is written (hidden behind the arithmetic) and read again, 2 bytes
at 80 % of the bandwidth, 0.52 ps. Picking pairs out of it adds a tenth.

All figures are of 128-D vectors. What reads or multiplies vectors or codes takes time in proportion to their length.
"""

from dataclasses import dataclass
from math import log

from facepipe.index.manifest import Manifest
from facepipe.schema import DEFAULT_DIM

_LIST = 250.0  # per list visited, in every shard
_CODE = 1.0  # per code scanned
_CANDIDATE = 350.0  # per candidate located and re-scored
PRODUCT = 3.6  # per vector compared exactly, in a matrix product
DEVICE_PRODUCT = 0.0013  # the same on a GPU
UPLOAD = 60.0  # per vector sent to a GPU: 512 bytes read and copied by one thread at about 10 GB/s, 10 ns of PCIe 5
_PASSED_ON = 150.0  # per pair that a GPU cannot rule out: compared and sorted by the host
BLOCK_ROWS = 262_144  # vectors between which thresholds rise (facepipe.nearest.knn_gpu)
DEVICE_START = 6e9  # per process: some seconds to load torch and to create a CUDA context


@dataclass(frozen=True)
class ScanWork:
    """Scans of all vectors.

    Attributes:
        queries: Queries that share one scan.
        total: Queries of all scans.
        k: Neighbours per query.
        cores: Cores of the host.
        gpu: Whether there is a GPU.
        dim: Numbers per vector.
    """

    queries: int
    total: int
    k: int
    cores: int
    gpu: bool = False
    dim: int = DEFAULT_DIM


def estimate_lists(live: int, *, lists: int, shards: int, nprobe: int, rescore: int, dim: int = DEFAULT_DIM) -> float:
    """Estimate the cost of a query that visits `nprobe` of the lists and re-scores `rescore` candidates."""
    length = dim / DEFAULT_DIM
    return nprobe * (_LIST * shards + _CODE * length * live / lists) + _CANDIDATE * length * rescore


def estimate_scan(live: int, work: ScanWork) -> float:
    """Estimate the cost of comparing a query with every vector.

    With a GPU this is what all cores of the host could do in the same time.
    """
    length = work.dim / DEFAULT_DIM
    if not work.gpu:
        return PRODUCT * length * live
    passed_on = _PASSED_ON * work.k * (1 + log(1 + live / BLOCK_ROWS))
    # Sending the vectors is shared by the queries of one scan, starting the device by all queries.
    fixed = DEVICE_START / max(1, work.total) + UPLOAD * length * live / max(1, work.queries)
    return work.cores * (DEVICE_PRODUCT * length * live + fixed) + passed_on


def is_scan_cheaper(manifest: Manifest, nprobe: int, rescore: int, work: ScanWork | None = None) -> bool:
    """Say whether comparing with every vector costs less than visiting lists. An exact index has no lists to visit."""
    live = manifest.live
    lists = manifest.template.lists
    if not lists:
        return True
    scan = PRODUCT * manifest.dim / DEFAULT_DIM * live
    if work is not None:
        scan = min(scan, estimate_scan(live, work))
    return scan < estimate_lists(
        live, lists=lists, shards=len(manifest.shards), nprobe=nprobe, rescore=rescore, dim=manifest.dim
    )


def is_device_cheaper(live: int, work: ScanWork) -> bool:
    """Say whether there is a GPU, and a scan costs less on it than on the cores."""
    return work.gpu and estimate_scan(live, work) < PRODUCT * work.dim / DEFAULT_DIM * live
