"""What the loop trains to have a detector: images and annotations, the multi-task loss, average precision."""

from concurrent.futures import ThreadPoolExecutor
from typing import cast

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
from facepipe.training.detection.folder import open_folder
from facepipe.training.detection.loss import MultiTaskLoss
from facepipe.training.detection.validation import measure_average_precision

_AUGMENT = 1001  # keeps its stream of random numbers apart from the sampler's


class DetectionTask:
    """Trains a RetinaFaceNet with batch norms (`Task` of facepipe/training/trainer/task.py).

    A batch is (pixels (n, size, size, 3) uint8 RGB, targets (n, f, 15), valid (n, f), passed over (n,) int64). Images
    without faces are not trained on; one that cannot be decoded gives its turn to the next that can.

    channels: the order in which the network takes colours, as its card has it
    notes: what a user should know of the data, with counts
    """

    def __init__(self, net: nn.Module, config: DetectionConfig, seed: int = 0, channels: Channels = "bgr"):
        self.net, self.config, self.seed, self.channels = net, config, seed, channels
        self.objective: nn.Module = MultiTaskLoss(config.loss)
        self._data = open_folder(config.annotations, config.images)
        self._held = open_folder(config.held, config.held_images) if config.held else None
        counts = np.diff(self._data.annotations.offsets)[self._data.rows]
        self._rows = self._data.rows[counts > 0]
        if len(self._rows) < config.batch:
            raise ConfigError(
                f"detection.batch is {config.batch}, and {config.annotations!r} has {len(self._rows)} images with faces"
            )
        self._sampler = BatchSampler(np.zeros(len(self._rows), np.int64), SampleConfig(batch=config.batch), seed)
        self.steps_per_epoch = self._sampler.steps_per_epoch
        colour = MEAN_BGR[::-1] if channels == "bgr" else MEAN_BGR
        self._fill = (colour[0], colour[1], colour[2])

    @property
    def notes(self) -> tuple[str, ...]:
        a, missing = self._data.annotations, self._data.missing
        empty = len(self._data.rows) - len(self._rows)
        said = (
            (missing, f"{missing} of {len(a.paths)} annotated images are missing"),
            (empty, f"{empty} images have no faces and are not trained on"),
            (a.dropped, f"{a.dropped} faces are left out: they are marked as invalid, or their box is empty"),
        )
        return tuple(text for count, text in said if count)

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, ...]:
        """Rank's share of a step, a pure function of (seed, step) and the files."""
        rows = self._sampler.draw_rows(step, rank, world)
        first = rank * len(rows)
        with ThreadPoolExecutor(self.config.threads) as pool:
            made = list(pool.map(lambda n: self._make_example(int(rows[n]), step, first + n), range(len(rows))))
        faces = [_build_targets(scene.faces) for scene, _ in made]
        targets, valid = _pad_targets(faces)
        images = torch.from_numpy(np.stack([scene.pixels for scene, _ in made]))
        return images, targets, valid, torch.tensor([passed for _, passed in made])

    def _make_example(self, at: int, step: int, place: int) -> tuple[Scene, int]:
        """An augmented scene, and how many images were passed over for it."""
        for passed in range(len(self._rows)):
            row = int(self._rows[(at + passed) % len(self._rows)])
            image = self._data.load_pixels(row)
            if image is not None:
                rng = np.random.default_rng((self.seed, _AUGMENT, step, place))
                scene = Scene(image, self._data.annotations.get_faces(row))
                return augment_scene(scene, self.config.size, self._fill, self.config.augment, rng), passed
        raise SourceError(f"none of the images below {str(self._data.root)!r} can be decoded")

    def compute_loss(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """The multi-task loss of a batch; figures: its parts, anchors that are faces, images passed over."""
        images, targets, valid, passed = inputs
        priors = torch.from_numpy(build_anchors(*images.shape[1:3])).to(images.device)
        predictions = cast(Predictions, self.net(normalise_pixels(images, self.channels)))
        total: Tensor = self.objective(predictions, targets, valid, priors)
        figures: dict[str, Tensor] = getattr(self.objective, "figures", {})
        return total, {**figures, "passed_over": passed.sum().float()}

    def validate(self, net: nn.Module) -> dict[str, float]:
        """Average precision at an overlap of one half on the held images; {} where there are none."""
        return measure_average_precision(net, self._held, self.config, self.channels) if self._held else {}


def _build_targets(truth: AnnotatedFaces) -> Tensor:
    """(f, 15): x1 y1 x2 y2, landmarks, 1 where they are known and -1 (and zeros for them) where not."""
    points = truth.landmarks.reshape(-1, 10)
    known = np.isfinite(points).all(1, keepdims=True)
    points = np.where(known, points, 0)
    mark = np.where(known, 1, -1)
    return torch.from_numpy(np.concatenate([truth.boxes, points, mark], 1).astype(np.float32))


def _pad_targets(faces: list[Tensor]) -> tuple[Tensor, Tensor]:
    targets = nn.utils.rnn.pad_sequence(faces, batch_first=True)
    lengths = torch.tensor([len(f) for f in faces])
    return targets, torch.arange(targets.shape[1]) < lengths[:, None]
