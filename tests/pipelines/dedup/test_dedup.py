"""dedup runs: exactly the copies go, every image is in one list, and nothing of another gallery stays behind."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from conftest import draw
from hard_faces import DlibLike, make_hard_gallery
from helpers import embed

from facepipe.config import build
from facepipe.errors import ConfigError, ContractError, GalleryError
from facepipe.gallery import Contract, Gallery
from pipelines.dedup import DedupConfig, pipeline, run
from pipelines.dedup.pipeline import DedupSummary

DLIB = Contract.from_models("retinaface-mnet025", "dlib-resnet", True)
NAMES = ("img5.jpg", "img11.jpg", "img21.jpg", "img25.jpg", "img51.jpg")  # small files with a face each


def dedup(
    gallery: Path, against: Path | None = None, *layers: dict[str, Any]
) -> tuple[DedupSummary, list[dict[str, Any]]]:
    """The summary, and the decisions by uri, checked for what holds of all."""
    summary = run(build(DedupConfig, *layers), str(gallery), str(against) if against else None)
    folder = Path(summary.out)
    assert folder == gallery / "reports" / ("overlap" if against else "dedup")
    found = pq.read_table(folder / "decisions.parquet").to_pylist()
    sides = [gallery, against] if against else [gallery]
    for side, path in enumerate(sides):
        held = set(Gallery(str(path)).to_arrow(["uri"])["uri"].to_pylist())
        assert {row["uri"] for row in found if row["side"] == side} == held
    assert len({(row["uri"], row["side"]) for row in found}) == len(found)
    mine = [row for row in found if row["side"] == 0]
    assert all(row["decision"] == "keep" for row in found if row["side"] == 1)
    lists = {name: (folder / f"{name}.txt").read_bytes().decode().split("\n")[:-1] for name in ("keep", "drop")}
    for name, lines in lists.items():
        wanted = [row["uri"] for row in mine if row["decision"] == name]
        assert lines == [uri for uri in wanted if "\n" not in uri and "\r" not in uri]
        assert getattr(summary, name) == len(wanted)
    assert summary.images == len(mine)
    assert summary.unlisted == summary.images - sum(map(len, lists.values()))
    kinds = pq.read_table(folder / "pairs.parquet", columns=["kind"])["kind"].to_pylist()
    assert summary.pairs == {kind: kinds.count(kind) for kind in set(kinds)}
    assert summary.groups == pq.read_metadata(folder / "groups.parquet").num_rows
    assert (folder / "report.html").stat().st_size > 1000
    assert {"graph", "compare", "write"} == set(summary.seconds)
    return summary, mine


def dropped(found: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Names of the images to drop: (kind, name of the one that stays)."""
    return {
        Path(row["uri"]).name: (row["kind"], Path(row["kept_uri"]).name) for row in found if row["decision"] == "drop"
    }


def synthetic(path: Path, count: int, contract: Contract = DLIB, **columns: Any) -> Path:
    truth = np.arange(count) // 4
    made = rows(truth, Faces().draw(truth, 0), 0)
    for name, values in columns.items():
        at = made.schema.get_field_index(name)
        made = made.set_column(at, made.schema.field(at), pa.array(values, made.schema.field(at).type))
    append(Gallery.create(str(path), contract), [made], "test")
    return path


