"""Metrics in Prometheus' text format (0.0.4), made from run records and table statistics.

Labels hold names of jobs, phases and statuses, and the gallery's path without credentials; never a file or a person.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from facepipe import storage
from facepipe.errors import GalleryError, IndexingError, StorageError
from facepipe.observe import runs
from facepipe.observe.runs import Last, RunRecord
from facepipe.storage.redact import redact

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNT_ROWS = 2_000_000  # up to here images are counted in the table: a second
COUNT_FILES = 2_000


class Metric(NamedTuple):
    """What a name stands for. labels: of every sample."""

    type: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...]


_RUN = ("job", "gallery")
NAMES: dict[str, Metric] = {
    "facepipe_run_last_success_timestamp_seconds": Metric("gauge", "End of the last run with state done.", _RUN),
    "facepipe_run_last_end_timestamp_seconds": Metric("gauge", "End of the last run, however it ended.", _RUN),
    "facepipe_run_exit_code": Metric("gauge", "Exit code of the last run: 0 done, 3 over the error budget.", _RUN),
    "facepipe_run_duration_seconds": Metric("gauge", "Wall clock of the last run.", _RUN),
    "facepipe_run_images": Metric("gauge", "Images that the last run read, by status.", (*_RUN, "status")),
    "facepipe_run_faces": Metric("gauge", "Faces that the last run found.", _RUN),
    "facepipe_run_phase_seconds": Metric("gauge", "Wall clock of the last run by phase.", (*_RUN, "phase")),
    "facepipe_run_erased_images": Metric("gauge", "Images that the last run erased.", _RUN),
    "facepipe_gallery_images": Metric("gauge", "Images in the gallery by status.", ("gallery", "status")),
    "facepipe_gallery_faces": Metric("gauge", "Faces in the gallery.", ("gallery",)),
    "facepipe_gallery_bytes": Metric("gauge", "Bytes of the table's files, older versions left out.", ("gallery",)),
    "facepipe_index_faces": Metric("gauge", "Faces that a search can find.", ("gallery",)),
    "facepipe_index_dead": Metric("gauge", "Deleted faces that are still in shards.", ("gallery",)),
    "facepipe_images_total": Metric("counter", "Images that workers finished, by status.", ("status",)),
    "facepipe_faces_total": Metric("counter", "Faces that workers found.", ()),
    "facepipe_stage_seconds_total": Metric("counter", "Seconds that workers spent in a stage.", ("stage",)),
}
LIVE = ("facepipe_images_total", "facepipe_faces_total", "facepipe_stage_seconds_total")  # exported by Ray, not here


class Sample(NamedTuple):
    """A value; labels in the order of the metric's."""

    name: str
    labels: tuple[str, ...]
    value: float


def text(gallery_path: str) -> str:
    """The metrics of a gallery, for a scrape or for node_exporter's textfile collector.

    Reads one small file a job, the table's log (faces and bytes are in its statistics) and the index's manifest. Images
    by status are in no statistics. They come from the newest run that counted them (`Run.counted`) if the table has
    not changed since; else two columns of the table are read, where it has at most COUNT_ROWS rows in COUNT_FILES
    files; of a larger one the newest count there is stands, or none.
    """
    label = gallery_label(gallery_path)
    jobs = runs.last_of_jobs(gallery_path)
    samples = [sample for job in sorted(jobs) for sample in _run_samples(jobs[job], label)]
    return exposition([*samples, *_gallery_samples(gallery_path, label, jobs), *_index_samples(gallery_path, label)])


def write(path: str, text: str) -> None:
    """Write a metrics file in one step: a collector reads the old one or the new one. Raises StorageError."""
    # Collectors read *.prom only, so they never see the unfinished file.
    with storage.replace_file(path, sync=True, unique=True) as unfinished, open(unfinished, "wb") as file:
        file.write(text.encode())


