"""Verification of a network in training on pairs of chips: LFW's protocol on a pairs file, or pairs drawn from the
identities that are held out. The chips are cut before training; only the embedding is done anew.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from facepipe.errors import ConfigError, EvaluationError
from facepipe.evaluation.pairs import figures
from facepipe.evaluation.pairs_file import Pair, read_pairs
from facepipe.sources.identity import IdentityRule
from facepipe.training.data.chip_set import ChipSet
from facepipe.training.data.chip_writer import normalise_name
from facepipe.training.data.config import DataConfig
from facepipe.training.data.image_names import ImageNames
from facepipe.types import Bool, Float32, Float64, Int64, UInt8Image

Count = Annotated[int, Field(ge=1)]
_FARTHEST = 2.0  # of unit vectors: a picture without a face matches nothing
_DRAWN_FOLDS = 10
_STREAM = 1_000_003  # sets these random numbers apart from those of the same seed elsewhere


@dataclass(frozen=True)
class ValidateConfig:
    """What the network is scored on while it trains: the pairs of a file, or, without one, pairs drawn from the part of
    the data that is held out (split).

    pairs: LFW's pairs.txt, or a CSV with file_x, file_y, same; needs `source` or `gallery`
    source, gallery: where the images of the pairs are: anything that `facepipe embed` reads, or what it made
    root, aligned, detector: of the source, as in `[data]`
    held_only: of a file's pairs only those count of which neither person is trained on
    genuine, impostors: how many pairs are drawn at most; of genuine ones there may be fewer
    flip: the raw vectors of a chip and of its mirror image are averaged, as `facepipe embed` does
    batch: chips given to the network at a time
    """

    pairs: str = ""
    source: str = ""
    gallery: str = ""
    root: str | None = None
    aligned: bool = False
    detector: str = "retinaface-mnet025"
    held_only: bool = False
    genuine: Count = 3000
    impostors: Count = 3000
    flip: bool = True
    batch: Count = 64

    @property
    def data(self) -> DataConfig:
        """Where the images of a pairs file are. Raises ConfigError where that is not said, or said without need."""
        if not self.pairs:
            raise ConfigError("validate.pairs names no file; without one the pairs are drawn from the held-out part")
        if bool(self.source) == bool(self.gallery):
            raise ConfigError("validate.pairs needs the images it names: set validate.source or validate.gallery")
        rule: IdentityRule = "auto"
        return DataConfig(
            self.gallery, "", self.source, rule, self.root, aligned=self.aligned, detector=self.detector
        ).check()


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs of chips.

    left, right (p,) int64: rows of `chips`, -1 where no face was found; same (p,); folds (p,)
    description: how the pairs came about, for reports; is_drawn: not from a file
    """

    chips: ChipSet
    left: Int64
    right: Int64
    same: Bool
    folds: Int64
    description: str
    is_drawn: bool = False

    def __len__(self) -> int:
        return len(self.left)

    @classmethod
    def from_names(cls, chips: ChipSet, pairs: list[Pair], what: str) -> "PairSet":
        """Pairs of a file; an image of which there is no chip has none.

        Raises EvaluationError where no pair has two chips, or where all pairs are of one kind.
        """
        names = ImageNames(name for pair in pairs for name in (pair.left, pair.right))
        rows = {name: row for row, uri in enumerate(chips.uris) if (name := names.find_name(uri)) is not None}
        left, right = (
            np.array([rows.get(name, -1) for name in side], np.int64)
            for side in ([pair.left for pair in pairs], [pair.right for pair in pairs])
        )
        found = cls(
            chips, left, right, np.array([p.same for p in pairs], bool), np.array([p.fold for p in pairs]), what
        )
        return found._require_both_kinds()

    @classmethod
    def draw(cls, chips: ChipSet, config: ValidateConfig, seed: int = 0, held: Int64 | None = None) -> "PairSet":
        """Pairs of a set of held-out chips: all genuine ones, or a choice of `config.genuine`, and as many impostors as
        asked for. Folds are random.

        held: rows of `chips` that are held out, where the others are trained on: each is paired with one image at most
        of its identity, and with others', of either part.
        """
        rng = np.random.default_rng((seed, _STREAM))
        labels = np.asarray(chips.labels)
        if held is None:
            genuine = _draw_genuine(labels, config.genuine, rng)
        else:
            genuine = _draw_partners(labels, held, config.genuine, rng)
        impostors = _draw_impostors(labels, config.impostors, rng, held)
        both = np.concatenate([genuine, impostors])
        same = np.arange(len(both)) < len(genuine)
        kinds = (rng.permutation(len(part)) % _DRAWN_FOLDS for part in (genuine, impostors))  # both in every fold
        of = f"{labels.max(initial=-1) + 1} held-out identities" if held is None else f"{len(held)} held-out images"
        what = f"{len(genuine)} genuine and {len(impostors)} impostor pairs drawn from {of}"
        return cls(chips, both[:, 0], both[:, 1], same, np.concatenate(list(kinds)), what, True)._require_both_kinds()

    def _require_both_kinds(self) -> "PairSet":
        whole = (self.left >= 0) & (self.right >= 0)
        if not (whole & self.same).any() or not (whole & ~self.same).any():
            raise EvaluationError(
                f"{self.description}: {int((whole & self.same).sum())} genuine and "
                f"{int((whole & ~self.same).sum())} impostor "
                "pairs have faces in both images, and both kinds are needed: hold out more identities with 2 images or "
                "more, or check the pairs file and its images"
            )
        return self


