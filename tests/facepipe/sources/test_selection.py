"""What is not a photo is passed over and counted; patterns choose what is listed."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facepipe.errors import ConfigError
from facepipe.sources import SourceConfig, open_source
from facepipe.sources.selection import Selection

SYSTEM = (
    "@eaDir/1.jpg",
    "@EADIR/1.jpg",
    ".@__thumb/1.jpg",
    "#recycle/1.jpg",
    "@__thumb/1.jpg",
    "$RECYCLE.BIN/1.jpg",
    "$Recycle.Bin/S-1-5/1.jpg",
    ".Trash/1.jpg",
    ".Trash-1000/files/1.jpg",
    ".Trashes/501/1.jpg",
    ".thumbnails/normal/1.jpg",
    ".AppleDouble/1.jpg",
    "__MACOSX/1.jpg",
    "lost+found/1.jpg",
    ".hidden/deep/er/1.jpg",
)


def write_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def write_tar(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    return path


def list_names(uri: Path | str, **config: Any) -> tuple[list[str], int, str]:
    """List a source, and return the paths below it, the number of files passed over, and its notes."""
    source = open_source(SourceConfig(str(uri), **config))
    names = [item.uri.partition(".tar#")[2] or item.uri.removeprefix(f"{uri}/") for item in source]
    return sorted(names), source.ignored, " ".join(source.notes)


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_systems_are_passed_over(name: str, tmp_path: Path) -> None:
    root = write_files(tmp_path / "photos", "2019/IMG_1.jpg", name, f"2019/{name}")
    names, ignored, note = list_names(root)
    assert (names, ignored) == (["2019/IMG_1.jpg"], 2)
    assert f"2 in folders of thumbnails, bins or snapshots ({name.partition('/')[0]!r})" in note
    tar = write_tar(tmp_path / "t.tar", "2019/IMG_1.jpg", name, f"./2019/{name}")
    assert list_names(tar)[:2] == (["2019/IMG_1.jpg"], 2)
    assert list_names(root, include=name.partition("/")[0])[0] == sorted([name, f"2019/{name}"]), "who names it gets it"
    folder = f"{root}/{name.rpartition('/')[0]}"
    assert list_names(folder)[0] == ["1.jpg"], "the source itself may be such a folder"


def test_a_glob_may_name_a_folder_of_a_system(tmp_path: Path) -> None:
    root = write_files(tmp_path / "photos", "a/.private/1.jpg", "a/@eaDir/2.jpg")
    assert len(list_names(f"{root}/*/.private/*.jpg")[0]) == 1
    assert list_names(f"{root}/**/*.jpg")[0] == []


def test_dots_that_hide_nothing(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", "./a/1.jpg", "b/../2.jpg", "./3.jpg")
    assert len(list_names(tar)[0]) == 3


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), "*_thumb.jpg", ["a/1.jpg", "a/raw/2.jpg", "b/3.png"]),
        ("*.png", (), ["b/3.png"]),
        (("*.png", "raw"), (), ["a/raw/2.jpg", "b/3.png"]),
        ((), "raw", ["a/1.jpg", "a/1_thumb.jpg", "b/3.png"]),
        ((), "raw/", ["a/1.jpg", "a/1_thumb.jpg", "b/3.png"]),
        ("a/*", (), ["a/1.jpg", "a/1_thumb.jpg", "a/raw/2.jpg"]),
        ("a/*.jpg", (), ["a/1.jpg", "a/1_thumb.jpg"]),
        ("**/raw/*", (), ["a/raw/2.jpg"]),
        ("a", ("*_thumb.*", "a/raw/**"), ["a/1.jpg"]),
        ((), ("a", "b"), []),
        ("[ab]/[13].*", (), ["a/1.jpg", "b/3.png"]),
    ],
)
def test_patterns(include: Any, exclude: Any, expected: list[str], tmp_path: Path) -> None:
    files = ("a/1.jpg", "a/1_thumb.jpg", "a/raw/2.jpg", "b/3.png")
    root = write_files(tmp_path / "photos", *files)
    patterns = {"include": include, "exclude": exclude}
    names, ignored, _ = list_names(root, **patterns)
    assert names == expected
    assert (ignored > 0) == (len(expected) < 4), "what is left out is counted"
    assert list_names(write_tar(tmp_path / "t.tar", *files), **patterns)[0] == expected
    (root / "list.txt").write_text("".join(f"{name} 1\n" for name in files))
    names, ignored, _ = list_names(root / "list.txt", **patterns)
    assert ([name.removeprefix(f"{root}/") for name in names], ignored) == (expected, 4 - len(expected))
    pq.write_table(pa.table({"path": files}), root / "rows.parquet")
    names, ignored, _ = list_names(root / "rows.parquet", **patterns)
    assert ([name.removeprefix(f"{root}/") for name in names], ignored) == (expected, 4 - len(expected))


@given(st.text(st.characters(exclude_characters="/*?[]\x00"), min_size=1))
def test_a_literal_pattern_names_itself_and_what_lies_below(name: str) -> None:
    if name in (".", ".."):
        return
    selection = Selection(exclude=(name,))
    parent = "b" if name == "a" else "a"
    for path in (name, f"{parent}/{name}", f"{name}/x.jpg", f"{parent}/{name}/b/x.jpg"):
        assert selection.reject_file(path)
    for path in (f"x{name}", f"{parent}/x{name}", f"{name}x/y.jpg"):
        assert not selection.reject_file(path)
    assert not Selection(include=(name,)).is_system_folder(name)


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "1.jpg")
    with pytest.raises(ConfigError, match=r"take globs, not 'x\[z-a\]'"):
        list_names(tmp_path / "photos", exclude="x[z-a]")


def test_patterns_may_name_a_container(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for name in ("a", "b"):
        write_tar(tmp_path / "s" / f"{name}.tar", "1.jpg", "2.png")
    assert list_names(tmp_path / "s", include="a.tar")[0] == ["1.jpg", "2.png"]
    assert list_names(tmp_path / "s", exclude="a.tar")[0] == ["1.jpg", "2.png"]
    assert list_names(tmp_path / "s", include="a.tar", exclude="*.png")[0] == ["1.jpg"]
    for name in ("a", "b"):
        pq.write_table(pa.table({"bytes": [b"x"], "path": [f"{name}.jpg"]}), tmp_path / "s" / f"{name}.parquet")
    names = list_names(tmp_path / "s", kind="parquet", include="a.*")[0]
    assert [name.rpartition("/")[2] for name in names] == ["a.jpg"]
    assert list_names(tmp_path / "s", kind="parquet", exclude=("a.parquet", "b.jpg"))[:2] == ([], 2)


def test_archives_and_other_members_are_counted(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "s.tar", "1.jpg", "1.txt", "inner.tar", "deep/inner.tar.gz", "x.npy", ".DS_Store", "1.cls"
    )
    names, ignored, note = list_names(tar)
    assert (names, ignored) == (["1.jpg"], 5)
    assert "2 archives inside archives ('deep/inner.tar.gz', 'inner.tar')" in note
    root = write_files(tmp_path / "photos", "a/1.jpg", "b.rar", "c.tar.xz", "notes.txt", "d.csv.gz")
    names, ignored, note = list_names(root)
    assert (names, ignored) == (["a/1.jpg"], 4)
    assert "2 archives of kinds that are not read" in note
