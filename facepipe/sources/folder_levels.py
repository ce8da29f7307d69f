"""Which level of folders holds persons, if images lie several folders deep: `train/Ann/1.jpg`."""

from collections.abc import Collection

from facepipe.sources.folder_names import (
    PEOPLE,
    FolderJudge,
    FolderVerdict,
    classify_folder,
    is_numbered,
    may_be_date,
)
from facepipe.sources.item import NestedFolderLabel

# One person's folder holds fewer folders than this; a group of people holds more.
_MIN_PERSONS_PER_GROUP = 50
# With so many folders the level is certain, although more are to come.
_CERTAIN_FOLDERS = 2000


class FolderLevels:
    """Judges from folders in folders whether the inner ones are people.

    They are in one of three cases. 1. The names of all outer folders are no people's: parts of a dataset, groups,
    shards, dates, collections; or they are numbers, and no inner name occurs in two of them. 2. Each inner name begins
    with that of its outer folder, as `0_0/0_0_0000017`. 3. No inner name occurs in two outer folders, and an outer
    folder holds 50 of them on average. In all cases the inner names must be people's.
    """

    def __init__(self) -> None:
        self._judge = FolderJudge()
        self._parents: dict[str, int] = {}
        self._parent_of: dict[str, str] = {}
        self._is_unique = True
        self._is_prefixed = True
        self._needs_more = False
        self._verdict: FolderVerdict | None = None
        self._takes_all = False

    @property
    def is_certain(self) -> bool:
        """Whether folders to come cannot change the verdict, or only by what is not worth waiting for."""
        is_known = not self._needs_more or len(self._parent_of) >= _CERTAIN_FOLDERS
        return not self._parent_of or (self._judge.is_certain and is_known)

    def add(self, label: NestedFolderLabel) -> None:
        """Add the folder of an image."""
        parent = self._parent_of.get(label)
        if parent == label.parents:
            return
        if parent is not None:
            self._is_unique = False
        self._parent_of[label] = label.parents
        self._parents[label.parents] = self._parents.get(label.parents, 0) + 1
        self._judge.add(label)
        direct = label.parents.rpartition("/")[2]
        self._is_prefixed = self._is_prefixed and len(label) > len(direct) and label.startswith(direct)
        self._needs_more = self._needs_more or not _are_groups(label.parents)

    def decide(self, others: Collection[str] = ()) -> None:
        """Decide from the folders so far.

        Args:
            others: folders that hold images which are not listed.
        """
        self._verdict = self._judge.judge(others)
        count = len(self._parent_of)
        is_crowded = count >= _MIN_PERSONS_PER_GROUP * len(self._parents)
        self._takes_all = self._is_unique and count > 1 and (self._is_prefixed or is_crowded)

    def is_person(self, label: NestedFolderLabel) -> bool:
        """Tell whether a folder is taken for a person."""
        assert self._verdict is not None
        # Below a date a number is a month or a day.
        is_below_date = may_be_date(label.parents.rpartition("/")[2])
        if not self._verdict.is_person(label) or (is_below_date and is_numbered(label)):
            return False
        return self._takes_all or _are_groups(label.parents) or (self._is_unique and _are_groups_or_numbers(label))


def _are_groups(parents: str) -> bool:
    """Tell whether the names of all folders of a path are no people's."""
    return all(classify_folder(name) not in PEOPLE for name in parents.split("/"))


def _are_groups_or_numbers(label: NestedFolderLabel) -> bool:
    return all(classify_folder(name) not in PEOPLE or is_numbered(name) for name in label.parents.split("/"))
