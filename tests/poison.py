"""Hostile images, names, shards and lists, the same ones for the same seed: what a corpus scraped off the web may hold.

`plant` writes a folder of them; `tars`, `tables` and `lists` write containers. Nothing here needs more than a few MB.
"""

import io
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Pack = tuple[int, int, int, str]  # where a chunk starts, where its length stands, in how many bytes, in which order


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """Gradients, and a red rectangle that the fake detector takes for a face."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 150 // width, 90 + y * 150 // height, 90 + (x + 2 * y) % 150], -1).astype(np.uint8)
    pixels[8:40, 8:40] = (230, 30, 30)
    return Image.fromarray(pixels)


def save(kind: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    picture().convert(mode).save(out, kind, **options)
    return out.getvalue()


def _exif(orientation: int) -> bytes:
    return bytes(tiff([(274, 3, 1, orientation)]))


def _written(kind: str, *options: int, depth: type = np.uint8) -> bytes:
    pixels = np.asarray(picture())[..., ::-1].astype(depth)
    return bytes(cv2.imencode(kind, pixels * (257 if depth is np.uint16 else 1), list(options))[1])


def seeds() -> dict[str, bytes]:
    """A sound file of every kind, by name."""
    frames = [Image.new("RGB", (64, 48), (n * 40, 90, 90)) for n in range(4)]
    several = {"save_all": True, "append_images": frames}
    return {
        "baseline.jpg": save("JPEG"),
        "progressive.jpg": save("JPEG", progressive=True),
        "restart.jpg": _written(".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
        "oriented.jpg": save("JPEG", exif=b"Exif\0\0" + _exif(6)),
        "grey.jpg": save("JPEG", "L"),
        "cmyk.jpg": save("JPEG", "CMYK"),
        "icc.jpg": save("JPEG", icc_profile=bytes(range(256)) * 300, comment=b"hello"),
        "rgb.png": save("PNG"),
        "alpha.png": save("PNG", "RGBA"),
        "palette.png": save("PNG", "P", transparency=3),
        "bits.png": save("PNG", "1"),
        "deep.png": _written(".png", depth=np.uint16),
        "interlaced.png": interlaced(16, 16),
        "oriented.png": save("PNG", exif=_exif(8)),
        "animated.png": save("PNG", **several),
        "lossy.webp": save("WEBP", quality=80),
        "lossless.webp": save("WEBP", "RGBA", lossless=True),
        "oriented.webp": save("WEBP", exif=_exif(3)),
        "animated.webp": save("WEBP", **several),
        "plain.tif": save("TIFF"),
        "lzw.tif": save("TIFF", compression="tiff_lzw"),
        "deflate.tif": save("TIFF", compression="tiff_deflate"),
        "jpeg.tif": save("TIFF", compression="jpeg"),
        "pages.tif": save("TIFF", **several),
        "tiled.tif": tiled(),
        "big.tif": save("TIFF", big_tiff=True),
        "still.gif": save("GIF", "P"),
        "animated.gif": save("GIF", "P", **several),
        "colour.bmp": save("BMP"),
        "palette.bmp": save("BMP", "P"),
        "colour.ppm": save("PPM"),
        "colour.avif": _written(".avif"),
        "colour.jp2": _written(".jp2"),
    }


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, rows: bytes, bits: int = 8, colour: int = 0, lace: int = 0, more: bytes = b""
) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, lace)
    body = png_chunk(b"IHDR", head) + more + png_chunk(b"IDAT", zlib.compress(rows, 1)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def interlaced(width: int, height: int) -> bytes:
    """A grey Adam7 PNG; sides must be multiples of 8."""
    passes = [(8, 8), (8, 8), (4, 8), (4, 4), (2, 4), (2, 2), (1, 2)]  # steps across and down
    return png(width, height, b"".join((b"\0" + b"\x7f" * (width // x)) * (height // y) for x, y in passes), lace=1)


def tiff(entries: list[tuple[int, int, int, int]], data: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of one directory at byte 8; `data` follows it, `following` is the next directory."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + body + struct.pack("<I", following) + data


def grey_tiff(width: int = 16, height: int = 16, following: int = 0, **changes: tuple[int, int, int]) -> bytes:
    """A grey uncompressed TIFF; `changes` sets (type, count, value) of a tag, as in t278=(4, 1, 0)."""
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    tags |= {273: (4, 1, 0), 278: (4, 1, height), 279: (4, 1, 256)}
    tags |= {int(name[1:]): value for name, value in changes.items()}
    if tags[273] == (4, 1, 0):
        tags[273] = (4, 1, 14 + 12 * len(tags))
    return tiff([(tag, *value) for tag, value in tags.items()], bytes(range(256)), following)


def tiled() -> bytes:
    tags = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(322, 4, 1, 16), (323, 4, 1, 16), (324, 4, 1, 14 + 12 * 10), (325, 4, 1, 256)]
    return tiff(tags, bytes(range(256)))


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def progressive_bomb(side: int, scans: int) -> bytes:
    """A grey JPEG in which every scan of some hundred bytes makes the decoder visit each of the picture's blocks."""
    blocks = (-(-side // 8)) ** 2
    table = bytes([1, *[0] * 15])  # one code, one bit long
    zeros = bytes((blocks + 7) // 8)  # category 0 for each block
    ends = "".join(f"0{blocks_left:014b}" for blocks_left in [(1 << 14) - 1] * (blocks // 32767))
    rest = blocks % 32767
    ends += f"0{rest - (1 << 14):014b}" if rest >= 1 << 14 else "0" + "0" * 14
    coded = int(ends, 2).to_bytes((len(ends) + 7) // 8, "big") if ends else b""
    coded = (int(ends + "1" * (-len(ends) % 8), 2).to_bytes(len(coded), "big")).replace(b"\xff", b"\xff\0")
    alternating = jpeg_segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + coded
    return (
        b"\xff\xd8"
        + jpeg_segment(0xDB, bytes([0, *[1] * 64]))
        + jpeg_segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0))
        + jpeg_segment(0xC4, b"\x00" + table + b"\0")
        + jpeg_segment(0xC4, b"\x10" + table + b"\xe0")
        + jpeg_segment(0xDA, bytes([1, 1, 0, 0, 0, 0]))
        + zeros
        + alternating * (scans - 1)
        + b"\xff\xd9"
    )


def sequential_bomb(side: int, scans: int) -> bytes:
    """A baseline JPEG of three components, whose first is sent again and again."""
    table = bytes([1, *[0] * 15])
    coded = bytes((2 * (-(-side // 8)) ** 2 + 7) // 8)  # no difference, end of block: one bit each
    return (
        b"\xff\xd8"
        + jpeg_segment(0xDB, bytes([0, *[1] * 64]))
        + jpeg_segment(0xC0, struct.pack(">BHHB", 8, side, side, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0]))
        + jpeg_segment(0xC4, b"\x00" + table + b"\0")
        + jpeg_segment(0xC4, b"\x10" + table + b"\0")
        + (jpeg_segment(0xDA, bytes([1, 1, 0, 0, 63, 0])) + coded) * scans
        + b"\xff\xd9"
    )


def gif_bomb(frames: int) -> bytes:
    frame = b"\x21\xf9\4\0\0\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", 2000, 2000, 0x80, 0, 0) + bytes(6) + frame * frames + b";"


def bombs() -> dict[str, bytes]:
    """Small files that want much memory, much time, or both."""
    zeros = bytes(10_000 * 1251)
    jp2 = _written(".jp2")
    stream = jp2.find(b"\xff\x4f\xff\x51")
    lying = bytearray(jp2)
    lying[stream + 8 : stream + 16] = struct.pack(">II", 16_000, 16_000)  # what decoders go by; the box says 64x48
    animated = seeds()["animated.gif"]
    found = {
        **{f"zeros-{n}.png": png(9999, 10_000, zeros, bits=1, more=png_chunk(b"tEXt", b"n\0%d" % n)) for n in range(6)},
        "claims.png": png(50_000, 50_000, bytes(1 << 20), bits=1),
        "interlaced.png": interlaced(2048, 2048),
        "progressive.jpg": progressive_bomb(4000, 3000),
        "progressive-large.jpg": progressive_bomb(9_992, 99),
        "sequential.jpg": sequential_bomb(400, 3000),
        "segments.jpg": b"\xff\xd8" + jpeg_segment(0xFE, b"") * 500_000,
        "fill.jpg": b"\xff\xd8" + b"\xff" * 4_000_000,
        "stuffed.jpg": b"\xff\xd8" + b"\xff\0" * 2_000_000,
        "chunks.png": b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0))
        + bytes(6_000_000),
        "chunks.webp": b"RIFF" + struct.pack("<I4s4sI", 6_000_030, b"WEBP", b"VP8X", 10) + bytes(6_000_010),
        "sizes.avif": seeds()["colour.avif"] + b"\0\0\0\x14ispe\0\0\0\0\0\0\0\1\0\0\0\1" * 200_000,
        "boxes.jp2": jp2[:12] + b"\0\0\0\x08free" * 500_000 + jp2[12:],
        "lying.jp2": bytes(lying),
        "frames.gif": gif_bomb(50_000),
        "canvas.gif": animated[:6] + struct.pack("<HH", 9999, 9999) + animated[10:],
        "hidden.ppm": b"P6 #\r15000 15000 255\n9 9\n255\n" + bytes(243),
        "text.png": png(8, 8, bytes(72), more=png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000))) * 20),
        "profile.png": png(8, 8, bytes(72), more=png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(40_000_000)))),
        "black.webp": _encoded(Image.new("RGB", (6000, 6000)), "WEBP", lossless=True, method=0),
        "thin.png": png(99_000_000, 1, bytes(12_375_001), bits=1),
        "tall.png": png(1, 1_000_000, bytes(2_000_000), bits=1),
        "rows.tif": grey_tiff(9999, 9999, t278=(4, 1, 1)),
        "strips.tif": grey_tiff(t273=(4, 0xFFFFFFFF, 8), t279=(4, 0xFFFFFFFF, 8), t278=(4, 1, 1)),
        "strips-million.tif": grey_tiff(16, 6_000_000, t273=(4, 6_000_000, 8), t279=(4, 6_000_000, 8), t278=(4, 1, 1)),
        "samples.tif": grey_tiff(t277=(3, 1, 65535)),
        "depth.tif": grey_tiff(t258=(3, 1, 64)),
        "tile.tif": grey_tiff(t322=(4, 1, 0x7FFFFFF0), t323=(4, 1, 0x7FFFFFF0), t324=(4, 1, 8), t325=(4, 1, 256)),
        "loop.tif": grey_tiff(following=8),
        "nothing.tif": tiff([]),
        "beyond.tif": struct.pack("<2sHI", b"II", 42, 0xFFFFFFF0),
        "page.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 9999, -9999, 1, 24, 0, 0, 0, 0, 0, 0),
    }
    for n, size in enumerate(
        [(2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (1, 2**32 - 1), (2**31, 2**31), (0, 9), (65535, 65535)]
    ):
        found[f"giant-{n}.png"] = png(*size, b"")
        found[f"giant-{n}.tif"] = grey_tiff(*size)
    return found


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def oddities() -> dict[str, bytes]:
    """Files that are not what they are called, or hardly anything."""
    sound = seeds()
    jpeg, first = sound["baseline.jpg"], sound["rgb.png"]
    found = {
        "empty.jpg": b"",
        "one-byte.png": b"\x89",
        "text.jpg": b"this is no image\n" * 100,
        "page.jpg": b"<!DOCTYPE html><html><title>404</title></html>",
        "null.jpg": bytes(5000),
        "archive.jpg": b"PK\3\4" + bytes(200),
        "script.png": b"#!/bin/sh\nexit 1\n",
        "vector.jpg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "bom.jpg": b"\xef\xbb\xbf" + jpeg,
        "jpeg-called.png": jpeg,
        "png-called.jpg": first,
        "gif-called.webp": sound["still.gif"],
        "tiff-called.jpg": sound["plain.tif"],
        "both.jpg": jpeg + first,
        "both.png": first + jpeg,
        "twice.jpg": jpeg + jpeg,
        "trailing.jpg": jpeg + b"\xff\xda" * 5000,
        "trailing.png": first + b"garbage" * 1000,
        "zipped.jpg": jpeg + b"PK\3\4" + bytes(99),
    }
    for n, magic in enumerate(
        [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"II*\0", b"BM", b"P6\n"]
    ):
        found[f"magic-{n}.jpg"] = magic
    for orientation in (0, 9, 65535):
        found[f"turned-{orientation}.jpg"] = save("JPEG", exif=b"Exif\0\0" + _exif(orientation))
        found[f"turned-{orientation}.png"] = save("PNG", exif=_exif(orientation))
        found[f"turned-{orientation}.tif"] = grey_tiff(t274=(3, 1, orientation))
    loop = b"Exif\0\0" + tiff([(274, 3, 1, 6), (34665, 4, 1, 8), (330, 4, 1, 8)], following=8)
    found["exif-loop.jpg"] = save("JPEG", exif=loop)
    return found


def chunks(data: bytes) -> list[Pack]:
    """The parts a file is made of, as far as its format has any."""
    found: list[Pack] = []
    at = 0
    if data[:2] == b"\xff\xd8":
        starts = [at for at in range(2, len(data) - 3) if data[at] == 0xFF and 0xBF < data[at + 1] < 0xFF]
        found = [(at, at + 2, 2, ">") for at in starts if not 0xD0 <= data[at + 1] <= 0xD8]
    elif data[:4] == b"\x89PNG":
        at = 8
        while at + 12 <= len(data):
            found.append((at, at, 4, ">"))
            at += 12 + int.from_bytes(data[at : at + 4], "big")
    elif data[:4] == b"RIFF":
        found, at = [(0, 4, 4, "<")], 12
        while at + 8 <= len(data):
            found.append((at, at + 4, 4, "<"))
            size = int.from_bytes(data[at + 4 : at + 8], "little")
            at += 8 + size + size % 2
    elif data[:4] in (b"II*\0", b"MM\0*"):
        order = "<" if data[:2] == b"II" else ">"
        start = struct.unpack_from(order + "I", data, 4)[0]
        count = struct.unpack_from(order + "H", data, start)[0] if start + 2 <= len(data) else 0
        found = [(start + 2 + 12 * n, start + 2 + 12 * n + 4, 4, order) for n in range(count)]
    elif data[4:8] in (b"ftyp", b"jP  "):
        while at + 8 <= len(data):
            found.append((at, at, 4, ">"))
            at += max(8, int.from_bytes(data[at : at + 4], "big"))
    else:
        found = [(at, at, 2, "<") for at in range(6, min(len(data), 60), 4)]
    return [part for part in found if part[1] + part[2] <= len(data)]


_SIZES = {
    b"\xff\xd8": lambda data: (max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5, ">HH"),
    b"\x89P": lambda data: (16, ">II"),
    b"GI": lambda data: (6, "<HH"),
    b"BM": lambda data: (18, "<ii"),
}


def structural(data: bytes) -> Iterator[bytes]:
    """Every part cut off, left out, doubled, and its length wrong; every size a header can claim."""
    parts = chunks(data)
    ends = [start for start, *_ in parts[1:]] + [len(data)]
    for (start, at, width, order), end in zip(parts, ends, strict=True):
        yield data[:start]
        yield data[: start + 3]
        yield data[:start] + data[end:]
        yield data[:end] + data[start:end] + data[end:]
        for value in (0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1)):
            field = value.to_bytes(width, "big" if order == ">" else "little")
            yield data[:at] + field + data[at + width :]
    if data[:2] in _SIZES:
        at, form = _SIZES[data[:2]](data)
        most = {"H": 0xFFFF, "I": 0xFFFFFFFF, "i": 0x7FFFFFFF}[form[-1]]
        for size in [(most, most), (0, 0), (most, 1), (1, most), (1, 1), (9000, 9000), (65, 48), (most >> 1, 2)]:
            yield data[:at] + struct.pack(form, *size) + data[at + struct.calcsize(form) :]


