"""Run the workers that cut chips: from an order to the records of finished blocks, on any runner."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from facepipe import storage
from facepipe.decisions.table import DecisionTable
from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import PartRecord
from facepipe.hashing import hash64
from facepipe.models.zoo.devices import can_use_gpu
from facepipe.models.zoo.registry import find_chip_layout
from facepipe.observe.runs import new_run_id
from facepipe.sources import Source, SourceConfig, WorkItem, open_source
from facepipe.sources.blocks import Block, BlockSize
from facepipe.sources.blocks import cut_blocks as cut_blocks
from facepipe.sources.item import WrappedSource
from facepipe.sources.screening import NEW, REPEATED, SKIP, Screening
from facepipe.stages import Align, Decode, Detect, Read
from facepipe.stages.chips import Encode, KnownFaces, Subject, WholeImage
from facepipe.storage.hashtable import HashTable
from facepipe.training.data.config import DataConfig
from facepipe.training.data.image_names import ImageNames
from facepipe.types import UInt64
from pipelines.chips.exclude import read_excluded_names
from pipelines.chips.gallery import GalleryListing
from pipelines.runtime import crash_marks
from pipelines.runtime.plan import GpuModels, WorkerPlan, detect_local_resources, make_plan
from pipelines.runtime.runners import inline, local, ray
from pipelines.runtime.worker import WorkerJob

PARTS = "parts"
MARKS = "marks"
HELD = "held.npy"
_VERSION = 2  # of the content of a folder
_MAX_INLINE = 64  # images for which starting processes does not pay

# Verdicts on a hash of a uri, in the table of `_KnownChips`.
_IN_SHARDS = 1
_LISTED = 2


@dataclass(frozen=True)
class ChipRunConfig:
    """Configure how chips are made. Nothing here changes the chips.

    Attributes:
        runner: local (processes on this machine), ray, inline (this process), or auto: inline for few images,
            otherwise local.
        workers: number of workers; default: one per CPU, or one per GPU if there are GPUs and faces must be detected.
        batch: images that a worker holds decoded at a time.
        block_smallest: minimum number of images per unit of work.
        block_largest: maximum number of images per unit of work.
    """

    runner: Literal["auto", "inline", "local", "ray"] = "auto"
    workers: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=1)] = 16
    block_smallest: Annotated[int, Field(ge=1)] = 16
    block_largest: Annotated[int, Field(ge=1)] = 512


@dataclass(frozen=True)
class ChipOrder:
    """What a chip set is made from.

    Attributes:
        data: the images.
        embedder: name of a model or TOML file, which decides the layout of chips.
        image_names: names of the images to use; empty: all images.
        needs_identity: use only faces with an identity.
    """

    data: DataConfig
    embedder: str
    image_names: tuple[str, ...] = ()
    needs_identity: bool = True

    @property
    def fingerprint(self) -> str:
        """Hash of all that the set depends on, as far as it can be known without reading the images."""
        # Galleries count with their version, and files with size and time, so that nothing large is read.
        paths = [path for path in (self.data.gallery, *self.data.exclude) if path]
        galleries = [Gallery(path) for path in paths]
        versions = [(gallery.id, gallery.version) for gallery in galleries]
        # What people have decided changes labels without a new version of the gallery.
        decided = [DecisionTable(path).version for path in paths if DecisionTable(path).exists]
        files = [_get_file_mark(path) for path in (self.data.list, self.data.source)]
        facts = [self._list_config_facts()[0], versions, files, read_excluded_names(self.data)]
        return _hash_facts([*facts, decided] if decided else facts)

    @property
    def config_fingerprint(self) -> str:
        """Hash of the part of the fingerprint that does not change if only the data changes."""
        return _hash_facts(self._list_config_facts()[0])

    def has_config(self, fingerprint: str) -> bool:
        """Tell whether a config fingerprint is of this order, as this version or an earlier one computed it."""
        return fingerprint in {_hash_facts(facts) for facts in self._list_config_facts()}

    def _list_config_facts(self) -> list[list[Any]]:
        """List what `config_fingerprint` hashes, in the forms of this and of earlier versions."""
        layout = dataclasses.asdict(find_chip_layout(self.embedder))
        return [[_VERSION, data, layout, self.image_names] for data in self.data.list_forms()]


def _hash_facts(facts: list[Any]) -> str:
    return f"{hash64(json.dumps(facts, sort_keys=True)):016x}"


def _get_file_mark(path: str) -> str:
    """Get a list file's size and time. Folders get no mark: their time says little."""
    return storage.get_entry(path).fingerprint if path and os.path.isfile(path) else ""


@dataclass(frozen=True)
class SourceListing:
    """Blocks of a source's images without a chip yet. Each worker machine may call it and lists again.

    Attributes:
        source: the source.
        known: file of the hashes of uris that have a chip (.npy).
        image_names: names of the images to list; empty: all images.
        size: number of images per block.
    """

    source: SourceConfig
    known: str
    image_names: tuple[str, ...]
    size: BlockSize

    def __call__(self) -> Iterator[Block]:
        """List the images in blocks."""
        # The table of known chips is a temporary file, which is deleted however the listing ends.
        known = _KnownChips(np.load(self.known))
        try:
            yield from cut_blocks(_NamedItems(open_source(self.source), self.image_names), known, self.size)
        finally:
            known.close()


