"""Persons: clusters with an id that stays, through full clusterings too, and with the name that people gave.

A cluster is the person whose confirmed faces it holds. Else it is the earlier person with whom it shares most faces. A
named person keeps its id also while none of its faces is in the gallery.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.decisions.persons import DecidedFaces
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.sorted_lookup import find_sorted, is_in_sorted
from facepipe.types import Bool, Int32, Int64

PERSONS = "persons.parquet"
PERSON_SCHEMA = pa.schema(
    [
        ("person", pa.int64()),  # stays over clusterings
        ("cluster", pa.int64()),  # null while none of its faces is in the gallery
        ("size", pa.int64()),
        ("medoid", pa.int64()),  # the face that fits best; null if that was erased
        ("name", pa.string()),  # as people decided; null without a name
        ("first_seen", pa.timestamp("us", "UTC")),  # when its first face came in
        ("last_seen", pa.timestamp("us", "UTC")),
    ]
)
_ROWS = 65536
_NEVER = np.iinfo(np.int64).max
_NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True)
class EarlierPersons:
    """The persons of a report.

    Attributes:
        table: rows of persons.parquet.
        next_person: id of the next new person.
    """

    table: pa.Table = field(default_factory=PERSON_SCHEMA.empty_table)
    next_person: int = 0

    @classmethod
    def load(cls, folder: str, next_person: int = 0) -> "EarlierPersons | None":
        """Load the persons of a report; None if it has none, as reports of older versions.

        Args:
            folder: the report's folder.
            next_person: lowest id of the next new person.

        Raises:
            StorageError: the table cannot be read.
        """
        path = os.path.join(folder, PERSONS)
        try:
            table = pq.read_table(path, schema=PERSON_SCHEMA)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error
        return cls(table, cls(table, next_person).find_next())

    def find_next(self) -> int:
        """Find the id of the next new person: no id is given twice."""
        return max(self.next_person, int(self.table["person"].to_numpy().max(initial=-1)) + 1)

    @property
    def names(self) -> dict[str, int]:
        """The persons by name."""
        named = self.table.filter(self.table["name"].is_valid())
        return dict(zip(named["name"].to_pylist(), named["person"].to_pylist(), strict=True))

    def find(self, clusters: Int64) -> Int64:
        """Find the persons (m,) of earlier clusters (m,), -1 for none."""
        present = self.table.filter(self.table["cluster"].is_valid())
        numbers = present["cluster"].to_numpy()
        order = np.argsort(numbers)
        at = find_sorted(numbers[order], clusters)
        persons = np.append(present["person"].to_numpy()[order], -1)
        return np.asarray(persons[at], np.int64)


@dataclass(frozen=True)
class SharedFaces:
    """How many faces clusters and earlier persons share.

    Attributes:
        cluster: cluster of each pair, (m,).
        person: earlier person of each pair, (m,).
        decided: faces that both hold and that people have decided on, (m,).
        count: faces that both hold, (m,).
    """

    cluster: Int64
    person: Int64
    decided: Int64
    count: Int64

    @classmethod
    def count_up(cls, cluster: Int64, person: Int64, weight: Int64, is_decided: Bool) -> "SharedFaces":
        """Count the faces of each pair.

        Args:
            cluster: a cluster (n,), as of a face.
            person: its earlier person, (n,), -1 for none.
            weight: number of faces, (n,).
            is_decided: whether people have decided on them, (n,).
        """
        known = np.flatnonzero((person >= 0) & (cluster >= 0))
        stride = int(person.max(initial=-1)) + 1
        keys, pair = np.unique(cluster[known] * max(1, stride) + person[known], return_inverse=True)
        count = np.bincount(pair, weight[known], len(keys)).astype(np.int64)
        decided = np.bincount(pair, weight[known] * is_decided[known], len(keys)).astype(np.int64)
        return cls(keys // max(1, stride), keys % max(1, stride), decided, count)

    def take(self, chosen: Bool) -> "SharedFaces":
        """Select pairs."""
        return SharedFaces(self.cluster[chosen], self.person[chosen], self.decided[chosen], self.count[chosen])


def match_persons(
    shared: SharedFaces, name: Int32 | Int64, names: Sequence[str], earlier: EarlierPersons, order: Int64
) -> Int64:
    """Assign persons to clusters.

    A name decides first. Then decided faces count, and then all faces. What is left gets new ids.

    Args:
        shared: faces that k clusters share with earlier persons.
        name: number of the name of each cluster, (k,), -1 for none. No two clusters have one name.
        names: the names, by number.
        earlier: the persons so far.
        order: clusters in the order in which they get new ids; the others get none.

    Returns:
        The person of each cluster, (k,), -1 for those that are not in the order.
    """
    persons = np.full(len(name), -1, np.int64)
    person_of_name = earlier.names
    for cluster in np.flatnonzero(name >= 0).tolist():
        persons[cluster] = person_of_name.get(names[name[cluster]], -1)
    # A person whose name another cluster has is taken. Repeat: two that share more with each other than with any other.
    left = shared
    while True:
        is_free = (persons[left.cluster] < 0) & ~np.isin(left.person, persons[persons >= 0])
        left = left.take(is_free)
        if not len(left.cluster):
            break
        best_of_cluster = _find_best(left, left.cluster, left.person)
        best_of_person = _find_best(left, left.person, left.cluster)
        mutual = np.intersect1d(best_of_cluster, best_of_person)
        persons[left.cluster[mutual]] = left.person[mutual]
    unmatched = order[persons[order] < 0]
    persons[unmatched] = earlier.next_person + np.arange(len(unmatched))
    is_left_out = np.ones(len(persons), bool)
    is_left_out[order] = False
    persons[is_left_out] = -1
    return persons


def carry_names(
    persons: Int64,
    name: Int32 | Int64,
    earlier: EarlierPersons,
    decided: DecidedFaces,
    cluster_of_group: Int64,
) -> Int64:
    """Let persons keep their names while none of the faces that people named is in the gallery.

    Args:
        persons: person of each of k clusters, (k,).
        name: number of the name that decided faces give it, (k,), -1 for none.
        earlier: the persons so far.
        decided: what people have decided. A name that no decision gives any more is lost.
        cluster_of_group: position of the cluster of each group of decided faces, (g,), -1 for none.

    Returns:
        The number of the name of each cluster, (k,), -1 for none.
    """
    carried = np.array(name, np.int64)
    number_of_name = {text: number for number, text in enumerate(decided.names)}
    used = set(carried[carried >= 0].tolist())
    # A cluster does not get the name of which people have said that a face of it is not.
    pairs = np.concatenate([decided.different, decided.different[:, ::-1]])
    pairs = pairs[(decided.name[pairs[:, 0]] >= 0) & (cluster_of_group[pairs[:, 1]] >= 0)]
    rejected = set(zip(cluster_of_group[pairs[:, 1]].tolist(), decided.name[pairs[:, 0]].tolist(), strict=True))
    order = np.argsort(persons, kind="stable")
    names = earlier.names
    at = find_sorted(persons[order], np.array(list(names.values()), np.int64))
    clusters = np.where(at >= 0, order[at], -1).tolist() if len(order) else [-1] * len(names)
    for text, cluster in zip(names, clusters, strict=True):
        number = number_of_name.get(text, -1)
        if number < 0 or cluster < 0 or number in used:
            continue
        if carried[cluster] < 0 and (cluster, number) not in rejected:
            carried[cluster] = number
    return carried


def _find_best(shared: SharedFaces, group: Int64, other: Int64) -> Int64:
    """Find the position of the best pair of each group."""
    order = np.lexsort((other, -shared.count, -shared.decided, group))
    return order[np.flatnonzero(np.diff(group[order], prepend=-1))]


@dataclass(frozen=True)
class SeenTimes:
    """When the faces of k clusters came in, in microseconds since 1970.

    Attributes:
        first: the first of each, (k,); the largest number if that is not known.
        last: the last of each, (k,); the smallest number if that is not known.
    """

    first: Int64
    last: Int64

    @classmethod
    def make_unknown(cls, count: int) -> "SeenTimes":
        """Say nothing about `count` clusters."""
        return cls(np.full(count, _NEVER), np.full(count, -_NEVER))

    def add(self, clusters: Int64, times: pa.Array | pa.ChunkedArray) -> None:
        """Add faces by their clusters (n,) and when they came in (n,)."""
        values = pc.fill_null(times.cast(pa.timestamp("us", "UTC")).cast(pa.int64()), -1)
        numbers = values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy()
        known = (numbers >= 0) & (clusters >= 0)
        np.minimum.at(self.first, clusters[known], numbers[known])
        np.maximum.at(self.last, clusters[known], numbers[known])

    @classmethod
    def read(cls, gallery: Gallery, ids: Int64, clusters: Int64, count: int) -> "SeenTimes":
        """Read them by a pass over the gallery.

        Args:
            gallery: the gallery.
            ids: sorted ids of faces, (n,).
            clusters: their clusters, (n,), -1 for none.
            count: number of clusters.
        """
        seen = cls.make_unknown(count)
        for batch in gallery.batches(["face_id", "ingested_at"], rows=_ROWS):
            faces = batch.filter(batch["face_id"].is_valid())
            at = find_sorted(ids, faces["face_id"].to_numpy())
            number = np.where(at >= 0, clusters[at] if len(clusters) else -1, -1)
            seen.add(number, faces["ingested_at"])
        return seen


def build_person_table(
    persons: Int64,
    *,
    clusters: Int64,
    sizes: Int64,
    medoids: Int64,
    name: Int32 | Int64,
    seen: SeenTimes,
    earlier: EarlierPersons,
    decided: DecidedFaces,
) -> pa.Table:
    """Build the rows of persons.parquet, by rising id.

    Args:
        persons: ids of the persons that have faces, (k,).
        clusters: number of each one's cluster, (k,).
        sizes: faces of each, (k,).
        medoids: id of the face that fits each best, (k,).
        name: number of each one's name among the decided ones, (k,), -1 for none.
        seen: when their faces came in.
        earlier: the persons so far. Of those that have no faces any more the named ones stay.
        decided: what people have decided.
    """
    is_first_known = seen.first != _NEVER
    names = pa.array(decided.names, pa.string())
    table = pa.table(
        {
            "person": persons,
            "cluster": clusters,
            "size": sizes,
            "medoid": medoids,
            "name": names.take(pa.array(name, pa.int64(), mask=name < 0)),
            "first_seen": pa.array(seen.first, pa.int64(), mask=~is_first_known).cast(pa.timestamp("us", "UTC")),
            "last_seen": pa.array(seen.last, pa.int64(), mask=~is_first_known).cast(pa.timestamp("us", "UTC")),
        },
        schema=PERSON_SCHEMA,
    )
    # A name that decisions still give keeps its person.
    others = earlier.table.filter(pa.array(~is_in_sorted(np.sort(persons), earlier.table["person"].to_numpy())))
    is_awaited = pc.and_(
        pc.is_in(others["name"], value_set=names),
        pc.invert(pc.is_in(others["name"], value_set=table["name"].drop_null().combine_chunks())),
    )
    absent = others.filter(pc.fill_null(is_awaited, False))
    absent = absent.set_column(1, PERSON_SCHEMA.field(1), pa.nulls(absent.num_rows, pa.int64()))
    absent = absent.set_column(2, PERSON_SCHEMA.field(2), pa.array(np.zeros(absent.num_rows, np.int64)))
    absent = absent.set_column(3, PERSON_SCHEMA.field(3), pa.nulls(absent.num_rows, pa.int64()))
    return pa.concat_tables([table, absent]).sort_by("person")


def update_persons(
    earlier: EarlierPersons,
    table: pa.Table,
    *,
    decided: DecidedFaces,
    cluster_of_decided: Int64,
    cluster_of_group: Int64,
    new_clusters: Int64,
    new_times: pa.ChunkedArray,
    seen: SeenTimes | None,
) -> pa.Table:
    """Bring persons up to date with clusters that keep their numbers.

    Args:
        earlier: the persons so far.
        table: rows of clusters.parquet, those without faces included.
        decided: what people have decided.
        cluster_of_decided: cluster that each decided face had, (q,), -1 for none.
        cluster_of_group: cluster that each group of decided faces has now, (g,), -1 for none.
        new_clusters: clusters of the new faces, (n,).
        new_times: when these came in, (n,).
        seen: when the faces of each cluster came in, if the persons so far do not say.

    Returns:
        Rows of persons.parquet.
    """
    present = table.filter(pc.greater(table["size"], 0)).sort_by("cluster")
    numbers = present["cluster"].to_numpy()
    sizes = present["size"].to_numpy()
    # A cluster is the person that it was, and decided faces take theirs along.
    now = find_sorted(numbers, cluster_of_group[decided.group])
    shared = SharedFaces.count_up(
        np.concatenate([np.arange(len(numbers)), now]),
        earlier.find(np.concatenate([numbers, cluster_of_decided])),
        np.concatenate([sizes, np.ones(len(now), np.int64)]),
        np.repeat([False, True], [len(numbers), len(now)]),
    )
    name = np.full(len(numbers), -1, np.int64)
    at = find_sorted(numbers, cluster_of_group)
    is_named = (at >= 0) & (decided.name >= 0)
    name[at[is_named]] = decided.name[is_named]
    persons = match_persons(shared, name, decided.names, earlier, np.arange(len(numbers)))
    name = carry_names(persons, name, earlier, decided, at)
    times = _follow_seen(earlier, persons) if seen is None else SeenTimes(seen.first[numbers], seen.last[numbers])
    times.add(find_sorted(numbers, new_clusters), new_times)
    return build_person_table(
        persons,
        clusters=numbers,
        sizes=sizes,
        medoids=present["medoid"].to_numpy(),
        name=name,
        seen=times,
        earlier=earlier,
        decided=decided,
    )


def _follow_seen(earlier: EarlierPersons, persons: Int64) -> SeenTimes:
    """Take over when the faces of persons (k,) came in that were known before."""
    seen = SeenTimes.make_unknown(len(persons))
    table = earlier.table.filter(earlier.table["first_seen"].is_valid())
    ids = table["person"].to_numpy()
    order = np.argsort(ids)
    at = find_sorted(ids[order], persons)
    known = at >= 0
    first = table["first_seen"].cast(pa.int64()).to_numpy()[order]
    last = table["last_seen"].cast(pa.int64()).to_numpy()[order]
    seen.first[known] = first[at[known]]
    seen.last[known] = last[at[known]]
    return seen
