"""The validation of an embedder during training: verification on pairs of chips.

Pairs come from a file, scored by LFW's protocol, or are drawn from the identities that are held out. Chips are cut
before training; each validation only embeds them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from facepipe.errors import ConfigError, EvaluationError
from facepipe.evaluation.pairs import score_pairs
from facepipe.evaluation.pairs_file import Pair, holds_images, read_pairs
from facepipe.evaluation.roc import find_balanced_threshold
from facepipe.sources.labels import normalise_name
from facepipe.training.data.chip_set import ChipSet
from facepipe.training.data.config import DataConfig
from facepipe.training.data.image_names import ImageNames
from facepipe.training.embedding_task import EmbedChips
from facepipe.types import Bool, Float32, Float64, Int64, UInt8Image

Count = Annotated[int, Field(ge=1)]
_MAX_DISTANCE = 2.0  # of unit vectors: an image without a face matches no other
# A file names its own folds; drawn pairs get so many.
_DRAWN_FOLDS = 10
_STREAM = 1_000_003  # keeps these random numbers apart from others of the same seed
_MAX_DRAWS = 20


@dataclass(frozen=True)
class ValidateConfig:
    """Configure the pairs that score the network during training.

    Pairs come from a file, or without one from the part of the data that is held out (split).

    Attributes:
        pairs: file of pairs: LFW's pairs.txt, or a CSV with file_x, file_y, same; needs `source` or `gallery`. A
            .bin of insightface holds its images, aligned crops.
        source: images of the pairs: anything that `facepipe embed` reads.
        gallery: gallery that holds the images of the pairs.
        root: as in `[data]`, for `source`.
        aligned: as in `[data]`, for `source`.
        detector: as in `[data]`, for `source`.
        held_only: of a file's pairs, use only those of which neither person is trained on.
        genuine: maximum number of genuine pairs to draw; there may be fewer.
        impostors: maximum number of impostor pairs to draw.
        flip: average the raw vectors of a chip and of its mirror image, as `facepipe embed` does.
        batch: chips per call of the network.
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
        """Where the images of the pairs file are.

        Raises:
            ConfigError: The images are not set, or are set without a pairs file.
        """
        if not self.pairs:
            raise ConfigError("validate.pairs names no file: without one, pairs are drawn from the held-out part")
        is_set = holds_images(self.pairs) and not self.source and not self.gallery
        source = self.pairs if is_set else self.source
        if bool(source) == bool(self.gallery):
            raise ConfigError("validate.pairs needs the images it names: set validate.source or validate.gallery")
        data = DataConfig(
            gallery=self.gallery,
            source=source,
            identity="auto",
            root=self.root,
            aligned=self.aligned or is_set,
            detector=self.detector,
        )
        return data.check()


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs of chips.

    Attributes:
        chips: chip set that `left` and `right` refer to.
        left: row of each pair's first chip, (p,) int64; -1 if no face was found.
        right: row of each pair's second chip, (p,) int64; -1 if no face was found.
        same: whether both show one person, (p,).
        folds: fold of each pair, (p,).
        description: where the pairs come from, for reports.
        is_drawn: whether pairs were drawn at random, not read from a file.
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
    def from_names(cls, chips: ChipSet, pairs: list[Pair], description: str) -> "PairSet":
        """Find the chips of a file's pairs. An image without a chip gets row -1.

        Raises:
            EvaluationError: No pair has two chips, or all such pairs are of one kind.
        """
        names = ImageNames(name for pair in pairs for name in (pair.left, pair.right))
        # Find the row of each name in one pass over the chips.
        rows: dict[str, int] = {}
        for row, uri in enumerate(chips.uris):
            name = names.find_name(uri)
            if name is not None:
                rows[name] = row
        pair_set = cls(
            chips=chips,
            left=np.array([rows.get(pair.left, -1) for pair in pairs], np.int64),
            right=np.array([rows.get(pair.right, -1) for pair in pairs], np.int64),
            same=np.array([pair.same for pair in pairs], bool),
            folds=np.array([pair.fold for pair in pairs]),
            description=description,
        )
        return pair_set._require_both_kinds()

    @classmethod
    def draw(cls, chips: ChipSet, config: ValidateConfig, seed: int = 0, held: Int64 | None = None) -> "PairSet":
        """Draw pairs at random, in random folds.

        Args:
            chips: chips that are held out, or with `held` all chips.
            config: how many pairs to draw.
            seed: random seed.
            held: rows of `chips` that are held out, while the others are trained on. Each is paired with at most one
                image of its own identity, from either part, and with images of others.

        Returns:
            All genuine pairs, or a random choice of `config.genuine` of them; and as many impostor pairs as requested.

        Raises:
            EvaluationError: There are no genuine pairs or no impostor pairs.
        """
        rng = np.random.default_rng((seed, _STREAM))
        labels = np.asarray(chips.labels)
        if held is None:
            # Genuine pairs come from held-out identities, or join held-out images with others of theirs.
            genuine = _draw_genuine(labels, config.genuine, rng)
            parts = f"{labels.max(initial=-1) + 1} held-out identities"
        else:
            genuine = _draw_partners(labels, held, config.genuine, rng)
            parts = f"{len(held)} held-out images"
        impostors = _draw_impostors(labels, config.impostors, rng, held)
        both = np.concatenate([genuine, impostors])
        # Give each kind its own folds, so that every fold has both kinds.
        genuine_folds = rng.permutation(len(genuine)) % _DRAWN_FOLDS
        impostor_folds = rng.permutation(len(impostors)) % _DRAWN_FOLDS
        pair_set = cls(
            chips=chips,
            left=both[:, 0],
            right=both[:, 1],
            same=np.arange(len(both)) < len(genuine),
            folds=np.concatenate([genuine_folds, impostor_folds]),
            description=f"{len(genuine)} genuine and {len(impostors)} impostor pairs drawn from {parts}",
            is_drawn=True,
        )
        return pair_set._require_both_kinds()

    def _require_both_kinds(self) -> "PairSet":
        has_chips = (self.left >= 0) & (self.right >= 0)
        genuine = int((has_chips & self.same).sum())
        impostors = int((has_chips & ~self.same).sum())
        if not genuine or not impostors:
            raise EvaluationError(
                f"{self.description}: {genuine} genuine and {impostors} impostor pairs have faces in both images, but "
                "both kinds are needed: hold out more identities with 2 images or more, or check the pairs file and "
                "its images"
            )
        return self


