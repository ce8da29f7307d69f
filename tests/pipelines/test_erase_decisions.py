"""A person's decisions go with the person: rows about the faces, rows that name somebody, old files, and the log."""

import shutil
from pathlib import Path

import pytest
from decided import FAKES, Row, is_person, list_faces, list_ids, make_gallery, pair
from helpers import embed, run_facepipe

from facepipe.decisions import add_decisions, read_decisions, undo_decisions
from facepipe.decisions import erase as decisions_erase
from facepipe.decisions.table import DecisionTable, DecisionWriter, verify_table
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import GalleryBusyError
from facepipe.gallery import Gallery
from pipelines import compact, erase
from pipelines.compact import CompactConfig


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gallery(tmp_path_factory.mktemp("erased"), images=12)


@pytest.fixture
def gallery(embedded: Path, tmp_path: Path) -> Gallery:
    shutil.copytree(embedded, tmp_path / "gallery")
    return Gallery(str(tmp_path / "gallery"))


def read_all(gallery: Gallery) -> list[Row]:
    return DecisionTable(gallery.path).read().to_pylist()


def holds(folder: Path, text: str) -> bool:
    """Tell whether any file of the table, an old one or one of the log included, holds a text."""
    import pyarrow.parquet as pq

    for path in sorted(folder.rglob("*")):
        if path.is_file() and text.encode() in path.read_bytes():
            return True
        if path.suffix == ".parquet" and text in str(pq.read_table(path).to_pylist()):
            return True
    return False


def erase_images(gallery: Gallery, **conditions: object) -> erase.EraseSummary:
    return erase.run(Selection(**conditions), gallery.path)  # type: ignore[arg-type]


def test_decisions_of_an_erased_image_go_with_their_history(gallery: Gallery) -> None:
    faces = list_faces(gallery)
    ids = [face["face_id"] for face in faces]
    first = add_decisions(gallery, [is_person(ids[0], "Ann Example")], who="eve")
    add_decisions(gallery, [is_person(ids[3], "Bob")], who="eve")
    add_decisions(gallery, [pair("same_as", ids[0], ids[1], why="like Ann Example's photo")])
    undo_decisions(gallery, first.added_ids)
    add_decisions(gallery, [{"decision": "keep", "face_id": ids[4], "why": f"not {ids[0]}, see {faces[0]['uri']}"}])
    folder = Path(gallery.path) / "decisions"
    assert holds(folder, str(ids[0]))
    summary = erase_images(gallery, images=(faces[0]["uri"],))
    gone = {face["face_id"] for face in faces if face["uri"] == faces[0]["uri"]}
    assert summary.complete
    assert summary.decisions >= 2
    for row in read_all(gallery):
        assert not {row["face_id"], row["other_face_id"]} & gone
    for text in (*map(str, gone), faces[0]["image_id"], faces[0]["uri"]):
        assert not holds(folder, text)
    # What is left is sound, and can be added to.
    kept = read_decisions(gallery.path)
    assert "Bob" in kept.confirmed.person.to_pylist()
    assert verify_table(gallery.path)[1] == []
    assert add_decisions(gallery.path, [is_person(ids[5], "Cid")]).is_applied
    receipt = load_receipt(summary.receipts[0])
    assert receipt.decisions == summary.decisions
    assert check_erased(Gallery(gallery.path), receipt) == []


def test_proof_finds_a_decision_that_is_left(gallery: Gallery) -> None:
    face = list_faces(gallery)[0]
    add_decisions(gallery, [is_person(face["face_id"], "Ann")])
    left = Path(gallery.path) / "decisions" / DecisionTable(gallery.path).files[0].path
    data = left.read_bytes()
    summary = erase_images(gallery, images=(face["uri"],))
    receipt = load_receipt(summary.receipts[0])
    left.write_bytes(data)
    assert any(line.startswith("decisions/") for line in check_erased(Gallery(gallery.path), receipt))


def test_a_person_goes_by_name_whatever_the_labels_say(gallery: Gallery) -> None:
    ids = list_ids(gallery)
    rows = [
        is_person(ids[0], "Ann Example"),
        {"decision": "is_not", "face_id": ids[4], "person": "Ann Example"},
        is_person(ids[5], "Bob", why="a friend of Ann Example.", who="eve"),
    ]
    add_decisions(gallery, rows)
    code, out, _ = run_facepipe("erase", gallery.path, "--identity", "Ann Example")
    assert code == 0
    assert "2 decisions about them went too" in out
    assert ids[0] not in list_ids(Gallery(gallery.path))
    assert [(row["person"], row["why"], row["who"]) for row in read_all(gallery)] == [("Bob", None, "eve")]
    assert not holds(Path(gallery.path) / "decisions", "Ann Example")
    # Somebody whom only decisions name goes as well.
    add_decisions(gallery.path, [{"decision": "is_not", "face_id": ids[4], "person": "Dora"}])
    code, out, _ = run_facepipe("erase", gallery.path, "--identity", "Dora")
    assert code == 0
    assert not holds(Path(gallery.path) / "decisions", "Dora")
    assert len(read_all(gallery)) == 1


