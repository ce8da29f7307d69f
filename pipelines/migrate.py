"""migrate: give every face of a gallery the vector of another model. Boxes, landmarks, ids, labels and reports stay.

No detector runs. The new vectors are in a gallery of its own, GALLERY/migration, which can be indexed and searched
beside the old one until it takes its place. All of it is one process: reading and cutting in one thread, the model in
another.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from facepipe import storage
from facepipe.arrow import view_buffers
from facepipe.curation.clusters.placement import STATE
from facepipe.curation.clusters.sums import MARK, SUMS
from facepipe.erasure import pending
from facepipe.erasure.takeup import RequestTaker
from facepipe.errors import ConfigError, EvaluationError, FacepipeError, GalleryBusyError, GalleryError
from facepipe.evaluation.clusters import evaluate_clusters
from facepipe.evaluation.identification import Probes, find_operating_point
from facepipe.evaluation.projected import draw_pairs, score_vectors
from facepipe.gallery import Contract, Gallery, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.log import find_last_equal_version
from facepipe.gallery.commits.parts import PartRecord, write_part
from facepipe.gallery.maintenance.vacuum import claim_unreferenced, delete_files
from facepipe.gallery.migration import (
    ImageStates,
    MigrationProgress,
    commit_switch,
    count_failed,
    count_pending,
    delete_leftovers,
    delete_migration,
    iterate_files,
    iterate_states,
    locate_migration,
    make_failed_row,
    read_states,
)
from facepipe.hashing import hash64, hash64_column
from facepipe.index import manifest as manifests
from facepipe.models.runtime.device import resolve_device
from facepipe.observe.runs import new_run_id
from facepipe.schema import FACES, OK
from facepipe.sources.relocate import ImageLocator
from facepipe.stages import Align, Decode, Embed, Read
from facepipe.stages.chain import Chain
from facepipe.stages.chips import KnownFaces
from facepipe.storage.lease import Lease, hold_lease
from facepipe.types import Float32, Int64
from pipelines import erase
from pipelines import index as index_pipeline
from pipelines.embed.checks import require_commercial_models
from pipelines.index import IndexConfig
from pipelines.project.faces import build_face_table
from pipelines.runtime.plan import detect_local_resources
from pipelines.runtime.run_record import attach_summary, get_current_run, record_calls

_MAX_ROUNDS = 3  # over a gallery that others write to meanwhile
_MAX_EXAMPLES = 5
_MAX_COMPARED = 4_000  # faces that old and new are compared on
_FPIR = 0.01
_NO_LANDMARKS = "the gallery holds no box and landmarks of its faces, as of encodings that were adopted"

OnProgress = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class MigrateConfig:
    """Configure a migration.

    Attributes:
        embedder: name of the new embedder, or its TOML file.
        flip: average the vectors of a chip and of its mirror image; by default as the gallery does.
        policy: any, or commercial: refuse models whose weights or code forbid commercial use, or that are known to be
            trained on data for research only.
        max_failed: largest share of the images with a face that may lose them in the switch, because the image is gone,
            changed or unreadable.
        block: images that are read at a time.
        commit: images per commit.
        batch: chips per call of the model.
        device: cpu, cuda or auto.
        threads: threads of the model on a CPU; default: all.
        read: stage that reads images.
        decode: stage that decodes images.
    """

    embedder: str = ""
    flip: bool | None = None
    policy: Literal["any", "commercial"] = "any"
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.01
    block: Annotated[int, Field(ge=1)] = 64
    commit: Annotated[int, Field(ge=1)] = 4096
    batch: Annotated[int, Field(ge=1)] = 64
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    read: Read = field(default_factory=Read)
    decode: Decode = field(default_factory=Decode)


@dataclass
class SpaceFigures:
    """How well a model's vectors tell persons apart, on the labelled faces that both galleries have.

    Attributes:
        embedder: The model.
        dim: Numbers per vector.
        accuracy: Verification accuracy; None if there are no pairs.
        tar: True accept rate at FAR 1e-3; None if there are too few pairs.
        fnir: False negative identification rate at FPIR 1 %; None if there are too few faces.
        clusters_f: Pairwise F of the gallery's clusters by its labels; None without clusters.
        clusters_bcubed_f: BCubed F of these.
    """

    embedder: str
    dim: int
    accuracy: float | None = None
    tar: float | None = None
    fnir: float | None = None
    clusters_f: float | None = None
    clusters_bcubed_f: float | None = None


@dataclass
class MigrateSummary:
    """What was done. `facepipe migrate --json` prints these fields under these names.

    Attributes:
        gallery: path of the gallery.
        migration: path of the gallery with the new vectors; empty after the switch.
        old: embedder before.
        new: embedder after.
        images: images of the gallery.
        faces: faces that have a new vector.
        migrated: images that this run embedded again, or brought up to date.
        failed: images whose faces could not be embedded again, by reason.
        examples: some of these images, with the reason.
        removed: images that left the new gallery, because the old one has them no more.
        switched: whether the new vectors are the gallery's now.
        deleted: files of the old vectors that were deleted.
        has_index: whether the gallery with the new vectors has an index of them.
        compared: labelled faces that both models were compared on.
        figures: of the old and the new model.
        seconds: duration.
    """

    gallery: str = ""
    migration: str = ""
    old: str = ""
    new: str = ""
    images: int = 0
    faces: int = 0
    migrated: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    removed: int = 0
    switched: bool = False
    deleted: int = 0
    has_index: bool = False
    compared: int = 0
    figures: list[SpaceFigures] = field(default_factory=list)
    seconds: float = 0.0


@record_calls("migrate")
def run(config: MigrateConfig, gallery: str, *, on_progress: OnProgress = lambda line: None) -> MigrateSummary:
    """Embed the faces of a gallery with another model, into the gallery GALLERY/migration.

    A run that was killed resumes where it stopped. The gallery itself does not change.

    Args:
        config: the new model.
        gallery: path or URL.
        on_progress: called with lines about the progress.

    Raises:
        ConfigError: the gallery has this model already, or another migration is unfinished.
        ModelError: the model is unknown or not allowed, or does not go with the gallery's boxes and landmarks.
    """
    began = time.monotonic()
    first = Gallery(gallery)
    contract = make_contract(config, first)
    second_path = locate_migration(first.path)
    delete_leftovers(first.path)
    summary = MigrateSummary(first.path, second_path, first.contract.embedder, contract.embedder)
    attach_summary(summary)
    for number in range(_MAX_ROUNDS):
        with hold_lease(second_path, "migration", on_progress) as lease:
            second = Gallery.open_or_create(second_path, contract)
            commit = Committer(second, new_run_id(), lease)
            with RequestTaker(commit, lease) as taker:
                migration = _Migration(config, Gallery(first.path), second, commit, summary, on_progress)
                # Images that an earlier run could not read may be there again.
                migration.run(taker, retries=number == 0)
        summary.removed += erase.erase_surplus(first.path)
        if not count_pending(Gallery(first.path), Gallery(second_path)):
            break
    second = Gallery(second_path)
    summary.images = second.counts()["images"]
    summary.faces = second.counts()["faces"]
    if manifests.exists(first.path):
        on_progress("indexing the new vectors")
        index_pipeline.run(IndexConfig(), second_path)
        summary.has_index = True
    compare_spaces(summary, Gallery(first.path), second)
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def make_contract(config: MigrateConfig, gallery: Gallery) -> Contract:
    """Make the contract of the new vectors: the gallery's detector, and the new embedder.

    Raises:
        ConfigError: the gallery has this model already.
        ModelError: the model is unknown or not allowed.
    """
    old = gallery.contract
    if not config.embedder:
        raise ConfigError("no embedder is named: --embedder MODEL says which model's vectors the gallery gets")
    if old.is_of_features:
        raise ConfigError(f"{gallery.path!r} holds {old.embedder}: there are no images to embed again")
    if config.policy == "commercial":
        require_commercial_models(config.embedder)
    flip = old.flip if config.flip is None else config.flip
    made = Contract.from_models(old.detector, config.embedder, flip)
    # Boxes and landmarks are those of the file that found them, whatever the detector of this name is by now.
    contract = replace(made, detector_sha256=old.detector_sha256)
    if contract == old:
        raise ConfigError(f"{gallery.path!r} has the vectors of {old.embedder} already")
    return contract


class _Migration:
    """One round over a gallery."""

    def __init__(
        self,
        config: MigrateConfig,
        first: Gallery,
        second: Gallery,
        commit: Committer,
        summary: MigrateSummary,
        on_progress: OnProgress,
    ):
        self._config = config
        self._first = first
        self._second = second
        self._commit = commit
        self._summary = summary
        self._on_progress = on_progress
        self._vectors = _FaceEmbedder(config, second.contract)
        self._blocks = 0

    def run(self, taker: RequestTaker, *, retries: bool) -> None:
        """Embed what is missing or stale, a commit after the other."""
        with closing(MigrationProgress(self._second, retries=retries)) as progress:
            for part in taker.follow(self._iterate_pending(progress)):
                rows, known = part
                self._write(rows, known)
                self._on_progress(f"{self._summary.migrated} images")

    def _iterate_pending(self, progress: MigrationProgress) -> Iterator[tuple[pa.Table, pa.Array]]:
        """Yield rows for the new gallery, of whole images, and the uris of those that it has in an older state."""
        for file in iterate_files(self._first):
            images = [
                (states, progress.find_pending(states), progress.find_known(states)) for states in _read_all(file)
            ]
            wanted = pa.concat_arrays(
                [states.uris.filter(pa.array(is_pending)) for states, is_pending, _ in images]
                or [pa.array([], pa.string())]
            )
            known = [states.uris.filter(pa.array(is_pending & is_known)) for states, is_pending, is_known in images]
            if not len(wanted):
                continue
            # The images of one file of the table, which are whole.
            table = file.to_arrow(FACES.names)
            table = table.filter(pc.is_in(table["uri"], wanted))
            stale = pa.concat_arrays(known)
            for images_of_part in _group_images(table, self._config.commit):
                yield self._make_rows(images_of_part), stale

    def _make_rows(self, images: list[list[Row]]) -> pa.Table:
        """Make the rows of images with new vectors."""
        result: list[Row] = []
        with ThreadPoolExecutor(1, "cut") as pool:
            blocks = [images[at : at + self._config.block] for at in range(0, len(images), self._config.block)]
            # The next block is read and cut while the model runs on this one.
            following: Future[pa.Table] = pool.submit(self._vectors.cut, blocks[0])
            for number, block in enumerate(blocks):
                cut = following.result()
                if number + 1 < len(blocks):
                    following = pool.submit(self._vectors.cut, blocks[number + 1])
                vectors, errors = self._vectors.embed(cut)
                for rows in block:
                    result += self._give_vectors(rows, vectors, errors)
                self._summary.migrated += len(block)
        return pa.Table.from_pylist(result, FACES)

    def _give_vectors(
        self, rows: list[Row], vectors: dict[int, tuple[Float32, float]], errors: dict[str, str]
    ) -> list[Row]:
        """Give the rows of an image their new vectors; one row that says why if they have none."""
        if rows[0]["face_id"] is None:
            return rows
        missing = [row for row in rows if row["face_id"] not in vectors]
        if not missing:
            for row in rows:
                vector, norm = vectors[row["face_id"]]
                row["embedding"] = vector
                row["embedding_norm"] = norm
            return rows
        uri = rows[0]["uri"]
        error = errors.get(uri, _NO_LANDMARKS)
        state = int(read_states(pa.Table.from_pylist(rows[:1], FACES)).states[0])
        failed = Counter(self._summary.failed)
        failed[error] += 1
        self._summary.failed = dict(failed)
        if len(self._summary.examples) < _MAX_EXAMPLES:
            self._summary.examples.append(f"{uri}: {error}")
        return [make_failed_row(rows[0], state, error)]

    def _write(self, rows: pa.Table, known: pa.Array) -> None:
        """Commit rows, without images that are erased from the gallery meanwhile."""
        rows = _drop_erased(self._first.path, rows)
        if not rows.num_rows:
            return
        uris = pc.unique(rows["uri"])
        is_known = pc.is_in(uris, known)
        items = pa.table({"uri": uris, "previous": pc.if_else(is_known, pa.scalar(1, pa.uint64()), None)})
        record = PartRecord(self._blocks)
        self._blocks += 1
        write_part(rows, items, self._second.faces_folder, self._commit.run, record)
        # What an image had before is of no use if it is damaged now.
        record.damaged = []
        self._commit([record], {"job": "migrate", "images": record.images, "faces": record.faces})


def _read_all(file: Gallery) -> list[ImageStates]:
    """Read the states of the images of one file."""
    return list(iterate_states(file))


def _group_images(table: pa.Table, count: int) -> Iterator[list[list[Row]]]:
    """Group rows by their image, up to `count` images at a time. The rows of an image lie in one file."""
    order = pc.sort_indices(table, [("uri", "ascending"), ("face_index", "ascending")])
    uris = table["uri"].take(order).to_pylist()
    starts = [n for n in range(len(uris)) if n == 0 or uris[n] != uris[n - 1]]
    ends = [*starts[1:], len(uris)]
    for at in range(0, len(starts), count):
        first = starts[at]
        last = ends[min(at + count, len(starts)) - 1]
        rows = table.take(order.slice(first, last - first)).to_pylist()
        group = zip(starts[at : at + count], ends[at : at + count], strict=True)
        yield [rows[begin - first : end - first] for begin, end in group]


def _drop_erased(gallery: str, rows: pa.Table) -> pa.Table:
    """Drop the rows of images that are erased from the gallery, or being erased."""
    hidden = Gallery(gallery).read_hidden()
    if hidden:
        rows = rows.filter(hidden.visible)
    erased = suppressed.read_uris(gallery)
    return rows.filter(pa.array(~erased.contains(hash64_column(rows["uri"])))) if rows.num_rows else rows


class _FaceEmbedder:
    """Cuts the faces of images by the boxes and landmarks of the gallery, and embeds them."""

    def __init__(self, config: MigrateConfig, contract: Contract):
        align = Align(embedder=config.embedder, detector=contract.detector, thumbs=False)
        self._chain = Chain((config.read, config.decode, KnownFaces(), align))
        self._chain.setup()
        self._embed = Embed(
            model=config.embedder,
            flip=contract.flip,
            batch=config.batch,
            device=resolve_device(config.device),
            threads=config.threads or detect_local_resources().cpus,
        )
        self._embed.setup()
        self._locator = ImageLocator()

    def cut(self, images: list[list[Row]]) -> pa.Table:
        """Read images, and cut their faces. Images of which the gallery has no landmarks are left out."""
        known = [rows for rows in images if _has_landmarks(rows)]
        return self._chain(build_face_table(known, self._locator)) if known else pa.table({"uri": []})

    def embed(self, cut: pa.Table) -> tuple[dict[int, tuple[Float32, float]], dict[str, str]]:
        """Embed the faces that were cut.

        Returns:
            Unit vector and norm by face id; and by uri why an image could not be read.
        """
        errors: dict[str, str] = {}
        if not cut.num_rows:
            return {}, errors
        for uri, status, error in zip(*(cut[name].to_pylist() for name in ("uri", "status", "error")), strict=True):
            if status != OK:
                errors[uri] = error or status
        width, height = self._embed.embedder.size
        ids: list[int] = []
        chips = []
        columns = (cut["given_faces"].to_pylist(), cut["face_index"].to_pylist(), view_buffers(cut["chip"]))
        for face_ids, index, view in zip(*columns, strict=True):
            if view is not None:
                ids.append(face_ids[index])
                chips.append(np.frombuffer(view, np.uint8).reshape(height, width, 3))
        if not chips:
            return {}, errors
        raw = self._embed.embed_chips(np.stack(chips))
        norms = self._embed.measure_norms(raw)
        unit = (raw / norms[:, None]).astype(np.float32)
        return {face: (unit[n], float(norms[n])) for n, face in enumerate(ids)}, errors


def _has_landmarks(rows: list[Row]) -> bool:
    return all(row["face_id"] is not None and row["landmarks"] is not None and row["box"] is not None for row in rows)


@record_calls("migrate")
def switch(gallery: str, *, max_failed: float = 0.01, on_progress: OnProgress = lambda line: None) -> MigrateSummary:
    """Make the vectors of GALLERY/migration those of the gallery, in one commit.

    Readers that have the gallery open go on with the old vectors. Those stay on the disk until `drop_old`, or until
    `compact` deletes what left the table a day ago.

    Args:
        gallery: path or URL.
        max_failed: largest share of the images with a face that may lose them.
        on_progress: called with lines about the progress.

    Raises:
        ConfigError: there is no migration, or it is not complete.
        GalleryError: more images would lose their faces.
        GalleryBusyError: another run writes to one of the two, or an erasure is not complete.
    """
    began = time.monotonic()
    path = Gallery(gallery).path
    second_path = locate_migration(path)
    if delete_leftovers(path):  # a run that switched was killed at its end
        table = Gallery(path)
        return MigrateSummary(path, new=table.contract.embedder, switched=True, has_index=_has_index(table))
    if not Gallery.exists(second_path):
        raise ConfigError(f"{path!r} has no migration: `facepipe migrate {path} --embedder MODEL` begins one")
    summary = MigrateSummary(path, "", Gallery(path).contract.embedder, Gallery(second_path).contract.embedder)
    attach_summary(summary)
    if Gallery(path).contract != Gallery(second_path).contract:
        erase.erase_surplus(path)
    with hold_lease(path, on_wait=on_progress) as lease:
        with hold_lease(second_path, "migration", on_progress):
            _take_place(Gallery(path), Gallery(second_path), max_failed, lease, on_progress)
            # From here on the gallery has the new vectors. A run that was killed below goes on here.
            summary.has_index = _bring_index(Gallery(path), Gallery(second_path))
            _forget_clusters(path)
        counts = Gallery(path).counts()
        summary.images = counts["images"]
        summary.faces = counts["faces"]
        delete_migration(path)
    summary.switched = True
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def _take_place(first: Gallery, second: Gallery, max_failed: float, lease: Lease, on_progress: OnProgress) -> None:
    """Commit the second gallery's files as those of the first, unless that is done."""
    if first.contract == second.contract:
        return
    _require_switchable(first, second, max_failed)
    current = get_current_run()
    on_progress("switching")
    commit_switch(first, second, Committer(first, current.id if current else new_run_id(), lease))


