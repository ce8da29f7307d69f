"""Folders that have not changed are passed over: the gallery is the one that a listing of every file makes."""

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import cv2
import pytest
from conftest import draw
from helpers import embed, rows, trials

from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.selection import Selection
from facepipe.gallery import Gallery
from facepipe.schema import OK
from pipelines import erase

MARK = {"missing": {"policy": "mark", "at_most": 1.0}}
SOMETIMES = {"source": {"full_listing_every": 5}}


class Tree:
    """A tree of images that changes. Whatever happens, its folders' times are hours ago, and never the same again."""

    def __init__(self, root: Path, seed: int):
        self.root = root
        self.rng = random.Random(seed)
        self.clock = time.time() - 50_000
        self.pictures = [cv2.imencode(".png", draw(n))[1].tobytes() for n in range(4)] + [b"\x89PNG broken"]
        root.mkdir()
        for folder in ("a", "b", "c", "years/2001", "years/2002"):
            (root / folder).mkdir(parents=True)
            for _ in range(3):
                self.add(root / folder)
        self.settle(root, *[path for path in root.rglob("*") if path.is_dir()])

    def settle(self, *folders: Path) -> None:
        for folder in folders:
            self.clock += 1
            os.utime(folder, (self.clock, self.clock))

    def list_folders(self) -> list[Path]:
        return [self.root, *sorted(path for path in self.root.rglob("*") if path.is_dir())]

    def list_images(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*.png") if not path.is_dir())

    def add(self, folder: Path) -> None:
        name = folder / f"{self.rng.randrange(1 << 30):08x}.png"
        name.write_bytes(self.rng.choice(self.pictures) + bytes([self.rng.randrange(3)]))
        self.settle(folder)

    def remove(self) -> None:
        path = self.rng.choice(self.list_images())
        path.unlink()
        self.settle(path.parent)

    def replace(self) -> None:
        """Write another picture beside an image, and give it its name, as most programs do."""
        path = self.rng.choice(self.list_images())
        path.with_suffix(".new").write_bytes(self.rng.choice(self.pictures))
        path.with_suffix(".new").rename(path)
        self.settle(path.parent)

    def move(self) -> None:
        path = self.rng.choice(self.list_images())
        target = self.rng.choice(self.list_folders()) / path.name
        path.rename(target)
        self.settle(path.parent, target.parent)

    def add_folder(self) -> None:
        parent = self.rng.choice(self.list_folders())
        folder = parent / f"new{self.rng.randrange(1 << 30):08x}"
        folder.mkdir()
        self.add(folder)
        self.settle(folder, parent)

    def remove_folder(self) -> None:
        folder = self.rng.choice(self.list_folders()[1:])
        shutil.rmtree(folder)
        self.settle(folder.parent)

    def move_folder(self) -> None:
        folder = self.rng.choice(self.list_folders()[1:])
        folder.rename(self.root / f"moved{self.rng.randrange(1 << 30):08x}")
        self.settle(folder.parent, self.root)

    def swap_folders(self) -> None:
        """Give two folders each other's names, so that each finds the time of the other."""
        first, second = self.rng.sample([path for path in self.list_folders()[1:] if path.parent == self.root], 2)
        first.rename(self.root / "held")
        second.rename(first)
        (self.root / "held").rename(second)
        self.settle(self.root)

    def link(self) -> None:
        path = self.rng.choice(self.list_images())
        folder = self.rng.choice(self.list_folders())
        (folder / f"link{self.rng.randrange(1 << 30):08x}.png").symlink_to(path)
        self.settle(folder)

    def change(self) -> None:
        changes = [self.remove, self.replace, self.move, self.add_folder, self.remove_folder, self.move_folder]
        changes += [self.swap_folders, self.link, lambda: self.add(self.rng.choice(self.list_folders()))]
        for _ in range(self.rng.randint(0, 3)):
            self.rng.choice(changes)()


def read(gallery: Path) -> list[dict[str, Any]]:
    """Read all rows, but when they came and when they went."""
    found = rows(gallery)
    for row in found:
        row["missing_since"] = row["missing_since"] is not None
    return found


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that were listed."""
    folders: list[str] = []
    scandir = os.scandir

    def note(path: Any = ".") -> Any:
        folders.append(os.fsdecode(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", note)
    return folders


@pytest.mark.parametrize("seed", trials(12))
def test_nights_are_those_of_full_listings(tmp_path: Path, fakes: dict[str, Any], seed: int) -> None:
    tree = Tree(tmp_path / "in", seed)
    for _ in range(4):
        full = embed(tree.root, tmp_path / "full", fakes, MARK)
        times = embed(tree.root, tmp_path / "times", fakes, MARK, SOMETIMES)
        assert read(tmp_path / "full") == read(tmp_path / "times")
        for name in ("images", "skipped", "missing", "moved", "listed", "relabelled"):
            assert getattr(full, name) == getattr(times, name), name
        if seed % 3 == 1:  # an erasure between two nights, after which the images may come again
            for gallery in ("full", "times"):
                selection = Selection(images=(str(tree.list_images()[0]),))
                erase.run(selection, str(tmp_path / gallery), may_return=seed % 2 == 0, limit=ErasureLimit(1.0))
        tree.change()


def test_an_unchanged_folder_is_not_listed(tmp_path: Path, fakes: dict[str, Any], scanned: list[str]) -> None:
    tree = Tree(tmp_path / "in", 0)
    embed(tree.root, tmp_path / "g", fakes, SOMETIMES)
    tree.add(tree.root / "b")
    scanned.clear()
    summary = embed(tree.root, tmp_path / "g", fakes, SOMETIMES)
    listed = {str(Path(path).relative_to(tree.root)) for path in scanned if path.startswith(str(tree.root))}
    assert summary.images == 1
    assert listed.isdisjoint({"a", "c", "years/2001"} - {"a" if _has_failed(tmp_path / "g", tree.root / "a") else ""})
    assert "b" in listed


def _has_failed(gallery: Path, folder: Path) -> bool:
    found = Gallery(str(gallery)).to_arrow(["uri", "status"]).to_pylist()
    return any(row["uri"].startswith(f"{folder}/") and row["status"] not in (OK, "no_face") for row in found)


def test_a_file_written_in_its_place_waits_for_the_full_listing(tmp_path: Path, fakes: dict[str, Any]) -> None:
    tree = Tree(tmp_path / "in", 0)
    embed(tree.root, tmp_path / "g", fakes, SOMETIMES)
    path = tree.list_images()[0]
    info = path.parent.stat()
    path.write_bytes(tree.pictures[1] + b"another")
    os.utime(path.parent, ns=(info.st_atime_ns, info.st_mtime_ns))
    counts = [embed(tree.root, tmp_path / "g", fakes, SOMETIMES).images for _ in range(6)]
    # Of five listings one looks at every file.
    assert counts == [0, 0, 0, 0, 1, 0]


def test_a_folder_that_has_just_changed_is_listed(tmp_path: Path, fakes: dict[str, Any], scanned: list[str]) -> None:
    tree = Tree(tmp_path / "in", 0)
    os.utime(tree.root / "c")
    embed(tree.root, tmp_path / "g", fakes, SOMETIMES)
    scanned.clear()
    embed(tree.root, tmp_path / "g", fakes, SOMETIMES)
    assert str(tree.root / "c") in scanned


def test_other_settings_look_at_every_file(tmp_path: Path, fakes: dict[str, Any], scanned: list[str]) -> None:
    tree = Tree(tmp_path / "in", 0)
    embed(tree.root, tmp_path / "g", fakes, SOMETIMES)
    scanned.clear()
    embed(tree.root, tmp_path / "g", fakes, SOMETIMES, {"source": {"identity": "folder"}})
    assert str(tree.root / "a") in scanned
    labels = Gallery(str(tmp_path / "g")).to_arrow(["identity"])["identity"].to_pylist()
    assert "a" in labels


def test_labels_are_those_of_all_folders(tmp_path: Path, fakes: dict[str, Any]) -> None:
    """Whether a folder is a person depends on the folders beside it, which are passed over."""
    root = tmp_path / "in"
    for name in ("Ann", "Ben", "Cleo"):
        (root / name).mkdir(parents=True)
        for n in range(2):
            cv2.imwrite(str(root / name / f"{n}.png"), draw(1 + n))
        os.utime(root / name, (1e9, 1e9))
    embed(root, tmp_path / "g", fakes, SOMETIMES)
    cv2.imwrite(str(root / "Ben" / "3.png"), draw(4))
    embed(root, tmp_path / "g", fakes, SOMETIMES)
    found = {Path(row["uri"]).parent.name: row["identity"] for row in rows(tmp_path / "g")}
    assert found == {"Ann": "Ann", "Ben": "Ben", "Cleo": "Cleo"}


@pytest.mark.parametrize("data", [b"", b"no parquet"])
def test_damaged_times_look_at_every_file(tmp_path: Path, fakes: dict[str, Any], data: bytes) -> None:
    tree = Tree(tmp_path / "in", 0)
    embed(tree.root, tmp_path / "g", fakes, SOMETIMES)
    (file,) = (tmp_path / "g" / "runs").glob("folders-*.parquet")
    assert b"years" not in file.read_bytes()
    file.write_bytes(data)
    tree.add(tree.root / "a")
    assert embed(tree.root, tmp_path / "g", fakes, SOMETIMES).images == 1
