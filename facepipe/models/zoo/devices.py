"""Which models can use a GPU as they are installed here. No weights are read."""

from functools import lru_cache
from importlib.util import find_spec

from facepipe.models.zoo.card_file import is_onnx, read_card
from facepipe.models.zoo.registry import GIVEN, find_card_file

# Registered models whose networks are torch modules. MTCNN is one too, but it runs image by image, level by level, and
# is slower on a GPU than on the machine's CPUs.
_ON_GPU = ("retinaface-mnet025", "dlib-resnet", "face-recognition")


def can_use_gpu(name: str) -> bool:
    """Return whether a model gains from a GPU.

    Those are RetinaFace and embedders from checkpoints, as torch modules, and embedders that are ONNX graphs, if this
    ONNX Runtime has CUDA. ONNX detectors, MTCNN, dlib's detector and networks of eight bits run on CPUs.

    Args:
        name: A registered name, or a model's TOML file.
    """
    name = name.removeprefix(GIVEN)
    if name in _ON_GPU:
        return True
    path = find_card_file(name)
    if path is None:
        return False
    file = read_card(path)
    if is_onnx(file):
        return file.role == "embedder" and has_onnx_cuda()
    return True


@lru_cache(maxsize=1)
def has_onnx_cuda() -> bool:
    """Return whether this ONNX Runtime was built with CUDA."""
    if find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
