"""Mend the text of a table that an older facepipe made: labels in other normal forms, and wrong ranges in the log.

Older versions wrote ranges with escapes, and Arrow's reader joins the halves of some characters wrongly. Readers then
pass over files that hold what they look for.
"""

from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.log import set_property
from facepipe.gallery.commits.parts import compute_statistics, has_range
from facepipe.gallery.commits.rewrite import Action, Rewrite, make_add_action, rewrite_files
from facepipe.gallery.table import EXACT_TEXT, TEXT_PROPERTY, Gallery, reopen_table
from facepipe.schema import FACES, conform
from facepipe.sources.labels import find_unnormalised, normalise_labels

# Files that are mended in one commit, so that a crash loses little.
_FILES_AT_ONCE = 256


def repair_text(gallery: Gallery, commit: Committer, *, everything: bool = False) -> int:
    """Bring a table's labels into normal form and write right ranges of its texts. A sound table is left alone.

    Args:
        gallery: the gallery, whose lease the caller holds.
        commit: commits the changes.
        everything: check also a table that is marked as sound: an older version may have written to it since.

    Returns:
        The number of files that were mended.
    """
    if gallery.has_exact_text and not everything:
        return 0
    # Labels first: their files are written anew, with right ranges. Of other files only the ranges are.
    count = 0
    for make_actions in (_make_label_actions, _make_range_actions):
        paths = [file["path"] for file in Gallery(gallery.path).files()]
        for start in range(0, len(paths), _FILES_AT_ONCE):
            count += _commit_part(gallery, frozenset(paths[start : start + _FILES_AT_ONCE]), make_actions, commit)
    # The mark comes last, so that an interrupted repair is done again.
    if not gallery.has_exact_text:
        set_property(gallery.faces_folder, reopen_table(gallery.faces_folder), TEXT_PROPERTY, EXACT_TEXT)
    return count


def count_files_to_repair(gallery: Gallery, *, everything: bool = False) -> int:
    """Count the files that `repair_text` would mend."""
    if gallery.has_exact_text and not everything:
        return 0
    doubtful = gallery.find_files_with_doubtful_ranges()
    paths = [file["path"] for file in gallery.files()]
    return sum(path in doubtful or _holds_unnormalised(gallery, path) for path in paths)


def _commit_part(
    gallery: Gallery,
    paths: frozenset[str],
    make_actions: Callable[[Gallery, frozenset[str]], Iterator[Action]],
    commit: Committer,
) -> int:
    """Commit the changes of some files; return how many files they put into the table."""
    actions: list[Action] = []

    def make_anew() -> list[Action]:
        # A commit that was overtaken is planned again.
        actions[:] = make_actions(Gallery(gallery.path), paths)
        return actions

    commit.commit_actions(make_anew, {"job": "repair"})
    return sum(hasattr(action, "stats") for action in actions)


def _make_label_actions(gallery: Gallery, paths: frozenset[str]) -> Iterator[Action]:
    rewrite = Rewrite(
        columns=("identity",),
        matches=lambda rows: pc.is_in(rows["identity"], pa.array(find_unnormalised(rows["identity"]), pa.string())),
        change=_normalise_labels,
        may_match=lambda file: file["path"] in paths,
    )
    return rewrite_files(gallery, rewrite)


def _normalise_labels(rows: pa.Table, mask: pa.BooleanArray) -> pa.Table:
    n = FACES.get_field_index("identity")
    return rows.set_column(n, FACES.field(n), normalise_labels(rows["identity"]))


def _make_range_actions(gallery: Gallery, paths: frozenset[str]) -> Iterator[Action]:
    """Yield actions that put doubtful files into the table once more, with ranges that were read from the files."""
    doubtful = gallery.find_files_with_doubtful_ranges() & paths
    if not doubtful:
        return
    wide_columns = [field.name for field in FACES if not has_range(field.type)]
    for file in gallery.read_null_counts(wide_columns):
        path = file.pop("path")
        size = file.pop("size_bytes")
        if path in gallery.deleted_rows:
            continue  # compaction writes it anew
        if path in doubtful:
            known_nulls = {name: count for name, count in file.items() if count is not None}
            rows = _read_columns(gallery, path, [name for name in FACES.names if name not in known_nulls])
            stats = compute_statistics(rows, known_nulls)
            yield make_add_action(path, size, stats, data_change=False)


def _holds_unnormalised(gallery: Gallery, path: str) -> bool:
    return bool(find_unnormalised(_read_columns(gallery, path, ["identity"])["identity"]))


def _read_columns(gallery: Gallery, path: str, names: list[str]) -> pa.Table:
    """Read some columns of a file; one that an older version did not write is null."""
    full_path = storage.join(gallery.faces_folder, path)
    schema = pa.schema([FACES.field(name) for name in names])
    try:
        with storage.open_seekable(full_path) as handle:
            parquet = pq.ParquetFile(handle)
            return conform(parquet.read([name for name in names if name in parquet.schema_arrow.names]), schema)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {full_path!r}: {storage.describe_error(error)}") from error
