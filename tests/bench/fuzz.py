"""Coverage-guided fuzzing of what parses hostile bytes in Python: image headers, tar indices, list files. Run by hand.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install -c constraints.txt atheris pyarrow
    PYTHONPATH=. /tmp/fuzz/bin/python tests/bench/fuzz.py header -max_total_time=180 /tmp/corpus-header

Targets: header, tar, list. What follows goes to libFuzzer: a folder of the corpus, `-max_total_time`, or a file that
crashed. Anything but the documented errors is a crash, and so is an input that takes longer than `-timeout` seconds.
"""

import contextlib
import os
import re
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["facepipe.imaging", "facepipe.sources", "tarfile", "csv"]):
    sys.modules.pop("tarfile", None)  # imported before: it is to be instrumented too
    import tarfile

    from facepipe.errors import SourceError
    from facepipe.imaging.header import HeaderError, read_header
    from facepipe.sources.identity import make_identity_rule
    from facepipe.sources.item import WorkItem
    from facepipe.sources.list_file import ListSource
    from facepipe.sources.tar import TarReader

_FOLDER = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp") / f"facepipe-fuzz-{os.getpid()}"
_MOST_ITEMS = 100_000
_IDENTIFY = make_identity_rule("auto")


def header(data: bytes) -> None:
    with contextlib.suppress(HeaderError):
        found = read_header(data)
        assert found.width > 0
        assert found.height > 0
        assert 1 <= found.orientation <= 8
        assert found.scans >= 1


def tar(data: bytes) -> None:
    path = _FOLDER / "x.tar"
    path.write_bytes(data)
    uris = set()
    for n, item in enumerate(TarReader(_IDENTIFY).list_items(str(path))):
        assert n < _MOST_ITEMS
        _check(item)
        assert item.uri not in uris, "two images of one uri: the second would be taken for the first"
        uris.add(item.uri)
        if item.listing_error is None:
            assert item.offset is not None
            assert item.length is not None
            assert 0 <= item.offset < 1 << 63
            assert 0 <= item.length < 1 << 63


def lists(data: bytes) -> None:
    confined, data = data[:1] < b"\x80", data[1:]
    path = _FOLDER / "list.txt"
    path.write_bytes(data)
    with contextlib.suppress(SourceError):
        for n, item in enumerate(ListSource(str(path), root=str(_FOLDER) if confined else None)):
            assert n < _MOST_ITEMS
            _check(item)
            if confined and item.listing_error is None:
                assert (item.path + b"/").startswith(os.fsencode(_FOLDER) + b"/")


def _check(item: WorkItem) -> None:
    """What Arrow's columns take."""
    for text in (item.uri, item.fingerprint, item.identity, item.listing_error):
        assert text is None or text.encode("utf-8") is not None


TARGETS: dict[str, tuple[Callable[[bytes], None], int]] = {
    "header": (header, 4096),
    "tar": (tar, 16384),
    "list": (lists, 4096),
}


def seeds(target: str, folder: Path) -> None:
    """A first corpus, small, so that the fuzzer need not invent magic numbers and checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, data in enumerate({"header": _headers, "tar": _tars, "list": _lists}[target]()):
        (folder / f"seed-{n}").write_bytes(data)


def _headers() -> list[bytes]:
    ifd = struct.pack("<2sHIH", b"II", 42, 8, 3) + b"".join(
        struct.pack("<HHII", tag, 3, 1, value) for tag, value in ((256, 9), (257, 7), (274, 6))
    )
    exif = b"Exif\0\0" + ifd
    frame = struct.pack(">BHHB9s", 8, 7, 9, 3, bytes(range(9)))
    scan = b"\xff\xda\x00\x0c\x03" + bytes(9) + b"\x12\xff\x00\x34"
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 9, 7) + bytes(9)
    webp = struct.pack("<I4s4sI", 99, b"WEBP", b"VP8X", 10) + bytes(10) + struct.pack("<4sI", b"EXIF", len(ifd)) + ifd
    return [
        b"\xff\xd8\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + b"\xff\xc2\x00\x11" + frame + 3 * scan,
        b"\xff\xd8\xff\xc0\x00\x11" + frame + scan + b"\xff\xd9",
        png + struct.pack(">I4s", len(ifd), b"eXIf") + ifd + bytes(4) + bytes(4) + b"IEND",
        ifd,
        b"RIFF" + webp,
        b"RIFF" + struct.pack("<I4s4sI", 99, b"WEBP", b"VP8L", 10) + b"/" + bytes(9),
        b"RIFF" + struct.pack("<I4s4sI", 99, b"WEBP", b"VP8 ", 10) + bytes(6) + b"\x09\0\x07\0",
        b"GIF89a\x09\0\x07\0",
        b"BM" + bytes(12) + struct.pack("<Iii", 40, 9, -7) + bytes(12),
        struct.pack(">I4s4sI4s", 20, b"ftyp", b"avif", 0, b"mif1") + b"\0\0\0\x14ispe" + bytes(7) + b"\x09\0\0\0\x07",
        b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4s", 0, b"jp2c") + b"\xff\x4f\xff\x51" + bytes(40),
        b"P6 # comment\n9 7\n255\n",
    ]


def _tars() -> list[bytes]:
    import io

    found = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as shard:
            for name in ("a.jpg", "a.jpg", "a.cls", "b.json", "\udcff.jpg", "%FF.jpg", "n" * 120 + ".jpg", "../c.png"):
                info = tarfile.TarInfo(name)
                data = b'{"label": "Ann"}'
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("l.jpg")
            link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
            shard.addfile(link)
        found.append(out.getvalue().rstrip(b"\0") + bytes(1024))
    return found


def _lists() -> list[bytes]:
    texts = [
        "a.jpg 0\nb.jpg 1\n",
        "2\nimage_id identity\na.jpg 0\n",
        'file,identity\n"a,1.jpg",Ann\n',
        "\ufeffidentity\tpath\nAnn\tx\\y.jpg\n",
        "../a.jpg 1\n/etc/a.jpg 2\ns3://b/c.jpg 3\nfile:///etc/%FF.jpg 4\n",
        'a.jpg,"Smith, John"\nb.jpg,Ann\n',
    ]
    return [b"\0" + text.encode() for text in texts] + [b"\xff" + text.encode() for text in texts]


def _sum(data: bytearray, at: int) -> None:
    total = sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512])
    data[at + 148 : at + 156] = b"%06o\0 " % total


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """libFuzzer's mutation of a tar, with the checksums put right again: else hardly any header would be read."""
    changed = bytearray(atheris.Mutate(data, most))
    if seed % 4:
        for at in range(0, len(changed) - 511, 512):
            if re.match(rb"ustar", changed[at + 257 : at + 262]):
                _sum(changed, at)
    return bytes(changed[:most])


def main() -> None:
    name, *rest = sys.argv[1:]
    run, longest = TARGETS[name]
    folders = [Path(part) for part in rest if not part.startswith("-")]
    if folders and not folders[0].is_file():
        seeds(name, folders[0])
    _FOLDER.mkdir(exist_ok=True)
    options = {"custom_mutator": mutated} if name == "tar" else {}
    atheris.Setup([sys.argv[0], f"-max_len={longest}", "-timeout=10", *rest], run, **options)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
