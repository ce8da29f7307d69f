"""Images that the gallery holds and their source no longer lists: the listing finds them, the driver marks them."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.rewrite import Rewrite, rewrite_files
from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64_column
from facepipe.schema import FACES
from facepipe.types import UInt64

TOO_MANY_MISSING = "more than missing.at_most allows"
# A file begins with these numbers: missing images, images of the source, places that could not be listed.
_HEADER_NUMBERS = 3


@dataclass(frozen=True)
class MissingUris:
    """What a listing found out about missing images.

    Attributes:
        count: Missing images.
        of: Images that the gallery holds of the source.
        broken: Places that could not be listed.
        uris: Hashes of the missing uris; None if they are too many or the listing is incomplete.
    """

    count: int
    of: int
    broken: int
    uris: UInt64 | None


def write_missing(path: str, missing: MissingUris) -> None:
    """Write the result of a listing for the driver, which may be on another machine."""
    uris = np.empty(0, np.uint64) if missing.uris is None else missing.uris
    header = np.array([missing.count, missing.of, missing.broken], np.uint64)
    storage.make_parent_folder(path)
    storage.write(path, np.concatenate([header, uris]).astype("<u8").tobytes())


def read_missing(path: str) -> MissingUris:
    """Read the result of a listing."""
    values = np.frombuffer(storage.read(path.encode()), "<u8")
    if len(values) < _HEADER_NUMBERS:
        raise StorageError(f"{path!r} is cut short")
    count, total, broken = (int(value) for value in values[:_HEADER_NUMBERS])
    uris = values[_HEADER_NUMBERS:]
    # The writer leaves the hashes out if they are too many; then their number differs from the count.
    return MissingUris(count, total, broken, uris if len(uris) == count else None)


def mark_missing(gallery: Gallery, source: str, path: str, commit: Committer) -> tuple[int, str]:
    """Set `missing_since` in the rows of missing images.

    Args:
        gallery: the gallery.
        source: name of the source that was listed.
        path: where the listing wrote its result.
        commit: commits the change.

    Returns:
        How many images were marked, and why none was; the reason is empty if nothing went wrong.
    """
    missing = read_missing(path)
    # An incomplete listing, or one that lacks too much, marks nothing.
    if missing.broken:
        return 0, f"{missing.broken} places of the source could not be listed"
    if missing.uris is None:
        return 0, f"{missing.count} of {missing.of} images are missing at once, {TOO_MANY_MISSING}"
    if not missing.count:
        return 0, ""
    image_count = 0
    now = pa.scalar(datetime.now(UTC), FACES.field("missing_since").type)
    wanted = np.sort(missing.uris)

    def find_rows(rows: pa.Table) -> Any:
        is_unmarked = pc.and_(pc.equal(rows["source"], source), pc.is_null(rows["missing_since"]))
        return pc.and_(is_unmarked, pa.array(np.isin(hash64_column(rows["uri"]), wanted)))

    def set_time(rows: pa.Table, mask: Any) -> pa.Table:
        nonlocal image_count
        # An image has several rows: its first face, or its only row, counts.
        first_rows = pc.and_(mask, pc.fill_null(pc.equal(rows["face_index"], 0), True))
        image_count += pc.sum(first_rows).as_py() or 0
        n = FACES.get_field_index("missing_since")
        return rows.set_column(n, FACES.field(n), pc.if_else(mask, now, rows["missing_since"]))

    def may_hold_source(file: dict[str, Any]) -> bool:
        # A file without statistics of the source may hold it.
        return (file.get("min.source") or "") <= source <= (file.get("max.source") or source)

    def make_actions() -> list[Any]:
        # The count begins anew because a commit that was overtaken is made again.
        nonlocal image_count
        image_count = 0
        rewrite = Rewrite(
            columns=("uri", "source", "missing_since", "face_index"),
            matches=find_rows,
            change=set_time,
            may_match=may_hold_source,
            data_change=False,
        )
        return list(rewrite_files(Gallery(gallery.path), rewrite))

    commit.commit_actions(make_actions, {"job": "missing"})
    return image_count, ""
