"""Models that people can get freely: known by name before their file is here, recognised by its SHA-256 when it is.

Hashes, sizes and licences are those that the publishers state, or that others who publish hashes state of their files
(OpenCV's opencv_zoo and onnx/models on GitHub; yakhyo's uniface, `constants.py`; irlume, `models/SHA256SUMS`; read in
2026). No weight here was run by us: `figures` are the authors'. A file is recognised by its hash, whatever its name.
"""

from dataclasses import dataclass

from facepipe.models.zoo.card_file import CardFile, InputConfig
from facepipe.schema import MAX_DIM

PERMISSIVE = ("Apache-2.0", "MIT", "Boost", "BSD-3-Clause", "CC-BY-4.0", "public domain")
"""Licences that allow commercial use."""

_RESEARCH_DATA = "research use only"


@dataclass(frozen=True)
class KnownModel:
    """A model that is known by name.

    Attributes:
        card: What its TOML file says; `weights` is the name of its file, `licence` that of the weights.
        bytes: Size of the file; 0 if it is not known.
        publisher: Where its authors publish it.
        code_licence: Licence of the code that it was trained with.
        data: What is known of the data that it was trained on.
        data_allows_commercial_use: Whether that allows commercial use; None if it is not known.
        summary: One line for lists.
    """

    card: CardFile
    bytes: int
    publisher: str
    code_licence: str
    data: str
    summary: str
    data_allows_commercial_use: bool | None = None

    @property
    def name(self) -> str:
        """What galleries call it."""
        return self.card.name

    @property
    def needs_projection(self) -> bool:
        """Whether its vectors are longer than a gallery's can be."""
        return self.card.role == "embedder" and self.card.dim > MAX_DIM


_RAW_RGB = InputConfig(size=(112, 112), channels="rgb", mean=0.0, scale=1.0, alignment="similarity", template="arcface")
_CENTRED_RGB = InputConfig(
    size=(112, 112), channels="rgb", mean=127.5, scale=127.5, alignment="similarity", template="arcface"
)


def _make_embedder(
    name: str,
    weights: str,
    sha256: str,
    *,
    dim: int,
    licence: str,
    source: str,
    takes: InputConfig,
    figures: dict[str, float] | None = None,
) -> CardFile:
    return CardFile(
        name=name,
        weights=weights,
        sha256=sha256,
        dim=dim,
        licence=licence,
        source=source,
        input=takes,
        figures=figures or {},
    )


def _make_retinaface(trunk: str, weights: str, sha256: str, hard: float, size: int = 0) -> KnownModel:
    source = "https://github.com/yakhyo/retinaface-pytorch"
    return KnownModel(
        card=CardFile(
            name=f"retinaface-{trunk}",
            weights=weights,
            role="detector",
            architecture="retinaface-mnet025",
            sha256=sha256,
            licence="MIT",
            source=source,
            figures={"WIDER FACE hard": hard},
        ),
        bytes=size,
        publisher=source,
        code_licence="MIT",
        data="WIDER FACE (its images are from the web; research use)",
        summary=f"RetinaFace, {trunk}, five landmarks; AP on WIDER FACE hard {hard:.3f} by its author",
    )


_OPENCV = "https://github.com/opencv/opencv_zoo"
_ONNX_ZOO = "https://github.com/onnx/models"