def test_decisions_known_under_former_ids_go_as_well(gallery: Gallery, tmp_path: Path, embedded: Path) -> None:
    face = list_faces(gallery)[0]
    add_decisions(gallery, [is_person(face["face_id"], "Ann")])
    # The same photos elsewhere have other ids; the decisions come along.
    shutil.copytree(embedded.parent / "source", tmp_path / "moved")
    embed(tmp_path / "moved", tmp_path / "new", FAKES)
    shutil.copytree(Path(gallery.path) / "decisions", tmp_path / "new" / "decisions")
    new = Gallery(str(tmp_path / "new"))
    assert len(read_decisions(new).confirmed.face_id) == 1
    uri = next(row["uri"] for row in list_faces(new) if row["image_id"] == face["image_id"])
    # A rule is not about a person, so that copies elsewhere would stay.
    summary = erase.run(Selection(uri=uri), new.path, limit=erase.choose_limit(Selection(images=(uri,))))
    assert summary.complete
    assert read_all(new) == []


def test_an_erasure_that_is_interrupted_is_completed(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    face = list_faces(gallery)[0]
    add_decisions(gallery, [is_person(face["face_id"], "Ann")])
    real = DecisionWriter.delete_unreferenced

    class Killed(BaseException):
        pass

    def fail(self: DecisionWriter, older_than: float = 0.0) -> int:
        raise Killed

    # The rows have left the table, and the old file is still there.
    monkeypatch.setattr(DecisionWriter, "delete_unreferenced", fail)
    with pytest.raises(Killed):
        erase_images(gallery, images=(face["uri"],))
    assert holds(Path(gallery.path) / "decisions", "Ann")
    monkeypatch.setattr(DecisionWriter, "delete_unreferenced", real)
    summary = erase.resume(gallery.path, wait=True)
    assert not holds(Path(gallery.path) / "decisions", "Ann")
    receipt = load_receipt(summary.receipts[0])
    assert receipt.decisions == 1
    assert check_erased(Gallery(gallery.path), receipt) == []


def test_decisions_about_images_that_are_being_erased_are_hidden_and_refused(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = list_faces(gallery)[0]
    row = is_person(face["face_id"], "Ann")
    add_decisions(gallery, [row])

    def fail(*arguments: object) -> int:
        raise GalleryBusyError("the lease is held")

    # Another writer keeps the decisions' lease.
    monkeypatch.setattr("facepipe.erasure.steps.scrub_decisions", fail)
    summary = erase.run(Selection(images=(face["uri"],)), gallery.path, wait=False)
    assert not summary.complete
    assert len(read_decisions(gallery.path)) == 0
    assert not add_decisions(gallery.path, [{**row, "person": "Bob"}]).is_applied
    monkeypatch.undo()
    assert erase.resume(gallery.path, wait=True).receipts


def test_a_writer_that_was_asleep_during_an_erasure_adds_nothing(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = list_faces(gallery)[0]
    from facepipe.decisions import add

    real = add.find_faces

    def find_and_sleep(*arguments: object) -> object:
        found = real(*arguments)  # type: ignore[arg-type]
        monkeypatch.undo()
        erase_images(gallery, images=(face["uri"],))
        return found

    monkeypatch.setattr(add, "find_faces", find_and_sleep)
    with pytest.raises(GalleryBusyError, match="images were erased meanwhile"):
        add_decisions(gallery, [is_person(face["face_id"], "Ann")])
    assert not DecisionTable(gallery.path).exists


def test_names_in_free_texts_are_found_as_words() -> None:
    texts = frozenset({"ann example", "/a/b.jpg", "o'neil"})
    assert decisions_erase._mentions("It is Ann  Example? no: Ann Example!", texts)
    assert decisions_erase._mentions("see '/a/b.jpg'", frozenset({decisions_erase._trim("/a/b.jpg")}))
    assert decisions_erase._mentions("O'Neil", texts)
    assert not decisions_erase._mentions("Annexample", texts)


def test_compact_keeps_decisions_small(gallery: Gallery) -> None:
    ids = list_ids(gallery)
    for number in range(3):
        add_decisions(gallery, [is_person(ids[number], f"P{number}")])
    before = read_all(gallery)
    assert compact.run(CompactConfig(), gallery.path).decisions == 0
    assert compact.run(CompactConfig(keep_hours=0), gallery.path, everything=True).decisions == 3
    table = DecisionTable(gallery.path)
    assert len(table.files) == 1
    assert len([path for path in Path(table.folder).iterdir() if path.suffix == ".parquet"]) == 1
    key = lambda row: row["decision_id"]  # noqa: E731
    assert sorted(read_all(gallery), key=key) == sorted(before, key=key)
