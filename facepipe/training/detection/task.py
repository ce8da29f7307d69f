"""The training of a detector: images and annotations, the multi-task loss, and average precision."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from facepipe.errors import ConfigError, SourceError
from facepipe.models.detectors.retinaface import Channels, Predictions, normalise_pixels
from facepipe.models.detectors.retinaface_decode import MEAN_BGR, build_anchors
from facepipe.training.data.sampling import BatchSampler, SampleConfig
from facepipe.training.detection.annotations import AnnotatedFaces
from facepipe.training.detection.augment import Scene, augment_scene
from facepipe.training.detection.config import DetectionConfig
from facepipe.training.detection.folder import AnnotatedFolder, open_folder
from facepipe.training.detection.loss import MultiTaskLoss
from facepipe.training.detection.validation import measure_average_precision
from facepipe.types import Int64

_AUGMENT_STREAM = 1001  # keeps these random numbers apart from the sampler's


@dataclass(frozen=True, eq=False)
class DetectionBatches:
    """Batches of images and targets, made without a network, in any process.

    Attributes:
        data: images and annotations.
        rows: images with faces, (n,).
        sampler: the choice of each batch's images.
        config: size, augmentation and threads.
        seed: random seed of the augmentation.
        fill: RGB levels of the padding.
    """

    data: AnnotatedFolder
    rows: Int64
    sampler: BatchSampler
    config: DetectionConfig
    seed: int
    fill: tuple[float, float, float]

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, ...]:
        """Load and augment the rank's share of a step, a pure function of (seed, step) and the files."""
        rows = self.sampler.draw_rows(step, rank, world)
        # Random numbers depend on the position in the whole batch, and so not on the ranks.
        first = rank * len(rows)
        with ThreadPoolExecutor(self.config.threads) as pool:
            positions = range(len(rows))
            examples = list(pool.map(lambda n: self._make_example(int(rows[n]), step, first + n), positions))
        # Pad targets to the image with most faces.
        targets, valid = _pad_targets([_build_targets(example.scene.faces) for example in examples])
        images = torch.from_numpy(np.stack([example.scene.pixels for example in examples]))
        return images, targets, valid, torch.tensor([example.skipped for example in examples])

    def _make_example(self, index: int, step: int, position: int) -> "_Example":
        """Load and augment one image, or the next that can be decoded.

        Args:
            index: number of the image among those with faces.
            step: number of the step.
            position: position in the whole batch.
        """
        # Try the following images in turn if one cannot be decoded.
        for skipped in range(len(self.rows)):
            row = int(self.rows[(index + skipped) % len(self.rows)])
            pixels = self.data.load_pixels(row)
            if pixels is not None:
                rng = np.random.default_rng((self.seed, _AUGMENT_STREAM, step, position))
                scene = Scene(pixels, self.data.annotations.get_faces(row))
                return _Example(augment_scene(scene, self.config.size, self.fill, self.config.augment, rng), skipped)
        raise SourceError(f"none of the images below {str(self.data.root)!r} can be decoded")


class DetectionTask:
    """The training of a RetinaFaceNet with batch norms, a `TrainingTask`.

    A batch is pixels (n, size, size, 3) uint8 RGB, targets (n, f, 15), valid (n, f), and skipped images (n,) int64.
    Images without faces are not trained on. If an image cannot be decoded, the next one that can takes its turn.

    Args:
        net: the network.
        config: images, annotations, augmentation and loss.
        seed: random seed of batches and augmentation.
        channels: colour order of the network, as in its card.
    """

    def __init__(self, net: nn.Module, config: DetectionConfig, seed: int = 0, channels: Channels = "bgr"):
        self.net = net
        self.config = config
        self.seed = seed
        self.channels = channels
        self.objective: nn.Module = MultiTaskLoss(config.loss)
        self._data = open_folder(config.annotations, config.images)
        self._held = open_folder(config.held, config.held_images) if config.held else None
        # Images without faces are left out of the batches.
        counts = np.diff(self._data.annotations.offsets)[self._data.rows]
        self._rows = self._data.rows[counts > 0]
        if len(self._rows) < config.batch:
            raise ConfigError(
                f"detection.batch={config.batch}, but {config.annotations!r} has only {len(self._rows)} images with "
                "faces: lower detection.batch"
            )
        # Batches need no identities, so all images get one label.
        labels = np.zeros(len(self._rows), np.int64)
        sampler = BatchSampler(labels, SampleConfig(batch=config.batch), seed)
        self.steps_per_epoch = sampler.steps_per_epoch
        # Padding has the mean colour, which is zero after normalisation.
        colour = MEAN_BGR[::-1] if channels == "bgr" else MEAN_BGR
        fill = (colour[0], colour[1], colour[2])
        self.batches = DetectionBatches(self._data, self._rows, sampler, config, seed, fill)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the data, with counts."""
        annotations = self._data.annotations
        missing = self._data.missing
        empty = len(self._data.rows) - len(self._rows)
        notes: list[str] = []
        if missing:
            notes.append(f"{missing} of {len(annotations.paths)} annotated images are missing")
        if empty:
            notes.append(f"{empty} images have no faces and are not trained on")
        if annotations.dropped:
            notes.append(f"{annotations.dropped} faces are left out: they are marked as invalid, or their box is empty")
        return tuple(notes)

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, ...]:
        """Load and augment the rank's share of a step, a pure function of (seed, step) and the files."""
        return self.batches.make_batch(step, rank, world)

    def compute_loss(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the multi-task loss of a batch.

        Returns:
            The loss; and as figures its parts, the anchors that are faces, and the images skipped.
        """
        images, targets, valid, skipped = inputs
        # Anchors depend on the size of the images only.
        priors = torch.from_numpy(build_anchors(*images.shape[1:3])).to(images.device)
        predictions = cast(Predictions, self.net(normalise_pixels(images, self.channels)))
        loss: Tensor = self.objective(predictions, targets, valid, priors)
        figures: dict[str, Tensor] = getattr(self.objective, "figures", {})
        return loss, {**figures, "passed_over": skipped.sum().float()}

    def validate(self, net: nn.Module) -> dict[str, float]:
        """Measure the average precision on the held-out images, at an overlap of one half; empty without them."""
        return measure_average_precision(net, self._held, self.config, self.channels) if self._held else {}


class _Example(NamedTuple):
    """One image of a batch.

    Attributes:
        scene: augmented image with faces.
        skipped: number of images that could not be decoded before it.
    """

    scene: Scene
    skipped: int


def _build_targets(faces: AnnotatedFaces) -> Tensor:
    """Build the targets of an image, (f, 15): x1 y1 x2 y2, landmarks, mark.

    The mark is 1 if the landmarks are known. Otherwise it is -1, and the landmarks are zeros.
    """
    # Landmarks of a face are known as a whole, or not at all.
    points = faces.landmarks.reshape(-1, 10)
    is_known = np.isfinite(points).all(1, keepdims=True)
    points = np.where(is_known, points, 0)
    mark = np.where(is_known, 1, -1)
    return torch.from_numpy(np.concatenate([faces.boxes, points, mark], 1).astype(np.float32))


def _pad_targets(faces: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad the targets of images to one length; and mark the rows that are faces."""
    targets = nn.utils.rnn.pad_sequence(faces, batch_first=True)
    lengths = torch.tensor([len(f) for f in faces])
    return targets, torch.arange(targets.shape[1]) < lengths[:, None]