def read_validation_pairs(config: ValidateConfig, trained: Iterable[str] = ()) -> list[Pair]:
    """Read the pairs of `config.pairs`; with `config.held_only`, leave out pairs with a person in `trained`."""
    pairs = read_pairs(config.pairs)
    return select_held_pairs(pairs, trained) if config.held_only else pairs


def select_held_pairs(pairs: list[Pair], trained: Iterable[str]) -> list[Pair]:
    """Select the pairs of which neither image shows a person in `trained`. Folds keep their numbers.

    The folder in an image's name is the person.

    Raises:
        EvaluationError: A name has no folder.
    """
    # Names must tell the person, else nothing could be left out.
    for pair in pairs:
        for name in (pair.left, pair.right):
            if "/" not in name:
                raise EvaluationError(f"{name!r} names no person: validate.held_only needs names like Person/Image")
    trained_names = {normalise_name(name) for name in trained}
    return [pair for pair in pairs if not {_get_person(pair.left), _get_person(pair.right)} & trained_names]


def _get_person(name: str) -> str:
    return normalise_name(name.split("/")[-2])


def collect_names(pairs: list[Pair]) -> frozenset[str]:
    """Collect the names of the images in pairs."""
    return frozenset(name for pair in pairs for name in (pair.left, pair.right))


def verify_pairs(embed: EmbedChips, pairs: PairSet, flip: bool = True, batch: int = 64) -> dict[str, float]:
    """Score a network on pairs.

    Args:
        embed: embedding function of the network.
        pairs: pairs to score it on.
        flip: average the raw vectors of a chip and of its mirror image.
        batch: chips per call of the network.

    Returns:
        Scores by name. accuracy and accuracy_std: mean and standard deviation over the folds, each at the threshold
        chosen on the other folds (LFW View 2); of drawn pairs the accuracy alone, at `threshold`, with both kinds of
        pairs counted as if there were as many. tar_at_far_1e-3: only with 1,000 impostor pairs or more. auc. eer.
        threshold: Euclidean, of unit vectors, best if there were as many pairs of one kind as of the other.
        genuine_distance and impostor_distance: median over pairs of two faces.
        score: the accuracy on a file's pairs. Folds of drawn pairs mean nothing,
        so their score is the mean of AUC and TAR at FAR 1e-3, or the AUC alone if TAR is unknown.

    Raises:
        EvaluationError: The network's vectors are not finite.
    """
    # Embed each chip once; row -1 stands for images without a face.
    rows, positions = np.unique(np.concatenate([pairs.left, pairs.right]), return_inverse=True)
    has_chip = rows >= 0
    vectors = embed_unit_vectors(embed, pairs.chips, rows[has_chip], flip, batch)
    if not np.isfinite(vectors).all():
        raise EvaluationError("the network's vectors are not finite: the training has diverged")
    # Compute the distances of pairs that have two chips.
    left, right = np.split((np.cumsum(has_chip) - 1)[positions], 2)
    both = np.logical_and(*np.split(has_chip[positions], 2))
    distances = np.full(len(pairs), _MAX_DISTANCE)
    distances[both] = np.linalg.norm(vectors[left[both]].astype(np.float64) - vectors[right[both]], axis=1)
    medians = {
        "genuine_distance": float(np.median(distances[both & pairs.same])),
        "impostor_distance": float(np.median(distances[both & ~pairs.same])),
    }
    return _compute_scores(distances, pairs) | medians


