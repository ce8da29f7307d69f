"""One-to-many identification in a gallery: rank-1, and the misses (FNIR) that a rate of false alarms (FPIR) costs.

Terms as in NIST's FRTE 1:N reports. Every probe is a labelled face of the gallery, searched with itself left out; for
false alarms with all faces of its identity left out.
"""

from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.errors import EvaluationError
from facepipe.gallery import Gallery
from facepipe.hashing import hash64
from facepipe.index.search import Index
from facepipe.storage.hashtable import HashTable
from facepipe.types import Bool, Float32, Float64, Int64, UInt64

PROBES = 10_000
FPIRS = (0.1, 0.01, 0.001)
_FIRST_K = 20
_MOST_K = 5000
_FEW = 10


@dataclass(frozen=True)
class Probes:
    """n probes: distances (n,) to the nearest mate and the nearest other identity, infinite where there is none found.

    gallery: faces whose label can be relied on; share: of all faces, those.
    """

    mate: Float64
    other: Float64
    gallery: int
    share: float


@dataclass(frozen=True)
class Operating:
    """A threshold: its false alarms (FPIR) and its misses (FNIR, None without mated probes); on how many probes."""

    fpir: float
    threshold: float
    fnir: float | None
    false_alarms: int
    probes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Identification:
    """rank_1: share of mated probes whose nearest face is a mate; points by FPIR, those that the probes can show."""

    probes: int
    mated: int
    rank_1: float
    points: tuple[Operating, ...]


def probe(gallery: Gallery, index: Index, most: int = PROBES, seed: int = 0) -> Probes:
    """Search a seeded sample of labelled faces in the gallery's own index.

    Of photos with several faces the label belongs to one of them and nobody says which: they neither search nor count.
    """
    with closing(_crowds(gallery)) as crowds:
        ids, names, faces, labelled = _labelled(gallery, crowds, most, seed)
        if not len(ids):
            raise EvaluationError("no face in the gallery has an identity: labels are needed to tell mates from others")
        vectors = index.get_vectors(ids)
        held = np.abs(np.linalg.norm(vectors, axis=1) - 1) < 0.1  # not yet indexed
        mate, other = _nearest_of_each(index, crowds, ids[held], names[held], vectors[held])
    return Probes(mate, other, labelled, labelled / max(1, faces))


def _nearest_of_each(
    index: Index,
    crowds: HashTable,
    ids: Int64,
    names: npt.NDArray[np.object_],
    vectors: Float32,
) -> tuple[Float64, Float64]:
    """Distances (n,) to the nearest mate and the nearest other; those whose k nearest are all mates ask for more."""
    mate, other = np.full(len(ids), np.inf), np.full(len(ids), np.inf)
    open_, k = np.arange(len(ids)), min(_FIRST_K, index.live)
    while open_.size:
        hits = index.search(vectors[open_], k)
        labels = index.get_labels(hits.ids.ravel())
        flat = np.array(labels["identity"].to_pylist(), object).reshape(hits.ids.shape)
        known = (flat != None) & (hits.ids != ids[open_][:, None])  # noqa: E711  elementwise
        known &= ~crowds.get(_hashes(labels["uri"]))[0].reshape(hits.ids.shape)
        same = flat == names[open_][:, None]
        mate[open_] = _nearest(hits.distances, known & same)
        other[open_] = _nearest(hits.distances, known & ~same)
        if k >= min(index.live, _MOST_K):
            break
        open_, k = open_[~np.isfinite(other[open_])], min(4 * k, index.live)
    return mate, other


def _crowds(gallery: Gallery) -> HashTable:
    """Hashes of the uris with more than one face."""
    found = HashTable()
    for batch in gallery.batches(["uri", "face_index"], "face_index = 1", rows=65536):
        found.add(_hashes(batch["uri"]))
    return found


def _hashes(uris: Any) -> UInt64:
    return np.array([hash64(uri or "") for uri in uris.to_pylist()], np.uint64)


