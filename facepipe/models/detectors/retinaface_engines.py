"""RetinaFace run by ONNX Runtime on CPUs, and by torch on any device.

On a CPU both compute image by image. With one thread a batch is no faster, and the faces of an image then cannot depend
on what else was in the batch.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from facepipe.models.detectors import retinaface_decode
from facepipe.models.detectors.retinaface_decode import RetinaFaceOutputs
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.models.runtime.onnx_session import open_session
from facepipe.models.runtime.torch_inference import to_channels_last
from facepipe.types import UInt8Image

if TYPE_CHECKING:
    from torch import Tensor

    from facepipe.models.detectors.retinaface import Channels, RetinaFaceNet


_MAX_BATCH = 32
_FLOAT32_LAYERS = ("class_head", "box_head", "landmark_head")
# Sides of the shapes that batches have: those of the usual aspects at 384 and 640 pixels, and some more.
_CANVAS_SIDES = (128, 192, 224, 256, 288, 320, 384, 448, 480, 512, 640, 960, 1280, 1920, 2560)
_CANVAS_STEP = 640


class OnnxRetinaFace:
    """RetinaFace on a CPU.

    Attributes:
        stride: Image sides must be multiples of it.
    """

    stride = 32

    def __init__(self, graph: bytes, limits: DetectionLimits, *, threads: int = 1, channels: "Channels" = "bgr"):
        """Open the graph.

        Args:
            graph: The serialised ONNX model.
            limits: Which faces are kept.
            threads: Threads of ONNX Runtime.
            channels: The channel order in which the network was trained.
        """
        self._session = open_session(graph, threads=threads)
        self._limits = limits
        self._step = 1 if channels == "bgr" else -1

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        """Find the faces of each image; see `Detector`."""
        return [retinaface_decode.decode_faces(self._run(image), image.shape[:2], self._limits) for image in images]

    def detect_confident(
        self, images: Sequence[UInt8Image], *, reject_below: float, accept_above: float
    ) -> list[Faces | None]:
        """Find the faces of images without a doubtful one; see `CanAbstain`."""
        return [
            retinaface_decode.decode_confident_faces(
                self._run(image),
                image.shape[:2],
                reject_below=reject_below,
                accept_above=accept_above,
                max_iou=self._limits.max_iou,
            )
            for image in images
        ]

    def _run(self, image: UInt8Image) -> RetinaFaceOutputs:
        # The means go by a channel's position in the input, not by its colour. For a network trained on RGB the
        # image is reversed first, so that its red ends where the blue of the others does.
        planes = retinaface_decode.to_bgr_planes(image[None, ..., :: self._step])
        offsets, scores, points = self._session.run(None, {"input": planes})
        return RetinaFaceOutputs(offsets[0], scores[0, :, 1], points[0])


class TorchRetinaFace:
    """RetinaFace on any torch device, in channels_last: whole batches on a GPU, image by image on a CPU.

    On a GPU images of similar shapes share batches of one shape, with more black padding than they have already.

    Attributes:
        stride: Image sides must be multiples of it.
    """

    stride = 32

    def __init__(
        self,
        net: "RetinaFaceNet",
        limits: DetectionLimits,
        device: str,
        channels: "Channels" = "bgr",
        *,
        batches_on_cpu: bool = False,
    ):
        """Fold the network and move it to the device.

        Args:
            net: The network with its weights.
            limits: Which faces are kept.
            device: A torch device.
            channels: The channel order in which the network was trained.
            batches_on_cpu: Make the batches of a GPU on a CPU too, to compare the two.
        """
        import torch

        from facepipe.models.detectors.retinaface import fold_batch_norms

        self._net = to_channels_last(fold_batch_norms(net), device)
        self._device = torch.device(device)
        self._limits = limits
        self._is_bgr = channels == "bgr"
        self._in_batches = batches_on_cpu or self._device.type != "cpu"
        mean = torch.tensor(retinaface_decode.MEAN_BGR, device=self._device)
        self._mean = mean.view(1, 3, 1, 1)
        self.configure("float32", _MAX_BATCH)

    def configure(self, precision: str, max_batch: int) -> None:
        """Choose precision and batches; see `RunsOnDevice`. The last layers stay in float32."""
        from facepipe.models.runtime.device_batches import DeviceBatches
        from facepipe.models.runtime.precision import DTYPES, cast_network, set_float32_products

        set_float32_products(precision)
        cast_network(self._net, precision, _FLOAT32_LAYERS)
        self._dtype = DTYPES[precision]
        size = max_batch if self._in_batches else 1
        self._batches = DeviceBatches(self._predict, self._device, size)

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        """Find the faces of each image; see `Detector`."""
        return [retinaface_decode.decode_faces(outputs, shape, self._limits) for outputs, shape in self._run(images)]

    def detect_confident(
        self, images: Sequence[UInt8Image], *, reject_below: float, accept_above: float
    ) -> list[Faces | None]:
        """Find the faces of images without a doubtful one; see `CanAbstain`."""
        return [
            retinaface_decode.decode_confident_faces(
                outputs,
                shape,
                reject_below=reject_below,
                accept_above=accept_above,
                max_iou=self._limits.max_iou,
            )
            for outputs, shape in self._run(images)
        ]

    def _run(self, images: Sequence[UInt8Image]) -> Iterator[tuple[RetinaFaceOutputs, tuple[int, int]]]:
        """Yield what the network computes of each image, and the height and width of its input."""
        shapes = [(image.shape[0], image.shape[1]) for image in images]
        if self._in_batches:
            shapes = [choose_canvas(*shape) for shape in shapes]
        for outputs, shape in zip(self._batches.run(images, shapes), shapes, strict=True):
            yield RetinaFaceOutputs(*outputs), shape

    def _predict(self, frames: "Tensor") -> "tuple[Tensor, ...]":
        """Compute offsets, scores and landmark offsets of frames (n, h, w, 3) uint8 on the device."""
        import torch

        planes = frames.permute(0, 3, 1, 2)
        # Levels are RGB; the channels are reversed if the network was trained on BGR.
        ordered = planes.flip(1) if self._is_bgr else planes
        # Levels less the mean are whole numbers below 256, which each precision holds exactly.
        x = (ordered.float() - self._mean).to(self._dtype)
        outputs = self._net(x.contiguous(memory_format=torch.channels_last))
        return tuple(output.float() for output in outputs)


def choose_canvas(height: int, width: int) -> tuple[int, int]:
    """Choose the shape of the batch that an image goes into, no smaller than the image.

    Pictures of the usual aspects (4:3, 3:2, 16:9, 1:1) and sizes keep their own shape, and are computed as on a CPU. At
    one size of the detector a mix of aspects comes to some fifteen shapes.
    """
    return _round_side_up(height), _round_side_up(width)


def _round_side_up(side: int) -> int:
    # Beyond the list, in steps that its last entries have.
    return next((canvas for canvas in _CANVAS_SIDES if canvas >= side), side + -side % _CANVAS_STEP)
