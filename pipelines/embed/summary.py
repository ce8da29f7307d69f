"""The figures of a run, added up from the records of its blocks."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from facepipe.gallery.commits.parts import PartRecord
from facepipe.schema import FAILED


@dataclass
class EmbedSummary:
    """What a run did. images = the sum of statuses; listed = images + skipped + repeated + erased.

    erased: listed, but erased before and not to come back (those told by their bytes are among the statuses);
    missing: images of this source that it no longer lists, now marked; missing_ignored: why they were left alone.
    gpu: how busy the GPUs of the driver's machine were, as `GpuFigures.to_dict`; None where none is used.
    """

    run: str
    runner: str
    workers: int
    version: int = 0
    images: int = 0
    faces: int = 0
    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    repeated: int = 0
    ignored: int = 0
    erased: int = 0
    missing: int = 0
    missing_ignored: str = ""
    seconds: float = 0.0
    first_record_seconds: float = 0.0
    stage_seconds: Counter[str] = field(default_factory=Counter)
    listed_all: bool = False
    gpu: dict[str, Any] | None = None

    @property
    def listed(self) -> int:
        """Images the source named."""
        return self.images + self.skipped + self.repeated + self.erased

    @property
    def failed(self) -> int:
        """Images that gave neither faces nor the certainty that there are none."""
        return sum(self.statuses[status] for status in FAILED)

    def add(self, record: PartRecord) -> None:
        """Count a finished block."""
        self.images += record.images
        self.faces += record.faces
        self.rows += record.rows
        self.skipped += record.skipped
        self.repeated += record.repeated
        self.ignored += record.ignored
        self.erased += record.erased
        self.statuses.update(record.statuses)
        self.stage_seconds.update(record.seconds)
        self.listed_all = self.listed_all or record.last

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "statuses": dict(self.statuses),
            "stage_seconds": dict(self.stage_seconds),
            "listed": self.listed,
            "failed": self.failed,
        }