def _nearest(distances: Float32, mask: Bool) -> Float64:
    return np.asarray(np.where(mask, distances, np.inf).min(axis=1, initial=np.inf), np.float64)


def _labelled(
    gallery: Gallery, crowds: HashTable, most: int, seed: int
) -> tuple[Int64, npt.NDArray[np.object_], int, int]:
    """(ids, identities, faces, labelled faces): those with the smallest random keys, so that one pass is enough."""
    rng = np.random.default_rng(seed)
    ids, names, keys = np.empty(0, np.int64), np.empty(0, object), np.empty(0)
    faces = labelled = 0
    for batch in gallery.batches(["face_id", "identity", "uri"], "face_id is not null", rows=65536):
        identities = np.array(batch["identity"].to_pylist(), object)
        chosen = identities != None  # noqa: E711  elementwise
        chosen &= ~crowds.get(_hashes(batch["uri"]))[0]
        faces, labelled = faces + len(chosen), labelled + int(chosen.sum())
        ids = np.concatenate([ids, batch["face_id"].to_numpy()[chosen]])
        names = np.concatenate([names, identities[chosen]])
        keys = np.concatenate([keys, rng.random(int(chosen.sum()))])
        if len(ids) > most:
            kept = np.sort(np.argpartition(keys, most)[:most])
            ids, names, keys = ids[kept], names[kept], keys[kept]
    return ids, names, faces, labelled


def operating_point(found: Probes, fpir: float) -> Operating:
    """The largest threshold whose false alarms stay within the FPIR, and what it misses.

    The alarms are counted against the labelled faces; where only a share of the gallery has labels, as many times more
    faces can raise one, and the threshold is set for them. Raises EvaluationError for fewer than 1 / FPIR probes.
    """
    counted = 1 - (1 - fpir) ** found.share
    probes = len(found.other)
    allowed = int(np.floor(counted * probes + 1e-9))
    if allowed < 1:
        raise EvaluationError(
            f"FPIR={fpir:g} needs {int(np.ceil(1 / counted))} labelled probes to be seen once; there are {probes}"
        )
    ordered = np.sort(found.other)
    # Just below the first impostor that may not be let in.
    beyond = ordered[allowed] if allowed < probes else 2.0
    if beyond <= 0:
        raise EvaluationError(
            f"no threshold gives FPIR={fpir:g}: too many faces are the same, to the bit, under two identities; "
            "remove duplicates and wrong labels first"
        )
    threshold = float(np.nextafter(np.float32(beyond), np.float32(0))) if np.isfinite(beyond) else 2.0
    mated = np.isfinite(found.mate)
    hit = (found.mate <= threshold) & (found.mate < found.other)
    fnir = float(1 - hit[mated].mean()) if mated.any() else None
    return Operating(fpir, threshold, fnir, int((found.other <= threshold).sum()), probes)


def choose_threshold(gallery: Gallery, fpir: float, recall: float | None = None) -> Operating:
    """Choose the largest threshold whose false alarms stay within a rate, from searches in the gallery's own index.

    Args:
        gallery: a gallery with an index, and with labels.
        fpir: rate of false alarms, between 0 and 1.
        recall: recall@10 of the searches, by default the one the index was built for.

    Raises:
        EvaluationError: if there are fewer labelled faces than the rate needs.
    """
    return operating_point(probe(gallery, Index(gallery.path, recall)), fpir)


def identification(found: Probes) -> Identification:
    """All figures."""
    mated = np.isfinite(found.mate)
    points = tuple(
        operating_point(found, fpir) for fpir in FPIRS if (1 - (1 - fpir) ** found.share) * len(found.other) >= 1
    )
    rank_1 = float((found.mate[mated] < found.other[mated]).mean()) if mated.any() else float("nan")
    return Identification(len(found.other), int(mated.sum()), rank_1, points)


def few(point: Operating) -> bool:
    """Whether a threshold stands on so few false alarms that another sample would move it much."""
    return point.false_alarms < _FEW
