"""search: queries in, a Parquet table of their nearest faces out; in blocks, resumable, on this machine or on Ray."""

from pipelines.search.config import SearchConfig, SearchRunConfig, SearchSummary
from pipelines.search.pipeline import run

__all__ = ["SearchConfig", "SearchRunConfig", "SearchSummary", "run"]
