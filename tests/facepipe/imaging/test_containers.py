"""Orientation is applied once for every container, sound files decode, broken ones do not, and unsupported ones are named."""

import io
import os
import struct
import subprocess
import sys
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from containers import avif, box, tiff
from PIL import Image

from facepipe.imaging import repair
from facepipe.imaging.decode import DecodeError, decode, orient
from facepipe.imaging.header import Header, HeaderError, read_header
from facepipe.stages import Decode

ORIENTATIONS = range(1, 9)
# The inverse of each orientation: what turns the picture as it is seen into the stored one.
INVERSE = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}


@pytest.fixture(scope="module")
def seen() -> np.ndarray:
    """A smooth picture that no symmetry maps to itself."""
    y, x = np.mgrid[0:64, 0:96]
    return np.stack([x * 255 // 96, y * 255 // 64, (x + 2 * y) % 256 // 2], -1).astype(np.uint8)


def save(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, kind, **options)
    return out.getvalue()


def assert_shows(data: bytes, expected: np.ndarray, limit: float = 4.0) -> None:
    header = read_header(data)
    pixels = decode(data, header)
    assert pixels.shape == expected.shape
    assert header.oriented_size == pixels.shape[1::-1]
    assert np.abs(pixels.astype(int) - expected).mean() < limit


# ---------------------------------------------------------------- orientation


# Turns (anticlockwise) and mirrors of an AVIF, and the EXIF orientation that does the same: libavif's table.
AVIF_ORIENTATIONS = [
    (None, None, 1),
    (1, None, 8),
    (2, None, 3),
    (3, None, 6),
    (None, 0, 4),
    (None, 1, 2),
    (1, 0, 5),
    (1, 1, 7),
    (2, 0, 2),
    (2, 1, 4),
    (3, 0, 7),
    (3, 1, 5),
]


@pytest.mark.parametrize(("turn", "mirror", "orientation"), AVIF_ORIENTATIONS)
def test_an_avif_is_turned_by_its_container_and_not_by_exif(
    seen: np.ndarray, turn: int | None, mirror: int | None, orientation: int
) -> None:
    stored = orient(seen, INVERSE[orientation])
    assert_shows(avif(stored, turn=turn, mirror=mirror), seen)
    assert_shows(avif(stored, turn=turn, mirror=mirror, orientation=6), seen)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_behind_the_frame_header(seen: np.ndarray, orientation: int) -> None:
    data = save(orient(seen, INVERSE[orientation]), "JPEG", quality=95)
    block = b"Exif\0\0" + tiff(orientation)
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    scan = data.index(b"\xff\xda")
    assert_shows(data[:scan] + segment + data[scan:], seen)


@pytest.mark.parametrize("kind", [b"zTXt", b"tEXt", b"iTXt", b"iTXt compressed"])
@pytest.mark.parametrize("name", [b"exif", b"APP1"])
def test_exif_in_a_raw_profile(seen: np.ndarray, kind: bytes, name: bytes) -> None:
    data = save(orient(seen, 8), "PNG")
    block = b"Exif\0\0" + tiff(6)
    text = b"\n%s\n%8d\n%s\n" % (name, len(block), block.hex().encode())
    content = {
        b"zTXt": b"\0" + zlib.compress(text),
        b"tEXt": text,
        b"iTXt": b"\0\0\0\0" + text,
        b"iTXt compressed": b"\1\0\0\0" + zlib.compress(text),
    }[kind]
    chunk = kind[:4] + b"Raw profile type " + name + b"\0" + content
    at = data.index(b"IDAT") - 4
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert_shows(data[:at] + whole + data[at:], seen, 1)


def test_a_raw_profile_that_inflates_without_end_is_passed_over() -> None:
    data = save(np.zeros((4, 4, 3), np.uint8), "PNG")
    chunk = b"zTXtRaw profile type exif\0\0" + zlib.compress(bytes(1 << 24))
    at = data.index(b"IDAT") - 4
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert read_header(data[:at] + whole + data[at:]).orientation == 1


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"big_tiff": True}])
def test_a_tiff_is_turned_once(seen: np.ndarray, orientation: int, options: dict[str, Any]) -> None:
    stored = orient(seen, INVERSE[orientation])
    exif = Image.Exif()
    exif[274] = orientation
    assert_shows(save(stored, "TIFF", exif=exif, **options), seen, 1)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_heic_is_turned_once(seen: np.ndarray, orientation: int) -> None:
    encoder = pytest.importorskip("pillow_heif")
    pytest.importorskip("pi_heif")
    encoder.register_heif_opener()
    data = save(orient(seen, INVERSE[orientation]), "HEIF", quality=95, exif=b"Exif\0\0" + tiff(orientation))
    assert_shows(data, seen)


