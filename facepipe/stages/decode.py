"""Decode: bytes to pixels, at the smallest scale that still serves the detector."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import pyarrow as pa

from facepipe.arrow import pack_arrays, set_columns, view_buffers
from facepipe.imaging.decode import DecodeError, decode
from facepipe.imaging.geometry import Frame, locate_frame
from facepipe.imaging.header import Header, HeaderError, read_header
from facepipe.imaging.perceptual import compute_perceptual_hash
from facepipe.schema import DECODE_ERROR, OK, TOO_LARGE
from facepipe.types import UInt8

_LARGEST = (1 << 31) - 1
_KEPT_WHOLE = 1 << 24  # pixels


class DecodedImage(NamedTuple):
    """Pixels (h, w, 3), full size as seen and perceptual hash; or what went wrong."""

    pixels: UInt8 | None
    frame: Frame | None
    width: int | None
    height: int | None
    status: str
    error: str | None
    image_hash: int | None = None


def _frames(results: list[DecodedImage], part: str) -> pa.Array:
    name = part.removeprefix("pixels_")
    return pa.array([None if r.frame is None else getattr(r.frame, name) for r in results], pa.float64())


@dataclass(frozen=True)
class Decode:
    """Decodes; the type is told by content.

    max_pixels: images with more become `too_large`, from their header alone
    working_side: JPEGs are decoded at 1/2, 1/4 or 1/8 as long as their longer side stays at least this many pixels;
        Align decodes again at a larger scale where a face needs it
    max_scans: JPEGs with more passes over the picture become `too_large`: a pass may be a dozen bytes of the file and
        take the time of a whole image; encoders write about ten
    threads: images decoded side by side; 1 where every core has a worker of its own
    """

    max_pixels: int = 100_000_000
    working_side: int = 640
    max_scans: int = 100
    threads: int = 1

    needs: ClassVar = ("bytes", "status", "error")
    adds: ClassVar = (
        *("pixels", "pixels_width", "pixels_height", "pixels_scale", "pixels_left", "pixels_top"),
        *("width", "height", "image_hash"),
    )

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "decode")

    def setup(self) -> None:
        import cv2

        cv2.setNumThreads(1)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = zip(view_buffers(table["bytes"]), table["status"].to_pylist(), table["error"].to_pylist(), strict=True)
        results = list((self._pool.map if self.threads > 1 else map)(self._row, rows))
        shapes = [(None, None) if r.pixels is None else r.pixels.shape[:2] for r in results]
        columns = {
            "status": pa.array([r.status for r in results], pa.string()),
            "error": pa.array([r.error for r in results], pa.string()),
            "pixels": pack_arrays([r.pixels for r in results]),
            "pixels_height": pa.array([h for h, _ in shapes], pa.int32()),
            "pixels_width": pa.array([w for _, w in shapes], pa.int32()),
            **{name: _frames(results, name) for name in ("pixels_scale", "pixels_left", "pixels_top")},
            "width": pa.array([r.width for r in results], pa.int32()),
            "height": pa.array([r.height for r in results], pa.int32()),
            "image_hash": pa.array([r.image_hash for r in results], pa.int64()),
        }
        return set_columns(table, columns)

    def _row(self, row: tuple[memoryview | None, str, str | None]) -> DecodedImage:
        data, status, error = row
        return DecodedImage(None, None, None, None, status, error) if data is None else self.decode_image(bytes(data))

    def decode_image(self, data: bytes) -> DecodedImage:
        """Decode one image."""
        try:
            header = read_header(data)
        except HeaderError as error:
            return DecodedImage(None, None, None, None, DECODE_ERROR, str(error))
        width, height = header.oriented_size
        if width * height > self.max_pixels:
            reason = f"{width}x{height} pixels, the limit is {self.max_pixels}"
            fits = max(width, height) <= _LARGEST  # what a header claims need not fit the column
            return DecodedImage(None, None, width if fits else None, height if fits else None, TOO_LARGE, reason)
        if header.scans > self.max_scans:
            reason = f"{header.scans} scans, the limit is {self.max_scans}"
            return DecodedImage(None, None, width, height, TOO_LARGE, reason)
        try:
            reduce = self.choose_reduction(header)
            pixels = decode(data, header, reduce)
        except DecodeError as error:
            return DecodedImage(None, None, width, height, DECODE_ERROR, str(error))
        return DecodedImage(
            pixels, locate_frame(header, reduce), width, height, OK, None, compute_perceptual_hash(pixels)
        )

    def choose_reduction(self, header: Header) -> int:
        """The largest divisor that keeps the longer side.

        Only JPEG decodes faster when reduced; other formats are where a batch of them would fill the memory.
        """
        side = max(header.width, header.height)
        usable = [r for r in (8, 4, 2) if side / r >= self.working_side]
        wanted = header.format == "jpeg" or header.width * header.height > _KEPT_WHOLE
        return usable[0] if usable and wanted else 1
