"""Run a network in training as a detector, on single images of any size."""

import cv2
import numpy as np
import torch

from facepipe.models.detectors.retinaface import Channels, normalise_pixels
from facepipe.models.detectors.retinaface_decode import STRIDES, RetinaFaceOutputs, decode_faces
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.types import UInt8Image


def detect(net: torch.nn.Module, image: UInt8Image, channels: Channels, limits: DetectionLimits) -> Faces:
    """Detect the faces of an image, in its own pixels.

    Args:
        net: RetinaFaceNet in inference mode.
        image: (h, w, 3) uint8 RGB.
        channels: colour order of the network.
        limits: minimum score and maximum overlap, as in `decode_faces`.
    """
    h, w = image.shape[:2]
    stride = STRIDES[-1]
    # Pad to a multiple of the coarsest stride, at the right and bottom, so that coordinates stay.
    padded = cv2.copyMakeBorder(image, 0, -h % stride, 0, -w % stride, cv2.BORDER_CONSTANT)
    device = next(net.parameters()).device
    # One image as a batch of one; its outputs leave the batch again.
    with torch.inference_mode():
        x = normalise_pixels(torch.from_numpy(np.asarray(padded, np.uint8)).to(device)[None], channels)
        offsets, scores, points = (out[0].float().cpu().numpy() for out in net(x))
    outputs = RetinaFaceOutputs(offsets, scores, points)
    return decode_faces(outputs, (padded.shape[0], padded.shape[1]), limits)
