"""Draw pairs of images from a gallery's identities: a verification test without a pairs file.

An image stands for its subject, the face that `read_subject_rows` finds. So no pair holds two faces of one image, and
an image that several identities have (by its bytes) is left out. Nobody is in many more pairs than the others. A
gallery of any size is streamed: only the images of some identities, chosen by their hashes, are kept in memory.
"""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from facepipe import storage
from facepipe.errors import EvaluationError
from facepipe.evaluation.pairs import read_subject_rows
from facepipe.evaluation.pairs_file import FOLDS, Pair, to_image_name
from facepipe.gallery import Gallery
from facepipe.hashing import hash64
from facepipe.storage.owned import require_own_list
from facepipe.text import protect_cell
from facepipe.types import Int64

_COLUMNS = ("uri", "identity")
_FILE_COLUMNS = ("file_x", "file_y", "same")
_MAX_IMAGES = 50  # per identity
# Identities to choose from, per pair and at least: many have one image, and give no pair of one person.
_IDENTITIES_PER_PAIR = 4
_MIN_IDENTITIES = 1000
# Nobody is in more than this share of the pairs, nor in more than so many times the average person's.
_MAX_SHARE = 0.5
_MAX_TIMES_AVERAGE = 2.0
_MAX_ROUNDS = 20  # to find pairs that were not drawn before, beside those that are needed anyway


