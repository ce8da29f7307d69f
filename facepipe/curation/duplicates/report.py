"""The report of duplicates: the least certain groups first, the kept copy before those that go."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.curation.duplicates import Duplicates
from facepipe.curation.duplicates.rule import KINDS, DuplicateRule
from facepipe.gallery import Gallery
from facepipe.reports.histogram import log_edges, series
from facepipe.reports.model import Face, Figure, Group, Histogram, Mark, Report, Table

_IMAGES = 8  # shown of a group
_GROUPS, _SHOTS = 7000, 3000
_SHARED = 200


def duplicates_report(
    galleries: Sequence[Gallery], found: Duplicates, rule: DuplicateRule, recall: Figure, shared: pa.Table | None = None
) -> Report:
    """The report of one gallery's duplicates, or of what two share (`shared`: their identities)."""
    counts = {kind: int(pc.sum(pc.equal(found.pairs["kind"], kind)).as_py() or 0) for kind in KINDS}
    dropped = int(pc.sum(pc.equal(found.decisions["decision"], "drop")).as_py() or 0)
    groups = _Groups(galleries, found)
    figures = [
        Figure("images", f"{found.decisions.num_rows:,}"),
        Figure("groups", f"{found.groups.num_rows:,}", "of copies"),
        Figure("to drop", f"{dropped:,}", f"of each group the {rule.keep} stays"),
        *(Figure(kind.replace("_", " "), f"{n:,}", "pairs of images") for kind, n in counts.items()),
        recall,
    ]
    tables: tuple[Table, ...] = ()
    if shared is not None:
        figures.append(Figure("shared identities", f"{shared.num_rows:,}", "by faces or by name"))
        tables = (_shared(shared),)
    return Report(
        title="Duplicate images" if shared is None else "What two galleries share",
        subtitle=" against ".join(gallery.path for gallery in galleries),
        figures=tuple(figures),
        histograms=_histograms(found, rule),
        tables=tables,
        groups=groups,
        notes=(
            "exact: the same bytes. near: the same picture, resized, compressed, cropped, mirrored or recoloured: "
            "the hash of the picture and the distance of the faces agree. same shot: faces so near that the photos are "
            "of one moment, pictures that differ; these are listed, and go only where it was asked for.",
            "keep.txt and drop.txt name the images; pairs, groups and reasons are in the Parquet files beside it.",
        ),
        groups_total=groups.total,
    )


def _histograms(found: Duplicates, rule: DuplicateRule) -> tuple[Histogram, ...]:
    edges, rows = np.linspace(0, rule.radius, 51), []
    for kind in KINDS[1:]:
        chosen = found.pairs.filter(pc.equal(found.pairs["kind"], kind))["distance"]
        rows.append(series(kind.replace("_", " "), chosen.to_numpy().astype(np.float64), edges))
    sizes = found.groups["images"].to_numpy()
    bins = log_edges(1, max(2.0, float(sizes.max(initial=1)) + 1))
    marks = (Mark(rule.near, "near"), Mark(rule.same_shot, "same shot"))
    return (
        Histogram("Distances of faces in pairs", "distance", tuple(rows), marks, log=True),
        Histogram("Images of a group", "images", (series("groups", sizes, bins),), log=True, log_x=True),
    )


def _shared(shared: pa.Table) -> Table:
    rows = []
    for row in shared.slice(0, _SHARED).to_pylist():
        best = "" if row["best"] is None else f"{row['best']:.3f}"
        same = "yes" if row["same_name"] else ""
        rows.append((row["identity_0"], row["identity_1"], same, str(row["links"]), best, f"{row['share']:.2f}"))
    title = f"Shared identities (the first {_SHARED} of {shared.num_rows:,})"
    return Table(title, ("here", "there", "same name", "near pairs", "nearest", "share of pairs"), tuple(rows))


class _Groups:
    """Groups, their pictures read when they are asked for."""

    def __init__(self, galleries: Sequence[Gallery], found: Duplicates):
        self._galleries, self._found = galleries, found
        shots = pc.equal(found.pairs["kind"], KINDS[-1])
        self._shots = found.pairs.filter(shots).sort_by([("distance", "ascending"), ("uri_a", "ascending")])
        self.total = found.groups.num_rows + self._shots.num_rows

    def __iter__(self) -> Iterator[Group]:
        groups, shots = self._members(), self._shots.slice(0, _SHOTS).to_pylist()
        wanted = [(m["uri"], m["side"]) for group in groups for m in group["members"]]
        wanted += [(row[f"uri_{x}"], row[f"side_{x}"]) for row in shots for x in "ab"]
        thumbs = self._thumbs(wanted)
        yield from (_group(group, thumbs) for group in groups)
        yield from (_shot(row, thumbs) for row in shots)

    def _members(self) -> list[dict[str, Any]]:
        """The groups to show, the least certain first: their farthest pair decides."""
        grouped = self._found.decisions.filter(self._found.decisions["group"].is_valid())
        by_group: dict[int, list[dict[str, Any]]] = {}
        table = self._found.groups.sort_by([("group", "ascending")])
        order = np.argsort([-KINDS.index(kind) for kind in table["kind"].to_pylist()], kind="stable")[:_GROUPS]
        chosen = table.take(pa.array(order))
        inside = grouped.filter(pc.is_in(grouped["group"], chosen["group"].combine_chunks()))
        for row in inside.to_pylist():
            by_group.setdefault(row["group"], []).append(row)
        shown = []
        for group in chosen.to_pylist():
            members = sorted(by_group.get(group["group"], []), key=lambda m: (m["decision"] != "keep", m["uri"]))
            shown.append({**group, "members": members[:_IMAGES], "more": max(0, len(members) - _IMAGES)})
        return shown

    def _thumbs(self, wanted: list[tuple[str, int]]) -> dict[tuple[str, int], bytes]:
        found = {}
        for side, gallery in enumerate(self._galleries):
            uris = sorted({uri for uri, s in wanted if s == side})
            if not uris:
                continue
            where = ds.field("uri").isin(pa.array(uris, pa.string())) & (ds.field("face_index") == 0)
            for batch in gallery.batches(["uri", "thumb"], where):
                for uri, thumb in zip(batch["uri"].to_pylist(), batch["thumb"].to_pylist(), strict=True):
                    found[uri, side] = thumb
        return found


def _group(group: dict[str, Any], thumbs: dict[tuple[str, int], bytes]) -> Group:
    faces = tuple(
        Face(m["uri"], _because(m), thumbs.get((m["uri"], m["side"])), m["decision"]) for m in group["members"]
    )
    kind = group["kind"].replace("_", " ")
    figures = (("images", str(group["images"])),)
    return Group(f"group {group['group']}", kind, figures, faces, float(KINDS.index(group["kind"])), group["more"])


def _because(member: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The reason without the name of the kept copy, which stands beside it."""
    if not member["reason"]:
        return ()
    kept = member["kept_uri"]
    return (("", member["reason"].replace(f" of {kept}", "").replace(f" as {kept}", "")),)


def _shot(row: dict[str, Any], thumbs: dict[tuple[str, int], bytes]) -> Group:
    faces = tuple(
        Face(row[f"uri_{x}"], _label(row[f"identity_{x}"]), thumbs.get((row[f"uri_{x}"], row[f"side_{x}"])))
        for x in "ab"
    )
    figures = (("distance", f"{row['distance']:.3f}"), ("hash bits apart", str(row["hash_bits"])))
    return Group("two photos of one moment", "same shot", figures, faces, suspicion=1 - row["distance"])


def _label(identity: str | None) -> tuple[tuple[str, str], ...]:
    return (("label", identity),) if identity else ()
