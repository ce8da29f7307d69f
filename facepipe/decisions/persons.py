"""Who is who by decision: groups of faces that are one person, their names, and the identity that counts.

Faces that decisions tie together form a group: faces that are one person (`same_as`), and faces of one name (`is`). Two
groups are two persons if two of their faces are (`different_from`), if a face of one is not the other's person
(`is_not`), or if they have two names.

`DecidedFaces.name_faces` is the one place that says which identity of a face counts: what people have confirmed, else
the source's label, unless people have rejected that.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.decisions.conflicts import find_conflicts
from facepipe.decisions.read import Decisions, read_decisions
from facepipe.decisions.resolve import to_ids
from facepipe.decisions.schema import DIFFERENT_FROM, IS, IS_NOT, SAME_AS
from facepipe.errors import GalleryError
from facepipe.gallery.table import Gallery
from facepipe.sorted_lookup import is_in_sorted, look_up_sorted
from facepipe.types import Bool, Int64

_SHOWN = 5
_NO_IDS = np.empty(0, np.int64)
_NO_PAIRS = np.empty((0, 2), np.int64)


@dataclass(frozen=True)
class DecidedFaces:
    """The faces of a gallery that people have decided on, in groups of one person each.

    Attributes:
        ids: Sorted ids of the faces, (q,).
        group: Number of each face's group, (q,), 0 to g - 1.
        name: Number of each group's name, (g,), -1 for none. No two groups have one name. A group may be of a name
            only, without a face in the gallery.
        names: The names, sorted.
        different: Pairs of groups that are two persons, (r, 2). Groups with two names need no pair.
        ignored: Sorted ids of faces that are out of clusters and answers: no face, or nobody of interest.
        kept: Sorted ids of faces that are right as they are.
        version: Version of the table of decisions; -1 if there is none.
    """

    ids: Int64 = field(default_factory=_NO_IDS.copy)
    group: Int64 = field(default_factory=_NO_IDS.copy)
    name: Int64 = field(default_factory=_NO_IDS.copy)
    names: tuple[str, ...] = ()
    different: Int64 = field(default_factory=_NO_PAIRS.copy)
    ignored: Int64 = field(default_factory=_NO_IDS.copy)
    kept: Int64 = field(default_factory=_NO_IDS.copy)
    version: int = -1

    def __bool__(self) -> bool:
        return bool(len(self.ids) or len(self.ignored) or len(self.kept))

    @property
    def group_count(self) -> int:
        """Number of groups."""
        return len(self.name)

    def find_groups(self, ids: Int64) -> Int64:
        """Find the groups (m,) of faces (m,); -1 for those that nobody has decided on."""
        return look_up_sorted(self.ids, self.group, ids)

    def find_names(self, ids: Int64) -> Int64:
        """Find the numbers (m,) of the confirmed names of faces (m,); -1 for faces without one."""
        group = self.find_groups(ids)
        names = np.append(self.name, -1)  # of no group
        return np.asarray(names[group], np.int64)

    def is_ignored(self, ids: Int64) -> Bool:
        """Tell which faces (m,) are out of clusters and answers."""
        return is_in_sorted(self.ignored, ids)

    def is_confirmed(self, ids: Int64) -> Bool:
        """Tell of which faces (m,) people have confirmed the identity: as a name, or as the label that they have."""
        return (self.find_names(ids) >= 0) | is_in_sorted(self.kept, ids)

    @cached_property
    def _group_of_name(self) -> Int64:
        """The group of each name, -1 for none."""
        groups = np.full(len(self.names), -1, np.int64)
        named = np.flatnonzero(self.name >= 0)
        groups[self.name[named]] = named
        return groups

    @cached_property
    def _different_keys(self) -> Int64:
        """A sorted key per pair of groups, in both directions."""
        pairs = np.concatenate([self.different, self.different[:, ::-1]])
        return np.unique(pairs[:, 0] * self.group_count + pairs[:, 1])

    def reject_names(self, ids: Int64, names: pa.Array | pa.ChunkedArray) -> Bool:
        """Tell for each face (m,) whether people have said that it is not the person of this name (m,)."""
        group = self.find_groups(ids)
        if not (group >= 0).any():
            return np.zeros(len(ids), bool)
        number = _to_numbers(pc.index_in(names.cast(pa.string()), value_set=pa.array(self.names, pa.string())))
        own = np.append(self.name, -1)[group]
        other = np.append(self._group_of_name, -1)[number]
        is_rejected = is_in_sorted(self._different_keys, group * self.group_count + other)
        is_rejected &= (group >= 0) & (other >= 0)
        # A face that is somebody is nobody else.
        is_other_name = (own >= 0) & (own != number) & np.asarray(names.is_valid().to_numpy(zero_copy_only=False))
        return np.asarray(is_rejected | is_other_name, bool)

    def name_faces(self, ids: Int64, identities: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Return the identity of each face that counts.

        Args:
            ids: ids of the faces, (m,); -1 for rows without a face.
            identities: labels that the source gives, (m,).

        Returns:
            The name that people have confirmed, else the source's label. It is null if there is none, if people have
            said that the face is not this person, or if they ignore it.
        """
        labels = identities.combine_chunks() if isinstance(identities, pa.ChunkedArray) else identities
        labels = pa.concat_arrays(labels.chunks) if isinstance(labels, pa.ChunkedArray) else labels
        labels = labels.cast(pa.string())
        if not len(self.ids) and not len(self.ignored):
            return labels
        number = self.find_names(ids)
        is_rejected = self.reject_names(ids, labels) | self.is_ignored(ids)
        number[self.is_ignored(ids)] = -1
        confirmed = pa.array(self.names, pa.string()).take(pa.array(number, mask=number < 0))
        kept_labels = pc.if_else(pa.array(is_rejected), pa.scalar(None, pa.string()), labels)
        return pc.if_else(pa.array(number >= 0), confirmed, kept_labels)


