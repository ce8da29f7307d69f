"""cluster: a gallery in, its faces grouped by person out."""

from pipelines.cluster.pipeline import ClusterConfig, ClusterRules, ClusterSummary, run

__all__ = ["ClusterConfig", "ClusterRules", "ClusterSummary", "run"]