def mangled(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One random injury."""
    out = bytearray(data)
    at = rng.randrange(len(out))
    match rng.randrange(7):
        case 0:
            for _ in range(rng.randint(1, 20)):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 1:
            for _ in range(rng.randint(1, 4)):
                out[rng.randrange(min(len(out), 200))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        case 2:
            del out[at:]
        case 3:
            out[at:] = other[rng.randrange(len(other)) :]
        case 4:
            out[at:at] = other[:200]
        case 5:
            del out[at : at + rng.randint(1, 64)]
        case _:
            out[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
    return bytes(out)


def mutants(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` injured images, a third of them injured at a structural point."""
    rng = random.Random(seed)
    sound = seeds()
    names = sorted(sound)
    cuts = {name: list(structural(sound[name])) for name in names}
    for n in range(count):
        name = names[n % len(names)]
        if n % 3 == 0 and cuts[name]:
            data = rng.choice(cuts[name])
        else:
            data = mangled(rng, sound[name], sound[rng.choice(names)])
        yield f"{n:05d}-{name}", data


def plant(root: Path, seed: int = 0, count: int = 1000) -> int:
    """Write poison below a folder; how many image files a source has to account for."""
    planted = 0
    for folder, files in (("mutants", dict(mutants(seed, count))), ("bombs", bombs()), ("odd", oddities())):
        (root / folder).mkdir(parents=True)
        for name, data in files.items():
            (root / folder / name).write_bytes(data)
        planted += len(files)
    return planted + names(root / "names")


def names(root: Path) -> int:
    """Odd names and kinds of file; how many of them are image files, folders and loops left out."""
    root.mkdir(parents=True)
    data = save("JPEG")
    base = os.fsencode(root)
    odd = [
        b"byte\xff\xfe.jpg",
        b"byte%FF%FE.jpg",
        b"new\nline.jpg",
        b"-rf.jpg",
        b"..%2f..%2fetc.jpg",
        b"a#b.jpg",
        b" .jpg",
    ]
    odd += [
        "ü".encode() * 120 + b".jpg",
        b"n" * 251 + b".jpg",
        b"tab\t.jpg",
        b"x.tar#y.jpg",
        b"*?[.jpg",
        b"a.JPG",
        b'"quote".jpg',
    ]
    odd += ["e\u0301.jpg".encode(), "\u00e9.jpg".encode(), "\u202egpj.jpg".encode(), b"\x1b[31m.jpg", b"$(id).jpg"]
    for name in odd:
        with open(base + b"/" + name, "wb") as file:
            file.write(data)
    with tarfile.open(root / "x.tar", "w") as tar:
        member = tarfile.TarInfo("y.jpg")  # together with the file x.tar#y.jpg
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    (root / "folder.jpg").mkdir()
    (root / "folder.jpg" / "inside.jpg").write_bytes(data)
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "device.jpg").symlink_to("/dev/zero")
    (root / "parent").symlink_to(root)
    (root / "linked.jpg").symlink_to(root / "a.JPG")
    os.mkfifo(root / "fifo.jpg")
    os.mkfifo(root / "fifo.tar")
    (root / "locked.jpg").write_bytes(data)
    (root / "locked.jpg").chmod(0)  # root reads it all the same
    with open(root / "sparse.jpg", "wb") as file:
        file.truncate(10 << 30)
    deep = root
    for _ in range(600):
        deep = deep / "d"
    os.makedirs(deep)
    (deep / "deep.jpg").write_bytes(data)
    return len(odd) + 10


