"""Draw synthetic faces that are as hard to tell apart as real ones: spaces, sizes of identities, and noise in labels.

`bench/galleries.py` draws all faces of one quality and all persons from one normal distribution, and its faces are far easier
than photos. Here every face has a quality: a poor one lies farther from its person, and nearer to the direction in which
blurred faces gather. Persons come in groups, some of them dense, and may have relatives. The constants of `Hardness` were
chosen so that distances spread as LFW's do; `tests/test_hard_faces.py` compares them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from bench.galleries import CONTRACT, STATS, append, rows

from facepipe.gallery import Contract, Gallery

# Sizes and sharpness of faces of mean quality, as LFW's faces have them.
_MEAN_PX = 80.0
_MEAN_SHARPNESS = 120.0


@dataclass(frozen=True)
class Hardness:
    """What makes faces hard to tell apart.

    Attributes:
        quality_spread: Standard deviation of the logarithm of a face's noise.
        same_session: Share of the faces that are of one session with another face of their person.
        groups: Number of groups of persons.
        group_share: Share of the variance between persons that lies between groups.
        density_spread: Standard deviation of the logarithm of a group's spread: dense and sparse groups.
        look_alikes: Share of the persons who resemble somebody else.
        likeness: Share of the variance that such a person has in common with the other, at most.
        spectrum: Exponent of the variances between persons: above 1 they differ in fewer directions.
        blur: How far a poor face moves toward the direction of blurred faces, per unit of excess noise.
    """

    quality_spread: float = 0.22
    same_session: float = 0.05
    groups: int = 12
    group_share: float = 0.1
    density_spread: float = 0.03
    look_alikes: float = 0.5
    likeness: float = 0.75
    spectrum: float = 1.1
    blur: float = 0.2


# A margin keeps look-alikes apart. There is no real gallery of such a network here to compare this with.
ANGULAR = Hardness(look_alikes=0.3, likeness=0.45)
EASY = Hardness(0.0, 0.0, 1, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_SESSION_SHARE = 0.7  # of the noise of two faces of one session that they have in common


@dataclass(frozen=True)
class DrawnFaces:
    """Faces with what is known of them.

    Attributes:
        person: Who it really is, (n,). -1 for a bystander or outsider who is nobody in the set.
        vectors: Unit vectors, (n, d).
        noise: Noise of each face, (n,); 1 is the mean, more is worse.
        label: The name that the face is given, (n,). By default the person.
        photo: Number of the photo, (n,). By default one per face.
        picture: Number of the picture, (n,), which copies of a photo have in common. By default the photo.
    """

    person: np.ndarray
    vectors: np.ndarray
    noise: np.ndarray
    label: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    photo: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    picture: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.label):
            object.__setattr__(self, "label", self.person.copy())
        if not len(self.photo):
            object.__setattr__(self, "photo", np.arange(len(self.person)))
        if not len(self.picture):
            object.__setattr__(self, "picture", self.photo.copy())

    def __len__(self) -> int:
        return len(self.person)

    @property
    def is_wrong(self) -> np.ndarray:
        """Whether the label is not the person's, (n,)."""
        return self.label != self.person

    def take(self, chosen: np.ndarray) -> "DrawnFaces":
        """Return some of the faces."""
        return DrawnFaces(
            self.person[chosen],
            self.vectors[chosen],
            self.noise[chosen],
            self.label[chosen],
            self.photo[chosen],
            self.picture[chosen],
        )

    def concatenate(self, other: "DrawnFaces") -> "DrawnFaces":
        """Append other faces, which are in other photos."""
        first_photo = int(self.photo.max(initial=-1)) + 1
        first_picture = int(self.picture.max(initial=-1)) + 1
        return DrawnFaces(
            np.concatenate([self.person, other.person]),
            np.concatenate([self.vectors, other.vectors]),
            np.concatenate([self.noise, other.noise]),
            np.concatenate([self.label, other.label]),
            np.concatenate([self.photo, other.photo + first_photo]),
            np.concatenate([self.picture, other.picture + first_picture]),
        )


class Space(Protocol):
    """An embedding space to draw persons and their faces from."""

    def draw_centres(self, count: int, *, relatives: int = 1, kinship: float = 0.0) -> np.ndarray:
        """Draw centres (count, d). `relatives` persons in a row share `kinship` of their variance."""

    def draw(self, centres: np.ndarray, person: np.ndarray) -> DrawnFaces:
        """Draw one face per entry of `person` (n,), a position in the centres."""