def _require_switchable(first: Gallery, second: Gallery, max_failed: float) -> None:
    """Require that the second gallery has everything that the first one has, and that few faces are lost."""
    for path in (first.path, second.path):
        unfinished = pending.read_unfinished(path)
        if unfinished:
            raise GalleryBusyError(
                f"an erasure of {path!r} is not complete: `facepipe erase {path} --resume` completes it, then switch"
            )
    waiting = count_pending(first, second)
    if waiting:
        raise ConfigError(
            f"{waiting} images of {first.path!r} came or changed since they were migrated: run `facepipe migrate` with "
            f"--embedder {second.contract.embedder} again, then switch"
        )
    failed = count_failed(second)
    with_faces = first.counts()[OK]
    if failed > max_failed * with_faces:
        raise GalleryError(
            f"{failed} of {with_faces} images would lose their faces, more than --max-failed {max_failed:g}: their "
            f"files are gone, changed or unreadable (`facepipe info {second.path} --failed` names them)"
        )


def _bring_index(first: Gallery, second: Gallery) -> bool:
    """Make the index of the second gallery that of the first; False if it has none of all its faces."""
    if not manifests.exists(second.path):
        return _has_index(first)
    manifest = manifests.load(second.path)
    if find_last_equal_version(second.faces_folder, manifest.table_version) < second.version:
        return False
    source = manifests.open_index_store(second.path)
    target = manifests.open_index_store(first.path)
    with hold_lease(storage.join(first.path, manifests.FOLDER), "index") as lease:
        known, tag = _load_index(first.path)
        for name, file in manifests.list_files(manifest):
            source.fetch(name, file.bytes, file.sha256)
            place = target.local_path(name)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with storage.replace_file(place, sync=True) as unfinished:
                shutil.copyfile(source.local_path(name), unfinished)
        draft = replace(manifest, table_version=first.version, replaced=(), created=time.time())
        manifests.publish(first.path, draft, tag, lease, known=known)
        manifests.sweep(first.path, lease)
    return True


