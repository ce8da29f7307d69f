"""The labels of a listing: which folders are people, the prefix, and what the user should know of it."""

from collections.abc import Iterable, Iterator

from facepipe.sources.folder import FolderSource
from facepipe.sources.folder_levels import FolderLevels
from facepipe.sources.folder_names import PEOPLE, FolderJudge, FolderKind, FolderVerdict
from facepipe.sources.folder_times import FolderTimes
from facepipe.sources.identity import IdentityRule
from facepipe.sources.item import FolderLabel, Listing, NestedFolderLabel, WorkItem
from facepipe.sources.labels import format_label
from facepipe.sources.number_ranges import NumberRanges

# Items that wait at most until the folders beside theirs are known.
_MAX_HELD = 100_000
# The same if all of them lie in folders in folders: photo libraries lie so, and their work is not to wait.
_MAX_NESTED_HELD = 20_000
# Folders that a note names.
_EXAMPLES = 3


class LabelledSource:
    """A source of which it is decided what a label is.

    With the rule `auto` the name of a folder is a label only if the folder is a person: not a part of a dataset, a
    date, a shard, a collection, or the only one. The first items wait until enough folders are known.

    Attributes:
        name: Name of the source.
        label_numbers: The labels so far that are numbers; None if the user has said how to tell them from others.
    """

    def __init__(self, source: Listing, rule: IdentityRule = "auto", prefix: str | None = None):
        """Wrap a source.

        Args:
            source: lists the images, with labels from folders as `FolderLabel`.
            rule: where labels come from.
            prefix: put before each label; None if the user has not said.
        """
        self.name = source.name
        self.label_numbers: NumberRanges | None = None
        self._source = source
        self._rule = rule
        self._prefix = prefix
        self._reset()

    def has_items(self) -> bool:
        """Tell whether the source lists anything. Its folders are not judged, for which many items may be needed."""
        return next(iter(self._source), None) is not None

    def pass_over(self, times: FolderTimes) -> None:
        """Pass over the files of folders that have not changed, by their times. Sources without folders list all."""
        if isinstance(self._source, FolderSource):
            self._source.pass_over(times)

    def _reset(self) -> None:
        self.label_numbers = NumberRanges() if self._prefix is None else None
        self._judge = FolderJudge()
        self._levels = FolderLevels()
        self._nested: list[str] = []
        self._groups: list[str] = []
        self._persons: list[str] = []
        self._verdict: FolderVerdict | None = None
        self._labelled = 0
        self._listed = 0
        self._examples: dict[FolderKind, list[str]] = {}
        self._folder = ""
        self._label: str | None = None
        self._is_nested = False
        self._unlabelled = 0

    @property
    def ignored(self) -> int:
        """Number of files passed over so far because they are not images."""
        return self._source.ignored

    @property
    def gives_labels(self) -> bool:
        """Whether an image without a label has none by the source's word, as far as the listing has come."""
        return self._rule != "auto" or self._labelled > 0 or self._source.has_labels is True

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the listing for the user; complete at its end."""
        notes = list(self._source.notes)
        if self._rule != "none" and self._listed:
            notes += filter(None, [self._describe_labels()])
        return tuple(notes)

    def __iter__(self) -> Iterator[WorkItem]:
        self._reset()
        prefix = self._prefix or ""
        items = self._judge_folders() if self._rule == "auto" else iter(self._source)
        for item in items:
            self._listed += 1
            label = item.identity
            if label is not None:
                self._labelled += 1
                if self.label_numbers is not None:
                    self.label_numbers.add((label,))
                if prefix:
                    item = item._replace(identity=prefix + label)
            # An item without a name tells what label the images of a folder have that are passed over.
            if item.uri:
                yield item

    def _judge_folders(self) -> Iterator[WorkItem]:
        """Yield the items without labels that are names of folders which are nobody."""
        held: list[WorkItem] = []
        for item in self._source:
            if self._verdict is not None:
                yield self._drop_folder(item)
                continue
            # Items wait from the first folder on, so that they keep their order.
            if isinstance(item.identity, NestedFolderLabel):
                self._levels.add(item.identity)
            elif isinstance(item.identity, FolderLabel):
                self._judge.add(item.identity)
            elif not held:
                yield item
                continue
            held.append(item)
            is_certain = self._levels.is_certain and (self._judge.is_certain or not self._judge.names)
            most = _MAX_HELD if self._judge.names else _MAX_NESTED_HELD
            if is_certain or len(held) >= most:
                self._decide()
                yield from map(self._drop_folder, held)
                held = []
        if held:
            self._decide()
            yield from map(self._drop_folder, held)

    def _decide(self) -> None:
        self._levels.decide(self._source.other_folders)
        self._verdict = self._judge.judge(self._source.other_folders)

    def _drop_folder(self, item: WorkItem) -> WorkItem:
        """Return an item without its label if that is the name of a folder which is nobody."""
        label = item.identity
        if not isinstance(label, FolderLabel):
            return item
        assert self._verdict is not None
        if isinstance(label, NestedFolderLabel):
            return self._drop_nested_folder(item, label)
        # Images come folder by folder, so that each folder is looked up once.
        if label != self._folder:
            self._folder = label
            kind = self._verdict.find_kind(label)
            self._label = format_label(label) if self._verdict.is_person(label) else None
            examples = self._examples.setdefault(kind, [])
            if len(examples) < _EXAMPLES and label not in examples:
                examples.append(label)
        return item if label == self._label else item._replace(identity=self._label)

    def _drop_nested_folder(self, item: WorkItem, label: NestedFolderLabel) -> WorkItem:
        """Return an item without its label if that is the name of a folder in folders which is nobody."""
        path = f"{label.parents}/{label}"
        if path != self._folder:
            self._folder = path
            is_person = self._levels.is_person(label)
            self._label = format_label(label) if is_person else None
            if is_person:
                _add_example(self._groups, label.parents)
                _add_example(self._persons, label)
            else:
                _add_example(self._nested, label)
        self._unlabelled += self._label is None
        return item._replace(identity=self._label)

    def _describe_labels(self) -> str:
        """Describe what was taken for a label and what to type if that is wrong; empty if there is no doubt."""
        if self._source.has_labels is not None:
            # What columns there are is the listing's to say.
            is_empty = self._source.has_labels and not self._labelled
            return "no image got a label: the column of labels is empty, or holds no single label" if is_empty else ""
        if self._rule != "auto":
            return "" if self._labelled else f"no image got a label: --identity {self._rule} finds none here"
        others = {kind: names for kind, names in self._examples.items() if kind not in PEOPLE}
        described = "; ".join(f"{_quote(names)} are {kind.value}" for kind, names in others.items())
        everyone = "To take the name of every folder add --identity folder"
        if self._persons:
            rest = (
                f"; {self._unlabelled} images got no label, such as in {_quote(self._nested)}" if self._nested else ""
            )
            return (
                f"the folders below {_quote(self._groups)} are taken for people, such as {_quote(self._persons)}"
                f"{rest}. If they are not, add --identity none"
            )
        if self._nested and not self._labelled:
            return (
                "no image got a label: images lie several folders deep, and it is not certain which folders are "
                f"people. --identity folder would give labels such as {_quote(self._nested)}"
            )
        if self._verdict is not None and self._verdict.is_only_one:
            (names,) = self._examples.values()
            if self._labelled:
                return f"the only folder, {_quote(names)}, is taken for a person. If it is not, add --identity none"
            return f"no image got a label from its folder, because there is only {_quote(names)}. {everyone}"
        if not self._labelled and described:
            return f"no image got a label, because {described}, and nobody. {everyone}"
        if not self._labelled:
            return (
                "no image got a label: none has one beside it, and none lies exactly one folder deep. If the folder of "
                "an image is the person, add --identity folder; if the file's name up to its last _ is, add --identity "
                "filename"
            )
        if described:
            return f"folders are taken for people, but not all: {described}. {everyone}"
        doubtful = self._examples.get(FolderKind.NUMBER) or self._examples.get(FolderKind.LETTER)
        if doubtful and FolderKind.PERSON not in self._examples:
            return f"folders such as {_quote(doubtful)} are taken for people. If they are not, add --identity none"
        return ""


def _add_example(examples: list[str], name: str) -> None:
    if len(examples) < _EXAMPLES and name not in examples:
        examples.append(name)


def _quote(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