def tars(folder: Path) -> dict[str, int | None]:
    """Hostile shards, with how many items each has to give (None: any number, but one that says what is wrong)."""
    folder.mkdir(parents=True)
    data = save("JPEG")

    def member(name: str, size: int = len(data), kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname, info.pax_headers = size, kind, link, pax
        form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
        return info.tobuf(form, "utf-8", "surrogateescape")

    body = data + bytes(-len(data) % 512)
    sound = [member(f"{n}.jpg") + body for n in range(3)]
    end = bytes(1024)
    first = b"".join(sound)
    long_name = member("././@LongLink", 512, tarfile.GNUTYPE_LONGNAME) + b"n" * 511 + b"\0"
    pax_header = member("pax", 512, tarfile.XHDTYPE)

    def pax(text: bytes) -> bytes:
        return member("pax", len(text), tarfile.XHDTYPE) + text + bytes(-len(text) % 512)

    extended = bytearray(member("s.jpg", 512, tarfile.GNUTYPE_SPARSE))
    extended[386 : 386 + 24] = b"%011o\0%011o\0" % (0, 512)
    extended[482] = 1  # more of the map follows, but the file ends
    contents: dict[str, tuple[bytes, int | None]] = {
        "escaping": (member("../../etc/x.jpg") + body + member("/etc/y.jpg") + body + first + end, 5),
        "doubled": (sound[0] * 4 + end, 4),
        "escapes-alike": (member("\udcff.jpg") + body + member("%FF.jpg") + body + end, 2),
        "hard-link": (first + member("h.jpg", 0, tarfile.LNKTYPE, "/etc/passwd") + end, 4),
        "hard-link-bytes": (first + member("h.jpg", 0, tarfile.LNKTYPE, "\udcff\udcfe") + end, 4),
        "symbolic-link": (first + member("s.jpg", 0, tarfile.SYMTYPE, "/etc/passwd") + end, 3),
        "device": (first + member("d.jpg", 0, tarfile.CHRTYPE) + end, 3),
        "nul-name": (pax(b"16 path=a\0b.jpg\n") + member("x.jpg") + body + end, 1),
        "long-name": (pax(b"60013 path=" + b"n" * 59_997 + b".jpg\n") + member("x.jpg") + body + end, 1),
        "cut": (first[: len(first) - 300], None),
        "cut-header": (first + member("z.jpg")[:300], None),
        "checksum": (first + b"\xaa" + member("z.jpg")[1:] + body + end, None),
        "negative": (first + member("z.jpg", -512) + body + end, None),
        "negative-back": (first + member("z.jpg", -len(first) - 512) + body + end, None),
        "negative-folder": (first + member("z", -2048, tarfile.CONTTYPE) + body + end, None),
        "huge": (first + member("z.jpg", 1 << 80) + body + end, None),
        "huge-64": (first + member("z.jpg", (1 << 63) - 1) + body + end, None),
        "past-end": (first + member("z.jpg", 1 << 40) + body + end, None),
        "pax-huge": (first + member("pax", 1 << 40, tarfile.XHDTYPE) + body + end, None),
        "pax-negative": (first + member("pax", -512, tarfile.XHDTYPE) + body + end, None),
        "pax-size": (first + pax(b"13 size=-512\n") + member("z.jpg") + body + end, None),
        "pax-size-word": (first + pax(b"12 size=abc\n") + member("z.jpg") + body + end, None),
        "pax-nothing": (first + pax_header + bytes(512) + member("z.jpg") + body + end, 4),
        "pax-length-0": (first + pax_header + b"0 path=x\n".ljust(512, b"\0") + member("z.jpg") + body + end, None),
        "pax-digits": (first + pax(b"1" * 900_000) + member("z.jpg") + body + end, None),
        "pax-sparse": (first + pax(b"22 GNU.sparse.map=a,b\n") + member("z.jpg") + body + end, None),
        "pax-chain": (first + pax(b"9 a=bcd\n") * 5000 + member("z.jpg") + body + end, None),
        "long-chain": (first + long_name * 5000 + member("z.jpg") + body + end, None),
        "long-huge": (first + member("L", 1 << 40, tarfile.GNUTYPE_LONGNAME) + body + end, None),
        "sparse": (first + bytes(extended), None),
        "deep-label": (member("0.json", 900_000) + b"[" * 900_000 + bytes(-900_000 % 512) + first + end, 3),
        "after-end": (first + end + first + end, None),
        "zeros": (bytes(100_000), 0),
        "nothing": (b"", None),
        "text": (b"not a tar at all" * 100, None),
    }
    for name, (content, _) in contents.items():
        (folder / f"{name}.tar").write_bytes(content)
    with open(folder / "hole.tar", "wb") as file:
        file.truncate(1 << 30)
    return {name: count for name, (_, count) in contents.items()} | {"hole": 0}


def tables(folder: Path) -> dict[str, bool]:
    """Hostile Parquet files; whether each still holds rows that can be read."""
    folder.mkdir(parents=True)
    data = save("JPEG")
    out = io.BytesIO()
    table = pa.table({"bytes": [data, b"", None, b"text", data] * 20, "path": [f"{n}.jpg" for n in range(100)]})
    pq.write_table(table, out, row_group_size=20, compression="none")
    whole = out.getvalue()
    middle = bytearray(whole)
    middle[400:3000] = bytes(2600)
    footer = bytearray(whole)
    footer[-60:-40] = bytes(20)
    length = bytearray(whole)
    length[-8:-4] = b"\xff\xff\xff\x7f"
    for name, content in {
        "truncated": whole[:-200],
        "headless": b"XXXX" + whole[4:],
        "damaged-pages": bytes(middle),
        "damaged-footer": bytes(footer),
        "footer-length": bytes(length),
        "empty": b"",
        "magic": b"PAR1PAR1",
        "text": b"path,identity\na.jpg,x\n",
        "whole": whole,
    }.items():
        (folder / f"{name}.parquet").write_bytes(content)
    invalid = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 5)), pa.py_buffer(b"\xff.jpg")]
    )
    pq.write_table(pa.table({"path": invalid}), folder / "invalid-utf8.parquet")
    pq.write_table(pa.table({"path": [1.5, None], "label": [[1], None]}), folder / "numbers.parquet")
    pq.write_table(pa.table({"image": pa.array([{"bytes": "text"}])}), folder / "struct-of-text.parquet")
    odd = ["../../etc/x.jpg", "/etc/y.jpg", "s3:///x.jpg", "s3://", "a\0b.jpg", "", "file:///etc/%FF.jpg", "x" * 10_000]
    pq.write_table(pa.table({"path": odd}), folder / "paths.parquet")
    return {"whole": True, "damaged-pages": True, "numbers": True, "paths": True}


