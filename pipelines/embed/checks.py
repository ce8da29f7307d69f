"""What can be wrong with an embedding run before an image is read: its settings, its models, its gallery's contract."""

import os
from dataclasses import replace

from facepipe.errors import MissingPackageError, ModelError
from facepipe.gallery import Contract, Gallery
from facepipe.given.lists import require_lists
from facepipe.models.card import Card
from facepipe.models.zoo.known import find_commercial_obstacle
from facepipe.models.zoo.registry import find_card
from facepipe.schema import WORK_ITEM
from facepipe.stages import check_chain
from pipelines.embed.config import EmbedConfig


def check_settings(config: EmbedConfig) -> Contract:
    """Check that stages fit each other, models are known and settings are valid.

    Returns:
        What the embeddings depend on.

    Raises:
        ConfigError: a setting is wrong.
        SourceError: a list of faces is missing.
        ModelError: a model is unknown or not allowed, or the two do not go together.
    """
    require_lists(config.source.lists_of_faces)
    check_chain((config.read, config.decode, config.detect, config.align, config.embed), WORK_ITEM.names)
    config.make_retry_rule()  # it checks the statuses
    if config.models.policy == "commercial":
        for model, role in ((config.detect.model, "detector"), (config.embed.model, "embedder")):
            _require_commercial_use(find_card(model, role))
    return config.contract


def require_commercial_models(embedder: str) -> None:
    """Require that an embedder may be used commercially. Raises ModelError otherwise."""
    _require_commercial_use(find_card(embedder, "embedder"))


def _require_commercial_use(card: Card) -> None:
    obstacle = find_commercial_obstacle(card.name, card.licence)
    if obstacle is not None:
        raise ModelError(f'models.policy = "commercial" refuses {card.name}: {obstacle}')


def load_models(config: EmbedConfig) -> None:
    """Load the models on the CPU, which is enough to find an error in a file, or a package that is missing.

    Raises:
        ModelError: a model cannot be loaded.
        MissingPackageError: a package is missing. If RAY_ADDRESS names a cluster, its workers may have the package.
    """
    try:
        _ = replace(config.detect, device="cpu").detector
        _ = replace(config.embed, device="cpu").embedder
    except MissingPackageError:
        if "RAY_ADDRESS" not in os.environ:
            raise


def require_usable(config: EmbedConfig, gallery: str) -> None:
    """Require what a run requires before it reads an image, for dry runs. Nothing is written.

    Args:
        config: settings.
        gallery: folder or URL of the gallery, which may not exist yet.

    Raises:
        ConfigError: a setting is wrong.
        ModelError: a model is unknown, or cannot be loaded.
        GalleryError: the gallery has another contract, or the folder holds something else.
    """
    contract = check_settings(config)
    if Gallery.exists(gallery):
        Gallery(gallery).contract.require(contract, f"the gallery {gallery!r}")
    else:
        Gallery.require_free(gallery)
    load_models(config)
