"""Average linkage on a sparse graph: exact means over all pairs of two clusters, merged down a ladder of thresholds.

The mean similarity of the faces of two clusters is the inner product of their mean vectors less the mean of their mean
densities. So it is exact whatever pairs the graph holds; the graph only says which clusters to look at.

The threshold falls in steps. At each step the edges that reach it fall into connected components, most of them as small
as a person. No component knows of another: each is merged by itself, in rounds, and the graph is contracted before the
next step. So the result does not depend on how the components are spread over tasks or machines. If no edge is missing
it is that of merging one pair at a time, because all merges above a step come before any below it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from facepipe.curation.graph.cannot_links import CannotLinks
from facepipe.curation.graph.clusters import Clusters, compute_paired_linkage
from facepipe.curation.graph.components import find_components, renumber_labels
from facepipe.curation.graph.rounds import make_edge_keys, merge_in_rounds
from facepipe.storage.mapped import release_pages
from facepipe.types import Bool, Float32, Int32, Int64

# By how much each step lies above the threshold. Steps of .02 let a component grow with the gallery (28 % of 300,000
# faces); with steps of .01 the largest one follows the largest person. The upper ones are for wide spaces.
_STEPS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.17, 0.14, 0.12, *(n / 100 for n in range(10, -1, -1)))
_MAX_NODES_PER_TASK = 50_000  # some 25 MB of sums
_PAIRS_PER_BLOCK = 1 << 13  # pairs whose linkage is computed at a time: their sums stay in the cache
_MIN_NEW_ROWS = 1 << 16  # clusters that memory is taken for at a time


@dataclass(frozen=True)
class LinkageTask:
    """Some whole components of a step.

    Attributes:
        nodes: Numbers of the clusters, (k,), rising.
        clusters: The k clusters.
        u: One cluster per edge, as a position among these, (m,); u < v.
        v: The other cluster, (m,).
        weight: Mean similarity of the two, (m,).
        threshold: Similarity of the step.
        apart: What must not come together, by position.
    """

    nodes: Int64
    clusters: Clusters
    u: Int64
    v: Int64
    weight: Float32
    threshold: float
    apart: CannotLinks


@dataclass(frozen=True)
class LinkageResult:
    """What a task merged.

    Attributes:
        nodes: Numbers of the task's clusters, (k,).
        roots: Number of the cluster that each is now part of, (k,): the smallest member.
        grown: Numbers of the clusters that have grown, (g,).
        clusters: These g clusters.
    """

    nodes: Int64
    roots: Int64
    grown: Int64
    clusters: Clusters


RunTasks = Callable[[Iterable[LinkageTask]], Iterable[LinkageResult]]


def run_linkage_task(task: LinkageTask) -> LinkageResult:
    """Merge the clusters of a task."""
    group, merged = merge_in_rounds(
        task.clusters, task.u, task.v, task.weight, threshold=task.threshold, apart=task.apart
    )
    members = np.bincount(group, minlength=len(merged))
    # Groups are numbered by their smallest member, which comes first among the positions.
    first = np.full(len(merged), len(group))
    np.minimum.at(first, group, np.arange(len(group)))
    has_grown = np.flatnonzero(members > 1)
    return LinkageResult(task.nodes, task.nodes[first[group]], task.nodes[first[has_grown]], merged.take(has_grown))


def run_tasks_here(tasks: Iterable[LinkageTask]) -> Iterator[LinkageResult]:
    """Run tasks one after the other in this process."""
    return map(run_linkage_task, tasks)


def merge_by_average_linkage(
    clusters: Clusters,
    u: Int64 | Int32,
    v: Int64 | Int32,
    threshold: float,
    forbidden: Int64 | None = None,
    *,
    person: Int32 | None = None,
    start: Int64 | None = None,
    run_tasks: RunTasks = run_tasks_here,
) -> tuple[Int64, Clusters]:
    """Merge clusters while the mean similarity of two that an edge joins reaches the threshold.

    Args:
        clusters: k clusters. Their sums may be mapped from a file; what does not grow is not copied.
        u: one cluster per edge, (m,).
        v: the other cluster, (m,).
        threshold: similarity.
        forbidden: pairs (p, 2) of clusters that must not come together.
        person: number of the person that each cluster is known to be, (k,), -1 for none. Two different persons must
            not come together.
        start: groups (k,) that are merged first, whatever their similarity. None may hold what must not come together.
        run_tasks: runs the tasks of a step, in any order and anywhere.

    Returns:
        The group (k,) of each cluster, numbered by its smallest member, and the merged clusters.
    """
    count = len(clusters)
    store = _ClusterStore(clusters)
    roots = np.arange(count)
    if start is not None:
        roots = _merge_start(store, start)
    apart = CannotLinks(
        np.empty((0, 2), np.int64) if forbidden is None else forbidden,
        np.empty(0, np.int32) if person is None else person,
    ).contract(roots, count)
    edges = _Edges.start(u, v, roots)
    for step in _STEPS:
        level = threshold + step
        edges = edges.refresh(store, level, threshold)
        step_roots = np.arange(count)
        has_grown = np.zeros(count, bool)
        for result in run_tasks(_split_tasks(edges, store, level, apart)):
            step_roots[result.nodes] = result.roots
            has_grown[result.grown] = True
            store.apply(result)
        # Contract the graph. What has grown is compared again only if a later step may reach it.
        roots = step_roots[roots]
        apart = apart.contract(step_roots, count)
        edges = edges.contract(step_roots, has_grown)
        release_pages(clusters.sums)
    return renumber_labels(roots), store.gather(np.flatnonzero(roots == np.arange(count)))


def _merge_start(store: "_ClusterStore", start: Int64) -> Int64:
    """Merge groups (k,) of clusters that are one from the start, and return the root (k,) of each cluster."""
    nodes = np.flatnonzero(np.bincount(start)[start] > 1)
    group = renumber_labels(np.unique(start[nodes], return_inverse=True)[1])
    first = np.full(int(group.max(initial=-1)) + 1, len(start))
    np.minimum.at(first, group, nodes)
    merged = store.gather(nodes).merge(group)
    store.apply(LinkageResult(nodes, first[group], first, merged))
    roots = np.arange(len(start))
    roots[nodes] = first[group]
    return roots


class _ClusterStore:
    """The clusters by number, of which only those that have grown take memory."""

    def __init__(self, clusters: Clusters):
        self._initial = clusters
        self._row = np.full(len(clusters), -1, np.int32)  # of a cluster that has grown, among the grown ones
        sums = np.empty((0, clusters.sums.shape[1]), np.float32)
        self._grown = Clusters(sums, np.empty(0, np.float32), np.empty(0, np.int64))
        self._free = np.empty(0, np.int32)  # rows without a cluster

    @property
    def count(self) -> int:
        """Number of clusters at the start."""
        return len(self._initial)

    def gather(self, numbers: Int64 | Int32) -> Clusters:
        """Gather clusters (k,)."""
        gathered = self._initial.take(numbers)
        row = self._row[numbers]
        at = np.flatnonzero(row >= 0)
        grown = self._grown.take(row[at])
        gathered.sums[at] = grown.sums
        gathered.crowd[at] = grown.crowd
        gathered.size[at] = grown.size
        return gathered

    def compute_linkage(self, u: Int32, v: Int32) -> Float32:
        """Compute the mean similarity (m,) between clusters u (m,) and v (m,)."""
        linkage = np.empty(len(u), np.float32)
        for at in range(0, len(u), _PAIRS_PER_BLOCK):
            block = slice(at, at + _PAIRS_PER_BLOCK)
            linkage[block] = compute_paired_linkage(self.gather(u[block]), self.gather(v[block]))
        return linkage

    def apply(self, result: LinkageResult) -> None:
        """Take over what a task has merged."""
        # Free the rows of clusters that are part of another one now.
        row = self._row[result.nodes[result.roots != result.nodes]]
        self._free = np.concatenate([self._free, row[row >= 0]])
        # Give a row to what has grown for the first time.
        new = result.grown[self._row[result.grown] < 0]
        if len(self._free) < len(new):
            self._add_rows(max(len(new), _MIN_NEW_ROWS))
        self._row[new] = self._free[: len(new)]
        self._free = self._free[len(new) :]
        row = self._row[result.grown]
        self._grown.sums[row] = result.clusters.sums
        self._grown.crowd[row] = result.clusters.crowd
        self._grown.size[row] = result.clusters.size

    def _add_rows(self, count: int) -> None:
        """Make the arrays longer where they are: a copy would double their memory."""
        begin = len(self._grown)
        dimension = self._grown.sums.shape[1]
        self._grown.sums.resize((begin + count, dimension), refcheck=False)
        self._grown.crowd.resize(begin + count, refcheck=False)
        self._grown.size.resize(begin + count, refcheck=False)
        self._free = np.concatenate([self._free, np.arange(begin, begin + count, dtype=np.int32)])


@dataclass(frozen=True)
class _Edges:
    """The edges between clusters.

    Attributes:
        u: One cluster per edge, (m,); u < v.
        v: The other cluster, (m,).
        weight: Mean similarity (m,), or a bound of it.
        is_exact: Whether it is the mean similarity, (m,). Else it is the largest that the parts of the two had with
            each other. If no edge is missing, the mean over all pairs is not above that.
    """

    u: Int32
    v: Int32
    weight: Float32
    is_exact: Bool

    @classmethod
    def start(cls, u: Int64 | Int32, v: Int64 | Int32, roots: Int64) -> "_Edges":
        """Make edges that are not weighed yet between the clusters (k,) that the ends are part of."""
        count = len(roots)
        keys = make_edge_keys(u, v, count, roots)
        # Divided straight into four bytes each, because there may be ten edges per face.
        low = np.floor_divide(keys, max(1, count), out=np.empty(len(keys), np.int32), casting="unsafe")
        high = np.remainder(keys, max(1, count), out=np.empty(len(keys), np.int32), casting="unsafe")
        return cls(low, high, np.full(len(keys), np.inf, np.float32), np.zeros(len(keys), bool))

    def take(self, chosen: Bool) -> "_Edges":
        return _Edges(self.u[chosen], self.v[chosen], self.weight[chosen], self.is_exact[chosen])

    def refresh(self, store: _ClusterStore, level: float, threshold: float) -> "_Edges":
        """Compute the mean similarity if the bound reaches the level. What is below the threshold is dropped.

        The weights are changed in place.
        """
        for at in range(0, len(self.u), _PAIRS_PER_BLOCK):
            block = slice(at, at + _PAIRS_PER_BLOCK)
            due = at + np.flatnonzero(~self.is_exact[block] & (self.weight[block] >= level))
            self.weight[due] = store.compute_linkage(self.u[due], self.v[due])
            self.is_exact[due] = True
        kept = self.weight >= threshold
        return self if kept.all() else self.take(kept)

    def contract(self, roots: Int64, has_grown: Bool) -> "_Edges":
        """Give every edge to the clusters (k,) that its ends are part of now. Of several the largest weight stays."""
        small = roots.astype(np.int32)
        u = small[self.u]
        v = small[self.v]
        is_changed = has_grown[u] | has_grown[v]
        different = is_changed & (u != v)
        keys = np.minimum(u, v)[different].astype(np.int64) * len(roots) + np.maximum(u, v)[different]
        del u, v  # a column at a time is copied below, because there may be ten edges per face
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begins = np.flatnonzero(np.diff(keys, prepend=-1) > 0)
        weight = self.weight[different][order]
        bound = np.maximum.reduceat(weight, begins) if len(begins) else weight
        keys = keys[begins]
        unchanged = ~is_changed
        return _Edges(
            np.concatenate([self.u[unchanged], (keys // len(roots)).astype(np.int32)]),
            np.concatenate([self.v[unchanged], (keys % len(roots)).astype(np.int32)]),
            np.concatenate([self.weight[unchanged], bound]),
            np.concatenate([self.is_exact[unchanged], np.zeros(len(keys), bool)]),
        )


def _split_tasks(edges: _Edges, store: _ClusterStore, level: float, apart: CannotLinks) -> Iterator[LinkageTask]:
    """Split the components of the edges that reach a level into tasks."""
    reached = edges.take(edges.weight >= level)
    reached = reached.take(~apart.forbid(reached.u, reached.v, store.count))
    if not len(reached.u):
        return
    # Number the clusters with such an edge, in the order that they have, and find their components.
    nodes = np.unique(np.concatenate([reached.u, reached.v])).astype(np.int64)
    u = np.searchsorted(nodes, reached.u)
    v = np.searchsorted(nodes, reached.v)
    component = find_components(len(nodes), u, v)
    # Fill tasks with whole components.
    sizes = np.bincount(component)
    task_of_component = (np.cumsum(sizes) - sizes) // _MAX_NODES_PER_TASK
    task_of_node = task_of_component[component]
    inside = apart.select(nodes)
    inside_pairs = inside.pairs[task_of_node[inside.pairs[:, 0]] == task_of_node[inside.pairs[:, 1]]]
    for task in np.unique(task_of_component):
        members = np.flatnonzero(task_of_node == task)
        chosen = task_of_node[u] == task
        pairs = inside_pairs[task_of_node[inside_pairs[:, 0]] == task]
        yield LinkageTask(
            nodes[members],
            store.gather(nodes[members]),
            np.searchsorted(members, u[chosen]),
            np.searchsorted(members, v[chosen]),
            reached.weight[chosen],
            level,
            inside.take(members, pairs),
        )
