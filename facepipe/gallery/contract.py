"""The model contract: what must be equal for two embeddings to be comparable."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from facepipe.errors import ContractError, ModelError
from facepipe.hashing import hash64
from facepipe.models.card import Card
from facepipe.models.zoo.registry import find_card
from facepipe.schema import EMBEDDING_DIM

CONTRACT_PROPERTY = "facepipe.contract"


@dataclass(frozen=True)
class Contract:
    """Detector, embedder, the SHA-256 of their weights, alignment, flip, dimension and metric."""

    detector: str
    detector_sha256: str
    embedder: str
    embedder_sha256: str
    alignment: str
    flip: bool
    dim: int = EMBEDDING_DIM
    metric: str = "euclidean on unit vectors"

    @classmethod
    def from_models(cls, detector: str, embedder: str, flip: bool) -> "Contract":
        """The contract of two models. Raises ModelError for two that do not go together."""
        found, made = find_card(detector, "detector"), find_card(embedder, "embedder")
        dim = made.dim or EMBEDDING_DIM
        return cls(found.name, found.sha256, made.name, made.sha256, _alignment(made, found), flip, dim)

    def to_json(self) -> str:
        """The form kept in the table's properties."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Contract":
        """Raises ContractError for a contract of another version of facepipe."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ContractError(f"the gallery's contract cannot be read: {text[:300]}") from error

    def require(self, other: "Contract", where: str) -> None:
        """Raise ContractError, with what differs, unless the other contract is this one."""
        mine, theirs = asdict(self), asdict(other)
        differ = [name for name in mine if mine[name] != theirs[name]]
        if differ:
            lines = [
                f"  {name}: the gallery has {_short(mine[name])}, asked for is {_short(theirs[name])}"
                for name in differ
            ]
            raise ContractError(
                f"{where} was made with another model contract:\n" + "\n".join(lines) + "\n"
                "Embeddings of two contracts cannot be compared: use the gallery's models, or start a new gallery"
            )


def _alignment(embedder: Card, detector: Card) -> str:
    layout = embedder.layout
    if layout is None:
        raise ContractError(f"{embedder.name} does not say how its chips are cut")
    if layout.kind == "dlib" and not detector.square_known:
        raise ModelError(
            f"{embedder.name} takes chips cut by dlib's points, and how the boxes of {detector.name} lie to dlib's was "
            "never measured: take another detector, such as retinaface-mnet025 or dlib-hog"
        )
    what = {
        "similarity": [layout.size, layout.template],
        "dlib": [layout.size, detector.square],
    }.get(layout.kind, [layout.size, layout.fill])
    return f"{layout.kind}:{hash64(json.dumps(what)):016x}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 32 else text[:16] + "…"
