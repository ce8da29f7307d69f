"""Duplicates: what is kept and dropped does not depend on order, every drop names a kept copy, look-alikes stay apart."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.duplicates import DuplicateRule, Duplicates, find_duplicates, find_shared_identities
from facepipe.curation.duplicates.groups import ImageGroups, group_images
from facepipe.curation.duplicates.images import RankedImages
from facepipe.curation.duplicates.pairs import ImageLinks
from facepipe.errors import ConfigError
from facepipe.imaging.perceptual import mirror_hashes, turn_hashes
from facepipe.nearest.similarity import Pairs

SCHEMA = pa.schema(
    [
        *(("face_id", pa.int64()), ("image_id", pa.string()), ("uri", pa.string()), ("source", pa.string())),
        *(("identity", pa.string()), ("image_hash", pa.int64()), ("width", pa.int32()), ("height", pa.int32())),
        *(("face_index", pa.int16()), ("sharpness", pa.float32()), ("face_px", pa.float32())),
        *(("ingested_at", pa.timestamp("us", "UTC")), ("side", pa.int8())),
    ]
)
START = datetime(2026, 1, 1, tzinfo=UTC)
RULE = DuplicateRule()


def face(n: int, uri: str | None = None, **values: Any) -> dict[str, Any]:
    """A face in an image of its own, of no resemblance to others."""
    plain = {
        "face_id": n,
        "image_id": f"content{n}",
        "uri": uri or f"/i/{n}.jpg",
        "image_hash": int(np.random.default_rng(n).integers(-(1 << 62), 1 << 62)),
        "width": 100,
        "height": 100,
        "face_index": 0,
        "sharpness": 10.0,
        "face_px": 50.0,
        "side": 0,
        "ingested_at": START + timedelta(seconds=n),
    }
    return {**plain, **values}


def find(rows: list[dict[str, Any]], edges: list[tuple[int, int, float]], rule: DuplicateRule = RULE) -> Duplicates:
    u, v, d = (np.array(column) for column in zip(*edges, strict=True)) if edges else (np.zeros(0, int),) * 3
    return find_duplicates(pa.Table.from_pylist(rows, SCHEMA), Pairs(u, v, d.astype(np.float32)), rule)


def kept(found: Duplicates) -> dict[str, str | None]:
    return {row["uri"]: row["kept_uri"] for row in found.decisions.to_pylist()}


def flipped(value: int, bits: int) -> int:
    return value ^ ((1 << bits) - 1)


def check(rows: list[dict[str, Any]], found: Duplicates) -> None:
    """What holds for every result."""
    decisions = {(r["uri"], r["side"]): r for r in found.decisions.to_pylist()}
    assert set(decisions) == {(r["uri"], r["side"]) for r in rows}
    assert len(decisions) == found.decisions.num_rows
    groups = {row["group"]: row for row in found.groups.to_pylist()}
    assert list(groups) == list(range(len(groups)))
    for row in decisions.values():
        if row["decision"] == "drop":
            stays = decisions[row["kept_uri"], row["kept_side"]]
            assert stays["decision"] == "keep", "a drop must name an image that stays"
            assert stays["group"] == row["group"]
            assert row["kept_uri"] in row["reason"]
            assert row["kind"] in ("exact", "near", "same_shot")
        else:
            assert row["kept_uri"] is row["reason"] is row["kind"] is None
    sizes = [row["group"] for row in decisions.values() if row["group"] is not None]
    assert {g: sizes.count(g) for g in groups} == {g: row["images"] for g, row in groups.items()}
    pairs = [((p["uri_a"], p["side_a"]), (p["uri_b"], p["side_b"])) for p in found.pairs.to_pylist()]
    assert len({frozenset(pair) for pair in pairs}) == len(pairs), "two images are one row"
    assert all(a != b for a, b in pairs)


@st.composite
def galleries(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[tuple[int, int, float]]]:
    """A few images with few contents, hashes, names and sizes, and edges among their faces that are symmetric."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    two = draw(st.booleans())
    rows: list[dict[str, Any]] = []
    for n in range(draw(st.integers(1, 25))):
        content = int(rng.integers(0, 12))
        own = np.random.default_rng(content)
        image = {
            "image_id": f"c{content}" if content else None,
            "image_hash": None if content % 5 == 1 else flipped(0, int(own.integers(0, 24))),
            "width": int(own.integers(1, 4)) * 10,
            "identity": None if content % 3 == 0 else f"p{content % 4}",
            "side": int(rng.integers(0, 2)) if two else 0,
        }
        for k in range(int(own.integers(0, 3)) or 1):
            face_id = None if content % 7 == 6 else 100 * n + k
            rows.append(face(n, f"u{n}", **image | {"face_id": face_id, "face_index": k}))
    where = [n for n, row in enumerate(rows) if row["face_id"] is not None]
    edges = [
        (u, v, float(rng.choice([0.0, 0.08, 0.15, 0.22, 0.4])))
        for u in where
        for v in where
        if u < v and rng.random() < 0.4
    ]
    return rows, edges


