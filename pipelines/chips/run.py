"""How chips are made: from an order to the records of finished blocks, on whichever runner."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from facepipe import storage
from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import Record
from facepipe.hashing import hash64
from facepipe.models.zoo.registry import find_chip_layout
from facepipe.observe.runs import new_run_id
from facepipe.sources import Source, SourceConfig, WorkItem, open_source
from facepipe.sources.blocks import NEW, REPEATED, SKIP, Block, BlockSize
from facepipe.sources.blocks import blocks as cut_blocks
from facepipe.stages import Align, Decode, Detect, Read
from facepipe.stages.chips import Encode, Given, Subject, Whole
from facepipe.storage.hashtable import HashTable
from facepipe.training.data.config import DataConfig
from facepipe.training.data.image_names import ImageNames
from facepipe.types import UInt64
from pipelines.chips.exclude import read_excluded_names
from pipelines.chips.gallery import GalleryListing
from pipelines.runtime import crash_marks
from pipelines.runtime.plan import Plan, Resources, local_resources, make_plan
from pipelines.runtime.runners import inline, local, ray
from pipelines.runtime.worker import Job

Progress = Callable[[str], None]


PARTS, MARKS, HELD = "parts", "marks", "held.npy"
_VERSION = 2  # of what a folder holds
_INLINE = 64  # images that are not worth starting processes for


@dataclass(frozen=True)
class ChipRunConfig:
    """How chips are made; none of it changes what comes out.

    runner: local (processes on this machine), ray, inline (this process), or auto: inline for few images, else local
    workers: how many; by default one a CPU, or one a GPU where there are GPUs and faces are to be detected
    batch: images a worker holds decoded at a time; block_smallest, block_largest: images of one unit of work
    """

    runner: Literal["auto", "inline", "local", "ray"] = "auto"
    workers: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=1)] = 16
    block_smallest: Annotated[int, Field(ge=1)] = 16
    block_largest: Annotated[int, Field(ge=1)] = 512


@dataclass(frozen=True)
class ChipOrder:
    """What a chip set is made from. wanted: names of images; empty: all; labelled: only faces with an identity."""

    data: DataConfig
    embedder: str
    wanted: tuple[str, ...] = ()
    labelled: bool = True

    @property
    def fingerprint(self) -> str:
        """What the set depends on, as far as that can be told without reading it."""
        galleries = [(g.id, g.version) for g in map(Gallery, filter(None, (self.data.gallery, *self.data.exclude)))]
        files = [_get_file_mark(path) for path in (self.data.list, self.data.source)]
        return _hash_facts([self._config_facts, galleries, files, read_excluded_names(self.data)])

    @property
    def config_fingerprint(self) -> str:
        """The part of it that does not change as the data does."""
        return _hash_facts(self._config_facts)

    @property
    def _config_facts(self) -> list[Any]:
        layout = dataclasses.asdict(find_chip_layout(self.embedder))
        return [_VERSION, dataclasses.asdict(self.data), layout, self.wanted]


def _hash_facts(facts: list[Any]) -> str:
    return f"{hash64(json.dumps(facts, sort_keys=True)):016x}"


def _get_file_mark(path: str) -> str:
    """A list file's size and time; nothing for folders, whose time says little."""
    return storage.get_entry(path).fingerprint if path and os.path.isfile(path) else ""


@dataclass(frozen=True)
class SourceListing:
    """Blocks of a source's images of which no chip is held yet; made afresh wherever it is called.

    held: file of hashes of uris (.npy); wanted: names of images; empty: all
    """

    source: SourceConfig
    held: str
    wanted: tuple[str, ...]
    size: BlockSize

    def __call__(self) -> Iterator[Block]:
        seen = _KnownChips(np.load(self.held))
        try:
            yield from cut_blocks(_NamedItems(open_source(self.source), self.wanted), seen, self.size)
        finally:
            seen.close()