def read_decided_faces(gallery: Gallery | str) -> DecidedFaces:
    """Read what people have decided on the persons of a gallery.

    Raises:
        GalleryError: decisions contradict each other, or the table of decisions is damaged.
    """
    return group_decisions(read_decisions(gallery), gallery if isinstance(gallery, str) else gallery.path)


def group_decisions(decisions: Decisions, gallery: str = "GALLERY") -> DecidedFaces:
    """Find the groups of faces that decisions make one person.

    Args:
        decisions: the active decisions.
        gallery: path of the gallery, for messages.

    Raises:
        GalleryError: decisions contradict each other.
    """
    if not len(decisions):
        return DecidedFaces(version=decisions.version)
    _refuse_conflicts(decisions, gallery)
    links = _DecisionLinks(decisions)
    count = len(links.faces) + len(links.names)
    group = _find_components(count, links.same)
    different = np.sort(group[links.different], axis=1)
    _refuse_moved_conflicts(links, group, different, gallery)
    name = np.full(int(group.max(initial=-1)) + 1, -1, np.int64)
    name[group[len(links.faces) :]] = np.arange(len(links.names))
    # Only faces of the gallery are looked up; those that have left it tie others together all the same.
    is_present = is_in_sorted(links.present, links.faces)
    return DecidedFaces(
        ids=links.faces[is_present],
        group=group[: len(links.faces)][is_present],
        name=name,
        names=tuple(links.names),
        different=np.unique(different, axis=0),
        ignored=np.union1d(decisions.ignored, decisions.not_faces),
        kept=decisions.kept,
        version=decisions.version,
    )


