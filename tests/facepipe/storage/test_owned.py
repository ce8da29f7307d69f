"""Deleting what is ours: by name, in our folders, never through a link, and nothing else."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.index.manifest import is_index_file
from facepipe.storage.owned import delete_owned, delete_owned_folder, walk_files

PARTS = st.sampled_from(["own", "own.new", "mine", "shard-1a", "x.old", "graph"])
NAMES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)


def owns(name: str) -> bool:
    return name.rstrip("/").rpartition("/")[2].startswith("own")


def list_all(folder: Path) -> set[str]:
    return {name for name, _ in walk_files(str(folder))}


@given(files=st.sets(NAMES, max_size=8), links=st.sets(NAMES, max_size=3))
def test_only_own_files_and_their_emptied_folders_go(
    tmp_path_factory: pytest.TempPathFactory, files: set[str], links: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("f")
    outside = tmp_path_factory.mktemp("outside")
    (outside / "own").write_text("not ours, whatever its name")
    placed = []
    for name in sorted(files | links):
        path = folder / name
        if any(parent.is_symlink() or parent.is_file() for parent in path.parents) or os.path.lexists(path):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in links:
            path.symlink_to(outside)
        else:
            path.write_text("x")
        placed.append(name)
    wanted = [name for name in placed if not owns(name) or (folder / name).is_symlink()]
    assert sorted(delete_owned(str(folder), owns)) == sorted(wanted)
    left = list_all(folder)
    assert {name for name in left if not (folder / name).is_dir() or (folder / name).is_symlink()} == set(wanted)
    assert (outside / "own").exists()
    # A folder stays if something is in it, or if nothing of ours was.
    for name in left - set(wanted):
        inner = [other for other in placed if other.startswith(name + "/")]
        assert any(other in wanted for other in inner) or not any(owns(other) for other in inner)


def test_an_empty_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "own-folder").mkdir()
    assert delete_owned(str(tmp_path), owns) == []
    assert os.listdir(tmp_path) == ["thesis"]


def test_a_folder_goes_as_a_whole_only_if_nothing_is_left_and_it_is_no_link(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own").touch()
    (tmp_path / "b" / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert delete_owned_folder(str(tmp_path / "link"), owns) == ["."]
    assert (tmp_path / "b" / "own").exists()
    assert delete_owned_folder(str(tmp_path / "a"), owns) == []
    assert delete_owned_folder(str(tmp_path / "b"), owns) == ["mine"]
    assert delete_owned_folder(str(tmp_path / "none"), owns) == []
    assert sorted(os.listdir(tmp_path)) == ["b", "link"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "own").touch()
    with pytest.raises(StorageError, match="cannot list"):
        delete_owned(str(tmp_path / "own"), owns)


def test_in_an_object_store(bucket: Any) -> None:
    for name in ("g/x/own", "g/x/mine", "g/x/deep/own", "g/xy/own"):
        storage.write(f"s3://faces/{name}", b"1")
    assert delete_owned("s3://faces/g/x", owns) == ["mine"]
    keys = [entry["Key"] for entry in bucket.list_objects_v2(Bucket="faces")["Contents"]]
    assert keys == ["g/x/mine", "g/xy/own"]


@pytest.mark.parametrize(
    "name",
    [
        *("shard-0123456789ab/index.faiss", "shard-000.partial/vectors.npy", "shard-ab/labels.arrow.0a1b2c3d.new"),
        *("shard-ab.partial/", "shard-ab/", "dead-0123456789ab.npy", "template-0123456789ab.faiss.new"),
    ],
)
def test_files_of_an_index(name: str) -> None:
    assert is_index_file(name)


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", "thesis/", "thesis/data.bin", "other-gallery/faces/part-1.parquet", "shard-plan.txt"),
        *("shard-ab/notes.txt", "shard-ab/sub/ids.npy", "shard-ab", "shards/index.faiss", "dead-weight.npy"),
        *("template-letter.faiss", "manifest.json", ".lock", "shard-ab.old/ids.npy", "x/shard-ab/ids.npy"),
        "dead-ab.npy.bak",
    ],
)
def test_files_beside_an_index_are_none_of_it(name: str) -> None:
    assert not is_index_file(name)
