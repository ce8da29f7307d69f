"""nightly: everything that a gallery needs every night, as one job."""

from pipelines.nightly.pipeline import NightConfirmation, NightSummary, run

__all__ = ["NightConfirmation", "NightSummary", "run"]