@settings(deadline=None)
@given(galleries(), st.sampled_from(["largest", "sharpest", "oldest"]), st.sampled_from(["exact", "near", "same_shot"]))
def test_results_hold_together_and_do_not_depend_on_order(
    gallery: tuple[list[dict[str, Any]], list[tuple[int, int, float]]], keep: Any, drop: Any
) -> None:
    rows, edges = gallery
    rule = DuplicateRule(keep=keep, drop=drop)
    found = find(rows, edges, rule)
    check(rows, found)
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    place = np.argsort(order)
    moved = [(int(place[u]), int(place[v]), d) for u, v, d in edges][::-1]
    again = find([rows[n] for n in order], moved, rule)
    assert again.decisions.equals(found.decisions)
    assert again.groups.equals(found.groups)
    assert again.pairs.equals(found.pairs)
    by_content: dict[Any, set[Any]] = {}
    for row in found.decisions.to_pylist():
        if row["image_id"] and len({r["side"] for r in rows}) == 1:
            by_content.setdefault(row["image_id"], set()).add(row["kept_uri"] or row["uri"])
    assert all(len(stays) == 1 for stays in by_content.values()), "exact copies are never split"


@pytest.mark.parametrize(
    ("bits", "distance", "kind"),
    [
        (0, 0.24, "near"),
        (4, 0.24, "near"),
        (5, 0.24, None),
        (5, 0.13, "same_shot"),
        (16, 0.11, "near"),
        (17, 0.11, "same_shot"),
        (0, 0.26, None),
        (30, 0.05, "same_shot"),
        (30, 0.16, None),
    ],
)
def test_hash_and_face_must_agree(bits: int, distance: float, kind: str | None) -> None:
    one = face(1)
    for identity in (None, "a"):
        other = face(2, image_hash=flipped(one["image_hash"], bits), identity=identity)
        found = find([one, other], [(0, 1, distance)])
        assert found.pairs["kind"].to_pylist() == ([kind] if kind else [])
        assert found.groups.num_rows == (kind == "near")
    named = find(
        [one | {"identity": "b"}, face(2, image_hash=flipped(one["image_hash"], bits), identity="a")],
        [(0, 1, distance)],
    )
    assert named.pairs["kind"].to_pylist() == (["near"] if kind == "near" else []), "two names were not shot together"


def test_mirrored_copies() -> None:
    one = face(1, width=300)
    copy = face(2, image_hash=int(mirror_hashes(np.array([one["image_hash"]]))[0]))
    found = find([copy, one], [(0, 1, 0.08)])
    assert found.pairs["mirrored"].to_pylist() == [True]
    assert found.decisions["reason"].to_pylist() == [None, "smaller mirrored copy of /i/1.jpg: 100x100 against 300x100"]


def faceless(n: int, **values: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("face_id", "face_index", "sharpness", "face_px"))
    return face(n, **{**nothing, **values})