_ALL = (
    KnownModel(
        card=_make_embedder(
            "sface",
            "face_recognition_sface_2021dec.onnx",
            "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
            dim=128,
            licence="Apache-2.0",
            source=f"{_OPENCV}/tree/main/models/face_recognition_sface",
            takes=_RAW_RGB,
            figures={"LFW accuracy": 0.9940},
        ),
        bytes=38_696_353,
        publisher=f"{_OPENCV}/tree/main/models/face_recognition_sface",
        code_licence="Apache-2.0",
        data="not stated: CASIA-WebFace, VGGFace2 or MS1MV2 (opencv_zoo issues 124 and 288)",
        summary="SFace, 128-D (Zhong et al., TIP 2021)",
    ),
    KnownModel(
        card=_make_embedder(
            "sface-int8",
            "face_recognition_sface_2021dec_int8bq.onnx",
            "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
            dim=128,
            licence="Apache-2.0",
            source=f"{_OPENCV}/tree/main/models/face_recognition_sface",
            takes=_RAW_RGB,
            figures={"LFW accuracy": 0.9942},
        ),
        bytes=10_667_852,
        publisher=f"{_OPENCV}/tree/main/models/face_recognition_sface",
        code_licence="Apache-2.0",
        data="not stated: CASIA-WebFace, VGGFace2 or MS1MV2 (opencv_zoo issues 124 and 288)",
        summary="SFace in blocks of eight bits, 128-D",
    ),
    KnownModel(
        card=_make_embedder(
            "auraface",
            "glintr100.onnx",
            "a7933ea5330113b01c9b60351d8f4c33003f145d8470ac5f0e52ee2effe25c60",
            dim=512,
            licence="Apache-2.0",
            source="https://huggingface.co/fal/AuraFace-v1",
            takes=_CENTRED_RGB,
            figures={"LFW accuracy": 0.9965, "CFP-FP accuracy": 0.9519, "AgeDB accuracy": 0.9610},
        ),
        bytes=0,
        publisher="https://huggingface.co/fal/AuraFace-v1 (of its files only glintr100.onnx is free)",
        code_licence="Apache-2.0",
        data="'commercially and publicly available', by its publisher; not named",
        data_allows_commercial_use=True,
        summary="AuraFace v1, ResNet-100, 512-D",
    ),
    KnownModel(
        card=_make_embedder(
            "arcface-zoo",
            "arcfaceresnet100-8.onnx",
            "f3a6bc281e72f88862f5748b53be3d76b3b48f8f1ab1f4a537941bdc4e1b01da",
            dim=512,
            licence="Apache-2.0",
            source=f"{_ONNX_ZOO}/tree/main/validated/vision/body_analysis/arcface",
            takes=_RAW_RGB,
            figures={"LFW accuracy": 0.9977, "CFP-FP accuracy": 0.9421, "AgeDB accuracy": 0.9787},
        ),
        bytes=261_036_388,
        publisher=f"{_ONNX_ZOO}/tree/main/validated/vision/body_analysis/arcface",
        code_licence="Apache-2.0",
        data=f"refined MS-Celeb-1M, {_RESEARCH_DATA}",
        data_allows_commercial_use=False,
        summary="ArcFace of the ONNX model zoo, ResNet-100, 512-D (Deng et al., CVPR 2019)",
    ),
    KnownModel(
        card=_make_embedder(
            "arcface-zoo-int8",
            "arcfaceresnet100-11-int8.onnx",
            "c625ca68a422418c48aa84f73341337e0a92b111f327909005d1eec07c95f936",
            dim=512,
            licence="Apache-2.0",
            source=f"{_ONNX_ZOO}/tree/main/validated/vision/body_analysis/arcface",
            takes=_RAW_RGB,
            figures={"LFW accuracy": 0.9980},
        ),
        bytes=65_764_892,
        publisher=f"{_ONNX_ZOO}/tree/main/validated/vision/body_analysis/arcface",
        code_licence="Apache-2.0",
        data=f"refined MS-Celeb-1M, {_RESEARCH_DATA}",
        data_allows_commercial_use=False,
        summary="the same in eight bits",
    ),
    KnownModel(
        card=_make_embedder(
            "lvface-t",
            "LVFace-T_Glint360K.onnx",
            "bf8da0e1e93c432d9a1d874a9ba0990f5859f970e8864b3990f2f33d11f9cdb3",
            dim=512,
            licence="not verified",
            source="https://github.com/bytedance/LVFace",
            takes=_CENTRED_RGB,
        ),
        bytes=76_653_813,
        publisher="https://github.com/bytedance/LVFace",
        code_licence="MIT",
        data=f"Glint360K, {_RESEARCH_DATA}",
        data_allows_commercial_use=False,
        summary="LVFace-T, a vision transformer, 512-D (2025)",
    ),
    KnownModel(
        card=_make_embedder(
            "lvface-s",
            "LVFace-S_Glint360K.onnx",
            "cd09f27c82ce0a3633fb8b1966d779a7171b23aa4f14ca0de6edf9677573d119",
            dim=512,
            licence="not verified",
            source="https://github.com/bytedance/LVFace",
            takes=_CENTRED_RGB,
        ),
        bytes=304_196_926,
        publisher="https://github.com/bytedance/LVFace",
        code_licence="MIT",
        data=f"Glint360K, {_RESEARCH_DATA}",
        data_allows_commercial_use=False,
        summary="LVFace-S, a vision transformer, 512-D (2025)",
    ),
    _make_retinaface(
        "mv2", "retinaface_mv2.onnx", "3ca44c045651cabeed1193a1fae8946ad1f3a55da8fa74b341feab5a8319f757", 0.8660
    ),
    _make_retinaface(
        "r18", "retinaface_r18.onnx", "e8b5ddd7d2c3c8f7c942f9f10cec09d8e319f78f09725d3f709631de34fb649d", 0.8663
    ),
    _make_retinaface(
        "r34", "retinaface_r34.onnx", "bd0263dc2a465d32859555cb1741f2d98991eb0053696e8ee33fec583d30e630", 0.8890
    ),
    _make_retinaface(
        "mv1", "retinaface_mv1.onnx", "75c961aaf0aff03d13c074e9ec656e5510e174454dd4964a161aab4fe5f04153", 0.8413
    ),
    _make_retinaface(
        "mv1-050",
        "retinaface_mv1_0.50.onnx",
        "d8977186f6037999af5b4113d42ba77a84a6ab0c996b17c713cc3d53b88bfc37",
        0.8240,
    ),
    KnownModel(
        card=CardFile(
            name="yunet",
            weights="face_detection_yunet_2023mar.onnx",
            role="detector",
            architecture="yunet",
            sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
            licence="MIT",
            source=f"{_OPENCV}/tree/main/models/face_detection_yunet",
            figures={"WIDER FACE hard": 0.7503},
        ),
        bytes=232_589,
        publisher=f"{_OPENCV}/tree/main/models/face_detection_yunet",
        code_licence="MIT",
        data="WIDER FACE (its images are from the web; research use)",
        summary="YuNet, five landmarks, small and fast (Wu et al., MIR 2023)",
    ),
    KnownModel(
        card=CardFile(
            name="ediffiqa-t",
            weights="ediffiqa_tiny_jun2024.onnx",
            role="quality",
            # What the publisher's large-file pointer says of the file.
            sha256="9426c899cc0f01665240cb7d9e7f98e18e24e456c178326c771a43da289bfc6a",
            dim=1,
            licence="CC-BY-4.0",
            source=f"{_OPENCV}/tree/main/models/face_image_quality_assessment_ediffiqa",
            input=_CENTRED_RGB,
        ),
        bytes=7_272_678,
        publisher=f"{_OPENCV}/tree/main/models/face_image_quality_assessment_ediffiqa",
        code_licence="CC-BY-4.0",
        data="not stated",
        summary="eDifFIQA(T), a score per face, MobileFaceNet (Babnik et al., T-BIOM 2024)",
    ),
)