def _has_index(gallery: Gallery) -> bool:
    """Tell whether a gallery has an index of its own model."""
    return manifests.exists(gallery.path) and manifests.load(gallery.path).contract == manifests.dump_contract(gallery)


def _load_index(gallery: str) -> tuple[manifests.Manifest | None, str | None]:
    try:
        manifest, tag = manifests.load_tagged(gallery)
    except FacepipeError:
        return None, manifests.read_tag(gallery)
    return manifest, tag


def _forget_clusters(gallery: str) -> None:
    """Delete by what new faces are placed in clusters: it is of the old vectors. The clusters themselves stay."""
    for name in (STATE, SUMS, MARK):
        with suppress(FacepipeError):
            storage.delete(storage.join(gallery, "reports", "cluster", name))


@record_calls("migrate")
def drop_old(gallery: str) -> MigrateSummary:
    """Delete the files of the vectors that a switch has replaced, and of all other older versions.

    Raises:
        ConfigError: a migration is not switched yet.
        GalleryBusyError: another run is writing to the gallery.
    """
    table = Gallery(gallery)
    if Gallery.exists(locate_migration(table.path)):
        raise ConfigError(f"the migration of {table.path!r} is not switched yet: --switch comes first")
    summary = MigrateSummary(table.path, "", "", table.contract.embedder, switched=True)
    attach_summary(summary)
    with hold_lease(table.path) as lease:
        outdated = claim_unreferenced(table.path, lease)
        delete_files(outdated, lease)
    summary.deleted = len(outdated)
    return summary


