"""`verify --quick`: it finds files that are missing or cut short, and reads none."""

from pathlib import Path

import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from helpers import run_facepipe

from facepipe import storage
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.quick import check_files


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    """A gallery of three files of twenty rows."""
    gallery = Gallery.create(str(tmp_path / "g"), CONTRACT)
    identities, vectors = next(Faces().blocks(60))
    parts = [rows(identities[n : n + 20], vectors[n : n + 20], n) for n in (0, 20, 40)]
    append(gallery, parts, "synthetic")
    return Gallery(gallery.path)


def test_a_sound_gallery(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    read = storage.read

    def refuse_parts(path: str | bytes, *rest: object, **more: object) -> bytes:
        assert "part-" not in str(path)
        return read(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "read", refuse_parts)
    monkeypatch.setattr(storage, "open_seekable", lambda path, **more: pytest.fail(f"{path} was opened"))
    checked = check_files(gallery)
    assert (checked.files, checked.rows, checked.faces, checked.problems) == (3, 60, 60, [])


def test_missing_and_shortened_files_are_named(gallery: Gallery) -> None:
    paths = sorted(gallery.list_paths())
    folder = Path(gallery.faces_folder)
    (folder / paths[0]).unlink()
    size = (folder / paths[1]).stat().st_size
    with open(folder / paths[1], "r+b") as file:
        file.truncate(size - 1)
    (folder / "part-of-nobody.parquet").write_bytes(b"not in the table")
    assert sorted(check_files(gallery).problems) == sorted(
        [f"{paths[0]}: is missing", f"{paths[1]}: has {size - 1} bytes, not {size}"]
    )


def test_an_empty_folder(gallery: Gallery) -> None:
    for name in gallery.list_paths():
        Path(gallery.faces_folder, name).unlink()
    assert len(check_files(gallery).problems) == 3


def test_the_command(gallery: Gallery) -> None:
    assert run_facepipe("index", gallery.path)[0] == 0
    code, out, _ = run_facepipe("verify", gallery.path, "--quick")
    assert code == 0
    assert "what is in them was not read" in out
    (vectors,) = Path(gallery.path, "index").glob("shard-*/vectors.npy")
    vectors.write_bytes(b"short")
    code, out, _ = run_facepipe("verify", gallery.path, "--quick")
    assert code == 1
    assert f"index/{vectors.parent.name}/vectors.npy: has 5 bytes" in out
    vectors.unlink()
    assert "vectors.npy: is missing" in run_facepipe("verify", gallery.path, "--quick")[1]
    code, _, err = run_facepipe("verify", gallery.path, "--quick", "--erased", "receipt.json")
    assert code == 2
    assert "--quick reads no file" in err
