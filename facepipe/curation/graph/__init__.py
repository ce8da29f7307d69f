"""The graph of faces: who is near whom, by exact distances, over all faces of a gallery or of two."""

from facepipe.curation.graph.edges import Edges
from facepipe.curation.graph.graph import Graph, GraphInfo

__all__ = ["Edges", "Graph", "GraphInfo"]
