"""Folders in folders: the level that holds persons is found in the trees that people hold, or a line says so."""

import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from facepipe.sources import SourceConfig, open_source
from facepipe.sources.folder_levels import FolderLevels
from facepipe.sources.item import NestedFolderLabel

TREES = {
    "WebFace42M": (["0_0/0_0_0000017", "0_0/0_0_0000018", "0_1/0_1_0000003"], {"0_0_0000017", "0_0_0000018", "0_1_0000003"}),
    "WebFace42M by number": (["0/17", "0/23", "1/48", "1/99"], {"17", "23", "48", "99"}),
    "BUPT": (["African/m.0107_f", "African/m.02", "Asian/m.03", "Caucasian/m.04", "Indian/m.05"], {"m.0107_f", "m.02", "m.03", "m.04", "m.05"}),
    "BUPT from its root": (["images/race_per_7000/African/m.01", "images/race_per_7000/Indian/m.02"], {"m.01", "m.02"}),
    "DigiFace": (["subjects_0-1999_72_imgs/0", "subjects_0-1999_72_imgs/7", "subjects_2000-3999_72_imgs/2000"], {"0", "7", "2000"}),
    "VGGFace2": (["train/n000002", "train/n000003", "test/n000001"], {"n000001", "n000002", "n000003"}),
    "MS1M": (["imgs/0_5089", "imgs/17_88", "imgs/m.01"], {"0_5089", "17_88", "m.01"}),
    "splits of people": (["train/Ann", "train/Bob", "val/Ann"], {"Ann", "Bob"}),
    "photos by date": (["2024-05-01/Ann", "2024-05-02/Bob"], {"Ann", "Bob"}),
    "one folder of many": ([f"casia/{n:07}" for n in range(45, 445, 4)], {f"{n:07}" for n in range(45, 445, 4)}),
}  # fmt: skip
NOBODY = {
    "years and months": ["2019/05", "2019/11", "2020/07"],
    "dates and days": ["2019-05/1", "2019-05/22"],
    "albums of people": ["Ann/beach", "Ann/birthday", "Bob/garden"],
    "videos of people": [f"id1000{n}/video{n}{m}x" for n in range(5) for m in range(9)],
    "frames of people": ["Ann/0", "Ann/1", "Bob/0", "Bob/1"],
    "live and spoof": ["train/17/live", "train/17/spoof", "train/18/live"],
    "numbers that come again": ["0/1", "0/2", "1/1"],
    "shards": ["train/00000", "train/00001", "train/00002"],
}


def make_tree(root: Path, folders: list[str]) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        (root / folder / "1.jpg").write_bytes(b"x")
    return root


def list_labels(path: Path, **config: Any) -> tuple[list[str | None], str]:
    source = open_source(SourceConfig(str(path), **config))
    labels = [item.identity for item in source]
    return labels, " ".join(source.notes)


@pytest.mark.parametrize("name", TREES)
def test_the_level_of_persons_is_found(tmp_path: Path, name: str) -> None:
    folders, expected = TREES[name]
    labels, note = list_labels(make_tree(tmp_path, folders))
    assert set(labels) == expected
    assert all(type(label) is str for label in labels)
    assert "are taken for people" in note
    assert "--identity none" in note


@pytest.mark.parametrize("name", NOBODY)
def test_where_it_is_not_certain_a_line_says_so(tmp_path: Path, name: str) -> None:
    folders = NOBODY[name]
    labels, note = list_labels(make_tree(tmp_path, folders))
    assert set(labels) == {None}
    assert "no image got a label" in note
    assert "--identity folder would give labels such as" in note
    given = list_labels(tmp_path, identity="folder")[0]
    assert set(given) == {folder.rpartition("/")[2] for folder in folders}
    assert any(repr(label) in note for label in given)


def test_images_beside_people_that_lie_deeper_get_no_label(tmp_path: Path) -> None:
    make_tree(tmp_path, ["Ann", "Bob", "Ann/beach", "Cleo"])
    labels, _ = list_labels(tmp_path)
    assert sorted(map(str, labels)) == ["Ann", "Bob", "Cleo", "None"]


def test_the_order_of_folders_does_not_matter() -> None:
    generator = random.Random(5)
    for folders, expected in TREES.values():
        order = list(folders)
        generator.shuffle(order)
        labels = [NestedFolderLabel(path.rpartition("/")[2], path.rpartition("/")[0]) for path in order]
        levels = FolderLevels()
        for label in labels:
            levels.add(label)
        levels.decide()
        assert {str(label) for label in labels if levels.is_person(label)} == expected


def test_a_million_images_of_a_known_layout_are_handed_out_at_once() -> None:
    levels = FolderLevels()
    for name in ("n000001", "n000002"):
        levels.add(NestedFolderLabel(name, "train"))
    assert levels.is_certain
    levels.add(NestedFolderLabel("x", "Ann"))
    assert not levels.is_certain


def test_a_nested_label_travels() -> None:
    label = pickle.loads(pickle.dumps(NestedFolderLabel("Ann", "train/a")))
    assert (str(label), label.parents) == ("Ann", "train/a")
