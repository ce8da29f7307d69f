"""embed: images in, a committed table of faces out."""

from pipelines.embed.config import EmbedConfig, RunConfig
from pipelines.embed.pipeline import run
from pipelines.embed.summary import Summary

__all__ = ["EmbedConfig", "RunConfig", "Summary", "run"]
