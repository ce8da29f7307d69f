"""RetinaFace run by ONNX Runtime on CPUs, and by torch on any device.

On a CPU both compute image by image. With one thread a batch is no faster, and the faces of an image then cannot depend
on what else was in the batch.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from facepipe.models.detectors import retinaface_decode
from facepipe.models.detectors.retinaface_decode import RetinaFaceOutputs
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.models.runtime.onnx_session import open_session
from facepipe.models.runtime.torch_inference import to_channels_last
from facepipe.types import UInt8Image

if TYPE_CHECKING:
    from facepipe.models.detectors.retinaface import Channels, RetinaFaceNet


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

    def detect(self, images: UInt8Image) -> list[Faces]:
        """Find the faces of each image; see `Detector`."""
        return [retinaface_decode.decode_faces(self._run(image), image.shape[:2], self._limits) for image in images]

    def detect_confident(self, images: UInt8Image, *, reject_below: float, accept_above: float) -> list[Faces | None]:
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

    Attributes:
        stride: Image sides must be multiples of it.
    """

    stride = 32

    def __init__(self, net: "RetinaFaceNet", limits: DetectionLimits, device: str, channels: "Channels" = "bgr"):
        """Fold the network and move it to the device.

        Args:
            net: The network with its weights.
            limits: Which faces are kept.
            device: A torch device.
            channels: The channel order in which the network was trained.
        """
        import torch

        from facepipe.models.detectors.retinaface import fold_batch_norms

        self._net = to_channels_last(fold_batch_norms(net), device)
        self._device = torch.device(device)
        self._limits = limits
        self._channels = channels

    def detect(self, images: UInt8Image) -> list[Faces]:
        """Find the faces of each image; see `Detector`."""
        shape = images.shape[1:3]
        return [retinaface_decode.decode_faces(outputs, shape, self._limits) for outputs in self._run(images)]

    def detect_confident(self, images: UInt8Image, *, reject_below: float, accept_above: float) -> list[Faces | None]:
        """Find the faces of images without a doubtful one; see `CanAbstain`."""
        return [
            retinaface_decode.decode_confident_faces(
                outputs,
                images.shape[1:3],
                reject_below=reject_below,
                accept_above=accept_above,
                max_iou=self._limits.max_iou,
            )
            for outputs in self._run(images)
        ]

    def _run(self, images: UInt8Image) -> Iterator[RetinaFaceOutputs]:
        # A GPU gets all images of one shape at once.
        batch_size = 1 if self._device.type == "cpu" else max(1, len(images))
        for start in range(0, len(images), batch_size):
            yield from self._run_batch(images[start : start + batch_size])

    def _run_batch(self, images: UInt8Image) -> list[RetinaFaceOutputs]:
        import torch

        from facepipe.models.detectors.retinaface import normalise_pixels

        with torch.inference_mode():
            pixels = torch.from_numpy(images).to(self._device, non_blocking=True)
            outputs = self._net(normalise_pixels(pixels, self._channels))
            offsets, scores, points = (output.float().cpu().numpy() for output in outputs)
        return [RetinaFaceOutputs(*row) for row in zip(offsets, scores, points, strict=True)]
