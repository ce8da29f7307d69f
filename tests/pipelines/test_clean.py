"""Cleaning runs: every label gets one decision, wrong ones are found, whatever the labels and paths are called."""

import csv
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from hard_faces import EASY, DlibLike, add_bystanders, add_copied_outsider, make_hard_gallery
from helpers import embed

from facepipe.config import build
from facepipe.curation.cleaning.decide import DECISIONS, REASONS
from facepipe.curation.cleaning.lists import DECISION_SCHEMA, IMAGE_SCHEMA
from facepipe.curation.graph.clusters import Clusters
from facepipe.errors import GalleryBusyError, GalleryError
from facepipe.evaluation.cleaning import evaluate_clean
from facepipe.gallery import Contract, Gallery
from facepipe.storage.lease import hold_lease
from facepipe.text import restore_cell
from pipelines import clean as pipeline
from pipelines.clean import CleanConfig, CleanSummary, run

KEPT = ("keep", "unverified")
DLIB = Contract.from_models(
    "retinaface-mnet025", "dlib-resnet", True
)  # says from which distance two faces are one person


def table(truth: np.ndarray, first: int = 0, **columns: Any) -> pa.Table:
    """Rows of faces of these persons, labelled as they are unless `identity` is given."""
    made = rows(np.asarray(truth), Faces().draw(np.asarray(truth), first), first)
    for name, values in columns.items():
        at = made.schema.get_field_index(name)
        made = made.set_column(at, made.schema.field(at), pa.array(values, made.schema.field(at).type))
    return made


def gallery(path: Path, *tables: pa.Table, contract: Contract = DLIB) -> Gallery:
    append(Gallery.create(str(path), contract), tables, "test")
    return Gallery(str(path))


def clean(made: Gallery, *layers: dict[str, Any]) -> tuple[CleanSummary, list[dict[str, Any]]]:
    """The summary, and the decisions by face id, checked for what holds of all."""
    summary = run(build(CleanConfig, *layers), made.path)
    folder = Path(summary.out)
    assert folder == Path(made.path, "reports", "clean")
    decided = pq.read_table(folder / "decisions.parquet")
    assert decided.schema == DECISION_SCHEMA
    found = decided.to_pylist()
    held = made.to_arrow(["face_id", "uri", "identity"], "face_id is not null and identity is not null").to_pylist()
    assert [{k: row[k] for k in ("face_id", "uri", "identity")} for row in found] == held, "a row a label, in order"
    counts = Counter(row["decision"] for row in found)
    assert summary.decisions == {name: counts[name] for name in DECISIONS}
    assert (summary.labelled, summary.identities) == (len(held), len({row["identity"] for row in held}))
    names = {row["identity"] for row in held}
    for row in found:
        assert row["reason"] in set(REASONS) - {"no label", "people have confirmed it"}
        assert 0 <= row["noise"] <= 1
        assert (row["suggested"] in names - {row["identity"]}) == (row["decision"] == "relabel")
    identities = pq.read_table(folder / "identities.parquet").to_pylist()
    kept = Counter(row["identity"] for row in found if row["decision"] in KEPT)
    assert [row["identity"] for row in identities] == sorted(names)
    assert {row["identity"]: row["kept"] for row in identities} == {name: kept[name] for name in names}
    assert sum(row["faces"] for row in identities) == len(found)
    assert sum(row["wrong"] for row in identities) == pytest.approx(summary.wrong, abs=0.01 + 1e-4 * len(found))
    assert all(0 <= row["purity"] <= 1 and row["sub_clusters"] <= row["faces"] for row in identities)
    assert summary.splits == sum(row["apart"] > 0 for row in identities)
    assert pq.read_metadata(folder / "merges.parquet").num_rows == summary.merges
    with open(folder / "clean.csv", newline="", encoding="utf-8") as file:
        cells = [(row["path"], row["identity"], int(row["face_id"])) for row in csv.DictReader(file)]
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in cells for cell in row[:2])
    listed = [(restore_cell(path), restore_cell(identity), face_id) for path, identity, face_id in cells]
    wanted = [(r["uri"], r["identity"], r["face_id"]) for r in found if r["decision"] in KEPT]
    if not any(layer.get("clean", {}).get("relabels") for layer in layers):
        assert listed == wanted
    assert summary.listed == len(listed)
    with open(folder / "review.csv", newline="", encoding="utf-8") as file:
        to_review = [(restore_cell(row["path"]), int(row["face_id"])) for row in csv.DictReader(file)]
    assert to_review == [(row["uri"], row["face_id"]) for row in found if row["decision"] == "review"]
    assert summary.to_review == len(to_review)
    check_images(made, folder, found)
    assert len((folder / "clean.txt").read_bytes().splitlines()) == summary.listed - summary.unlisted
    assert (folder / "report.html").stat().st_size > 1000
    assert set(os.listdir(folder.parent)) <= {"clean", "graph", "cluster", "dedup", ".lock", ".lock.guard"}
    return summary, sorted(found, key=lambda row: row["face_id"])


