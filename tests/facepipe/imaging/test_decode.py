"""Headers and pixels against Pillow, on every format and orientation; damaged and hostile files are told apart."""

import io
import struct
from collections.abc import Callable

import cv2
import numpy as np
import poison
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from facepipe.imaging.decode import DecodeError, decode
from facepipe.imaging.header import Header, HeaderError, read_header
from facepipe.stages import Decode


def picture(w: int = 61, h: int = 47) -> Image.Image:
    """A smooth picture that no symmetry maps to itself."""
    y, x = np.mgrid[0:h, 0:w]
    return Image.fromarray(np.stack([x * 255 // w, y * 255 // h, (x + 2 * y) % 256 // 2], -1).astype(np.uint8))


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


FORMATS = {
    "jpeg": ("JPEG", "RGB", {"quality": 97, "subsampling": 0}),
    "progressive": ("JPEG", "RGB", {"quality": 97, "subsampling": 0, "progressive": True}),
    "grey jpeg": ("JPEG", "L", {"quality": 97}),
    "cmyk jpeg": ("JPEG", "CMYK", {"quality": 97}),
    "png": ("PNG", "RGB", {}),
    "grey png": ("PNG", "L", {}),
    "alpha png": ("PNG", "RGBA", {}),
    "grey alpha png": ("PNG", "LA", {}),
    "palette png": ("PNG", "P", {}),
    "webp": ("WEBP", "RGB", {"lossless": True}),
    "lossy webp": ("WEBP", "RGB", {"quality": 95}),
    "alpha webp": ("WEBP", "RGBA", {"lossless": True}),
    "bmp": ("BMP", "RGB", {}),
    "palette bmp": ("BMP", "P", {}),
    "tiff": ("TIFF", "RGB", {}),
    "lzw tiff": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "grey tiff": ("TIFF", "L", {}),
    "gif": ("GIF", "P", {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    kind, mode, options = FORMATS[name]
    data = save(picture().convert(mode), kind, **options)
    header = read_header(data)
    pixels = decode(data, header)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert (header.width, header.height) == (61, 47)
    assert pixels.shape == (47, 61, 3)
    assert np.abs(pixels - expected).mean() < 2.5


def test_sixteen_bits() -> None:
    deep = np.asarray(picture()).astype(np.uint16) * 257
    for kind in (".png", ".tiff"):
        data = cv2.imencode(kind, deep[..., ::-1])[1].tobytes()
        assert np.abs(decode(data, read_header(data)).astype(int) - np.asarray(picture())).max() <= 1


def test_first_frame_of_an_animation() -> None:
    first, second = picture().convert("P"), Image.new("P", (61, 47))
    data = save(first, "GIF", save_all=True, append_images=[second])
    assert np.abs(decode(data, read_header(data)).astype(int) - np.asarray(first.convert("RGB"))).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 97, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = save(picture(), kind, exif=exif, **options)
    header = read_header(data)
    pixels = decode(data, header)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert header.oriented_size == (pixels.shape[1], pixels.shape[0])
    assert np.abs(pixels - expected).mean() < 2


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_reduced_decoding_is_the_image_made_smaller(reduce: int) -> None:
    data = save(picture(640, 480), "JPEG", quality=95)
    small = decode(data, read_header(data), reduce)
    expected = np.asarray(picture(640, 480).reduce(reduce)).astype(int)
    assert small.shape == expected.shape
    assert np.abs(small - expected).mean() < 3


def test_reduction_keeps_the_working_side() -> None:
    stage = Decode(working_side=640)
    sides = {639: 1, 1279: 1, 1280: 2, 2560: 4, 9000: 8}
    for side, reduce in sides.items():
        assert stage.choose_reduction(Header("jpeg", side, side // 2)) == reduce


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated_files_are_errors_not_half_images(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    data = save(Image.fromarray(noise), kind)
    result = Decode().decode_image(data[: len(data) // 2])
    assert result.status == "decode_error"
    assert result.pixels is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>", "unsupported: html"),
        (b"\1\2\3", "no known image format"),
        (b"\xff\xd8\xff\xe0", "jpeg"),
    ],
)
def test_no_images(data: bytes, reason: str) -> None:
    result = Decode().decode_image(data)
    assert result.status == "decode_error"
    assert reason in (result.error or "")


def test_a_bomb_is_too_large_before_memory_is_spent() -> None:
    png = bytearray(save(picture(), "PNG"))
    png[16:24] = struct.pack(">II", 100_000, 100_000)
    result = Decode().decode_image(bytes(png))
    assert (result.status, result.width) == ("too_large", 100_000)
    gif = bytearray(save(picture().convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    assert Decode().decode_image(bytes(gif)).status == "too_large"


SEEDS = [save(picture().convert(mode), kind, **options) for kind, mode, options in FORMATS.values()]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    st.integers(0, 4000),
)
def test_mutated_headers_never_raise_anything_else(seed: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(seed[: len(seed) - cut] if cut < len(seed) else seed)
    for at, value in changes:
        if at < len(data):
            data[at] = value
    try:
        header = read_header(bytes(data))
        if header.width * header.height < 1e6:
            decode(bytes(data), header)
    except (HeaderError, DecodeError):
        pass


def test_sizes_beyond_the_column_are_too_large() -> None:
    bombs = poison.bombs()
    data = [bombs[f"giant-{n}.png"] for n in (1, 2, 3)]
    table = pa.table(
        {"bytes": pa.array(data, pa.large_binary()), "status": ["ok"] * 3, "error": pa.nulls(3, pa.string())}
    )
    found = Decode()(table)
    assert found["status"].to_pylist() == ["too_large"] * 3
    assert found["width"].to_pylist() == [None] * 3
    assert "4294967295x1" in found["error"][0].as_py()


@pytest.mark.parametrize("bomb", [poison.progressive_bomb, poison.sequential_bomb])
def test_a_jpeg_of_many_scans_is_too_large(bomb: Callable[[int, int], bytes]) -> None:
    assert read_header(bomb(64, 40)).scans == 40
    assert Decode().decode_image(bomb(64, 40)).status == "ok"
    assert Decode().decode_image(bomb(64, 101)).error == "101 scans, the limit is 100"
    assert read_header(save(picture(), "JPEG")).scans == 1
    assert 2 <= read_header(save(picture(), "JPEG", progressive=True)).scans <= 12


def test_scans_are_not_hidden_and_not_imagined() -> None:
    many = poison.progressive_bomb(64, 200)
    table = many.index(b"\xff\xc4")
    # An end-of-image marker inside a segment is no end; what stands behind the end is no scan.
    assert read_header(many[:table] + poison.jpeg_segment(0xFE, b"\xff\xd9") + many[table:]).scans == 200
    assert read_header(poison.progressive_bomb(64, 4) + b"\xff\xda" * 500).scans == 4


@pytest.mark.parametrize("value", [0x1000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_png_chunk_that_claims_gigabytes(value: int) -> None:
    data = save(picture(), "PNG")
    at = data.index(b"IDAT") - 4
    result = Decode().decode_image(data[:at] + struct.pack(">I", value) + data[at + 4 :])
    assert (result.status, result.error) == ("decode_error", "png is truncated: a chunk reaches past its end")


def test_the_still_picture_of_an_animated_png() -> None:
    data = save(picture(), "PNG", save_all=True, append_images=[Image.new("RGB", (61, 47))])
    assert np.array_equal(decode(data, read_header(data)), np.asarray(picture()))
    damaged = bytearray(data)
    damaged[data.index(b"IDAT") + 20] ^= 0xFF
    assert Decode().decode_image(bytes(damaged)).status == "decode_error", "and not memory that nothing was written to"


def test_a_jpeg_2000_goes_by_its_code_stream() -> None:
    assert Decode().decode_image(poison.bombs()["lying.jp2"]).status == "too_large"
    with pytest.raises(HeaderError):
        read_header(b"\0\0\0\1jP  " + b"\xdc" * 80)  # a box length that no file has (found by tests/bench/fuzz.py)


def test_a_comment_hides_no_size() -> None:
    assert read_header(b"P6 #\r9 7 255\n8 8\n255\n")[1:3] == (9, 7)


def test_large_pngs_are_kept_small() -> None:
    stage = Decode()
    assert stage.choose_reduction(Header("png", 4000, 4000)) == 1
    assert stage.choose_reduction(Header("png", 9000, 9000)) == 8
    result = stage.decode_image(poison.png(4200, 4200, bytes(4200 * 526), bits=1))
    assert result.pixels is not None
    assert (result.pixels.shape, result.width) == ((1050, 1050, 3), 4200)
    assert result.frame is not None
    assert result.frame.scale == 0.25
