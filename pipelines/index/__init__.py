"""index: a gallery's faces in, a published search index out."""

from pipelines.index.config import BuildConfig, IndexConfig, IndexRunConfig, IndexSummary
from pipelines.index.pipeline import run

__all__ = ["BuildConfig", "IndexConfig", "IndexRunConfig", "IndexSummary", "run"]
