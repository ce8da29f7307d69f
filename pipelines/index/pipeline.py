"""Build or update an index: plan, train, build shards, measure, publish the manifest."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from facepipe import storage
from facepipe.erasure.steps import HeldLeases
from facepipe.erasure.takeup import take_up_requests
from facepipe.errors import ConfigError, IndexDamagedError, IndexingError, StorageError
from facepipe.gallery import Gallery
from facepipe.index import manifest as manifests
from facepipe.index.compact import plan_full_merge, plan_merges, replace_group
from facepipe.index.manifest import Manifest, ShardEntry, Template
from facepipe.index.plan import FLAT, IndexPlan, is_outgrown, make_plan, open_factory, parse_size
from facepipe.index.rows import SkippedRows, read_face_rows, sample_vectors
from facepipe.index.shard import build_shard, merge_shards
from facepipe.index.template import save_template, train_template
from facepipe.index.tune import is_unbalanced, tune_manifest
from facepipe.index.update import IndexChanges, TableFile, add_all, add_tombstones, find_changes, group_files
from facepipe.index.verify import find_damage
from facepipe.models.runtime.memory import measure_resident_memory
from facepipe.storage.lease import Lease, hold_lease
from facepipe.types import Int64
from pipelines.index.config import IndexConfig, IndexSummary
from pipelines.runtime.run_record import attach_summary, record_calls
from pipelines.runtime.runners import ray

DEFAULT_RECALL = 0.97  # of a new index
_GROWTH_TO_MEASURE = 0.25  # of the index, from which recall is measured again
_SIDE_BYTES = 28  # per face on disk beside its vector, at least
_SECONDS_PER_HOUR = 3600.0

OnProgress = Callable[[str], None]


@record_calls("index")
def run(
    config: IndexConfig,
    gallery: str,
    *,
    retrain: bool = False,
    compact_all: bool = False,
    repair: bool = False,
    on_progress: OnProgress = lambda line: None,
) -> IndexSummary:
    """Build a gallery's index, or bring it up to date with the table.

    Until the new manifest is published the old one stays valid, whatever happens.

    Args:
        config: settings.
        gallery: path or URL.
        retrain: train and build everything again.
        compact_all: merge the shards into as few as possible, without deleted vectors.
        repair: rebuild the damaged shards only.
        on_progress: is called with a line per step.

    Raises:
        ConfigError: the memory budget is too small, or another factory was requested.
        GalleryBusyError: another run writes the index.
    """
    path = Gallery(gallery).path
    with hold_lease(storage.join(path, manifests.FOLDER), "index", on_progress) as lease:
        # Delete the leftovers of a crash. What the current manifest names stays, even if all is rebuilt.
        manifests.sweep(path, lease)
        # Open the table under the lease: an erasure that held it before has deleted older versions.
        builder = _IndexBuilder(config, Gallery(path), lease, on_progress)
        attach_summary(builder.summary)
        summary = builder.run(retrain=retrain, compact_all=compact_all, repair=repair)
        # An erasure that was recorded meanwhile is done now: what was built may hold the images.
        take_up_requests(path, HeldLeases(index=lease))
        return summary


class _IndexBuilder:
    """One run: its settings, and the summary that it fills in."""

    def __init__(self, config: IndexConfig, gallery: Gallery, lease: Lease, on_progress: OnProgress):
        self.summary = IndexSummary(table_version=gallery.version)
        self._config = config
        self._gallery = gallery
        self._store = manifests.open_index_store(gallery.path)
        self._lease = lease
        self._on_progress = on_progress
        self._current: Manifest | None = None
        self._tag = manifests.read_tag(gallery.path)
        self._memory = parse_size(config.index.memory)
        self._factory = FLAT if config.index.factory == "Flat" else config.index.factory
        self._recall = config.index.recall or DEFAULT_RECALL
        self._skipped = SkippedRows()

    def run(self, *, retrain: bool, compact_all: bool, repair: bool) -> IndexSummary:
        """Build the index, or update or repair the one that there is."""
        manifest = self.load_current(retrain)
        if manifest is None:
            return self.build()
        if repair:
            return self.repair(manifest)
        try:
            return self.update(manifest, compact_all)
        except IndexDamagedError as error:
            # What is damaged must not stop a night: the table has everything that it was made from.
            self._on_progress(str(error))
            return self.repair(manifest, error)

    def load_current(self, retrain: bool) -> Manifest | None:
        """Load the manifest to update; None if there is none, or none that fits. `_reason` then says why."""
        self._reason = "requested" if retrain else "there was none"
        if not manifests.exists(self._gallery.path):
            return None
        try:
            manifest, self._tag = manifests.load_tagged(self._gallery.path)
        except IndexDamagedError as error:
            self._on_progress(str(error))
            self._reason = "the manifest was damaged"
            return None
        except IndexingError:
            if retrain:
                return None
            raise
        self._current = manifest
        if retrain:
            return None
        if manifest.contract != manifests.dump_contract(self._gallery):
            self._on_progress("the index was built with another model contract: rebuilding it")
            self._reason = "built with another model contract"
            return None
        if self._factory is not None and self._factory != manifest.template.factory:
            open_factory(self._factory, self._gallery.dim)  # it raises for one that cannot be built anyway
            raise ConfigError(
                f"the index is {manifest.template.factory}; `--retrain` with `--factory {self._factory}` builds another"
            )
        # A factory or recall that was requested for the first build stays requested.
        self._factory = manifest.template.factory if manifest.template.chosen else None
        self._recall = self._config.index.recall or manifest.recall
        return manifest

    def build(self, reason: str = "") -> IndexSummary:
        """Train a template and build all shards from the table."""
        # Train on a sample of the table, then build shards of whole files.
        changes = add_all(self._gallery)
        plan = self._plan(changes.added)
        self._on_progress(plan.describe())
        template = self._train(plan)
        shards = self._add_shards(changes, template, plan.shard_vectors)
        self.summary.action = "built"
        self.summary.reason = reason or self._reason
        self.summary.added = sum(shard.vectors for shard in shards)
        draft = Manifest(
            table_version=self._gallery.version,
            contract=manifests.dump_contract(self._gallery),
            template=template,
            shards=tuple(shards),
            recall=self._recall,
        )
        return self._publish(draft, measure=True)

    def update(self, manifest: Manifest, compact_all: bool) -> IndexSummary:
        """Add new faces as new shards, tombstone deleted ones, and merge what is due."""
        began = time.monotonic()
        with closing(find_changes(self._gallery, manifest, self._store)) as changes:
            self.summary.add_time("compare", began)
            template = manifest.template
            vectors = manifest.live + changes.added - changes.removed
            if self._factory is None and is_outgrown(template.lists, vectors):
                return self.build(f"outgrown: {template.factory} was planned for {template.vectors} faces")
            # Add what is new beside the old shards. Deleted faces only get tombstones until their shard is merged.
            plan = self._plan(max(1, manifest.live + changes.added), template.factory)
            shards = add_tombstones(self._store, manifest.shards, changes.tombstones)
            shards += self._add_shards(changes, template, plan.shard_limit)
        if compact_all or shards != list(manifest.shards):
            shards = self._merge(shards, plan.shard_limit, compact_all)
        changed = shards != list(manifest.shards)
        self.summary.action = "updated" if changed else "unchanged"
        self.summary.added = changes.added
        self.summary.removed = changes.removed

        draft = replace(manifest, table_version=self._gallery.version, shards=tuple(shards))
        if changed and is_unbalanced(self._gallery.path, draft, self._config.index.max_imbalance):
            return self.build(
                f"the lists' imbalance grew beyond {self._config.index.max_imbalance:g} times that of training"
            )
        # Measure again only if the index has grown much or another recall is requested: a measurement is expensive.
        recall_changed = self._recall != manifest.recall
        # Older versions measured for ten neighbours only.
        is_partly_measured = bool(template.lists and manifest.curve and not manifest.targets)
        if draft == manifest and not (recall_changed or is_partly_measured):
            return self._finish(manifest)
        grown = abs(draft.live - manifest.measured) > _GROWTH_TO_MEASURE * max(1, manifest.measured)
        return self._publish(draft, measure=(changed and grown) or recall_changed or is_partly_measured)

    def repair(self, manifest: Manifest, cause: IndexDamagedError | None = None) -> IndexSummary:
        """Rebuild the damaged shards only, from the faces that no intact shard holds.

        Args:
            manifest: the current manifest.
            cause: what showed the damage; raised if all files are what was written.
        """
        damage = find_damage(self._store, manifest)
        if manifest.template.name in damage:
            return self.build("the template was damaged")
        if not damage:
            if cause is not None:
                raise cause
            return self._finish(manifest)
        # Drop the damaged shards from the manifest; the comparison with the table then finds their faces missing.
        intact = tuple(shard for shard in manifest.shards if shard.name not in damage)
        began = time.monotonic()
        intact_manifest = replace(manifest, shards=intact)
        with closing(find_changes(self._gallery, intact_manifest, self._store, compare_all=True)) as changes:
            self.summary.add_time("compare", began)
            plan = self._plan(max(1, changes.added), manifest.template.factory)
            shards = add_tombstones(self._store, intact, changes.tombstones)
            shards += self._add_shards(changes, manifest.template, plan.shard_limit)
        self.summary.action = "repaired"
        self.summary.reason = f"{len(damage)} of {len(manifest.shards)} shards were damaged"
        self.summary.added = changes.added
        draft = replace(manifest, table_version=self._gallery.version, shards=tuple(shards))
        return self._publish(draft, measure=False)

    def _plan(self, vectors: int, trained_factory: str | None = None) -> IndexPlan:
        return make_plan(
            vectors,
            self._memory,
            measure_resident_memory(),
            factory=trained_factory or self._factory,
            shard_vectors=self._config.index.shard_vectors,
            trained=trained_factory is not None,
            dim=self._gallery.dim,
        )

    def _train(self, plan: IndexPlan) -> Template:
        """Train a template on a sample of the table, and write it."""
        seed = self._config.index.seed
        began = time.monotonic()
        sample = sample_vectors(self._gallery, plan.train, seed)
        self.summary.add_time("sample", began)
        began = time.monotonic()
        index = train_template(sample, plan, self._on_progress)
        template = save_template(index, self._store.folder, plan, seed=seed, chosen=self._factory is not None)
        self.summary.add_time("train", began)
        return template

    def _add_shards(self, changes: IndexChanges, template: Template, limit: int) -> list[ShardEntry]:
        """Build shards of about `limit` vectors at most, each of whole table files."""
        began = time.monotonic()
        groups = list(group_files(changes.files, limit))
        self._check_disk(sum(file.faces for file in changes.files))
        # A task gets no set of ids to pick from, so that Ray builds the shards of whole files only.
        ray_groups = [group for group in groups if all(file.whole for file in group)] if self._is_on_ray(groups) else []
        shards = list(self._build_on_ray(ray_groups, template)) if ray_groups else []
        for group in groups:
            if group in ray_groups:
                continue
            faces = sum(file.faces for file in group)
            self._on_progress(f"shard {len(shards) + 1} of {len(groups)}: {faces} faces")
            # Of a file that other shards hold in part, only the fresh faces are taken.
            only = None if all(file.whole for file in group) else changes.fresh
            paths = [file.path for file in group]
            rows = read_face_rows(
                self._gallery.faces_folder,
                paths,
                self._gallery.dim,
                only,
                self._skipped,
                deleted=self._gallery.deleted_rows,
            )
            entry = build_shard(self._store, template, rows)
            if entry is not None:
                shards.append(entry)
        self.summary.add_time("shards", began)
        return shards

    def _check_disk(self, faces: int) -> None:
        # Fail early: a full disk in the middle of a build would waste hours.
        needed = faces * (4 * self._gallery.dim + _SIDE_BYTES)
        free = shutil.disk_usage(self._store.folder).free
        # What is kept for searches that began before makes room.
        if needed > free and self._current is not None and self._current.replaced:
            self._tag = manifests.delete_replaced(self._gallery.path, self._lease)
            self._current = replace(self._current, replaced=())
            free = shutil.disk_usage(self._store.folder).free
        if needed > free:
            raise StorageError(
                f"the disk of {self._store.folder!r} has {free >> 20} MiB left, "
                f"and the index needs about {needed >> 20}"
            )

    def _is_on_ray(self, groups: list[list[TableFile]]) -> bool:
        runner = self._config.run.runner
        return runner == "ray" or (runner == "auto" and "RAY_ADDRESS" in os.environ and len(groups) > 1)

    def _build_on_ray(self, groups: list[list[TableFile]], template: Template) -> Iterator[ShardEntry]:
        """Build one shard per group in tasks of Ray."""
        # Tasks on other machines read the template from the store.
        self._store.upload([template.name])
        tasks = [
            _ShardTask(
                gallery=self._gallery.path,
                template=template,
                faces=self._gallery.faces_folder,
                files=[file.path for file in group],
                deleted={
                    file.path: self._gallery.deleted_rows[file.path]
                    for file in group
                    if file.path in self._gallery.deleted_rows
                },
                dim=self._gallery.dim,
            )
            for group in groups
        ]
        ray.start()
        try:
            ray.require_visible(self._gallery.faces_folder, "the gallery")
            for number, (_, result) in enumerate(ray.run_tasks(_build_shard, tasks, self._config.run.cpus), 1):
                self._on_progress(f"shard {number} of {len(groups)} is built")
                self._skipped.unusable += result.unusable
                if result.entry is not None:
                    yield result.entry
        finally:
            ray.stop()

    def _merge(self, shards: list[ShardEntry], limit: int, merge_all: bool) -> list[ShardEntry]:
        """Merge the shards that are due, or all."""
        began = time.monotonic()
        # Each merge replaces a group of shards by one without the deleted vectors.
        if merge_all:
            groups = plan_full_merge(shards, limit)
        else:
            groups = plan_merges(shards, limit, self._config.index.max_dead)
        for group in groups:
            self._on_progress(f"merging {len(group)} shards of {sum(entry.live for entry in group)} faces")
            shards = replace_group(shards, group, merge_shards(self._store, group))
            self.summary.merged += len(group)
        if groups:
            self.summary.add_time("merge", began)
        return shards

    def _publish(self, draft: Manifest, measure: bool) -> IndexSummary:
        """Measure the draft if necessary, make it the current manifest, and delete what it does not name."""
        if measure and draft.live:
            began = time.monotonic()
            draft = tune_manifest(
                self._gallery.path,
                draft,
                self._recall,
                seed=self._config.index.seed,
                new_template=self.summary.action == "built",
            )
            self.summary.add_time("measure", began)
        # The time identifies the index to a search that was interrupted: it resumes only if nothing changed.
        if measure or self.summary.action != "unchanged":
            draft = replace(draft, created=time.time())
        # Searches that began with the replaced shards may go on with them for a while.
        now = self._lease.renew()
        until = now + self._config.index.keep_hours * _SECONDS_PER_HOUR
        draft = manifests.keep_replaced(draft, self._current, until=until, now=now)
        # Publish only if the lease is still held and the manifest is the one that was read; `_tag` tells.
        self._tag = manifests.publish(self._gallery.path, draft, self._tag, self._lease, known=self._current)
        manifests.sweep(self._gallery.path, self._lease)
        return self._finish(draft)

    def _finish(self, manifest: Manifest) -> IndexSummary:
        """Copy the figures of the current index into the summary."""
        summary = self.summary
        summary.vectors = manifest.live
        summary.dead = manifest.deleted
        summary.shards = len(manifest.shards)
        summary.factory = manifest.template.factory
        summary.nprobe = manifest.nprobe
        summary.rescore = manifest.rescore
        summary.unusable = self._skipped.unusable
        summary.imbalance = round(manifest.template.imbalance, 3)
        summary.recall_at_10 = manifests.find_recall(manifest, manifest.nprobe, manifest.rescore)
        summary.bytes = manifest.total_bytes
        return summary


@dataclass(frozen=True)
class _ShardTask:
    """A shard that a Ray task builds.

    Attributes:
        gallery: Path or URL.
        template: The trained, empty index.
        faces: Folder of the table.
        files: Paths below it.
        deleted: Rows of these files that the table has no more: their numbers, by path.
        dim: Numbers per embedding.
    """

    gallery: str
    template: Template
    faces: str
    files: list[str]
    deleted: dict[str, Int64]
    dim: int


@dataclass(frozen=True)
class _ShardResult:
    """What a Ray task built: the shard, if there was a row, and the number of unusable rows."""

    entry: ShardEntry | None
    unusable: int


def _build_shard(task: _ShardTask) -> _ShardResult:
    skipped = SkippedRows()
    store = manifests.open_index_store(task.gallery)
    rows = read_face_rows(task.faces, task.files, task.dim, None, skipped, deleted=task.deleted)
    entry = build_shard(store, task.template, rows)
    if entry is not None:
        store.upload([entry.name])
    return _ShardResult(entry, skipped.unusable)
