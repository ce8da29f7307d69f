"""dedup: a gallery in, its duplicate images out."""

from pipelines.dedup.pipeline import DedupConfig, DedupSummary, run

__all__ = ["DedupConfig", "DedupSummary", "run"]