class _DecisionLinks:
    """Faces and names as nodes of a graph, the names behind the faces.

    Attributes:
        faces: Sorted ids of all faces that decisions name, those that have left the gallery included.
        present: Sorted ids of those among them that the gallery holds.
        names: Sorted names.
        same: Pairs of nodes that are one person, (m, 2).
        different: Pairs of nodes that are two persons, (p, 2).
    """

    def __init__(self, decisions: Decisions):
        rows = decisions.rows
        kinds = np.array(rows["decision"].to_pylist(), object)
        recorded = to_ids(rows["face_id"])
        recorded_others = to_ids(rows["other_face_id"])
        about_persons = np.isin(kinds.astype(str), (IS, IS_NOT, SAME_AS, DIFFERENT_FROM))
        everyone = np.concatenate([recorded, recorded_others, decisions.face_id, decisions.other_face_id])
        everyone = everyone[np.tile(about_persons, 4)]
        present = np.concatenate([decisions.face_id, decisions.other_face_id])[np.tile(about_persons, 2)]
        self.faces = np.unique(everyone[everyone >= 0])
        self.present = np.unique(present[present >= 0])
        self.names = sorted({name for name in rows["person"].to_pylist() if name is not None})
        # A face that was found under another id is the same face.
        first = np.where(recorded >= 0, recorded, decisions.face_id)
        second = np.where(recorded_others >= 0, recorded_others, decisions.other_face_id)
        moved = [_pair_present(first, decisions.face_id), _pair_present(second, decisions.other_face_id)]
        # A row without an id means a face only while the gallery holds it.
        has_both = (first >= 0) & (second >= 0)
        is_same = (kinds == SAME_AS) & has_both
        is_different = (kinds == DIFFERENT_FROM) & has_both
        tied = np.stack([first, second], axis=1)
        pairs = np.concatenate([tied[is_same], *(pair[np.isin(pair[:, 0], self.faces)] for pair in moved)])
        self.same = np.concatenate(
            [np.searchsorted(self.faces, pairs), self._pair_names(rows, (kinds == IS) & (first >= 0), first)]
        )
        self.different = np.concatenate(
            [
                np.searchsorted(self.faces, tied[is_different]),
                self._pair_names(rows, (kinds == IS_NOT) & (first >= 0), first),
            ]
        )

    def _pair_names(self, rows: pa.Table, is_chosen: Bool, faces: Int64) -> Int64:
        """Pair the faces of the chosen rows with the nodes of their names."""
        at = np.flatnonzero(is_chosen)
        persons = rows["person"].take(pa.array(at))
        number = _to_numbers(pc.index_in(persons, value_set=pa.array(self.names, pa.string())))
        return np.stack([np.searchsorted(self.faces, faces[at]), len(self.faces) + number], axis=1).astype(np.int64)


def _pair_present(recorded: Int64, present: Int64) -> Int64:
    """Pair recorded ids (n,) with the different ids (n,) under which the gallery holds the faces now."""
    is_moved = (recorded >= 0) & (present >= 0) & (recorded != present)
    return np.stack([recorded[is_moved], present[is_moved]], axis=1)


def _find_components(count: int, pairs: Int64) -> Int64:
    """Find the connected components (count,) of nodes that pairs (m, 2) tie together."""
    edges = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(connected_components(edges.tocsr(), directed=False)[1], np.int64)


def _to_numbers(indices: pa.Array | pa.ChunkedArray) -> Int64:
    """Turn indices (n,) into numbers, -1 for null."""
    return np.asarray(pc.fill_null(indices, -1).to_numpy(zero_copy_only=False), np.int64)


def _refuse_conflicts(decisions: Decisions, gallery: str) -> None:
    conflicts = find_conflicts(decisions.rows, _SHOWN)
    if not conflicts:
        return
    ids = decisions.rows["decision_id"].to_pylist()
    lines = [f"{conflict.reason} (decisions {', '.join(ids[row] for row in conflict.rows)})" for conflict in conflicts]
    raise GalleryError(
        f"decisions of {gallery!r} contradict each other: {'; '.join(lines)}. Take one of each back with "
        f"`facepipe decisions {gallery} --undo ID`"
    )


def _refuse_moved_conflicts(links: _DecisionLinks, group: Int64, different: Int64, gallery: str) -> None:
    """Refuse contradictions that come about because two faces that people decided on are one face now."""
    is_one = different[:, 0] == different[:, 1]
    named = group[len(links.faces) :]
    repeated = np.flatnonzero(np.bincount(named, minlength=1) > 1)
    if not is_one.any() and not len(repeated):
        return
    of_faces = group[: len(links.faces)]
    wrong = np.append(different[is_one, 0], repeated)[:1]
    faces = ", ".join(map(str, links.faces[of_faces == wrong[0]][:_SHOWN].tolist()))
    raise GalleryError(
        f"decisions of {gallery!r} contradict each other: the faces {faces} are one person by some of them and two by "
        f"others. `facepipe decisions {gallery}` lists them; take one back with `--undo ID`"
    )
