"""Apply files of decisions to a gallery: the rows of all of them are checked together, and added at once."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from facepipe import storage
from facepipe.decisions import clean_lists
from facepipe.decisions.add import AddSummary, add_decisions
from facepipe.decisions.files import iterate_file
from facepipe.decisions.folders import FolderMatches, iterate_folder
from facepipe.decisions.rows import WrittenRow
from facepipe.errors import ConfigError
from facepipe.gallery.table import Gallery


@dataclass
class ApplySummary(AddSummary):
    """What was applied, or would be.

    Attributes:
        files: files and folders that were read.
        by_content: images in sorted folders that were found by their bytes.
        by_name: images in sorted folders that were found by their file name.
        ignored: files in sorted folders that are not images, or lie in no person's folder.
    """

    files: list[str] = field(default_factory=list)
    by_content: int = 0
    by_name: int = 0
    ignored: int = 0


def apply_files(
    gallery: Gallery,
    paths: Sequence[str],
    *,
    from_clean: bool = False,
    at_least: float | None = None,
    who: str = "",
    skip_bad: bool = False,
    replace: bool = False,
    dry_run: bool = False,
) -> ApplySummary:
    """Apply files of decisions.

    Args:
        gallery: the gallery.
        paths: JSON lines, CSV and Parquet files, lists of `clean`, and folders sorted by hand; paths or URLs.
        from_clean: apply what the gallery's report of `clean` has decided as well.
        at_least: of lists of `clean`, only rows of at least this probability.
        who: who has decided, for rows that do not say.
        skip_bad: apply the other rows if some cannot be applied.
        replace: take an older decision back if a new one says the opposite.
        dry_run: only say what would be done.

    Raises:
        ConfigError: nothing is given, a file is of another kind, or the probability is none.
        StorageError: a file cannot be read.
    """
    if not paths and not from_clean:
        raise ConfigError("say what to apply: a file of decisions, a folder sorted by hand, or --from-clean")
    if from_clean and at_least is None:
        raise ConfigError("--from-clean needs a probability from which on to believe it: add --at-least 0.99")
    if at_least is not None and not 0.5 <= at_least <= 1:
        raise ConfigError(f"--at-least {at_least:g} is not a probability from 0.5 to 1")
    files = list(paths)
    if from_clean:
        report = storage.join(gallery.path, clean_lists.FOLDER, clean_lists.TABLE)
        if not storage.file_exists(report):
            raise ConfigError(f"{gallery.path!r} has no report of clean: run `facepipe clean {gallery.path}` first")
        files.append(report)
    matches = FolderMatches()
    rows = _iterate_rows(gallery, files, at_least, matches)
    added = add_decisions(gallery, rows, who=who, skip_bad=skip_bad, replace=replace, dry_run=dry_run)
    return ApplySummary(
        **vars(added),
        files=files,
        by_content=matches.by_content,
        by_name=matches.by_name,
        ignored=matches.ignored,
    )


def _iterate_rows(
    gallery: Gallery, paths: Sequence[str], at_least: float | None, matches: FolderMatches
) -> Iterator[WrittenRow]:
    for path in paths:
        if storage.may_exist(path) and storage.is_special_file(path):
            raise ConfigError(f"{path!r} is a device or a pipe: write the decisions to a file first")
        if not os.path.isfile(path) and storage.folder_exists(path):
            yield from iterate_folder(gallery, path, matches)
        elif storage.file_exists(path):
            yield from iterate_file(path, at_least)
        else:
            raise ConfigError(f"no file or folder at {path!r}")
