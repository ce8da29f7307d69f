"""One small corpus in the layouts that people hold: the same images, the same labels, no errors."""

import base64
import gzip
import io
import json
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import write_records, write_verification_set

from facepipe.errors import SourceError
from facepipe.hashing import compute_image_id
from facepipe.schema import OK, WORK_ITEM
from facepipe.sources import SourceConfig, WorkItem, open_source
from facepipe.sources.relocate import ImageLocator
from facepipe.stages.read import Read

PERSONS = ("7", "12", "31", "104")
IMAGES = [
    (
        f"{person}/{n}.jpg",
        b"\xff\xd8\xff" + np.random.default_rng([int(person), n]).bytes(500 + 37 * n) + b"\xff\xd9",
        person,
    )
    for person in PERSONS
    for n in range(3)
]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": list(PERSONS), "_type": "ClassLabel"}}
HF_SCHEMA = pa.schema(
    [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
    metadata={b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()},
)


def make_hf_table() -> pa.Table:
    rows = [{"image": {"bytes": data, "path": name}, "label": PERSONS.index(label)} for name, data, label in IMAGES]
    return pa.Table.from_pylist(rows, HF_SCHEMA)


def write_folder(root: Path) -> Path:
    for name, data, _ in IMAGES:
        (root / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "faces" / name).write_bytes(data)
    return root / "faces"


def write_tree(root: Path, place: Callable[[str], str]) -> Path:
    """A tree of folders in folders; `place` says where a person's folder lies."""
    for name, data, label in IMAGES:
        path = root / "tree" / place(label) / os.path.basename(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "tree"


def write_list(root: Path, name: str, line: Callable[[int, str, str], str], header: str = "") -> Path:
    write_folder(root)
    text = header + "".join(f"{line(n, f'faces/{image}', label)}\n" for n, (image, _, label) in enumerate(IMAGES))
    (root / name).write_text(text)
    return root / name


def write_tar(root: Path, describe: Callable[[str], tuple[str, bytes]] | None) -> Path:
    with tarfile.open(root / "faces.tar", "w") as archive:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for n, (name, data, label) in enumerate(IMAGES):
            add(f"{n:05}.jpg" if describe else name, data)
            if describe:
                ending, text = describe(label)
                add(f"{n:05}.{ending}", text)
    return root / "faces.tar"


def write_packed_tar(root: Path, ending: str, describe: Callable[[str], tuple[str, bytes]] | None) -> Path:
    tar = write_tar(root, describe)
    (root / f"faces.{ending}").write_bytes(gzip.compress(tar.read_bytes()))
    tar.unlink()
    return root / f"faces.{ending}"


def write_lmdb(root: Path, *, labels: bool) -> Path:
    """Keys as paths, or pairs of `image-N` and `label-N`; and what others keep beside them."""
    lmdb = pytest.importorskip("lmdb")
    (root / "set").mkdir()
    with lmdb.open(str(root / "set"), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        transaction.put(b"__len__", b"12")
        for n, (name, data, label) in enumerate(IMAGES):
            transaction.put(f"image-{n:09}".encode() if labels else name.encode(), data)
            if labels:
                transaction.put(f"label-{n:09}".encode(), label.encode())
    return root / "set"


def write_zip(root: Path, method: int) -> Path:
    with zipfile.ZipFile(root / "faces.zip", "w", method) as archive:
        for name, data, _ in IMAGES:
            archive.writestr(name, data)
    return root / "faces.zip"


def write_records_folder(root: Path, *, index: bool) -> Path:
    """A folder as insightface's: the training set, its list, and verification sets that are no part of it."""
    folder = root / "faces_emore"
    folder.mkdir()
    write_records(folder / "train.rec", [(data, int(label)) for _, data, label in IMAGES], index=index)
    (folder / "property").write_text("4,112,112")
    (folder / "train.lst").write_text("1\tfaces/a.jpg\t7\n")
    write_verification_set(folder / "lfw.bin", [b"\xff\xd8other", b"\xff\xd8another"], [True])
    return folder


def write_parquet(root: Path, table: pa.Table) -> Path:
    pq.write_table(table, root / "faces.parquet", row_group_size=5)
    return root / "faces.parquet"


def make_plain_table(*columns: str) -> pa.Table:
    write = {
        "uri": [f"faces/{name}" for name, _, _ in IMAGES],
        "bytes": [data for _, data, _ in IMAGES],
        "identity": [label for _, _, label in IMAGES],
    }
    return pa.table({name: write[name] for name in columns})


def write_uris(root: Path) -> Path:
    write_folder(root)
    return write_parquet(root, make_plain_table("uri", "identity"))


def write_partitions(root: Path) -> Path:
    for person in PERSONS:
        folder = root / "set" / f"identity={person}"
        folder.mkdir(parents=True)
        rows = [data for _, data, label in IMAGES if label == person]
        pq.write_table(pa.table({"bytes": rows}), folder / "part-0.parquet")
    return root / "set"


def write_arrow(path: Path, *, stream: bool = True) -> Path:
    """As `datasets.Dataset.save_to_disk` writes it: a stream of uncompressed batches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), HF_SCHEMA) as writer:
        writer.write_table(make_hf_table(), max_chunksize=5)
    return path


def write_saved_dataset(root: Path, split: str = "") -> Path:
    folder = root / "saved" / split
    write_arrow(folder / "data-00000-of-00001.arrow")
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    if split:
        (root / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    return root / "saved"


def write_clone(root: Path) -> Path:
    folder = root / "clone"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    pq.write_table(make_hf_table(), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def write_set(root: Path) -> Path:
    write_verification_set(root / "lfw.bin", [data for _, data, _ in IMAGES], [True] * 6, 4)
    return root / "lfw.bin"


def write_json_lines(root: Path) -> Path:
    """As the metadata.jsonl of an image folder: the images lie beside it."""
    folder = write_folder(root)
    lines = [json.dumps({"text": "a face", "label": int(label), "file_name": name}) for name, _, label in IMAGES]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "metadata.jsonl"


def write_metadata_csv(root: Path) -> Path:
    folder = write_folder(root)
    rows = "".join(f"{name},{label}\n" for name, _, label in IMAGES)
    (folder / "metadata.csv").write_text(f"file_name,label\n{rows}")
    return folder / "metadata.csv"


def write_base64_table(root: Path) -> Path:
    """As MS-Celeb-1M."""
    with (root / "faces.tsv").open("wb") as file:
        for n, (_, data, label) in enumerate(IMAGES):
            fields = [
                label,
                str(n),
                "http://a/b.jpg",
                "http://a",
                f"FaceId-{n}",
                "AAAAAA==",
                base64.b64encode(data).decode(),
            ]
            file.write("\t".join(fields).encode() + (b"\r\n" if n % 2 else b"\n"))
    return root / "faces.tsv"


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "a folder per person": write_folder,
    "tree of VGGFace2": lambda root: write_tree(
        root, lambda person: f"{'train' if int(person) % 2 else 'test'}/{person}"
    ),
    "tree of WebFace42M": lambda root: write_tree(root, lambda person: f"{int(person) % 2}/{person}"),
    "tree of BUPT": lambda root: write_tree(root, lambda person: f"{['African', 'Asian'][int(person) % 2]}/{person}"),
    "tree of DigiFace": lambda root: write_tree(root, lambda person: f"subjects_0-1999_72_imgs/{person}"),
    "list: path label": lambda root: write_list(root, "faces.txt", lambda n, path, label: f"{path} {label}"),
    "list: csv": lambda root: write_list(
        root, "faces.csv", lambda n, path, label: f"{path},{label}", "path,identity\n"
    ),
    "list of insightface": lambda root: write_list(root, "faces.lst", lambda n, path, label: f"1\t{path}\t{label}"),
    "list of MXNet": lambda root: write_list(root, "faces.lst", lambda n, path, label: f"{n}\t{label}.0\t{path}"),
    "tar: folders": lambda root: write_tar(root, None),
    "tar: .cls": lambda root: write_tar(root, lambda label: ("cls", label.encode())),
    "tar: .json": lambda root: write_tar(root, lambda label: ("json", json.dumps({"identity": label}).encode())),
    "tar.gz: folders": lambda root: write_packed_tar(root, "tar.gz", None),
    "tar.gz: .cls": lambda root: write_packed_tar(root, "tar.gz", lambda label: ("cls", label.encode())),
    "tgz: .json": lambda root: write_packed_tar(
        root, "tgz", lambda label: ("json", json.dumps({"identity": label}).encode())
    ),
    "LMDB: paths": lambda root: write_lmdb(root, labels=False),
    "LMDB: labels": lambda root: write_lmdb(root, labels=True),
    "zip: stored": lambda root: write_zip(root, zipfile.ZIP_STORED),
    "zip: deflated": lambda root: write_zip(root, zipfile.ZIP_DEFLATED),
    ".rec with .idx": lambda root: write_records_folder(root, index=True) / "train.rec",
    ".rec alone": lambda root: write_records_folder(root, index=False) / "train.rec",
    "folder of insightface": lambda root: write_records_folder(root, index=True),
    "Parquet: bytes": lambda root: write_parquet(root, make_plain_table("bytes", "identity")),
    "Parquet: paths": write_uris,
    "Parquet: Hugging Face": lambda root: write_parquet(root, make_hf_table()),
    "Parquet: partitions": write_partitions,
    "clone from Hugging Face": write_clone,
    "save_to_disk": write_saved_dataset,
    "save_to_disk of splits": lambda root: write_saved_dataset(root, "train"),
    "Arrow file": lambda root: write_arrow(root / "faces.arrow", stream=False),
    "imagefolder: metadata.jsonl": write_json_lines,
    "imagefolder: metadata.csv": write_metadata_csv,
    "MS-Celeb-1M": write_base64_table,
    ".bin": write_set,
}


def list_and_read(path: Path) -> tuple[list[WorkItem], list[tuple[str | None, str | None]]]:
    """List a source, and read every item: (image id, label) in the order of the listing."""
    items = list(open_source(SourceConfig(str(path))))
    columns = list(zip(*items, strict=True))
    table = pa.table(
        {
            name: pa.array(column, WORK_ITEM.field(name).type)
            for name, column in zip(WorkItem._fields, columns, strict=True)
        }
    )
    table = table.append_column("previous", pa.nulls(len(items), pa.uint64()))
    read = Read()(table)
    assert read["status"].to_pylist() == [OK] * len(items), read["error"].to_pylist()
    labels = [None if item.identity is None else str(item.identity) for item in items]
    return items, list(zip(read["image_id"].to_pylist(), labels, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_and_labels(tmp_path: Path, layout: str) -> None:
    path = LAYOUTS[layout](tmp_path)
    items, found = list_and_read(path)
    has_labels = layout != ".bin"
    expected = {(compute_image_id(data), label if has_labels else None) for _, data, label in IMAGES}
    assert len(found) == len(expected)
    assert set(found) == expected
    # Uris are names, and the same in every listing.
    assert len({item.uri for item in items}) == len(items)
    assert all(len(item.uri) < 300 + len(os.fspath(tmp_path)) for item in items)
    assert [item.uri for item in open_source(SourceConfig(str(path)))] == [item.uri for item in items]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_is_found_again_by_its_uri(tmp_path: Path, layout: str) -> None:
    """As a review page and a retry of one image do."""
    items, _ = list_and_read(LAYOUTS[layout](tmp_path))
    locator = ImageLocator()
    for item in items:
        found = locator.locate_image(item.uri, item.fingerprint)
        assert (found.path, found.offset, found.length, found.listing_error) == (
            item.path,
            item.offset,
            item.length,
            None,
        )


@pytest.mark.parametrize(
    "layout",
    [name for name in LAYOUTS if "list" not in name and "imagefolder" not in name and name != "Parquet: paths"],
)
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_a_list_of_uris_gives_the_images_with_its_own_labels(tmp_path: Path, layout: str, absolute: bool) -> None:
    """As the lists that `finish` and `clean` write: from any layout, with other labels, some images left out."""
    items, found = list_and_read(LAYOUTS[layout](tmp_path))
    chosen = [n for n in range(len(items)) if n % 4]
    rows = []
    for n in chosen:
        name = items[n].uri if absolute else os.path.relpath(items[n].uri, tmp_path)
        rows.append(f"{name},new {n % 5}\n")
    (tmp_path / "train.csv").write_text("path,identity\n" + "".join(rows))
    listed, read = list_and_read(tmp_path / "train.csv")
    assert sorted(read) == sorted((found[n][0], f"new {n % 5}") for n in chosen)
    assert {item.uri for item in listed} == {items[n].uri for n in chosen}


def test_members_that_are_not_there_are_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path, None)
    (tmp_path / "list.csv").write_text(
        f"path,identity\n{path}#7/1.jpg,ann\n{path}#7/1.jpg,bob\n{path}#gone.jpg,ann\n../out.tar#1.jpg,ann\nno.zip#1.jpg,ann\n"
    )
    items = list(open_source(SourceConfig(str(tmp_path / "list.csv"))))
    assert [item.identity for item in items if item.listing_error is None] == ["ann"]
    errors = " | ".join(str(item.listing_error) for item in items if item.listing_error)
    assert "1 images that the list names are not in it" in errors
    assert "outside of the root" in errors
    assert sum(item.listing_error is not None for item in items) == 4


def test_a_file_whose_name_looks_like_a_member_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar#1.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "list.txt").write_text("a.tar#1.jpg 7\n")
    (item,) = open_source(SourceConfig(str(tmp_path / "list.txt")))
    assert (os.fsdecode(item.path), item.identity) == (str(tmp_path / "a.tar#1.jpg"), "7")


def damage(path: Path, kind: str, rng: random.Random, others: list[Path]) -> None:
    """Damage a file as disks, networks and people do."""
    data = path.read_bytes()
    match kind:
        case "truncated":
            path.write_bytes(data[: rng.randrange(len(data) + 1)])
        case "flipped":
            changed = bytearray(data)
            for _ in range(rng.randint(1, 6)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            path.write_bytes(changed)
        case "shuffled":
            cuts = sorted(rng.randrange(len(data) + 1) for _ in range(3))
            parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
            rng.shuffle(parts)
            path.write_bytes(b"".join(parts))
        case "foreign":
            path.write_bytes(rng.choice(others).read_bytes())
        case "noise":
            path.write_bytes(rng.randbytes(rng.choice([0, 1, 100, 5000])))
        case "pointer":  # what a clone holds without its large files
            path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {len(data)}\n")
        case "gone":
            path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "shuffled", "foreign", "noise", "pointer", "gone"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_layout_ends_in_rows_or_a_message(tmp_path: Path, layout: str, kind: str) -> None:
    """Nothing else is raised, no row is named by an image, and what is read of undamaged images is what they are."""
    contents = {compute_image_id(data) for _, data, _ in IMAGES}
    for seed in range(3):
        rng = random.Random(f"{layout} {kind} {seed}")
        (tmp_path / str(seed)).mkdir()
        path = LAYOUTS[layout](tmp_path / str(seed))
        root = path if path.is_dir() else path.parent
        files = sorted(file for file in root.rglob("*") if file.is_file())
        damage(rng.choice(files), kind, rng, files)
        try:
            items = list(open_source(SourceConfig(str(path))))
        except SourceError as error:
            message = str(error)
            assert str(root) in message, message
            continue
        assert len({item.uri for item in items}) == len(items)
        if not items:
            continue
        for item in items:
            # A line of noise in a list may be a long name.
            assert kind == "noise" or len(item.uri) < 400 + len(str(tmp_path)), item.uri
            assert item.listing_error is None or len(item.listing_error) < 400
        columns = zip(WorkItem._fields, zip(*items, strict=True), strict=True)
        table = pa.table({name: pa.array(column, WORK_ITEM.field(name).type) for name, column in columns})
        read = Read()(table.append_column("previous", pa.nulls(len(items), pa.uint64())))
        assert read.num_rows == len(items)
        if kind in ("gone", "pointer", "foreign"):
            # One file is not what it was, and images in others are whole.
            found = [image for image in read["image_id"].to_pylist() if image is not None]
            assert len(files) == 1 or len(set(found) - contents) <= 1
