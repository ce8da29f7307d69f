"""Make records as MS-Celeb-1M's are of a labelled gallery, with a share of wrong labels; and say what is left of these.

    python tests/bench/noisy_records.py make GALLERY PAIRS OUT [--flips 0.2]
    python tests/bench/noisy_records.py compare OUT CLEANED

`make` cuts the main face of each image to 112x112 by ArcFace's template and writes OUT/train.rec, train.idx, train.lst
and property. They hold the people of at least four images who are in no pair of the last fold of PAIRS (LFW's pairs.txt).
A share of the labels becomes another person's. OUT/lfw.bin holds the pairs of the last fold, as insightface's sets do,
and OUT/truth.csv the right label of each record. `compare` compares the records in CLEANED with those in OUT.
"""

import argparse
import csv
import hashlib
import pickle
import re
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.datasets.content import ImageContent
from facepipe.datasets.records import write_records
from facepipe.gallery import Gallery
from facepipe.imaging.alignment import ARCFACE_112
from facepipe.imaging.geometry import fit_similarity, warp_chip
from facepipe.schema import WORK_ITEM
from facepipe.sources import SourceConfig, open_source
from facepipe.stages import Read

_MIN_IMAGES = 4
_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]
Crops = dict[str, dict[int, bytes]]


def cut_crops(gallery: Gallery) -> Crops:
    """Cut the main face of each image, by person and number of the image."""
    crops: Crops = defaultdict(dict)
    table = gallery.to_arrow(["uri", "identity", "landmarks"], where="face_index = 0 and identity is not null")
    for row in table.sort_by("uri").to_pylist():
        pixels = cv2.imread(row["uri"])
        number = re.search(r"_(\d+)\.\w+$", row["uri"])
        assert pixels is not None, row["uri"]
        assert number is not None, row["uri"]
        matrix = fit_similarity(np.array(row["landmarks"]).reshape(5, 2), np.array(ARCFACE_112))
        encoded = cv2.imencode(".jpg", warp_chip(pixels, matrix, (112, 112)), _QUALITY)[1]
        crops[row["identity"]][int(number.group(1))] = bytes(encoded)
    return crops


def read_last_fold(path: Path) -> list[tuple[str, int, str, int]]:
    """Read the pairs of the last fold: name and number of both images."""
    head, *lines = path.read_text().splitlines()
    each = int(head.split()[1])
    pairs = []
    for line in lines[-2 * each :]:
        words = line.split("\t")
        # Three words are two images of one person.
        name, number, other_name, other_number = words if len(words) == 4 else [*words[:2], words[0], words[2]]
        pairs.append((name, int(number), other_name, int(other_number)))
    return pairs


def make(gallery: Path, pairs_file: Path, out: Path, flips: float, seed: int) -> None:
    """Write the records, the verification set and the truth."""
    out.mkdir(parents=True)
    crops = cut_crops(Gallery(str(gallery)))
    pairs = [pair for pair in read_last_fold(pairs_file) if pair[1] in crops[pair[0]] and pair[3] in crops[pair[2]]]
    # Pairs of one person and of two alternate, so that every fold has both.
    same = [pair for pair in pairs if pair[0] == pair[2]]
    different = [pair for pair in pairs if pair[0] != pair[2]]
    pairs = [pair for both in zip(same, different, strict=False) for pair in both]
    held = {name for pair in pairs for name in (pair[0], pair[2])}
    images = [crops[name][number] for pair in pairs for name, number in (pair[:2], pair[2:])]
    (out / "lfw.bin").write_bytes(pickle.dumps((images, [pair[0] == pair[2] for pair in pairs]), protocol=4))
    names = sorted(name for name, own in crops.items() if len(own) >= _MIN_IMAGES and name not in held)
    truth = [(name, data) for name in names for data in crops[name].values()]
    # The label of a share of the records becomes that of a random other person.
    random = np.random.default_rng(seed)
    given = np.array([names.index(name) for name, _ in truth])
    chosen = random.choice(len(truth), round(flips * len(truth)), replace=False)
    given[chosen] = (given[chosen] + random.integers(1, len(names), len(chosen))) % len(names)
    order = np.argsort(given, kind="stable")
    persons = np.unique(given[order], return_inverse=True)[1]
    contents = [
        ImageContent(f"{truth[row][0]}", truth[row][1], int(person), "", "")
        for row, person in zip(order, persons, strict=True)
    ]
    write_records(contents, str(out), "train")
    numbers = {names[row]: int(person) for row, person in zip(given[order], persons, strict=True)}
    with open(out / "truth.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "identity"])
        items = list(open_source(SourceConfig(str(out / "train.rec"))))
        for item, row in zip(items, order, strict=True):
            writer.writerow([item.uri, numbers[truth[row][0]]])
    print(f"{len(truth)} records of {len(numbers)} persons, {len(chosen)} with a wrong label; {len(pairs)} pairs")


def read_records(folder: Path) -> tuple[pa.Table, list[str]]:
    """Read the records of a folder, and their labels as the dataset that they are of called them."""
    items = list(open_source(SourceConfig(str(folder / "train.rec"))))
    table = Read()(pa.Table.from_pylist([{**item._asdict(), "previous": None} for item in items], WORK_ITEM))
    labels = [str(item.identity) for item in items]
    if (folder / "labels.csv").exists():
        with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
            names = {row["number"]: row["identity"] for row in csv.DictReader(file)}
        labels = [names[label] for label in labels]
    return table, labels


def compare(before: Path, after: Path) -> None:
    """Print how many labels are wrong before and after, and whether kept records have the same bytes."""
    with open(before / "truth.csv", newline="", encoding="utf-8") as file:
        right = {row["uri"]: row["identity"] for row in csv.DictReader(file)}
    table, labels = read_records(before)
    truth = {}
    for uri, data in zip(table["uri"].to_pylist(), table["bytes"].to_pylist(), strict=True):
        truth[hashlib.sha256(data).digest()] = right[uri]
    print(f"{'':8} {'records':>8} {'persons':>8} {'wrong labels':>13}")
    for name, folder in (("before", before), ("after", after)):
        table, labels = read_records(folder)
        found = [truth.get(hashlib.sha256(data).digest()) for data in table["bytes"].to_pylist()]
        wrong = sum(one != other for one, other in zip(found, labels, strict=True))
        share = wrong / len(labels)
        print(f"{name:8} {len(labels):8} {len(set(labels)):8} {wrong:6} ({share:.4f})")
        foreign = found.count(None)
    assert pc.all(pc.equal(table["status"], "ok")).as_py()
    print(f"records whose bytes are not those of the first set: {foreign}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    first = commands.add_parser("make")
    for name in ("gallery", "pairs", "out"):
        first.add_argument(name, type=Path)
    first.add_argument("--flips", type=float, default=0.2)
    first.add_argument("--seed", type=int, default=0)
    second = commands.add_parser("compare")
    for name in ("out", "cleaned"):
        second.add_argument(name, type=Path)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.gallery, arguments.pairs, arguments.out, arguments.flips, arguments.seed)
    else:
        compare(arguments.out, arguments.cleaned)


if __name__ == "__main__":
    main()
