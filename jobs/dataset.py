"""The command `facepipe write-dataset`."""

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any, Optional

import typer

from jobs.console import exit_on_error, print_result, print_table
from jobs.options import IdentityRule, Json, select_set


class Format(StrEnum):
    """Formats of datasets."""

    REC = "rec"
    WEBDATASET = "webdataset"
    HUGGINGFACE = "huggingface"


def write_dataset(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Labelled images: a list, or anything that embed takes.", show_default=False
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder for the dataset.", show_default=False)],
    kind: Annotated[Format, typer.Option("--format", help="Format of the dataset.")] = Format.REC,
    gallery: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="GALLERY", help="Gallery whose erased images are left out.", show_default="none"),
    ] = None,
    identity: Annotated[
        Optional[IdentityRule],  # noqa: UP045
        typer.Option(help="Origin of identity labels.", show_default="auto"),
    ] = None,
    label_column: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Column of a list or table that holds the label.", show_default="known"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write labelled images as a dataset to train from.

    rec is RecordIO for insightface's programs: train.rec, train.idx, train.lst and property. webdataset is tar shards.
    huggingface is Parquet with a card. Images keep their bytes, and come sorted by person. Persons are numbered from 0;
    labels.csv has their names. Images without a label, and those that cannot be read, are left out and counted.

    For example:

        facepipe finish gallery/ lists/

        facepipe write-dataset lists/train.csv clean/ --format rec --gallery gallery/
    """
    with exit_on_error():
        from facepipe.config import build
        from facepipe.datasets.write import write_dataset as write
        from facepipe.sources import SourceConfig, open_source

        config = build(SourceConfig, select_set(uri=source, identity=identity, label_column=label_column))
        summary = write(open_source(config), out, kind.value, gallery)
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(summary))


def _print_summary(summary: Any) -> None:
    rows = [("images", summary.images), ("persons", summary.persons)]
    rows += [(f"left out: {reason}", count) for reason, count in sorted(summary.left_out.items())]
    print_table("dataset", ("", ""), rows)
    print_left_out(summary)
    print(f"dataset: {summary.out}")


def print_left_out(summary: Any) -> None:
    """Name some of the images that are not in a dataset."""
    for reason, uris in sorted(summary.examples.items()):
        for uri in uris:
            print(f"left out, {reason}: {uri}")
