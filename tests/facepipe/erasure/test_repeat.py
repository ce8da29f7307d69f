"""Erasures that are repeated by their receipts: a backup from before them brings nobody back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from helpers import embed, run_facepipe

from facepipe.erasure import repeat
from facepipe.erasure.limits import choose_repeat_limit
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import Receipt, load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import ConfigError, ErasureLimitError
from facepipe.gallery import Gallery, suppressed
from facepipe.hashing import hash64, hash64_each
from facepipe.index import manifest as manifests
from facepipe.index.verify import verify_index
from pipelines import erase, index

SECRET = "0123456789abcdef" * 2
PERSONS = np.repeat(np.arange(8), 4)


def make(path: Path) -> Gallery:
    gallery = Gallery.create(str(path), CONTRACT)
    append(gallery, [rows(PERSONS, Faces().draw(PERSONS, 0), 0)], "20261101T000000-000000")
    return Gallery(gallery.path)


def list_labels(gallery: str | Path) -> set[str]:
    return set(Gallery(str(gallery)).to_arrow(["identity"])["identity"].to_pylist())


def erase_person(gallery: Path, person: int, **settings: Any) -> Receipt:
    return load_receipt(erase.run(Selection(identities=(f"person{person}",)), str(gallery), **settings).receipts[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with an index that has erased three persons, and its backup from before that."""
    folder = tmp_path_factory.mktemp("repeat")
    gallery = make(folder / "g")
    index.run(index.IndexConfig(), gallery.path)
    shutil.copytree(gallery.path, folder / "backup")
    for person in (1, 2, 3):
        erase_person(folder / "g", person)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "p")
    return tmp_path / "p"


def test_a_restored_backup_forgets_whom_the_gallery_had_erased(place: Path) -> None:
    """All at once, from a folder of receipts, and the proof of each holds."""
    backup = place / "backup"
    assert list_labels(backup) == {f"person{n}" for n in range(8)}
    code, out, _ = run_facepipe("erase", backup, "--receipt", place / "g" / "erased", "--json")
    summary = json.loads(out)
    assert (code, summary["images"], summary["unknown"]) == (0, 12, 0)
    assert list_labels(backup) == {f"person{n}" for n in (0, 4, 5, 6, 7)}
    table = Gallery(str(backup))
    assert verify_index(table) == []
    receipts = [load_receipt(str(path)) for path in (place / "g" / "erased").glob("*.json")]
    for receipt in [*receipts, load_receipt(summary["receipts"][0])]:
        assert check_erased(table, receipt) == []
    new = load_receipt(summary["receipts"][0])
    assert (new.chosen_by, sorted(new.repeats)) == (["receipts"], sorted(receipt.id for receipt in receipts))
    # The names are kept out, and doing it again finds nothing.
    uris = rows(PERSONS, Faces().draw(PERSONS, 0), 0)["uri"].to_pylist()
    assert suppressed.read_uris(str(backup)).contains(hash64_each(uris)).sum() == 12
    code, out, _ = run_facepipe("erase", backup, "--receipt", place / "g" / "erased", "--json")
    assert (code, json.loads(out)["images"], json.loads(out)["receipts"]) == (0, 0, [])


def test_receipts_one_by_one_as_a_shell_expands_them(place: Path) -> None:
    paths = sorted((place / "g" / "erased").glob("*.json"))
    before = {path.name for path in (place / "backup").rglob("*")}
    code, out, _ = run_facepipe("erase", place / "backup", "--receipt", paths[0], paths[1], "--dry-run", "--json")
    assert (code, json.loads(out)["images"]) == (0, 8)
    assert {path.name for path in (place / "backup").rglob("*")} == before
    code, _, _ = run_facepipe("erase", place / "backup", "--receipt", paths[0], paths[1])
    assert (code, len(list_labels(place / "backup"))) == (0, 6)
    code, _, _ = run_facepipe("erase", place / "backup", "--receipt", paths[2], "--receipt", paths[0])
    assert (code, len(list_labels(place / "backup"))) == (0, 5)
    assert manifests.load(str(place / "backup")).live == 20


def test_receipts_of_more_than_half_of_the_gallery_needs_its_number(place: Path) -> None:
    receipt = load_receipt(str(next((place / "g" / "erased").glob("*.json"))))
    uris = rows(PERSONS, Faces().draw(PERSONS, 0), 0)["uri"].to_pylist()
    receipt.hashes["uris"] = receipt.hash_values(uris)
    receipt.images = len(uris)
    with pytest.raises(ErasureLimitError, match="--yes-erase 32"):
        erase.repeat([receipt], str(place / "backup"), limit=replace(choose_repeat_limit(), free=0))
    assert len(list_labels(place / "backup")) == 8


def test_keyed_receipts_need_their_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = make(tmp_path / "g")
    shutil.copytree(gallery.path, tmp_path / "backup")
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    erase_person(tmp_path / "g", 1)
    path = next((tmp_path / "g" / "erased").glob("*.json"))
    for secret in ("", SECRET[::-1]):
        monkeypatch.setenv("FACEPIPE_ERASURE_KEY", secret)
        code, _, err = run_facepipe("erase", tmp_path / "backup", "--receipt", path)
        assert (code, "FACEPIPE_ERASURE_KEY" in err) == (2, True)
    assert "person1" in list_labels(tmp_path / "backup")
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", SECRET)
    assert run_facepipe("erase", tmp_path / "backup", "--receipt", path)[0] == 0
    assert "person1" not in list_labels(tmp_path / "backup")
    # It was altered.
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "suppressed": False}))
    code, _, err = run_facepipe("erase", tmp_path / "backup", "--receipt", path)
    assert (code, "altered" in err) == (2, True)


