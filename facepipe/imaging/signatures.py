"""Name the kinds of files that are not read, by their first bytes: an error then says what a file is."""

import re

from facepipe.imaging.isobmff import list_brands

# By first bytes. Longer ones come first if they begin alike.
_PREFIXES: tuple[tuple[bytes, str], ...] = (
    (b"8BPS", "psd (Photoshop)"),
    (b"\0\0\1\0", "ico (icon)"),
    (b"\0\0\2\0", "cur (cursor)"),
    (b"icns", "icns (icon)"),
    (b"%PDF", "pdf"),
    (b"%!PS", "eps (PostScript)"),
    (b"\xc5\xd0\xd3\xc6", "eps (PostScript)"),
    (b"DDS ", "dds"),
    (b"qoif", "qoi"),
    (b"v/1\1", "openexr"),
    (b"#?RADIANCE", "radiance hdr"),
    (b"#?RGBE", "radiance hdr"),
    (b"SIMPLE  =", "fits"),
    (b"gimp xcf", "xcf (GIMP)"),
    (b"AT&TFORM", "djvu"),
    (b"II\xbc", "jpeg xr"),
    (b"FUJIFILMCCD-RAW", "raf (camera raw)"),
    (b"IIU\0", "rw2 (camera raw)"),
    (b"IIRO", "orf (camera raw)"),
    (b"IIRS", "orf (camera raw)"),
    (b"FOVb", "x3f (camera raw)"),
    (b"\x01\xda", "sgi"),
    (b"\x59\xa6\x6a\x95", "sun raster"),
    (b"\xd7\xcd\xc6\x9a", "wmf"),
    (b"BPG\xfb", "bpg"),
    (b"BLP1", "blp"),
    (b"BLP2", "blp"),
    (b"P7", "pam"),
    (b"PF\n", "pfm"),
    (b"Pf\n", "pfm"),
    (b"/* XPM", "xpm"),
    (b"\xabKTX", "ktx"),
    (b"\x1aE\xdf\xa3", "matroska (a video)"),
    (b"FLV", "flv (a video)"),
    (b"OggS", "ogg (a video)"),
    (b"\0\0\1\xba", "mpeg (a video)"),
    (b"PK\3\4", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!", "rar"),
    (b"{\\rtf", "rtf"),
    (b"\xd0\xcf\x11\xe0", "an old office document"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"PAR1", "parquet"),
    (b"\x93NUMPY", "npy"),
    (b"\0\5\x16\7", "appledouble (a Mac's data beside a file)"),
)
_RIFF = {b"AVI ": "avi (a video)", b"WAVE": "wav (a sound)", b"ACON": "ani (cursor)"}
# By brands of an ISO base media file.
_BRANDS: tuple[tuple[bytes, str], ...] = (
    (b"crx ", "cr3 (camera raw)"),
    (b"qt  ", "mov (a video)"),
    (b"isom", "mp4 (a video)"),
    (b"mp4", "mp4 (a video)"),
    (b"M4", "mp4 (a video)"),
    (b"3g", "3gp (a video)"),
    (b"iso", "mp4 (a video)"),
    (b"mif1", "heif of an unknown codec"),
    (b"msf1", "heif of an unknown codec"),
)
_SVG = re.compile(rb"^\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml|<!--|<!DOCTYPE svg|<svg)", re.IGNORECASE)
_HTML = re.compile(rb"^\s*(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body)", re.IGNORECASE)


def name_unsupported(data: bytes) -> str | None:
    """Name the kind of a file that is not read as an image; None if its first bytes tell nothing."""
    for brand in list_brands(data):
        for prefix, name in _BRANDS:
            if brand.startswith(prefix):
                return name
    if data[:4] == b"RIFF" and data[8:12] in _RIFF:
        return _RIFF[data[8:12]]
    for prefix, name in _PREFIXES:
        if data.startswith(prefix):
            return name
    if _HTML.match(data[:256]):
        return "html"
    if _SVG.match(data[:256]):
        return "svg" if b"<svg" in data[:4096] else "xml"
    return None
