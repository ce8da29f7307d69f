"""Folders that are splits, dates, shards, collections or the only one are nobody; one line says what was taken."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facepipe.sources import SourceConfig, open_source
from facepipe.sources.folder_names import PEOPLE, FolderJudge, FolderKind, classify_folder
from facepipe.sources.labelled import LabelledSource

PERSONS = (
    "Ann",
    "Aaron_Eckhart",
    "Val Kilmer",
    "Dev",
    "Jan_Novak",
    "n000001",
    "m.0107_f",
    "s1",
    "person0",
    "id_7",
    "王伟",
)


def make_tree(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for n in range(2):
            (root / folder / f"{n}.jpg").write_bytes(b"x")
    return root


def list_labels(uri: Path | str, **config: Any) -> tuple[set[str | None], str]:
    """List a source, and return its labels and its notes."""
    source: LabelledSource = open_source(SourceConfig(str(uri), **config))
    labels = {item.identity for item in source}
    return labels, " ".join(source.notes)


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "test"),
        ("train", "val", "test"),
        ("Training", "Validation"),
        ("query", "gallery"),
        ("fold1", "fold2", "fold3"),
        ("2024-05-01", "2024-05-02"),
        ("2019", "2020", "2021"),
        ("20240501", "20240502"),
        ("202405", "202406"),
        ("2024_05 Wedding", "2024_06"),
        ("01.05.2024", "02.05.2024"),
        ("January", "February", "May"),
        ("20240501_120000", "20240502_080000"),
        ("00000", "00001"),
        ("00000", "01000", "02000"),
        ("000", "001", "003"),
        ("00", "0a", "f3", "ff"),
        ("shard_0", "shard_1"),
        ("part-00000-of-00002", "part-00001-of-00002"),
        ("set1", "set2"),
        ("images", "masks", "annotated_faces")[::2],
        ("JPEGImages", "Thumbnails"),
        ("100CANON", "101CANON"),
        ("images",),
        ("Ann",),
        ("写真",),
        ("写真", "画像"),
    ],
)
def test_these_folders_are_nobody(folders: tuple[str, ...], tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree", *folders)
    labels, note = list_labels(root)
    assert labels == {None}
    assert note.startswith("no image got a label")
    assert "--identity folder" in note
    assert repr(sorted(folders)[0]) in note
    labels, note = list_labels(root, identity="folder")
    assert labels == set(folders), "who types it gets it"
    assert note == ""


@pytest.mark.parametrize(
    "folders",
    [
        PERSONS,
        ("0000045", "0000099", "0000100"),  # CASIA-WebFace
        ("April", "June"),
        ("Ed", "Abe"),
        ("Val", "Dev"),
        ("Ann", "Mark Page 3"),
    ],
)
def test_these_folders_are_people(folders: tuple[str, ...], tmp_path: Path) -> None:
    assert list_labels(make_tree(tmp_path / "tree", *folders))[0] == set(folders)


@pytest.mark.parametrize("folders", [("0", "1", "2"), ("1", "10", "2020"), ("a", "b")])
def test_a_doubt_is_said(folders: tuple[str, ...], tmp_path: Path) -> None:
    labels, note = list_labels(make_tree(tmp_path / "tree", *folders))
    assert labels == set(folders)
    assert "are taken for people" in note
    assert "--identity none" in note


@pytest.mark.parametrize("name", ["\U00020bb7田", "王伟", "김민준", "さくら"])
def test_the_only_folder_is_a_person_if_its_name_can_be_nothing_else(name: str, tmp_path: Path) -> None:
    labels, note = list_labels(make_tree(tmp_path / "tree", name))
    assert labels == {name}
    assert note.startswith(f"the only folder, {name!r}, is taken for a person")
    assert "--identity none" in note


def test_among_people_some_folders_are_nobody(tmp_path: Path) -> None:
    labels, note = list_labels(make_tree(tmp_path / "tree", "Ann", "Bob", "test", "unknown", "2024-05-01"))
    assert labels == {"Ann", "Bob", None}
    assert "'test' are parts of a dataset" in note
    assert "--identity folder" in note


def test_certain_labels_need_no_line(tmp_path: Path) -> None:
    assert list_labels(make_tree(tmp_path / "tree", "Ann", "Bob"))[1] == ""
    labels, note = list_labels(make_tree(tmp_path / "deep", "a/Ann", "a/Bob"))
    assert labels == {None}
    assert "--identity folder would give labels such as 'Ann', 'Bob'" in note
    assert list_labels(tmp_path / "deep", identity="none") == ({None}, "")
    assert "--identity filename finds none" in list_labels(tmp_path / "deep", identity="filename")[1]


def test_a_glob_and_patterns_do_not_make_a_folder_the_only_one(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree", "Ann", "Bob")
    assert list_labels(f"{root}/A*/*.jpg")[0] == {"Ann"}
    assert list_labels(root, include="Ann")[0] == {"Ann"}


def test_a_tar_and_a_list_are_judged_like_a_folder(tmp_path: Path) -> None:
    for n, folders in enumerate([("train", "test"), ("Ann", "Bob"), ("00000", "00001"), ("images",)]):
        root = make_tree(tmp_path / str(n), *folders)
        expected = list_labels(root)[0]
        with tarfile.open(tmp_path / f"{n}.tar", "w") as tar:
            for folder in folders:
                for name in ("0.jpg", "1.jpg"):
                    info = tarfile.TarInfo(f"./{folder}/{name}")
                    info.size = 1
                    tar.addfile(info, io.BytesIO(b"x"))
        assert list_labels(tmp_path / f"{n}.tar")[0] == expected
        (root / "list.txt").write_text("".join(f"{folder}/{k}.jpg\n" for folder in folders for k in range(2)))
        assert list_labels(root / "list.txt")[0] == expected


def test_images_keep_their_order_while_folders_are_judged(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree", "00000", "00001", "x/y")
    for name in ("0.jpg", "zz.jpg"):
        (root / name).write_bytes(b"x")
    source = open_source(SourceConfig(str(root)))
    uris = [item.uri for item in source]
    assert uris == [item.uri for item in open_source(SourceConfig(str(root), identity="none"))]
    assert len(uris) == 8
    assert [item.uri for item in source] == uris, "a listing can be repeated"


@given(st.lists(st.sampled_from(PERSONS), min_size=2, unique=True), st.randoms())
def test_the_order_of_names_does_not_matter(people: list[str], random: Any) -> None:
    names = [*people, "train", "2024-05-01"]
    random.shuffle(names)
    judge = FolderJudge()
    for name in names:
        judge.add(name)
    verdict = judge.judge()
    assert {name for name in names if verdict.find_kind(name) in PEOPLE} == set(people)


@given(st.text(min_size=1))
def test_every_name_has_a_kind(name: str) -> None:
    assert classify_folder(name) in FolderKind
    judge = FolderJudge()
    judge.add(name)
    assert judge.judge().is_only_one


def test_many_numbers_are_judged_without_looking_at_all_pairs() -> None:
    judge = FolderJudge()
    for n in range(20_000):
        judge.add(f"{n:06d}")
    assert judge.judge().numbers is FolderKind.SHARD
    judge.add("900000")
    assert judge.judge().numbers is FolderKind.NUMBER
