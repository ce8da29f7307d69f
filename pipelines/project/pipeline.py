"""fit_projection: a gallery's faces, cut and embedded anew, in; the matrix that brings a model's vectors to 128-D out.

One pass in this process; what is held in memory are second moments and the faces that the loss is measured on.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from facepipe.errors import ConfigError, GalleryError, ModelError
from facepipe.evaluation.projected import VerificationScores, draw_pairs, score_vectors
from facepipe.gallery import Gallery
from facepipe.models.projection import Projection, SecondMoment, check_face_count, fit_projection, save_projection
from facepipe.models.protocols import Embedder
from facepipe.models.runtime.device import resolve_device
from facepipe.models.zoo.card_file import CardFile, read_card, to_toml
from facepipe.models.zoo.loading import fingerprint_without_projection, load_card, load_embedder
from facepipe.schema import EMBEDDING_DIM, OK
from facepipe.stages import Decode, Read
from facepipe.storage import write
from facepipe.types import Float32, UInt8
from pipelines.project.faces import FaceCutter, FaceSample, choose_faces
from pipelines.runtime.plan import detect_local_resources
from pipelines.runtime.run_record import attach_summary, record_calls

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ProjectConfig:
    """How a projection is fitted.

    faces: of the gallery, chosen by seed; the more the better, ten times the model's dimensions at least
    pairs: LFW's pairs.txt or a CSV with file_x, file_y, same, to measure the loss on; without it pairs are drawn from
        people that are left out of the fit
    held: share of the people that is left out for that; flip: average the mirrored chip in, as galleries do
    device: cpu, cuda or auto; threads: of ONNX Runtime on a CPU, by default all
    batch: chips given to the model at once
    """

    faces: Annotated[int, Field(ge=1)] = 20_000
    seed: int = 0
    pairs: str | None = None
    held: Annotated[float, Field(gt=0, lt=1)] = 0.2
    flip: bool = True
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=1)] = 64
    read: Read = field(default_factory=Read)
    decode: Decode = field(default_factory=Decode)


@dataclass
class ProjectSummary:
    """What was fitted, and what it loses.

    faces: fitted on; images: read, by status; energy: share of the vectors' squared length that 128 dimensions keep
    full, reduced: verification with all dimensions and with 128; None where no pairs could be made, and why
    measured_on_fit: whether pairs are of faces that were fitted on, so that the real loss is a little larger
    """

    card: str = ""
    projection: str = ""
    dim: int = 0
    faces: int = 0
    images: dict[str, int] = field(default_factory=dict)
    energy: float = 0.0
    full: VerificationScores | None = None
    reduced: VerificationScores | None = None
    unmeasured: str = ""
    measured_on_fit: bool = False
    seconds: float = 0.0


@record_calls("project")
def run(config: ProjectConfig, card: str, gallery: str, progress: Progress = lambda line: None) -> ProjectSummary:
    """Write NAME.projection.safetensors and NAME-128.toml beside a model's NAME.toml, which stays as it is.

    No detector is run: boxes and landmarks are the gallery's, whichever model that was made with. Raises ConfigError
    where one of the files exists, ModelError for a model of 128 dimensions or fewer and for too few faces.
    """
    began = time.monotonic()
    path = Path(card)
    toml, weights = path.with_name(f"{path.stem}-128.toml"), path.with_name(f"{path.stem}.projection.safetensors")
    for there in (toml, weights):
        if there.exists():
            raise ConfigError(f"{str(there)!r} exists: move it away, or copy {path.name} to another name")
    file, table = read_card(path), Gallery(gallery)
    embedder = _load_model(path, file, config)
    summary = ProjectSummary(str(toml), str(weights), embedder.dim)
    attach_summary(summary)
    sample = choose_faces(table, embedder.dim, config.faces, config.held, config.seed, config.pairs)
    check_face_count(len(sample.fitted), embedder.dim)  # before any image is read
    moment, raw = _embed_faces(config, path, embedder, table, sample, summary, progress)
    projection = _fit_projection(moment, summary)
    _measure_loss(summary, sample, raw, projection, config.seed)
    told = {"gallery": table.path, "version": str(table.version), "contract": table.contract.to_json()}
    told |= {
        "faces": str(summary.faces),
        "seed": str(config.seed),
        "model_sha256": fingerprint_without_projection(path, file),
    }
    save_projection(weights, projection, told)
    write(str(toml), to_toml(_build_card(file, weights.name, summary)).encode())
    load_card(toml)  # what was written can be read
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def _load_model(path: Path, file: CardFile, config: ProjectConfig) -> Embedder:
    if file.role != "embedder":
        raise ModelError(f"{path}: {file.name} is a {file.role}; embedders are projected")
    load_card(path)  # checks the weights' SHA-256
    made = load_embedder(path, resolve_device(config.device), config.threads or detect_local_resources().cpus, raw=True)
    if made.dim <= EMBEDDING_DIM:
        fit_projection(SecondMoment(made.dim))  # says why not
    return made


def _embed_faces(
    config: ProjectConfig,
    path: Path,
    embedder: Embedder,
    gallery: Gallery,
    sample: FaceSample,
    summary: ProjectSummary,
    progress: Progress,
) -> tuple[SecondMoment, dict[int, Float32]]:
    """Second moments of the faces to fit on, and raw vectors by id of those to measure on."""
    moment, raw, images = SecondMoment(embedder.dim), dict[int, Float32](), Counter[str]()
    faces = FaceCutter(gallery, str(path), config.read, config.decode)
    done = 0
    for ids, chips in faces.cut_chips(sample.all, images):
        vectors = _embed_chips(embedder, chips, config)
        moment.add(vectors[np.isin(ids, sample.fitted)])
        raw |= {int(n): v for n, v in zip(ids, vectors, strict=True) if n in sample.measured}
        done += len(ids)
        summary.images, summary.faces = dict(images), moment.count
        progress(f"{done} of {len(sample.all)} faces")
    summary.images, summary.faces = dict(images), moment.count
    return moment, raw


def _embed_chips(embedder: Embedder, chips: UInt8, config: ProjectConfig) -> Float32:
    parts = []
    for at in range(0, len(chips), config.batch):
        part = chips[at : at + config.batch]
        vectors = embedder.embed(part)
        parts.append((vectors + embedder.embed(part[:, :, ::-1])) / 2 if config.flip else vectors)
    return np.concatenate(parts) if parts else np.empty((0, embedder.dim), np.float32)


def _fit_projection(moment: SecondMoment, summary: ProjectSummary) -> Projection:
    failed = sum(count for status, count in summary.images.items() if status != OK)
    try:
        found = fit_projection(moment)
    except ModelError as error:
        told = f"; {failed} images could not be read again or have changed" if failed else ""
        raise GalleryError(f"{error}{told}") from error
    summary.energy = found.energy
    return found


def _measure_loss(
    summary: ProjectSummary, sample: FaceSample, raw: dict[int, Any], projection: Projection, seed: int
) -> None:
    pairs = sample.build_pairs(list(raw)) or draw_pairs(sample.get_persons(list(raw)), seed)
    if pairs is None:
        summary.unmeasured = "the gallery has no labels, or too few, to draw pairs from: give --pairs"
        return
    vectors = np.stack(list(raw.values())).astype(np.float64)
    summary.full = score_vectors(vectors, pairs)
    summary.reduced = score_vectors(vectors @ projection.matrix.astype(np.float64), pairs)
    summary.measured_on_fit = bool(np.isin(sample.fitted, np.array(list(raw))).any())


def _build_card(file: CardFile, projection: str, summary: ProjectSummary) -> CardFile:
    """What the model says of itself, with the projection, what it keeps, and the threshold of the reduced vectors."""
    figures = {**file.figures, "energy_of_128": round(summary.energy, 6)}
    threshold = None
    if summary.full and summary.reduced:
        for name, found in (("all_dimensions", summary.full), ("128", summary.reduced)):
            figures |= {f"accuracy_{name}": round(found.accuracy, 5)}
            figures |= {f"tar_at_far_1e-3_{name}": round(found.tar, 5)} if found.tar is not None else {}
        threshold = round(summary.reduced.threshold, 4)
    told = {"name": f"{file.name}-128", "projection": projection, "metric": "euclidean on unit vectors"}
    return replace(file, **told, figures=figures, same_person=threshold)  # type: ignore[arg-type]
