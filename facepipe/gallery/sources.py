"""The sources of a gallery: under which name each one's rows stand, and where it is.

A source is known by its place. Its name is the last part of its path, or what the user calls it, and two sources may
want the same one. So the table keeps which name belongs to which place, and nothing outside of its place can be missing
from a source.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.errors import ConfigError, GalleryError
from facepipe.gallery.table import Gallery
from facepipe.sources.paths import PathChange
from facepipe.sources.place import SourcePlace
from facepipe.text import escape_undecodable
from facepipe.types import Bool

SOURCES_PROPERTY = "facepipe.sources"
"""Name of the table property that holds the sources."""

# Losses of this long before the last listing count together: several small ones are one large one.
LOSS_DAYS = 7.0


@dataclass(frozen=True)
class Listing:
    """A listing of a source after which missing images were marked.

    Attributes:
        at: ISO time.
        images: Images that the source listed.
        at_most: Share of its images that could be missing.
    """

    at: str
    images: int
    at_most: float


@dataclass(frozen=True)
class GallerySource:
    """A source whose images are in a gallery.

    Attributes:
        name: Value of the column `source`.
        root: Path or URL of the source.
        glob: Glob of the paths below the root that it lists; empty for all.
        is_open: Whether its images may lie anywhere, as those of a list may.
        former_roots: Where it was before.
        is_strict: Whether rows of this name may be of another source, so that only those below the root are its own.
        listings: Listings that count for the guard against losses.
        boxes: Digest of the lists that gave its faces in the last run; empty for none.
    """

    name: str
    root: str
    glob: str = ""
    is_open: bool = False
    former_roots: tuple[str, ...] = ()
    is_strict: bool = False
    listings: tuple[Listing, ...] = ()
    boxes: str = ""

    def list_own_roots(self) -> tuple[str, ...]:
        """List the places that all its images lie at; none if they may lie anywhere."""
        return () if self.is_open and not self.is_strict else (self.root, *self.former_roots)

    def _leave(self, other: "GallerySource") -> "GallerySource":
        """Return the source without the former places at which another one is now."""
        left = tuple(root for root in self.former_roots if not _overlap(root, other.root))
        return self if left == self.former_roots else replace(self, former_roots=left)

    def add_listing(self, images: int, at_most: float, now: datetime) -> "GallerySource":
        """Return the source with another listing, without those that do not count any more."""
        earliest = now - timedelta(days=LOSS_DAYS)
        listings = [
            listing
            for listing in self.listings
            # A longer listing later makes an earlier one meaningless.
            if listing.images > images and datetime.fromisoformat(listing.at) >= earliest
        ]
        # Whoever allows a larger loss accepts it: counting begins anew.
        if any(listing.at_most < at_most for listing in listings):
            listings = []
        # The same listing again changes nothing, and needs no commit.
        last = self.listings[-1] if self.listings else None
        if (
            last is not None
            and (last.images, last.at_most) == (images, at_most)
            and len(listings) + 1 == len(self.listings)
        ):
            return self
        return replace(self, listings=(*listings, Listing(now.isoformat(timespec="seconds"), images, at_most)))

    def find_largest_listing(self, at_most: float) -> Listing | None:
        """Find the listing that the next one is compared with.

        Args:
            at_most: share of images that may be missing now. Listings before one with a larger share do not count,
                because the loss until then was accepted.
        """
        counted: list[Listing] = []
        for listing in self.listings:
            if listing.at_most > at_most:
                counted = []
            counted.append(listing)
        return max(counted, key=lambda listing: listing.images, default=None)


@dataclass(frozen=True)
class SourceRows:
    """Tells which rows of a gallery are of a source.

    Attributes:
        source: The source.
        place: Where it is now.
    """

    source: GallerySource
    place: SourcePlace

    def list_changes(self) -> tuple[PathChange, ...]:
        """List the changes that lead from where the source is to where it was before."""
        return tuple(
            PathChange(self.place.root if _is_file(former) else self.place.folder, former)
            for former in self.source.former_roots
        )

    def contains(self, rows: pa.Table | pa.RecordBatch) -> Bool:
        """Tell of rows whether they are of the source.

        Args:
            rows: n rows with the columns `source` and `uri`.

        Returns:
            (n,).
        """
        has_name: Bool = pc.fill_null(pc.equal(rows["source"], self.source.name), False).to_numpy(zero_copy_only=False)
        if not has_name.any():
            return has_name
        return has_name & self.place.contains(rows["uri"], self.source.former_roots, strict=self.source.is_strict)


@dataclass(frozen=True)
class SourceRegister:
    """The sources of a gallery.

    Attributes:
        sources: One per name and root.
    """

    sources: tuple[GallerySource, ...] = field(default_factory=tuple)

    @classmethod
    def read(cls, gallery: Gallery | None) -> "SourceRegister":
        """Read the register of a gallery; an empty one if it has none, as galleries of older versions.

        Raises:
            GalleryError: the register cannot be read.
        """
        text = gallery.get_property(SOURCES_PROPERTY) if gallery is not None else None
        if text is None:
            return cls()
        try:
            return cls(tuple(_decode_source(entry) for entry in json.loads(text)))
        except (TypeError, ValueError, KeyError) as error:
            raise GalleryError(f"the sources of the gallery cannot be read: {text[:300]}") from error

    def to_json(self) -> str:
        """Encode the register for the table's properties."""
        return json.dumps([_encode_source(source) for source in self.sources])

    def find(self, place: SourcePlace, name: str | None = None) -> GallerySource | None:
        """Find the source at a place; of several names for it the given one, or the first."""
        at_place = [source for source in self.sources if (source.root, source.glob) == (place.root, place.glob)]
        if name is not None:
            at_place = [source for source in at_place if source.name == name]
        return at_place[0] if at_place else None

    def put(self, source: GallerySource) -> "SourceRegister":
        """Return the register with a source, in the place of the one with its name, root and glob.

        What another source of this name was before is no longer its own, if this source is there now.
        """
        key = (source.name, source.root, source.glob)
        keys = [(other.name, other.root, other.glob) for other in self.sources]
        others = [other._leave(source) if other.name == source.name else other for other in self.sources]
        if key not in keys:
            return SourceRegister((*others, source))
        at = keys.index(key)
        return SourceRegister((*others[:at], source, *others[at + 1 :]))

    def remove(self, source: GallerySource) -> "SourceRegister":
        """Return the register without a source."""
        return SourceRegister(tuple(other for other in self.sources if other != source))


