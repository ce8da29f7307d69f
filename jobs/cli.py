"""The command line: one function a command, each in the module named after what it works on."""

from typing import Annotated

import typer

import facepipe
from jobs import evaluate
from jobs.clean import clean
from jobs.cluster import cluster
from jobs.dedup import dedup
from jobs.embed import embed
from jobs.gallery import export, info, verify
from jobs.index import index
from jobs.machine import doctor, models
from jobs.search import search

app = typer.Typer(
    name="facepipe",
    help="Large image corpora in, a searchable gallery of 128-D face embeddings out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (embed, index, search, dedup, cluster, clean, info, verify, export, models, doctor):
    app.command()(command)
app.add_typer(evaluate.app, name="evaluate")


def _version(asked: bool) -> None:
    if asked:
        print(f"facepipe {facepipe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Large image corpora in, a searchable gallery of 128-D face embeddings out."""


def main() -> None:
    """Entry point of the `facepipe` script."""
    app()


if __name__ == "__main__":
    main()
