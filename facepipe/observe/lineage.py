"""OpenLineage events: what a run read and wrote, for catalogues such as Marquez, DataHub or OpenMetadata.

A run sends START, and COMPLETE, FAIL or ABORT when it ends. The datasets are the gallery's table, its index and its
reports, never the images: events hold counts, columns and versions, and no uri of an image, label or message.
"""

import logging
import os
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from uuid import NAMESPACE_URL, UUID, uuid5

from facepipe import storage
from facepipe.errors import ConfigError, GalleryError
from facepipe.extras import require_module
from facepipe.observe import logs
from facepipe.observe.metrics import get_gallery_label
from facepipe.observe.runs import RunRecord

API_KEY = "OPENLINEAGE_API_KEY"
"""Environment variable of the receiver's key."""
PARENT = "OPENLINEAGE_PARENT_ID"
"""Environment variable by which a scheduler says which of its runs started this one: NAMESPACE/JOB/RUN."""

_NAMESPACE = "facepipe"
_PRODUCER = "https://pypi.org/project/facepipe"
# A receiver that does not answer must not hold a run up: this long per event, and no more events after a few failures.
_TIMEOUT_S = 5.0
_MAX_FAILURES = 3
_URL = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True)
class JobDatasets:
    """What a job reads and writes in a gallery.

    Attributes:
        inputs: parts of the gallery that it reads.
        outputs: parts that it writes.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


_FACES = "faces"
_JOBS = {
    "embed": JobDatasets(outputs=(_FACES,)),
    "adopt": JobDatasets(outputs=(_FACES,)),
    "compact": JobDatasets((_FACES,), (_FACES,)),
    "erase": JobDatasets((_FACES,), (_FACES,)),
    "nightly": JobDatasets((_FACES,), (_FACES, "index")),
    "index": JobDatasets((_FACES,), ("index",)),
    "search": JobDatasets((_FACES, "index")),
    "identify": JobDatasets((_FACES, "index")),
    "bulk_search": JobDatasets((_FACES, "index")),
    "dedup": JobDatasets((_FACES,), ("reports/dedup",)),
    "dedup_new": JobDatasets((_FACES, "index"), ("reports/dedup-new",)),
    "cluster": JobDatasets((_FACES,), ("reports/cluster",)),
    "assign": JobDatasets((_FACES, "index"), ("reports/cluster",)),
    "clean": JobDatasets((_FACES,), ("reports/clean",)),
    "clean_dataset": JobDatasets((_FACES,), (_FACES, "reports/clean")),
}


@dataclass
class LineageSender:
    """Sends events to a receiver. What fails is a warning, and the run goes on.

    Attributes:
        target: URL of the receiver, or file to append to.
        failures: events in a row that could not be sent.
    """

    target: str
    failures: int = 0
    _client: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the target, so that a mistyped one fails before the work.

        Raises:
            ConfigError: the target is neither an http(s) URL nor a local file.
            MissingPackageError: the package is not installed.
        """
        require_module("openlineage", "--openlineage")
        scheme = urlsplit(self.target).scheme
        if not self.target or ("://" in self.target and not _URL.match(self.target)):
            raise ConfigError(
                f"--openlineage={logs.redact(self.target)!r} is not an http or https URL or a file, but "
                f"{scheme or 'empty'}: write http://HOST:PORT or FILE.jsonl"
            )
        if not _URL.match(self.target) and not os.path.isdir(os.path.dirname(os.path.abspath(self.target))):
            raise ConfigError(f"--openlineage={self.target!r}: there is no folder for this file: make it first")

    def send(self, gallery: str, record: RunRecord, parent_job: str | None = None) -> bool:
        """Send where a run stands: START while it runs, else COMPLETE, FAIL or ABORT.

        Args:
            gallery: folder or URL of the gallery.
            record: the run's record.
            parent_job: job of the run that this one is part of, if any.

        Returns:
            Whether the receiver took the event.
        """
        if self.failures >= _MAX_FAILURES:
            return False
        try:
            # The client logs whole events and answers of the receiver, in which anything may stand.
            logging.getLogger("openlineage").setLevel(logging.CRITICAL)
            if self._client is None:
                self._client = _make_client(self.target)
            self._client.emit(make_event(gallery, record, parent_job))
        except Exception as error:  # whatever the receiver does, the run goes on
            self.failures += 1
            logs.log_event("lineage.unsent", logging.WARNING, error=error)
            return False
        self.failures = 0
        return True


def _make_client(target: str) -> Any:
    """Make a client that posts to a URL, or appends to a file."""
    from openlineage.client import OpenLineageClient

    if not _URL.match(target):
        return OpenLineageClient(
            config={"transport": {"type": "file", "log_file_path": os.path.abspath(target), "append": True}}
        )
    transport: dict[str, Any] = {
        "type": "http",
        "url": target,
        "timeout": _TIMEOUT_S,
        "retry": {"total": 0},
    }
    if key := os.environ.get(API_KEY):
        transport["auth"] = {"type": "api_key", "apiKey": key}
    return OpenLineageClient(config={"transport": transport})


