"""Prometheus metrics of a gallery, made from run records and table statistics.

Labels hold names of jobs, phases and statuses, and the gallery's path without credentials. They never hold a file or a
person.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from facepipe import storage
from facepipe.errors import GalleryError, IndexingError, StorageError
from facepipe.observe import runs
from facepipe.observe.runs import JobHistory, RunRecord
from facepipe.storage.redact import redact

COUNT_ROWS = 2_000_000  # tables up to this size are counted by reading two columns, in about a second
COUNT_FILES = 2_000


@dataclass(frozen=True)
class MetricSpec:
    """The meaning of a metric.

    Attributes:
        type: gauge or counter.
        help: one sentence for whoever reads the metrics.
        labels: names of the labels that every sample carries.
    """

    type: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...]


_RUN = ("job", "gallery")
METRICS: dict[str, MetricSpec] = {
    "facepipe_run_last_success_timestamp_seconds": MetricSpec("gauge", "End of the last run with state done.", _RUN),
    "facepipe_run_last_end_timestamp_seconds": MetricSpec("gauge", "End of the last run, in any state.", _RUN),
    "facepipe_run_exit_code": MetricSpec("gauge", "Exit code of the last run: 0 done, 3 over the error budget.", _RUN),
    "facepipe_run_duration_seconds": MetricSpec("gauge", "Wall clock of the last run.", _RUN),
    "facepipe_run_images": MetricSpec("gauge", "Images that the last run read, by status.", (*_RUN, "status")),
    "facepipe_run_faces": MetricSpec("gauge", "Faces that the last run found.", _RUN),
    "facepipe_run_phase_seconds": MetricSpec("gauge", "Wall clock of the last run by phase.", (*_RUN, "phase")),
    "facepipe_run_erased_images": MetricSpec("gauge", "Images that the last run erased.", _RUN),
    "facepipe_gallery_images": MetricSpec("gauge", "Images in the gallery by status.", ("gallery", "status")),
    "facepipe_gallery_faces": MetricSpec("gauge", "Faces in the gallery.", ("gallery",)),
    "facepipe_gallery_bytes": MetricSpec("gauge", "Bytes of the table's current files.", ("gallery",)),
    "facepipe_index_faces": MetricSpec("gauge", "Faces that a search can find.", ("gallery",)),
    "facepipe_index_dead": MetricSpec("gauge", "Deleted faces that are still in shards.", ("gallery",)),
    "facepipe_images_total": MetricSpec("counter", "Images that workers finished, by status.", ("status",)),
    "facepipe_faces_total": MetricSpec("counter", "Faces that workers found.", ()),
    "facepipe_stage_seconds_total": MetricSpec("counter", "Seconds that workers spent in a stage.", ("stage",)),
}
# Ray exports these while a run goes on; they are in no metrics file.
LIVE_METRICS = ("facepipe_images_total", "facepipe_faces_total", "facepipe_stage_seconds_total")


@dataclass(frozen=True)
class MetricSample:
    """One value of a metric.

    Attributes:
        name: a key of METRICS.
        labels: label values, in the order of the metric's label names.
        value: the value.
    """

    name: str
    labels: tuple[str, ...]
    value: float


def render_metrics(gallery_path: str) -> str:
    """Render the metrics of a gallery in Prometheus' text format.

    This reads one small file per job, the table's log (its statistics hold faces and bytes) and the index's manifest.
    No statistic holds images by status. They come from the newest run that counted them, if the table has not changed
    since. Otherwise two columns of the table are read, if it has at most COUNT_ROWS rows in COUNT_FILES files. For a
    larger table the newest count stands, or there is none.

    Args:
        gallery_path: folder or URL of the gallery.
    """
    label = get_gallery_label(gallery_path)
    jobs = runs.read_job_histories(gallery_path)
    samples: list[MetricSample] = []
    for job in sorted(jobs):
        samples.extend(_sample_runs(jobs[job], label))
    samples.extend(_sample_gallery(gallery_path, label, jobs))
    samples.extend(_sample_index(gallery_path, label))
    return render_samples(samples)


def write_metrics(path: str, text: str) -> None:
    """Write a metrics file in one step, so that a collector reads the old one or the new one.

    Raises:
        StorageError: the file cannot be written.
    """
    # Collectors read *.prom only, so they never see the unfinished file.
    with storage.replace_file(path, sync=True, unique=True) as unfinished, open(unfinished, "wb") as file:
        file.write(text.encode())


def get_gallery_label(gallery_path: str) -> str:
    """Name a gallery in metrics and logs: its path, without credentials and query."""
    path = storage.to_absolute(gallery_path)
    if storage.is_remote(path):
        return redact(path).partition("?")[0].rstrip("/")
    return redact(path)


def render_samples(samples: Iterable[MetricSample]) -> str:
    """Render samples in Prometheus' text format, grouped by metric in the order of METRICS."""
    by_name: dict[str, list[MetricSample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_SampleCollector(by_name))
    return generate_latest(registry).decode()


class _SampleCollector(Collector):
    """The source of samples that prometheus-client asks."""

    def __init__(self, samples: Mapping[str, list[MetricSample]]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        for name, spec in METRICS.items():
            if name not in self._samples:
                continue
            family_type = GaugeMetricFamily if spec.type == "gauge" else CounterMetricFamily
            family = family_type(name, spec.help, labels=spec.labels)
            for sample in self._samples[name]:
                # Bytes of a path that are not UTF-8 must not make the whole file unreadable.
                labels = [label.encode("utf-8", "replace").decode() for label in sample.labels]
                family.add_metric(labels, sample.value)
            yield family


def _sample_runs(history: JobHistory, label: str) -> Iterator[MetricSample]:
    """Make the samples of a job's last run."""
    run = history.ended
    labels = (run.job, label)
    if history.success and history.success.ended:
        ended = runs.parse_time(history.success.ended)
        yield MetricSample("facepipe_run_last_success_timestamp_seconds", labels, ended)
    last_end = runs.parse_time(run.ended or run.started)
    yield MetricSample("facepipe_run_last_end_timestamp_seconds", labels, last_end)
    yield MetricSample("facepipe_run_exit_code", labels, run.exit_code or 0)
    yield MetricSample("facepipe_run_duration_seconds", labels, round(run.duration or 0.0, 3))
    for status, count in sorted(_select_counters(run, "status").items()):
        yield MetricSample("facepipe_run_images", (*labels, status), count)
    for counter in ("faces", "erased_images"):
        if counter in run.counters:
            yield MetricSample(f"facepipe_run_{counter}", labels, run.counters[counter])
    for phase, seconds in run.seconds.items():
        yield MetricSample("facepipe_run_phase_seconds", (*labels, phase), seconds)


def _sample_gallery(gallery_path: str, label: str, jobs: dict[str, JobHistory]) -> Iterator[MetricSample]:
    """Make the samples of a gallery's table; none if it cannot be read."""
    from facepipe.gallery import Gallery

    try:
        gallery = Gallery(gallery_path)
        totals = gallery.count_totals()
    except GalleryError:
        return  # the exit codes of the runs show it
    yield MetricSample("facepipe_gallery_faces", (label,), totals.faces)
    yield MetricSample("facepipe_gallery_bytes", (label,), totals.bytes)
    # Images by status: as the newest run counted them, or counted now if the table is small.
    counting_runs = [history.ended for history in jobs.values() if _select_counters(history.ended, "gallery")]
    newest = max(counting_runs, key=lambda run: run.ended or "", default=None)
    images = _select_counters(newest, "gallery") if newest else {}
    is_current = newest is not None and newest.version_after == gallery.version
    is_small = totals.rows <= COUNT_ROWS and totals.files <= COUNT_FILES
    if is_small and not is_current:
        images = {name: count for name, count in gallery.counts().items() if name not in ("images", "faces")}
    for status, count in images.items():
        yield MetricSample("facepipe_gallery_images", (label, status), count)


def _sample_index(gallery_path: str, label: str) -> Iterator[MetricSample]:
    """Make the samples of a gallery's index; none if there is no readable one."""
    from facepipe.index import manifest as manifests

    try:
        if not manifests.exists(gallery_path):
            return
        manifest = manifests.load(gallery_path)
    except (IndexingError, StorageError):
        return
    yield MetricSample("facepipe_index_faces", (label,), manifest.live)
    yield MetricSample("facepipe_index_dead", (label,), manifest.deleted)


def _select_counters(run: RunRecord, prefix: str) -> dict[str, int]:
    """Select the counters named `prefix.x`, keyed by x."""
    start = prefix + "."
    return {name.removeprefix(start): value for name, value in run.counters.items() if name.startswith(start)}