def read_validation_pairs(config: ValidateConfig, trained: Iterable[str] = ()) -> list[Pair]:
    """The pairs of config.pairs; with config.held_only those without a person that is in `trained`."""
    pairs = read_pairs(config.pairs)
    return select_held_pairs(pairs, trained) if config.held_only else pairs


def select_held_pairs(pairs: list[Pair], trained: Iterable[str]) -> list[Pair]:
    """Pairs of which neither image is of a person in `trained`; the person is the folder an image's name has.

    Folds keep their numbers. Raises EvaluationError for names without folders.
    """
    if odd := next((name for pair in pairs for name in (pair.left, pair.right) if "/" not in name), None):
        raise EvaluationError(f"{odd!r} does not say who it is: validate.held_only needs names like Person/Image")
    seen = {normalise_name(name) for name in trained}
    return [pair for pair in pairs if not {_get_person(pair.left), _get_person(pair.right)} & seen]


def _get_person(name: str) -> str:
    return normalise_name(name.split("/")[-2])


def collect_names(pairs: list[Pair]) -> frozenset[str]:
    """The images that pairs name."""
    return frozenset(name for pair in pairs for name in (pair.left, pair.right))


def verify_pairs(
    embed: Callable[[UInt8Image], Float32], pairs: PairSet, flip: bool = True, batch: int = 64
) -> dict[str, float]:
    """Figures of a network on pairs. embed: chips (n, h, w, 3) uint8 RGB -> raw vectors (n, dim).

    accuracy, accuracy_std: mean and standard deviation over the folds, each at the threshold chosen on the others (LFW
    View 2); tar_at_far_1e-3 where there are 1,000 impostor pairs; auc; eer; threshold (Euclidean, of unit vectors)
    score: the accuracy of a file's folds. Of drawn pairs, whose folds mean nothing, the mean of AUC and of TAR at FAR
        1e-3, or the AUC alone where TAR is not known
    """
    rows, at = np.unique(np.concatenate([pairs.left, pairs.right]), return_inverse=True)
    known = rows >= 0
    vectors = embed_unit_vectors(embed, pairs.chips, rows[known], flip, batch)
    if not np.isfinite(vectors).all():
        raise EvaluationError("the network's vectors are not finite: training has diverged")
    place = (np.cumsum(known) - 1)[at]
    left, right = np.split(place, 2)
    both = np.logical_and(*np.split(known[at], 2))
    distances = np.full(len(pairs), _FARTHEST)
    distances[both] = np.linalg.norm(vectors[left[both]].astype(np.float64) - vectors[right[both]], axis=1)
    return _compute_scores(distances, pairs)


