"""Put the file of a known model where it is found by name: recognised by its hash, tried, and with golden vectors."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.parity import make_scene_chips
from facepipe.models.zoo.card_file import to_toml
from facepipe.models.zoo.known import KNOWN_MODELS, KnownModel, describe_file
from facepipe.models.zoo.registry import find_card, get_models_folder
from facepipe.storage import replace_file, write
from facepipe.types import Float32

_GOLDEN_CHIPS = 3
_GOLDEN_TOLERANCE = 1e-3  # of unit vectors: other processors round otherwise


@dataclass(frozen=True)
class AddedModel:
    """A model that was added.

    Attributes:
        model: What is known of it.
        card_path: Its TOML file.
    """

    model: KnownModel
    card_path: Path


def add_model(path: Path) -> AddedModel:
    """Copy the file of a known model into the models' folder, with a TOML file beside it.

    Raises:
        ModelError: The file is of no known model, or is not what its name says.
    """
    if not path.is_file():
        raise ModelError(f"no such file: {str(path)!r}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    model = next((model for model in KNOWN_MODELS.values() if model.card.sha256 == sha256), None)
    if model is None:
        raise ModelError(_describe_unknown(path, sha256))
    folder = get_models_folder()
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / model.card.weights
    if not weights.exists() or not weights.samefile(path):
        with replace_file(str(weights), sync=True) as unfinished:
            shutil.copyfile(path, unfinished)
    # The TOML file comes last, because it says that the model is there.
    card_path = folder / f"{model.name}.toml"
    write(str(card_path), to_toml(model.card).encode())
    return AddedModel(model, card_path)


def _describe_unknown(path: Path, sha256: str) -> str:
    size = path.stat().st_size
    similar = [model for model in KNOWN_MODELS.values() if path.name == model.card.weights or size == model.bytes]
    if similar:
        return f"{str(path)!r} has SHA-256 {sha256}, and is not {similar[0].name}: expected {describe_file(similar[0])}"
    return (
        f"{str(path)!r} (SHA-256 {sha256}) is no file of a known model. For a model of your own write a TOML file "
        "beside it (docs/models.md), and give its path"
    )


def has_golden(name: str) -> bool:
    """Say whether the golden vectors of a model are kept."""
    return "/" not in name and (get_models_folder() / f"{name}.golden.json").exists()


def require_golden(name: str) -> bool:
    """Compare the vectors of an embedder with those that it gave when it was first used, or keep these.

    Returns:
        Whether there were any to compare with.

    Raises:
        ModelError: They differ: another version of a library computes something else.
    """
    card = find_card(name, "embedder")
    embedder = card.load("cpu", 1)
    vectors = np.asarray(embedder.embed(make_scene_chips(embedder.size, _GOLDEN_CHIPS)), np.float32)
    path = get_models_folder() / f"{name}.golden.json"
    if not path.exists():
        content = {"sha256": card.sha256, "vectors": vectors.tolist()}
        write(str(path), json.dumps(content).encode())
        return False
    content = json.loads(path.read_bytes())
    expected = np.array(content["vectors"], np.float32)
    if content["sha256"] != card.sha256:
        raise ModelError(f"{name} is another model than {str(path)!r} is of: delete that file if this is right")
    difference = float(np.abs(_to_unit(vectors) - _to_unit(expected)).max())
    if difference > _GOLDEN_TOLERANCE:
        raise ModelError(f"{name} gives other vectors than at its first use, by up to {difference:.2g}")
    return True


def _to_unit(vectors: Float32) -> Float32:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