KNOWN_MODELS = {model.name: model for model in _ALL}


@dataclass(frozen=True)
class Provenance:
    """What is known of where a model comes from.

    Attributes:
        code_licence: Licence of the code.
        data: What it was trained on.
        data_allows_commercial_use: Whether that allows commercial use; None if it is not known.
    """

    code_licence: str
    data: str
    data_allows_commercial_use: bool | None = None


_DLIB_DATA = "half VGG Face and FaceScrub, half scraped by its author (dlib-models, README)"
REGISTERED_PROVENANCE = {
    "retinaface-mnet025": Provenance("MIT", "WIDER FACE (its images are from the web; research use)"),
    "mtcnn": Provenance("MIT", "WIDER FACE and CelebA (research use)"),
    "dlib-hog": Provenance("Boost", "faces labelled by dlib's author"),
    "dlib-resnet": Provenance("Boost", _DLIB_DATA),
    "dlib-resnet-int8": Provenance("Boost", _DLIB_DATA),
    "face-recognition": Provenance("Boost", _DLIB_DATA),
}
"""Provenance of the models that are registered with weights."""


def find_provenance(name: str) -> Provenance | None:
    """Find what is known of where a model comes from; None for models of the user's own."""
    # Lists of faces have no licence that is known here; the detector beside them has.
    name = name.removeprefix("given-faces+")
    known = KNOWN_MODELS.get(name)
    if known is not None:
        return Provenance(known.code_licence, known.data, known.data_allows_commercial_use)
    return REGISTERED_PROVENANCE.get(name)


def find_commercial_obstacle(name: str, licence: str) -> str | None:
    """Find what speaks against commercial use of a model; None if nothing is known to.

    That nothing is known is no permission: of most models nobody has said what they were trained on.

    Args:
        name: name of the model.
        licence: licence of its weights.
    """
    provenance = find_provenance(name)
    if licence not in PERMISSIVE:
        return f"the licence of its weights is {licence!r}"
    if provenance is not None and provenance.code_licence not in PERMISSIVE:
        return f"the licence of its code is {provenance.code_licence!r}"
    if provenance is not None and provenance.data_allows_commercial_use is False:
        return f"it was trained on {provenance.data}"
    return None


def describe_file(model: KnownModel) -> str:
    """Describe which file a known model needs, and where its authors publish it."""
    size = f"{model.bytes:,} bytes, " if model.bytes else ""
    return f"{model.card.weights} ({size}SHA-256 {model.card.sha256}) from {model.publisher}"
