"""cluster: group the faces of a gallery by person."""

from pipelines.cluster.pipeline import NAME, ClusterConfig, ClusterRules, ClusterSummary, run

__all__ = ["NAME", "ClusterConfig", "ClusterRules", "ClusterSummary", "run"]