def check_images(made: Gallery, folder: Path, found: list[dict[str, Any]]) -> None:
    """Check that images.parquet has every image of the gallery once, with the decision on one of its faces."""
    images = pq.read_table(folder / "images.parquet")
    assert images.schema == IMAGE_SCHEMA
    assert sorted(images["uri"].to_pylist()) == sorted(set(made.to_arrow(["uri"])["uri"].to_pylist()))
    by_face = {row["face_id"]: row for row in found}
    labelled = {row["uri"] for row in found}
    for row in images.to_pylist():
        if row["uri"] in labelled:
            face = by_face[row["face_id"]]
            same = ("uri", "identity", "decision", "reason", "suggested")
            assert [row[name] for name in same] == [face[name] for name in same]
            assert row["decision"] != "bystander"
            assert 0 <= row["noise"] <= face["noise"] + 1e-6
        else:
            assert row["decision"] in ("unlabelled", "no_face", "failed")
            assert row["noise"] is None


def mixed(identities: int, share: float = 0.2, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(true identities, labels) of some 15 faces each, a share of the labels swapped."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(identities), rng.integers(6, 24, identities)))
    moved = rng.random(len(truth)) < share
    return truth, np.where(moved, (truth + rng.integers(1, identities, len(truth))) % identities, truth)


def named(labels: np.ndarray) -> list[str]:
    return [f"person{n}" for n in labels]


def verdicts(found: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {row["uri"]: (row["decision"], row["reason"]) for row in found}


# ------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gallery, pa.Table]:
    """A gallery of some 1,500 faces with a fifth of the labels swapped, and its rows."""
    truth, labels = mixed(100)
    made = table(truth, identity=named(labels))
    return gallery(tmp_path_factory.mktemp("noisy") / "g", made), table(truth)


def test_swapped_labels_are_found(noisy: tuple[Gallery, pa.Table], tmp_path: Path) -> None:
    made, right = noisy
    summary, found = clean(made)
    pq.write_table(right.select(["face_id", "identity"]), tmp_path / "truth.parquet")
    result = evaluate_clean(made, str(tmp_path / "truth.parquet"))
    assert (result.faces, result.without_truth, result.without_decision) == (len(found), 0, 0)
    assert result.detection.f > 0.95
    assert result.repaired is not None
    assert result.repaired > 0.85
    assert result.average_precision is not None
    assert result.average_precision > 0.95
    assert summary.swapped == pytest.approx(result.wrong / result.faces, abs=0.03)
    assert summary.wrong == pytest.approx(result.wrong, rel=0.1)
    assert {"graph", "judge", "write"} == set(summary.seconds)


def test_the_order_of_rows_does_not_matter(noisy: tuple[Gallery, pa.Table], tmp_path: Path) -> None:
    made, _ = noisy
    first = clean(made)[1]
    rows_ = made.to_arrow()
    order = np.random.default_rng(0).permutation(rows_.num_rows)
    shuffled = rows_.take(pa.array(order)).combine_chunks()
    halves = (shuffled.slice(0, 500), shuffled.slice(500))
    assert clean(gallery(tmp_path / "g", *halves))[1] == first


def test_relabelled_faces_go_into_the_lists_if_asked(noisy: tuple[Gallery, pa.Table]) -> None:
    summary, found = clean(noisy[0], {"clean": {"relabels": True}})
    assert summary.listed == summary.decisions["keep"] + summary.decisions["relabel"]
    moved = {row["uri"]: row["suggested"] for row in found if row["decision"] == "relabel"}
    assert moved
    with open(Path(summary.out, "clean.csv"), newline="") as file:
        listed = {row["path"]: row["identity"] for row in csv.DictReader(file)}
    assert {uri: listed[uri] for uri in moved} == moved


def test_an_interrupted_run_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, labels = mixed(15)
    made = gallery(tmp_path / "g", table(truth, identity=named(labels)))
    _, first = clean(made)
    folder = tmp_path / "g" / "reports" / "clean"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(build(CleanConfig, {"clean": {"min_face_px": 99}}), made.path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert clean(made)[1] == first
    assert set(os.listdir(folder)) == set(before)


def test_one_report_at_a_time(noisy: tuple[Gallery, pa.Table]) -> None:
    with hold_lease(os.path.join(noisy[0].path, "reports"), "reports"), pytest.raises(GalleryBusyError):
        run(build(CleanConfig), noisy[0].path)


# ------------------------------------------------------------------ odd galleries


def test_without_labels_there_is_another_way(tmp_path: Path) -> None:
    made = gallery(tmp_path / "g", table(np.arange(10), identity=[None] * 10))
    with pytest.raises(GalleryError, match=r"no face in .* has an identity.*`facepipe cluster`"):
        run(build(CleanConfig), made.path)
    assert not (tmp_path / "g" / "reports" / "clean").exists()


def test_unlabelled_faces_are_counted_and_left_alone(tmp_path: Path) -> None:
    truth = np.repeat(np.arange(20), 10)
    labels = [f"person{n}" if k % 3 else None for k, n in enumerate(truth)]
    summary, found = clean(gallery(tmp_path / "g", table(truth, identity=labels)))
    assert (summary.labelled, summary.unlabelled) == (len(found), labels.count(None))
    assert summary.decisions["keep"] == len(found)


@pytest.mark.parametrize(
    ("truth", "decision", "reason"),
    [
        (np.zeros(400, int), "keep", "fits its identity"),
        (np.arange(400), "unverified", "nothing to compare with: the only face of its identity"),
        (np.zeros(1, int), "unverified", "nothing to compare with: the only face of its identity"),
        (np.zeros(2, int), "keep", "fits its identity"),
    ],
    ids=["one identity", "one image each", "one face", "two faces"],
)
def test_galleries_that_show_little_lose_nothing(truth: np.ndarray, decision: str, reason: str, tmp_path: Path) -> None:
    summary, found = clean(gallery(tmp_path / "g", table(truth)))
    assert {(row["decision"], row["reason"]) for row in found} == {(decision, reason)}
    assert summary.listed == len(found)


def test_images_without_a_judgement_have_a_row_too(tmp_path: Path) -> None:
    """Without a face, unread, without a label, and with a vector that cannot be used, alone or beside a good one."""
    made = table(np.repeat(np.arange(20), 10))
    count = made.num_rows
    uris, statuses, faces = made["uri"].to_pylist(), ["ok"] * count, made["face_id"].to_pylist()
    vectors, labels = made["embedding"].to_pylist(), made["identity"].to_pylist()
    statuses[0], statuses[1], labels[2] = "no_face", "decode_error", None
    for n in (0, 1):
        faces[n], vectors[n] = None, None
    vectors[3] = vectors[4] = [float("nan")] * 128
    uris[4] = uris[5]
    odd = table(
        np.repeat(np.arange(20), 10), uri=uris, status=statuses, face_id=faces, embedding=vectors, identity=labels
    )
    path = gallery(tmp_path / "g", odd)
    run(build(CleanConfig), path.path)
    rows = pq.read_table(tmp_path / "g" / "reports" / "clean" / "images.parquet").to_pylist()
    assert len(rows) == count - 1
    by = {row["uri"]: (row["decision"], row["reason"]) for row in rows}
    assert by[uris[0]] == ("no_face", "no face was found")
    assert by[uris[1]] == ("failed", "decode_error")
    assert by[uris[2]] == ("unlabelled", "no label")
    assert by[uris[3]] == ("failed", "no usable vector")
    assert by[uris[5]] == ("keep", "fits its identity")


@pytest.mark.parametrize("identities", [1, 100])
def test_two_thousand_identical_faces(identities: int, tmp_path: Path) -> None:
    """There is nothing to tell them apart by, and as images they are not copies: no hash, other bytes."""
    same = np.tile(Faces().draw(np.zeros(1, int), 0), (2000, 1))
    made = gallery(tmp_path / "g", rows(np.arange(2000) % identities, same, 0))
    summary, _ = clean(made)
    assert summary.decisions["keep"] + summary.decisions["unverified"] == 2000


def test_a_huge_identity_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 faces here, four fifths of the gallery: the cohort that says who is crowded holds three of them."""
    truth = np.concatenate([np.zeros(2000, int), np.repeat(np.arange(1, 51), 10)])
    labels = truth.copy()
    labels[:20], labels[2000:2020] = np.arange(20) + 25, 0
    made = table(truth, identity=named(labels))
    pairs: list[int] = []
    original = Clusters.compute_linkage

    def counted(self: Clusters, u: np.ndarray, v: np.ndarray, margin: float = 0.0) -> np.ndarray:
        pairs.append(len(u))
        return original(self, u, v, margin)

    monkeypatch.setattr(Clusters, "compute_linkage", counted)
    held = gallery(tmp_path / "g", made)
    summary, found = clean(held)
    assert sum(pairs) < len(made) ** 2, "to join clusters, each pair of faces is compared twice at most"
    uris = made["uri"].to_pylist()
    flagged = {row["uri"] for row in found if row["decision"] != "keep"}
    swapped = set(uris[2000:2020] + uris[:20])
    assert len(flagged & swapped) >= 38
    assert len(flagged - swapped) <= 5
    assert 20 < summary.wrong < 50


HOSTILE = {
    "identity": [
        "../x",
        "<script>alert(1)</script>",
        "null",
        "x" * 10_000,
        'a,b\n"c"',
        "é日本\u202e",
        "nul\0",
        "=1+1",
        " ",
    ],
    "uri": [
        "../x.jpg",
        "<script>alert(1)</script>",
        "",
        "x" * 10_000,
        'a,"b\n.jpg',
        "日本 \u202e.jpg",
        "a\0b",
        "-rf",
        " ",
    ],
}


def test_hostile_names(tmp_path: Path) -> None:
    names, uris = HOSTILE["identity"], HOSTILE["uri"]
    truth = np.repeat(np.arange(len(names)), 12)
    swapped = truth.copy()
    swapped[::12] = np.roll(truth, 12)[::12]  # a wrong label each
    made = table(truth, identity=[names[n] for n in swapped])
    paths = made["uri"].to_pylist()
    paths[5 : 5 + 12 * len(uris) : 12] = uris
    made = made.set_column(made.schema.get_field_index("uri"), "uri", pa.array(paths))
    before = set(tmp_path.rglob("*"))
    summary, found = clean(gallery(tmp_path / "g", made))
    assert {row["identity"] for row in found} == set(names)
    assert summary.decisions["relabel"] == len(names)
    assert summary.unlisted == sum(not uri.strip() or "\n" in uri for uri in uris)
    with open(Path(summary.out, "labels.csv"), newline="", encoding="utf-8") as file:
        assert sorted(restore_cell(row["identity"]) for row in csv.DictReader(file)) == sorted(names)
    assert "<script>alert" not in Path(summary.out, "report.html").read_text()
    assert {path.parts[len(tmp_path.parts)] for path in set(tmp_path.rglob("*")) - before} == {"g"}, "nothing elsewhere"


def test_copies_in_one_identity(tmp_path: Path) -> None:
    """Of two images of the same bytes in one identity the larger stays; one in another identity is not its business."""
    truth = np.repeat(np.arange(30), 10)
    made = table(truth, width=[200] * 300, height=[200] * 300)
    ids, vectors, sizes = made["image_id"].to_pylist(), np.array(made["embedding"].to_pylist(), np.float32), [200] * 300
    ids[1], vectors[1], sizes[0] = ids[0], vectors[0], 100  # one identity: the smaller goes
    ids[11], vectors[11] = ids[10], vectors[10]  # one identity, two sizes alike: the first by path stays
    made = table(truth, width=sizes, height=sizes, image_id=ids)
    made = made.set_column(
        made.schema.get_field_index("embedding"),
        "embedding",
        pa.array(list(vectors), made.schema.field("embedding").type),
    )
    place = gallery(tmp_path / "g", made)
    summary, found = clean(place)
    uris = made["uri"].to_pylist()
    gone = {row["uri"]: row["reason"] for row in found if row["decision"] == "duplicate"}
    assert gone == dict.fromkeys([uris[0], uris[11]], "the same picture is kept elsewhere in its identity")
    assert summary.decisions["keep"] == 298
    assert clean(place, {"clean": {"duplicates": False}})[0].decisions["keep"] == 300


def test_copies_whose_best_is_under_another_name(tmp_path: Path) -> None:
    """A picture once under the name a and twice under b: b keeps one, whichever of the three is the best."""
    truth = np.concatenate([np.repeat(np.arange(30), 10), [0, 0]])
    labels = truth.copy()
    labels[300:] = 1
    made = table(truth, identity=named(labels))
    vectors = np.array(made["embedding"].to_pylist(), np.float32)
    vectors[300:] = vectors[0]
    # Made one person's: so that both labels are believed.
    vectors[10:20] = vectors[1:2] * 0.1 + vectors[0] * 0.9 + 0.02 * vectors[10:20]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = made["image_id"].to_pylist()
    ids[300:] = [ids[0]] * 2
    field = made.schema.field("embedding")
    for size in (100, 300):
        sizes = [200] * 302
        sizes[0] = size
        changed = table(truth, identity=named(labels), image_id=ids, width=sizes, height=sizes)
        changed = changed.set_column(
            changed.schema.get_field_index("embedding"), field, pa.array(list(vectors), field.type)
        )
        _, found = clean(gallery(tmp_path / f"g{size}", changed))
        of = [row for row in found if row["uri"] in {changed["uri"][n].as_py() for n in (0, 300, 301)}]
        by = Counter((row["identity"], row["decision"]) for row in of)
        assert by == {("person0", "review"): 1, ("person1", "review"): 2}, by
        assert "the same picture has another name too" in {row["reason"] for row in of}
        assert all(row["noise"] >= 0.5 for row in of)


def test_a_copy_surely_under_a_wrong_name_does_not_question_the_right_one(tmp_path: Path) -> None:
    """A picture of person 0, and a copy of it among those of person 1: the copy is renamed, and nothing else is asked."""
    truth = np.concatenate([np.repeat(np.arange(30), 10), [0]])
    labels = truth.copy()
    labels[300] = 1
    made = table(truth, identity=named(labels))
    vectors = np.array(made["embedding"].to_pylist(), np.float32)
    vectors[300] = vectors[0]
    ids = made["image_id"].to_pylist()
    ids[300] = ids[0]
    field = made.schema.field("embedding")
    changed = table(truth, identity=named(labels), image_id=ids)
    changed = changed.set_column(
        changed.schema.get_field_index("embedding"), field, pa.array(list(vectors), field.type)
    )
    summary, found = clean(gallery(tmp_path / "g", changed))
    decision = {row["uri"]: row["decision"] for row in found}
    assert decision[changed["uri"][300].as_py()] == "relabel"
    assert decision[changed["uri"][0].as_py()] == "keep"
    assert summary.decisions["review"] == 0


def test_small_and_blurred_faces(tmp_path: Path) -> None:
    truth = np.repeat(np.arange(20), 10)
    labels = truth.copy()
    labels[3] = 7
    px, sharp = np.full(200, 80.0), np.full(200, 50.0)
    px[[3, 4]], sharp[[4, 5]] = 15, 2
    made = gallery(tmp_path / "g", table(truth, identity=named(labels), face_px=px, sharpness=sharp))
    uris = made.to_arrow(["uri"])["uri"].to_pylist()
    found = verdicts(clean(made, {"clean": {"min_sharpness": 10.0}})[1])
    assert found[uris[3]][0] == "relabel", "a wrong label comes first"
    assert found[uris[4]] == ("low_quality", "the face is too small")
    assert found[uris[5]] == ("low_quality", "the face is blurred")
    assert Counter(decision for decision, _ in found.values())["keep"] == 197
    assert clean(made, {"clean": {"min_face_px": 0.0}})[0].decisions["low_quality"] == 0


def test_photos_of_several_faces(tmp_path: Path) -> None:
    """Every photo has a stranger in it, under the label of the one whose photo it is."""
    truth = np.concatenate([np.repeat(np.arange(30), 8), np.arange(30, 270)])
    made = table(truth)
    uris, labels = made["uri"].to_pylist(), named(np.repeat(np.arange(30), 8))
    place = gallery(
        tmp_path / "g", table(truth, uri=uris[:240] * 2, identity=labels * 2, face_index=[0] * 240 + [1] * 240)
    )
    _, found = clean(place)
    by = {(row["uri"], row["face_id"]): row for row in found}
    strangers = set(made["face_id"].to_pylist()[240:])
    decided = Counter((face in strangers, row["decision"]) for (_, face), row in by.items())
    assert decided[True, "keep"] == 0
    assert decided[True, "bystander"] > 230
    assert decided[False, "keep"] > 235


def test_a_photo_keeps_its_place_beside_a_bystander(tmp_path: Path) -> None:
    """Of identities of one photo, the large and central face bears the label; the other one is no wrong label."""
    space = DlibLike(4, EASY)
    faces = space.draw(space.draw_centres(120), np.concatenate([np.repeat(np.arange(60), 6), np.arange(60, 120)]))
    strangers = space.draw(space.draw_centres(60), np.arange(60))
    both = add_bystanders(faces, strangers, np.arange(360, 420))
    summary, found = clean(make_hard_gallery(tmp_path / "g", both, DLIB))
    alone = [row for row in found if int(row["identity"].removeprefix("person")) >= 60]
    assert len(alone) == 120
    by_photo: dict[str, list[dict[str, Any]]] = {}
    for row in alone:
        by_photo.setdefault(row["uri"], []).append(row)
    kept = [row for row in alone if row["decision"] == "unverified"]
    assert len({row["uri"] for row in kept}) == len(kept) == 60
    assert {row["decision"] for row in alone} == {"unverified", "bystander"}
    is_largest = [row["face_px"] == max(other["face_px"] for other in by_photo[row["uri"]]) for row in kept]
    assert sum(is_largest) >= 45
    assert summary.wrong < 5


def test_copies_of_one_wrong_picture_do_not_outvote_an_identity(tmp_path: Path) -> None:
    space = DlibLike(4, EASY)
    faces = space.draw(space.draw_centres(60), np.repeat(np.arange(60), 7))
    outsiders = space.draw(space.draw_centres(20), np.arange(20))
    both = add_copied_outsider(faces, outsiders, list(range(20)), copies=10)
    _, found = clean(make_hard_gallery(tmp_path / "g", both, DLIB))
    is_outsider = {f"/synthetic/000000/{n:09d}.jpg" for n in range(420, 620)}
    right = [row for row in found if row["uri"] not in is_outsider]
    wrong = [row for row in found if row["uri"] in is_outsider]
    assert len(wrong) == 200
    assert all(row["decision"] in ("keep", "duplicate") for row in right)
    assert not any(row["decision"] == "keep" for row in wrong)


def test_small_galleries_rely_on_the_model(tmp_path: Path) -> None:
    """Below 300 faces the threshold is the model's own; where the model says none, it must be given."""
    truth, labels = mixed(15, 0.1)
    made = table(truth, identity=named(labels))
    assert made.num_rows < 300
    _, found = clean(gallery(tmp_path / "known", made))
    flagged = {row["face_id"] for row in found if row["decision"] not in ("keep", "duplicate")}
    wrong = set(made.filter(pa.array(truth != labels))["face_id"].to_pylist())
    assert flagged == wrong
    few = gallery(tmp_path / "few", made.slice(0, 20), contract=CONTRACT)
    with pytest.raises(GalleryError, match=r"'synthetic' has no default: set a distance with --threshold"):
        run(build(CleanConfig), few.path)
    other = gallery(tmp_path / "unknown", made, contract=CONTRACT)
    assert {row["face_id"] for row in clean(other, {"graph": {"threshold": 0.416}})[1] if row["suggested"]} <= wrong


def test_vectors_that_cannot_be_used_get_no_decision(tmp_path: Path) -> None:
    made = table(np.repeat(np.arange(20), 10))
    vectors = [
        None if n == 3 else [float("nan")] * 128 if n == 4 else v for n, v in enumerate(made["embedding"].to_pylist())
    ]
    made = gallery(tmp_path / "g", table(np.repeat(np.arange(20), 10), embedding=vectors))
    summary = run(build(CleanConfig), made.path)
    assert (summary.labelled, summary.decisions["keep"]) == (198, 198)


def test_limits_beyond_the_graphs_reach_widen_it(tmp_path: Path) -> None:
    """Copies as far apart as 0.5 are still looked for where the rule says so."""
    truth = np.repeat(np.arange(30), 10)
    made = table(truth, image_hash=[7] * 300)
    near = {"duplicates": {"close_near": 0.5}, "graph": {"threshold": 0.2}}
    summary, _ = clean(gallery(tmp_path / "g", made), near)
    assert summary.decisions["duplicate"] > 200


# ------------------------------------------------------------------ real faces


def test_lfw_with_a_fifth_of_its_labels_swapped(shared: Path, tmp_path: Path) -> None:
    folders = sorted(
        path for path in (shared / "data" / "lfw-dev" / "images").iterdir() if len(list(path.iterdir())) >= 5
    )
    images = [str(image) for folder in folders[:30] for image in sorted(folder.iterdir())[:6]]
    truth = [Path(image).parent.name for image in images]
    rng = np.random.default_rng(0)
    names = sorted(set(truth))
    labels = [rng.choice([n for n in names if n != name]) if rng.random() < 0.2 else name for name in truth]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "identity"), *zip(images, labels, strict=True)])
    with open(tmp_path / "truth.csv", "w", newline="") as file:
        csv.writer(file).writerows([("uri", "identity"), *zip(images, truth, strict=True)])
    embed(tmp_path / "list.csv", tmp_path / "g", runner="inline")
    made = Gallery(str(tmp_path / "g"))
    clean(made)
    result = evaluate_clean(made, str(tmp_path / "truth.csv"))
    assert result.faces > 150
    assert result.wrong > 20
    assert result.detection.f >= 0.93, result
    assert pc.sum(made.to_arrow(["face_id"])["face_id"].is_valid()).as_py() >= result.faces
