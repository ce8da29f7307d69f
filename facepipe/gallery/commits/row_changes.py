"""What a run changes in rows that are in the table already: rows that go, new fingerprints and new labels."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from facepipe.gallery.commits.rewrite import Rewrite, plan_rewrite_of_uris
from facepipe.schema import FACES


@dataclass(frozen=True)
class RowChanges:
    """Changes of rows, by the uri of their image.

    Attributes:
        replaced: Uris whose rows are deleted.
        touched: New fingerprints.
        relabelled: New labels; None for none.
    """

    replaced: set[str] = field(default_factory=set)
    touched: dict[str, str] = field(default_factory=dict)
    relabelled: dict[str, str | None] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing changes."""
        return not (self.replaced or self.touched or self.relabelled)

    def plan_rewrite(self) -> Rewrite:
        """Plan the rewrite of the files that hold these rows."""
        # Readers lose nothing by a new fingerprint; rows that go and new labels are changes of data.
        return plan_rewrite_of_uris(
            self.replaced | self.touched.keys() | self.relabelled.keys(),
            self._change_rows,
            data_change=bool(self.replaced or self.relabelled),
            change_marked=self._change_marked,
            keeps=self._find_kept,
        )

    def _find_kept(self, rows: pa.Table) -> pa.BooleanArray:
        return pa.array([uri not in self.replaced for uri in rows["uri"].to_pylist()], pa.bool_())

    def _change_marked(self, rows: pa.Table) -> pa.Table:
        """Change fingerprints of rows, and leave out those that other changes concern as well."""
        others = self.replaced | self.relabelled.keys()
        is_only_touched = [uri in self.touched and uri not in others for uri in rows["uri"].to_pylist()]
        rows = rows.filter(pa.array(is_only_touched, pa.bool_()))
        rows = _set_marked(rows, "fingerprint", [self.touched[uri] for uri in rows["uri"].to_pylist()])
        return _set_marked(rows, "missing_since", [None] * rows.num_rows)

    def _change_rows(self, rows: pa.Table, mask: pa.BooleanArray) -> pa.Table:
        if self.replaced:
            replaced_uris = pa.array(sorted(self.replaced), pa.string())
            rows = rows.filter(pc.invert(pc.is_in(rows["uri"], replaced_uris)))
        # A touched file is there, so it is no longer missing.
        if self.touched:
            rows = _set_column(rows, "fingerprint", self.touched)
            rows = _set_column(rows, "missing_since", dict.fromkeys(self.touched))
        if self.relabelled:
            rows = _set_column(rows, "identity", self.relabelled)
        return rows


def _set_column(rows: pa.Table, name: str, values: dict[str, Any]) -> pa.Table:
    """Set the values of a column by uri; rows of other uris keep theirs."""
    uris = rows["uri"].to_pylist()
    column = [values.get(uri, value) for uri, value in zip(uris, rows[name].to_pylist(), strict=True)]
    # Put the column back in its place, so that the schema stays the same.
    n = FACES.get_field_index(name)
    return rows.set_column(n, FACES.field(n), pa.array(column, FACES.field(n).type))


def _set_marked(rows: pa.Table, name: str, values: list[str] | list[None]) -> pa.Table:
    n = rows.schema.get_field_index(name)
    return rows.set_column(n, FACES.field(name), pa.array(values, FACES.field(name).type))