def embed_unit_vectors(
    embed: Callable[[UInt8Image], Float32], chips: ChipSet, rows: Int64, flip: bool = True, batch: int = 64
) -> Float32:
    """Vectors (n, dim) of unit length of chips; with `flip` each the mean of the raw ones of chip and mirror image."""
    parts = [_embed_raw(embed, chips.load_chips(rows[at : at + batch]), flip) for at in range(0, len(rows), batch)]
    raw = np.concatenate(parts).astype(np.float32)
    return np.asarray(raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), np.finfo(np.float32).tiny))


def _embed_raw(embed: Callable[[UInt8Image], Float32], chips: UInt8Image, flip: bool) -> Float32:
    if not flip:
        return np.asarray(embed(chips))
    both = np.asarray(embed(np.concatenate([chips, chips[:, :, ::-1]])))
    return np.asarray((both[: len(chips)] + both[len(chips) :]) / 2)


def _compute_scores(distances: Float64, pairs: PairSet) -> dict[str, float]:
    found = figures(distances, pairs.same, pairs.folds)
    scores = {"accuracy": found.accuracy, "auc": found.auc, "eer": found.eer, "threshold": found.threshold}
    if found.folds > 1:
        scores["accuracy_std"] = found.standard_error * float(np.sqrt(found.folds))
    tar = found.tar["0.001"]
    if tar is not None:
        scores["tar_at_far_1e-3"] = tar
    drawn = found.auc if tar is None else (found.auc + tar) / 2
    return {"score": drawn if pairs.is_drawn else found.accuracy} | scores


def _draw_genuine(labels: Int64, most: int, rng: np.random.Generator) -> Int64:
    """(p, 2) rows of one identity: all pairs where there are no more than `most`, else a random choice of them."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts, pairs = np.cumsum(counts) - counts, counts * (counts - 1) // 2
    ends = np.cumsum(pairs)
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.arange(total) if total <= most else np.sort(rng.choice(total, most, replace=False, shuffle=False))
    label = np.searchsorted(ends, chosen, side="right")
    i, j = _decode_pairs(chosen - (ends - pairs)[label])
    return np.stack([order[starts[label] + i], order[starts[label] + j]], 1)


def _draw_partners(labels: Int64, held: Int64, most: int, rng: np.random.Generator) -> Int64:
    """(p, 2) a held row and another of its identity, at most one pair a held row and none twice."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=1)
    starts, place = np.cumsum(counts) - counts, np.argsort(order)
    usable = held[counts[labels[held]] > 1]
    chosen = np.sort(rng.choice(usable, min(most, len(usable)), replace=False))
    label = labels[chosen]
    step = 1 + np.floor(rng.random(len(chosen)) * (counts[label] - 1)).astype(np.int64)
    other = order[starts[label] + (place[chosen] - starts[label] + step) % counts[label]]
    return np.unique(np.sort(np.stack([chosen, other], 1), axis=1), axis=0)


def _decode_pairs(number: Int64) -> tuple[Int64, Int64]:
    """The pairs (i, j), i < j, numbered (0, 1), (0, 2), (1, 2), (0, 3) and so on."""
    j = ((1 + np.sqrt(8.0 * number + 1)) / 2).astype(np.int64)
    j -= j * (j - 1) // 2 > number
    return number - j * (j - 1) // 2, j


def _draw_impostors(labels: Int64, most: int, rng: np.random.Generator, held: Int64 | None = None) -> Int64:
    """(p, 2) rows of two identities, the first among `held` where it is given, no pair twice; fewer than `most` where
    there are not as many."""
    count, found = len(labels), np.empty(0, np.int64)
    first = np.arange(count) if held is None else held
    for _ in range(20):
        a, b = rng.integers(0, [[len(first)], [count]], (2, 2 * most)) if len(first) else np.empty((2, 0), np.int64)
        a = first[a]
        keys = np.where(a < b, a * count + b, b * count + a)[labels[a] != labels[b]]
        together = np.concatenate([found, keys])
        found = together[np.sort(np.unique(together, return_index=True)[1])][:most]
        if len(found) == most:
            break
    return np.stack([found // max(1, count), found % max(1, count)], 1)
