"""What OpenCV reads from the environment once, when it is imported: `facepipe` sets it before anything else."""

import os

# A second lock behind the check of a file's header (`decode.max_pixels`).
MAX_PIXELS = 1 << 28


def set_environment() -> None:
    """Limit the pixels that OpenCV decodes, and silence its log. What the environment already says stays."""
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
