"""Test sets, and the comparison of a network after its training with what it started from."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from facepipe.errors import ConfigError
from facepipe.evaluation.pairs_file import holds_images
from facepipe.training.data.config import DataConfig

Verdict = Literal["better", "WORSE", "the same"]
# Scores that a line shows, if they are there.
_SHOWN = ("accuracy", "eer")


@dataclass(frozen=True)
class VerificationSetConfig:
    """Configure a set of pairs that scores the start weights and the resulting model, and decides nothing.

    Attributes:
        name: name in the summary and the report; default: the name of the file or the gallery.
        pairs: file of pairs, as in `[validate]`; needs `source` or `gallery`, unless it is a .bin.
        source: images of the pairs file: anything that `facepipe embed` reads.
        gallery: gallery that holds the images of the pairs file; without a file, pairs are drawn from its labels as
            `facepipe evaluate pairs --draw` does.
        root: as in `[data]`, for `source`.
        aligned: as in `[data]`, for `source`.
        detector: as in `[data]`, for `source`.
        draw: number of pairs to draw from a gallery; there may be fewer.
        seed: random seed of the draw.
    """

    name: str = ""
    pairs: str = ""
    source: str = ""
    gallery: str = ""
    root: str | None = None
    aligned: bool = False
    detector: str = "retinaface-mnet025"
    draw: Annotated[int, Field(ge=2)] = 3000
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def is_set(self) -> bool:
        """Whether the section sets anything. An empty one, as in the example config, stands for no test set."""
        return self != VerificationSetConfig()

    @property
    def label(self) -> str:
        """The name to show."""
        return self.name or os.path.basename((self.pairs or self.gallery).rstrip("/"))

    @property
    def _is_complete(self) -> bool:
        """Whether the pairs file holds the images, and no others are named."""
        return holds_images(self.pairs) and not self.source and not self.gallery

    def check(self) -> "VerificationSetConfig":
        """Return the config if it names pairs and their images.

        Raises:
            ConfigError: Settings are missing or contradict each other.
        """
        if not self.pairs and self.source:
            raise ConfigError(f"test.source={self.source!r} needs a pairs file: set test.pairs")
        if not self.pairs and not self.gallery:
            raise ConfigError("[test] names no data: set test.gallery, or test.pairs and test.source")
        if self.pairs and not self._is_complete and bool(self.source) == bool(self.gallery):
            raise ConfigError("test.pairs needs the images it names: set either test.source or test.gallery")
        if self.aligned and self.gallery:
            raise ConfigError("test.aligned needs a source of face crops: remove it, a gallery has boxes already")
        return self

    @property
    def data(self) -> DataConfig:
        """Where the images are."""
        return DataConfig(
            gallery=self.gallery,
            source=self.pairs if self._is_complete else self.source,
            identity="auto",
            root=self.root,
            aligned=self.aligned or self._is_complete,
            detector=self.detector,
        ).check()


@dataclass(frozen=True)
class Comparison:
    """The scores of a set of pairs before and after training. `facepipe train --json` prints these fields.

    Attributes:
        name: validation, or "test" and the name of a test set.
        before: scores of the start weights, by name.
        after: of the validation: the best scores in training; of a test set: the scores of the resulting model.
        verdict: how `after` compares with `before`.
        keeps_start: whether the resulting model is the start weights.
    """

    name: str
    before: dict[str, float]
    after: dict[str, float]
    verdict: Verdict
    keeps_start: bool


def compare_scores(name: str, before: dict[str, float], after: dict[str, float], *, keeps_start: bool) -> Comparison:
    """Compare by "score", and if that is equal by the equal error rate."""
    gain = after["score"] - before["score"] or before.get("eer", 0.0) - after.get("eer", 0.0)
    verdict: Verdict = "the same"
    if gain:
        verdict = "better" if gain > 0 else "WORSE"
    return Comparison(name, before, after, verdict, keeps_start)


def format_comparison(comparison: Comparison) -> str:
    """Format a comparison as one line.

    For example: "validation: accuracy 0.9950 -> 0.9792, eer 0.0033 -> 0.0183: WORSE, the start weights are kept".
    """
    before = comparison.before
    after = comparison.after
    # A score that is not one of the others decides, so it is shown too.
    names = [name for name in _SHOWN if name in before and name in after]
    if before["score"] != before.get("accuracy"):
        names.insert(0, "score")
    is_one = comparison.keeps_start and before == after
    figures = [f"{name} {before[name]:.4f}" + ("" if is_one else f" -> {after[name]:.4f}") for name in names]
    verdict = "" if is_one else comparison.verdict
    kept = "the start weights are kept" if comparison.keeps_start else ""
    return f"{comparison.name}: {', '.join(figures)}: {', '.join(text for text in (verdict, kept) if text)}"