# ---- old against new


def compare_spaces(summary: MigrateSummary, first: Gallery, second: Gallery) -> None:
    """Compare both models on the labelled faces that both galleries have, and note the figures."""
    ids, persons = _choose_labelled(first)
    vectors = [_read_vectors(gallery, ids) for gallery in (first, second)]
    has_both = vectors[0].any(axis=1) & vectors[1].any(axis=1)
    summary.compared = int(has_both.sum())
    summary.figures = []
    for gallery, own in zip((first, second), vectors, strict=True):
        figures = SpaceFigures(gallery.contract.embedder, gallery.dim)
        _measure(figures, own[has_both], persons[has_both])
        with suppress(FacepipeError):
            scores = evaluate_clusters(gallery).scores
            figures.clusters_f = round(scores.pairwise.f, 4)
            figures.clusters_bcubed_f = round(scores.bcubed.f, 4)
        summary.figures.append(figures)


def _choose_labelled(gallery: Gallery) -> tuple[Int64, Int64]:
    """Choose labelled main faces, of whole persons: sorted ids, and the number of each one's person."""
    chosen: list[tuple[int, int]] = []  # order of the person, face id
    where = "face_id is not null and face_index = 0 and identity is not null"
    for batch in gallery.batches(["face_id", "identity"], where):
        order = (hash64(name) for name in batch["identity"].to_pylist())
        chosen += zip(order, batch["face_id"].to_pylist(), strict=True)
        if len(chosen) > 4 * _MAX_COMPARED:
            chosen = sorted(chosen)[:_MAX_COMPARED]
    chosen = sorted(sorted(chosen)[:_MAX_COMPARED], key=lambda pair: pair[1])
    ids = np.array([face for _, face in chosen], np.int64)
    persons = np.unique(np.array([order for order, _ in chosen], np.uint64), return_inverse=True)[1]
    return ids, persons.astype(np.int64)