@pytest.mark.parametrize(("bits", "is_copy"), [(0, True), (2, True), (3, False)])
def test_pictures_without_a_face_are_copies_by_their_hashes(bits: int, is_copy: bool) -> None:
    rows = [faceless(0, width=200), faceless(1), face(2)]
    rows[1]["image_hash"] = flipped(rows[0]["image_hash"], bits)
    found = find(rows, [])
    check(rows, found)
    assert kept(found)["/i/1.jpg"] == ("/i/0.jpg" if is_copy else None)
    assert [pair["distance"] for pair in found.pairs.to_pylist()] == [None] * is_copy
    # A picture whose face is not found in its copy.
    rows[0] = face(0, width=200)
    assert (kept(find(rows, []))["/i/1.jpg"] is not None) == is_copy


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_copies(degrees: int) -> None:
    """With faces that are as near as those of copies, and without faces."""
    original = face(0, width=200)
    turned = int(turn_hashes(np.array([original["image_hash"]]), degrees)[0])
    for other, edges in ((face(1, image_hash=turned), [(0, 1, 0.05)]), (faceless(1, image_hash=turned), [])):
        found = find([original, other], edges)
        (pair,) = found.pairs.to_pylist()
        # Either is turned against the other.
        assert (pair["kind"], pair["turned"], pair["mirrored"]) == ("near", degrees, False)
        assert found.decisions.to_pylist()[1]["reason"].startswith("smaller turned copy of")


