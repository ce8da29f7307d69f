"""Every source lists the same images; nothing is lost, whatever the names and files are like."""

import base64
import csv
import errno
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import fail_to_list

from facepipe.errors import SourceError, StorageError
from facepipe.sources import SourceConfig, WorkItem, open_source
from facepipe.sources.glob import translate_glob
from facepipe.sources.identity import take_filename_prefix, take_folder_name
from facepipe.sources.parquet import list_parquet_files


def items(uri: str | Path, **config: object) -> list[WorkItem]:
    return list(open_source(SourceConfig(uri=str(uri), **config)))  # type: ignore[arg-type]


def labels(found: list[WorkItem]) -> dict[str, str | None]:
    return {item.uri.replace("#", "/").rpartition("/")[2]: item.identity for item in found}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two people, a flat file, text, hidden files, an upper-case extension."""
    for name in (
        "Ann/Ann_1.jpg",
        "Ann/Ann_2.JPG",
        "Bo_B/Bo_B_1.png",
        "flat_1.webp",
        "Ann/notes.txt",
        ".hidden.jpg",
        "Bo_B/._x.jpg",
    ):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "tree"


def test_folder(tree: Path) -> None:
    source = open_source(SourceConfig(str(tree)))
    found = list(source)
    assert labels(found) == {"Ann_1.jpg": "Ann", "Ann_2.JPG": "Ann", "Bo_B_1.png": "Bo_B", "flat_1.webp": None}
    assert source.ignored == 3
    assert source.name == "tree"
    assert all(os.path.isabs(item.path) and item.fingerprint for item in found)
    assert found == list(source), "a listing can be repeated, in the same order"


def test_identity_rules(tree: Path) -> None:
    assert labels(items(tree, identity="filename"))["Bo_B_1.png"] == "Bo_B"
    assert labels(items(tree, identity="folder")) == {
        "Ann_1.jpg": "Ann",
        "Ann_2.JPG": "Ann",
        "Bo_B_1.png": "Bo_B",
        "flat_1.webp": None,
    }
    assert set(labels(items(tree, identity="none")).values()) == {None}
    assert take_filename_prefix("x/obama_1.jpg") == "obama"
    assert take_filename_prefix("x/obama.jpg") is None
    assert take_folder_name("a/b/c.jpg") == "b"


def test_glob(tree: Path) -> None:
    assert labels(items(f"{tree}/*/*.jpg")) == {"Ann_1.jpg": "Ann"}
    assert len(items(f"{tree}/**/*.*")) == 4
    assert labels(items(tree / "Ann" / "Ann_1.jpg")) == {"Ann_1.jpg": None}
    assert len(items(f"{tree}/A[!x]n/*.[jJ]*")) == 2
    assert items(f"{tree}/none*.jpg") == []


@pytest.mark.parametrize(
    ("pattern", "matches", "does_not"),
    [
        ("*.jpg", "a.jpg", "b/a.jpg"),
        ("**/*.jpg", "a.jpg", "a.png"),
        ("**/*.jpg", "x/y/a.jpg", "a.jpgx"),
        ("a?.t*", "ab.tar", "a/.tar"),
    ],
)
def test_glob_patterns(pattern: str, matches: str, does_not: str) -> None:
    import re

    assert re.fullmatch(translate_glob(pattern), matches)
    assert not re.fullmatch(translate_glob(pattern), does_not)


def test_odd_names_and_loops(tmp_path: Path) -> None:
    root = tmp_path / "odd"
    (root / "folder.jpg").mkdir(parents=True)
    (root / "folder.jpg" / "in.jpg").write_bytes(b"x")
    (root / "new\nline.jpg").write_bytes(b"x")
    with open(os.fsencode(root) + b"/bytes\xff.jpg", "wb") as file:
        file.write(b"x")
    (root / "bytes%FF.jpg").write_bytes(b"x")
    (root / "loop").symlink_to(root)
    (root / "dangling.jpg").symlink_to(root / "nowhere")
    (root / "self.jpg").symlink_to(root / "self.jpg")
    found = items(root)
    assert len(found) == len({item.uri for item in found}) == 7 - 1
    assert [item.uri.encode("utf-8") for item in found]
    assert any(item.uri.startswith("file:///") and item.uri.endswith("bytes%FF.jpg") for item in found)


def test_unreadable_folder_is_an_item(tmp_path: Path) -> None:
    source = open_source(SourceConfig(str(tmp_path)))
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "z").mkdir()
    listing = iter(source)
    assert next(listing).uri.endswith("a.jpg")
    (tmp_path / "z").rmdir()  # gone between listing and entering, as on a busy share
    (gone,) = list(listing)
    assert gone.listing_error == "folder cannot be read: no such file or directory"


def write_tar(path: Path, members: dict[str, bytes], repeat: str | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in [*members.items(), *([(repeat, b"other")] if repeat else [])]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tar(tmp_path: Path) -> None:
    members = {
        "000.jpg": b"one",
        "000.cls": b"7",
        "001.png": b"two!",
        "001.json": json.dumps({"label": "Ann"}).encode(),
        "002.txt": b"-",
    }
    path = write_tar(tmp_path / "shard-0.tar", members, repeat="000.jpg")
    found = items(path)
    assert [(item.identity, item.length) for item in found] == [("7", 3), ("Ann", 4), (None, 5)]
    assert found[0].uri == f"{path}#000.jpg"
    assert found[2].uri.startswith(f"{path}#000.jpg@"), "a member of the same name is another image"
    data = path.read_bytes()
    assert [data[i.offset : i.offset + i.length] for i in found] == [b"one", b"two!", b"other"]  # type: ignore[operator,misc]
    assert len(items(tmp_path)) == 3, "shards in a folder"
    assert len(items(tmp_path / "shard-*.tar")) == 3


def test_tar_that_ends_early(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {f"{n}.jpg": bytes(2000) for n in range(5)})
    path.write_bytes(path.read_bytes()[:6000])
    found = items(path)
    assert [item.listing_error is None for item in found][:3] == [True, True, True]
    (tmp_path / "t.tar").write_bytes(b"not a tar at all" * 100)
    (only,) = items(tmp_path / "t.tar")
    assert only.listing_error is not None
    assert "tar cannot be read" in only.listing_error


def test_tar_with_a_damaged_header_says_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {f"./{'PQ'[n % 2]}/{n}.jpg": bytes([n + 1]) * 600 for n in range(6)})
    whole = path.read_bytes()
    assert [item.identity for item in items(path)] == ["P", "Q"] * 3
    header = 3 * (512 + 1024)
    damage = {
        "flipped": whole[: header + 10] + b"\xaa" + whole[header + 11 :],
        "cut in a header": whole[: header + 100],
        "cut between members": whole[:header],
        "two in one": whole + whole,
    }
    for name, data in damage.items():
        path.write_bytes(data)
        found = items(path)
        assert [item.listing_error is None for item in found][:3] == [True] * 3, name
        assert "tar cannot be read" in (found[-1].listing_error or ""), name


def test_parquet_rows_of_one_name_are_different_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"bytes": [b"a", b"b"], "path": ["1.jpg", "1.jpg"]}), tmp_path / "t.parquet")
    assert len({item.uri for item in items(tmp_path / "t.parquet")}) == 2
    pq.write_table(pa.table({"image": ["x/1.jpg"], "label": [3]}), tmp_path / "u.parquet")
    (named,) = items(tmp_path / "u.parquet")
    assert (named.offset, named.path) == (None, os.fsencode(tmp_path / "x/1.jpg"))


def test_parquet(tmp_path: Path, tree: Path) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    pq.write_table(pa.table({"bytes": [b"a", b"b"], "identity": ["x", None]}), folder / "a.parquet")
    pq.write_table(pa.table({"bytes": [b"c"], "identity": ["y"]}), folder / "b.parquet")
    found = items(folder)
    assert [(item.offset, item.identity) for item in found] == [(0, "x"), (1, None), (0, "y")]
    pq.write_table(pa.table({"uri": ["Ann/Ann_1.jpg", None, "gone.jpg"], "label": [1, 2, 3]}), tree / "list.parquet")
    found = items(tree / "list.parquet")
    assert found[0].path == os.fsencode(tree / "Ann/Ann_1.jpg")
    assert [item.identity for item in found] == ["1", "2", "3"]
    assert found[1].listing_error == "the row names no image"
    pq.write_table(pa.table({"x": [1]}), tree / "no.parquet")
    with pytest.raises(SourceError, match="neither a uri column"):
        items(tree / "no.parquet")
    (tree / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert items(tree / "bad.parquet")[0].listing_error is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ann/Ann_1.jpg 0\nBo_B/Bo_B_1.png 1\n", {"Ann_1.jpg": "0", "Bo_B_1.png": "1"}),  # CASIA-WebFace-112X96.txt
        ("000001.jpg 2880\n000002.jpg 2937\n", {"000001.jpg": "2880", "000002.jpg": "2937"}),  # identity_CelebA.txt
        (
            "m.0107_f/5-FaceId-0.jpg 0\nm.0107_f/7-FaceId-0.jpg 0\n",
            {"5-FaceId-0.jpg": "0", "7-FaceId-0.jpg": "0"},
        ),  # MS-Celeb
        ("a b/c d.jpg\te f\nx.jpg\ty\n", {"c d.jpg": "e f", "x.jpg": "y"}),
        ("with space.jpg\nother one.jpg\n", {"with space.jpg": None, "other one.jpg": None}),
        ('file,identity\n"a,1.jpg",Ann\nb.jpg,\n', {"a,1.jpg": "Ann", "b.jpg": None}),
        ("\ufeffidentity\tpath\nAnn\tx\\y.jpg\n", {"y.jpg": "Ann"}),
        ("one file.jpg 3\nanother file.jpg 4\n", {"one file.jpg": "3", "another file.jpg": "4"}),
        ("IMG 0001.jpg\nIMG 0002.jpg\n", {"IMG 0001.jpg": None, "IMG 0002.jpg": None}),
        ("3\na.jpg 0\nb.jpg 1\nc.jpg 2\n", {"a.jpg": "0", "b.jpg": "1", "c.jpg": "2"}),
        ("2\nimage_id identity\na.jpg 0\nb.jpg 1\n", {"a.jpg": "0", "b.jpg": "1"}),
        ('a.jpg,"Smith, John"\nb.jpg,Ann\n', {"a.jpg": "Smith, John", "b.jpg": "Ann"}),
        ("Smith,J/1.jpg 0\nSmith,J/2.jpg 0\n", {"1.jpg": "0", "2.jpg": "0"}),
        ("a, b.jpg\nc, d.jpg\n", {"a, b.jpg": None, "c, d.jpg": None}),
        ('a.jpg\t5"\nb.jpg\tx\nc.jpg\ty\n', {"a.jpg": '5"', "b.jpg": "x", "c.jpg": "y"}),
        ("\n\npath,identity\na.jpg,Ann\n", {"a.jpg": "Ann"}),
        ("./Ann/a.jpg\n./Bo/b.jpg\n./c.jpg\n", {"a.jpg": "Ann", "b.jpg": "Bo", "c.jpg": None}),  # find . -name '*.jpg'
    ],
)
def test_lists(text: str, expected: dict[str, str | None], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    assert labels(items(tmp_path / "list.txt")) == expected


def test_list_of_absent_files_and_empty_lines(tree: Path) -> None:
    (tree / "list.csv").write_text("path,identity\nAnn/Ann_1.jpg,Ann\n\ngone.jpg,Bo\n,nobody\n")
    found = items(tree / "list.csv")
    assert [item.fingerprint is not None for item in found] == [True, False, False]
    assert found[2].listing_error == "the line names no image"
    assert items(tree / "list.csv", root="/elsewhere")[0].path == b"/elsewhere/Ann/Ann_1.jpg"
    (tree / "empty.txt").write_text("\n\n")
    with pytest.raises(SourceError, match="is empty"):
        items(tree / "empty.txt")


@pytest.mark.parametrize("uri", ["", "/no/such/folder", "missing.txt", "missing.parquet"])
def test_what_is_not_there_is_an_error(uri: str) -> None:
    with pytest.raises(SourceError):
        items(uri)


def test_what_cannot_be_a_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.docx").write_bytes(b"x")
    with pytest.raises(SourceError, match="unsupported source"):
        items(tmp_path / "x.docx")


def test_listing_streams(tmp_path: Path) -> None:
    """The first item of a long list comes without reading its end."""
    with open(tmp_path / "long.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "identity"])
        writer.writerows((f"{n}.jpg", n) for n in range(100_000))
    listing: Iterator[WorkItem] = iter(open_source(SourceConfig(str(tmp_path / "long.csv"))))
    assert next(listing).identity == "0"


def test_lists_do_not_lead_out_of_their_root(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root, other):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"x")
    (root / "out").symlink_to(other)
    (root / "in.jpg").symlink_to(root / "a.jpg")
    names = [
        "a.jpg",
        "x/../a.jpg",
        "in.jpg",
        "../other/a.jpg",
        "x/../../other/a.jpg",
        "out/a.jpg",
        str(other / "a.jpg"),
    ]
    names += [str(root / "a.jpg"), "s3://bucket/a.jpg", f"file://{other}/a.jpg", f"{root}er/a.jpg"]
    (root / "list.txt").write_text("".join(f"{name} 1\n" for name in names))

    def outside(**config: object) -> list[str]:
        found = items(root / "list.txt", **config)
        assert all(item.identity == "1" for item in found)
        assert {item.listing_error for item in found} == {None, f"outside of the root {root}"}
        return [name for name, item in zip(names, found, strict=True) if item.listing_error]

    assert outside() == ["../other/a.jpg", "x/../../other/a.jpg"], "absolute paths are what many lists are made of"
    assert outside(root=str(root)) == [*names[3:7], *names[8:]]
    (tmp_path / "link").symlink_to(root)
    assert items(root / "list.txt", root=str(tmp_path / "link"))[0].listing_error is None, "the root may be a link"
    assert items(root / "list.txt")[1].path == os.fsencode(root / "a.jpg"), "what is opened is what the uri says"


def test_lists_of_urls_do_not_lead_out_of_their_prefix(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(
        "a/b.jpg 1\n../c.jpg 2\ns3://bucket/data/d.jpg 3\ns3://other/e.jpg 4\n/f.jpg 5\n"
    )
    found = items(tmp_path / "list.txt", root="s3://bucket/data")
    assert [item.listing_error is None for item in found] == [True, False, True, False, False]
    assert found[0].uri == "s3://bucket/data/a/b.jpg"


def test_a_list_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"file:///x/\xac.jpg 1\nfile:///x/%AC.jpg 2\nin\0.jpg 3\n")
    assert [item.uri for item in items(tmp_path / "list.txt")][:2] == ["file:///x/%AC.jpg"] * 2
    (tmp_path / "long.csv").write_bytes(b"path,identity\na.jpg,1\n" + b"n" * 1_000_000 + b",2\nb.jpg,3\n")
    assert [item.identity for item in items(tmp_path / "long.csv")] == ["1", None, "3"]


def test_a_photo_that_is_called_a_list_is_no_list(tmp_path: Path) -> None:
    """Its bytes would become names, and lie in the gallery."""
    photo = b"\xff\xd8\xff\xe0\x00\x10JFIF" + np.random.default_rng(1).bytes(3000)
    (tmp_path / "list.txt").write_bytes(photo)
    with pytest.raises(SourceError, match=r"list\.txt' is no text: it holds binary data"):
        items(tmp_path / "list.txt")
    encoded = base64.b64encode(photo).decode()
    (tmp_path / "faces.tsv").write_text(f"a/1.jpg\tAnn\nx\thttp://a/b\t{encoded}\t0\na/2.jpg\tBob\n")
    found = items(tmp_path / "faces.tsv")
    assert all(len(item.uri) < 300 + len(str(tmp_path)) for item in found)


def test_a_list_in_utf16_is_text(tmp_path: Path) -> None:
    """Spreadsheets on Windows write such lists."""
    (tmp_path / "list.csv").write_bytes("path,identity\r\nä.jpg,Zoë\r\nb.jpg,Ann\r\n".encode("utf-16"))
    found = items(tmp_path / "list.csv")
    assert [(item.uri.rsplit("/", 1)[1], item.identity) for item in found] == [("ä.jpg", "Zoë"), ("b.jpg", "Ann")]


def test_names_of_control_characters_make_no_binary_data(tmp_path: Path) -> None:
    name = "\x1f\x08\x08\x02.jpg"
    (tmp_path / "list.csv").write_text("path,identity\n" + "".join(f"{n}{name},\x1fAnn\n" for n in range(9)))
    assert [item.uri.rsplit("/", 1)[1] for item in items(tmp_path / "list.csv")] == [f"{n}{name}" for n in range(9)]


def test_devices_and_fifos_are_never_opened(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a.jpg", "a.tar", "a.txt"):
        os.mkfifo(root / name)
    (root / "b.jpg").symlink_to("/dev/zero")
    found = items(root)
    assert [item.listing_error for item in found] == ["not a regular file"] * 3
    os.mkfifo(tmp_path / "a.parquet")
    assert items(tmp_path / "a.parquet")[0].listing_error is not None
    (tmp_path / "list.txt").write_text("/dev/zero 1\nroot/a.jpg 2\n")
    assert [item.listing_error for item in items(tmp_path / "list.txt")] == ["not a regular file"] * 2


def test_links_are_followed_but_do_not_multiply(tmp_path: Path) -> None:
    farm, store = tmp_path / "farm", tmp_path / "store"
    for n in range(12):
        (store / f"p{n}").mkdir(parents=True)
        (store / f"p{n}" / f"{n}.jpg").write_bytes(b"x")
        (farm / "train").mkdir(parents=True, exist_ok=True)
        (farm / "train" / f"p{n}").symlink_to(store / f"p{n}")
    assert len([item for item in items(farm) if item.listing_error is None]) == 12
    for n in range(12):
        for k in range(12):
            (store / f"p{n}" / f"to{k}").symlink_to(store / f"p{k}")
    found = items(farm)
    assert 12 <= len(found) < 1000
    assert {item.listing_error for item in found} == {None, "a link to a folder that was listed before"}
    assert {Path(item.uri).name for item in found if item.listing_error is None} == {f"{n}.jpg" for n in range(12)}


def test_folders_deeper_than_calls(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 700)
    os.makedirs(deep)
    (deep / "a.jpg").write_bytes(b"x")
    assert [item.uri for item in items(tmp_path)] == [str(deep / "a.jpg")]


def test_uris_of_files_and_members_are_not_alike(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": b"x", "\udcff.jpg": b"y", "%FF.jpg": b"z"})
    (tmp_path / "s.tar#a.jpg").write_bytes(b"other")
    (tmp_path / "plain#a.jpg").write_bytes(b"other")
    uris = [item.uri for item in items(tmp_path)]
    assert len(set(uris)) == 5
    assert f"{tmp_path}/plain#a.jpg" in uris
    assert f"file://{tmp_path}/s.tar%23a.jpg" in uris


def test_a_sparse_member_is_not_read_as_bytes(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % 4096  # the size with its holes
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    (tmp_path / "s.tar").write_bytes(bytes(header) + b"x" * 512 + bytes(1024))
    (found,) = items(tmp_path / "s.tar")
    assert found.listing_error == "a sparse member"


def test_what_may_be_a_folder_and_cannot_be_looked_up_is_an_item(tmp_path: Path) -> None:
    """A link into a disk that is not mounted: its images must not count as gone."""
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"x")
    (root / "archive").symlink_to(tmp_path / "not-mounted" / "archive")
    (root / "in" / "circle").symlink_to(root / "in" / "circle")
    for name in (".hidden", "notes.txt"):
        (root / name).symlink_to(tmp_path / "nowhere")
    found = {Path(item.uri).name: item.listing_error for item in items(root)}
    assert found == {
        "a.jpg": None,
        "archive": "a link that leads nowhere",
        "circle": "cannot be looked up: too many levels of symbolic links",
    }
    assert {Path(item.uri).name for item in items(root / "*.jpg")} == {"a.jpg"}, "no folder is wanted there"
    assert {Path(item.uri).name for item in items(root / "**" / "*.jpg")} == set(found)


def test_a_folder_of_parquet_files_that_cannot_be_listed_is_an_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "in/b"):
        pq.write_table(pa.table({"uri": [f"/photos/{name}.jpg"]}), tmp_path / f"{name}.parquet")
    assert len(list(open_source(SourceConfig(str(tmp_path), kind="parquet")))) == 2
    fail_to_list(monkeypatch, tmp_path / "in", errno.EIO)
    found = list(open_source(SourceConfig(str(tmp_path), kind="parquet")))
    assert [item.listing_error for item in found] == [None, "folder cannot be read: input/output error"]
    with pytest.raises(StorageError, match="cannot list"):
        list_parquet_files(str(tmp_path))
