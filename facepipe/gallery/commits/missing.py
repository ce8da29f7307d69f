"""Images that the gallery holds and their source lists no more: found by the listing, marked by the driver."""

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


@dataclass(frozen=True)
class MissingUris:
    """What a listing found: how many images are missing, of how many; how many places it could not list; and the
    hashes of the missing uris, or None where there are too many or the listing is incomplete."""

    count: int
    of: int
    broken: int
    uris: UInt64 | None


def write_missing(path: str, found: MissingUris) -> None:
    """Leave it for the driver, which may be on another machine."""
    uris = np.empty(0, np.uint64) if found.uris is None else found.uris
    head = np.array([found.count, found.of, found.broken], np.uint64)
    storage.make_parent_folder(path)
    storage.write(path, np.concatenate([head, uris]).astype("<u8").tobytes())


def read_missing(path: str) -> MissingUris:
    """What a listing left."""
    values = np.frombuffer(storage.read(path.encode()), "<u8")
    if len(values) < 3:
        raise StorageError(f"{path!r} is cut short")
    count, of, broken = (int(value) for value in values[:3])
    return MissingUris(count, of, broken, values[3:] if len(values) - 3 == count else None)


def mark_missing(gallery: Gallery, source: str, path: str, commit: Committer) -> tuple[int, str]:
    """Give the missing images' rows the time in `missing_since`: (how many images, why none was marked)."""
    found = read_missing(path)
    if found.broken:
        return 0, f"{found.broken} places of the source could not be listed"
    if found.uris is None:
        return 0, f"{found.count} of {found.of} images are missing at once, {TOO_MANY_MISSING}"
    if not found.count:
        return 0, ""
    images = 0
    now = pa.scalar(datetime.now(UTC), FACES.field("missing_since").type)
    wanted = np.sort(found.uris)

    def matches(rows: pa.Table) -> Any:
        new = pc.and_(pc.equal(rows["source"], source), pc.is_null(rows["missing_since"]))
        return pc.and_(new, pa.array(np.isin(hash64_column(rows["uri"]), wanted)))

    def change(rows: pa.Table, mask: Any) -> pa.Table:
        nonlocal images
        first = pc.and_(mask, pc.fill_null(pc.equal(rows["face_index"], 0), True))
        images += pc.sum(first).as_py() or 0
        n = FACES.get_field_index("missing_since")
        return rows.set_column(n, FACES.field(n), pc.if_else(mask, now, rows["missing_since"]))

    def may_match(file: dict[str, Any]) -> bool:
        return (file.get("min.source") or "") <= source <= (file.get("max.source") or source)

    def actions() -> list[Any]:
        nonlocal images
        images = 0
        what = Rewrite(("uri", "source", "missing_since", "face_index"), matches, change, may_match, data_change=False)
        return list(rewrite_files(Gallery(gallery.path), what))

    commit.commit_actions(actions, {"job": "missing"})
    return images, ""
