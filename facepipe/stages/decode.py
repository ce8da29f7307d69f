"""Decode: from bytes to pixels, at the smallest scale that is enough for the detector."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import cv2
import pyarrow as pa

from facepipe.arrow import pack_arrays, set_columns, view_buffers
from facepipe.imaging.decode import DecodeError, decode
from facepipe.imaging.geometry import Frame, bound_by_area, locate_frame
from facepipe.imaging.header import Header, HeaderError, read_header
from facepipe.imaging.perceptual import compute_perceptual_hash
from facepipe.schema import DECODE_ERROR, OK, TOO_LARGE
from facepipe.types import UInt8

_MAX_SIDE = (1 << 31) - 1  # what the columns `width` and `height` hold
_MAX_WHOLE_PIXELS = 1 << 24  # larger images are reduced whatever their format


class DecodedImage(NamedTuple):
    """What decoding an image gives: pixels, or the reason why there are none.

    Attributes:
        status: as in the gallery
        error: reason, or None
        width: width of the full-size image as it is seen, if it is known
        height: height of the full-size image as it is seen, if it is known
        pixels: RGB, (h, w, 3)
        frame: where the pixels lie in the full-size image
        image_hash: perceptual hash
    """

    status: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    pixels: UInt8 | None = None
    frame: Frame | None = None
    image_hash: int | None = None


@dataclass(frozen=True)
class Decode:
    """Decode images. The format is detected from the content.

    Attributes:
        max_pixels: maximum number of pixels; larger images become `too_large`, from their header alone
        max_whole_pixels: the same for images that have to be decoded whole before they are reduced: progressive JPEGs,
            and all other formats
        working_side: JPEGs are decoded at 1/2, 1/4 or 1/8 if their longer side keeps at least this many pixels (more if
            they are more than twice as long as high); a face that needs a larger scale gets it. At least `detect.size`
        max_scans: maximum number of passes of a JPEG over the picture; others become `too_large`, because a pass of a
            dozen bytes may take the time of a whole image. Encoders write about ten
        threads: images decoded in parallel; 1 if every core has its own worker
    """

    max_pixels: int = 250_000_000
    max_whole_pixels: int = 100_000_000
    working_side: int = 640
    max_scans: int = 100
    threads: int = 1

    needs: ClassVar = ("bytes", "status", "error")
    adds: ClassVar = (
        "pixels",
        "pixels_width",
        "pixels_height",
        "pixels_scale",
        "pixels_left",
        "pixels_top",
        "width",
        "height",
        "image_hash",
    )

    def raise_working_side(self, size: int) -> "Decode":
        """Return these options with at least the pixels that a detector takes.

        Args:
            size: longest side of the detector's input. It shrinks what it gets, so more pixels would never reach it.
        """
        return replace(self, working_side=max(self.working_side, size))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "decode")

    def setup(self) -> None:
        """Keep OpenCV to one thread per call."""
        cv2.setNumThreads(1)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Add pixels, sizes and hashes; set the status of images that cannot be decoded."""
        files = list(view_buffers(table["bytes"]))
        decoded = iter(self.decode_images([data for data in files if data is not None]))
        # A row without bytes keeps its status and error.
        rows = zip(files, table["status"].to_pylist(), table["error"].to_pylist(), strict=True)
        results = [DecodedImage(status, error) if data is None else next(decoded) for data, status, error in rows]
        # Height and width of the decoded pixels, which may be smaller than the full-size image.
        shapes = [(None, None) if result.pixels is None else result.pixels.shape[:2] for result in results]
        frames = [result.frame for result in results]
        columns = {
            "status": pa.array([result.status for result in results], pa.string()),
            "error": pa.array([result.error for result in results], pa.string()),
            "pixels": pack_arrays([result.pixels for result in results]),
            "pixels_height": pa.array([height for height, _ in shapes], pa.int32()),
            "pixels_width": pa.array([width for _, width in shapes], pa.int32()),
            "pixels_scale": pa.array([frame and frame.scale for frame in frames], pa.float64()),
            "pixels_left": pa.array([frame and frame.left for frame in frames], pa.float64()),
            "pixels_top": pa.array([frame and frame.top for frame in frames], pa.float64()),
            "width": pa.array([result.width for result in results], pa.int32()),
            "height": pa.array([result.height for result in results], pa.int32()),
            "image_hash": pa.array([result.image_hash for result in results], pa.int64()),
        }
        return set_columns(table, columns)

    def estimate_bytes(self, table: pa.Table) -> list[int]:
        """Estimate how many bytes the pixels of each row will take; 0 for a row that will have none."""
        return [0 if data is None else self._estimate_pixel_bytes(data) for data in view_buffers(table["bytes"])]

    def _estimate_pixel_bytes(self, data: memoryview) -> int:
        try:
            header = read_header(bytes(data))
        except HeaderError:
            return 0
        if header.width * header.height > self.max_pixels:
            return 0
        reduce = self.choose_reduction(header)
        return 3 * -(-header.width // reduce) * -(-header.height // reduce)

    def decode_images(self, files: Sequence[memoryview]) -> Iterable[DecodedImage]:
        """Decode the image files of a table, in order.

        A decoder on a GPU is a subclass with another function here. It gets all files of a table at once, and must keep
        the limits of `check_header`.
        """

        def decode_file(file: memoryview) -> DecodedImage:
            return self.decode_image(bytes(file))

        return self._pool.map(decode_file, files) if self.threads > 1 else map(decode_file, files)

    def decode_image(self, data: bytes) -> DecodedImage:
        """Decode one image file.

        Returns:
            The pixels, or the status and the reason of an image that cannot be decoded.
        """
        header = self.check_header(data)
        if isinstance(header, DecodedImage):
            return header
        # Decode, at a reduced scale if the detector needs no more.
        width, height = header.oriented_size
        reduce = self.choose_reduction(header)
        try:
            pixels = decode(data, header, reduce)
        except DecodeError as error:
            return DecodedImage(DECODE_ERROR, str(error), width, height)
        frame = locate_frame(header, reduce)
        return DecodedImage(OK, None, width, height, pixels, frame, compute_perceptual_hash(pixels))

    def check_header(self, data: bytes) -> Header | DecodedImage:
        """Read the header of an image file, which costs no memory for pixels.

        Returns:
            The header, or the status and the reason of an image that must not be decoded.
        """
        try:
            header = read_header(data)
        except HeaderError as error:
            return DecodedImage(DECODE_ERROR, str(error))
        width, height = header.oriented_size
        # A baseline JPEG is reduced while it is decoded. Any other image needs memory for all of its pixels.
        is_reducible = header.format == "jpeg" and header.scans == 1
        limit = self.max_pixels if is_reducible else min(self.max_pixels, self.max_whole_pixels)
        if width * height > limit:
            reason = f"{width}x{height} pixels, the limit is {limit}"
            # What a header claims may be too large for the columns.
            if max(width, height) > _MAX_SIDE:
                return DecodedImage(TOO_LARGE, reason)
            return DecodedImage(TOO_LARGE, reason, width, height)
        if header.scans > self.max_scans:
            return DecodedImage(TOO_LARGE, f"{header.scans} scans, the limit is {self.max_scans}", width, height)
        return header

    def choose_reduction(self, header: Header) -> int:
        """Choose the largest divisor (8, 4, 2 or 1) that leaves `working_side` pixels of the longer side.

        Only JPEG decodes faster when it is reduced. Images of other formats are reduced if they are so large that a
        batch of them would fill the memory.
        """
        is_large = header.width * header.height > _MAX_WHOLE_PIXELS
        if header.format != "jpeg" and not is_large:
            return 1
        side = max(header.width, header.height)
        needed = bound_by_area(self.working_side, header.width, header.height)
        return next((divisor for divisor in (8, 4, 2) if side / divisor >= needed), 1)
