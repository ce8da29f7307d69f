"""The command `facepipe compact`."""

from dataclasses import asdict
from typing import Annotated

import typer

from jobs.console import exit_on_error, print_result, print_table
from jobs.options import ConfigFile, DryRun, GalleryPath, HelpSettings, Json, Settings, build_config


def compact(
    gallery: GalleryPath,
    everything: Annotated[
        bool, typer.Option("--all", help="Join of small files even if there are few, and repair of any gallery's text.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
    help_settings: HelpSettings = False,
) -> None:
    """Join a gallery's small files into large ones.

    Files that left the table a day ago are deleted. No row changes, and the index stays as it is. What changed of many
    images since their rows were written is folded into the rows; with --all also that of few. Files that hold deleted
    rows are written anew if they are due; with --all all of them are, and every reader of Delta reads the table then. A
    gallery of an older version is repaired: its labels get Unicode's normal form C, and its log right ranges of texts.

    For example:

        facepipe compact gallery/
    """
    with exit_on_error():
        from pipelines.compact import CompactRunConfig, run

        chosen = build_config(CompactRunConfig, config, settings)
        figures = asdict(run(chosen.compact, gallery, everything, dry_run))
        print_result(
            figures,
            as_json=as_json,
            print_text=lambda: print_table(f"compact {gallery}", ("", "count"), figures.items()),
        )
