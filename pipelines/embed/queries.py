"""The config with which images are embedded that are looked for in a gallery: its models decide, not the user's."""

from dataclasses import replace

from facepipe.errors import ContractError
from facepipe.gallery import Contract
from facepipe.models.zoo.registry import resolve_model_name
from pipelines.embed.config import EmbedConfig


def build_query_config(base: EmbedConfig, contract: Contract, images: str, *, thumbs: bool) -> EmbedConfig:
    """Build the config of `embed` for images that are compared with a gallery.

    Args:
        base: the user's settings. A model's file in them is loaded if it is of the gallery's model.
        contract: contract of the gallery.
        images: anything that `embed` takes.
        thumbs: whether thumbnails of the faces are needed.

    Raises:
        ContractError: the gallery's models are not at hand as it names them.
    """
    if contract.is_of_features:
        raise ContractError(
            f"the gallery holds {contract.embedder}, vectors of {contract.dim} numbers whose model is not here: images "
            "cannot be compared with them. Give vectors of the same model, as a Parquet file with a column embedding"
        )
    config = replace(
        base,
        source=replace(base.source, uri=images),
        detect=replace(base.detect, model=resolve_model_name(contract.detector, base.detect.model, "detector")),
        embed=replace(
            base.embed, model=resolve_model_name(contract.embedder, base.embed.model, "embedder"), flip=contract.flip
        ),
        align=replace(base.align, thumbs=thumbs),
    )
    contract.require(config.contract, "the gallery that is searched")
    return config
