"""Which file names can be images."""

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "gif"}
    | {"avif", "jp2", "pgm", "ppm", "pbm", "pnm", "heic", "heif", "jxl"}
)


def get_extension(name: str) -> str:
    """Lower-case extension without its dot."""
    last = name.rpartition("/")[2]
    stem, dot, kind = last.rpartition(".")
    return kind.lower() if dot and stem.strip(".") else ""  # names of dots, or that begin with one, have none


def is_web_url(name: str) -> bool:
    """Whether a name is an http(s) URL, which facepipe does not read."""
    return name.lower().startswith(("http://", "https://"))


def is_hidden(name: str) -> bool:
    """Dot files: `.DS_Store`, `._photo.jpg` and the like are never images."""
    return name.startswith(".", name.rfind("/") + 1)