def test_jpeg_xl(seen: np.ndarray) -> None:
    codec = pytest.importorskip("pylibjxl")
    assert_shows(codec.encode(seen, lossless=True), seen, 0.1)
    turned = save(orient(seen, 8), "JPEG", quality=95, exif=b"Exif\0\0" + tiff(6))
    assert_shows(codec.jpeg_to_jxl(turned), seen)
    assert Decode().decode_image(codec.encode(seen)[:-40]).status == "decode_error"


# ---------------------------------------------------------------- sizes


def test_a_larger_hidden_item_is_not_the_picture(seen: np.ndarray) -> None:
    data = avif(seen, hidden_size=(4000, 3000))
    assert read_header(data)[:3] == ("avif", 96, 64)
    assert_shows(data, seen)


def test_the_header_of_a_jpeg_xl_needs_no_package() -> None:
    # 37 rows in 9 bits, 51 columns in 9 bits, then only defaults.
    bits = 0 | 0 << 1 | 36 << 3 | 0 << 12 | 0 << 15 | 50 << 17 | 1 << 26
    stream = b"\xff\x0a" + bits.to_bytes(4, "little") + bytes(40)
    assert read_header(stream)[:3] == ("jxl", 51, 37)
    container = b"\0\0\0\x0cJXL \r\n\x87\n" + box(b"ftyp", b"jxl \0\0\0\0jxl ") + box(b"jxlc", stream)
    assert read_header(container)[:3] == ("jxl", 51, 37)


# ---------------------------------------------------------------- truncated files


def list_sound_files(pixels: np.ndarray) -> dict[str, bytes]:
    return {
        "jpeg": save(pixels, "JPEG", quality=90),
        "restarts": bytes(
            cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_RST_INTERVAL, 4])[1]
        ),
        "progressive": save(pixels, "JPEG", quality=90, progressive=True),
        "png": save(pixels, "PNG"),
        "lossy webp": save(pixels, "WEBP", quality=90),
        "lossless webp": save(pixels, "WEBP", lossless=True),
        "webp with exif": save(pixels, "WEBP", exif=tiff(1) + bytes(200)),
        "gif": save(np.asarray(Image.fromarray(pixels).quantize(64).convert("RGB")), "GIF"),
        "bmp": save(pixels, "BMP"),
        "tiff": save(pixels, "TIFF"),
        "ppm": save(pixels, "PPM"),
        "jp2": bytes(cv2.imencode(".jp2", pixels)[1]),
        "avif with exif": avif(pixels, orientation=1),
    }


NOISE = np.random.default_rng(0).integers(0, 255, (96, 160, 3), np.uint8)
SOUND_FILES = list_sound_files(cv2.GaussianBlur(NOISE, (0, 0), 2))


@pytest.mark.parametrize("name", SOUND_FILES)
@pytest.mark.parametrize("cut", [1, 2])
def test_a_file_without_its_last_bytes_is_read(name: str, cut: int) -> None:
    data = SOUND_FILES[name]
    whole = decode(data, read_header(data))
    short = data[:-cut]
    pixels = decode(short, read_header(short))
    assert pixels.shape == whole.shape
    # All but the last row of units (of pixels, where there are none) is the same.
    assert np.array_equal(pixels[:-16], whole[:-16]) or np.array_equal(pixels[16:], whole[16:])


@pytest.mark.parametrize("name", sorted(set(SOUND_FILES) - {"avif with exif", "webp with exif"}))
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_file_that_lacks_rows_is_not_read(name: str, share: float) -> None:
    short = SOUND_FILES[name][: int(len(SOUND_FILES[name]) * share)]
    result = Decode().decode_image(short)
    assert (result.status, result.pixels) == ("decode_error", None)


def test_a_png_that_lacks_a_row_is_not_completed() -> None:
    data = SOUND_FILES["png"]
    assert repair.complete_png(data) is None, "it lacks nothing"
    start = data.index(b"IDAT")
    size = struct.unpack(">I", data[start - 4 : start])[0]
    pixels = zlib.decompress(data[start + 4 : start + 4 + size])
    coded = zlib.compress(pixels[:-1])
    short = data[: start - 4] + struct.pack(">I", len(coded)) + b"IDAT" + coded
    with pytest.raises(DecodeError, match="truncated"):
        decode(short, read_header(short))


def test_a_damaged_picture_is_still_an_error() -> None:
    # PNG has checksums; elsewhere damage may pass as pixels.
    data = bytearray(SOUND_FILES["png"])
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    assert Decode().decode_image(bytes(data)).status == "decode_error"


