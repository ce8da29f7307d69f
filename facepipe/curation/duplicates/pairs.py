"""Classify pairs of images that show the same, by bytes, perceptual hash and face distance."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.curation.duplicates.hashes import MAX_BITS, HashLookup, is_telling, make_variants
from facepipe.curation.duplicates.images import RankedImages, encode_strings
from facepipe.curation.duplicates.rule import EXACT, KINDS, NEAR, SAME_SHOT, DuplicateRule
from facepipe.imaging.perceptual import match_hashes
from facepipe.nearest.similarity import Pairs
from facepipe.types import Bool, Float32, Float64, Int64, UInt8

_IDENTICAL = 1e-4  # a distance that is nothing but rounding
_NO_HASH = 65
# Times the distance of compressed copies up to which faces of squashed pictures are. To 0.56 of the width: 0.375.
_SQUASHED = 1.6
_MIN_SQUASH = 0.02  # of the logarithm of the ratio of width and height

PAIR_SCHEMA = pa.schema(
    [
        ("uri_a", pa.string()),
        ("side_a", pa.int8()),
        ("identity_a", pa.string()),
        ("face_id_a", pa.int64()),
        ("uri_b", pa.string()),
        ("side_b", pa.int8()),
        ("identity_b", pa.string()),
        ("face_id_b", pa.int64()),
        ("kind", pa.string()),
        ("distance", pa.float32()),
        ("hash_bits", pa.int16()),
        ("mirrored", pa.bool_()),
        ("turned", pa.int16()),
    ]
)
MeasureFaces = Callable[[Int64, Int64], Float32]


@dataclass(frozen=True)
class ImageLinks:
    """Links between two images, by a pair of faces or by the images themselves.

    Attributes:
        u: Row of the first image's face in the table of faces, (m,), -1 for a link of the images themselves.
        v: Row of the second image's face, (m,).
        a: Number of the first image, (m,).
        b: Number of the second image, (m,), a < b.
        distance: Distance of the faces, (m,); NaN if one image has none.
        bits: Differing bits of the hashes, (m,), 65 if one is missing.
        is_mirrored: Whether one image is a mirror image of the other, (m,).
        turn: Degrees clockwise by which one image is turned against the other, (m,).
        kind: Index into KINDS, (m,).
    """

    u: Int64
    v: Int64
    a: Int64
    b: Int64
    distance: Float32
    bits: UInt8
    is_mirrored: Bool
    turn: Int64
    kind: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.a)

    def take(self, chosen: Any) -> "ImageLinks":
        """Take some of the links, by positions or by a mask."""
        columns = {field.name: getattr(self, field.name)[chosen] for field in fields(self)}
        return ImageLinks(**columns)

    def concat(self, other: "ImageLinks") -> "ImageLinks":
        """Append other links."""
        names = [field.name for field in fields(self)]
        return ImageLinks(**{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names})


def classify_pairs(images: RankedImages, faces: pa.Table, edges: Pairs, rule: DuplicateRule) -> ImageLinks:
    """Classify pairs of faces as near or same_shot links of their images. Pairs that are neither are left out.

    Args:
        images: images of the faces.
        faces: table of faces.
        edges: pairs of rows of `faces`, with the distance of the faces.
        rule: limits.
    """
    links = _build_links(images, edges, rule.radius)
    # Some copies move the hash and others the face, so that each pair of limits is strict in one of them.
    is_near = (links.bits <= rule.hash_bits) & (links.distance <= rule.near)
    is_near |= (links.bits <= rule.close_bits) & (links.distance <= rule.close_near)
    # Two known names that differ rule out one shot.
    codes = encode_strings(faces["identity"])
    first = codes[links.u]
    second = codes[links.v]
    may_be_same_person = (first == second) | (first < 0) | (second < 0)
    is_same_shot = (links.distance <= rule.same_shot) & may_be_same_person & _find_mostly_paired(images, links)
    kind = np.where(is_near, KINDS.index(NEAR), KINDS.index(SAME_SHOT)).astype(np.int8)
    return replace(links, kind=kind).take(is_near | is_same_shot)


def _build_links(images: RankedImages, edges: Pairs, radius: float) -> ImageLinks:
    """Build links from the edges of two images within the radius, with the differing bits of the hashes."""
    edges = edges.take(np.flatnonzero(np.asarray(edges.distance) <= radius))
    # The image that is kept first comes first.
    image_u = images.of_face[edges.u]
    image_v = images.of_face[edges.v]
    is_swapped = image_u > image_v
    a = np.minimum(image_u, image_v)
    b = np.maximum(image_u, image_v)
    # The hash agrees as it is, mirrored, or turned.
    hashes = images.get_numbers("image_hash")
    match = match_hashes(hashes[a], hashes[b])
    has_hashes = images.has_hash[a] & images.has_hash[b]
    bits = np.where(has_hashes, match.bits, _NO_HASH).astype(np.uint8)
    links = ImageLinks(
        u=np.where(is_swapped, edges.v, edges.u),
        v=np.where(is_swapped, edges.u, edges.v),
        a=a,
        b=b,
        distance=np.asarray(edges.distance, np.float32),
        bits=bits,
        is_mirrored=match.is_mirrored & has_hashes,
        turn=np.where(has_hashes, match.turn, 0),
        kind=np.zeros(len(a), np.int8),
    )
    return links.take(a < b)


def find_hash_pairs(images: RankedImages) -> Int64:
    """Find the pairs (m, 2) of images whose hashes nearly agree, and may be copies by that alone. The first is smaller.

    Of equal hashes the first image stands for all, and is paired with each of them.
    """
    hashes = images.get_numbers("image_hash")
    usable = np.flatnonzero(images.has_hash & is_telling(hashes))
    # Equal hashes are looked up once.
    unique, first, inverse = np.unique(hashes[usable], return_index=True, return_inverse=True)
    has_face = images.face_counts > 0
    first_image = usable[first]
    # Of equal pictures the first one is linked to all others.
    a = [first_image[inverse]]
    b = [usable]
    # Pictures as they are; those without a face also mirrored and turned, against all.
    lookup = HashLookup(unique)
    straight = lookup.find(unique)
    a.append(first_image[straight.query])
    b.append(first_image[straight.other])
    faceless = usable[~has_face[usable]]
    for variant in make_variants(hashes[faceless])[1:]:
        turned = lookup.find(variant)
        a.append(faceless[turned.query])
        b.append(first_image[turned.other])
    return order_pairs(np.concatenate(a), np.concatenate(b), len(images))


def order_pairs(one: Int64, other: Int64, count: int) -> Int64:
    """Order pairs of two different images of `count`: each once, (m, 2), the smaller number first."""
    size = max(1, count)
    keys = np.unique((np.minimum(one, other) * size + np.maximum(one, other))[one != other])
    return np.stack([keys // size, keys % size], axis=1)


def link_by_hash(
    images: RankedImages, faces: pa.Table, measure: MeasureFaces | None, rule: DuplicateRule, pairs: Int64
) -> ImageLinks:
    """Link images that are copies by their hashes alone: where one has no face, or the picture was squashed.

    Args:
        images: n images.
        faces: table of faces.
        measure: computes the distances of the faces in rows u (m,) and v (m,) of the table. Without it, images with
            faces are not linked by their hashes.
        rule: limits.
        pairs: pairs (m, 2) of images whose hashes nearly agree, as of `find_hash_pairs`.
    """
    hashes = images.get_numbers("image_hash")
    has_face = images.face_counts > 0
    match = match_hashes(hashes[pairs[:, 0]], hashes[pairs[:, 1]])
    is_faceless = ~(has_face[pairs[:, 0]] & has_face[pairs[:, 1]])
    distance = np.full(len(pairs), np.nan, np.float32)
    # Pictures of one hash and two shapes: the faces are squashed too, and still resemble each other.
    rows = _find_largest_faces(images, faces)
    is_squashed = ~is_faceless & (match.turn == 0) & _find_squashed(images, pairs)
    if measure is None:
        is_squashed[:] = False
    elif is_squashed.any():
        distance[is_squashed] = measure(rows[pairs[is_squashed, 0]], rows[pairs[is_squashed, 1]])
        is_squashed &= distance <= _SQUASHED * rule.close_near
    chosen = (match.bits <= MAX_BITS) & (is_faceless | is_squashed)
    with_faces = is_squashed[chosen]
    return ImageLinks(
        u=np.where(with_faces, rows[pairs[chosen, 0]], -1),
        v=np.where(with_faces, rows[pairs[chosen, 1]], -1),
        a=pairs[chosen, 0],
        b=pairs[chosen, 1],
        distance=distance[chosen],
        bits=match.bits[chosen],
        is_mirrored=match.is_mirrored[chosen],
        turn=match.turn[chosen],
        kind=np.full(int(chosen.sum()), KINDS.index(NEAR), np.int8),
    )


def _find_largest_faces(images: RankedImages, faces: pa.Table) -> Int64:
    """Find the row of the largest face of each image (n,); -1 without a face."""
    ids = pc.fill_null(faces["face_id"], -1).to_numpy()
    return np.where(ids[images.row] >= 0, images.row, -1)


def _find_squashed(images: RankedImages, pairs: Int64) -> Bool:
    """Say which pairs (m, 2) of images have two shapes."""
    shape = compute_shapes(images.get_numbers("width"), images.get_numbers("height"))
    return have_two_shapes(shape[pairs[:, 0]], shape[pairs[:, 1]])


def compute_shapes(width: Int64, height: Int64) -> Float64:
    """Compute the ratio of width and height of images (n,)."""
    return np.asarray(width / np.maximum(1, height), np.float64)


def have_two_shapes(one: Float64, other: Float64) -> Bool:
    """Say which pairs of images have two shapes, by the ratios (m,) and (m,) of width and height."""
    ratio = one / np.maximum(1e-9, other)
    return np.asarray(np.abs(np.log(np.maximum(ratio, 1e-9))) > _MIN_SQUASH, bool)


def _find_mostly_paired(images: RankedImages, links: ImageLinks) -> Bool:
    """Find the links (m,) for which more than half of the faces of the image with fewer faces have a partner.

    A face that the border cuts off may resemble a stranger's. Two of them hardly do.
    """
    if not len(links):
        return np.zeros(0, bool)
    # `number` (m,) tells which two images each link joins.
    pair = links.a * len(images) + links.b
    _, number = np.unique(pair, return_inverse=True)
    counts = []
    for faces in (links.u, links.v):
        # Count each face once per pair of images.
        order = np.lexsort((faces, number))
        is_new = np.ones(len(order), bool)
        is_new[1:] = (np.diff(number[order]) != 0) | (np.diff(faces[order]) != 0)
        counts.append(np.bincount(number[order][is_new]))
    fewer = np.minimum(images.face_counts[links.a], images.face_counts[links.b])
    return np.asarray(2 * np.minimum(*counts)[number] > fewer)


def find_pictures(images: RankedImages, links: ImageLinks) -> Int64:
    """Find the first image of the same picture for each image (n,).

    A picture is the same if the bytes are, or both the hash and the embedding. Both are transitive, so that copies need
    not be linked to each other one by one.
    """
    count = len(images)
    is_upright = ~links.is_mirrored & (links.turn == 0)
    is_identical = (links.distance <= _IDENTICAL) & (links.bits == 0) & is_upright
    # Components of images with equal bytes, or with equal hash and embedding.
    rows = np.concatenate([links.a[is_identical], np.arange(count)])
    columns = np.concatenate([links.b[is_identical], images.first_with_bytes])
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), (count, count))
    labels = connected_components(graph, directed=False)[1]
    _, first = np.unique(labels, return_index=True)
    return np.asarray(first[labels], np.int64)


def link_copies(images: RankedImages, picture: Int64) -> ImageLinks:
    """Link every image to the first of its bytes (exact), and every first of its bytes to the first of its picture.

    Args:
        images: n images.
        picture: first image of the same picture, (n,).
    """
    own = np.arange(len(images))
    exact = own[images.first_with_bytes != own]
    near = own[(images.first_with_bytes == own) & (picture != own)]
    a = np.concatenate([images.first_with_bytes[exact], picture[near]])
    b = np.concatenate([exact, near])
    links = ImageLinks(
        u=np.full(len(a), -1),
        v=np.full(len(a), -1),
        a=a,
        b=b,
        distance=np.zeros(len(a), np.float32),
        bits=np.zeros(len(a), np.uint8),
        is_mirrored=np.zeros(len(a), bool),
        turn=np.zeros(len(a), np.int64),
        kind=np.repeat([KINDS.index(EXACT), KINDS.index(NEAR)], [len(exact), len(near)]).astype(np.int8),
    )
    return links.take(images.side[a] != images.side[b]) if images.has_two_sides else links


def select_strongest(images: RankedImages, faces: pa.Table, links: ImageLinks, picture: Int64) -> ImageLinks:
    """Select one link per two pictures: of the surest kind, then between two galleries, then of the closest faces.

    If galleries are compared, a picture that both hold counts as the other one's (side 1).
    """
    # The pictures at both ends of each link, (m,).
    p = picture[links.a]
    q = picture[links.b]
    is_wanted = images.side[p] != images.side[q] if images.has_two_sides else p != q
    links = links.take(is_wanted)
    p = p[is_wanted]
    q = q[is_wanted]
    pair = np.minimum(p, q) * len(images) + np.maximum(p, q)
    is_within_side = images.side[links.a] == images.side[links.b]
    ids = pc.fill_null(faces["face_id"], 0).to_numpy()
    # The last key counts most; the ids make ties independent of the order of rows.
    keys = (ids[links.v], ids[links.u], links.b, links.a, links.distance, is_within_side, links.kind, pair)
    order = np.lexsort(keys)
    _, first = np.unique(pair[order], return_index=True)
    return links.take(order[first])


def build_pair_table(images: RankedImages, faces: pa.Table, links: ImageLinks) -> pa.Table:
    """Build one row per link.

    Columns are uri, side, identity and face_id of both images, kind, distance, hash_bits, mirrored and turned.
    """
    columns: dict[str, Any] = {}
    for end, numbers, rows in (("a", links.a, links.u), ("b", links.b, links.v)):
        chosen = images.take(["uri", "side", "identity", "face_id"], numbers)
        columns |= {f"{name}_{end}": chosen[name] for name in ("uri", "side", "identity")}
        # A link without a face of its own names the face that stands for the image.
        own = faces["face_id"].take(pa.array(rows, mask=rows < 0))
        columns[f"face_id_{end}"] = pc.coalesce(own, chosen["face_id"])
    columns["kind"] = pa.array(np.array(KINDS, object)[links.kind], pa.string())
    columns["distance"] = pa.array(links.distance, pa.float32(), mask=np.isnan(links.distance))
    columns["hash_bits"] = pa.array(links.bits.astype(np.int16), pa.int16(), mask=links.bits == _NO_HASH)
    columns["mirrored"] = pa.array(links.is_mirrored, pa.bool_())
    columns["turned"] = pa.array(links.turn.astype(np.int16))
    return pa.table(columns)