class _KnownChips:
    """The images that have a chip or were listed in this run, by hashes of uris (`facepipe.sources.blocks.Known`)."""

    def __init__(self, in_shards: UInt64):
        self._table = HashTable(width=1)
        self._table.add(in_shards, np.full((len(in_shards), 1), _IN_SHARDS, np.uint64))

    def screen(self, uris: UInt64, fingerprints: UInt64) -> Screening:
        """Decide about listed images.

        Returns:
            SKIP, REPEATED or NEW for each image; and zeros, because older contents do not matter here.
        """
        # Values are (n, 1). A uri that comes again, in this call or an earlier one of this run, is repeated.
        is_known, values = self._table.get(uris)
        is_first = np.zeros(len(uris), bool)
        is_first[np.unique(uris, return_index=True)[1]] = True
        verdicts = np.where(is_known & (values[:, 0] == _IN_SHARDS), SKIP, NEW)
        verdicts = np.where(is_first & (values[:, 0] != _LISTED), verdicts, REPEATED)
        self._table.add(uris, np.full((len(uris), 1), _LISTED, np.uint64))
        return Screening(verdicts.astype(np.int8), np.zeros(len(uris), np.uint64))

    def close(self) -> None:
        """Delete the table."""
        self._table.close()


class _NamedItems(WrappedSource):
    """The items of a source that have one of the names, or all items if there are no names."""

    def __init__(self, source: Source, image_names: tuple[str, ...]):
        super().__init__(source)
        self._names = ImageNames(image_names)

    def __iter__(self) -> Iterator[WorkItem]:
        return (item for item in self._source if not self._names or self._names.find_name(item.uri))


def run_chip_workers(order: ChipOrder, folder: str, run: ChipRunConfig) -> Iterator[PartRecord]:
    """Yield the records of blocks as workers finish them.

    If Ray was started, it is stopped when the iterator is exhausted or closed.
    """
    marks = os.path.join(folder, MARKS)
    run_id = new_run_id()
    crash_marks.inherit_crash_marks(marks, run_id)  # the caller's lease says that no other run is alive
    # Only detection pays on a GPU. With known faces or aligned images CPUs do all the work.
    needs_detector = not order.data.gallery and not order.data.aligned
    runner = _choose_runner(order, folder, run)
    try:
        resources = ray.start() if runner == "ray" else detect_local_resources()
        models: GpuModels = "all" if needs_detector and can_use_gpu(order.data.detector) else "none"
        plan = make_plan(resources, run.workers, "fused", models).limit_workers(1, run.workers)
        group = plan.groups[0]
        blocks = _build_listing(order, folder, BlockSize(run.block_smallest, run.block_largest, plan.workers))
        stages = _build_stages(order, plan)
        parts = os.path.join(folder, PARTS)
        job = WorkerJob(
            stages=stages,
            batch=run.batch,
            ahead=2 if group.gpus else 0,
            parallel=group.parallel,
            writes=True,
            run=run_id,
            source=order.embedder,
            faces_folder=parts,
            marks_folder=os.path.join(marks, run_id),
            devices=group.devices,
        )
        yield from _run_blocks(runner, blocks, job, plan)
    finally:
        if runner == "ray":
            ray.stop()


def _run_blocks(
    runner: str, blocks: Callable[[], Iterator[Block]], job: WorkerJob, plan: WorkerPlan
) -> Iterator[PartRecord]:
    if runner == "ray":
        return ray.run(blocks, [job], plan)
    if runner == "inline":
        return inline.run(blocks, job)
    return local.run(blocks, job, plan.groups[0])


def _choose_runner(order: ChipOrder, folder: str, run: ChipRunConfig) -> str:
    """Resolve `auto` by listing images until there are too many to run inline."""
    if run.runner != "auto":
        return run.runner
    # The listing stops as soon as there are too many, so that a large source costs little here.
    images = 0
    for block in _build_listing(order, folder, BlockSize(1, _MAX_INLINE))():
        images += block.items.num_rows
        if images > _MAX_INLINE:
            return "local"
    return "inline"


def _build_listing(order: ChipOrder, folder: str, size: BlockSize) -> Callable[[], Iterator[Block]]:
    known = os.path.join(folder, HELD)
    if order.data.gallery:
        gallery = Gallery(order.data.gallery)
        return GalleryListing(gallery.path, gallery.version, folder, known, size)
    source = order.data.source_config
    source = replace(source, uri=storage.to_absolute(source.uri))
    return SourceListing(source, known, order.image_names, size)


def _build_stages(order: ChipOrder, plan: WorkerPlan) -> tuple[Any, ...]:
    """Build the stages from reading to encoding; which ones depends on where the faces are known from."""
    data = order.data
    group = plan.groups[0]
    read = Read()
    decode = Decode(threads=group.threads)
    encode = Encode(order.embedder)
    # Aligned images are chips already, and the faces of a gallery have boxes and landmarks: neither is detected.
    if data.aligned:
        return read, decode, WholeImage(order.embedder), encode
    if data.gallery:
        detector = Gallery(data.gallery).contract.detector
        return read, decode, KnownFaces(), Align(embedder=order.embedder, detector=detector, thumbs=False), encode
    # Otherwise detect the faces, and keep the one that is the subject of the image.
    device = "cuda" if group.gpus else "cpu"
    detect = Detect(model=data.detector, device=device, threads=group.threads)
    align = Align(embedder=order.embedder, detector=data.detector, thumbs=False)
    return read, decode, detect, Subject(), align, encode
