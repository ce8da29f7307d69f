"""Names of any language, and names that are not UTF-8: from folders and files through every command and back."""

import csv
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import embed, run_facepipe

from facepipe.config import build
from facepipe.erasure import receipt
from facepipe.erasure.proof import check_erased
from facepipe.erasure.selection import Selection
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.search import Index
from facepipe.index.verify import verify_index
from facepipe.reports.html import iterate_groups
from facepipe.sources.item import make_file_uri
from facepipe.sources.labels import format_label
from facepipe.text import restore_cell
from pipelines import clean, dedup, erase, index, search
from pipelines.clean import CleanConfig
from pipelines.dedup import DedupConfig
from pipelines.index import IndexConfig
from pipelines.search import SearchConfig

# Folder names that are one person each, as bytes.
PEOPLE = [
    *("\U00020bb7\u7530", "\U0001f600 \U0001f3f4\U000e0067", "\U0010fffd", "Jos\u00e9", "\u202eright to left"),
    *("\u0645\u062d\u0645\u062f \u0639\u0644\u064a", "O'Brien", '"quoted"', "back\\slash", "line\nbreak", "\x01\x1fa"),
    *("a\u2028b", "%20", "a#b?c", "*[a]", "=1+1", "-1", "@x", "comma, semicolon; tab\t", "<script>alert(1)"),
]
UNDECODABLE = [b"Jos\xe9", b"Jos\xe8", b"\xff\xfe"]
FACES = 3


