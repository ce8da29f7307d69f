"""What is selected by a name that is not there: exit code 1, and the nearest name that is."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import run_facepipe

from facepipe.gallery import Gallery
from facepipe.gallery.near_names import find_near_images, find_near_labels
from facepipe.gallery.table import Gallery as Table

FAKES = ["--detector", "fake-detector", "--embedder", "fake-embedder", "--runner", "inline", "--quiet"]


@pytest.fixture(scope="module")
def photos(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of three people: one whose photos show nobody, one face, and two faces; one of them twice."""
    root = tmp_path_factory.mktemp("names")
    for path in sorted(drawings.rglob("*.png"))[::4]:
        place = (
            root / "photos" / {"person0": "Nobody", "person1": "Abdullah_Gul", "person2": "Zoë Ng"}[path.parent.name]
        )
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / path.name)
    first = min((root / "photos" / "Zoë Ng").iterdir())
    (root / "photos" / "copies").mkdir()
    shutil.copyfile(first, root / "photos" / "copies" / "copy.png")
    return root


@pytest.fixture(scope="module")
def gallery(photos: Path) -> str:
    assert run_facepipe("embed", photos / "photos", photos / "g", *FAKES)[0] == 0
    return str(photos / "g")


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--identity", "abdullah_gul"], "Abdullah_Gul"),
        (["--identity", "Gul, Abdullah"], "Abdullah_Gul"),
        (["--identity", "zoe  ng"], "Zoë Ng"),
        (["--source", "Photo"], "photos"),
        (["--uri", "*/abdulah_gul/*"], "Abdullah_Gul"),
        (["--image", "COPY.PNG"], "copies/copy.png"),
    ],
    ids=lambda value: str(value),
)
def test_erase_names_the_nearest(words: list[str], near: str, dry_run: list[str], gallery: str) -> None:
    code, out, err = run_facepipe("erase", gallery, *words, *dry_run, "--json", "--quiet")
    assert (code, json.loads(out)["images"]) == (1, 0)
    assert "did you mean" in err
    assert near in err


@pytest.mark.parametrize("words", [["--ids", "FILE"], ["--image", "0" * 32]])
def test_erase_of_nothing_is_no_success(words: list[str], gallery: str, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("123\n")
    words = [str(tmp_path / "ids") if word == "FILE" else word for word in words]
    code, _, err = run_facepipe("erase", gallery, *words, "--dry-run")
    assert (code, "no image" in err or "there is no" in err) == (1, True)


@pytest.mark.parametrize("words", [["--older-than", "900"], ["--missing"]])
def test_an_erasure_by_a_rule_may_have_nothing_to_do(words: list[str], gallery: str) -> None:
    assert run_facepipe("erase", gallery, *words, "--dry-run")[0] == 0


def test_one_wrong_name_among_several_is_named(gallery: str) -> None:
    words = ["--identity", "Zoë Ng", "--identity", "Abdulah_Gul", "--dry-run", "--json"]
    code, out, err = run_facepipe("erase", gallery, *words)
    assert code == 1
    assert json.loads(out)["images"] > 0
    assert "'Abdulah_Gul': did you mean 'Abdullah_Gul'?" in err
    assert "Zoë Ng" not in err


def test_a_dry_run_names_images_other_faces_and_copies(gallery: str) -> None:
    code, out, _ = run_facepipe("erase", gallery, "--identity", "Zoë Ng", "--dry-run", "--json")
    summary = json.loads(out)
    rows = Gallery(gallery).to_arrow(["uri", "face_id", "identity"]).to_pylist()
    theirs = {row["uri"] for row in rows if row["identity"] == "Zoë Ng"}
    assert code == 0
    assert (summary["images"], summary["copies"]) == (len(theirs) + 1, 1)
    assert theirs < set(summary["uris"])
    assert (summary["faces"], summary["others"]) == (2 * len(theirs) + 2, len(theirs) + 1)
    _, out, _ = run_facepipe("erase", gallery, "--identity", "Zoë Ng", "--dry-run")
    assert f"{len(theirs) + 1} other faces in these photos go too" in out
    assert "1 image is an exact copy" in out
    assert all(f"image: {uri}\n" in out for uri in theirs)
    # A photo with one face has no other, and of a face that is chosen by its id the second one is the other.
    _, out, _ = run_facepipe("erase", gallery, "--identity", "Abdullah_Gul", "--dry-run", "--json")
    assert json.loads(out)["others"] == 0


def test_the_other_face_of_a_chosen_one_is_counted(gallery: str, tmp_path: Path) -> None:
    rows = Gallery(gallery).to_arrow(["uri", "face_id", "identity"]).to_pylist()
    copy = next(row["uri"] for row in rows if row["uri"].endswith("copy.png"))
    ids = [row["face_id"] for row in rows if row["identity"] == "Zoë Ng" and row["uri"] != copy]
    for chosen, others in ((ids[-1:], 1), (ids[-2:], 0)):
        (tmp_path / "ids").write_text("\n".join(map(str, chosen)))
        _, out, _ = run_facepipe("erase", gallery, "--ids", tmp_path / "ids", "--dry-run", "--json")
        assert json.loads(out)["others"] == others


def test_export_of_nothing_names_the_nearest(gallery: str, tmp_path: Path) -> None:
    for where, near in (
        ("status = 'ok' and identity = 'abdullah gul'", "Abdullah_Gul"),
        ("identity in ('zoe ng', 'x')", "Zoë Ng"),
        ("source = 'fotos'", "photos"),
        ("det_score > 2", ""),
    ):
        code, _, err = run_facepipe("export", gallery, tmp_path / "out", "--where", where)
        assert (code, "no row meets the filter" in err, near in err) == (1, True, True), err
        assert not (tmp_path / "out").exists()
    code, _, err = run_facepipe("export", gallery, tmp_path / "out", "--where", "identity like 'Ab%'")
    assert (code, "A filter knows = !=" in err) == (2, True)


def test_nearest_names_are_sorted_and_bounded(gallery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(gallery)
    assert find_near_labels(table, "Abdullah_Gul") == ["Abdullah_Gul"]
    assert find_near_labels(table, "nothing like it at all") == []
    copy = next(uri for uri in table.to_arrow(["uri"])["uri"].to_pylist() if uri.endswith("copy.png"))
    # Of a large gallery only names that contain the one that was given are compared.
    monkeypatch.setattr("facepipe.gallery.near_names._MAX_IMAGES", 0)
    assert find_near_images(table, "/elsewhere/Copy.png") == [copy]
    assert find_near_images(table, "/elsewhere/Coppy.png") == []