class DlibLike:
    """Faces with the means and covariances that dlib's network has on LFW.

    A centre is normal between persons, a face is normal around its centre, and `hardness` distorts both.
    """

    def __init__(self, seed: int, hardness: Hardness | None = None, stats: Path = STATS):
        self._rng = np.random.default_rng([seed, 11])
        self.hardness = hardness or Hardness()
        moments = np.load(stats)
        self._mean = moments["mean"].astype(np.float64)
        self._between = _root(moments["between"], self.hardness.spectrum)
        self._within = _root(moments["within"], 1.0)
        self._blurred = self._mean + self._rng.standard_normal(len(self._mean)) @ self._between.T

    def draw_centres(self, count: int, *, relatives: int = 1, kinship: float = 0.0) -> np.ndarray:
        """Draw centres (count, 128)."""
        hardness = self.hardness
        person = _draw_persons(self._rng, count, len(self._mean), hardness, relatives=relatives, kinship=kinship)
        # Some groups are dense: their persons vary less.
        group = self._rng.integers(0, hardness.groups, count // relatives + 1).repeat(relatives)[:count]
        shift = self._rng.standard_normal((hardness.groups, len(self._mean)))
        spread = np.exp(hardness.density_spread * self._rng.standard_normal(hardness.groups))
        person *= (spread / np.sqrt((spread**2).mean()))[group][:, None]
        mixed = np.sqrt(hardness.group_share) * shift[group] + np.sqrt(1 - hardness.group_share) * person
        return np.asarray(self._mean + mixed @ self._between.T)

    def draw(self, centres: np.ndarray, person: np.ndarray) -> DrawnFaces:
        """Draw one face per entry of `person`."""
        noise = _draw_noise(self._rng, len(person), self.hardness.quality_spread)
        offset = _draw_offsets(self._rng, person, len(self._mean), self.hardness.same_session)
        vectors = centres[person] + noise[:, None] * (offset @ self._within.T)
        vectors += _compute_blur(noise, self.hardness.blur) * (self._blurred - vectors)
        return DrawnFaces(person.copy(), _to_unit(vectors), noise)

    def blur(self, faces: DrawnFaces, is_blurred: np.ndarray) -> DrawnFaces:
        """Let faces collapse on the direction of blurred ones."""
        return _blur(faces, is_blurred, _to_unit(self._blurred[None])[0], self._rng)


class ArcFaceLike:
    """Directions as networks with an angular margin give them: about von Mises-Fisher, in 512 dimensions.

    Strangers are nearly orthogonal. The variance falls over the dimensions, as in networks that are trained on few
    million persons. A projection to 128 keeps the largest ones, as a principal component analysis does.
    """

    def __init__(self, seed: int, genuine: float = 0.65, *, dimension: int = 128, hardness: Hardness | None = None):
        self._rng = np.random.default_rng([seed, 12])
        self.hardness = hardness or ANGULAR
        self._noise = np.sqrt(1 / genuine - 1)
        self._dimension = dimension
        self._size = max(512, dimension)
        spectrum = np.exp(-np.arange(self._size) / (110 * self._size / 512))
        self._spectrum = spectrum / np.linalg.norm(spectrum)
        self._blurred = (self._rng.standard_normal((1, self._size)) * self._spectrum)[0]

    def draw_centres(self, count: int, *, relatives: int = 1, kinship: float = 0.0) -> np.ndarray:
        """Draw centres (count, 512), or longer ones for longer vectors."""
        person = _draw_persons(self._rng, count, self._size, self.hardness, relatives=relatives, kinship=kinship)
        return _to_unit(person * self._spectrum)

    def draw(self, centres: np.ndarray, person: np.ndarray) -> DrawnFaces:
        """Draw one face per entry of `person`."""
        noise = _draw_noise(self._rng, len(person), self.hardness.quality_spread)
        offset = _draw_offsets(self._rng, person, self._size, self.hardness.same_session) * self._spectrum
        vectors = centres[person] + (self._noise * noise)[:, None] * offset
        vectors += _compute_blur(noise, self.hardness.blur) * (self._blurred - vectors)
        return DrawnFaces(person.copy(), _to_unit(vectors[:, : self._dimension]), noise)

    def blur(self, faces: DrawnFaces, is_blurred: np.ndarray) -> DrawnFaces:
        """Let faces collapse on the direction of blurred ones."""
        return _blur(faces, is_blurred, _to_unit(self._blurred[None, : self._dimension])[0], self._rng)


def _draw_persons(
    rng: np.random.Generator, count: int, dimension: int, hardness: Hardness, *, relatives: int, kinship: float
) -> np.ndarray:
    """Draw standard normal persons (count, d): families in a row, and some look-alikes."""
    family = rng.standard_normal((count // relatives + 1, dimension)).repeat(relatives, axis=0)[:count]
    person = np.sqrt(kinship) * family + np.sqrt(1 - kinship) * rng.standard_normal((count, dimension))
    # A look-alike has a part of its variance from another person.
    is_like = rng.random(count) < hardness.look_alikes
    share = np.where(is_like, hardness.likeness * np.sqrt(rng.random(count)), 0)[:, None]
    other = rng.integers(0, count, count)
    return np.asarray(np.sqrt(1 - share) * person + np.sqrt(share) * person[other])


def _draw_noise(rng: np.random.Generator, count: int, spread: float) -> np.ndarray:
    """Draw the noise (n,) of faces: log-normal, with a mean square of 1."""
    return np.asarray(np.exp(spread * rng.standard_normal(count) - spread**2))


def _draw_offsets(rng: np.random.Generator, person: np.ndarray, dimension: int, same_session: float) -> np.ndarray:
    """Draw standard normal offsets (n, d). Some have a part in common with the face of their person before them."""
    offset = rng.standard_normal((len(person), dimension))
    order = np.argsort(person, kind="stable")
    is_repeated = (np.diff(person[order], prepend=-1) == 0) & (rng.random(len(person)) < same_session)
    at = np.flatnonzero(is_repeated)
    mixed = np.sqrt(_SESSION_SHARE) * offset[order[at - 1]] + np.sqrt(1 - _SESSION_SHARE) * offset[order[at]]
    offset[order[at]] = mixed
    return np.asarray(offset)


def _compute_blur(noise: np.ndarray, blur: float) -> np.ndarray:
    """Compute how far faces (n, 1) move toward the direction of blurred ones, from 0 to 1."""
    return np.asarray(np.minimum(1, blur * np.maximum(noise - 1, 0))[:, None])


def _blur(faces: DrawnFaces, is_blurred: np.ndarray, direction: np.ndarray, rng: np.random.Generator) -> DrawnFaces:
    vectors = faces.vectors.copy()
    jitter = rng.standard_normal(vectors[is_blurred].shape) * (0.2 / np.sqrt(vectors.shape[1]))
    vectors[is_blurred] = _to_unit(0.35 * vectors[is_blurred] + direction + jitter)
    return replace(faces, vectors=vectors, noise=np.where(is_blurred, faces.noise + 3, faces.noise))


# --- sizes of identities --------------------------------------------------------------------------------------------------


def draw_geometric(count: int, mean: float, seed: int) -> np.ndarray:
    """Draw the persons (n,) of `count` faces, with a geometric number of faces each."""
    rng = np.random.default_rng([seed, 21])
    sizes = rng.geometric(1 / mean, int(count / mean * 1.5) + 10)
    return np.repeat(np.arange(len(sizes)), sizes)[:count]


def draw_zipf(count: int, persons: int, seed: int, exponent: float = 1.0) -> np.ndarray:
    """Draw the persons (n,) of `count` faces, the k-th person as often as 1 / k ** exponent."""
    share = 1 / np.arange(1, persons + 1) ** exponent
    person = np.random.default_rng([seed, 22]).choice(persons, count, p=share / share.sum())
    return np.unique(person, return_inverse=True)[1]


def draw_uneven(count: int, persons: int, seed: int) -> np.ndarray:
    """Draw the persons (n,) of an album: log-normal shares."""
    rng = np.random.default_rng([seed, 23])
    share = rng.lognormal(0, 1, persons)
    return np.unique(rng.choice(persons, count, p=share / share.sum()), return_inverse=True)[1]


def add_large_person(person: np.ndarray, count: int) -> np.ndarray:
    """Put one person of `count` faces before the others."""
    return np.concatenate([np.zeros(count, np.int64), person + bool(count)])


# --- noise in labels ------------------------------------------------------------------------------------------------------


def swap_labels(faces: DrawnFaces, rate: float, seed: int, chosen: np.ndarray | None = None) -> DrawnFaces:
    """Give faces the label of another identity, each with a probability of `rate`; of the `chosen` (n,) ones only."""
    rng = np.random.default_rng([seed, 31])
    names = np.unique(faces.label[chosen] if chosen is not None else faces.label)
    is_swapped = rng.random(len(faces)) < rate
    if chosen is not None:
        is_swapped &= chosen
    at = np.searchsorted(names, faces.label)
    other = names[(at + rng.integers(1, max(2, len(names)), len(faces))) % len(names)]
    return replace(faces, label=np.where(is_swapped, other, faces.label))


def add_outsiders(faces: DrawnFaces, outsiders: DrawnFaces, seed: int) -> DrawnFaces:
    """Add faces of nobody in the set, under labels drawn as often as they are used."""
    rng = np.random.default_rng([seed, 32])
    labels = faces.label[rng.integers(0, len(faces), len(outsiders))]
    nobody = np.full(len(outsiders), -1)
    return faces.concatenate(replace(outsiders, person=nobody, label=labels))


def add_copied_outsider(faces: DrawnFaces, outsiders: DrawnFaces, labels: Sequence[int], copies: int) -> DrawnFaces:
    """Add one outsider per label, `copies` times: the same picture compressed again, some 0.09 apart."""
    rng = np.random.default_rng([copies, 33])
    vectors = np.repeat(outsiders.vectors[: len(labels)], copies, axis=0)
    vectors = _to_unit(vectors + 0.09 / np.sqrt(2 * vectors.shape[1]) * rng.standard_normal(vectors.shape))
    noise = np.repeat(outsiders.noise[: len(labels)], copies)
    picture = np.repeat(np.arange(len(labels)), copies)
    added = DrawnFaces(
        np.full(len(vectors), -1), vectors, noise, np.repeat(np.asarray(labels), copies), picture=picture
    )
    return faces.concatenate(added)


def join_two_persons(faces: DrawnFaces, first: int, second: int) -> DrawnFaces:
    """Put the faces of a second person under the label of the first."""
    return replace(faces, label=np.where(faces.label == second, first, faces.label))


def add_bystanders(faces: DrawnFaces, bystanders: DrawnFaces, photos: np.ndarray) -> DrawnFaces:
    """Add one stranger to each of some photos, under the photo's label. They are smaller, but not always."""
    added = replace(bystanders, person=np.full(len(bystanders), -1), label=faces.label[photos])
    both = faces.concatenate(added)
    photo = both.photo.copy()
    photo[len(faces) :] = faces.photo[photos]
    return replace(both, photo=photo, picture=photo)


# --- galleries ------------------------------------------------------------------------------------------------------------


def make_table(faces: DrawnFaces, seed: int = 0) -> pa.Table:
    """Build the rows of a gallery: poor faces are small, blurred and of a low score."""
    rng = np.random.default_rng([seed, 41])
    table = rows(faces.label, faces.vectors, 0)
    count = len(faces)
    # Of one photo the first face is the largest and lies in the centre.
    _, first, inverse = np.unique(faces.photo, return_index=True, return_inverse=True)
    is_first = first[inverse] == np.arange(count)
    face_px = _MEAN_PX * np.exp(0.3 * rng.standard_normal(count)) / np.maximum(0.3, faces.noise)
    face_px[~is_first] *= rng.uniform(0.4, 0.9, int((~is_first).sum()))
    left = np.where(is_first, 125 - face_px / 2, rng.uniform(0, 60, count))
    box = np.stack([left, 125 - face_px / 2, left + face_px, 125 + face_px / 2], axis=1).astype(np.float32)
    photo = inverse.ravel()
    columns = {
        "uri": pa.array([f"/synthetic/{n // 1000:06d}/{n:09d}.jpg" for n in photo.tolist()]),
        "image_id": pa.array([f"{n:032x}" for n in photo.tolist()]),
        "face_index": pa.array(np.where(is_first, 0, 1).astype(np.int16)),
        "image_hash": pa.array(rng.integers(-(2**63), 2**63, int(faces.picture.max(initial=0)) + 1)[faces.picture]),
        "width": pa.array(np.full(count, 250, np.int32)),
        "height": pa.array(np.full(count, 250, np.int32)),
        "box": pa.FixedSizeListArray.from_arrays(box.ravel(), 4).cast(pa.list_(pa.float32())),
        "face_px": pa.array(face_px.astype(np.float32)),
        "sharpness": pa.array((_MEAN_SHARPNESS / np.maximum(0.3, faces.noise) ** 3).astype(np.float32)),
        "det_score": pa.array(np.clip(1 - 0.1 * faces.noise, 0.05, 1).astype(np.float32)),
    }
    for name, values in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(name), values.cast(table.schema.field(name).type))
    return table


def make_hard_gallery(path: Path, faces: DrawnFaces, contract: Contract = CONTRACT, seed: int = 0) -> Gallery:
    """Make a gallery of drawn faces. Its rows are in a random order."""
    table = make_table(faces, seed)
    table = table.take(pa.array(np.random.default_rng([seed, 42]).permutation(len(faces))))
    append(
        Gallery.create(str(path), contract), [table.slice(at, 50_000) for at in range(0, len(faces), 50_000)], "hard"
    )
    return Gallery(str(path))


def _root(covariance: np.ndarray, exponent: float) -> np.ndarray:
    """Compute a root of a covariance whose variances are raised to a power; their sum stays."""
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    values = np.maximum(values, 0)
    raised = values**exponent
    return np.asarray(vectors * np.sqrt(raised * (values.sum() / raised.sum())))


def _to_unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(norms, 1e-12), np.float32)
