"""Adopt encodings that another program computed as rows of a gallery. No photo is read."""

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
from facepipe.erasure.takeup import RequestTaker
from facepipe.errors import SourceError
from facepipe.gallery import Contract, Gallery, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, add_shared_columns, write_part
from facepipe.gallery.contract import FEATURES
from facepipe.observe.runs import new_run_id
from facepipe.schema import DEFAULT_DIM
from facepipe.storage.lease import Lease, hold_lease
from pipelines.runtime.run_record import attach_summary, get_current_run, record_calls

_USUAL_EMBEDDER = "face-recognition"


@dataclass(frozen=True)
class AdoptConfig:
    """Everything that `adopt` can be configured with.

    Attributes:
        encodings: A Parquet file or folder, an .npz or an .npy file, or a .bin of raw float32 numbers.
        source: Name of the corpus in the gallery's `source` column; by default the last part of the path.
        names: Whom a column `name` names: people, images, or auto (images if another column says who it is, else
            people).
        detector: Detector for the gallery's contract.
        embedder: Model that computes the same encodings from photos, for the gallery's contract; or `features:NAME` for
            a model that is not here. By default face-recognition for 128 numbers, else `features:` and the name of the
            file.
        labels: File of a label per line, for a .bin.
        dim: Numbers per vector; by default as many as the file has.
    """

    encodings: str = ""
    source: str | None = None
    names: Names = "auto"
    detector: str = "dlib-hog"
    embedder: str | None = None
    labels: str | None = None
    dim: int | None = None

    def make_contract(self, source: EncodingSource) -> Contract:
        """Make the contract of a gallery of these encodings."""
        embedder = self.embedder
        if embedder is None:
            # Vectors of face_recognition have as many numbers. Of other files only the name tells one model from
            # another, so that two of them are never mixed unasked.
            is_usual = source.dim == DEFAULT_DIM and not source.is_features
            embedder = _USUAL_EMBEDDER if is_usual else FEATURES + os.path.basename(source.path.rstrip("/"))
        if embedder.startswith(FEATURES):
            return Contract.from_features(embedder, source.dim)
        # face_recognition does not average the mirrored chip in.
        return Contract.from_models(self.detector, embedder, flip=False)


@dataclass
class AdoptSummary:
    """What a run did, in rows: listed = adopted + skipped + repeated + erased + refused.

    Attributes:
        run: Id of the run.
        version: Version of the table afterwards.
        listed: Rows read.
        adopted: New rows.
        replaced: Those among the adopted of images that had other encodings or labels before.
        skipped: Rows that the gallery has already.
        repeated: Rows that are twice in the file.
        erased: Rows of erased images.
        refused: Refused rows by reason.
        examples: The first five refused rows.
        norm_least: Least norm of the adopted vectors, as the file has them.
        norm_mean: Mean of these norms.
        norm_most: Greatest of these norms.
        columns: Which column was used as what.
        seconds: Duration of the run.
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
        """Number of rows that were refused."""
        return sum(self.refused.values())

    def update(self, tally: AdoptionTally) -> None:
        """Set the figures to those so far."""
        for name in ("listed", "adopted", "replaced", "skipped", "repeated", "erased", "refused", "examples"):
            setattr(self, name, getattr(tally, name))
        if tally.adopted:
            self.norm_least = tally.norm_least
            self.norm_mean = tally.norm_sum / tally.adopted
            self.norm_most = tally.norm_most

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain values, for JSON."""
        return {**asdict(self), "refused": dict(self.refused), "failed": self.failed}


Progress = Callable[[AdoptSummary], None]


@record_calls("adopt")
def run(config: AdoptConfig, gallery: str, progress: Progress = lambda summary: None) -> AdoptSummary:
    """Adopt encodings into a gallery, which is made if there is none.

    Encodings that the gallery has already are not adopted again, and a photo that was embedded keeps its rows. Every
    batch is one commit: a run that was killed resumes from there. Bad rows raise nothing; they are counted by reason.

    Args:
        config: the encodings and their models.
        gallery: path or URL of the gallery.
        progress: called after every commit.

    Raises:
        SourceError: there is nothing to adopt, or a file is damaged.
        ConfigError: the file is of another kind.
        ContractError: the gallery was made with other models.
    """
    source = open_encodings(config.encodings, config.names, labels=config.labels, dim=_find_wanted_dim(config))
    contract = config.make_contract(source)
    # Encodings that name their models must name those of the gallery.
    if source.contract is not None:
        Contract.from_json(source.contract).require(contract, repr(source.path))
    # An empty file must not create a gallery.
    if next((table for table in source.batches() if table.num_rows), None) is None:
        raise SourceError(f"no encoding in {config.encodings!r}")
    with hold_lease(gallery) as lease:
        return _run_locked(config, source, Gallery.open_or_create(gallery, contract), lease, progress)


def _find_wanted_dim(config: AdoptConfig) -> int | None:
    """Find how long vectors must be by the options; None if the file decides. Files of other lengths are refused."""
    if config.dim is not None or config.embedder is None or config.embedder.startswith(FEATURES):
        return config.dim
    return Contract.from_models(config.detector, config.embedder, flip=False).dim


def _run_locked(
    config: AdoptConfig, source: EncodingSource, gallery: Gallery, lease: Lease, progress: Progress
) -> AdoptSummary:
    """Adopt all batches of a source, while the caller holds the gallery's lease."""
    current_run = get_current_run()
    if current_run:
        current_run.set_versions(before=gallery.version)
        current_run.save()  # there may have been no gallery when the run began
    summary = AdoptSummary(current_run.id if current_run else new_run_id(), columns=_describe_roles(source))
    attach_summary(summary)
    began = time.monotonic()
    commit = Committer(gallery, summary.run, lease)
    name = config.source or os.path.basename(source.path.rstrip("/"))
    # Images that were erased stay out, by their uri and by their content.
    adoption = Adoption(
        gallery,
        name,
        erased_uris=suppressed.read_uris(gallery.path),
        erased_contents=suppressed.read_contents(gallery.path),
    )
    try:
        with RequestTaker(commit, lease) as taker:
            for number, table in enumerate(taker.follow(regroup_by_image(source.batches()))):
                # A batch holds whole images, and is written as one part and committed at once.
                rows, items = adoption.adopt_table(table)
                record = PartRecord(number)
                if rows.num_rows:
                    adoption.tally.add_norms(rows["embedding_norm"].to_numpy())
                    write_part(add_shared_columns(rows, name), items, gallery.faces_folder, summary.run, record)
                summary.update(adoption.tally)
                summary.seconds = round(time.monotonic() - began, 3)
                commit([record], _collect_figures(summary))
                progress(summary)
    finally:
        adoption.close()
    summary.version = Gallery(gallery.path).version
    return summary


def _describe_roles(source: EncodingSource) -> list[str]:
    """Describe which column was used as what."""
    roles = cast(dict[str, str | None], asdict(source.roles))
    return [f"{role}: {column or 'the array'}" for role, column in roles.items() if column is not None]


def _collect_figures(summary: AdoptSummary) -> dict[str, Any]:
    """Collect the metadata of a commit: counts and times, no names."""
    counts = {name: getattr(summary, name) for name in ("listed", "adopted", "replaced", "skipped", "repeated")}
    return {
        "job": "adopt",
        "facepipe": facepipe.__version__,
        **counts,
        "erased": summary.erased,
        "refused": dict(summary.refused),
        "seconds": summary.seconds,
    }
