"""What a query costs, in nanoseconds of one core: measured on AMD EPYC with AVX-512 (docs/performance.md).

Only ratios decide: which of two settings is cheaper, and whether to scan everything instead.
"""

from facepipe.index.manifest import Manifest

_LIST = 250.0  # a list visited, in every shard
_CODE = 1.0  # a code scanned
_CANDIDATE = 350.0  # a candidate located and re-scored
_PRODUCT = 3.6  # a vector compared exactly, in a matrix product


def of_lists(live: int, lists: int, shards: int, nprobe: int, rescore: int) -> float:
    """Visiting `nprobe` of the lists and re-scoring `rescore` candidates."""
    return nprobe * (_LIST * shards + _CODE * live / lists) + _CANDIDATE * rescore


def scan_is_cheaper(manifest: Manifest, nprobe: int, rescore: int) -> bool:
    """Whether comparing with every vector costs less than visiting lists. An exact index has no lists to visit."""
    live, lists = manifest.live, manifest.template.lists
    return not lists or _PRODUCT * live < of_lists(live, lists, len(manifest.shards), nprobe, rescore)
