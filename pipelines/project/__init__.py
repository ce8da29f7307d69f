"""project: fit the matrix that reduces a model's vectors to the gallery's 128 dimensions."""

from pipelines.project.pipeline import ProjectConfig, ProjectSummary, run

__all__ = ["ProjectConfig", "ProjectSummary", "run"]