def embed_unit_vectors(embed: EmbedChips, chips: ChipSet, rows: Int64, flip: bool = True, batch: int = 64) -> Float32:
    """Embed chips as unit vectors, (n, dim); with `flip` the mean of the raw vectors of chip and mirror image."""
    parts = [_embed_raw(embed, chips.load_chips(rows[at : at + batch]), flip) for at in range(0, len(rows), batch)]
    # The squares of a network that diverges are beyond float32, and its vectors must not become zeros.
    raw = np.concatenate(parts).astype(np.float64)
    lengths = np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return np.asarray(raw / lengths, np.float32)


def _embed_raw(embed: EmbedChips, chips: UInt8Image, flip: bool) -> Float32:
    if not flip:
        return np.asarray(embed(chips))
    both = np.asarray(embed(np.concatenate([chips, chips[:, :, ::-1]])))
    return np.asarray((both[: len(chips)] + both[len(chips) :]) / 2)


def _compute_scores(distances: Float64, pairs: PairSet) -> dict[str, float]:
    result = score_pairs(distances, pairs.same, pairs.folds)
    threshold = find_balanced_threshold(distances, pairs.same)
    scores = {"accuracy": result.accuracy, "auc": result.auc, "eer": result.eer, "threshold": threshold}
    tar = result.tar["0.001"]
    score = result.accuracy
    if pairs.is_drawn:
        # There are many more impostor pairs: always saying "different" would be right most of the time.
        is_right = (distances <= threshold) == pairs.same
        scores["accuracy"] = float((is_right[pairs.same].mean() + is_right[~pairs.same].mean()) / 2)
        score = result.auc if tar is None else (result.auc + tar) / 2
    elif result.folds > 1:
        scores["accuracy_std"] = result.standard_error * float(np.sqrt(result.folds))
    if tar is not None:
        scores["tar_at_far_1e-3"] = tar
    return {"score": score} | scores


def _draw_genuine(labels: Int64, count: int, rng: np.random.Generator) -> Int64:
    """Draw pairs of rows of one identity, (p, 2): all pairs if there are at most `count`, else a random choice."""
    # Rows of an identity are a slice of `order`.
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    # Number the pairs of all identities consecutively and choose among the numbers.
    pairs = sizes * (sizes - 1) // 2
    ends = np.cumsum(pairs)
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.arange(total)
    if total > count:
        numbers = np.sort(rng.choice(total, count, replace=False, shuffle=False))
    label = np.searchsorted(ends, numbers, side="right")
    i, j = _decode_pairs(numbers - (ends - pairs)[label])
    return np.stack([order[starts[label] + i], order[starts[label] + j]], 1)


def _draw_partners(labels: Int64, held: Int64, count: int, rng: np.random.Generator) -> Int64:
    """Draw pairs of a held-out row and another of its identity, (p, 2): at most one per held-out row, none twice."""
    # Rows of an identity are a slice of `order`; `positions` is a row's place in it.
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=1)
    starts = np.cumsum(sizes) - sizes
    positions = np.argsort(order)
    usable = held[sizes[labels[held]] > 1]
    chosen = np.sort(rng.choice(usable, min(count, len(usable)), replace=False))
    # Step from each row to another one of its identity, round the end.
    label = labels[chosen]
    step = 1 + np.floor(rng.random(len(chosen)) * (sizes[label] - 1)).astype(np.int64)
    partners = order[starts[label] + (positions[chosen] - starts[label] + step) % sizes[label]]
    # Sorted pairs are equal if they hold the same rows.
    return np.unique(np.sort(np.stack([chosen, partners], 1), axis=1), axis=0)


def _decode_pairs(numbers: Int64) -> tuple[Int64, Int64]:
    """Decode pair numbers to pairs i < j, numbered (0, 1), (0, 2), (1, 2), (0, 3) and so on."""
    # Solve j (j - 1) / 2 <= number; rounding may give one too many.
    j = ((1 + np.sqrt(8.0 * numbers + 1)) / 2).astype(np.int64)
    j -= j * (j - 1) // 2 > numbers
    return numbers - j * (j - 1) // 2, j


def _draw_impostors(labels: Int64, count: int, rng: np.random.Generator, held: Int64 | None = None) -> Int64:
    """Draw pairs of rows of two identities, (p, 2), none twice.

    The first row is in `held` if that is set. There are fewer than `count` pairs if there are not as many.
    """
    size = len(labels)
    first_rows = np.arange(size) if held is None else held
    keys = np.empty(0, np.int64)
    # Draw more than needed, since some show one person or repeat; try again while pairs lack.
    for _ in range(_MAX_DRAWS):
        if len(first_rows):
            a, b = rng.integers(0, [[len(first_rows)], [size]], (2, 2 * count))
        else:
            a, b = np.empty((2, 0), np.int64)
        a = first_rows[a]
        # A pair's key does not depend on the order of its rows. Keep the first of equal keys.
        drawn = np.where(a < b, a * size + b, b * size + a)[labels[a] != labels[b]]
        together = np.concatenate([keys, drawn])
        keys = together[np.sort(np.unique(together, return_index=True)[1])][:count]
        if len(keys) == count:
            break
    return np.stack([keys // max(1, size), keys % max(1, size)], 1)
