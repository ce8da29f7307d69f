"""measure: find out what a model's distances mean, on the faces of a gallery, and write it into its TOML file."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from facepipe.decisions.gallery import DecidedGallery
from facepipe.errors import GalleryError, ModelError
from facepipe.evaluation.model_limits import (
    MIN_FACES,
    Alteration,
    CopyLimits,
    SamePersonEstimate,
    alter_chips,
    estimate_same_person,
    measure_copy_limits,
)
from facepipe.gallery import Gallery
from facepipe.hashing import hash64
from facepipe.models.projection import to_unit_vectors
from facepipe.models.protocols import Embedder
from facepipe.models.runtime.device import resolve_device
from facepipe.models.zoo.card_file import read_card, set_measured_limits
from facepipe.models.zoo.loading import load_card
from facepipe.stages import Decode, Read
from facepipe.types import Float32, Int64, UInt8
from pipelines.project.faces import FaceCutter
from pipelines.runtime.plan import detect_local_resources
from pipelines.runtime.run_record import attach_summary, record_calls

_COLUMNS = ("face_id", "uri", "identity")
_MAX_PER_PERSON = 4  # images, so that no person is most of the sample


@dataclass(frozen=True)
class MeasureConfig:
    """Configure the measurement of a model.

    Attributes:
        faces: maximum number of faces.
        altered: maximum number of faces that altered copies are made of.
        seed: random seed of the choice of faces and pairs.
        labels: use the gallery's labels to tell who is one person. Wrong labels make the distance too large.
        flip: average the vectors of a chip and of its mirror image, as galleries do.
        device: cpu, cuda or auto.
        threads: threads of the model on a CPU; default: all.
        batch: chips per call of the model.
        read: stage that reads images.
        decode: stage that decodes images.
    """

    faces: Annotated[int, Field(ge=MIN_FACES)] = 1_000
    altered: Annotated[int, Field(ge=20)] = 100
    seed: int = 0
    labels: bool = True
    flip: bool = True
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=1)] = 64
    read: Read = field(default_factory=Read)
    decode: Decode = field(default_factory=Decode)


@dataclass
class MeasureSummary:
    """What was measured. `facepipe models measure --json` prints these fields under these names.

    Attributes:
        card: TOML file of the model, which now holds the figures.
        faces: faces measured on.
        images: counts of images, by status.
        same_person: distance up to which two faces are likely of one person; None until it is measured.
        copies: distances up to which faces are of copies.
        seconds: duration.
    """

    card: str = ""
    faces: int = 0
    images: dict[str, int] = field(default_factory=dict)
    same_person: SamePersonEstimate | None = None
    copies: CopyLimits | None = None
    seconds: float = 0.0


@record_calls("measure")
def run(
    config: MeasureConfig, card: str, gallery: str, log: Callable[[str], None] = lambda line: None
) -> MeasureSummary:
    """Measure a model, and write `same_person` and the limits of copies into its TOML file.

    No detector runs: boxes and landmarks are the gallery's, whichever models it was made with.

    Args:
        config: how to measure.
        card: TOML file of the model.
        gallery: gallery whose images are embedded.
        log: called with lines about the progress.

    Raises:
        GalleryError: The gallery has too few faces.
        ModelError: The model is not an embedder.
    """
    began = time.monotonic()
    path = Path(card)
    embedder = _load_model(path, config)
    table = DecidedGallery(gallery)
    table.freeze()
    summary = MeasureSummary(str(path))
    attach_summary(summary)
    faces, persons = _choose_faces(table, config)
    if len(faces) < MIN_FACES:
        raise GalleryError(
            f"{gallery!r} has {len(faces)} images with a face: measuring a model takes {MIN_FACES} at least"
        )
    # Embed the faces, and altered copies of the first of them.
    vectors: list[Float32] = []
    kept: list[Int64] = []
    copies: dict[Alteration, list[list[Float32]]] = {"moved": [[], []], "degraded": [[], []]}
    altered = 0
    images = Counter[str]()
    cutter = FaceCutter(table, str(path), config.read, config.decode)
    for ids, chips in cutter.cut_chips(faces, images):
        if not len(ids):
            continue
        kept.append(ids)
        vectors.append(_embed(embedder, chips, config))
        wanted = chips[: max(0, config.altered - altered)]
        if len(wanted) and altered == sum(len(block) for block in kept[:-1]):
            altered += len(wanted)
            for alteration, sets in alter_chips(wanted).items():
                for known, changed in zip(copies[alteration], sets, strict=True):
                    known.append(_embed(embedder, changed, config))
        summary.images = dict(images)
        summary.faces += len(ids)
        log(f"{summary.faces} of {len(faces)} faces")
    if summary.faces < MIN_FACES:
        raise GalleryError(
            f"{summary.faces} of {len(faces)} images could be read again: measuring a model takes {MIN_FACES} at least"
        )
    stacked = np.concatenate(vectors)
    person = persons[np.searchsorted(faces, np.concatenate(kept))]
    summary.same_person = estimate_same_person(stacked, person if config.labels else None, config.seed)
    originals = np.arange(altered)
    made = {name: [(originals, np.concatenate(parts)) for parts in sets] for name, sets in copies.items()}
    summary.copies = measure_copy_limits(stacked, made, config.seed)
    _write_card(path, summary.same_person, summary.copies, summary.faces)
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def _load_model(path: Path, config: MeasureConfig) -> Embedder:
    card = load_card(path)
    if card.role != "embedder":
        raise ModelError(f"{path}: {card.name} is a {card.role}; expected an embedder")
    embedder: Embedder = card.load(resolve_device(config.device), config.threads or detect_local_resources().cpus)
    return embedder


def _choose_faces(gallery: Gallery, config: MeasureConfig) -> tuple[Int64, Int64]:
    """Choose one face per image, of persons with many images as well as with one.

    Returns:
        The ids, ascending, and the number of each face's person, -1 without a label.
    """
    kept: list[tuple[int, int, str | None]] = []  # order of the person, face id, label
    per_person = Counter[int]()
    highest = 1 << 64
    for batch in gallery.batches(["face_id", "uri", "identity", "landmarks"], "face_id is not null and face_index = 0"):
        faces = pa.Table.from_batches([batch])
        faces = faces.filter(faces["landmarks"].is_valid())
        for face_id, uri, name in zip(*(faces[column].to_pylist() for column in _COLUMNS), strict=True):
            # Persons come in the order of their hash, so that a few images of one are chosen together.
            order = hash64(f"{config.seed}:{uri if name is None else name}")
            if order > highest or per_person[order] >= _MAX_PER_PERSON:
                continue
            per_person[order] += 1
            kept.append((order, face_id, name))
        if len(kept) > 4 * config.faces:
            kept = sorted(kept, key=lambda row: row[:2])[: config.faces]
            highest = kept[-1][0]
    chosen = sorted(sorted(kept, key=lambda row: row[:2])[: config.faces], key=lambda row: row[1])
    numbers: dict[str, int] = {}
    ids = np.array([face_id for _, face_id, _ in chosen], np.int64)
    persons = [-1 if name is None else numbers.setdefault(name, len(numbers)) for _, _, name in chosen]
    return ids, np.array(persons, np.int64)


def _embed(embedder: Embedder, chips: UInt8, config: MeasureConfig) -> Float32:
    parts = []
    for start in range(0, len(chips), config.batch):
        part = chips[start : start + config.batch]
        vectors = embedder.embed(part)
        # The mirror image reverses the axis of width of (n, h, w, 3).
        parts.append((vectors + embedder.embed(part[:, :, ::-1])) / 2 if config.flip else vectors)
    return to_unit_vectors(np.concatenate(parts)).astype(np.float32)


def _write_card(path: Path, same: SamePersonEstimate, copies: CopyLimits, faces: int) -> None:
    figures = {
        "same_person_low": round(same.low, 4),
        "same_person_high": round(same.high, 4),
        "same_person_pairs": same.same,
        "copies_near": round(copies.near, 4),
        "copies_close_near": round(copies.close_near, 4),
        "copies_same_shot": round(copies.same_shot, 4),
        "measured_faces": faces,
    }
    set_measured_limits(path, read_card(path), round(same.distance, 4), figures)
    load_card(path)  # fails if what was written cannot be read
