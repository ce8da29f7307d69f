"""The model contract: what must be equal for two embeddings to be comparable."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from facepipe.deprecation import warn_renamed
from facepipe.errors import ContractError, ModelError
from facepipe.hashing import hash64
from facepipe.models.card import Card
from facepipe.models.zoo.registry import find_card
from facepipe.schema import DEFAULT_DIM, MAX_DIM, MIN_DIM

CONTRACT_PROPERTY = "facepipe.contract"
"""Name of the table property that holds the contract; also of Parquet metadata."""

FEATURES = "features:"
"""How the names of embedders begin that are known by their vectors alone."""
_UNKNOWN = "unknown"

# Longest value that an error shows in full.
_MAX_CHARACTERS = 32


@dataclass(frozen=True)
class Contract:
    """What the embeddings of a gallery were made with.

    Attributes:
        detector: Name of the detector.
        detector_sha256: SHA-256 of its weights.
        embedder: Name of the embedder.
        embedder_sha256: SHA-256 of its weights.
        alignment: How chips are cut.
        flip: Whether the vector of the mirrored chip is averaged in.
        dim: Numbers per embedding.
        metric: How embeddings are compared.
    """

    detector: str
    detector_sha256: str
    embedder: str
    embedder_sha256: str
    alignment: str
    flip: bool
    dim: int = DEFAULT_DIM
    metric: str = "euclidean on unit vectors"

    @classmethod
    def from_models(cls, detector: str, embedder: str, flip: bool) -> "Contract":
        """Make the contract of two models. Raises ModelError for two that do not go together."""
        detector_card = find_card(detector, "detector")
        embedder_card = find_card(embedder, "embedder")
        require_dim(embedder_card.dim or DEFAULT_DIM, embedder_card.name)
        return cls(
            detector=detector_card.name,
            detector_sha256=detector_card.sha256,
            embedder=embedder_card.name,
            embedder_sha256=embedder_card.sha256,
            alignment=_describe_alignment(embedder_card, detector_card),
            flip=flip,
            dim=embedder_card.dim or DEFAULT_DIM,
        )

    @classmethod
    def from_features(cls, name: str, dim: int) -> "Contract":
        """Make the contract of vectors whose model is not here. What has another name is of another model.

        Raises:
            ModelError: a gallery cannot hold vectors of this length.
        """
        require_dim(dim, repr(name))
        return cls(
            detector=_UNKNOWN,
            detector_sha256="",
            embedder=FEATURES + name.removeprefix(FEATURES),
            embedder_sha256="",
            alignment=_UNKNOWN,
            flip=False,
            dim=dim,
        )

    @property
    def is_of_features(self) -> bool:
        """Whether the vectors came without their model, so that no image can be embedded beside them."""
        return self.embedder.startswith(FEATURES)

    @classmethod
    def of(cls, detector: str, embedder: str, flip: bool) -> "Contract":
        """Call `from_models`. This name is deprecated."""
        warn_renamed("Contract.of", "Contract.from_models")
        return cls.from_models(detector, embedder, flip)

    def to_json(self) -> str:
        """Encode the contract for the table's properties."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Contract":
        """Decode a contract. Raises ContractError for one of another version of facepipe."""
        try:
            contract = cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ContractError(f"the gallery's contract cannot be read: {text[:300]}") from error
        # What is not a length would make arrays of any size.
        if type(contract.dim) is not int or not 1 <= contract.dim <= MAX_DIM:
            raise ContractError(
                f"the gallery's contract says dim = {contract.dim!r}; expected {MIN_DIM} to {MAX_DIM}: it is "
                "of another version of facepipe, or damaged"
            )
        return contract

    def require_models(self, detector: str | None, embedder: str | None) -> None:
        """Require that models that somebody names are those of this contract.

        Args:
            detector: name or TOML file of a detector; None if none is named.
            embedder: name or TOML file of an embedder; None if none is named.

        Raises:
            ContractError: one is another model.
            UnknownModelError: there is no such model.
        """
        for role, named, name, sha256 in (
            ("detector", detector, self.detector, self.detector_sha256),
            ("embedder", embedder, self.embedder, self.embedder_sha256),
        ):
            if named is None:
                continue
            card = find_card(named, role)
            if (card.name, card.sha256) != (name, sha256):
                raise ContractError(
                    f"--{role} {named} is not the gallery's {role}, which is {name}: faces of two models cannot be "
                    "compared. Leave the option out"
                )

    def require(self, other: "Contract", where: str) -> None:
        """Raise ContractError, with what differs, unless the other contract equals this one.

        Args:
            other: the requested contract.
            where: what this contract belongs to, for the message.
        """
        own_values = asdict(self)
        other_values = asdict(other)
        # List what differs, so that the user sees which setting to change.
        different = [name for name in own_values if own_values[name] != other_values[name]]
        if different:
            lines = [
                f"  {name}: the gallery has {_shorten(own_values[name])}, asked for is {_shorten(other_values[name])}"
                for name in different
            ]
            raise ContractError(
                f"{where} was made with another model contract:\n" + "\n".join(lines) + "\n"
                "Embeddings of two contracts cannot be compared: use the gallery's models, or start a new gallery"
            )


def require_dim(dim: int, model: str) -> None:
    """Require that a gallery can hold vectors of a length. Raises ModelError otherwise."""
    if not MIN_DIM <= dim <= MAX_DIM:
        raise ModelError(
            f"{model} gives {dim}-D vectors, and a gallery holds vectors of {MIN_DIM} to {MAX_DIM} numbers"
        )


def _describe_alignment(embedder: Card, detector: Card) -> str:
    """Describe how chips are cut: the kind of layout, and a hash of everything that decides its pixels."""
    layout = embedder.layout
    if layout is None:
        raise ContractError(f"{embedder.name} does not say how its chips are cut")
    if layout.kind == "dlib" and not detector.square_known:
        raise ModelError(
            f"{embedder.name} takes chips cut by dlib's points, and how the boxes of {detector.name} lie to dlib's was "
            "never measured: take another detector, such as retinaface-mnet025 or dlib-hog"
        )
    # Only what decides the pixels of this kind of layout goes into the hash.
    parameters: list[Any]
    if layout.kind == "similarity":
        parameters = [layout.size, layout.template]
    elif layout.kind == "dlib":
        parameters = [layout.size, detector.square]
    else:
        parameters = [layout.size, layout.fill]
    return f"{layout.kind}:{hash64(json.dumps(parameters)):016x}"


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_CHARACTERS else text[:16] + "…"
