"""The command `embed`: from images to a committed table of faces."""

from pipelines.embed.config import EmbedConfig, RunConfig
from pipelines.embed.pipeline import run
from pipelines.embed.summary import EmbedSummary

__all__ = ["EmbedConfig", "EmbedSummary", "RunConfig", "run"]