def make_event(gallery: str, record: RunRecord, parent_job: str | None = None) -> Any:
    """Make the event of a run, a `RunEvent` of the OpenLineage client; see `LineageSender.send`."""
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import job_type_job

    place = get_gallery_label(gallery)
    datasets = _JOBS.get(record.job, JobDatasets((_FACES,)))
    kind = job_type_job.JobTypeJobFacet(processingType="BATCH", integration="FACEPIPE", jobType=record.job.upper())
    return RunEvent(
        eventType=RunState(_find_event_type(record)),
        eventTime=record.ended or record.started,
        run=Run(str(make_run_uuid(record.run)), _make_run_facets(place, record, parent_job)),
        job=Job(_NAMESPACE, _name_job(place, record.job), {"jobType": kind}),
        producer=_PRODUCER,
        inputs=[
            InputDataset(*_name_dataset(place, part), facets=_make_facets(part, record.version_before))
            for part in datasets.inputs
        ],
        outputs=[
            OutputDataset(
                *_name_dataset(place, part),
                facets=_make_facets(part, record.version_after),
                outputFacets=_make_statistics(gallery, part, record),
            )
            for part in datasets.outputs
        ],
    )


def _find_event_type(record: RunRecord) -> str:
    """Return the type of the event. A run that did all its work but is above an error budget is complete."""
    types = {"running": "START", "done": "COMPLETE", "over_budget": "COMPLETE", "interrupted": "ABORT"}
    return types.get(record.state, "FAIL")


def make_run_uuid(run: str) -> UUID:
    """Return the UUID by which events name a run. It follows from the run id, so a parent's is known to its steps."""
    return uuid5(NAMESPACE_URL, f"{_PRODUCER}/run/{run}")


def _name_job(place: str, job: str) -> str:
    """Name a job: one per command and gallery, because a catalogue keeps the history of each."""
    return f"{place}.{job}"


def _make_run_facets(place: str, record: RunRecord, parent_job: str | None) -> dict[str, Any]:
    """Make the facets of a run: its figures, its parent, and the class of the error that ended it."""
    from openlineage.client.facet_v2 import RunFacet, error_message_run, processing_engine_run

    facets: dict[str, Any] = {
        "processing_engine": processing_engine_run.ProcessingEngineRunFacet(record.facepipe, "facepipe"),
        "facepipe": RunFacet().with_additional_properties(
            run=record.run,
            state=record.state,
            exitCode=record.exit_code,
            counters=dict(record.counters),
            seconds=dict(record.seconds),
        ),
    }
    if parent := _find_parent(place, record, parent_job):
        facets["parent"] = parent
    if record.error:
        # A message may name a file or a person, so the class of the error stands for it.
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(record.error, "PYTHON")
    return facets


def _find_parent(place: str, record: RunRecord, parent_job: str | None) -> Any:
    """Find the run that started this one: another run of facepipe, or the scheduler that the environment names."""
    from openlineage.client.facet_v2 import parent_run

    if record.parent and parent_job:
        job = parent_run.Job(_NAMESPACE, _name_job(place, parent_job))
        return parent_run.ParentRunFacet(parent_run.Run(str(make_run_uuid(record.parent))), job)
    # NAMESPACE/JOB/RUN; a job's name may hold slashes.
    namespace, _, rest = os.environ.get(PARENT, "").partition("/")
    name, _, run = rest.rpartition("/")
    if namespace and name and run:
        return parent_run.ParentRunFacet(parent_run.Run(run), parent_run.Job(namespace, name))
    return None


def _name_dataset(place: str, part: str) -> tuple[str, str]:
    """Return namespace and name of a part of a gallery, as OpenLineage's naming has them for files and buckets."""
    if storage.is_remote(place):
        parts = urlsplit(place)
        return f"{parts.scheme}://{parts.netloc}", f"{parts.path.strip('/')}/{part}"
    return "file", f"{place}/{part}"


def _make_facets(part: str, version: int | None) -> dict[str, Any]:
    from openlineage.client.facet_v2 import dataset_version_dataset, schema_dataset

    from facepipe.schema import FACES

    if part != _FACES:
        return {}
    columns = [schema_dataset.SchemaDatasetFacetFields(column.name, str(column.type)) for column in FACES]
    facets: dict[str, Any] = {"schema": schema_dataset.SchemaDatasetFacet(columns)}
    if version is not None:
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(str(version))
    return facets


def _make_statistics(gallery_path: str, part: str, record: RunRecord) -> dict[str, Any]:
    """Count rows, files and bytes of the table that a run has written; nothing before it ends."""
    from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

    from facepipe.gallery import Gallery

    if part != _FACES or record.state == "running":
        return {}
    try:
        totals = Gallery(gallery_path).count_totals()
    except GalleryError:
        return {}
    counts = statistics.OutputStatisticsOutputDatasetFacet(
        rowCount=totals.rows,
        size=totals.bytes,
        fileCount=totals.files,
    )
    return {"outputStatistics": counts}
