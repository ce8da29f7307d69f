"""Build the report of duplicates: the least certain groups first, the kept copy before those to drop."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates import Duplicates
from facepipe.curation.duplicates.keep import DROP, KEEP
from facepipe.curation.duplicates.overlap import SharedIdentities
from facepipe.curation.duplicates.rule import KINDS, DuplicateRule
from facepipe.gallery import Gallery
from facepipe.reports.faces import FaceDetails, build_place, read_face_details
from facepipe.reports.histogram import count_values, log_edges
from facepipe.reports.model import (
    Choice,
    Decision,
    Face,
    Figure,
    Group,
    Histogram,
    Mark,
    Report,
    ReviewTarget,
    Step,
    Table,
)
from facepipe.reports.questions import list_review_steps

# What the page shows at most: images per group, groups, pairs of one shot, shared identities.
_IMAGES_PER_GROUP = 8
_MAX_GROUPS = 7000
_MAX_SAME_SHOTS = 3000
_MAX_SHARED = 200
_FACES_PER_IDENTITY = 4
_UNKNOWN_FACE = FaceDetails("", None, None)

_NOT_SEEN = (
    "Not found: copies turned by other angles than quarters, crops of more than a twentieth of the sides, collages, "
    "pictures under text or in a frame, and plain areas without contrast. Pictures without a face are not found if "
    "they are cropped or recoloured at all."
)
FirstFaces = dict[tuple[str, int], dict[str, Any]]  # row of the first face of each image, by uri and side


def build_duplicates_report(
    galleries: Sequence[Gallery],
    found: Duplicates,
    rule: DuplicateRule,
    recall: Figure,
    shared: SharedIdentities | None = None,
) -> Report:
    """Build the report of one gallery's duplicates, or of what two galleries share.

    Args:
        galleries: one gallery, or two.
        found: their duplicates.
        rule: what counts as a duplicate.
        recall: figure that says how complete the search was.
        shared: identities that two galleries share.
    """
    counts = {kind: int(pc.sum(pc.equal(found.pairs["kind"], kind)).as_py() or 0) for kind in KINDS}
    dropped = int(pc.sum(pc.equal(found.decisions["decision"], DROP)).as_py() or 0)
    groups = _DuplicateGroups(galleries, found, shared)
    figures = [
        Figure("images", f"{found.decisions.num_rows:,}"),
        Figure("groups", f"{found.groups.num_rows:,}", "of copies"),
        Figure("to drop", f"{dropped:,}", f"the {rule.keep} of each group is kept"),
    ]
    figures += [Figure(kind.replace("_", " "), f"{count:,}", "pairs of images") for kind, count in counts.items()]
    tables: tuple[Table, ...] = ()
    if shared is not None:
        expected = float(pc.sum(shared.persons["probability"]).as_py() or 0.0)
        count = shared.persons.num_rows
        figures.append(Figure("persons in both", f"{count:,}", f"about {expected:.1f} of them expected to be right"))
        figures.append(
            Figure("look-alikes", f"{shared.look_alikes.num_rows:,}", "pairs of identities, or one name only")
        )
        tables = (
            _build_shared_table("Persons in both", shared.persons),
            _build_shared_table("Look-alikes: near faces, and hardly one person", shared.look_alikes),
        )
    steps: tuple[Step, ...] = ()
    review = None
    if len(galleries) == 1:
        path = galleries[0].path
        again = Step("Find duplicates again, with your decisions:", f"facepipe dedup {shlex.quote(path)}")
        steps = list_review_steps(path, "dedup", again)
        review = ReviewTarget(path, "dedup", galleries[0].version)
    return Report(
        title="Duplicate images" if shared is None else "What two galleries share",
        subtitle=" against ".join(gallery.path for gallery in galleries),
        findings=_describe_findings(found, dropped, shared),
        steps=steps,
        details=(recall,),
        review=review,
        figures=tuple(figures),
        histograms=(_build_distance_histogram(found, rule), _build_size_histogram(found)),
        tables=tables,
        groups=groups,
        notes=(
            "exact: the same bytes. near: the same picture, resized, compressed, cropped, squashed, mirrored, turned "
            "by a quarter or recoloured. The hash of the picture and the distance of the faces agree; of pictures "
            "without a face the hash alone. same shot: the pictures differ, but the faces are so near that the photos "
            "are of one moment. These are listed, and dropped only with drop = same_shot.",
            _NOT_SEEN,
            "keep.txt and drop.txt name the images; pairs, groups and reasons are in the Parquet files beside it.",
        ),
        groups_total=groups.total,
    )


def _describe_findings(found: Duplicates, dropped: int, shared: SharedIdentities | None) -> tuple[str, ...]:
    """Say what was found, and what it means."""
    images = found.decisions.num_rows
    if shared is None:
        if not found.groups.num_rows:
            return (f"None of {images:,} images is a copy of another.",)
        return (
            f"{found.groups.num_rows:,} pictures are in the gallery more than once.",
            f"drop.txt names {dropped:,} of {images:,} images that can go; of each group one image stays.",
        )
    persons = shared.persons.num_rows
    return (
        f"drop.txt names {dropped:,} images of the first gallery that the second one holds as well.",
        f"{persons:,} persons are probably in both galleries. Leave them out of training if the second gallery is a "
        "test set."
        if persons
        else "No person seems to be in both galleries.",
    )


def _build_distance_histogram(found: Duplicates, rule: DuplicateRule) -> Histogram:
    edges = np.linspace(0, rule.radius, 51)
    rows = []
    # Exact copies are found by their bytes: distances say nothing about them.
    for kind in KINDS[1:]:
        distance = found.pairs.filter(pc.equal(found.pairs["kind"], kind))["distance"].drop_null()
        rows.append(count_values(kind.replace("_", " "), distance.to_numpy().astype(np.float64), edges))
    marks = (Mark(rule.near, "near"), Mark(rule.same_shot, "same shot"))
    return Histogram("Distances of faces in pairs", "distance", tuple(rows), marks, log=True)


def _build_size_histogram(found: Duplicates) -> Histogram:
    sizes = found.groups["images"].to_numpy()
    edges = log_edges(1, max(2.0, float(sizes.max(initial=1)) + 1))
    return Histogram("Images of a group", "images", (count_values("groups", sizes, edges),), log=True, log_x=True)


def _build_shared_table(title: str, shared: pa.Table) -> Table:
    rows = []
    for row in shared.slice(0, _MAX_SHARED).to_pylist():
        best = "" if row["best"] is None else f"{row['best']:.3f}"
        same_name = "yes" if row["same_name"] else ""
        faces = f"{row['faces_0']} + {row['faces_1']}"
        rows.append(
            (
                row["identity_0"],
                row["identity_1"],
                f"{row['probability']:.3f}",
                faces,
                same_name,
                str(row["links"]),
                best,
            )
        )
    columns = ("here", "there", "probability", "faces", "same name", "near pairs", "nearest")
    return Table(f"{title} (the first {_MAX_SHARED} of {shared.num_rows:,})", columns, tuple(rows))


class _DuplicateGroups:
    """Persons in both galleries, groups of copies, pairs of the same shot. Pictures are read when they are iterated."""

    def __init__(self, galleries: Sequence[Gallery], found: Duplicates, shared: SharedIdentities | None = None):
        self._galleries = galleries
        self._found = found
        # Pairs of one shot, the nearest first.
        shots = found.pairs.filter(pc.equal(found.pairs["kind"], KINDS[-1]))
        order = [("distance", "ascending"), ("uri_a", "ascending"), ("uri_b", "ascending")]
        self._shots = shots.take(pc.select_k_unstable(shots, _MAX_SAME_SHOTS, order))
        self._shared = shared
        self.total = found.groups.num_rows + shots.num_rows
        if shared is not None:
            self.total += shared.persons.num_rows + shared.look_alikes.num_rows

    def __iter__(self) -> Iterator[Group]:
        yield from self._build_identity_groups()
        groups = self._list_groups()
        shots = self._shots.to_pylist()
        # Read the first faces of all groups in one pass.
        wanted = [(member["uri"], member["side"]) for group in groups for member in group["members"]]
        wanted += [(row[f"uri_{end}"], row[f"side_{end}"]) for row in shots for end in "ab"]
        faces = self._read_first_faces(wanted)
        # Decisions are on faces of one gallery.
        can_decide = len(self._galleries) == 1
        yield from (_build_copy_group(group, faces, can_decide=can_decide) for group in groups)
        yield from (_build_shot_group(row, faces, can_decide=can_decide) for row in shots)

    def _build_identity_groups(self) -> Iterator[Group]:
        """Show pairs of identities: the faces of one beside those of the other."""
        if self._shared is None:
            return
        persons = self._shared.persons.slice(0, _MAX_SHARED).to_pylist()
        look_alikes = self._shared.look_alikes.slice(0, _MAX_SHARED).to_pylist()
        # Choose the largest faces of each name, and read them in one pass per gallery.
        chosen: dict[tuple[int, str], list[int]] = {}
        faces: dict[int, FaceDetails] = {}
        for side, gallery in enumerate(self._galleries):
            names = sorted({row[f"identity_{side}"] for row in persons + look_alikes})
            of_side = _choose_faces(self._shared.faces, side, names)
            chosen |= {(side, name): ids for name, ids in of_side.items()}
            ids = np.array(sorted({face_id for some in of_side.values() for face_id in some}), np.int64)
            faces |= read_face_details(gallery, ids)
        for kind, rows in (("person in both", persons), ("look-alike", look_alikes)):
            for row in rows:
                yield _build_identity_group(kind, row, chosen, faces)

    def _list_groups(self) -> list[dict[str, Any]]:
        """List the groups to show with their first members, the least certain first: their weakest link decides."""
        table = self._found.groups
        certainty = pc.index_in(table["kind"], pa.array(KINDS))
        keys = pa.table({"certainty": certainty, "group": table["group"]})
        order = [("certainty", "descending"), ("group", "ascending")]
        groups = table.take(pc.select_k_unstable(keys, _MAX_GROUPS, order))
        decisions = self._found.decisions
        decisions = decisions.filter(pc.is_in(decisions["group"], groups["group"].combine_chunks().drop_null()))
        # Members by group, the kept image first. Only those that are shown become rows of Python.
        decisions = decisions.append_column("is_other", pc.not_equal(decisions["decision"], KEEP))
        order = [("group", "ascending"), ("is_other", "ascending"), ("uri", "ascending")]
        decisions = decisions.take(pc.sort_indices(decisions, order)).drop_columns(["is_other"])
        numbers = decisions["group"].to_numpy()
        begins = np.searchsorted(numbers, groups["group"].to_numpy())
        ends = np.searchsorted(numbers, groups["group"].to_numpy(), side="right")
        shown = []
        for group, begin, end in zip(groups.to_pylist(), begins.tolist(), ends.tolist(), strict=True):
            count = min(_IMAGES_PER_GROUP, end - begin)
            more = end - begin - count
            shown.append({**group, "members": decisions.slice(begin, count).to_pylist(), "more": more})
        return shown

    def _read_first_faces(self, wanted: list[tuple[str, int]]) -> FirstFaces:
        """Read id, picture and label of the first faces of images, given by uri and side."""
        columns = ["uri", "face_index", "face_id", "thumb", "identity", "width", "height", "box"]
        faces: FirstFaces = {}
        for side, gallery in enumerate(self._galleries):
            uris = sorted({uri for uri, image_side in wanted if image_side == side})
            if not uris:
                continue
            # The row of its first face has the picture of an image.
            for part in gallery.read_chosen_rows("uri", pa.array(uris, pa.string()), columns):
                for row in part.filter(pc.equal(part["face_index"], 0)).to_pylist():
                    faces[row["uri"], side] = row
        return faces


def _choose_faces(faces: pa.Table, side: int, names: list[str]) -> dict[str, list[int]]:
    """Choose the ids of the largest faces of each name in one gallery."""
    is_chosen = pc.and_(pc.equal(faces["side"], side), pc.is_in(faces["identity"], pa.array(names, pa.string())))
    table = faces.filter(is_chosen).select(["identity", "face_id", "face_px"])
    table = table.filter(table["face_id"].is_valid()).sort_by([("face_px", "descending"), ("face_id", "ascending")])
    chosen: dict[str, list[int]] = {}
    for identity, face_id in zip(table["identity"].to_pylist(), table["face_id"].to_pylist(), strict=True):
        ids = chosen.setdefault(identity, [])
        if len(ids) < _FACES_PER_IDENTITY:
            ids.append(face_id)
    return chosen


def _build_identity_group(
    kind: str, row: dict[str, Any], chosen: dict[tuple[int, str], list[int]], details: dict[int, FaceDetails]
) -> Group:
    faces = []
    for side, badge in enumerate(("here", "there")):
        for face_id in chosen.get((side, row[f"identity_{side}"]), []):
            face = details.get(face_id, _UNKNOWN_FACE)
            label = row[f"identity_{side}"]
            faces.append(Face(face.uri, (("label", label),), face.thumb, badge, face_id, label, face.place))
    figures = (("probability", f"{row['probability']:.3f}"), ("faces", f"{row['faces_0']} + {row['faces_1']}"))
    title = f"{row['identity_0']} here, {row['identity_1']} there"
    return Group(title, kind, figures, tuple(faces), suspicion=3 + row["probability"])


def _build_face(uri: str, side: int, figures: tuple[tuple[str, str], ...], badge: str, faces: FirstFaces) -> Face:
    """Show an image by its first face; an image without a face has no picture and no id."""
    row = faces.get((uri, side))
    if row is None:
        return Face(uri, figures, None, badge)
    place = build_place(row["width"], row["height"], row["box"])
    return Face(uri, figures, row["thumb"], badge, row["face_id"], row["identity"] or "", place)


def _build_copy_group(group: dict[str, Any], faces: FirstFaces, *, can_decide: bool) -> Group:
    shown = tuple(
        _build_face(row["uri"], row["side"], _build_reason_figures(row), row["decision"], faces)
        for row in group["members"]
    )
    kind = group["kind"].replace("_", " ")
    figures = (("images", str(group["images"])),)
    suspicion = float(KINDS.index(group["kind"]))
    choices: tuple[Choice, ...] = ()
    # An answer is about all images of a group, so all must be shown.
    ids = [face.face_id for face in shown if face.face_id is not None]
    kept = tuple(Decision("keep", face.face_id) for face in shown if face.badge == KEEP and face.face_id is not None)
    if can_decide and kept and len(ids) == len(shown) and not group["more"]:
        everything = tuple(Decision("keep", face_id) for face_id in ids)
        choices = (
            Choice("a", "Copies: keep one", kept, agrees=True),
            Choice("r", "No copies: keep all", everything, agrees=False),
        )
    title = f"group {group['group']}"
    return Group(title, kind, figures, shown, suspicion, group["more"], choices=choices)


def _build_reason_figures(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Show the reason without the name of the kept copy, which stands beside it."""
    if not row["reason"]:
        return ()
    kept = row["kept_uri"]
    return (("", row["reason"].replace(f" of {kept}", "").replace(f" as {kept}", "")),)


def _build_shot_group(row: dict[str, Any], faces: FirstFaces, *, can_decide: bool) -> Group:
    shown = []
    for end in "ab":
        identity = row[f"identity_{end}"]
        label = (("label", identity),) if identity else ()
        shown.append(_build_face(row[f"uri_{end}"], row[f"side_{end}"], label, "", faces))
    figures = (("distance", f"{row['distance']:.3f}"), ("hash bits apart", str(row["hash_bits"])))
    ids = [face.face_id for face in shown if face.face_id is not None]
    choices: tuple[Choice, ...] = ()
    if can_decide and len(ids) == 2:
        choices = (
            Choice("a", "One moment: keep the first", (Decision("keep", ids[0]),), agrees=True),
            Choice("r", "Keep both", tuple(Decision("keep", face_id) for face_id in ids), agrees=False),
        )
    title = "two photos of one moment"
    return Group(title, "same shot", figures, tuple(shown), suspicion=1 - row["distance"], choices=choices)
