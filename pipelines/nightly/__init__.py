"""nightly: everything that a gallery needs every night, as one job."""

from pipelines.nightly.pipeline import NightSummary, run

__all__ = ["NightSummary", "run"]
