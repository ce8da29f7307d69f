"""Find duplicate images in a gallery or shared by two: exact, near and same-shot copies, and which one is kept."""

from dataclasses import dataclass

import pyarrow as pa

from facepipe.curation.duplicates.groups import ImageGroups, build_group_table, group_images
from facepipe.curation.duplicates.images import RankedImages, rank_images
from facepipe.curation.duplicates.keep import build_image_decisions
from facepipe.curation.duplicates.overlap import (
    SharedFaces,
    SharedIdentities,
    find_shared_identities,
    judge_shared_identities,
)
from facepipe.curation.duplicates.pairs import (
    ImageLinks,
    MeasureFaces,
    build_pair_table,
    classify_pairs,
    find_hash_pairs,
    find_pictures,
    link_by_hash,
    link_copies,
    select_strongest,
)
from facepipe.curation.duplicates.rule import DuplicateRule
from facepipe.nearest.similarity import Pairs
from facepipe.types import Int64

__all__ = [
    "DuplicateRule",
    "Duplicates",
    "SharedFaces",
    "SharedIdentities",
    "find_copies",
    "find_duplicates",
    "find_shared_identities",
    "judge_shared_identities",
]


@dataclass(frozen=True)
class Duplicates:
    """Tables of duplicates.

    Attributes:
        pairs: One row per two images (copies of the same bytes are tied to one of them): uri, side, identity and
            face_id of a and b, kind, distance (null if one has no face), hash_bits, mirrored,
            turned (degrees).
        groups: One row per group: group, kind, images, kept_uri, kept_side.
        decisions: One row per image: uri, side, image_id, decision (keep, drop), group, kind, kept_uri, kept_side,
            reason.
    """

    pairs: pa.Table
    groups: pa.Table
    decisions: pa.Table


@dataclass(frozen=True)
class ImageCopies:
    """Which images are copies of one another, by number.

    Attributes:
        picture: First image of the same picture as each image, (n,).
        links: At most one link per two pictures: the strongest.
        groups: Groups, and what is kept of each.
    """

    picture: Int64
    links: ImageLinks
    groups: ImageGroups


def find_copies(
    images: RankedImages,
    faces: pa.Table,
    edges: Pairs,
    rule: DuplicateRule,
    measure: MeasureFaces | None = None,
    hash_pairs: Int64 | None = None,
) -> ImageCopies:
    """Find which of n images are copies of one another.

    Args:
        images: images of the table, ranked by the rule.
        faces: as of `find_duplicates`.
        edges: likewise.
        rule: what counts as a duplicate, and which copy is kept.
        measure: as of `find_duplicates`.
        hash_pairs: pairs (m, 2) of images whose hashes nearly agree, if they are known already.
    """
    # Link the images, and find which show the same picture.
    hash_pairs = find_hash_pairs(images) if hash_pairs is None else hash_pairs
    links = classify_pairs(images, faces, edges, rule).concat(link_by_hash(images, faces, measure, rule, hash_pairs))
    picture = find_pictures(images, links)
    # One link per two pictures is enough to make groups.
    strongest = select_strongest(images, faces, links, picture)
    return ImageCopies(picture, strongest, group_images(images, picture, strongest, rule))


def find_duplicates(
    faces: pa.Table,
    edges: Pairs,
    rule: DuplicateRule,
    measure: MeasureFaces | None = None,
    images: RankedImages | None = None,
) -> Duplicates:
    """Find the duplicates among the images of a table of faces.

    With rows of `side` 1, only what both sides share is looked for. Neither the order of rows nor that of edges
    matters.

    Args:
        faces: face_id, image_id, uri, identity, image_hash, width, height, face_index, sharpness, face_px, ingested_at
            as in a gallery; side, int8, 0, or 1 for rows of the gallery it is compared with; file_size, int64, in
            bytes, if known. It may hold images without a face.
        edges: pairs of rows, u < v, with the distance of their unit embeddings. All pairs within `rule.radius` should
            be there. If a face has too many of them, its nearest are enough, and for identical vectors any pairs that
            connect them.
        rule: what counts as a duplicate, and which copy is kept.
        measure: computes the distances of the faces in rows u (m,) and v (m,). Without it, pictures that were squashed
            strongly are not found.
        images: images of the table, ranked by the rule, if they are known already.
    """
    images = images or rank_images(faces, rule.keep)
    copies = find_copies(images, faces, edges, rule, measure)
    # The table of pairs also ties every copy to one image of its picture.
    pairs = build_pair_table(images, faces, link_copies(images, copies.picture).concat(copies.links))
    order = [("uri_a", "ascending"), ("side_a", "ascending"), ("uri_b", "ascending"), ("side_b", "ascending")]
    return Duplicates(
        pairs=pairs.sort_by(order),
        groups=build_group_table(images, copies.groups),
        decisions=build_image_decisions(images, copies.groups, rule.keep),
    )
