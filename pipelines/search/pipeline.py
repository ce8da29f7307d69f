"""Search a gallery for queries: open or embed them, search block by block, deliver the results."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from facepipe.errors import ConfigError, IndexReplacedError, SourceError
from facepipe.gallery import Contract, Gallery
from facepipe.index import manifest as manifests
from facepipe.index.answers import SearchCounts
from facepipe.index.cost import ScanWork, is_device_cheaper, is_scan_cheaper
from facepipe.index.lag import measure_lag
from facepipe.index.manifest import Manifest
from facepipe.index.placement import ChosenPlacement, PlacedSearch, choose_placement
from facepipe.index.queries import QuerySource, open_queries
from facepipe.models.runtime.device import resolve_device
from facepipe.storage import is_remote, join
from facepipe.storage.aliases import find_utf8_output
from pipelines import embed
from pipelines.embed.queries import build_query_config
from pipelines.runtime.run_record import record_calls
from pipelines.runtime.runners import ray
from pipelines.search.config import SearchConfig, SearchSummary
from pipelines.search.owners import OwnerPool, search_on_owners
from pipelines.search.parts import (
    PinnedIndex,
    SearchJob,
    SearchTask,
    check_output,
    check_place,
    deliver,
    find_unfinished,
    get_queries_folder,
    is_same_search,
    load_pinned_index,
    make_folder,
    pack_block,
    pin_index,
    prepare_folder,
    remove_unused_folder,
    require_pinned_index,
    search_block,
    search_pack,
    write_part,
)
from pipelines.search.remote import locate_local_output, upload_answers

OnProgress = Callable[[SearchSummary], None]


@record_calls("search")
def run(
    config: SearchConfig, gallery: str, queries: str, out: str, on_progress: OnProgress = lambda summary: None
) -> SearchSummary:
    """Search a gallery's index for queries.

    The output appears when it is complete. Run an interrupted search again to resume it after its last finished block.

    Args:
        config: settings.
        gallery: path or URL.
        queries: images, a gallery, or Parquet files with a column `embedding` or `vector`.
        out: path or URL of a .parquet file, or of a folder of parts.
        on_progress: is called after each block.

    Raises:
        ContractError: the queries were made with other models.
        SourceError: there are no queries.
    """
    began = time.monotonic()
    table = Gallery(gallery)
    # Refuse what cannot be replaced, and a missing index, before any query is read.
    check_output(out)
    manifest = manifests.load(table.path)  # raises before any image is read
    manifests.require_contract(manifest, table)
    source = open_queries(queries, table.contract)
    check_place(out, queries, table.path)
    summary = SearchSummary(out=out, threshold=config.search.threshold)
    # Answers for an object store are made in the cache, where finished blocks stay until all are done.
    remote_out = out
    out = find_utf8_output(locate_local_output(out))
    if is_remote(remote_out):
        check_output(out)
    work = out.rstrip("/") + ".partial"
    make_folder(work)
    try:
        if source is None:
            source = _embed_queries(config, table.contract, queries, work, summary)
        lag = measure_lag(table, manifest, manifests.open_index_store(table.path))
        summary.lacking = lag.lacking
        summary.notes = (*source.notes, *filter(None, [lag.describe(table.path)]))
        _search_blocks(config, table, source, work, summary, began=began, on_progress=on_progress)
    except BaseException:
        remove_unused_folder(work)
        raise
    deliver(work, out, summary.blocks)
    if is_remote(remote_out):
        upload_answers(out, remote_out)
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def _embed_queries(
    config: SearchConfig, contract: Contract, images: str, work: str, summary: SearchSummary
) -> QuerySource:
    """Embed images with the gallery's models, into a gallery beside the output."""
    embed_config = build_query_config(config.embed, contract, images, thumbs=False)
    # The queries are kept in the work folder, so that an interrupted search does not embed them again.
    path = get_queries_folder(work)
    embedded = embed.run(embed_config, path)
    gallery = Gallery(path)
    summary.images = {name: count for name, count in gallery.counts().items() if name not in ("images", "faces")}
    source = open_queries(gallery.path, contract)
    if source is None or embedded.version < 0:
        raise SourceError(f"no image in {images!r}")
    return source


def _search_blocks(
    config: SearchConfig,
    gallery: Gallery,
    source: QuerySource,
    work: str,
    summary: SearchSummary,
    *,
    began: float,
    on_progress: OnProgress,
) -> None:
    """Search the blocks that have no part yet, in this process or on Ray."""
    runner = config.run.runner
    on_ray = runner == "ray" or (runner == "auto" and "RAY_ADDRESS" in os.environ)
    try:
        # Choose the device and the threads of a task.
        resources = ray.start() if on_ray else None
        device = ray.choose_device(config.run.device, resources) if resources else resolve_device(config.run.device)
        threads = config.run.cpus if on_ray else None
        total = source.count()
        # Choose between lists and a scan by their estimated costs on this hardware.
        work_size = ScanWork(
            queries=min(total, config.run.block),
            total=total,
            k=config.search.k,
            cores=threads or len(os.sched_getaffinity(0)),
            gpu=device != "cpu",
            dim=gallery.dim,
        )
        manifest, job = _choose_index(
            work, gallery.path, lambda one: _plan_job(config, gallery, one, source, work_size)
        )
        _describe_job(summary, job, manifest)
        is_device_useless = config.run.device == "auto" and not is_device_cheaper(manifest.live, work_size)
        if job.path == "lists" or job.find.radius or is_device_useless:
            device = "cpu"

        placed = _choose_placement(config, manifest, job, device=device, total=total, on_ray=on_ray)
        summary.placement = placed.placement
        summary.placement_reason = placed.reason

        prepare_folder(work, job)
        blocks = find_unfinished(source, config.run.block, work, summary)
        tasks = (SearchTask(job, block, work, threads, device) for block in blocks)
        # Tasks are generated lazily: blocks are cut while earlier ones are searched.
        pinned = require_pinned_index(work, job)
        results: Iterable[tuple[SearchTask, SearchCounts]] = ((task, search_block(task, pinned)) for task in tasks)
        if on_ray and manifest.shards:
            shard = join(job.gallery, manifests.FOLDER, manifest.shards[0].name, manifests.INDEX)
            ray.require_visible(shard, "the gallery")
        if placed.placement == "owners":
            results = search_on_owners(tasks, OwnerPool(gallery.path, pinned, job.find.recall, config.run.owners))
        elif on_ray:
            results = _search_on_ray(tasks, pinned, gallery.dim, cpus=config.run.cpus, gpus=int(device != "cpu"))
        for _, counts in results:
            summary.add_counts(counts)
            summary.seconds = time.monotonic() - began
            on_progress(summary)
    finally:
        if on_ray:
            ray.stop()


