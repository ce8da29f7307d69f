"""The graph of faces: pairs of near faces with exact distances, over all faces of one gallery or of two.

The layers, from the bottom: `nodes` and `edges` on disk; `cohort`, `threshold` and `calibration`, which find from which
similarity two faces are one person; `cells` and `truth`, which limit and measure what is compared; `build`, the steps
that make a graph; `graph`, a finished one. `linkage` and `components` cluster any graph.
"""

from facepipe.curation.graph.edges import Edges
from facepipe.curation.graph.graph import Graph, GraphInfo

__all__ = ["Edges", "Graph", "GraphInfo"]
