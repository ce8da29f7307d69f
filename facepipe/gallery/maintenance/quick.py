"""Check a gallery without reading its rows: whether the files that the log names are there, and have their sizes.

It takes a listing of one folder, and finds what most often goes wrong: a copy that was cut short, a bucket's rule that
deletes old objects, files that somebody moved. Whether bytes have changed is for `verify_gallery` to find.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.commits.log import LOG, list_empty_entries
from facepipe.gallery.maintenance.verify import Verification
from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64_each
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Int64, UInt64

# Names that are hashed or compared at a time.
_NAMES_AT_ONCE = 8192


def check_files(gallery: Gallery) -> Verification:
    """Check that the files of the gallery's version are there, with the sizes that its log names.

    Memory is 16 bytes per file, beside what the open table takes. Of what is in the files, only the log's counts are
    returned.
    """
    files = gallery.read_sizes()
    rows = pc.sum(files["rows"]).as_py() or 0
    faces = pc.sum(files["faces"]).as_py() or 0
    result = Verification(gallery.version, files=files.num_rows, rows=rows, faces=faces)
    for name in list_empty_entries(gallery.faces_folder):
        result.add(
            f"{name} of the log is empty: a power cut took a commit of an older facepipe. Embed its sources again"
        )
    hashes, sizes = _list_present(gallery.faces_folder)
    for start in range(0, files.num_rows, _NAMES_AT_ONCE):
        _compare(files.slice(start, _NAMES_AT_ONCE), hashes, sizes, result)
    try:
        len(gallery.marks)
    except StorageError as error:
        result.add(f"{gallery.marks_file}: {error}")
    return result


def _list_present(folder: str) -> tuple[UInt64, Int64]:
    """List the files in a table's folder: hashes of their names in order, (n,), and their sizes, (n,)."""
    start = len(folder.rstrip("/")) + 1
    hashes = [np.empty(0, np.uint64)]
    sizes = [np.empty(0, np.int64)]
    names: list[str] = []
    lengths: list[int] = []

    def add_pending() -> None:
        hashes.append(hash64_each(names))
        sizes.append(np.array(lengths, np.int64))
        names.clear()
        lengths.clear()

    for entry in storage.list_files(folder):
        name = entry.url[start:]
        if not name.startswith(f"{LOG}/"):
            names.append(name)
            lengths.append(entry.size)
        if len(names) >= _NAMES_AT_ONCE:
            add_pending()
    add_pending()
    present = np.concatenate(hashes)
    order = np.argsort(present)
    return present[order], np.concatenate(sizes)[order]


def _compare(files: pa.Table, hashes: UInt64, sizes: Int64, result: Verification) -> None:
    """Compare files of the log with those that were listed."""
    names = files["path"].to_pylist()
    at = find_sorted(hashes, hash64_each(names))
    expected = pc.fill_null(files["size_bytes"], -1).to_numpy()
    for n in np.flatnonzero(at < 0).tolist():
        result.add(f"{names[n]}: is missing")
    is_wrong = (at >= 0) & (expected >= 0) & (sizes[at] != expected) if len(sizes) else np.zeros(len(at), bool)
    for n in np.flatnonzero(is_wrong).tolist():
        result.add(f"{names[n]}: has {sizes[at[n]]} bytes, not {expected[n]}")