@pytest.fixture(scope="module")
def copies(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of five photos, two of them copied byte by byte, and one each shrunk, compressed and mirrored."""
    root = tmp_path_factory.mktemp("copies")
    folder = root / "in"
    folder.mkdir()
    for name in NAMES:
        shutil.copyfile(photos / name, folder / name)
    shutil.copyfile(photos / NAMES[0], folder / "z-exact.jpg")
    shutil.copyfile(photos / NAMES[0], folder / "z-again.jpg")
    images = [cv2.imread(str(photos / name)) for name in NAMES]
    small = cv2.resize(images[1], None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(folder / "z-small.jpg"), small, [cv2.IMWRITE_JPEG_QUALITY, 92])
    cv2.imwrite(str(folder / "z-q30.jpg"), images[2], [cv2.IMWRITE_JPEG_QUALITY, 30])
    cv2.imwrite(str(folder / "z-mirror.png"), images[3][:, ::-1, :])
    embed(folder, root / "g", runner="inline")
    return root / "g"


def test_exactly_the_copies_go(copies: Path) -> None:
    summary, found = dedup(copies)
    gone = dropped(found)
    assert {frozenset((name, stays)) for name, (_, stays) in gone.items() if "img5" not in (name + stays)} == {
        frozenset(pair) for pair in (("z-small.jpg", NAMES[1]), ("z-q30.jpg", NAMES[2]), ("z-mirror.png", NAMES[3]))
    }
    assert gone["z-small.jpg"] == ("near", NAMES[1])
    assert gone["z-q30.jpg"] == ("near", NAMES[2])
    assert {name: gone[name] for name in ("z-exact.jpg", "z-again.jpg")} == dict.fromkeys(
        ("z-exact.jpg", "z-again.jpg"), ("exact", NAMES[0])
    )
    assert len(gone) == 5
    assert (summary.images, summary.keep, summary.drop, summary.groups) == (10, 5, 5, 4)
    assert (summary.unlisted, summary.without_hash, summary.shared) == (0, 0, None)


def test_copies_of_a_portrait_go(portraits: Path, tmp_path: Path) -> None:
    """What the test above says of five photos, of one that every clone has."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("one.jpg", "none.jpg"):
        shutil.copyfile(portraits / name, folder / name)
    shutil.copyfile(portraits / "one.jpg", folder / "z-exact.jpg")
    image = cv2.imread(str(portraits / "one.jpg"))
    small = cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(folder / "z-small.jpg"), small, [cv2.IMWRITE_JPEG_QUALITY, 92])
    cv2.imwrite(str(folder / "z-q30.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 30])
    cv2.imwrite(str(folder / "z-mirror.png"), image[:, ::-1, :])
    embed(folder, tmp_path / "g", runner="inline")
    summary, decisions = dedup(tmp_path / "g")
    copies = dropped(decisions)
    assert (summary.keep, summary.drop, summary.groups) == (2, 4, 1)
    assert "none.jpg" not in copies
    exact, _ = dedup(tmp_path / "g", None, {"dedup": {"drop": "exact"}})
    assert (exact.keep, exact.drop, exact.groups) == (5, 1, 1)


def test_only_the_same_bytes_if_asked(copies: Path) -> None:
    _, found = dedup(copies, None, {"dedup": {"drop": "exact"}})
    assert dropped(found) == dict.fromkeys(("z-exact.jpg", "z-again.jpg"), ("exact", NAMES[0]))


def test_a_second_run_gives_the_same(copies: Path) -> None:
    """The graph is there already."""
    said: list[str] = []
    _, first = dedup(copies)
    run(build(DedupConfig), str(copies), progress=said.append)
    assert any("up to date" in line for line in said)
    assert pq.read_table(copies / "reports" / "dedup" / "decisions.parquet").to_pylist() == first
    assert set(os.listdir(copies / "reports")) <= {"dedup", "graph", ".lock", ".lock.guard"}


def test_what_two_galleries_share(photos: Path, tmp_path: Path) -> None:
    """Test images in a training set are to be dropped there; persons of both are named, by face or by name."""
    train, test = tmp_path / "train", tmp_path / "test"
    for path, names in (
        (train, {"anna/1.jpg": 0, "bert/2.jpg": 1, "carl/3.jpg": 2, "dora/4.jpg": 3, "carl/same.jpg": 2}),
        (test, {"ANNA/9.jpg": 0, "unknown/8.jpg": 1, "Dora/7.jpg": 4}),
    ):
        for name, which in names.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(photos / NAMES[which], path / name)
    image = cv2.imread(str(photos / NAMES[1]))
    cv2.imwrite(str(test / "unknown" / "8.jpg"), cv2.resize(image, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA))
    for path in (train, test):
        embed(path, tmp_path / f"g-{path.name}", {"source": {"identity": "folder"}}, runner="inline")
    one, other = tmp_path / "g-train", tmp_path / "g-test"
    summary, found = dedup(one, other)
    assert dropped(found) == {"1.jpg": ("exact", "9.jpg"), "2.jpg": ("near", "8.jpg")}, "copies within train stay"
    assert (summary.images, summary.keep, summary.drop) == (5, 3, 2)
    shared = pq.read_table(one / "reports" / "overlap" / "identities.parquet").to_pylist()
    by = {(row["identity_0"], row["identity_1"]): row for row in shared}
    assert {("anna", "ANNA"), ("bert", "unknown")} <= set(by)
    # Two photos without a picture in common, among so few persons, are no proof: they are listed, and not asserted.
    look_alikes = pq.read_table(one / "reports" / "overlap" / "look_alikes.parquet").to_pylist()
    assert ("dora", "Dora") in {(row["identity_0"], row["identity_1"]) for row in look_alikes} | set(by)
    assert (by["anna", "ANNA"]["same_name"], by["bert", "unknown"]["same_name"]) == (True, False)
    assert summary.shared == len(shared)
    nothing_left(one, other)
    back, found = dedup(other, one)
    assert dropped(found) == {"9.jpg": ("exact", "1.jpg"), "8.jpg": ("near", "2.jpg")}
    assert back.images == 3
    nothing_left(other, one)


def test_look_alikes_are_no_shared_persons(tmp_path: Path) -> None:
    """Half of the persons have a look-alike; eight of forty are in both galleries, under other names."""
    space = DlibLike(3)
    centres = space.draw_centres(340)
    both = np.arange(8)
    train = np.concatenate([np.repeat(np.arange(300), 3), np.repeat(both, 3)])
    test = np.repeat(np.concatenate([both, np.arange(300, 332)]), 4)
    one = make_hard_gallery(tmp_path / "train", space.draw(centres, train), DLIB)
    faces = space.draw(centres, test)
    other = make_hard_gallery(tmp_path / "test", replace(faces, label=faces.person + 1000), DLIB, seed=1)
    summary, _ = dedup(Path(one.path), Path(other.path))
    folder = Path(summary.out)
    persons = pq.read_table(folder / "identities.parquet").to_pylist()
    look_alikes = pq.read_table(folder / "look_alikes.parquet").to_pylist()
    assert (summary.shared, summary.look_alikes) == (len(persons), len(look_alikes))
    right = [int(row["identity_0"][6:]) + 1000 == int(row["identity_1"][6:]) for row in persons]
    assert sum(right) >= 6
    assert sum(right) >= 0.5 * len(right), "half of the persons have a look-alike, and these are hardly told apart"
    assert all(row["probability"] >= 0.6 > other["probability"] for row in persons for other in look_alikes)
    assert all(row["faces_0"] > 0 and row["faces_1"] > 0 for row in persons + look_alikes)


def nothing_left(gallery: Path, other: Path) -> None:
    """No embedding of the other gallery lies in the reports, in no form."""
    reports = gallery / "reports"
    assert not (reports / "overlap" / "graph").exists()
    assert {path.name for path in reports.iterdir()} <= {"overlap", "dedup", "graph", ".lock", ".lock.guard"}
    own = {vector[:8].tobytes() for vector in Gallery(str(gallery)).vectors()[1]}  # its own graph holds these
    vectors = {vector[:8].tobytes() for vector in Gallery(str(other)).vectors()[1]} - own
    for path in reports.rglob("*"):
        if path.is_dir():
            continue
        assert path.suffix in (".parquet", ".txt", ".html", ".json", ".guard", "") or path.parent.name == "graph", path
        if path.suffix == ".parquet" and path.parent.name == "overlap":
            kinds = pq.read_schema(path).types
            assert not any(pa.types.is_list(kind) or pa.types.is_binary(kind) for kind in kinds)
        data = path.read_bytes()
        assert not any(vector in data for vector in vectors), path


def test_an_interrupted_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = synthetic(tmp_path / "a", 40), synthetic(tmp_path / "b", 20)
    _, first = dedup(one, other)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(build(DedupConfig, {"dedup": {"drop": "exact"}}), str(one), str(other))
    held = pq.read_table(one / "reports" / "overlap" / "decisions.parquet").to_pylist()
    assert [row for row in held if row["side"] == 0] == first
    assert (one / "reports" / "overlap" / "report.html").exists()
    assert dedup(one, other)[1] == first
    nothing_left(one, other)


def test_models_that_say_no_threshold_need_none(tmp_path: Path) -> None:
    """Few faces of an unknown model: copies have distances of their own."""
    one, other = synthetic(tmp_path / "a", 12, CONTRACT), synthetic(tmp_path / "b", 8, CONTRACT)
    assert dedup(one)[0].drop == 0
    summary, found = dedup(one, other)
    assert (summary.drop, set(dropped(found).values())) == (8, {("exact", f"{n:09d}.jpg") for n in range(8)})
    nothing_left(one, other)


def test_against_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = synthetic(tmp_path / "g", 8)
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in (str(path), f"{path}/", "g", "./g/../g", "link"):
        with pytest.raises(ConfigError, match="names the same gallery"):
            run(build(DedupConfig), str(path), name)
    assert not (path / "reports").exists()


def test_galleries_of_two_models(tmp_path: Path) -> None:
    one, other = synthetic(tmp_path / "a", 8), synthetic(tmp_path / "b", 8, CONTRACT)
    with pytest.raises(ContractError, match="embedder: the gallery has"):
        run(build(DedupConfig), str(one), str(other))
    with pytest.raises(GalleryError, match="no gallery at"):
        run(build(DedupConfig), str(one), str(tmp_path / "none"))
    assert not (one / "reports").exists()


def scene(seed: int) -> np.ndarray:
    """Smooth blobs: the spectrum of a landscape, without one."""
    noise = np.random.default_rng(seed).normal(size=(9, 11, 3)).astype(np.float32)
    blobs = cv2.resize(noise, (160, 120), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 50 * blobs, 0, 255).astype(np.uint8)


def test_a_gallery_without_faces(fakes: dict[str, Any], tmp_path: Path) -> None:
    """Landscapes and their copies; the report says what it cannot see."""
    (tmp_path / "in").mkdir()
    for seed in range(3):
        cv2.imwrite(str(tmp_path / "in" / f"{seed}.png"), scene(seed))
    one = scene(0)
    copies = {
        "small.png": cv2.resize(one, (80, 60), interpolation=cv2.INTER_AREA),
        "turned.png": np.rot90(one),
        "upside down.png": np.rot90(one, 2),
        "mirrored.png": one[:, ::-1],
        "squashed.png": cv2.resize(one, (80, 120), interpolation=cv2.INTER_AREA),
        "compressed.jpg": one,
    }
    for name, copy in copies.items():
        cv2.imwrite(str(tmp_path / "in" / name), copy)
    cv2.imwrite(str(tmp_path / "in" / "black.png"), np.zeros((50, 50, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "in" / "grey.png"), np.full((50, 50, 3), 90, np.uint8))
    embed(tmp_path / "in", tmp_path / "g", fakes)
    summary, found = dedup(tmp_path / "g")
    gone = dropped(found)
    assert len(gone) == len(copies)
    # One of the seven stays. Turns and mirrors cost nothing, so that it need not be the first.
    assert len({"0.png", *copies} - set(gone)) == 1
    assert {kind for kind, _ in gone.values()} == {"near"}
    assert len({name for _, name in gone.values()}) == 1
    assert summary.groups == 1
    assert "Not found: copies turned by other angles" in (tmp_path / "g/reports/dedup/report.html").read_text()


def test_images_without_a_face_can_be_copies_too(fakes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, n in (("a.png", 0), ("b.png", 0), ("c.png", 3), ("d.png", 1)):
        cv2.imwrite(str(tmp_path / "in" / name), draw(n))
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    (tmp_path / "in" / "broken too.png").write_bytes(b"no image")
    embed(tmp_path / "in", tmp_path / "g", fakes)
    _, found = dedup(tmp_path / "g")
    gone = dropped(found)
    assert gone.pop("b.png") == ("exact", "a.png")
    assert gone in ({}, {"broken.png": ("exact", "broken too.png")}), "files of the same bytes, readable or not"


def test_without_hashes_only_the_same_bytes_are_copies(tmp_path: Path) -> None:
    """As in galleries that were made before hashes were stored; how many images that are is said."""
    same = np.repeat(Faces().draw(np.array([0, 90]), 0), (6, 2), axis=0)
    ids = ["x", "x", "x", *(f"{n}" for n in range(5))]
    hashes: list[int | None] = [None] * 6 + [5, 5]
    columns = {"image_id": ids, "image_hash": hashes, "embedding": list(same)}
    summary, found = dedup(synthetic(tmp_path / "g", 8, **columns))
    assert summary.without_hash == 6
    assert sorted(kind for kind, _ in dropped(found).values()) == ["exact", "exact", "near"]


def test_hostile_file_names(fakes: dict[str, Any], tmp_path: Path) -> None:
    names = [
        *("a b.png", "it's.png", 'say "x".png', "<script>alert(1)<", "line\nbreak.png", "back\\slash.png", "日本.png"),
        *("-rf.png", "\u202egnp.exe.png", " .png", "%41.png", "x" * 200 + ".png"),
    ]
    names = [name if name.endswith(".png") else f"{name}.png" for name in names]
    (tmp_path / "in").mkdir()
    (tmp_path / "copy").mkdir()
    for n, name in enumerate([*(os.fsencode(name) for name in names), b"\xff\xfe.png"]):
        data = cv2.imencode(".png", draw(3 * n + 1))[1].tobytes()
        for folder in ("in", "copy"):
            Path(os.fsdecode(os.fsencode(tmp_path / folder) + b"/" + name)).write_bytes(data)
    embed(tmp_path, tmp_path / "g", fakes)
    summary, found = dedup(tmp_path / "g", None, {"dedup": {"drop": "exact"}})
    count = len(names) + 1
    assert (summary.images, summary.keep, summary.drop, summary.unlisted) == (2 * count, count, count, 2)
    assert all(f"{tmp_path}/copy/" in row["kept_uri"] for row in found if row["decision"] == "drop")
    assert "<script>alert" not in (tmp_path / "g" / "reports" / "dedup" / "report.html").read_text()