# ---------------------------------------------------------------- unsupported kinds


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"8BPS\0\1" + bytes(30), "psd"),
        (b"\0\0\1\0\1\0" + bytes(30), "ico"),
        (b"%PDF-1.7\n", "pdf"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "svg"),
        (b"<!DOCTYPE html><html>", "html"),
        (b"RIFF\0\0\0\0AVI LIST", "avi"),
        (box(b"ftyp", b"isom\0\0\2\0isommp41") + bytes(20), "mp4"),
        (box(b"ftyp", b"qt  \0\0\0\0qt  "), "mov"),
        (box(b"ftyp", b"crx \0\0\0\1crx isom"), "cr3"),
        (b"PK\3\4" + bytes(20), "zip"),
    ],
)
def test_unsupported_kinds_are_named(data: bytes, name: str) -> None:
    error = Decode().decode_image(data).error or ""
    assert error.startswith("unsupported: ")
    assert name in error


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"heix\0\0\0\0mif1"])
def test_heic_is_named(brands: bytes) -> None:
    assert "heic" in (Decode().decode_image(box(b"ftyp", brands) + bytes(64)).error or "")


def test_an_optional_codec_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facepipe.imaging.optional_codecs.find_spec", lambda name: None)
    for kind in ("heic", "jxl"):
        with pytest.raises(DecodeError, match=rf"unsupported: {kind} needs .*pip install 'facepipe\["):
            decode(b"", Header(kind, 8, 8))


def test_what_has_no_eight_bits_is_unsupported() -> None:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(out, "TIFF")
    assert Decode().decode_image(out.getvalue()).error == "unsupported: tiff of 32 bits per channel"


# ---------------------------------------------------------------- odd files that Pillow reads


def test_odd_files_look_as_in_pillow(seen: np.ndarray) -> None:
    image = Image.fromarray(seen)
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    files = {
        "lab": save(np.asarray(image), "TIFF"),
        "grey16": save(grey, "TIFF"),
        "lzma": save(seen, "TIFF", compression="lzma"),
        "palette": save(np.asarray(image), "BMP"),
    }
    files["deep jp2"] = bytes(cv2.imencode(".jp2", grey)[1])
    out = io.BytesIO()
    image.convert("RGBA").save(out, "AVIF")
    files["alpha avif"] = out.getvalue()
    out = io.BytesIO()
    image.quantize(17).save(out, "GIF", transparency=3, background=250)
    files["background"] = out.getvalue()
    for name, data in files.items():
        pillow = Image.open(io.BytesIO(data))
        if pillow.mode.startswith("I;16"):
            expected = np.repeat((np.asarray(pillow) >> 8)[..., None], 3, 2)
        else:
            expected = np.asarray(pillow.convert("RGB"))
        assert np.abs(decode(data, read_header(data)).astype(int) - expected).max() <= 1, name


def test_mutated_containers_raise_nothing_else() -> None:
    random = np.random.default_rng(1)
    seeds = [*SOUND_FILES.values(), b"\0\0\0\x0cJXL \r\n\x87\n" + box(b"jxlc", b"\xff\x0a" + bytes(40))]
    for _ in range(300):
        data = bytearray(seeds[random.integers(len(seeds))])
        for _ in range(random.integers(1, 5)):
            data[random.integers(min(len(data), 500))] = random.integers(256)
        cut = int(random.integers(1, len(data)))
        short = bytes(data[: cut if random.random() < 0.5 else len(data)])
        try:
            header = read_header(short)
            if header.width * header.height < 1e6:
                decode(short, header)
        except (HeaderError, DecodeError):
            pass


# ---------------------------------------------------------------- limits


def test_a_jpeg_of_200_megapixels_is_read_at_an_eighth() -> None:
    header = Header("jpeg", 16320, 12240)
    assert Decode().choose_reduction(header) == 8
    assert header.width * header.height < Decode().max_pixels
    # A progressive one, and any other format, needs memory for all of its pixels.
    assert Decode().max_whole_pixels <= 1 << 27


def test_the_limits_differ_by_what_decoding_needs(seen: np.ndarray) -> None:
    stage = Decode(max_pixels=10_000, max_whole_pixels=5_000)
    statuses = {
        name: stage.decode_image(data).status
        for name, data in {
            "baseline": save(seen, "JPEG"),
            "progressive": save(seen, "JPEG", progressive=True),
            "png": save(seen, "PNG"),
        }.items()
    }
    assert statuses == {"baseline": "ok", "progressive": "too_large", "png": "too_large"}


@pytest.mark.parametrize("module", ["facepipe.stages.decode", "facepipe.reports.thumbs", "jobs.demo.photos"])
def test_opencv_reads_its_limits_whatever_is_imported_first(module: str) -> None:
    code = f"import {module}, cv2, os; print(cv2.utils.logging.getLogLevel(), os.environ['OPENCV_IO_MAX_IMAGE_PIXELS'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENCV_")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split() == ["0", str(1 << 28)]