@pytest.mark.parametrize(
    ("width", "bits", "distance", "is_copy"),
    [(75, 1, 0.38, True), (100, 1, 0.38, False), (75, 3, 0.38, False), (75, 1, 0.45, False), (101, 0, 0.3, False)],
)
def test_squashed_copies(width: int, bits: int, distance: float, is_copy: bool) -> None:
    """Faces are squashed too: beyond the limit of copies of the same shape, and still alike."""
    rows = [face(0), face(1, width=width)]
    rows[1]["image_hash"] = flipped(rows[0]["image_hash"], bits)
    table = pa.Table.from_pylist(rows, SCHEMA)
    none = Pairs(*np.zeros((2, 0), np.int64), np.zeros(0, np.float32))
    measured = []

    def measure(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        measured.append((u.tolist(), v.tolist()))
        return np.full(len(u), distance, np.float32)

    found = find_duplicates(table, none, RULE, measure)
    check(rows, found)
    assert bool(found.pairs.num_rows) == is_copy
    assert all(pair in (([0], [1]), ([], [])) for pair in measured)


def test_many_equal_pictures_without_a_face() -> None:
    """A placeholder that a crawl has 3,000 times, and plain pictures, which tell nothing."""
    rows = [faceless(n, image_hash=0x1234_5678_9ABC) for n in range(3000)]
    rows += [faceless(n, image_hash=0) for n in range(3000, 3100)]
    found = find(rows, [])
    check(rows, found)
    assert found.groups.num_rows == 1
    assert found.pairs.num_rows == 2999


def test_without_a_hash_nothing_is_near() -> None:
    found = find([face(1, image_hash=None), face(2, image_hash=None)], [(0, 1, 0.01)])
    assert found.pairs["kind"].to_pylist() == ["same_shot"]
    assert found.pairs["hash_bits"].to_pylist() == [None]


def test_a_strangers_face_at_the_border_is_no_same_shot() -> None:
    """One pair of several faces is not enough."""
    rows = [face(1, "a"), face(1, "a", face_id=11, face_index=1), face(2, "b"), face(2, "b", face_id=21, face_index=1)]
    assert find(rows, [(1, 3, 0.12)]).pairs.num_rows == 0
    both = find(rows, [(0, 2, 0.14), (1, 3, 0.12)]).pairs.to_pylist()
    assert [(p["kind"], p["face_id_a"], p["face_id_b"]) for p in both] == [("same_shot", 11, 21)]
    assert find([*rows[:2], rows[2]], [(0, 2, 0.14)]).pairs.num_rows == 1


def test_a_chain_does_not_drag_in_what_differs_from_the_kept_copy() -> None:
    """a-b, b-c, c-d, d-e are near, a-c is not: c stays, with d."""
    steps = [face(n, f"{'abcde'[n]}", image_hash=flipped(0, 3 * n), width=200 - n) for n in range(5)]
    found = find(steps, [(n, n + 1, 0.2) for n in range(4)])
    assert kept(found) == {"a": None, "b": "a", "c": None, "d": "c", "e": None}
    check(steps, found)
    middle = [row | {"width": 500 if row["uri"] == "c" else row["width"]} for row in steps]
    assert kept(find(middle, [(n, n + 1, 0.2) for n in range(4)])) == {
        "a": None,
        "b": "c",
        "c": None,
        "d": "c",
        "e": None,
    }


def test_identical_pictures_need_not_be_linked_one_by_one() -> None:
    """A chain of identical vectors in different files, and one smaller copy that is linked to its end only."""
    chain = [face(n, image_hash=7, width=200) for n in range(50)]
    small = face(99, image_hash=5)
    found = find([*chain, small], [*((n, n + 1, 0.0) for n in range(49)), (49, 50, 0.2)])
    assert found.groups["images"].to_pylist() == [51]
    assert set(kept(found).values()) == {None, "/i/0.jpg"}


def test_which_copy_is_kept() -> None:
    small = face(1, width=50, sharpness=90.0, image_hash=3)
    large = face(2, width=500, sharpness=5.0, image_hash=3)
    first = face(0, width=50, sharpness=7.0, image_hash=3)
    edges = [(0, 1, 0.1), (0, 2, 0.1), (1, 2, 0.1)]
    for keep, uri, reason in (
        ("largest", "/i/2.jpg", "smaller copy of /i/2.jpg: 50x100 against 500x100"),
        ("sharpest", "/i/1.jpg", "less sharp copy of /i/1.jpg: 5.0 against 90.0"),
        ("oldest", "/i/0.jpg", "copy of /i/0.jpg: 500x100 against 50x100"),
    ):
        found = find([small, large, first], edges, DuplicateRule(keep=keep))  # type: ignore[arg-type]
        assert {v for v in kept(found).values() if v} == {uri}
        assert reason in found.decisions["reason"].to_pylist()
    table = pa.Table.from_pylist([face(1, image_hash=3), face(2, image_hash=3)], SCHEMA)
    table = table.append_column("file_size", pa.array([1000, 3000]))
    sized = find_duplicates(table, Pairs(np.array([0]), np.array([1]), np.array([0.1], np.float32)), RULE)
    assert sized.decisions["reason"].to_pylist() == ["copy of /i/2.jpg in fewer bytes: 1000 against 3000", None]


def test_only_the_kinds_asked_for_are_dropped() -> None:
    rows = [face(1), face(2, image_id="content1", image_hash=face(1)["image_hash"]), face(3), face(4)]
    rows[2]["image_hash"] = rows[0]["image_hash"]
    edges = [(0, 2, 0.1), (0, 3, 0.1), (0, 1, 0.0)]
    dropped = {}
    for drop in ("exact", "near", "same_shot"):
        found = find(rows, edges, DuplicateRule(drop=drop))
        dropped[drop] = pc.sum(pc.equal(found.decisions["decision"], "drop")).as_py()
        assert sorted(found.pairs["kind"].to_pylist()) == ["exact", "near", "same_shot"]
        check(rows, found)
    assert dropped == {"exact": 1, "near": 2, "same_shot": 3}
    wrong: Any
    for wrong in ({"drop": "all"}, {"keep": "first"}):
        with pytest.raises(ConfigError):
            DuplicateRule(**wrong)


def test_between_galleries_only_what_both_hold_goes_and_only_from_the_first() -> None:
    h = face(1)["image_hash"]
    rows = [
        face(1, "train/a", width=900),
        face(1, "test/a", side=1),  # the same bytes
        face(2, "train/b", image_hash=h, width=800),  # near both
        face(3, "train/c"),
        face(4, "train/d", image_hash=face(3)["image_hash"]),  # near c: both in the first gallery, which does not count
        face(5, "test/e", side=1, image_hash=h),  # near test/a: both in the second
    ]
    edges = [(0, 1, 0.0), (0, 2, 0.1), (1, 2, 0.1), (3, 4, 0.1), (1, 5, 0.1), (0, 5, 0.1), (2, 5, 0.1)]
    found = find(rows, edges)
    check(rows, found)
    dropped = {row["uri"]: row["kind"] for row in found.decisions.to_pylist() if row["decision"] == "drop"}
    assert dropped == {"train/a": "exact", "train/b": "near"}
    assert all(p["side_a"] + p["side_b"] == 1 for p in found.pairs.to_pylist())
    same = [face(1, "x"), face(1, "x", side=1)]
    assert find(same, []).decisions["decision"].to_pylist() == ["drop", "keep"], "one file in both galleries"


def test_shared_identities() -> None:
    rows = [
        *(face(n, identity="Ann_Lee", side=0) for n in range(2)),
        *(face(n, identity="ann lee", side=1) for n in range(2, 4)),
        face(4, identity="Bo", side=1),
        face(5, identity="Cy", side=0),
        face(6, identity="Bo", side=0),
        face(7, side=1),
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    edges = [(0, 2, 0.2), (1, 3, 0.3), (0, 1, 0.1), (4, 5, 0.3), (5, 7, 0.1), (1, 2, 0.9)]
    u, v, d = (np.array(column) for column in zip(*edges, strict=True))
    found = find_shared_identities(table, Pairs(u, v, d.astype(np.float32))).to_pylist()
    assert [(r["identity_0"], r["identity_1"], r["same_name"], r["links"]) for r in found] == [
        ("Cy", "Bo", False, 1),
        ("Ann_Lee", "ann lee", True, 2),
        ("Bo", "Bo", True, 0),
    ]
    assert found[1]["best"] == pytest.approx(0.2)
    assert found[1]["mean"] == pytest.approx(0.25)
    assert (found[1]["faces_0"], found[1]["faces_1"], found[2]["best"]) == (2, 2, None)
    empty = find_shared_identities(table.slice(0, 0), Pairs(u[:0], v[:0], d[:0].astype(np.float32)))
    assert empty.num_rows == 0


@pytest.mark.parametrize("seed", range(8))
def test_shared_identities_do_not_depend_on_which_copy_the_graph_knows(seed: int) -> None:
    """A graph joins copies to the first of them alone; with the links of all pairs spelt out it comes to the same."""
    rng = np.random.default_rng(seed)
    rows = [face(n, identity=rng.choice(["a", "b", "c", None]), side=int(rng.integers(2))) for n in range(24)]
    table = pa.Table.from_pylist(rows, SCHEMA)
    first = np.arange(24)
    for n in range(1, 24):
        first[n] = first[rng.integers(n)] if rng.random() < 0.6 else n
    u, v = np.triu_indices(24, 1)
    between = {pair: float(rng.random()) for pair in zip(u.tolist(), v.tolist(), strict=True)}

    def far(a: int, b: int) -> float:
        ends = sorted((int(first[a]), int(first[b])))
        return 0.0 if ends[0] == ends[1] else between[ends[0], ends[1]]

    every = np.array([far(a, b) for a, b in zip(u.tolist(), v.tolist(), strict=True)], np.float32)
    known = (first[v] == u) | ((first[u] == u) & (first[v] == v))
    whole = find_shared_identities(table, Pairs(u, v, every), threshold=0.4)
    short = find_shared_identities(table, Pairs(u, v, every).take(known), first, threshold=0.4)
    assert whole.num_rows
    assert short.drop_columns(["mean"]) == whole.drop_columns(["mean"])
    np.testing.assert_allclose(short["mean"].to_numpy(), whole["mean"].to_numpy(), rtol=1e-5)
    capped = find_shared_identities(table, Pairs(u, v, every).take(known), first, threshold=0.4, max_neighbours=1)
    assert 0 < sum(capped["links"].to_pylist()) < sum(whole["links"].to_pylist())


@pytest.mark.parametrize(("ours", "theirs"), [(4, 2), (300, 5), (5, 300), (100, 100)])
def test_the_share_of_near_faces_does_not_fall_with_the_size_of_an_identity(ours: int, theirs: int) -> None:
    """A face has 32 edges at most, however many of its person there are."""
    rows = [face(n, identity="a", side=0) for n in range(ours)]
    rows += [face(ours + n, identity="b", side=1) for n in range(theirs)]
    few, many = (
        (range(ours), range(ours, ours + theirs)) if ours < theirs else (range(ours, ours + theirs), range(ours))
    )
    ends = {tuple(sorted((a, many[k]))) for a in few for k in range(min(32, len(many)))}
    u, v = np.array(sorted(ends)).T
    pairs = Pairs(u, v, np.full(len(u), 0.2, np.float32))
    (found,) = find_shared_identities(pa.Table.from_pylist(rows, SCHEMA), pairs).to_pylist()
    assert found["share"] == 1
    half = find_shared_identities(
        pa.Table.from_pylist(rows, SCHEMA), pairs.take(np.arange(len(pairs)) % 2 == 0)
    ).to_pylist()
    assert half[0]["share"] == pytest.approx(0.5, abs=0.1)


def test_nothing_one_image_and_odd_names() -> None:
    assert find([], []).decisions.num_rows == 0
    check([face(1)], find([face(1)], []))
    names = ["", " ", "a\nb", 'it\'s "x"', "日本/é.jpg", "t.tar#m", "%41", "file:///%ff", "💥"]
    rows = [
        face(n, name, image_id="one", face_id=None, face_index=None, face_px=None, sharpness=None)
        for n, name in enumerate(names, 1)
    ]
    rows[0]["uri"] = "zero"
    found = find(rows, [])
    check(rows, found)
    assert found.pairs["kind"].to_pylist() == ["exact"] * 8, "images without a face as well"


@pytest.mark.parametrize("identical", ["bytes", "pixels"])
def test_all_images_the_same(identical: str) -> None:
    rows = [face(n, image_id="one" if identical == "bytes" else f"c{n}", image_hash=9) for n in range(5000)]
    found = find(rows, [(n, n + 1, 0.0) for n in range(4999)])
    check(rows, found)
    assert found.groups["images"].to_pylist() == [5000]
    assert found.pairs.num_rows == 4999


def test_links_between_exact_copies_are_not_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouping visits no link of 3.2 million: copies of the same bytes are one picture from the start."""
    link_counts = []

    def count_links(images: RankedImages, picture: np.ndarray, links: ImageLinks, rule: DuplicateRule) -> ImageGroups:
        link_counts.append(len(links))
        return group_images(images, picture, links, rule)

    monkeypatch.setattr("facepipe.curation.duplicates.group_images", count_links)
    n = 50_000
    columns = {name: pa.array([face(1)[name]] * n, SCHEMA.field(name).type) for name in face(1)}
    columns |= {"uri": pa.array([f"/copies/{k}.jpg" for k in range(n)]), "face_id": pa.array(np.arange(n))}
    table = pa.table({f.name: columns.get(f.name, pa.nulls(n, f.type)) for f in SCHEMA})
    u = np.repeat(np.arange(n - 64), 64)
    v = u + np.tile(np.arange(1, 65), n - 64)
    found = find_duplicates(table, Pairs(u, v, np.zeros(len(u), np.float32)), RULE)
    assert link_counts == [0]
    assert found.groups["images"].to_pylist() == [n]
    assert found.pairs.num_rows == n - 1


def test_limits_of_a_model_replace_defaults_only() -> None:
    measured = {"near": 0.3, "close_near": 0.5, "same_shot": 0.4}
    assert DuplicateRule().fit_model(measured) == DuplicateRule(near=0.3, close_near=0.5, same_shot=0.4)
    assert DuplicateRule(near=0.1).fit_model(measured).near == 0.1
    assert DuplicateRule().fit_model({}) == DuplicateRule()
