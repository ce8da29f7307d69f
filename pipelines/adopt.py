"""adopt: encodings in that another program computed, committed rows of a gallery out. No photo is read."""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import facepipe
from facepipe.adoption.adopt import Adoption, AdoptionTally
from facepipe.adoption.rows import regroup_by_image
from facepipe.adoption.tables import EncodingSource, Names, open_encodings
from facepipe.errors import ConfigError, SourceError
from facepipe.gallery import Contract, Gallery, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, add_shared_columns, write_part
from facepipe.observe.runs import new_run_id
from facepipe.schema import EMBEDDING_DIM
from facepipe.storage.lease import Lease, hold_lease
from pipelines.runtime.run_record import attach_summary, get_current_run, record_calls


@dataclass(frozen=True)
class AdoptConfig:
    """What `adopt` can be told.

    encodings: a Parquet file or folder, an .npz or an .npy file
    source: name of the corpus in the gallery's `source` column; by default the last part of the path
    names: whom a column `name` names: people, images, or auto: images where another column says who it is, else people
    detector, embedder: models that compute the same encodings from photos; the gallery's contract names them
    """

    encodings: str = ""
    source: str | None = None
    names: Names = "auto"
    detector: str = "dlib-hog"
    embedder: str = "face-recognition"

    @property
    def contract(self) -> Contract:
        """face_recognition averages no mirrored chip in."""
        return Contract.from_models(self.detector, self.embedder, flip=False)


@dataclass
class AdoptSummary:
    """What a run did, in rows: listed = adopted + skipped + repeated + erased + refused.

    replaced: of the adopted, those of images that were held with other encodings or labels; skipped: held already;
    repeated: twice in the file; refused: by reason, the first five in `examples`; norm_*: of the adopted vectors as
    they were given; columns: which column was taken for what.
    """

    run: str
    version: int = 0
    listed: int = 0
    adopted: int = 0
    replaced: int = 0
    skipped: int = 0
    repeated: int = 0
    erased: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    norm_least: float | None = None
    norm_mean: float | None = None
    norm_most: float | None = None
    columns: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        """Rows that were refused."""
        return sum(self.refused.values())

    def take(self, tally: AdoptionTally) -> None:
        """Take the figures so far."""
        for name in ("listed", "adopted", "replaced", "skipped", "repeated", "erased", "refused", "examples"):
            setattr(self, name, getattr(tally, name))
        if tally.adopted:
            low, high, total = tally.norms
            self.norm_least, self.norm_mean, self.norm_most = low, total / tally.adopted, high

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "refused": dict(self.refused), "failed": self.failed}


Progress = Callable[[AdoptSummary], None]


@record_calls("adopt")
def run(config: AdoptConfig, gallery: str, progress: Progress = lambda summary: None) -> AdoptSummary:
    """Adopt encodings into a gallery, which is made if there is none.

    What is held already is not adopted again, and a photo that was embedded keeps its rows. Every batch is one commit:
    a run that was killed goes on from there. Raises SourceError where there is nothing to adopt or a file is damaged,
    ConfigError for a file of another kind, ContractError where the gallery was made with other models. Bad rows raise
    nothing: they are counted by reason.
    """
    contract = config.contract
    if contract.dim != EMBEDDING_DIM:
        raise ConfigError(f"{contract.embedder} has {contract.dim} dimensions; encodings have {EMBEDDING_DIM}")
    source = open_encodings(config.encodings, config.names)
    if source.contract is not None:
        Contract.from_json(source.contract).require(contract, repr(source.path))
    if next((table for table in source.batches() if table.num_rows), None) is None:
        raise SourceError(f"no encoding in {config.encodings!r}")
    with hold_lease(gallery) as lease:
        return _run_locked(config, source, Gallery.open_or_create(gallery, contract), lease, progress)


def _run_locked(
    config: AdoptConfig, source: EncodingSource, gallery: Gallery, lease: Lease, progress: Progress
) -> AdoptSummary:
    record = get_current_run()
    if record:
        record.set_versions(before=gallery.version)
        record.save()  # there may have been no gallery when the run began
    summary = AdoptSummary(record.id if record else new_run_id(), columns=_columns(source))
    attach_summary(summary)
    began = time.monotonic()
    commit = Committer(gallery, summary.run, lease)
    name = config.source or os.path.basename(source.path.rstrip("/"))
    adoption = Adoption(gallery, name, (suppressed.read_uris(gallery.path), suppressed.read_contents(gallery.path)))
    try:
        for number, table in enumerate(regroup_by_image(source.batches())):
            rows, items = adoption(table)
            part = PartRecord(number)
            if rows.num_rows:
                adoption.tally.add_norms(rows["embedding_norm"].to_numpy())
                write_part(add_shared_columns(rows, name), items, gallery.faces_folder, summary.run, part)
            summary.take(adoption.tally)
            summary.seconds = round(time.monotonic() - began, 3)
            commit([part], _figures(summary))
            progress(summary)
    finally:
        adoption.close()
    summary.version = Gallery(gallery.path).version
    return summary


def _columns(source: EncodingSource) -> list[str]:
    """Which column was taken for what."""
    given = cast(dict[str, str | None], asdict(source.roles))
    return [f"{role}: {column or 'the array'}" for role, column in given.items() if column is not None]


def _figures(summary: AdoptSummary) -> dict[str, Any]:
    """What goes into the log beside a commit: counts and times, no names."""
    counts = {name: getattr(summary, name) for name in ("listed", "adopted", "replaced", "skipped", "repeated")}
    return {
        "job": "adopt",
        "facepipe": facepipe.__version__,
        **counts,
        "erased": summary.erased,
        "refused": dict(summary.refused),
        "seconds": summary.seconds,
    }
