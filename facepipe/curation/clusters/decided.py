"""What people have decided on the nodes of a graph, or on new faces: must-links, cannot-links and known persons.

Whoever merges clusters takes these as given, whatever the faces look like.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from facepipe.curation.graph.cannot_links import CannotLinks
from facepipe.curation.graph.components import find_components
from facepipe.decisions.persons import DecidedFaces
from facepipe.types import Bool, Int32, Int64

_NO_IDS = np.empty(0, np.int64)
_NO_PAIRS = np.empty((0, 2), np.int64)


@dataclass(frozen=True)
class DecidedNodes:
    """Decisions on n nodes.

    Attributes:
        group: Number of each node's group, (n,), -1 for none.
        person: Number of the name of each node's group, (n,), -1 for none.
        different: Pairs of nodes that are two persons, (p, 2): one pair per pair of groups.
        faces: All that people have decided.
    """

    group: Int64
    person: Int32
    different: Int64
    faces: DecidedFaces

    @classmethod
    def make_empty(cls, count: int) -> "DecidedNodes":
        """Say nothing about `count` nodes."""
        return cls(np.full(count, -1, np.int64), np.full(count, -1, np.int32), _NO_PAIRS, DecidedFaces())

    @classmethod
    def locate(cls, decided: DecidedFaces, ids: Int64) -> "DecidedNodes":
        """Find the groups of nodes by their face ids (n,). Ignored faces have none."""
        group = decided.find_groups(ids)
        group[decided.is_ignored(ids)] = -1
        known = np.flatnonzero(group >= 0)
        person = np.full(len(ids), -1, np.int32)
        person[known] = decided.name[group[known]]
        # A pair of groups holds between all their faces, so that one face of each is enough.
        first = np.full(decided.group_count, -1, np.int64)
        first[group[known[::-1]]] = known[::-1]
        pairs = first[decided.different]
        return cls(group, person, pairs[(pairs >= 0).all(axis=1)], decided)

    @property
    def is_decided(self) -> Bool:
        """Whether people have decided on each node, (n,)."""
        return np.asarray(self.group >= 0, bool)

    @property
    def links(self) -> CannotLinks:
        """What must not come together."""
        return CannotLinks(self.different, self.person)

    def unite(self, keys: Sequence[Int64], *, with_groups: bool = True) -> Int64:
        """Unite nodes that are one person: by decision, and by keys if no decision says otherwise.

        Args:
            keys: numbers (n,), -1 for none. Nodes with one number are held to be one person.
            with_groups: whether nodes of one group are united. Groups that are two persons are apart in any case.

        Returns:
            The component (n,) of each node, numbered by its smallest node.
        """
        count = len(self.group)
        group = self.group if with_groups else np.full(count, -1, np.int64)
        is_loose = np.zeros(count, bool)
        component = _unite(count, group, keys, is_loose)
        clashes = self.links.find_clashes(component)
        if not len(clashes):
            return component
        # Decided faces leave what holds two persons. The rest stays together, and any of them may join it later.
        is_loose = self.is_decided & np.isin(component, clashes)
        return _unite(count, group, keys, is_loose)


def _unite(count: int, group: Int64, keys: Sequence[Int64], is_loose: Bool) -> Int64:
    """Find the components of nodes with one group, or with one key unless they are loose."""
    left = [_NO_IDS]
    right = [_NO_IDS]
    for number in (group, *(np.where(is_loose, -1, key) for key in keys)):
        # Tie each numbered node to the first one of its number.
        numbered = np.flatnonzero(number >= 0)
        first = np.full(int(number.max(initial=-1)) + 1, count)
        np.minimum.at(first, number[numbered], numbered)
        left.append(first[number[numbered]])
        right.append(numbered)
    return find_components(count, np.concatenate(left), np.concatenate(right))
