"""The figures of a run of `embed`, summed over the records of its blocks."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from facepipe.gallery.commits.parts import MAX_EXAMPLES, PartRecord
from facepipe.moves.moved_images import MoveCounts
from facepipe.schema import FAILED, MOVED, REPLACED

COPIED = "copied"
"""Status of images that got copies of the rows of another image with the same content."""


@dataclass
class EmbedSummary:
    """What a run did.

    `images` is the sum of `statuses`, and `listed` is images + skipped + repeated + erased.

    Attributes:
        run: id of the run
        runner: inline, local or ray
        workers: number of workers
        version: version of the gallery's table afterwards
        images: images that were processed
        faces: rows with an embedding
        rows: rows written
        statuses: images by status
        retried: images among them that had failed before, or shown no face, and were tried again
        skipped: images that were in the gallery already
        repeated: images that were listed before in this run
        ignored: files that are not images
        erased: images that were erased and must not come back; those recognised by their bytes are among the statuses
        relabelled: images that are in the gallery, and got another label from the source
        moved: images that had another uri before, and keep their rows; `copied` among the statuses got copies of rows
        relocated: images whose uris changed with the place of their source; none of them was read for it
        missing: images of this source that it no longer lists, now marked
        missing_ignored: why missing images were not marked
        seconds: duration of the run
        first_record_seconds: time until the first block was finished
        stage_seconds: time of the workers by stage
        stage_bytes: bytes that each stage put out
        operators: on Ray, images and bytes that each operator of the dataset put out, by its name
        listed_all: whether the source was listed to its end
        total: images that the source holds, known when it is listed to its end; 0 before
        source: name of the source in the gallery
        notes: sentences for the user, such as why images got no label
        failed_examples: uri, status and reason of a few images that failed
        gpu: how busy the GPUs of the driver's machine were, as `GpuFigures.to_dict`; None if none is used
    """

    run: str
    runner: str
    workers: int
    version: int = 0
    images: int = 0
    faces: int = 0
    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    skipped: int = 0
    repeated: int = 0
    ignored: int = 0
    erased: int = 0
    relabelled: int = 0
    moved: int = 0
    relocated: int = 0
    missing: int = 0
    missing_ignored: str = ""
    seconds: float = 0.0
    first_record_seconds: float = 0.0
    stage_seconds: Counter[str] = field(default_factory=Counter)
    stage_bytes: Counter[str] = field(default_factory=Counter)
    operators: dict[str, dict[str, int]] = field(default_factory=dict)
    listed_all: bool = False
    total: int = 0
    source: str = ""
    notes: list[str] = field(default_factory=list)
    failed_examples: list[tuple[str, str, str]] = field(default_factory=list)
    gpu: dict[str, Any] | None = None

    @property
    def listed(self) -> int:
        """Images that the source listed."""
        return self.images + self.skipped + self.repeated + self.erased

    @property
    def failed(self) -> int:
        """Images of which it is not known whether they hold a face."""
        return sum(self.statuses[status] for status in FAILED)

    def add(self, record: PartRecord) -> None:
        """Count a finished block."""
        self.images += record.images
        self.faces += record.faces
        self.rows += record.rows
        self.retried += record.retried
        self.skipped += record.skipped
        self.repeated += record.repeated
        self.ignored += record.ignored
        self.erased += record.erased
        self.relabelled += len(record.relabelled)
        self.notes += record.notes
        # Blocks end in any order; the examples are the same.
        self.failed_examples = sorted(self.failed_examples + record.failed_examples)[:MAX_EXAMPLES]
        self.statuses.update(record.statuses)
        self.stage_seconds.update(record.seconds)
        self.stage_bytes.update(record.stage_bytes)
        # The last block may be finished before others, so the flag stays set.
        self.listed_all = self.listed_all or record.last

    def add_moves(self, counts: MoveCounts) -> None:
        """Count what became of the images that may have moved."""
        self.moved += counts.moved
        self.rows += counts.copied_rows
        self.faces += counts.copied_faces
        # The workers took all of them for moved.
        self.statuses[MOVED] -= counts.copied + len(counts.unresolved)
        self.images -= len(counts.unresolved)
        self.statuses[COPIED] += counts.copied
        self.statuses += Counter()  # without those that are none

    def add_retried(self, again: "EmbedSummary") -> None:
        """Count the images that were listed once more; they are no longer those that could not be read."""
        self.images += again.images - self.statuses.pop(REPLACED, 0)
        self.faces += again.faces
        self.rows += again.rows
        self.moved += again.moved
        kept = [example for example in self.failed_examples if example[1] != REPLACED]
        self.failed_examples = sorted(kept + again.failed_examples)[:MAX_EXAMPLES]
        self.statuses.update(again.statuses)
        self.stage_seconds.update(again.stage_seconds)
        self.stage_bytes.update(again.stage_bytes)
        self.seconds += again.seconds

    def to_dict(self) -> dict[str, Any]:
        """Convert the summary to values for JSON."""
        return {
            **asdict(self),
            "statuses": dict(self.statuses),
            "stage_seconds": dict(self.stage_seconds),
            "stage_bytes": dict(self.stage_bytes),
            "listed": self.listed,
            "failed": self.failed,
        }
