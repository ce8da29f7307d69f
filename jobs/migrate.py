"""The command `facepipe migrate`."""

from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, Optional

import typer

from jobs.console import ExitCode, exit_on_error, fail, print_result, print_table
from jobs.options import Embedder, GalleryPath, Json, Quiet, select_set
from jobs.progress import ProgressReporter

Policy = Literal["any", "commercial"]


def migrate(
    gallery: GalleryPath,
    embedder: Embedder = None,
    flip: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--flip/--no-flip",
            help="Average of the vectors of a face and of its mirror image.",
            show_default="as the gallery",
        ),
    ] = None,
    switch: Annotated[
        bool, typer.Option("--switch", help="The new vectors take the place of the old ones, in one commit.")
    ] = False,
    drop_old: Annotated[
        bool, typer.Option("--drop-old", help="The old vectors are deleted, after the switch.")
    ] = False,
    max_failed: Annotated[
        float,
        typer.Option(min=0, max=1, help="Largest share of images that may lose their faces, because they are gone."),
    ] = 0.01,
    policy: Annotated[
        Policy,
        typer.Option(help="commercial: no model that forbids commercial use."),
    ] = "any",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Give a gallery the vectors of another model.

    Boxes and landmarks are used again, so that no detector runs. Face ids, labels, clusters and reports stay. The new
    vectors are made in GALLERY/migration, a gallery of its own: it can be indexed, searched and evaluated while the old
    one goes on. Killed, the same command resumes. --switch makes the new vectors those of the gallery, in one commit.
    Readers that have it open keep the old ones, which stay on the disk until --drop-old, or `compact` a day later.

    Images that are gone, changed or unreadable become rows with a status, and are named.

    For example:

        facepipe migrate gallery/ --embedder arcface.toml

        facepipe search gallery/migration photos/ answers.parquet --embedder arcface.toml

        facepipe migrate gallery/ --switch

        facepipe migrate gallery/ --drop-old
    """
    with exit_on_error():
        from facepipe.config import build
        from facepipe.errors import ConfigError
        from pipelines import migrate as pipeline

        if embedder is None and not switch and not drop_old:
            raise ConfigError("nothing to do: give --embedder MODEL, --switch or --drop-old")
        options = select_set(embedder=embedder, flip=flip, policy=policy, max_failed=max_failed)
        config = build(pipeline.MigrateConfig, options)
        summary = pipeline.MigrateSummary(gallery)
        with ProgressReporter("migrate", quiet=quiet) as progress:
            if embedder is not None:
                summary = pipeline.run(config, gallery, on_progress=progress.update)
            if switch:
                switched = pipeline.switch(gallery, max_failed=max_failed, on_progress=progress.update)
                summary = _join(summary, switched) if summary.figures else switched
            if drop_old:
                dropped = pipeline.drop_old(gallery)
                summary = replace(summary if summary.switched else dropped, deleted=dropped.deleted)
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(summary))
        failed = sum(summary.failed.values())
        if failed > max_failed * max(1, summary.images):
            fail(
                f"{failed} of {summary.images} images have no new vectors, more than --max-failed {max_failed:g}",
                ExitCode.OVER_BUDGET,
            )


def _join(made: Any, switched: Any) -> Any:
    """Join the summaries of a migration and of its switch."""
    made.switched = True
    made.migration = ""
    made.has_index = switched.has_index
    made.images = switched.images
    made.faces = switched.faces
    made.seconds = round(made.seconds + switched.seconds, 3)
    return made


def _print_summary(summary: Any) -> None:
    rows: list[tuple[str, Any]] = []
    if summary.images:
        rows += [("images", summary.images), ("faces with new vectors", summary.faces)]
    if summary.migrated:
        rows.append(("images embedded again now", summary.migrated))
    rows += [(f"without new vectors: {reason}", count) for reason, count in sorted(summary.failed.items())]
    if summary.removed:
        rows.append(("images that the gallery has no more", summary.removed))
    if summary.deleted:
        rows.append(("files of old vectors deleted", summary.deleted))
    state = "switched" if summary.switched else f"beside the old vectors, in {summary.migration}"
    rows.append(("the new vectors are", state))
    old = f"{summary.old} -> " if summary.old else ""
    print_table(f"migrate {summary.gallery}: {old}{summary.new}", ("", ""), rows)
    for example in summary.examples:
        print(f"without new vectors: {example}")

    # Old against new, on faces that both have.
    if summary.figures:
        print_table(
            f"{summary.compared} labelled faces",
            ("", *(f"{one.embedder} ({one.dim}-D)" for one in summary.figures)),
            [
                (title, *(_format(getattr(one, name)) for one in summary.figures))
                for title, name in (
                    ("accuracy of pairs", "accuracy"),
                    ("TAR at FAR 1e-3", "tar"),
                    ("FNIR at FPIR 1 %", "fnir"),
                    ("clusters, pairwise F", "clusters_f"),
                    ("clusters, BCubed F", "clusters_bcubed_f"),
                )
            ],
        )
    if summary.switched and not summary.has_index:
        print(f"searches need an index of the new vectors: `facepipe index {summary.gallery}`")
    if summary.switched:
        print(f"new faces find clusters again after `facepipe cluster --keep-ids {summary.gallery}`")


def _format(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
