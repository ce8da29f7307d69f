"""The settings of the training of a detector. Defaults are those of biubug6's RetinaFace."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class SceneAugmentConfig:
    """Configure the augmentation of images.

    Attributes:
        scales: sides of the square that is cut out, as shares of the image's shorter side; all are equally likely.
        tries: squares to draw until one holds a whole face; otherwise the whole image is used, padded to a square.
        distort: change brightness, contrast, saturation and hue at random.
        mirror: probability of mirroring, which swaps left and right landmarks.
    """

    scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.3, 0.45, 0.6, 0.8, 1.0)
    tries: Count = 250
    distort: bool = True
    mirror: Share = 0.5


@dataclass(frozen=True)
class MultiTaskConfig:
    """Configure the loss: which anchors are faces, and the weights of errors.

    Attributes:
        positive: minimum overlap (IoU) at which an anchor is a face.
        ignore: minimum overlap of a face's best anchor. Faces below it are left out; all others get their best anchor.
        negatives: hardest background anchors to use per anchor that is a face.
        box: weight of the loss of boxes.
        score: weight of the loss of scores.
        landmarks: weight of the loss of landmarks.
    """

    positive: Share = 0.35
    ignore: Share = 0.2
    negatives: Weight = 7.0
    box: Weight = 2.0
    score: Weight = 1.0
    landmarks: Weight = 1.0


@dataclass(frozen=True)
class DetectionConfig:
    """Configure the images and annotations of a detector's training.

    Attributes:
        annotations: WIDER FACE's label.txt (`# path`, then per face a line with box and landmarks), or
            wider_face_train_bbx_gt.txt.
        images: folder that the paths in it are relative to; default: `images` beside it.
        held: annotations for validation; default: no validation.
        held_images: folder of the images for validation; default: `images` beside `held`.
        held_size: longest side of an image in validation, in pixels; larger images are shrunk.
        held_count: number of images to validate on, from the beginning of the file; 0: all.
        held_score: minimum score of a face in validation.
        held_overlap: maximum overlap of two detected faces in validation.
        size: side of the squares to train on, in pixels; a multiple of 32.
        batch: images per step, over all workers.
        threads: threads that decode and augment a batch.
        augment: augmentation.
        loss: loss.
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