def _read_vectors(gallery: Gallery, ids: Int64) -> Float32:
    """Read the vectors (n, dim) of faces (n,) with sorted ids; zeros for a face that the gallery has not."""
    vectors = np.zeros((len(ids), gallery.dim), np.float32)
    for rows in gallery.read_chosen_rows("face_id", pa.array(ids), ["face_id", "embedding"]):
        at = np.searchsorted(ids, rows["face_id"].to_numpy())
        vectors[at] = np.stack(rows["embedding"].to_pylist())
    return vectors


def _measure(figures: SpaceFigures, vectors: Float32, persons: Int64) -> None:
    """Measure verification and identification; what there are too few faces for stays None."""
    pairs = draw_pairs(persons, seed=0) if len(persons) else None
    if pairs is None:
        return
    scores = score_vectors(vectors, pairs)
    figures.accuracy = round(scores.accuracy, 5)
    figures.tar = None if scores.tar is None else round(scores.tar, 5)
    with suppress(EvaluationError):
        point = find_operating_point(_search_all(vectors, persons), _FPIR)
        figures.fnir = None if point.fnir is None else round(point.fnir, 5)


def _search_all(vectors: Float32, persons: Int64) -> Probes:
    """Search every face among all others."""
    mate = np.full(len(vectors), np.inf)
    other = np.full(len(vectors), np.inf)
    for at in range(0, len(vectors), 512):
        rows = np.arange(at, min(at + 512, len(vectors)))
        distances = np.sqrt(np.maximum(0, 2 - 2 * (vectors[rows] @ vectors.T).astype(np.float64)))
        distances[np.arange(len(rows)), rows] = np.inf
        is_mate = persons[rows][:, None] == persons[None]
        mate[rows] = np.where(is_mate, distances, np.inf).min(axis=1)
        other[rows] = np.where(is_mate, np.inf, distances).min(axis=1)
    return Probes(mate, other, len(vectors), 1.0)
