"""Which file names can be images."""

import os

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "gif"}
    | {"avif", "jp2", "pgm", "ppm", "pbm", "pnm", "heic", "heif", "jxl"}
)


def extension(name: str) -> str:
    """Lower-case extension without its dot."""
    return os.path.splitext(name)[1][1:].lower()


def is_web(name: str) -> bool:
    """Whether a name is an http(s) URL, which facepipe does not read."""
    return name.lower().startswith(("http://", "https://"))


def is_hidden(name: str) -> bool:
    """Dot files: `.DS_Store`, `._photo.jpg` and the like are never images."""
    return os.path.basename(name).startswith(".")
