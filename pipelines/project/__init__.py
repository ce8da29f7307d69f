"""project: fit the matrix that reduces a model's vectors to fewer numbers."""

from pipelines.project.pipeline import ProjectConfig, ProjectSummary, run

__all__ = ["ProjectConfig", "ProjectSummary", "run"]
