"""Duplicate images in a gallery, or shared by two: exact, near, and of the same shot; which copy of each stays."""

from dataclasses import dataclass

import pyarrow as pa

from facepipe.curation.duplicates import groups as _groups
from facepipe.curation.duplicates import pairs as _pairs
from facepipe.curation.duplicates.groups import grouped
from facepipe.curation.duplicates.images import images_of
from facepipe.curation.duplicates.keep import decisions
from facepipe.curation.duplicates.overlap import shared_identities
from facepipe.curation.duplicates.rule import DuplicateRule
from facepipe.types import Float32, Int64

__all__ = ["DuplicateRule", "Duplicates", "find_duplicates", "shared_identities"]


@dataclass(frozen=True)
class Duplicates:
    """pairs: one row for two images (copies of the same bytes are tied to one of them): uri, side, identity and face_id
      of a and b, kind, distance, hash_bits, mirrored.
    groups: one row a group: group, kind, images, kept_uri, kept_side.
    decisions: one row an image: uri, side, image_id, decision (keep, drop), group, kind, kept_uri, kept_side, reason.
    """

    pairs: pa.Table
    groups: pa.Table
    decisions: pa.Table


def find_duplicates(faces: pa.Table, u: Int64, v: Int64, distance: Float32, rule: DuplicateRule) -> Duplicates:
    """Duplicates among the images of a table of faces, which may hold images without a face.

    faces: face_id, image_id, uri, identity, image_hash, width, height, face_index, sharpness, face_px, ingested_at as
    in a gallery; side int8 (0, or 1 for rows of the gallery it is compared with); file_size int64 in bytes, if known.
    u, v (n,) int64: rows of the table, u < v; distance (n,) float32: Euclidean, of unit embeddings. All pairs within
    `rule.radius` should be there, but where many are closer than that the nearest of each face will do, and for
    identical vectors any pairs that connect them. With rows of `side` 1, only what both sides share is looked for.
    Neither the order of rows nor that of edges matters.
    """
    images = images_of(faces, rule.keep)
    links = _pairs.classified(images, faces, (u, v, distance), rule)
    picture = _pairs.pictures(images, links)
    between = _pairs.strongest(images, faces, links, picture)
    grouping = grouped(images, picture, between, rule)
    table = _pairs.as_table(images, faces, _pairs.copies(images, picture).joined(between))
    order = [("uri_a", "ascending"), ("side_a", "ascending"), ("uri_b", "ascending"), ("side_b", "ascending")]
    return Duplicates(table.sort_by(order), _groups.as_table(images, grouping), decisions(images, grouping, rule.keep))
