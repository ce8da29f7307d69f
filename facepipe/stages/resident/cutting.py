"""The chips of many faces: those of images on the device are cut there, the others come from the host."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from facepipe.imaging.alignment import ChipLayout, find_required_scale
from facepipe.models.runtime.transfers import Uploads
from facepipe.stages.resident.chips import cut_chips, fit_similarities, measure_scales, plan_cuts
from facepipe.stages.resident.coordinates import Found
from facepipe.stages.resident.sampling import ResidentImages
from facepipe.types import Float64, Int64, UInt8Image


def wanted(layout: ChipLayout, faces: Found) -> Float64:
    """(f,) chip pixels per pixel of the full-size image: `alignment.wanted_scale` of many faces."""
    boxes, landmarks = faces.boxes.astype(np.float64), faces.landmarks.astype(np.float64)
    if layout.kind == "similarity":
        return measure_scales(fit_similarities(landmarks, np.array(layout.template)))
    return np.array([find_required_scale(layout, *face) for face in zip(boxes, landmarks, strict=True)])


def on_device(layout: ChipLayout) -> bool:
    """Whether the device cuts the chips of a layout; those that are not turned by landmarks alone the host cuts."""
    return layout.kind == "similarity"


def chips_of(layout: ChipLayout, resident: ResidentImages, image: Int64, landmarks: Float64) -> tuple[Tensor, Int64]:
    """Chips (f, h, w, 3) uint8 of faces, and which face each is of: they are in another order.

    image: (f,) of `resident`; landmarks: (f, 5, 2) in pixels of those images
    """
    matrices = fit_similarities(landmarks, np.array(layout.template))
    cuts, order = plan_cuts(image, matrices, resident.shapes[image], layout.size).sort_by_step()
    return cut_chips(resident, cuts, layout.size), order


def uploaded(uploads: Uploads, chips: Sequence[UInt8Image]) -> Tensor:
    """(n, h, w, 3) uint8 on the device, n >= 1."""
    return uploads(chips).view(len(chips), *chips[0].shape)