def put_faces(folder: bytes, number: int, name: bytes) -> list[bytes]:
    """Write some pictures of a drawn face; the red rectangle is what the fake detector takes for one."""
    os.makedirs(folder)
    paths = []
    for n in range(FACES):
        rng = np.random.default_rng([number, n])
        image = np.full((96, 96, 3), 40 + number, np.uint8)
        image[20:65, 18:59] = (30, 30, 230)
        image[30:60, 22:55, :2] = rng.integers(0, 70, (30, 33, 2))
        path = os.path.join(folder, b"%d %s.png" % (n, name))
        with open(path, "wb") as file:
            file.write(cv2.imencode(".png", image)[1].tobytes())
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The root of the images, and the label of each by its uri."""
    root = tmp_path_factory.mktemp("text")
    labels = {}
    people = [*map(os.fsencode, PEOPLE), *UNDECODABLE]
    for number, person in enumerate(people):
        for path in put_faces(os.path.join(os.fsencode(root / "images"), person), number, person[:60]):
            labels[make_file_uri(path)] = format_label(os.fsdecode(person)) or ""
    # The same person again from a Mac, whose names are decomposed.
    folder = os.path.join(os.fsencode(root / "images"), unicodedata.normalize("NFD", "Jos\u00e9").encode())
    for path in put_faces(folder, len(people), b"mac"):
        labels[make_file_uri(path)] = "Jos\u00e9"
    return root, labels


@pytest.fixture(scope="module")
def gallery(corpus: tuple[Path, dict[str, str]]) -> str:
    root, labels = corpus
    fakes = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}}
    blocks = {"runner": "inline", "block_smallest": 4, "block_largest": 8}
    path = str(root / "g")
    assert embed(root / "images", path, fakes, **blocks).faces == len(labels)
    again = embed(root / "images", path, fakes, **blocks)
    assert (again.images, again.skipped) == (0, len(labels))
    index.run(IndexConfig(), path)
    return path


def test_every_image_has_the_label_of_its_folder(corpus: tuple[Path, dict[str, str]], gallery: str) -> None:
    _, labels = corpus
    table = Gallery(gallery).to_arrow(["uri", "identity"]).to_pylist()
    assert {row["uri"]: row["identity"] for row in table} == labels
    assert len(set(labels.values())) == len(PEOPLE) + len(UNDECODABLE)
    assert not verify_gallery(Gallery(gallery)).problems
    assert not verify_index(Gallery(gallery))


@pytest.mark.parametrize("person", [*PEOPLE, *map(os.fsdecode, UNDECODABLE)])
def test_a_person_is_found_by_name(person: str, corpus: tuple[Path, dict[str, str]], gallery: str) -> None:
    _, labels = corpus
    uris = {uri for uri, label in labels.items() if label == format_label(person)}
    text = person.replace("\\", "\\\\").replace("'", "''")
    assert set(Gallery(gallery).to_arrow(["uri"], f"identity = '{text}'")["uri"].to_pylist()) == uris
    # The command line gives names that are not UTF-8 as Python does.
    out = run_facepipe("erase", gallery, "--identity", person, "--dry-run", "--json")
    assert (out[0], json.loads(out[1])["images"]) == (0, len(uris)), out[2]


def test_an_image_is_found_by_its_path(corpus: tuple[Path, dict[str, str]], gallery: str) -> None:
    root, labels = corpus
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(root / "images") for name in names]
    assert sorted(map(make_file_uri, paths)) == sorted(labels)
    for path in paths[::7]:
        found = erase.run(Selection(images=(path,)), gallery, dry_run=True)
        assert found.images == 1, path


def test_answers_name_the_same_images(corpus: tuple[Path, dict[str, str]], gallery: str) -> None:
    root, labels = corpus
    config = build(SearchConfig, {"run": {"runner": "inline"}, "search": {"k": 1, "leave_self_out": False}})
    search.run(config, gallery, gallery, str(root / "out.parquet"))
    answers = pq.read_table(root / "out.parquet").to_pylist()
    assert {row["query_uri"] for row in answers} == set(labels)
    assert all(row["identity"] == labels[row["uri"]] and row["uri"] == row["query_uri"] for row in answers)
    found = Index(gallery).get_labels(Gallery(gallery).vectors()[0])
    assert dict(zip(found["uri"].to_pylist(), found["identity"].to_pylist(), strict=True)) == labels


def test_reports_and_erasure_reach_everybody(corpus: tuple[Path, dict[str, str]], gallery: str) -> None:
    _, labels = corpus
    near = {"graph": {"threshold": 0.3}}
    clean.run(build(CleanConfig, near), gallery)
    dedup.run(build(DedupConfig, near), gallery)
    reports = Path(gallery, "reports")
    decisions = pq.read_table(reports / "clean" / "decisions.parquet").to_pylist()
    assert {row["uri"]: row["identity"] for row in decisions} == labels
    with open(reports / "clean" / "labels.csv", newline="", encoding="utf-8") as file:
        names = [restore_cell(row["identity"]) for row in csv.DictReader(file)]
    kept = {row["identity"] for row in decisions if row["decision"] == "keep"}
    assert Counter(names) == Counter(kept)
    listed = pq.read_table(reports / "dedup" / "decisions.parquet")["uri"].to_pylist()
    assert set(listed) <= set(labels)
    for page in reports.glob("*/report.html"):
        assert {face["uri"] for group in iterate_groups(str(page)) for face in group["faces"]} <= set(labels)
    # Every second person goes, and nothing of them is left anywhere.
    gone = sorted(set(labels.values()))[::2]
    summary = erase.run(Selection(identities=tuple(gone)), gallery)
    assert summary.images == sum(label in gone for label in labels.values())
    for path in summary.receipts:
        assert not check_erased(Gallery(gallery), receipt.load_receipt(path))
    left = {row["uri"]: row["identity"] for row in Gallery(gallery).to_arrow(["uri", "identity"]).to_pylist()}
    assert left == {uri: label for uri, label in labels.items() if label not in gone}
    mentioned = [uri for uri, label in labels.items() if label in gone]
    for path in [*reports.rglob("*.csv"), *reports.rglob("*.txt")]:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        assert not any(line.startswith(uri) for uri in mentioned if "\n" not in uri for line in lines), path


def test_commands_print_every_name(corpus: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """A source and a gallery that cannot be read are named in an error, not in a traceback."""
    for name in ("\udcff", "\U0001f600", "\u202e", "line\nbreak"):
        code, _, err = run_facepipe("embed", tmp_path / name, tmp_path / "g")
        assert (code, "no such file" in err) == (1, True), err
        assert run_facepipe("info", tmp_path / name)[0] == 1