def test_receipts_of_the_first_format(place: Path) -> None:
    """Their hashes are others, and what the gallery lacks cannot be kept out by them, which is said."""
    uris = rows(PERSONS, Faces().draw(PERSONS, 0), 0)["uri"].to_pylist()
    meant = [*uris[4:8], "/somewhere/else.jpg"]
    receipt = Receipt("20261101T000000-aaaaaa", "id", "2026-11-01T00:00:00+00:00", ["ids"], "0", format=1, images=5)
    receipt.hashes = {"uris": sorted(f"{hash64(receipt.salt, uri):016x}" for uri in meant), "images": [], "faces": []}
    (place / "old.json").write_bytes(receipt.encode())
    code, out, err = run_facepipe("erase", place / "backup", "--receipt", place / "old.json", "--json")
    assert (json.loads(out)["images"], json.loads(out)["unknown"]) == (4, 1)
    assert (code, receipt.id in err) == (1, True)
    assert "person1" not in list_labels(place / "backup")
    # If the lists of its gallery are here, all is well.
    suppressed.suppress_images(str(place / "backup"), receipt.id, meant, [])
    assert run_facepipe("erase", place / "backup", "--receipt", place / "old.json")[0] == 0


@pytest.mark.parametrize("key", ["", SECRET])
@pytest.mark.parametrize("may_return", [False, True])
def test_nothing_comes_back_from_the_source(
    key: str, may_return: bool, drawings: Path, fakes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what the backup held, nor what came after the backup and was erased later, under whatever name."""
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", key)
    source = tmp_path / "in"
    shutil.copytree(drawings, source)
    names = sorted(path.relative_to(source) for path in source.rglob("*.*") if path.is_file())
    late = names[1]
    (source / late).rename(tmp_path / "late")
    gallery = tmp_path / "g"
    embed(source, gallery, fakes)
    shutil.copytree(gallery, tmp_path / "backup")
    (tmp_path / "late").rename(source / late)
    embed(source, gallery, fakes)
    erased = [str(source / names[0]), str(source / late)]
    receipts = [
        load_receipt(erase.run(Selection(images=(uri,)), str(gallery), may_return=may_return).receipts[0])
        for uri in erased
    ]
    shutil.rmtree(gallery)
    (tmp_path / "backup").rename(gallery)
    summary = erase.repeat(receipts, str(gallery))
    assert (summary.unknown > 0, summary.doubts) == (True, [])
    # A copy under another name is known by its content.
    shutil.copy(source / late, source / ("copy" + late.suffix))
    shutil.copy(source / names[0], source / ("another" + names[0].suffix))
    # What comes in after the erasure is not what it meant.
    earlier = [replace(receipt, at="2020-01-01T00:00:00+00:00") for receipt in receipts]
    again = embed(source, gallery, fakes)
    uris = set(Gallery(str(gallery)).to_arrow(["uri"])["uri"].to_pylist())
    back = {uri for uri in uris if Path(uri).name in {Path(*erased[:1]).name, late.name} or "copy" in uri}
    if may_return:
        assert set(erased) <= uris
        assert erase.repeat(earlier, str(gallery)).images == 0
    else:
        assert not back & set(erased)
        assert not [uri for uri in uris if uri.endswith(("copy" + late.suffix, "another" + names[0].suffix))]
        assert again.erased >= 2
        for receipt in receipts:
            assert check_erased(Gallery(str(gallery)), receipt) == []


def test_what_has_come_in_again_since_stays(tmp_path: Path) -> None:
    """Such as an image that was missing for a while: its receipt means what was there before."""
    gallery = make(tmp_path / "g")
    shutil.copytree(gallery.path, tmp_path / "backup")
    receipt = erase_person(tmp_path / "g", 1, may_return=True)
    assert erase.repeat([receipt], str(tmp_path / "backup")).images == 4
    # Another content under the same name is another image.
    shutil.copytree(tmp_path / "g", tmp_path / "other")
    faces = rows(PERSONS[4:8], Faces().draw(PERSONS[4:8], 9), 4)
    for name, values in (("face_id", list(range(1, 5))), ("image_id", list("abcd"))):
        faces = faces.set_column(faces.schema.get_field_index(name), name, [values])
    append(
        Gallery(str(tmp_path / "other")), [faces.cast(rows(PERSONS[:4], Faces().draw(PERSONS[:4], 0), 0).schema)], "r"
    )
    assert erase.repeat([receipt], str(tmp_path / "other")).images == 0


@pytest.mark.parametrize("damage", [{"images": 7}, {"id": "../../x"}, {"at": "yesterday"}, {"hashes": {}}])
def test_altered_receipts_are_refused(damage: dict[str, Any], place: Path) -> None:
    path = next((place / "g" / "erased").glob("*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(ConfigError, match="altered"):
        repeat.read_receipts([str(path)])


def test_wrong_words(place: Path) -> None:
    path = next((place / "g" / "erased").glob("*.json"))
    for words in (
        ("--receipt", place / "nowhere"),
        ("--receipt", place / "g" / "index"),
        ("--receipt", path, "--identity", "person4"),
        ("--receipt", path, "--may-return"),
        ("--receipt", path, "--resume"),
        (path,),
    ):
        code, out, err = run_facepipe("erase", place / "backup", *words)
        assert code == 2, (words, out, err)
    assert len(list_labels(place / "backup")) == 8
