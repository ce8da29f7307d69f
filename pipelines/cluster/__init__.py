"""cluster: a gallery in, its faces grouped by person out."""

from pipelines.cluster.pipeline import NAME, ClusterConfig, ClusterRules, ClusterSummary, run

__all__ = ["NAME", "ClusterConfig", "ClusterRules", "ClusterSummary", "run"]
