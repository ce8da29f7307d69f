"""What must never be merged: pairs that are two persons, and nodes that are known to be different persons.

Of a hundred named persons every two are different. As pairs these would grow with the square. So a person per node says
the same, and both kinds are carried through every merge: what holds for a part holds for the whole.
"""

from dataclasses import dataclass, field

import numpy as np

from facepipe.sorted_lookup import find_sorted, is_in_sorted
from facepipe.types import Bool, Int32, Int64

_NO_PAIRS = np.empty((0, 2), np.int64)
_NOBODY = np.empty(0, np.int32)


@dataclass(frozen=True)
class CannotLinks:
    """What must not come together among k nodes.

    Attributes:
        pairs: Pairs of nodes that are two persons, (p, 2), in any order.
        person: Number of the person that each node is known to be, (k,), -1 for none. Nodes of two persons must not
            come together. Without a known person at all it may be empty.
    """

    pairs: Int64 = field(default_factory=_NO_PAIRS.copy)
    person: Int32 = field(default_factory=_NOBODY.copy)

    def __bool__(self) -> bool:
        return bool(len(self.pairs) or len(self.person))

    def forbid(self, u: Int64 | Int32, v: Int64 | Int32, count: int) -> Bool:
        """Tell which edges (m,) between nodes u and v of `count` join what must not come together."""
        is_forbidden = np.zeros(len(u), bool)
        if len(self.pairs):
            forbidden_keys = np.unique(self.pairs.min(axis=1) * count + self.pairs.max(axis=1))
            low = np.minimum(u, v).astype(np.int64)
            is_forbidden |= is_in_sorted(forbidden_keys, low * count + np.maximum(u, v))
        if len(self.person):
            first = self.person[u]
            second = self.person[v]
            is_forbidden |= (first >= 0) & (second >= 0) & (first != second)
        return is_forbidden

    def find_clashes(self, group: Int64) -> Int64:
        """Find the groups of nodes (k,) that hold what must not come together, sorted."""
        left = group[self.pairs[:, 0]]
        clashes = [left[left == group[self.pairs[:, 1]]]]
        if len(self.person):
            clashes.append(_find_mixed(group, self.person))
        return np.unique(np.concatenate(clashes))

    def contract(self, group: Int64, count: int) -> "CannotLinks":
        """Carry over what holds for nodes (k,) to the `count` groups that they are part of now."""
        person = self.person
        if len(person):
            person = np.full(count, -1, np.int32)
            known = np.flatnonzero(self.person >= 0)
            # A group is of one person: its only known number is the highest.
            np.maximum.at(person, group[known], self.person[known])
        return CannotLinks(np.asarray(group[self.pairs], np.int64), person)

    def take(self, nodes: Int64, pairs: Int64) -> "CannotLinks":
        """Select nodes (j,), rising, and some of the pairs, (q, 2), both of whose ends are among them."""
        person = self.person[nodes] if len(self.person) else self.person
        return CannotLinks(np.searchsorted(nodes, pairs), person)

    def select(self, nodes: Int64) -> "CannotLinks":
        """Select nodes (j,), rising, with all pairs that are inside."""
        at = find_sorted(nodes, self.pairs.ravel()).reshape(-1, 2)
        person = self.person[nodes] if len(self.person) else self.person
        return CannotLinks(at[(at >= 0).all(axis=1)], person)


def _find_mixed(group: Int64, person: Int32) -> Int64:
    """Find the groups of nodes (k,) that hold nodes of different persons."""
    known = np.flatnonzero(person >= 0)
    members = group[known]
    order = np.argsort(members, kind="stable")
    members = members[order]
    numbers = person[known][order]
    is_same_group = members[1:] == members[:-1]
    return np.asarray(members[1:][is_same_group & (numbers[1:] != numbers[:-1])], np.int64)
