"""embed: images in, a committed table of faces out."""

from pipelines.embed.config import EmbedConfig, RunConfig
from pipelines.embed.pipeline import run
from pipelines.embed.summary import EmbedSummary

__all__ = ["EmbedConfig", "EmbedSummary", "RunConfig", "run"]
