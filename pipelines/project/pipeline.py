"""project: fit the matrix that reduces a model's vectors to fewer dimensions, on the faces of a gallery.

One pass in this process. Memory holds second moments and the faces that the loss is measured on.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from facepipe.decisions.gallery import DecidedGallery
from facepipe.errors import ConfigError, GalleryError, ModelError
from facepipe.evaluation.projected import VerificationScores, draw_pairs, score_vectors
from facepipe.models.projection import Projection, SecondMoment, check_face_count, fit_projection, save_projection
from facepipe.models.protocols import Embedder
from facepipe.models.runtime.device import resolve_device
from facepipe.models.zoo.card_file import CardFile, read_card, to_toml
from facepipe.models.zoo.loading import hash_without_projection, load_card, load_embedder
from facepipe.schema import DEFAULT_DIM, MAX_DIM, MIN_DIM, OK
from facepipe.stages import Decode, Read
from facepipe.storage import write
from facepipe.types import Float32, UInt8
from pipelines.project.faces import FaceCutter, FaceSample, choose_faces
from pipelines.runtime.plan import detect_local_resources
from pipelines.runtime.run_record import attach_summary, record_calls


@dataclass(frozen=True)
class ProjectConfig:
    """Configure the fit of a projection.

    Attributes:
        dim: dimensions to reduce to.
        faces: maximum number of faces to fit on; at least ten times the model's dimensions, and the more the better.
        seed: random seed of the choice of faces and pairs.
        pairs: file of the pairs to measure the loss on: LFW's pairs.txt, or a CSV with file_x, file_y, same. Default:
            pairs are drawn from persons who are left out of the fit.
        held: share of the persons to leave out of the fit for that.
        flip: average the vectors of a chip and of its mirror image, as galleries do.
        device: cpu, cuda or auto.
        threads: threads of the model on a CPU; default: all.
        batch: chips per call of the model.
        read: stage that reads images.
        decode: stage that decodes images.
    """

    dim: Annotated[int, Field(ge=MIN_DIM, le=MAX_DIM)] = DEFAULT_DIM
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
    """What was fitted, and what it loses. `facepipe models project --json` prints these fields under these names.

    Attributes:
        card: TOML file of the projected model.
        projection: file of the matrix.
        dim: dimensions of the model.
        reduced_dim: dimensions that it is reduced to.
        faces: faces fitted on.
        images: counts of images, by status.
        energy: share of the vectors' squared length that these keep.
        full: verification with all dimensions; None if it was not measured.
        reduced: verification with the reduced dimensions; None if it was not measured.
        unmeasured: why it was not measured.
        measured_on_fit: whether pairs show faces that were fitted on, so that the real loss is slightly larger.
        seconds: duration.
    """

    card: str = ""
    projection: str = ""
    dim: int = 0
    reduced_dim: int = DEFAULT_DIM
    faces: int = 0
    images: dict[str, int] = field(default_factory=dict)
    energy: float = 0.0
    full: VerificationScores | None = None
    reduced: VerificationScores | None = None
    unmeasured: str = ""
    measured_on_fit: bool = False
    seconds: float = 0.0


@record_calls("project")
def run(
    config: ProjectConfig, card: str, gallery: str, log: Callable[[str], None] = lambda line: None
) -> ProjectSummary:
    """Write a projection and the TOML file NAME-DIM.toml, such as NAME-128.toml, beside a model's NAME.toml.

    NAME.toml itself does not change.

    No detector runs: boxes and landmarks are the gallery's, whichever models it was made with.

    Args:
        config: how to fit.
        card: TOML file of the model.
        gallery: gallery whose images are embedded.
        log: called with lines about the progress.

    Raises:
        ConfigError: One of the files exists.
        GalleryError: The faces are not enough to fit on.
        ModelError: The model has no more dimensions than wanted, or the gallery has too few faces.
    """
    began = time.monotonic()
    path = Path(card)
    toml = path.with_name(f"{path.stem}-{config.dim}.toml")
    name = path.stem if config.dim == DEFAULT_DIM else f"{path.stem}-{config.dim}"
    weights = path.with_name(f"{name}.projection.safetensors")
    for output in (toml, weights):
        if output.exists():
            raise ConfigError(f"{str(output)!r} exists: move it away, or copy {path.name} to another name")
    card_file = read_card(path)
    table = DecidedGallery(gallery)
    table.freeze()  # the faces are counted first, and read then
    # Choose the faces, and find out whether they are enough before any image is read.
    embedder = _load_model(path, card_file, config)
    summary = ProjectSummary(str(toml), str(weights), embedder.dim, config.dim)
    attach_summary(summary)
    sample = choose_faces(
        table, dim=embedder.dim, count=config.faces, held=config.held, seed=config.seed, pairs_file=config.pairs
    )
    check_face_count(len(sample.fitted), embedder.dim)
    # Embed them, fit the projection, and measure what it loses.
    cutter = FaceCutter(table, str(path), config.read, config.decode)
    moment, raw_vectors = _embed_faces(config, embedder, cutter, sample, summary, log)
    projection = _fit_projection(moment, summary)
    _measure_loss(summary, sample, raw_vectors, projection, config.seed)
    # Write the matrix and the card.
    facts = {
        "gallery": table.path,
        "version": str(table.version),
        "contract": table.contract.to_json(),
        "faces": str(summary.faces),
        "seed": str(config.seed),
        "model_sha256": hash_without_projection(path, card_file),
    }
    save_projection(weights, projection, facts)
    write(str(toml), to_toml(_build_card(card_file, weights.name, summary)).encode())
    load_card(toml)  # fails if what was written cannot be read
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def _load_model(path: Path, card_file: CardFile, config: ProjectConfig) -> Embedder:
    """Load the embedder without a projection. Raises ModelError if it cannot or need not be projected."""
    if card_file.role != "embedder":
        raise ModelError(f"{path}: {card_file.name} is a {card_file.role}; expected an embedder")
    load_card(path)  # checks the weights' SHA-256
    threads = config.threads or detect_local_resources().cpus
    embedder = load_embedder(path, resolve_device(config.device), threads, raw=True)
    # A model of as many dimensions or fewer needs no projection.
    if embedder.dim <= config.dim:
        fit_projection(SecondMoment(embedder.dim), config.dim)  # raises and says why
    return embedder


def _embed_faces(
    config: ProjectConfig,
    embedder: Embedder,
    cutter: FaceCutter,
    sample: FaceSample,
    summary: ProjectSummary,
    log: Callable[[str], None],
) -> tuple[SecondMoment, dict[int, Float32]]:
    """Cut and embed the faces of the sample.

    Returns:
        The second moments of the faces to fit on; and the raw vectors of those to measure on, by face id.
    """
    moment = SecondMoment(embedder.dim)
    raw_vectors: dict[int, Float32] = {}
    images = Counter[str]()
    done = 0
    for ids, chips in cutter.cut_chips(sample.all, images):
        # Vectors are (n, dim). Those to fit on only add to the moments, so that memory does not grow with them.
        vectors = _embed_chips(embedder, chips, config)
        moment.add(vectors[np.isin(ids, sample.fitted)])
        raw_vectors |= {int(n): v for n, v in zip(ids, vectors, strict=True) if n in sample.measured}
        done += len(ids)
        summary.images = dict(images)
        summary.faces = moment.count
        log(f"{done} of {len(sample.all)} faces")
    summary.images = dict(images)
    summary.faces = moment.count
    return moment, raw_vectors


def _embed_chips(embedder: Embedder, chips: UInt8, config: ProjectConfig) -> Float32:
    parts = []
    for start in range(0, len(chips), config.batch):
        part = chips[start : start + config.batch]
        vectors = embedder.embed(part)
        # The mirror image reverses the axis of width of (n, h, w, 3).
        parts.append((vectors + embedder.embed(part[:, :, ::-1])) / 2 if config.flip else vectors)
    return np.concatenate(parts) if parts else np.empty((0, embedder.dim), np.float32)


def _fit_projection(moment: SecondMoment, summary: ProjectSummary) -> Projection:
    """Fit the projection. If that fails, the error counts the images that could not be used."""
    failed = sum(count for status, count in summary.images.items() if status != OK)
    try:
        projection = fit_projection(moment, summary.reduced_dim)
    except ModelError as error:
        hint = f"; {failed} images could not be read again or have changed" if failed else ""
        raise GalleryError(f"{error}{hint}") from error
    summary.energy = projection.energy
    return projection


def _measure_loss(
    summary: ProjectSummary, sample: FaceSample, raw_vectors: dict[int, Any], projection: Projection, seed: int
) -> None:
    """Compare the verification of pairs with all dimensions and with the reduced ones, and note it in the summary."""
    # Pairs come from the file, or are drawn from the labels of held-out persons.
    faces = list(raw_vectors)
    pairs = sample.build_pairs(faces) or draw_pairs(sample.get_persons(faces), seed)
    if pairs is None:
        summary.unmeasured = "the gallery has no labels, or too few, to draw pairs from: give --pairs"
        return
    vectors = np.stack(list(raw_vectors.values())).astype(np.float64)
    summary.full = score_vectors(vectors, pairs)
    summary.reduced = score_vectors(vectors @ projection.matrix.astype(np.float64), pairs)
    summary.measured_on_fit = bool(np.isin(sample.fitted, np.array(faces)).any())


def _build_card(card_file: CardFile, projection: str, summary: ProjectSummary) -> CardFile:
    """Build the card of the projected model, with its scores and the threshold of the reduced vectors.

    Args:
        card_file: card of the model.
        projection: file name of the matrix.
        summary: what the projection keeps and loses.
    """
    # The threshold of the full vectors does not hold for the reduced ones, so it is set anew or left empty.
    figures = {**card_file.figures, f"energy_of_{summary.reduced_dim}": round(summary.energy, 6)}
    threshold = None
    if summary.full and summary.reduced:
        for name, scores in (("all_dimensions", summary.full), (str(summary.reduced_dim), summary.reduced)):
            figures[f"accuracy_{name}"] = round(scores.accuracy, 5)
            if scores.tar is not None:
                figures[f"tar_at_far_1e-3_{name}"] = round(scores.tar, 5)
        threshold = round(summary.reduced.threshold, 4)
    return replace(
        card_file,
        name=f"{card_file.name}-{summary.reduced_dim}",
        projection=projection,
        metric="euclidean on unit vectors",
        figures=figures,
        same_person=threshold,
    )
