"""Measure one-to-many identification in a gallery: rank-1, and the misses (FNIR) at rates of false alarms (FPIR).

Terms are those of NIST's FRTE 1:N reports. Every probe is a labelled face of the gallery. It is searched with itself
left out; for false alarms all faces of its identity are left out.
"""

from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.errors import EvaluationError
from facepipe.gallery import Gallery
from facepipe.hashing import hash64
from facepipe.index.manifest import require_contract
from facepipe.index.search import Index
from facepipe.storage.hashtable import HashTable
from facepipe.types import Bool, Float32, Float64, Int64, UInt64

MAX_PROBES = 10_000
FPIRS = (0.1, 0.01, 0.001)
# Neighbours per search: at first, and at most if all of them are mates.
_FIRST_K = 10
_MAX_K = 5000
# With fewer false alarms than this a threshold is called unstable.
_FEW_ALARMS = 10
_ROWS = 65536


@dataclass(frozen=True)
class Probes:
    """Distances of n probes to their nearest faces.

    Attributes:
        mate: Distance to the nearest face of the same identity, (n,), infinite if none was found.
        other: Distance to the nearest face of another identity, (n,), infinite if none was found.
        gallery: Number of faces whose label can be relied on.
        share: Their share of all faces.
    """

    mate: Float64
    other: Float64
    gallery: int
    share: float


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold and the errors that it makes.

    Attributes:
        fpir: False positive identification rate that the threshold was set for.
        threshold: Maximum distance of a match.
        fnir: False negative identification rate, None without mated probes.
        false_alarms: Number of probes with a false alarm.
        probes: Number of probes.
    """

    fpir: float
    threshold: float
    fnir: float | None
    false_alarms: int
    probes: int

    @property
    def has_few_alarms(self) -> bool:
        """Whether there are too few false alarms for a stable estimate: another sample would move it much."""
        return self.false_alarms < _FEW_ALARMS

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Identification:
    """Figures of identification.

    Attributes:
        probes: Number of probes.
        mated: Probes for which a mate was found.
        rank_1: Share of mated probes whose nearest face is a mate.
        points: Operating points, one per FPIR that the probes can show.
    """

    probes: int
    mated: int
    rank_1: float
    points: tuple[OperatingPoint, ...]


def search_probes(gallery: Gallery, index: Index, max_probes: int = MAX_PROBES, seed: int = 0) -> Probes:
    """Search a seeded sample of labelled faces in the gallery's own index.

    The label of a photo with several faces belongs to one of them, and the gallery does not say to which. Such faces
    are neither searched nor counted.

    Args:
        gallery: the gallery.
        index: its index.
        max_probes: size of the sample at most.
        seed: seed of the sample.

    Raises:
        EvaluationError: if no face has an identity.
    """
    with closing(_hash_crowded_photos(gallery)) as crowded:
        # Take a sample, and the vectors of those that the index holds.
        sample = _sample_labelled_faces(gallery, crowded, max_probes, seed)
        if not len(sample.ids):
            raise EvaluationError("no face in the gallery has an identity: labels are needed to tell mates from others")
        vectors = index.get_vectors(sample.ids)
        is_indexed = np.abs(np.linalg.norm(vectors, axis=1) - 1) < 0.1  # vectors of other faces are zero
        mate, other = _find_nearest(
            index, crowded, sample.ids[is_indexed], sample.identities[is_indexed], vectors[is_indexed]
        )
    return Probes(mate, other, sample.labelled_count, sample.labelled_count / max(1, sample.face_count))


def _find_nearest(
    index: Index, crowded: HashTable, ids: Int64, identities: npt.NDArray[np.object_], vectors: Float32
) -> tuple[Float64, Float64]:
    """Find the distances (n,) to the nearest mate and to the nearest other.

    A probe whose k nearest faces are all mates is searched again with a larger k.
    """
    mate = np.full(len(ids), np.inf)
    other = np.full(len(ids), np.inf)
    pending = np.arange(len(ids))
    k = min(_FIRST_K, index.live)
    # Search with more and more neighbours until each probe has met a face of another identity.
    while pending.size:
        hits = index.search(vectors[pending], k)
        labels = index.get_labels(hits.ids.ravel())
        # Arrays (p, k). A neighbour counts if its label can be relied on and it is not the probe itself.
        found = np.array(labels["identity"].to_pylist(), object).reshape(hits.ids.shape)
        is_known = (found != None) & (hits.ids != ids[pending][:, None])  # noqa: E711  elementwise
        is_known &= ~crowded.get(_hash_uris(labels["uri"]))[0].reshape(hits.ids.shape)
        is_same = found == identities[pending][:, None]
        mate[pending] = _get_smallest(hits.distances, is_known & is_same)
        other[pending] = _get_smallest(hits.distances, is_known & ~is_same)
        if k >= min(index.live, _MAX_K):
            break
        pending = pending[~np.isfinite(other[pending])]
        k = min(4 * k, index.live)
    return mate, other


def _hash_crowded_photos(gallery: Gallery) -> HashTable:
    """Collect the hashes of the uris with more than one face."""
    table = HashTable()
    # A photo has several faces if it has a second one.
    for batch in gallery.batches(["uri", "face_index"], "face_index = 1", rows=_ROWS):
        table.add(_hash_uris(batch["uri"]))
    return table


def _hash_uris(uris: Any) -> UInt64:
    return np.array([hash64(uri or "") for uri in uris.to_pylist()], np.uint64)


def _get_smallest(distances: Float32, mask: Bool) -> Float64:
    return np.asarray(np.where(mask, distances, np.inf).min(axis=1, initial=np.inf), np.float64)


@dataclass(frozen=True)
class _LabelledSample:
    """A sample of labelled faces: ids (n,), identities (n,), and how many faces there are and have a label."""

    ids: Int64
    identities: npt.NDArray[np.object_]
    face_count: int
    labelled_count: int


def _sample_labelled_faces(gallery: Gallery, crowded: HashTable, max_faces: int, seed: int) -> _LabelledSample:
    """Sample the labelled faces with the smallest random keys, so that one pass is enough."""
    rng = np.random.default_rng(seed)
    ids = np.empty(0, np.int64)
    identities = np.empty(0, object)
    keys = np.empty(0)
    face_count = 0
    labelled_count = 0
    for batch in gallery.batches(["face_id", "identity", "uri"], "face_id is not null", rows=_ROWS):
        batch_identities = np.array(batch["identity"].to_pylist(), object)
        is_labelled = batch_identities != None  # noqa: E711  elementwise
        is_labelled &= ~crowded.get(_hash_uris(batch["uri"]))[0]
        count = int(is_labelled.sum())
        face_count += len(is_labelled)
        labelled_count += count
        ids = np.concatenate([ids, batch["face_id"].to_numpy()[is_labelled]])
        identities = np.concatenate([identities, batch_identities[is_labelled]])
        keys = np.concatenate([keys, rng.random(count)])
        # Keep the smallest keys so far: a uniform sample in bounded memory.
        if len(ids) > max_faces:
            kept = np.sort(np.argpartition(keys, max_faces)[:max_faces])
            ids = ids[kept]
            identities = identities[kept]
            keys = keys[kept]
    return _LabelledSample(ids, identities, face_count, labelled_count)


def find_operating_point(probes: Probes, fpir: float) -> OperatingPoint:
    """Find the largest threshold whose false alarms stay within the FPIR, and what it misses.

    The alarms are counted against the labelled faces. If only a share of the gallery has labels, as many times more
    faces can raise one, and the threshold is set for them.

    Raises:
        EvaluationError: if there are fewer than 1 / FPIR probes, or if no threshold has so few false alarms.
    """
    # The rate among labelled faces at which the whole gallery raises alarms at the rate `fpir`.
    counted = 1 - (1 - fpir) ** probes.share
    count = len(probes.other)
    # The small term keeps a whole number from being rounded down.
    allowed = int(np.floor(counted * count + 1e-9))
    if allowed < 1:
        needed = int(np.ceil(1 / counted))
        # The smallest rate that this many faces can show.
        possible = 1 - (1 - 1 / count) ** (1 / probes.share) if count and probes.share else 1.0
        hint = f": try FPIR={np.ceil(possible * 1000) / 1000:g}" if possible < 0.5 else ""
        raise EvaluationError(
            f"cannot measure 1 false alarm in {1 / fpir:,.0f} with {count:,} labelled faces ({needed:,} needed){hint}"
        )
    # The threshold lies just below the first impostor that may not be let in.
    beyond = np.sort(probes.other)[allowed] if allowed < count else 2.0
    if beyond <= 0:
        raise EvaluationError(
            f"no threshold gives FPIR={fpir:g}: too many faces are the same, to the bit, under two identities; "
            "remove duplicates and wrong labels first"
        )
    threshold = float(np.nextafter(np.float32(beyond), np.float32(0))) if np.isfinite(beyond) else 2.0
    is_mated = np.isfinite(probes.mate)
    # A hit is a mate within the threshold that is nearer than any other identity.
    is_hit = (probes.mate <= threshold) & (probes.mate < probes.other)
    fnir = float(1 - is_hit[is_mated].mean()) if is_mated.any() else None
    return OperatingPoint(fpir, threshold, fnir, int((probes.other <= threshold).sum()), count)


def choose_threshold(gallery: Gallery, fpir: float, recall: float | None = None) -> OperatingPoint:
    """Choose the largest threshold whose false alarms stay within a rate, from searches in the gallery's own index.

    Args:
        gallery: a gallery with an index, and with labels.
        fpir: rate of false alarms, between 0 and 1.
        recall: recall@10 of the searches, by default the one the index was built for.

    Raises:
        EvaluationError: if there are fewer labelled faces than the rate needs.
    """
    index = Index(gallery.path, recall)
    require_contract(index.manifest, gallery)
    # The gallery and its index are read several times, and all passes have to agree.
    gallery.freeze()
    index.freeze()
    return find_operating_point(search_probes(gallery, index), fpir)


def compute_identification(probes: Probes) -> Identification:
    """Compute all figures of identification."""
    count = len(probes.other)
    is_mated = np.isfinite(probes.mate)
    rank_1 = float((probes.mate[is_mated] < probes.other[is_mated]).mean()) if is_mated.any() else float("nan")
    # Only rates that the probes can show at least once.
    points = tuple(
        find_operating_point(probes, fpir) for fpir in FPIRS if (1 - (1 - fpir) ** probes.share) * count >= 1
    )
    return Identification(count, int(is_mated.sum()), rank_1, points)