class _KnownChips:
    """What is held, and what was listed in this run, by hashes of uris (work.blocks.Known)."""

    def __init__(self, held: UInt64):
        self._table = HashTable(width=1)
        self._table.add(held, np.ones((len(held), 1), np.uint64))

    def screen(self, uris: UInt64, fingerprints: UInt64) -> tuple[npt.NDArray[np.int8], UInt64]:
        """(SKIP, REPEATED or NEW; zeros) for each listed image."""
        found, held = self._table.get(uris)
        first = np.zeros(len(uris), bool)
        first[np.unique(uris, return_index=True)[1]] = True
        verdict = np.where(found & (held[:, 0] == 1), SKIP, NEW)
        verdict = np.where(first & (held[:, 0] != 2), verdict, REPEATED)
        self._table.add(uris, np.full((len(uris), 1), 2, np.uint64))
        return verdict.astype(np.int8), np.zeros(len(uris), np.uint64)

    def close(self) -> None:
        self._table.close()


class _NamedItems:
    """The items of a source that have wanted names; all where none is wanted."""

    def __init__(self, source: Source, wanted: tuple[str, ...]):
        self._source, self.name, self._wanted = source, source.name, ImageNames(wanted)

    @property
    def ignored(self) -> int:
        return self._source.ignored

    def __iter__(self) -> Iterator[WorkItem]:
        return (item for item in self._source if not self._wanted or self._wanted.find_name(item.uri))


def run_chip_workers(order: ChipOrder, folder: str, run: ChipRunConfig) -> Iterator[Record]:
    """Records of the blocks as workers finish them; Ray is left again when they are read to the end, or closed."""
    marks, name = os.path.join(folder, MARKS), new_run_id()
    crash_marks.bequeath(marks, name)  # the lock says that no other run is alive
    detects = not order.data.gallery and not order.data.aligned
    runner = _choose_runner(order, folder, run)
    try:
        resources = ray.start() if runner == "ray" else local_resources()
        plan = make_plan(resources if detects else Resources(resources.cpus), run.workers)
        blocks = _build_listing(order, folder, BlockSize(run.block_smallest, run.block_largest, plan.workers))
        stages = _build_stages(order, plan)
        parts = os.path.join(folder, PARTS)
        job = Job(stages, run.batch, True, name, order.embedder, parts, os.path.join(marks, name))
        yield from _run_blocks(runner, blocks, job, plan)
    finally:
        if runner == "ray":
            ray.stop()


def _run_blocks(runner: str, blocks: Callable[[], Iterator[Block]], job: Job, plan: Plan) -> Iterator[Record]:
    if runner == "ray":
        return ray.run(blocks, [job], plan)
    return inline.run(blocks, job) if runner == "inline" else local.run(blocks, job, plan.groups[0])


def _choose_runner(order: ChipOrder, folder: str, run: ChipRunConfig) -> str:
    if run.runner != "auto":
        return run.runner
    images = 0
    for block in _build_listing(order, folder, BlockSize(1, _INLINE))():
        images += block.items.num_rows
        if images > _INLINE:
            return "local"
    return "inline"


def _build_listing(order: ChipOrder, folder: str, size: BlockSize) -> Callable[[], Iterator[Block]]:
    held = os.path.join(folder, HELD)
    if order.data.gallery:
        gallery = Gallery(order.data.gallery)
        return GalleryListing(gallery.path, gallery.version, folder, held, size)
    source = order.data.source_config
    source = replace(source, uri=storage.to_absolute(source.uri))
    return SourceListing(source, held, order.wanted, size)


def _build_stages(order: ChipOrder, plan: Plan) -> tuple[Any, ...]:
    data, group, ends = order.data, plan.groups[0], Encode(order.embedder)
    begin = (Read(), Decode(threads=group.threads))
    if data.aligned:
        return (*begin, Whole(order.embedder), ends)
    if data.gallery:
        align = Align(embedder=order.embedder, detector=Gallery(data.gallery).contract.detector, thumbs=False)
        return (*begin, Given(), align, ends)
    device = "cuda" if group.gpus else "cpu"
    detect = Detect(model=data.detector, device=device, threads=group.threads)
    return (*begin, detect, Subject(), Align(embedder=order.embedder, detector=data.detector, thumbs=False), ends)
