"""What the log says of the values in each file of the table, as guarantees by which a filter passes over files."""

from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.schema import FACES


class FileBounds:
    """The smallest and the largest values of some columns, per file."""

    def __init__(self, actions: pa.Table, columns: Collection[str], untrusted: Collection[str]):
        """Take them from the log.

        Args:
            actions: the log's entries of files, one row per file.
            columns: names of columns. One of which the log says nothing gives no guarantee.
            untrusted: paths of files whose bounds of texts may be wrong.
        """
        names = set(actions.column_names)
        self._actions = actions
        self._untrusted = frozenset(untrusted)
        self._columns = [
            field
            for field in FACES
            if field.name in columns and {f"{kind}.{field.name}" for kind in ("min", "max", "null_count")} <= names
        ]

    def get_guarantee(self, n: int) -> ds.Expression:
        """Get an expression that is true for every row of a file.

        Args:
            n: the file's row in the log's entries.
        """
        guarantee = pc.scalar(True)
        is_untrusted = bool(self._untrusted) and self._actions["path"][n].as_py() in self._untrusted
        for field in self._columns:
            if not (is_untrusted and pa.types.is_string(field.type)):
                bound = self._get_bound(n, field)
                guarantee = guarantee if bound is None else guarantee & bound
        return guarantee

    def _get_bound(self, n: int, field: pa.Field) -> "ds.Expression | None":
        """Get an expression of one column; None if the log says too little of it."""
        nulls = self._actions[f"null_count.{field.name}"][n].as_py()
        if nulls is None:
            return None
        column = ds.field(field.name)
        if nulls == self._actions["num_records"][n].as_py():
            return column.is_null()
        low = self._actions[f"min.{field.name}"][n]
        high = self._actions[f"max.{field.name}"][n]
        if not (low.is_valid and high.is_valid):
            return None
        # A comparison says that there is a value, which is not so in every row if some are null.
        inside = (column >= low.cast(field.type)) & (column <= high.cast(field.type))
        return inside if nulls == 0 else inside | column.is_null()