def _choose_placement(
    config: SearchConfig, manifest: Manifest, job: SearchJob, *, device: str, total: int, on_ray: bool
) -> ChosenPlacement:
    """Choose whether every worker opens all shards, or each has an owner.

    Raises:
        ConfigError: owners are requested, and there is no Ray.
    """
    requested = config.run.placement
    if not on_ray:
        if requested == "owners":
            raise ConfigError("run.placement=owners needs run.runner=ray: one process opens all shards")
        return ChosenPlacement("copies", "")
    if requested != "auto":
        return ChosenPlacement(requested, f"run.placement={requested}")
    if device != "cpu":
        return ChosenPlacement("copies", "GPUs compare with all vectors")
    setting = manifest.choose_target(k=job.find.k, radius=job.find.radius, recall=job.find.recall)
    search = PlacedSearch(
        queries=total,
        nprobe=setting.nprobe,
        rescore=setting.rescore,
        worker_cpus=config.run.cpus,
        is_remote=is_remote(job.gallery),
    )
    return choose_placement(manifest, ray.list_rooms(), search)


def _search_on_ray(
    tasks: Iterable[SearchTask], pinned: PinnedIndex, dim: int, *, cpus: float, gpus: float
) -> Iterator[tuple[SearchTask, SearchCounts]]:
    """Search blocks in Ray tasks. Queries travel and answers come back, so that nodes need to see the gallery only."""
    results = ray.run_tasks(
        search_pack, tasks, cpus, gpus=gpus, prepare=lambda task: pack_block(task, dim), shared=pinned
    )
    for task, part in results:
        write_part(task, part)
        yield task, part.counts


def _choose_index(work: str, gallery: str, plan_job: Callable[[Manifest], SearchJob]) -> tuple[Manifest, SearchJob]:
    """Choose the index to search: the one that an interrupted search began with, or else the published one.

    Answers of two indexes must not be mixed. So a search that is resumed stays in its own while its files are kept.

    Args:
        work: folder of the parts.
        gallery: path or URL of the gallery.
        plan_job: plans the search of an index.

    Returns:
        The index, and the search of it.
    """
    pinned = load_pinned_index(work, gallery)
    if pinned is not None:
        job = plan_job(pinned.manifest)
        with suppress(IndexReplacedError):
            if is_same_search(work, job):
                pinned.open(gallery, merge=False)
                return pinned.manifest, job
    published = PinnedIndex.from_published(gallery)
    pin_index(work, published)
    return published.manifest, plan_job(published.manifest)


def _plan_job(
    config: SearchConfig, gallery: Gallery, manifest: Manifest, source: QuerySource, work_size: ScanWork
) -> SearchJob:
    """Decide what `auto` means: whether to scan, and whether a face finds itself."""
    options = config.search
    if options.leave_self_out is None:
        # A gallery that searches itself would find each face as its own nearest neighbour.
        searches_itself = source.gallery and os.path.realpath(source.path) == os.path.realpath(gallery.path)
        options = replace(options, leave_self_out=searches_itself)
    path: str = options.path
    if path == "auto":
        chosen = manifest.choose_target(k=options.k, radius=options.radius, recall=options.recall)
        # A scan by radius runs on CPUs.
        work = replace(work_size, gpu=work_size.gpu and not options.radius)
        path = "scan" if is_scan_cheaper(manifest, chosen.nprobe, chosen.rescore, work) else "lists"
    return SearchJob(
        gallery=gallery.path,
        created=manifest.created,
        queries=source.path,
        fingerprint=source.fingerprint,
        block=config.run.block,
        find=options,
        path=path,
    )


def _describe_job(summary: SearchSummary, job: SearchJob, manifest: Manifest) -> None:
    """Copy the setting of the search, and its measured recall, into the summary."""
    summary.path = job.path
    summary.vectors = manifest.live
    find = job.find
    chosen = manifest.choose_target(k=find.k, radius=find.radius, recall=find.recall)
    summary.nprobe = chosen.nprobe
    summary.rescore = chosen.rescore
    # A scan, or an index without lists, compares every vector, so that its recall is 1.
    is_exact = job.path == "scan" or not manifest.template.lists
    summary.recall = 1.0 if is_exact else chosen.recall
    summary.recall_of = f"recall within {find.radius:g}" if find.radius else f"recall@{find.k}"
    if not find.radius and find.k <= manifests.CURVE_K:
        summary.recall_at_10 = summary.recall