def gallery_label(gallery_path: str) -> str:
    """What names a gallery in metrics and logs: its path, without credentials and query."""
    path = storage.to_absolute(gallery_path)
    return redact(path).partition("?")[0].rstrip("/") if storage.is_remote(path) else redact(path)


def exposition(samples: list[Sample]) -> str:
    """Samples in Prometheus' text format, grouped by metric in the order of NAMES."""
    lines = []
    for name, metric in NAMES.items():
        mine = [sample for sample in samples if sample.name == name]
        if mine:
            lines += [f"# HELP {name} {_escape(metric.help, quotes=False)}", f"# TYPE {name} {metric.type}"]
            lines += [_line(sample, metric.labels) for sample in mine]
    return "".join(line + "\n" for line in lines)


def _line(sample: Sample, names: tuple[str, ...]) -> str:
    pairs = ",".join(f'{name}="{_escape(value)}"' for name, value in zip(names, sample.labels, strict=True))
    value = int(sample.value) if float(sample.value).is_integer() else repr(float(sample.value))
    return f"{sample.name}{{{pairs}}} {value}" if pairs else f"{sample.name} {value}"


def _escape(text: str, quotes: bool = True) -> str:
    # Bytes of a path that are not UTF-8 must not make the whole file unreadable.
    text = text.encode("utf-8", "replace").decode().replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _run_samples(found: Last, label: str) -> Iterator[Sample]:
    run = found.ended
    who = (run.job, label)
    if found.success and found.success.ended:
        ended = runs.timestamp(found.success.ended)
        yield Sample("facepipe_run_last_success_timestamp_seconds", who, ended)
    yield Sample("facepipe_run_last_end_timestamp_seconds", who, runs.timestamp(run.ended or run.started))
    yield Sample("facepipe_run_exit_code", who, run.exit_code or 0)
    yield Sample("facepipe_run_duration_seconds", who, round(run.duration or 0.0, 3))
    for status, count in sorted(_by(run, "status").items()):
        yield Sample("facepipe_run_images", (*who, status), count)
    for counter in ("faces", "erased_images"):
        if counter in run.counters:
            yield Sample(f"facepipe_run_{counter}", who, run.counters[counter])
    for phase, seconds in run.seconds.items():
        yield Sample("facepipe_run_phase_seconds", (*who, phase), seconds)


def _gallery_samples(gallery_path: str, label: str, jobs: dict[str, Last]) -> Iterator[Sample]:
    from facepipe.gallery import Gallery

    try:
        gallery = Gallery(gallery_path)
        files = gallery.files()
    except GalleryError:
        return  # the runs' exit codes tell of it
    yield Sample("facepipe_gallery_faces", (label,), sum(file["faces"] for file in files))
    yield Sample("facepipe_gallery_bytes", (label,), sum(file["size_bytes"] for file in files))
    counted = [run for run in (found.ended for found in jobs.values()) if _by(run, "gallery")]
    newest = max(counted, key=lambda run: run.ended or "", default=None)
    images = _by(newest, "gallery") if newest else {}
    small = sum(file["num_records"] for file in files) <= COUNT_ROWS and len(files) <= COUNT_FILES
    if small and not (newest and newest.version_after == gallery.version):
        images = {name: n for name, n in gallery.counts().items() if name not in ("images", "faces")}
    for status, count in images.items():
        yield Sample("facepipe_gallery_images", (label, status), count)


def _index_samples(gallery_path: str, label: str) -> Iterator[Sample]:
    from facepipe.index import manifest

    try:
        if not manifest.exists(gallery_path):
            return
        found = manifest.load(gallery_path)
    except (IndexingError, StorageError):
        return
    yield Sample("facepipe_index_faces", (label,), found.live)
    yield Sample("facepipe_index_dead", (label,), found.deleted)


def _by(run: RunRecord, prefix: str) -> dict[str, int]:
    """Counters `prefix.x` by x."""
    start = prefix + "."
    return {name.removeprefix(start): value for name, value in run.counters.items() if name.startswith(start)}
