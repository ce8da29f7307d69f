"""dedup: find the duplicate images of a gallery."""

from pipelines.dedup.pipeline import DedupConfig, DedupSummary, run

__all__ = ["DedupConfig", "DedupSummary", "run"]
