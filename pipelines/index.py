"""index: a gallery's faces in, a published search index out: plan, train, shards, measure, swap the manifest."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from facepipe import storage
from facepipe.errors import ConfigError, IndexingError, StorageError
from facepipe.gallery import Gallery
from facepipe.index import compact, manifest, template, tune, update
from facepipe.index.candidates import imbalance
from facepipe.index.manifest import Manifest, ShardEntry, Template
from facepipe.index.plan import FLAT, Plan, make_plan, parse_size, shown
from facepipe.index.rows import Skipped, face_rows, sample
from facepipe.index.search import Index
from facepipe.index.shard import build_shard, bury, merge_shards
from facepipe.index.update import Changes, TableFile
from facepipe.index.verify import damaged
from facepipe.models.runtime.memory import measure_resident_memory
from facepipe.storage.lease import Lease, hold_lease
from facepipe.storage.store import Store
from pipelines.embed.config import Count
from pipelines.runtime.run_record import follow, records
from pipelines.runtime.runners import ray

Share = Annotated[float, Field(gt=0, le=1)]
RECALL = 0.97  # of a new index
_MEASURE_AGAIN = 0.25  # growth from which recall is measured anew
_FEWEST_TO_REPLAN = 2048  # lists that an exact index must be worth: some 200,000 faces
_OUTGROWN = 4  # a plan for the size of today would have this many times the lists


@dataclass(frozen=True)
class BuildConfig:
    """What index is built, and when it is built anew.

    memory: budget of a process that builds
    recall: recall@10 to be reached, sets how many lists a search visits; 0.97 for a new index
    factory: faiss factory string instead of the planned one (Flat, or IVF… with any code)
    shard_vectors: most vectors of a shard, by default what the memory allows, up to 8 million
    max_dead: share of dead vectors from which a shard is rewritten without them
    max_imbalance: growth of the lists' imbalance since training from which the index is trained anew
    seed: of the training sample and of the sample that recall is measured on
    """

    memory: str = "4GiB"
    recall: Share | None = None
    factory: str | None = None
    shard_vectors: Count | None = None
    max_dead: Share = 0.2
    max_imbalance: Annotated[float, Field(ge=1)] = 1.5
    seed: int = 0


@dataclass(frozen=True)
class IndexRunConfig:
    """How the work is run; none of it changes what comes out.

    runner: inline (this process, all its CPUs), ray (a task a shard), or auto: ray where RAY_ADDRESS names a cluster
    cpus: of a Ray task
    """

    runner: Literal["auto", "inline", "ray"] = "auto"
    cpus: Count = 2


@dataclass(frozen=True)
class IndexConfig:
    """Everything `index` can be told."""

    index: BuildConfig = field(default_factory=BuildConfig)
    run: IndexRunConfig = field(default_factory=IndexRunConfig)


@dataclass
class IndexSummary:
    """What a run did. action: built, updated, unchanged, repaired; seconds: by phase."""

    action: str = "unchanged"
    reason: str = ""
    table_version: int = -1
    vectors: int = 0
    added: int = 0
    removed: int = 0
    unusable: int = 0
    shards: int = 0
    dead: int = 0
    merged: int = 0
    factory: str = ""
    nprobe: int = 1
    rescore: int = 0
    recall_at_10: float | None = None
    imbalance: float = 1.0
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, phase: str, began: float) -> None:
        """Book the seconds since `began` to a phase."""
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - began, 3)


Progress = Callable[[str], None]


@records("index")
def run(
    config: IndexConfig,
    gallery: str,
    *,
    retrain: bool = False,
    compact_all: bool = False,
    repair: bool = False,
    progress: Progress = lambda line: None,
) -> IndexSummary:
    """Build a gallery's index, or bring it up to date with the table.

    Until the new manifest is in force the old one is, whatever happens. Raises ConfigError for a memory budget that is
    too small, GalleryBusyError while another run writes the index.
    """
    table = Gallery(gallery)
    store = manifest.open_index_store(table.path)
    with hold_lease(storage.join(table.path, manifest.FOLDER), "index", progress) as lease:
        builder = _Builder(config, table, store, progress, lease)
        follow(builder.summary)
        builder.tidy()
        found = builder.current(retrain)
        if found is None:
            return builder.build("asked for" if retrain else "there was none")
        if repair:
            return builder.repair(found)
        return builder.update(found, compact_all)


class _Builder:
    """One run: what it was told, and the summary that it fills in."""

    def __init__(self, config: IndexConfig, gallery: Gallery, store: Store, progress: Progress, lease: Lease):
        self.lease, self.tag = lease, manifest.tag(gallery.path)
        self.config, self.gallery, self.store, self.progress = config, gallery, store, progress
        self.memory = parse_size(config.index.memory)
        self.factory = FLAT if config.index.factory == "Flat" else config.index.factory
        self.recall = config.index.recall or RECALL
        self.summary = IndexSummary(table_version=gallery.version)
        self.skipped = Skipped()

    def tidy(self) -> None:
        """Delete what a crash left behind; what the manifest in force names stays, also where all is built anew."""
        if not manifest.exists(self.gallery.path):
            manifest.sweep(self.gallery.path, None)
            return
        with suppress(IndexingError):  # a damaged manifest: what it named cannot be told from leftovers
            manifest.sweep(self.gallery.path, manifest.load(self.gallery.path))

    def current(self, retrain: bool) -> Manifest | None:
        """The manifest to go on from; None where there is none, or none that fits."""
        if retrain or not manifest.exists(self.gallery.path):
            return None
        found = manifest.load(self.gallery.path)
        if found.contract != manifest.contract_of(self.gallery):
            self.progress("the index was made with another model contract: building it anew")
            return None
        if self.factory not in (None, found.template.factory):
            raise ConfigError(
                f"the index is {found.template.factory}; `--retrain` with `--factory {self.factory}` builds another"
            )
        # What was asked for when it was built stays asked for.
        self.factory = found.template.factory if found.template.chosen else None
        self.recall = self.config.index.recall or found.recall
        return found

    def build(self, reason: str) -> IndexSummary:
        """All shards from the table, with a template of their own."""
        changes = update.everything(self.gallery)
        plan = self._plan(changes.added)
        self.progress(describe(plan))
        began = time.monotonic()
        vectors = sample(self.gallery, plan.train, self.config.index.seed)
        self.summary.time("sample", began)
        began = time.monotonic()
        trained = template.train(vectors, plan, self.progress)
        made = template.save(trained, self.store.folder, plan, self.config.index.seed, self.factory is not None)
        del vectors, trained
        self.summary.time("train", began)
        shards = self._add(changes, made, plan.shard_vectors)
        self.summary.action, self.summary.reason, self.summary.added = "built", reason, sum(s.vectors for s in shards)
        return self._publish(self._draft(made, shards), measure=True)

    def update(self, old: Manifest, compact_all: bool) -> IndexSummary:
        """New faces as new shards, the gone on the tombstones; merges what is due."""
        began = time.monotonic()
        with closing(update.changes(self.gallery, old, self.store)) as changes:
            self.summary.time("compare", began)
            if self._outgrown(old, old.live + changes.added - changes.removed):
                return self.build(f"outgrown: {old.template.factory} was planned for {old.template.vectors} faces")
            plan = self._plan(max(1, old.live + changes.added), old.template.factory)
            shards = self._buried(old.shards, changes) + self._add(changes, old.template, plan.shard_limit)
        if compact_all or shards != list(old.shards):
            shards = self._merge(shards, plan.shard_limit, compact_all)
        moved = shards != list(old.shards)
        self.summary.action = "updated" if moved else "unchanged"
        self.summary.added, self.summary.removed = changes.added, changes.removed
        draft = replace(old, table_version=self.gallery.version, shards=tuple(shards))
        grown = abs(draft.live - old.measured) > _MEASURE_AGAIN * max(1, old.measured)
        asked_anew = self.recall != old.recall
        if moved and self._unbalanced(draft):
            return self.build(
                f"the lists' imbalance grew beyond {self.config.index.max_imbalance:g} times that of training"
            )
        if draft == old and not asked_anew:
            return self._finish(old)
        return self._publish(draft, measure=(moved and grown) or asked_anew)

    def repair(self, old: Manifest) -> IndexSummary:
        """Rebuild the shards with damaged files, and only those: from the faces that no sound shard holds."""
        bad = damaged(self.store, old)
        if old.template.name in bad:
            return self.build("the template was damaged")
        sound = tuple(shard for shard in old.shards if shard.name not in bad)
        if not bad:
            return self._finish(old)
        began = time.monotonic()
        sound_only = replace(old, shards=sound)
        with closing(update.changes(self.gallery, sound_only, self.store, only_full=True)) as changes:
            self.summary.time("compare", began)
            plan = self._plan(max(1, changes.added), old.template.factory)
            shards = self._buried(sound, changes) + self._add(changes, old.template, plan.shard_limit)
        self.summary.action, self.summary.reason = "repaired", f"{len(bad)} of {len(old.shards)} shards were damaged"
        self.summary.added = changes.added
        return self._publish(replace(old, table_version=self.gallery.version, shards=tuple(shards)), measure=False)

    def _plan(self, vectors: int, trained: str | None = None) -> Plan:
        largest = self.config.index.shard_vectors
        return make_plan(
            vectors, self.memory, measure_resident_memory(), trained or self.factory, largest, trained is not None
        )

    def _outgrown(self, old: Manifest, vectors: int) -> bool:
        if self.factory:
            return False
        wanted = make_plan(max(1, vectors), 1 << 62, 0).lists
        return wanted >= (_OUTGROWN * old.template.lists or _FEWEST_TO_REPLAN)

    def _buried(self, shards: Sequence[ShardEntry], changes: Changes) -> list[ShardEntry]:
        dead = changes.dead
        return [bury(self.store, entry, dead[entry.name]) if entry.name in dead else entry for entry in shards]

    def _add(self, changes: Changes, made: Template, limit: int) -> list[ShardEntry]:
        """Shards of at most about `limit` vectors, each of whole table files."""
        began = time.monotonic()
        groups = list(_groups(changes.files, limit))
        on_ray = self.config.run.runner == "ray" or (
            self.config.run.runner == "auto" and "RAY_ADDRESS" in os.environ and len(groups) > 1
        )
        needed = sum(file.faces for file in changes.files) * 540
        if needed > shutil.disk_usage(self.store.folder).free:
            raise StorageError(
                f"the disk of {self.store.folder!r} has {shutil.disk_usage(self.store.folder).free >> 20} MiB left, "
                f"and the index needs some {needed >> 20}"
            )
        whole = [g for g in groups if on_ray and all(file.whole for file in g)]
        shards = list(self._on_ray(whole, made)) if whole else []
        for group in (g for g in groups if g not in whole):
            self.progress(f"shard {len(shards) + 1} of {len(groups)}: {sum(f.faces for f in group)} faces")
            only = None if all(file.whole for file in group) else changes.fresh
            rows = face_rows(self.gallery.faces_folder, [f.path for f in group], only, self.skipped)
            entry = build_shard(self.store, made, rows)
            shards += [entry] if entry else []
        self.summary.time("shards", began)
        return shards

    def _on_ray(self, groups: list[list[TableFile]], made: Template) -> Iterator[ShardEntry]:
        self.store.upload([made.name])
        tasks = [_Task(self.gallery.path, made, self.gallery.faces_folder, [f.path for f in g]) for g in groups]
        ray.start()
        try:
            for n, (_, result) in enumerate(ray.tasks(_build, tasks, self.config.run.cpus), 1):
                self.progress(f"shard {n} of {len(groups)} is built")
                entry, unusable = result
                self.skipped.unusable += unusable
                if entry:
                    yield entry
        finally:
            ray.stop()

    def _merge(self, shards: list[ShardEntry], limit: int, all_: bool) -> list[ShardEntry]:
        began = time.monotonic()
        groups = compact.everything(shards, limit) if all_ else compact.due(shards, limit, self.config.index.max_dead)
        for group in groups:
            self.progress(f"merging {len(group)} shards of {sum(entry.live for entry in group)} faces")
            entry = merge_shards(self.store, group)
            at = shards.index(group[0])
            shards = [shard for shard in shards if shard not in group]
            shards[at:at] = [entry] if entry else []
            self.summary.merged += len(group)
        if groups:
            self.summary.time("merge", began)
        return shards

    def _draft(self, made: Template, shards: Sequence[ShardEntry]) -> Manifest:
        contract = manifest.contract_of(self.gallery)
        return Manifest(self.gallery.version, contract, made, tuple(shards), self.recall)

    def _unbalanced(self, draft: Manifest) -> bool:
        if not draft.template.lists:
            return False
        now = imbalance(Index(self.gallery.path, manifest=draft).list_lengths())
        return now > self.config.index.max_imbalance * draft.template.imbalance

    def _publish(self, draft: Manifest, measure: bool) -> IndexSummary:
        if measure and draft.live:
            began = time.monotonic()
            draft = self._measured(draft)
            self.summary.time("measure", began)
        # Of an index that did not change a search that was broken off goes on with what it has.
        if measure or self.summary.action != "unchanged":
            draft = replace(draft, created=time.time())
        self.lease.check()
        self.tag = manifest.publish(self.gallery.path, draft, self.tag)
        manifest.sweep(self.gallery.path, draft)
        return self._finish(draft)

    def _measured(self, draft: Manifest) -> Manifest:
        index = Index(self.gallery.path, manifest=draft)
        curve = tune.measure(index, tune.draw(index, self.config.index.seed), self.recall)
        nprobe, rescore = replace(draft, curve=curve).setting(self.recall)
        skew = imbalance(index.list_lengths())
        made = replace(draft.template, imbalance=skew) if self.summary.action == "built" else draft.template
        draft = replace(draft, curve=curve, recall=self.recall, nprobe=nprobe, rescore=rescore, measured=draft.live)
        return replace(draft, template=made)

    def _finish(self, found: Manifest) -> IndexSummary:
        summary = self.summary
        summary.vectors, summary.dead, summary.shards = found.live, found.dead, len(found.shards)
        summary.factory, summary.nprobe, summary.rescore = found.template.factory, found.nprobe, found.rescore
        summary.unusable, summary.imbalance = self.skipped.unusable, round(found.template.imbalance, 3)
        summary.recall_at_10 = manifest.measured_recall(found, found.nprobe, found.rescore)
        summary.bytes = sum(file.bytes for shard in found.shards for file in shard.files.values())
        return summary


@dataclass(frozen=True)
class _Task:
    """A shard to be built by a Ray task."""

    gallery: str
    template: Template
    faces: str
    files: list[str]


def _build(task: _Task) -> tuple[ShardEntry | None, int]:
    skipped, store = Skipped(), manifest.open_index_store(task.gallery)
    entry = build_shard(store, task.template, face_rows(task.faces, task.files, None, skipped))
    store.upload([entry.name] if entry else [])
    return entry, skipped.unusable


def _groups(files: Sequence[TableFile], limit: int) -> Iterator[list[TableFile]]:
    group: list[TableFile] = []
    total = 0
    for file in files:
        # Half over and half under: the last shard is then not a remainder.
        if group and total + file.faces / 2 > limit:
            yield group
            group, total = [], 0
        group.append(file)
        total += file.faces
    if group:
        yield group


def describe(plan: Plan) -> str:
    """The estimate, for people."""
    shards = -(-plan.vectors // plan.shard_vectors) if plan.vectors else 0
    return (
        f"plan: {plan.vectors} faces, {plan.factory}, {plan.vector_bytes} bytes a face in the index and 524 beside it; "
        f"trains on {plan.train}; {shards} shards of {plan.shard_vectors}; memory {shown(plan.memory)} "
        f"({shown(plan.base)} now, training {shown(plan.train_memory)}, a shard {shown(plan.shard_memory)}); "
        f"disk {shown(plan.disk)}"
    )
