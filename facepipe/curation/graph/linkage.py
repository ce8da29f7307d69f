"""Average linkage on a sparse graph: exact means over all pairs of two clusters, merged down a ladder of thresholds.

The mean similarity of the faces of two clusters is the inner product of their mean vectors less the mean of their mean
densities. So it is exact whatever pairs the graph holds; the graph only says which clusters to look at.

The threshold falls in steps. At each step the edges that reach it fall into connected components, most of them as small
as a person. No component knows of another: each is merged by itself, in rounds, and the graph is contracted before the
next step. So the result does not depend on how the components are spread over tasks or machines. If no edge is missing
it is that of merging one pair at a time, because all merges above a step come before any below it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from facepipe.curation.graph.cannot_links import CannotLinks
from facepipe.curation.graph.clusters import Clusters, compute_paired_linkage
from facepipe.curation.graph.components import find_components, renumber_labels
from facepipe.curation.graph.rounds import merge_in_rounds
from facepipe.storage.mapped import TemporaryRows, make_temporary_array, release_pages
from facepipe.storage.memory import release_freed_memory
from facepipe.storage.partitions import MAX_PARTITIONS, PartitionedTable, spread_keys
from facepipe.types import Bool, Float32, Int32, Int64, UInt8

# By how much each step lies above the threshold. Steps of .02 let a component grow with the gallery (28 % of 300,000
# faces); with steps of .01 the largest one follows the largest person. The upper ones are for wide spaces.
_STEPS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.17, 0.14, 0.12, *(n / 100 for n in range(10, -1, -1)))
_MAX_NODES_PER_TASK = 1 << 14  # some 8 MB of sums
_PAIRS_PER_BLOCK = 1 << 13  # pairs whose linkage is computed at a time: their sums stay in the cache
_EDGES_PER_BLOCK = 1 << 18  # edges that are divided among parts at a time
_EDGES_PER_PART = 1 << 20  # some 13 MB
_SCHEMA = pa.schema([("u", pa.int32()), ("v", pa.int32()), ("weight", pa.float32()), ("state", pa.uint8())])
_BOUND, _EXACT, _FRESH = np.arange(3, dtype=np.uint8)


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
        margin: What large groups must have above single faces.
    """

    nodes: Int64
    clusters: Clusters
    u: Int64
    v: Int64
    weight: Float32
    threshold: float
    apart: CannotLinks
    margin: float = 0.0


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
        task.clusters,
        task.u,
        task.v,
        task.weight,
        threshold=task.threshold,
        apart=task.apart,
        margin=task.margin,
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
    margin: float = 0.0,
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
        margin: how much more than the threshold two groups of very many faces must reach; single faces need not, and
            groups between them a part of it (`compute_paired_linkage`).
        run_tasks: runs the tasks of a step, in any order and anywhere.

    Returns:
        The group (k,) of each cluster, numbered by its smallest member, and the merged clusters.
    """
    count = len(clusters)
    store = _ClusterStore(clusters, margin)
    roots = np.arange(count)
    if start is not None:
        roots = _merge_start(store, start)
    apart = CannotLinks(
        np.empty((0, 2), np.int64) if forbidden is None else forbidden,
        np.empty(0, np.int32) if person is None else person,
    ).contract(roots, count)
    edges = _EdgeParts.start(u, v, roots)
    for step in _STEPS:
        level = threshold + step
        reached = edges.refresh(store, level, threshold)
        step_roots = np.arange(count)
        has_grown = np.zeros(count, bool)
        for result in run_tasks(_split_tasks(reached, store, level, apart)):
            step_roots[result.nodes] = result.roots
            has_grown[result.grown] = True
            store.apply(result)
        # Contract the graph. What has grown is compared again only if a later step may reach it.
        roots = step_roots[roots]
        apart = apart.contract(step_roots, count)
        edges = edges.contract(step_roots, has_grown)
        release_pages(clusters.sums)
        release_freed_memory()
    return renumber_labels(roots), store.gather_mapped(np.flatnonzero(roots == np.arange(count)))


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

    def __init__(self, clusters: Clusters, margin: float):
        self._initial = clusters
        self.margin = margin  # what large groups must have above single faces
        self._row = np.full(len(clusters), -1, np.int32)  # of a cluster that has grown, among the grown ones
        # A cluster that has grown has two of the first ones at least.
        most = len(clusters) // 2
        self._rows = TemporaryRows(np.float32, most, clusters.sums.shape[1])
        self._grown = Clusters(self._rows.array, np.zeros(most, np.float32), np.zeros(most, np.int64))
        self._used = 0
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
        """Compute the mean similarity (m,) between clusters u (m,) and v (m,), less the margin of groups."""
        linkage = np.empty(len(u), np.float32)
        for at in range(0, len(u), _PAIRS_PER_BLOCK):
            block = slice(at, at + _PAIRS_PER_BLOCK)
            linkage[block] = compute_paired_linkage(self.gather(u[block]), self.gather(v[block]), self.margin)
        return linkage

    def apply(self, result: LinkageResult) -> None:
        """Take over what a task has merged."""
        # Free the rows of clusters that are part of another one now.
        row = self._row[result.nodes[result.roots != result.nodes]]
        self._free = np.concatenate([self._free, row[row >= 0]])
        # Give a row to what has grown for the first time.
        new = result.grown[self._row[result.grown] < 0]
        missing = len(new) - len(self._free)
        if missing > 0:
            self._rows.take_room(self._used + missing)
            self._free = np.concatenate([self._free, np.arange(self._used, self._used + missing, dtype=np.int32)])
            self._used += missing
        self._row[new] = self._free[: len(new)]
        self._free = self._free[len(new) :]
        row = self._row[result.grown]
        self._grown.sums[row] = result.clusters.sums
        self._grown.crowd[row] = result.clusters.crowd
        self._grown.size[row] = result.clusters.size

    def gather_mapped(self, numbers: Int64) -> Clusters:
        """Gather clusters (k,), with their sums in a temporary file."""
        sums = make_temporary_array(np.float32, (len(numbers), self._initial.sums.shape[1]))
        crowd = np.empty(len(numbers), np.float32)
        size = np.empty(len(numbers), np.int64)
        for at in range(0, len(numbers), _PAIRS_PER_BLOCK):
            block = slice(at, at + _PAIRS_PER_BLOCK)
            clusters = self.gather(numbers[block])
            sums[block] = clusters.sums
            crowd[block] = clusters.crowd
            size[block] = clusters.size
        return Clusters(sums, crowd, size)


@dataclass(frozen=True)
class _Edges:
    """Edges between clusters.

    Attributes:
        u: One cluster per edge, (m,); u < v.
        v: The other cluster, (m,).
        weight: Mean similarity (m,), or a bound of it.
        state: Whether it is the mean similarity, (m,), by _EXACT, _BOUND and _FRESH. A bound is the largest that the
            parts of the two had with each other. If no edge is missing, the mean over all pairs is not above that.
            Of fresh edges one may come several times.
    """

    u: Int32
    v: Int32
    weight: Float32
    state: UInt8

    @classmethod
    def concatenate(cls, parts: "Sequence[_Edges]") -> "_Edges":
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in _SCHEMA.names))

    @classmethod
    def from_table(cls, table: pa.Table) -> "_Edges":
        return cls(*(table[name].to_numpy() for name in _SCHEMA.names))

    def to_table(self) -> pa.Table:
        return pa.table([self.u, self.v, self.weight, self.state], schema=_SCHEMA)

    def take(self, chosen: Bool | Int64) -> "_Edges":
        return _Edges(self.u[chosen], self.v[chosen], self.weight[chosen], self.state[chosen])

    def unite(self, count: int) -> "_Edges":
        """Keep every fresh edge once, with the largest weight as a bound."""
        fresh = np.flatnonzero(self.state == _FRESH)
        if not len(fresh):
            return self
        keys = self.u[fresh].astype(np.int64) * count + self.v[fresh]
        order = np.argsort(keys, kind="stable")
        begins = np.flatnonzero(np.diff(keys[order], prepend=-1) > 0)
        weight = np.maximum.reduceat(self.weight[fresh][order], begins)
        first = fresh[order[begins]]
        united = _Edges(self.u[first], self.v[first], weight, np.full(len(first), _BOUND))
        return _Edges.concatenate([self.take(self.state != _FRESH), united])

    def refresh(self, store: _ClusterStore, level: float, threshold: float) -> "_Edges":
        """Compute the mean similarity if the bound reaches the level. What is below the threshold is dropped."""
        due = np.flatnonzero((self.state != _EXACT) & (self.weight >= level))
        if not len(due):
            return self
        weight = self.weight.copy()
        state = self.state.copy()
        weight[due] = store.compute_linkage(self.u[due], self.v[due])
        state[due] = _EXACT
        refreshed = _Edges(self.u, self.v, weight, state)
        kept = weight >= threshold
        return refreshed if kept.all() else refreshed.take(kept)


class _EdgeParts:
    """All edges between clusters, in parts by the smaller cluster, which lie in a temporary file.

    The order of the edges does not matter for what is merged, and neither does the number of parts.
    """

    def __init__(self, table: PartitionedTable, cluster_count: int):
        self._table = table
        self._cluster_count = cluster_count

    @classmethod
    def start(cls, u: Int64 | Int32, v: Int64 | Int32, roots: Int64) -> "_EdgeParts":
        """Make edges that are not weighed yet between the clusters (k,) that the ends are part of."""
        parts = max(1, min(MAX_PARTITIONS, -(-len(u) // _EDGES_PER_PART)))
        edges = cls(PartitionedTable(_SCHEMA, parts), len(roots))
        for at in range(0, len(u), _EDGES_PER_BLOCK):
            left = roots[u[at : at + _EDGES_PER_BLOCK]].astype(np.int32)
            right = roots[v[at : at + _EDGES_PER_BLOCK]].astype(np.int32)
            unknown = np.full(len(left), np.inf, np.float32)
            edges._add(_Edges(left, right, unknown, np.full(len(left), _FRESH)))
        return edges

    def _add(self, edges: _Edges) -> None:
        """Add edges between different clusters to the parts of the smaller ones."""
        different = edges.u != edges.v
        low = np.minimum(edges.u, edges.v)[different]
        high = np.maximum(edges.u, edges.v)[different]
        ordered = _Edges(low, high, edges.weight[different], edges.state[different])
        self._table.append(ordered.to_table(), spread_keys(low, self._table.count))

    def refresh(self, store: _ClusterStore, level: float, threshold: float) -> _Edges:
        """Weigh the edges that may reach a level, and return those that do. What is below the threshold is dropped."""
        refreshed = PartitionedTable(_SCHEMA, self._table.count)
        reached = []
        for number in range(self._table.count):
            part = _Edges.from_table(self._table.read(number)).unite(self._cluster_count)
            part = part.refresh(store, level, threshold)
            refreshed.add(number, part.to_table())
            reached.append(part.take(part.weight >= level))
        self._table = refreshed
        return _Edges.concatenate(reached)

    def contract(self, roots: Int64, has_grown: Bool) -> "_EdgeParts":
        """Give every edge to the clusters (k,) that its ends are part of now. Weights of those that grew are bounds."""
        if not has_grown.any():
            return self
        contracted = _EdgeParts(PartitionedTable(_SCHEMA, self._table.count), self._cluster_count)
        small = roots.astype(np.int32)
        for number in range(self._table.count):
            part = _Edges.from_table(self._table.read(number))
            u = small[part.u]
            v = small[part.v]
            is_changed = has_grown[u] | has_grown[v]
            contracted._table.add(number, part.take(~is_changed).to_table())
            changed = np.flatnonzero(is_changed)
            contracted._add(_Edges(u[changed], v[changed], part.weight[changed], np.full(len(changed), _FRESH)))
        return contracted


def _split_tasks(reached: _Edges, store: _ClusterStore, level: float, apart: CannotLinks) -> Iterator[LinkageTask]:
    """Split the components of the edges that reach a level into tasks."""
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
            store.margin,
        )