def draw_pairs(gallery: Gallery, count: int, seed: int = 0) -> list[Pair]:
    """Draw pairs of images, half of one person and half of two, by the gallery's labels.

    The same gallery and seed give the same pairs, in whatever order the rows are. There are fewer pairs if the
    gallery does not have as many without somebody dominating them.

    Args:
        gallery: gallery with labels.
        count: number of pairs.
        seed: random seed.

    Returns:
        Pairs of one person and of two in turn, in ten folds.

    Raises:
        EvaluationError: Labels are missing, or there are no pairs of one of the two kinds.
    """
    candidates = _Candidates(max(_MIN_IDENTITIES, _IDENTITIES_PER_PAIR * count), seed)
    for batch in gallery.batches(_COLUMNS, "face_id is not null"):
        candidates.add(batch["uri"].to_pylist(), batch["identity"].to_pylist())
    people = _find_people(gallery, candidates)
    # Draw as many of each kind, as LFW has them: accuracy means little else.
    rng = np.random.default_rng((seed, hash64("pairs")))
    genuine = _draw_genuine(people, max(1, count // 2), rng)
    impostors = _draw_impostors(people, len(genuine), rng)
    size = min(len(genuine), len(impostors))
    if not size:
        with_two = sum(len(names) > 1 for names in people)
        raise EvaluationError(
            f"{gallery.path!r} has {len(people)} identities, {with_two} of them with 2 images or more: pairs need 2 "
            "identities, one of them with 2 images. `facepipe embed --identity folder` takes labels from folder names"
        )
    drawn = [pair for both in zip(genuine[:size], impostors[:size], strict=True) for pair in both]
    # Folds as a CSV file of these pairs gets them.
    fold_size = -(-len(drawn) // FOLDS)
    return [Pair(left, right, same=n % 2 == 0, fold=n // fold_size) for n, (left, right) in enumerate(drawn)]


def write_pairs(path: str, pairs: list[Pair]) -> None:
    """Write pairs to a CSV file that `read_pairs` reads as the same pairs.

    Raises:
        ConfigError: There is a file that holds something else.
        StorageError: The file cannot be written.
    """
    require_own_list(path, _FILE_COLUMNS)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_FILE_COLUMNS)
    writer.writerows((pair.left, pair.right, int(pair.same)) for pair in pairs)
    storage.write(path, text.getvalue().encode())


@dataclass
class _Person:
    """An identity and its images.

    Attributes:
        order: hash that decides which identities are kept.
        images: hash of each image's uri, by uri.
    """

    order: int
    images: dict[str, int] = field(default_factory=dict)

    def trim(self) -> None:
        """Keep the images with the lowest hashes."""
        lowest = sorted(self.images, key=lambda uri: (self.images[uri], uri))[:_MAX_IMAGES]
        self.images = {uri: self.images[uri] for uri in lowest}


class _Candidates:
    """The identities with the lowest hashes, and the images with the lowest hashes of each.

    The choice does not depend on the order in which rows are added, and memory is bounded.
    """

    def __init__(self, most: int, seed: int):
        self._most = most
        self._seed = str(seed)
        self._people: dict[str, _Person] = {}
        self._limit = 1 << 64  # identities with this hash or a higher one are not among the lowest

    def add(self, uris: list[str], identities: list[str | None]) -> None:
        """Add rows of faces."""
        orders = {name: hash64("identity", self._seed, name) for name in set(identities) if name}
        for uri, name in zip(uris, identities, strict=True):
            if name and orders[name] < self._limit:
                person = self._people.setdefault(name, _Person(orders[name]))
                person.images[uri] = hash64("image", self._seed, uri)
                if len(person.images) > 2 * _MAX_IMAGES:
                    person.trim()
        if len(self._people) > 2 * self._most:
            self._trim()

    def _trim(self) -> None:
        """Keep the identities with the lowest hashes."""
        ranked = sorted(self._people, key=lambda name: (self._people[name].order, name))
        for name in ranked[self._most :]:
            self._limit = min(self._limit, self._people.pop(name).order)

    def has_identity(self, name: str | None) -> bool:
        """Tell whether an identity is among those that are kept."""
        return name in self._people

    def iterate_images(self) -> Iterator[tuple[str, str]]:
        """Yield each identity and the uri of each of its images, in an order that follows from the seed."""
        self._trim()
        for name in sorted(self._people, key=lambda name: (self._people[name].order, name)):
            self._people[name].trim()
            for uri in self._people[name].images:
                yield name, uri


def _find_people(gallery: Gallery, candidates: _Candidates) -> list[list[str]]:
    """Find the images whose subject has the identity, as names for a pairs file, per identity.

    An image is left out if a pairs file cannot name it, or if another image has its name or its bytes: of copies that
    one person has, the first is kept.
    """
    # Names that two images share tell nothing.
    uris: dict[str, set[str]] = defaultdict(set)
    for uri in dict.fromkeys(uri for _, uri in candidates.iterate_images()):
        name = _to_pair_name(uri)
        if name is not None:
            uris[name].add(uri)
    names = [name for name, same_name in uris.items() if len(same_name) == 1]
    subjects = read_subject_rows(gallery, set(names), ["identity", "image_id"])
    # The subject may be somebody else than the face that has a label.
    labelled = [name for name in names if candidates.has_identity(subjects[name]["identity"])]
    holders: dict[str, set[str]] = defaultdict(set)
    for name in labelled:
        holders[subjects[name]["image_id"]].add(subjects[name]["identity"])
    people: dict[str, list[str]] = {}
    used: set[str] = set()
    for name in labelled:
        image = subjects[name]["image_id"]
        if len(holders[image]) == 1 and image not in used:
            used.add(image)
            people.setdefault(subjects[name]["identity"], []).append(name)
    return list(people.values())


def _to_pair_name(uri: str) -> str | None:
    """Return what a pairs file calls an image, or None if it cannot name it."""
    cell = uri.replace("#", "/")
    name = os.path.splitext(cell)[0]
    # The name must be read as it was written, and a spreadsheet must not change it.
    is_plain = cell.isprintable() and protect_cell(cell) == cell
    return name if is_plain and to_image_name(cell) == name == to_image_name(name) else None


def _draw_genuine(people: list[list[str]], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Draw pairs of two images of one person."""
    sizes = np.array([len(names) for names in people], np.int64)
    quotas = choose_quotas(sizes * (sizes - 1) // 2, count, rng)
    pairs: list[tuple[str, str]] = []
    for names, quota in zip(people, quotas, strict=True):
        left, right = np.triu_indices(len(names), 1)
        chosen = rng.choice(len(left), quota, replace=False) if quota else []
        pairs += [(names[left[n]], names[right[n]]) for n in chosen]
    return [pairs[n] for n in rng.permutation(len(pairs))]


def choose_quotas(possible: Int64, count: int, rng: np.random.Generator) -> Int64:
    """Choose how many pairs each person gives, as evenly as possible.

    Args:
        possible: pairs that each person can give, (p,).
        count: pairs in all.
        rng: random numbers, which decide who gives one more.

    Returns:
        Pairs that each person gives, (p,): `count` in all, or fewer if somebody would be in more than half of them or
        in more than twice as many as the average person who can give any.
    """
    quotas = np.zeros_like(possible)
    givers = max(1, int((possible > 0).sum()))
    share = min(_MAX_SHARE, _MAX_TIMES_AVERAGE / givers)
    while True:
        # One more from each who can give one, or from some of them at random.
        more = np.flatnonzero(possible > quotas)
        more = rng.permutation(more)[: count - int(quotas.sum())]
        if not len(more):
            return quotas
        raised = quotas.copy()
        raised[more] += 1
        if raised.max() > max(1.0, share * raised.sum()):
            return quotas
        quotas = raised


def _draw_impostors(people: list[list[str]], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Draw pairs of images of two persons, none twice. In each round everybody is in two pairs."""
    if len(people) < 2:
        return []
    pairs: dict[tuple[str, str], None] = {}
    for _ in range(-(-count // len(people)) + _MAX_ROUNDS):
        order = rng.permutation(len(people))
        partners = np.roll(order, int(rng.integers(1, len(people))))
        for one, other in zip(order, partners, strict=True):
            if len(pairs) == count:
                return list(pairs)
            left = people[one][rng.integers(len(people[one]))]
            right = people[other][rng.integers(len(people[other]))]
            if (right, left) not in pairs:
                pairs[left, right] = None
    return list(pairs)