def write_source(gallery: Gallery, source: GallerySource) -> None:
    """Write what is known of a source into the register of a gallery, if it has changed."""
    register = SourceRegister.read(gallery)
    changed = register.put(source)
    if changed != register:
        gallery.set_property(SOURCES_PROPERTY, changed.to_json())


def _overlap(root: str, other: str) -> bool:
    """Tell whether one of two places lies in the other."""
    inner = f"{root.rstrip('/')}/"
    outer = f"{other.rstrip('/')}/"
    return inner.startswith(outer) or outer.startswith(inner)


def _is_file(root: str) -> bool:
    return root.lower().endswith((".parquet", ".pq"))


def _encode_source(source: GallerySource) -> dict[str, object]:
    values = asdict(source)
    # Older versions know no such field; most sources have no lists.
    if not source.boxes:
        del values["boxes"]
    return values


def _decode_source(entry: dict[str, object]) -> GallerySource:
    values = dict(entry)
    values["former_roots"] = tuple(values.get("former_roots", ()))  # type: ignore[arg-type]
    values["listings"] = tuple(Listing(**listing) for listing in values.get("listings", ()))  # type: ignore[attr-defined]
    return GallerySource(**values)  # type: ignore[arg-type]


def name_source(
    register: SourceRegister,
    place: SourcePlace,
    name: str | None,
    gallery: Gallery | None,
    *,
    freed: str | None = None,
) -> GallerySource:
    """Find under which name a gallery has a source, or choose one.

    A name that the user gives is kept. Otherwise a source gets the last part of its path, and more of the path if
    another source has that name already.

    Args:
        register: the sources that the gallery knows.
        place: where the source is.
        name: name that the user gives; None for none.
        gallery: the gallery; None if there is none yet.
        freed: name whose rows become those of this source.

    Raises:
        ConfigError: the name is that of another source, and their images could not be told apart.
    """
    name = None if name is None else escape_undecodable(name)
    known = register.find(place, name)
    if known is not None:
        return known
    if name is not None:
        return _share_name(register, place, name, None if name == freed else gallery)
    for candidate in _list_names(place):
        others = [source for source in register.sources if source.name == candidate]
        has_rows, has_own_rows = (False, False) if candidate == freed else _look_for_rows(gallery, candidate, place)
        # Globs of one folder share its name. So do the rows of an older gallery, whatever their place is.
        may_share = all(source.root == place.root for source in others) or (has_own_rows and not place.is_open)
        is_free = not has_rows or place.is_open
        if may_share and (others or has_own_rows or is_free):
            return _make_source(candidate, place, is_strict=has_rows or bool(others))
    return _make_source(_list_names(place)[-1], place, is_strict=True)


def _share_name(register: SourceRegister, place: SourcePlace, name: str, gallery: Gallery | None) -> GallerySource:
    """Give a source the name that the user wants, which another one may have as well."""
    others = [source for source in register.sources if source.name == name and source.root != place.root]
    if others and (place.is_open or any(source.is_open for source in others)):
        raise ConfigError(
            f"source.name={name!r} is the name of {others[0].root!r} in this gallery, and the images of a list may lie "
            f"anywhere: give {place.root!r} another name, such as --set source.name={_list_names(place)[1]}"
        )
    has_rows, _ = _look_for_rows(gallery, name, place)
    return _make_source(name, place, is_strict=has_rows or bool(others))


def _make_source(name: str, place: SourcePlace, *, is_strict: bool) -> GallerySource:
    return GallerySource(name, place.root, place.glob, place.is_open, is_strict=is_strict)


def _list_names(place: SourcePlace) -> list[str]:
    """List names for a source, shortest first: its own, then with more and more of its path."""
    parts = [part for part in place.root.split("/") if part]
    parents = parts[:-1]
    longer = ["/".join([*parents[-count:], place.name]) for count in range(1, len(parents) + 1)]
    return [escape_undecodable(name) for name in (place.name, *longer, place.root)]


def _look_for_rows(gallery: Gallery | None, name: str, place: SourcePlace) -> tuple[bool, bool]:
    """Tell whether a gallery has rows under a name, and whether any of them lies at a place."""
    has_rows = False
    if gallery is None:
        return False, False
    for batch in gallery.batches(["uri"], ds.field("source") == name):
        has_rows = True
        if place.contains(batch["uri"], strict=True).any():
            return True, True
    return has_rows, False
