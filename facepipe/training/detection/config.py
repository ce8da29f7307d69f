"""What the training of a detector can be told; the defaults are those of biubug6's RetinaFace."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class SceneAugmentConfig:
    """What is done to an image before a step.

    scales: sides of the square that is cut out, as shares of the image's shorter side; each is as likely
    tries: squares drawn until one holds a whole face; then the whole image is taken, padded to a square
    distort: brightness, contrast, saturation and hue are changed at random
    mirror: probability of mirroring, which swaps left and right landmarks
    """

    scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.3, 0.45, 0.6, 0.8, 1.0)
    tries: Count = 250
    distort: bool = True
    mirror: Share = 0.5


@dataclass(frozen=True)
class MultiTaskConfig:
    """Which anchors are faces, and what errors weigh.

    positive: overlap (IoU) from which an anchor is a face
    ignore: faces whose best anchor overlaps by less are left out; the others get their best anchor in any case
    negatives: hardest background anchors that count, for each anchor that is a face
    box, score, landmarks: weights of the three losses
    """

    positive: Share = 0.35
    ignore: Share = 0.2
    negatives: Weight = 7.0
    box: Weight = 2.0
    score: Weight = 1.0
    landmarks: Weight = 1.0


@dataclass(frozen=True)
class DetectionConfig:
    """Images and annotations, and what is made of them.

    annotations: WIDER FACE's label.txt (`# path`, then a line a face: box, landmarks) or wider_face_train_bbx_gt.txt
    images: folder that the paths in it start from; by default `images` beside it
    held, held_images: the same for validation; none: nothing is validated
    held_size: longest side of a validated image in pixels; larger ones are shrunk
    held_count: so many images from the beginning are validated; 0: all
    held_score: lowest confidence that counts in validation; held_overlap: highest overlap of two faces found
    size: side of the squares that are trained on, in pixels; a multiple of 32
    batch: images of a step, over all workers
    threads: that decode and augment a batch
    """

    annotations: str = ""
    images: str = ""
    held: str = ""
    held_images: str = ""
    held_size: Count = 640
    held_count: Annotated[int, Field(ge=0)] = 0
    held_score: Share = 0.02
    held_overlap: Share = 0.4
    size: Annotated[int, Field(ge=32, multiple_of=32)] = 640
    batch: Count = 32
    threads: Count = 4
    augment: SceneAugmentConfig = field(default_factory=SceneAugmentConfig)
    loss: MultiTaskConfig = field(default_factory=MultiTaskConfig)
