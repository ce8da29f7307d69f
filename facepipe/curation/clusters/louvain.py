"""Communities by Louvain's method (Blondel 2008) under the constant Potts model (Traag 2011), with scikit-network.

Modularity itself would not do: it joins any two small clusters that touch once the graph is large (resolution limit).
"""

from importlib import import_module

import numpy as np
from scipy.sparse import csr_matrix

from facepipe.curation.graph.components import adjacency, numbered
from facepipe.errors import ConfigError
from facepipe.types import Float32, Int64

RESOLUTION = 0.3
_TOLERANCE = 1e-5  # smallest gain, as a share of all weight, for which another pass is made


def communities(count: int, u: Int64, v: Int64, weight: Float32, resolution: float = RESOLUTION) -> Int64:
    """Labels (count,) int64 that maximise, over pairs of nodes in one cluster, the sum of weight less the price.

    The price of a pair is `resolution` times the mean weight of an edge; a pair without an edge weighs 0. So two
    clusters join when the mean weight between them, over all pairs, is above the price, however large the graph is. Of
    a graph of k neighbours a node, an identity of more than about k / resolution faces comes in pieces.

    Edges u < v int64 (m,), each once, in any order; weight float32 (m,) > 0. Labels are numbered by the smallest node
    of their cluster. Raises ConfigError where scikit-network is not installed.
    """
    try:
        louvain = import_module("sknetwork.clustering").Louvain
    except ImportError as error:
        raise ConfigError("communities need scikit-network: pip install 'facepipe[communities]'") from error
    if not len(u):
        return np.arange(count, dtype=np.int64)
    # scikit-network divides weights by twice their sum, and prices a pair at its resolution / count².
    price = resolution * count**2 / (2 * len(u))
    method = louvain(price, "potts", tol_optimization=_TOLERANCE, tol_aggregation=_TOLERANCE, return_probs=False)
    return numbered(np.asarray(method.fit_predict(csr_matrix(adjacency(count, u, v, weight))), np.int64))
