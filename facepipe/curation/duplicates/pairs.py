"""Pairs of images that show the same: classified by bytes, perceptual hash and face distance."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.curation.duplicates.images import Images, codes_of
from facepipe.curation.duplicates.rule import EXACT, KINDS, NEAR, SAME_SHOT, DuplicateRule
from facepipe.imaging.perceptual import hamming, mirrored
from facepipe.types import Bool, Float32, Int64, UInt8

_IDENTICAL = 1e-4  # a distance that is nothing but rounding
_NO_HASH = 65


@dataclass(frozen=True)
class Links:
    """Pairs of faces (u, v: rows of the table of faces) of two images, or pairs of images (u, v = -1).

    a, b: image numbers, a < b; kind: index into KINDS; bits: differing bits of the hashes, 65 where one is missing.
    """

    u: Int64
    v: Int64
    a: Int64
    b: Int64
    distance: Float32
    bits: UInt8
    mirrored: Bool
    kind: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.a)

    def take(self, where: Any) -> "Links":
        """Some of the pairs."""
        return Links(*(getattr(self, name)[where] for name in self.__dataclass_fields__))

    def joined(self, other: "Links") -> "Links":
        """These pairs and others."""
        return Links(*(np.concatenate([getattr(x, n) for x in (self, other)]) for n in self.__dataclass_fields__))


def classified(images: Images, faces: pa.Table, edges: tuple[Int64, Int64, Float32], rule: DuplicateRule) -> Links:
    """The edges (u, v, distance) that link two images in one of the ways near and same_shot; others are left out."""
    links = _candidates(images, edges, rule.radius)
    hash_agrees = (links.bits <= rule.hash_bits) & (links.distance <= rule.near)
    hash_agrees |= (links.bits <= rule.close_bits) & (links.distance <= rule.close_near)
    codes = codes_of(faces["identity"])
    one, other = codes[links.u], codes[links.v]
    shot = (links.distance <= rule.same_shot) & ((one == other) | (one < 0) | (other < 0)) & _most_faces(images, links)
    kind = np.where(hash_agrees, KINDS.index(NEAR), KINDS.index(SAME_SHOT)).astype(np.int8)
    return replace(links, kind=kind).take(hash_agrees | shot)


def _candidates(images: Images, edges: tuple[Int64, Int64, Float32], radius: float) -> Links:
    """Edges of two images within the radius, with the hashes' differences."""
    u, v, distance = edges
    chosen = np.flatnonzero(np.asarray(distance) <= radius)
    u, v, distance = np.asarray(u)[chosen], np.asarray(v)[chosen], np.asarray(distance, np.float32)[chosen]
    a, b = images.of_face[u], images.of_face[v]
    turned = a > b
    u, v = np.where(turned, v, u), np.where(turned, u, v)
    a, b = np.minimum(a, b), np.maximum(a, b)
    hashes = images.numbers("image_hash")
    straight, flipped = hamming(hashes[a], hashes[b]), hamming(hashes[a], mirrored(hashes[b]))
    bits = np.where(images.hashed[a] & images.hashed[b], np.minimum(straight, flipped), _NO_HASH).astype(np.uint8)
    turned = (flipped < straight) & (bits < _NO_HASH)
    return Links(u, v, a, b, distance, bits, turned, np.zeros(len(a), np.int8)).take(a < b)


def _most_faces(images: Images, links: Links) -> Bool:
    """Whether more than half of the faces of the image with fewer have a partner: a face cut off by the border may
    resemble a stranger's, two of them hardly do.
    """
    if not len(links):
        return np.zeros(0, bool)
    pair = links.a * len(images) + links.b
    _, place = np.unique(pair, return_inverse=True)
    counts = []
    for nodes in (links.u, links.v):
        order = np.lexsort((nodes, place))
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(place[order]) != 0) | (np.diff(nodes[order]) != 0)
        counts.append(np.bincount(place[order][new]))
    fewer = np.minimum(images.faces[links.a], images.faces[links.b])
    return np.asarray(2 * np.minimum(*counts)[place] > fewer)


def pictures(images: Images, links: Links) -> Int64:
    """(images,) the first image of the same picture: the same bytes, or the same hash and the same embedding.

    Both are transitive, so copies need not be linked to each other one by one.
    """
    n = len(images)
    same = (links.distance <= _IDENTICAL) & (links.bits == 0) & ~links.mirrored
    rows, columns = np.concatenate([links.a[same], np.arange(n)]), np.concatenate([links.b[same], images.same_bytes])
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), (n, n))
    labels = connected_components(graph, directed=False)[1]
    _, first = np.unique(labels, return_index=True)
    return np.asarray(first[labels], np.int64)


def copies(images: Images, picture: Int64) -> Links:
    """Every image tied to the first of its bytes (exact), and every first of its bytes to the first of the picture."""
    own = np.arange(len(images))
    exact = own[images.same_bytes != own]
    alike = own[(images.same_bytes == own) & (picture != own)]
    a, b = np.concatenate([images.same_bytes[exact], picture[alike]]), np.concatenate([exact, alike])
    kind = np.repeat([KINDS.index(EXACT), KINDS.index(NEAR)], [len(exact), len(alike)]).astype(np.int8)
    none, zero = np.full(len(a), -1), np.zeros(len(a))
    tied = Links(none, none, a, b, zero.astype(np.float32), zero.astype(np.uint8), zero.astype(bool), kind)
    return tied.take(images.side[a] != images.side[b]) if images.compares else tied


def strongest(images: Images, faces: pa.Table, links: Links, picture: Int64) -> Links:
    """One link for two pictures: of the surest kind, then between two galleries, then the closest faces.

    Where galleries are compared, a picture that both hold counts as the other one's (side 1).
    """
    p, q = picture[links.a], picture[links.b]
    wanted = images.side[p] != images.side[q] if images.compares else p != q
    links, p, q = links.take(wanted), p[wanted], q[wanted]
    pair = np.minimum(p, q) * len(images) + np.maximum(p, q)
    within = images.side[links.a] == images.side[links.b]
    ids = pc.fill_null(faces["face_id"], 0).to_numpy()
    order = np.lexsort((ids[links.v], ids[links.u], links.b, links.a, links.distance, within, links.kind, pair))
    _, first = np.unique(pair[order], return_index=True)
    return links.take(order[first])


def as_table(images: Images, faces: pa.Table, links: Links) -> pa.Table:
    """The links as rows of uri, side, identity and face_id of both images, kind, distance, hash_bits, mirrored."""
    columns: dict[str, Any] = {}
    for end, rows, nodes in (("a", links.a, links.u), ("b", links.b, links.v)):
        chosen = images.table.select(["uri", "side", "identity", "face_id"]).take(pa.array(rows))
        columns |= {f"{name}_{end}": chosen[name] for name in ("uri", "side", "identity")}
        own = faces["face_id"].take(pa.array(nodes, mask=nodes < 0))
        columns[f"face_id_{end}"] = pc.coalesce(own, chosen["face_id"])
    columns["kind"] = pa.array(np.array(KINDS, object)[links.kind], pa.string())
    columns["distance"] = pa.array(links.distance, pa.float32())
    columns["hash_bits"] = pa.array(links.bits.astype(np.int16), pa.int16(), mask=links.bits == _NO_HASH)
    columns["mirrored"] = pa.array(links.mirrored, pa.bool_())
    return pa.table(columns)