def lists(folder: Path) -> dict[str, int]:
    """Hostile lists, with how many items each has to give at least."""
    folder.mkdir(parents=True)
    (folder / "in").mkdir()
    (folder / "in" / "a.jpg").write_bytes(save("JPEG"))
    texts: dict[str, tuple[bytes, int]] = {
        "escaping": (b"../x.jpg 1\nin/a.jpg 2\nin/../../x.jpg 3\nin/../in/a.jpg 4\n/etc/y.jpg 5\n", 5),
        "remote": (b"s3:///x.jpg 1\ns3:// 2\nin/a.jpg 3\ngs:///y.jpg 4\n", 4),
        "nul": (b"in/\0.jpg 1\nin/a.jpg 2\n\0\0\0 3\n", 3),
        "nul-csv": (b"path,identity\nin/\0.jpg,1\nin/a.jpg,2\n", 2),
        "long": (b"in/a.jpg 1\n" + b"n" * 3_000_000 + b".jpg 2\nin/a.jpg 3\n", 3),
        "long-csv": (b"path,identity\nin/a.jpg,1\n" + b"n" * 3_000_000 + b",2\nin/a.jpg,3\n", 3),
        "long-first": (b"n" * 3_000_000 + b"\nin/a.jpg 1\n", 2),
        "no-newline": (b"in/a.jpg", 1),
        "mark": (b"\xef\xbb\xbfin/a.jpg 1\nin/a.jpg 2\n", 2),
        "wide": ("in/a.jpg 1\nin/a.jpg 2\n".encode("utf-16"), 2),
        "mixed": (b"in/\xfc.jpg 1\nin/\xc3\xbc.jpg 2\n\xff\xfe 3\n", 3),
        "returns": (b"in/a.jpg 1\rin/a.jpg 2\r\nin/a.jpg 3\n\r", 3),
        "quotes": (b'path,identity\n"in/a.jpg,1\nin/a.jpg,2\n', 1),
        "devices": (b"/dev/zero 1\n/dev/stdin 2\nin 3\n. 4\n", 4),
        "urls": (b"file:///etc/%2e%2e/x.jpg 1\nfile://in/a.jpg 2\nfile://%00.jpg 3\n", 3),
    }
    for name, (text, _) in texts.items():
        (folder / f"{name}.txt").write_bytes(text)
    return {name: count for name, (_, count) in texts.items()}
